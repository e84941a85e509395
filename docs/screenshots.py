"""The screenshots of the README, of the demo's model and parts: `python3 docs/screenshots.py`.

It needs what `make demo ARGS=--once` leaves, `pip install .[dev]`, and Chromium.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
SIZE = {"width": 1280, "height": 800}
BROWSERS = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
EVERY_S = 0.15  # a part
BEFORE = 40  # parts that came before somebody looks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--demo", type=Path, default=ROOT / ".demo", help="its folder (.demo)")
    demo = parser.parse_args().demo
    parts = drawn_parts(demo / "data" / "test" / "sample_bracket")
    with tempfile.TemporaryDirectory() as folder, server(demo, Path(folder)) as url:
        for number, path in enumerate(parts[:BEFORE]):
            send(url, path, number)
        with sync_playwright() as playwright:
            program = next(filter(None, map(shutil.which, BROWSERS)))
            browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
            page = browser.new_page(viewport=SIZE, locale="en-GB", color_scheme="light")
            page.goto(f"{url}/#/line")
            page.wait_for_selector("main.line h1")
            for number, path in enumerate(parts[BEFORE:], BEFORE):
                send(url, path, number)
                time.sleep(EVERY_S)
            page.wait_for_timeout(1500)
            page.screenshot(path=IMAGES / "line.jpg", type="jpeg", quality=85)
            page.goto(f"{url}/#/model")
            page.wait_for_selector("main.model h1")
            page.wait_for_timeout(2500)
            page.screenshot(path=IMAGES / "model.jpg", type="jpeg", quality=85)
            browser.close()


def drawn_parts(folder: Path) -> list[Path]:
    """As they come on a line: mostly good ones, a defect now and then, one as the last."""
    good = sorted((folder / "normal").glob("*.png"))
    bad = sorted((folder / "anomaly").glob("*.png"))
    chance = random.Random(7)
    found = [chance.choice(bad if chance.random() < 0.08 else good) for _ in range(BEFORE + 25)]
    return [*found, folder / "anomaly" / "stain_00.png"]


def send(url: str, path: Path, number: int) -> None:
    part = {"part": f"KB-2046/A {number + 101}"}
    httpx.post(f"{url}/infer", params=part, content=path.read_bytes()).raise_for_status()


@contextmanager
def server(demo: Path, folder: Path) -> Iterator[str]:
    """A server with the demo's model; its address."""
    settings = {
        "KENSA_MODEL_DIR": str(demo / "models" / "engine"),
        "KENSA_MODEL_NAME": "bracket",
        "KENSA_DATA_DIR": str(folder / "data"),
        "KENSA_RECORD_SAMPLE": "1",
        "KENSA_REPEAT_S": "0",
        "KENSA_PORT": "0",
    }
    log = folder / "log"
    with log.open("wb") as lines:
        process = subprocess.Popen(
            [sys.executable, "-m", "app"], cwd=ROOT, env={**os.environ, **settings}, stderr=lines
        )
    try:
        while not (found := re.search(r"listens on (http://\S+:\d+)", log.read_text())):
            if process.poll() is not None:
                sys.exit(log.read_text())
            time.sleep(0.1)
        yield found[1]
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
