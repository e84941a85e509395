"""Many clients at once: requests a second with micro-batching and without it.

    python -m benchmarks.load [--clients N ...] [--turns N] [--seconds S] [--kinds K ...]

Two servers with the same model, one with KENSA_BATCHING=on and one with off, are asked in turns by
the same clients, each of which sends its next part when it has the verdict on the last one. All in
one run, because machines differ from one minute to the next.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.common import ASSETS, ROOT, begin, phase, print_load, print_machine, print_table

CATEGORY = "alien"
WEIGHTS = ASSETS / "weights" / "resnet18.safetensors"
KINDS: dict[str, dict[str, Any]] = {
    "patchcore": {"layers": ["layer2", "layer3"], "coreset_ratio": 0.25},
    "padim": {"layers": ["layer1", "layer2", "layer3"], "n_features": 100},
    "vae": {"latent_dim": 64},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--clients", type=int, nargs="+", default=[16], help="at once (default 16)")
    parser.add_argument("--turns", type=int, default=6, help="for each server (default 6)")
    parser.add_argument("--seconds", type=float, default=5, help="for each turn (default 5)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    flags = parser.parse_args()
    begin()
    if not WEIGHTS.is_file():
        sys.exit(f"This benchmark needs real photos and weights: {WEIGHTS} does not exist.")
    print_machine(["openvino"])
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for kind in flags.kinds:
            with phase(f"{kind}: learning"):
                engine = learned(kind, Path(folder) / kind)
            for clients in flags.clients:
                with phase(f"{kind}: {clients} clients"):
                    found = measure(kind, engine, clients, flags.turns, flags.seconds)
                rows += [[str(clients), *row] for row in found]
    head = ["clients", "model", "batching", "at once", "requests/s", "p50 ms", "p99 ms", "on / off"]
    print_table("Clients with photos of 1024 pixels", head, rows)
    print_load("after")


def learned(kind: str, folder: Path, data: Path = ASSETS / "data") -> Path:
    """A model of the photos, by the commands that a user would type."""
    folder.mkdir()
    meta, engine = folder / "meta.json", folder / "engine"
    known = {"image_size": 256, **KINDS[kind]}
    pretrained = []
    if kind != "vae":
        known["backbone"] = "resnet18"
        pretrained = ["--pretrained_pth", WEIGHTS]
    meta.write_text(json.dumps(known))
    run("retrain.py", "--model", kind, "--meta_json", meta, "--category", CATEGORY,
        "--data_root", data, "--epochs", "1", "--batch", "4", "--out_dir", folder,
        *pretrained)  # fmt: skip
    bank = ["--memory_bank", folder / "memory_bank.npz"] if kind == "patchcore" else []
    stats = ["--stats", folder / "stats.npz"] if kind == "padim" else []
    run("convtrt.py", "--model", kind, "--weights_pth", folder / "model.pth", "--meta_json", meta,
        "--out_dir", engine, *bank, *stats)  # fmt: skip
    return engine


def run(script: str, *words: str | Path) -> None:
    command = [sys.executable, str(ROOT / script), *map(str, words)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)


def measure(kind: str, engine: Path, clients: int, turns: int, seconds: float) -> list[list[str]]:
    """One row for each server; turns alternate, and the first of each is not counted."""
    place = ASSETS / "data" / "test" / CATEGORY / "normal"
    photos = [path.read_bytes() for path in sorted(place.iterdir())[:8]]
    rates: dict[str, list[float]] = {"off": [], "on": []}
    waits: dict[str, list[float]] = {"off": [], "on": []}
    with ExitStack() as stack:
        servers = {name: stack.enter_context(server(engine, name)) for name in rates}
        for turn in range(turns + 1):
            order = list(rates) if turn % 2 else list(reversed(rates))
            for name in order:
                began = time.perf_counter()
                taken = ask(servers[name][0], photos, clients, seconds if turn else 2)
                if turn:  # to the last verdict: what is asked in time may be answered later
                    rates[name].append(len(taken) / (time.perf_counter() - began))
                    waits[name] += taken
        at_once = {name: servers[name][1]() for name in rates}
    ratios = [on / off for on, off in zip(rates["on"], rates["off"], strict=True)]
    found = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    return [
        [
            kind,
            name,
            at_once[name],
            f"{statistics.median(rates[name]):.1f}",
            f"{statistics.median(waits[name]):.0f}",
            f"{statistics.quantiles(waits[name], n=100)[98]:.0f}",
            found if name == "on" else "",
        ]
        for name in rates
    ]


def ask(
    port: int,
    photos: list[bytes],
    clients: int,
    seconds: float,
    more: Callable[[], dict[str, str]] = dict,
) -> list[float]:
    """How long each request took, milliseconds; `more`: headers of each."""
    taken: list[float] = []
    until = time.perf_counter() + seconds

    def send(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        while (began := time.perf_counter()) < until:
            headers = {"Content-Type": "image/jpeg", **more()}
            connection.request("POST", "/infer", photos[number % len(photos)], headers)
            answer = connection.getresponse()
            body = answer.read()
            assert answer.status == 200, body
            taken.append((time.perf_counter() - began) * 1000)
            number += 1
        connection.close()

    threads = [threading.Thread(target=send, args=[number]) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return taken


def percentile(waits: list[float], percent: int) -> float:
    return statistics.quantiles(waits, n=100)[percent - 1]


def compare(
    what: str,
    ports: dict[str, int],
    photos: list[bytes],
    clients: int,
    turns: int,
    seconds: float,
    more: Callable[[], dict[str, str]] = dict,
) -> None:
    """Ask the servers `off` and `on` in turns, the first of which is not counted, and print it."""
    waits: dict[str, list[float]] = {name: [] for name in ports}
    spent = dict.fromkeys(ports, 0.0)
    ratios: dict[str, list[float]] = {"p50": [], "p99": []}
    for turn in range(turns + 1):
        taken = {}
        for name in list(ports) if turn % 2 else list(reversed(ports)):
            began = time.perf_counter()
            taken[name] = ask(ports[name], photos, clients, seconds if turn else 2, more)
            if turn:
                spent[name] += time.perf_counter() - began
                waits[name] += taken[name]
        if turn:
            for which, percent in (("p50", 50), ("p99", 99)):
                on, off = (percentile(taken[name], percent) for name in ("on", "off"))
                ratios[which].append(on / off)
    rows = [
        [name, f"{len(some) / spent[name]:.1f}",
         *(f"{percentile(some, percent):.1f}" for percent in (50, 99))]
        for name, some in waits.items()
    ]  # fmt: skip
    title = f"{clients} clients, photos of 1024 pixels, {what} on and off"
    print_table(title, [what, "requests/s", "p50 ms", "p99 ms"], rows)
    for which, found in ratios.items():
        print(f"{which}, on / off: {statistics.median(found):.3f} "
              f"({min(found):.3f} to {max(found):.3f})")  # fmt: skip


@contextmanager
def server(engine: Path, batching: str, **more: str) -> Iterator[tuple[int, Any]]:
    """The port of a Kensa with this model, and what tells how many images it takes at once."""
    with tempfile.TemporaryDirectory() as data, tempfile.TemporaryFile("w+") as log:
        variables = {
            "KENSA_DATA_DIR": data,
            "KENSA_CACHE_DIR": f"{data}/cache",
            "KENSA_MODEL_DIR": str(engine),
            "KENSA_PORT": "0",
            "KENSA_WORKER": "off",
            "KENSA_BATCHING": batching,
            "KENSA_DEADLINE_MS": "60000",
            **more,
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "app"], cwd=ROOT, env={**os.environ, **variables}, stderr=log
        )

        def said(pattern: str) -> str:
            for _ in range(600):
                found = re.search(pattern, Path(f"/dev/fd/{log.fileno()}").read_text())
                if found:
                    return found[1]
                time.sleep(0.1)
            raise AssertionError(f"the server did not say {pattern}")

        try:
            port = int(said(r"listens on \S+:(\d+)"))
            yield port, lambda: said(r"(up to \d+ at once|one at a time)")
        finally:
            process.terminate()
            process.wait()


if __name__ == "__main__":
    main()
