"""The screen: how soon a page is there, and what parts notice of those who watch the line.

    python -m benchmarks.screen [--turns N] [--seconds S] [--rate N] [--tabs N] [--opened N]

A browser opens each page with nothing of it in its cache (where Chromium and playwright are there).
Then a camera sends parts at a steady rate to a server with the model that `kensa learn` makes; by
turns nobody watches, and so many devices have the page of the line open: each reads the stream of
events and asks for the picture of the part that it shows, as often as the page does, in a process
of their own. All in one run, because machines differ from one minute to the next.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import cv2
import numpy as np

from benchmarks.common import ASSETS, ROOT, begin, phase, print_load, print_machine, print_table
from benchmarks.lists import connect, figures, send
from benchmarks.load import CATEGORY, percentile, server

SIDE = 512  # pixels: 20 parts a second are to fit into two cores
PAGES = ("line", "try", "review", "find", "model", "teach", "regions", "system")
SHOWN_EVERY_S, SPREAD_S = 1.0, 0.4  # as FAST_MS and SPREAD_MS in app/web/pages/line.js


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.screen", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--turns", type=int, default=6, help="of each kind (default 6)")
    parser.add_argument("--seconds", type=float, default=15, help="for each turn (default 15)")
    parser.add_argument("--rate", type=float, default=20, help="parts a second (default 20)")
    parser.add_argument("--tabs", type=int, default=8, help="that show the line (default 8)")
    parser.add_argument("--opened", type=int, default=20, help="times, each page (default 20)")
    parser.add_argument("--watch", metavar="URL", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.watch:
        watch(flags.watch, flags.tabs)
        return
    begin()
    photos = ASSETS / "data" / "train" / CATEGORY
    if not photos.is_dir():
        sys.exit(f"This benchmark needs real photos: {photos} does not exist.")
    print_machine(["openvino"])
    with tempfile.TemporaryDirectory() as folder:
        with phase("learning"):
            engine = learned(photos, Path(folder))
        with server(engine, "off", KENSA_REPEAT_S="0", KENSA_MODEL_NAME="part") as (port, _):
            (process,) = map(int, Path("/proc/thread-self/children").read_text().split())
            photo = small(next((ASSETS / "data" / "test" / CATEGORY / "normal").iterdir()))
            send(port, photo, 5, 5)
            first_paint(port, flags.opened)
            measure(port, process, photo, flags)
    print_load("after")


def learned(photos: Path, folder: Path) -> Path:
    """The model that a newcomer gets of these pictures."""
    said = subprocess.run(
        [sys.executable, "-m", "app", "learn", photos, "--name", "part", "--out_dir", folder / "m"],
        cwd=ROOT, env={**os.environ, "KENSA_DATA_DIR": str(folder / "none")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if said.returncode:
        sys.exit(said.stdout + said.stderr)
    return folder / "m" / "engine"


# ---- a browser opens it --------------------------------------------------------------------------


def first_paint(port: int, opened: int) -> None:
    """From asking for the page to its first text, and to its heading, which its own code draws."""
    program = shutil.which("chromium") or shutil.which("google-chrome-stable")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        program = None
    if program is None:
        print("No Chromium or no playwright here: how soon a page is painted is not measured")
        return
    rows = []
    with phase("opening pages"), sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=program, args=arguments)
        for page in PAGES:
            found = [_opened(browser, f"http://127.0.0.1:{port}/#/{page}") for _ in range(opened)]
            first, there, weight = zip(*found[1:], strict=True)
            rows.append([page, *_spread(first), *_spread(there), f"{max(weight) / 1000:.0f}"])
        browser.close()
    head = ["page", "first paint, p50 ms", "worst", "its own content, p50 ms", "worst", "kB"]
    print_table(f"Opened {opened - 1} times, nothing in the cache", head, rows)


def _opened(browser: Any, url: str) -> tuple[float, float, float]:
    """Milliseconds to the first paint, to the page's own heading, and bytes that were sent."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    page.add_init_script(THERE)
    page.goto(url)
    there: float = page.evaluate("window.isThere")
    paint: float = page.evaluate(
        "performance.getEntriesByName('first-contentful-paint')[0].startTime"
    )
    weight: float = page.evaluate(
        "['resource', 'navigation'].flatMap((kind) => performance.getEntriesByType(kind))"
        ".filter((one) => !/line.(events|picture)|thumbnail/.test(one.name))"
        ".reduce((sum, one) => sum + one.transferSize, 0)"
    )
    context.close()
    return paint, there, weight


THERE = """
window.isThere = new Promise((resolve) => {
  new MutationObserver((_, observer) => {
    if (!document.querySelector('main h1, main h2')) return;
    observer.disconnect();
    requestAnimationFrame(() => setTimeout(() => resolve(performance.now())));
  }).observe(document, {childList: true, subtree: true});
});
"""


def _spread(values: tuple[float, ...]) -> list[str]:
    return [f"{statistics.median(values):.0f}", f"{max(values):.0f}"]


# ---- parts beside tabs ---------------------------------------------------------------------------


def measure(port: int, process: int, photo: bytes, flags: argparse.Namespace) -> None:
    """Turns alternate; the first of each is not counted."""
    waits: dict[str, list[float]] = {"alone": [], "watched": []}
    busy: dict[str, float] = dict.fromkeys(waits, 0.0)
    seen = {"parts": 0, "pictures": 0, "gone": 0, "cpu_ms": 0}
    for turn in range(flags.turns + 1):
        for name in ("alone", "watched") if turn % 2 else ("watched", "alone"):
            tabs = begun(port, flags.tabs) if name == "watched" else None
            before = worked(process)
            taken = send(port, photo, flags.rate, flags.seconds if turn else 3)
            after = worked(process)
            found = ended(tabs) if tabs else {}
            if turn:
                waits[name] += taken
                busy[name] += after - before
                seen = {key: seen[key] + found.get(key, 0) for key in seen}
    title = f"/infer at {flags.rate:g} parts a second, photos of {SIDE} pixels, {flags.tabs} tabs"
    rows = [
        [name, *figures(some), f"{busy[name] * 1000 / len(some):.1f}"]
        for name, some in waits.items()
    ]
    head = ["", "p50 ms", "p99 ms", "worst ms", "asked", "CPU of the server, ms a part"]
    print_table(title, head, rows)
    own = seen["cpu_ms"] / (flags.turns * flags.seconds * 10)
    print(
        f"\nThe tabs were told of {seen['parts']} parts, and took {seen['pictures']} pictures;"
        f" {seen['gone']} were gone. They took {own:.1f} % of a core themselves"
    )
    ratios = {p: percentile(waits["watched"], p) / percentile(waits["alone"], p) for p in (50, 99)}
    print("/infer, watched / alone: " + ", ".join(f"p{p} {r:.2f}" for p, r in ratios.items()))


def worked(process: int) -> float:
    """CPU seconds of a process until now."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def small(path: Path) -> bytes:
    """A photo as a JPEG of `SIDE` pixels."""
    image = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR)
    assert image is not None
    image = cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    return cv2.imencode(".jpg", image)[1].tobytes()


# ---- the tabs, in a process of their own ---------------------------------------------------------


def begun(port: int, tabs: int) -> subprocess.Popen[bytes]:
    """The process of the tabs, once all of them watch."""
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.screen", "--watch", url, "--tabs", str(tabs)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == b"watching\n"
    return process


def ended(process: subprocess.Popen[bytes]) -> dict[str, int]:
    """What they saw, once they are told to end."""
    said, _ = process.communicate(b"\n")
    found: dict[str, int] = json.loads(said)
    return found


def watch(url: str, tabs: int) -> None:
    """Show the line in so many tabs until a line comes from stdin."""
    seen = {"parts": 0, "pictures": 0, "gone": 0, "cpu_ms": 0}
    watching = threading.Barrier(tabs + 1)
    for _ in range(tabs):
        threading.Thread(target=tab, args=[url, seen, watching], daemon=True).start()
    watching.wait()
    began = time.process_time()
    sys.stdout.write("watching\n")
    sys.stdout.flush()
    sys.stdin.readline()
    seen["cpu_ms"] = round((time.process_time() - began) * 1000)
    sys.stdout.write(json.dumps(seen))
    sys.stdout.flush()


def tab(url: str, seen: dict[str, int], watching: threading.Barrier) -> None:
    """What the page asks of the server, without a browser's own work."""
    shown = 0.0
    port = int(url.rpartition(":")[2])
    stream, asking = connect(port), connect(port)
    stream.request("GET", "/line/events")
    lines = iter(stream.getresponse().readline, b"")
    assert next(lines) == b"event: state\n"
    watching.wait()
    for line in lines:
        if not line.startswith(b'data: {"number"'):
            continue
        seen["parts"] += 1
        if time.monotonic() - shown > SHOWN_EVERY_S:
            shown = time.monotonic()
            time.sleep(random.uniform(0, SPREAD_S))
            is_there = show(asking, json.loads(line.removeprefix(b"data: ")))
            seen["pictures" if is_there else "gone"] += 1


def show(asking: http.client.HTTPConnection, part: dict[str, Any]) -> bool:
    asked = urlencode({"model": part["model"], "id": part["id"], "paint": "false"})
    asking.request("GET", f"/line/picture?{asked}")
    answer = asking.getresponse()
    body = answer.read()
    assert answer.status in (200, 404), body
    return answer.status == 200


if __name__ == "__main__":
    main()
