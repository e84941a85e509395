"""A real browser in front of a real server, and what must hold on each page that it shows."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
SIZES = {"desktop": (1280, 800), "tablet": (768, 1024), "phone": (390, 844)}
GRAVE = {"moderate", "serious", "critical"}  # of axe-core's words for how bad something is


def installed() -> str:
    """The browser that the machine has; skips where it has none."""
    for name in NAMES:
        if found := shutil.which(name):
            return found
    pytest.skip("no Chromium here: apt-get install chromium")


@contextmanager
def running_browser() -> Iterator[Any]:
    """Playwright's browser, headless."""
    from playwright.sync_api import sync_playwright

    program = installed()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield browser
        browser.close()


@dataclass
class Shown:
    """A page of the screen that is open, and what it did that it must not do."""

    page: Any
    url: str
    wrong: list[str] = field(default_factory=list)

    def go(self, where: str) -> None:
        """Open a page by its hash, such as `#/line`."""
        self.page.goto(f"{self.url}/{where}")
        self.page.wait_for_selector("main")

    def expect(self, text: str, within_s: float = 10) -> None:
        """Wait until a text can be seen."""
        self.page.get_by_text(text).first.wait_for(timeout=within_s * 1000)

    def must_be_accessible(self) -> None:
        """axe-core finds nothing above minor."""
        from axe_playwright_python.sync_playwright import Axe

        found = Axe().run(self.page).response["violations"]
        said = [
            f"{one['impact']}: {one['help']}: {one['nodes'][0]['html'][:200]}"
            for one in found
            if one["impact"] in GRAVE
        ]
        assert not said, "\n".join(said)

    def must_fit(self) -> None:
        """Nothing is wider than the window."""
        width = self.page.evaluate("document.documentElement.scrollWidth")
        assert width <= self.page.viewport_size["width"], width

    def keep(self, folder: Path, name: str) -> Path:
        """A screenshot, to be looked at."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.png"
        self.page.screenshot(path=path)
        return path


@contextmanager
def shown(
    browser: Any,
    url: str,
    *,
    size: str = "desktop",
    language: str = "en",
    dark: bool = False,
    refused: bool = False,
) -> Iterator[Shown]:
    """A window on a server. In the end: no error in its console, and nothing was asked elsewhere.

    Args:
        refused: whether refusals, which a browser logs as errors, are part of the story.
    """
    width, height = SIZES[size]
    context = browser.new_context(
        viewport={"width": width, "height": height},
        locale={"en": "en-GB", "ja": "ja-JP"}[language],
        timezone_id="UTC",
        color_scheme="dark" if dark else "light",
        has_touch=size != "desktop",
        accept_downloads=True,
    )
    found = Shown(context.new_page(), url)
    watch(context, found, refused=refused)
    try:
        yield found
        assert not found.wrong, "\n".join(found.wrong)
    finally:
        context.close()


def watch(context: Any, found: Shown, *, refused: bool) -> None:
    """Note what no page of the screen may do."""
    home = urlsplit(found.url).netloc

    def asked(request: Any) -> None:
        to = urlsplit(request.url)
        if to.scheme not in ("blob", "data") and to.netloc != home:
            found.wrong.append(f"asked another server: {request.url}")

    def said(message: Any) -> None:
        is_refusal = "Failed to load resource" in message.text
        if message.type == "error" and not (refused and is_refusal):
            found.wrong.append(f"console: {message.text} ({message.location.get('url')})")

    context.on("request", asked)
    context.on("console", said)
    context.on("weberror", lambda error: found.wrong.append(f"not caught: {error.error}"))
