"""Tabs that show the line, and what parts notice of them.

    python -m benchmarks.screen [--turns N] [--seconds S] [--rate N] [--tabs N]

A camera sends parts at a steady rate to a server with a PatchCore model; by turns nobody watches,
and so many devices have the page of the line open: each reads the stream of events and asks for
the picture of the part that it shows, as often as the page does, in a process of their own.
All in one run, because machines differ from one minute to the next.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
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
from benchmarks.load import CATEGORY, WEIGHTS, learned, percentile, server

SIDE = 512  # pixels: 20 parts a second are to fit into two cores
SHOWN_EVERY_S, SPREAD_S = 1.0, 0.4  # as FAST_MS and SPREAD_MS in app/web/pages/line.js


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.screen", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--turns", type=int, default=6, help="of each kind (default 6)")
    parser.add_argument("--seconds", type=float, default=15, help="for each turn (default 15)")
    parser.add_argument("--rate", type=float, default=20, help="parts a second (default 20)")
    parser.add_argument("--tabs", type=int, default=8, help="that show the line (default 8)")
    parser.add_argument("--watch", metavar="URL", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.watch:
        watch(flags.watch, flags.tabs)
        return
    begin()
    if not WEIGHTS.is_file():
        sys.exit(f"This benchmark needs real photos and weights: {WEIGHTS} does not exist.")
    print_machine(["openvino"])
    with tempfile.TemporaryDirectory() as folder:
        with phase("learning"):
            engine = learned("patchcore", Path(folder) / "patchcore")
        with server(engine, "off", KENSA_REPEAT_S="0") as (port, _):
            measure(port, flags)
    print_load("after")


def measure(port: int, flags: argparse.Namespace) -> None:
    """Turns alternate; the first of each is not counted."""
    photo = small(next((ASSETS / "data" / "test" / CATEGORY / "normal").iterdir()))
    waits: dict[str, list[float]] = {"alone": [], "watched": []}
    seen = {"parts": 0, "pictures": 0, "gone": 0}
    for turn in range(flags.turns + 1):
        for name in ("alone", "watched") if turn % 2 else ("watched", "alone"):
            tabs = begun(port, flags.tabs) if name == "watched" else None
            taken = send(port, photo, flags.rate, flags.seconds if turn else 3)
            found = ended(tabs) if tabs else {}
            if turn:
                waits[name] += taken
                seen = {key: seen[key] + found.get(key, 0) for key in seen}
    title = f"/infer at {flags.rate:g} parts a second, photos of {SIDE} pixels, {flags.tabs} tabs"
    rows = [[name, *figures(some)] for name, some in waits.items()]
    print_table(title, ["", "p50 ms", "p99 ms", "worst ms", "asked"], rows)
    print(
        f"\nThe tabs were told of {seen['parts']} parts, and took {seen['pictures']} pictures;"
        f" {seen['gone']} were gone"
    )
    ratios = {p: percentile(waits["watched"], p) / percentile(waits["alone"], p) for p in (50, 99)}
    print("/infer, watched / alone: " + ", ".join(f"p{p} {r:.2f}" for p, r in ratios.items()))


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
    seen = {"parts": 0, "pictures": 0, "gone": 0}
    watching = threading.Barrier(tabs + 1)
    for _ in range(tabs):
        threading.Thread(target=tab, args=[url, seen, watching], daemon=True).start()
    watching.wait()
    sys.stdout.write("watching\n")
    sys.stdout.flush()
    sys.stdin.readline()
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
