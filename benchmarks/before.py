"""The engine of this build beside that of another checkout, on the same model, in turns.

    python -m benchmarks.before CHECKOUT BUNDLE [--images FOLDER] [--turns N]

CHECKOUT: the folder of the other build, a git worktree for instance; its engine runs in a process
of its own, with this Python. BUNDLE: what convtrt.py wrote, in a form that both read.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, print_load, print_machine, print_table

IN_A_ROW = 5  # images per turn: what a build keeps in the cache is there again, as when serving

# In each build: a line with a number of pictures comes, one with their scores and times goes back.
CHILD = """
import json, os, sys, time
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as the server does
sys.path.insert(0, os.getcwd())
from pathlib import Path
import numpy as np
from engines.runtimes.openvino import OpenVINORuntime
try:
    from engines.store.bundle import Bundle
except ImportError:
    from engines.bundle import Bundle  # up to e60e805
began = time.perf_counter()
runtime = OpenVINORuntime.open(Bundle.open(Path(sys.argv[1])))
opened, images = time.perf_counter() - began, np.load(sys.argv[2])
for _ in range(3):
    runtime.infer(images[:1])
print(json.dumps({"opened": opened, "precision": runtime.precision}), flush=True)
for line in sys.stdin:
    found = []
    for at in json.loads(line):
        began = time.perf_counter()
        score = float(runtime.infer(images[at : at + 1])[0][0])
        found.append([score, 1000 * (time.perf_counter() - began)])
    print(json.dumps(found), flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.before", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("checkout", type=Path)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--images", type=Path, help="pictures; else noise is judged")
    parser.add_argument("--turns", type=int, default=20, help=f"of {IN_A_ROW} images each")
    flags = parser.parse_args()
    if not (flags.checkout / "engines" / "runtimes" / "openvino.py").is_file():
        parser.error(f"{flags.checkout} is no checkout of Kensa")
    print_machine(["openvino", "numpy"])
    with tempfile.TemporaryDirectory() as folder:
        images = _pictures(flags.bundle, flags.images, Path(folder) / "pictures.npy")
        rows = compare(flags.checkout, flags.bundle, images, flags.turns)
    print_table(
        f"{flags.bundle.name}, {flags.turns * IN_A_ROW} images each, in turns",
        ["build", "precision", "opened s", "median ms", "p95 ms", "of the other", "scores differ"],
        rows,
    )
    print_load("after")


def _pictures(bundle: Path, folder: Path | None, into: Path) -> Path:
    """A file of pictures (n, S, S, 3), made once for both."""
    import numpy as np

    from engines.image import SUFFIXES, load
    from engines.meta import Meta

    side = Meta.read(bundle / "meta.json").image_size
    paths = sorted(folder.rglob("*")) if folder else []
    files = [path for path in paths if path.suffix.lower() in SUFFIXES]
    if folder and not files:
        sys.exit(f"{folder} has no pictures.")
    noise = np.random.default_rng(0).integers(0, 256, (20, side, side, 3), np.uint8)
    found = np.stack([load(path.read_bytes(), side) for path in files]) if files else noise
    np.save(into, found)
    return into


def compare(checkout: Path, bundle: Path, pictures: Path, turns: int) -> list[list[str]]:
    import numpy as np

    count = len(np.load(pictures, mmap_mode="r"))
    builds = {"before": _Build(checkout, bundle, pictures), "this": _Build(ROOT, bundle, pictures)}
    for turn in range(turns):
        places = [(turn * IN_A_ROW + one) % count for one in range(IN_A_ROW)]
        for name in sorted(builds, reverse=bool(turn % 2)):
            builds[name].judge(places)
    rows = []
    base = statistics.median(builds["before"].milliseconds)
    for name, build in builds.items():
        median = statistics.median(build.milliseconds)
        pairs = zip(build.scores, builds["before"].scores, strict=True)
        apart = max(abs(one / other - 1) for one, other in pairs)
        rows.append([
            name, build.opened["precision"], f"{build.opened['opened']:.2f}", f"{median:.1f}",
            f"{np.percentile(build.milliseconds, 95):.1f}", f"{median / base:.3f}", f"{apart:.1e}",
        ])  # fmt: skip
        build.end()
    return rows


class _Build:
    """The engine of one checkout, in a process of its own."""

    def __init__(self, checkout: Path, bundle: Path, pictures: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(bundle.resolve()), str(pictures)],
            cwd=checkout, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        )  # fmt: skip
        self.scores: list[float] = []
        self.milliseconds: list[float] = []
        self.opened: dict[str, Any] = self._read()

    def judge(self, places: list[int]) -> None:
        assert self._process.stdin
        print(json.dumps(places), file=self._process.stdin, flush=True)
        for score, taken in self._read():
            self.scores.append(score)
            self.milliseconds.append(taken)

    def _read(self) -> Any:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            sys.exit("A build ended: its error stands above.")
        return json.loads(line)

    def end(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


if __name__ == "__main__":
    main()
