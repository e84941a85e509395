"""The application in the test's own process, where its parts can be made to fail."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import httpx

from app.main import create_app
from app.settings import Settings
from support.server import Compiled

Result = TypeVar("Result")


def settings_of(folder: Path, **settings: Any) -> Settings:
    """Without a worker, and for models that see little, so that they are quick to open."""
    quick: dict[str, Any] = {"worker": "off", "batching": "off", "gate_found": 0.0, "threads": 1}
    folders = {"data_dir": folder / "data", "cache_dir": Compiled.folder}
    return Settings(**{**folders, **quick, **settings})


def in_process(
    settings: Settings, work: Callable[[httpx.AsyncClient, Any], Awaitable[Result]]
) -> Result:
    """Start the application, do something with a client and the application, and end it."""

    async def run() -> Result:
        app = create_app(settings)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        client = httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60)
        async with app.router.lifespan_context(app), client:
            return await work(client, app)

    return asyncio.run(run())
