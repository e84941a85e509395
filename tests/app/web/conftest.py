"""What the tests of the screen share: a browser, a server with a model, and where pictures go."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.browser import running_browser
from support.server import Server, serving


@pytest.fixture(scope="module")  # Playwright's loop runs as long, and no asyncio.run beside it
def browser() -> Iterator[Any]:
    with running_browser() as found:
        yield found


@pytest.fixture(scope="module")
def server(kensa_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With the model `bracket`, and everybody on this machine may do everything."""
    folder = tmp_path_factory.mktemp("server")
    with serving(folder, KENSA_MODEL_DIR=str(kensa_model), KENSA_MODEL_NAME="bracket") as found:
        yield found


@pytest.fixture(scope="session")
def screenshots(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Path:
    """Where the run leaves its screenshots: build/screenshots of the project."""
    return Path(pytestconfig.rootpath) / "build" / "screenshots"
