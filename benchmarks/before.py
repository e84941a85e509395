"""The engines of this build beside those of a build before, on the same trained models.

    python -m benchmarks.before OTHER [--kinds patchcore,padim] [--teacher F] [--category C ...]

OTHER is a folder with the other build's code, as `git worktree add OTHER e60e805` makes it. Each
build converts the model itself and judges in a process of its own, in turns with the other one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

TURNS, IN_A_ROW, TOGETHER = 25, 5, 4
# Which of the contestants of `benchmarks.models`, and what is otherwise.
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "patchcore": ("patchcore", "resnet18", {"coreset_ratio": 0.25}),  # 10,240 rows of 40 photos
    "lite0": ("patchcore", "lite0 as in anomalib", {}),
    "padim": ("padim", "resnet18", {}),
    "efficientad": ("efficientad", "", {}),
}


def main() -> None:
    from benchmarks.common import begin, phase, print_load, print_machine

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.before", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("other", type=Path, help="a folder with the code of the build before")
    parser.add_argument("--kinds", default="padim", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--teacher", type=Path, help="weights of EfficientAD's teacher (default:"
                        " untrained)")  # fmt: skip
    parser.add_argument("--category", action="append", help="of the photos; may be repeated"
                        " (default alien and hazelnut_toy)")  # fmt: skip
    flags = parser.parse_args()
    begin()
    print_machine(["openvino", "torch"])
    for category in flags.category or ["alien", "hazelnut_toy"]:
        for kind in flags.kinds.split(","):
            with tempfile.TemporaryDirectory() as folder:
                with phase(f"{category}: {kind} is learned"):
                    learn(Path(folder), kind, category, flags.teacher)
                compare(Path(folder), kind, category, flags.other.resolve())
    print_load("after")


def learn(place: Path, kind: str, category: str, teacher: Path | None) -> None:
    """Leave model.pth and meta.json in `place`/model, and the test photos in photos.npz."""
    from benchmarks.common import ASSETS, pictures
    from benchmarks.models import CONTESTANTS
    from workers.learning.dataset import Category
    from workers.learning.retrain import Retrain, retrain
    from workers.progress import Progress

    model, words, changes = KINDS[kind]
    _, meta, epochs, batch = next(
        one for one in CONTESTANTS if (one[1]["model"], one[0]) == (model, words)
    )
    (place / "meta.json").write_text(json.dumps(meta | changes))
    weights = {
        "resnet18": str(ASSETS / "weights" / "resnet18.safetensors"),
        None: str(teacher or "untrained"),
    }.get(meta.get("backbone"))
    retrain(
        Retrain(model, category, ASSETS / "data", place / "model", place / "meta.json", weights,
                epochs=epochs, batch=batch),
        Progress(quiet=True),
    )  # fmt: skip
    photos = Category.find(ASSETS / "data", category)
    np.save(place / "photos.npy", pictures([*photos.test_normal, *photos.test_anomaly]))


def compare(place: Path, kind: str, category: str, other: Path) -> None:
    """Convert and judge with both builds, in turns."""
    from benchmarks.common import ROOT, print_table
    from engines.meta import Meta
    from engines.verdict import Scale

    builds = [Build.start(place, KINDS[kind][0], root) for root in (other, ROOT)]
    answers: list[dict[str, Any]] = [build.ask("open") for build in builds]
    taken: list[dict[int, list[float]]] = [{1: [], TOGETHER: []} for _ in builds]
    for turn in range(TURNS + 1):
        for images in (1, TOGETHER):
            for build, times in zip(builds, taken, strict=True):
                found = build.ask(str(images))["ms"]
                if turn:  # the first is to warm up
                    times[images] += found
    rows = []
    for name, answer, times in zip(("before", "this build"), answers, taken, strict=True):
        cells = [f"{_median(times[n]):.1f}" for n in times]
        share = [f"{_median(times[n]) / _median(taken[0][n]):.2f}" for n in times]
        rows.append([name, answer["precision"], *cells, *share, f"{answer['mib']:.0f}"])
    head = ["build", "precision", "ms, one image", f"ms, {TOGETHER} at once"]
    more = ["of before, one", f"of before, {TOGETHER}", "process, MiB"]
    print_table(f"{kind}, {category}", [*head, *more], rows)
    threshold = Scale.of(Meta.read(place / "model" / "meta.json")).raw_threshold
    print(_agreement(answers[0]["scores"], answers[1]["scores"], threshold))
    for build in builds:
        build.end()


def _median(values: list[float]) -> float:
    return statistics.median(values)


def _agreement(before: list[float], now: list[float], threshold: float) -> str:
    one, other = np.array(before), np.array(now)
    off = np.abs(other / one - 1)
    flips = int(((one >= threshold) != (other >= threshold)).sum())
    return (
        f"\nRaw scores of {len(one)} test photos differ by {100 * off.max():.2f} % at most,"
        f" {100 * off.mean():.2f} % on average; {flips} verdicts change."
    )


@dataclass(frozen=True)
class Build:
    """A process with the code of one build; it answers a line of JSON to each line."""

    process: subprocess.Popen[str]

    @classmethod
    def start(cls, place: Path, kind: str, root: Path) -> Build:
        environment = {**os.environ, "PYTHONPATH": str(root), "OPENBLAS_NUM_THREADS": "1"}
        words = [sys.executable, str(Path(__file__)), "--child", str(place), kind, root.name]
        process = subprocess.Popen(
            words, cwd=root, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        return cls(process)

    def ask(self, words: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{words}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit("A build ended; what it said stands above.")
        found: dict[str, Any] = json.loads(line)
        return found

    def end(self) -> None:
        self.process.communicate()


def child(place: Path, kind: str, name: str) -> None:
    """Convert with the build whose code this process sees, then judge as often as is asked."""
    from engines.runtimes import Batches, openvino

    engine, photos = place / f"engine of {name}", np.load(place / "photos.npy")
    subprocess.run(
        [sys.executable, "convtrt.py", "--model", kind, "--weights_pth", place / "model/model.pth",
         "--meta_json", place / "model/meta.json", "--out_dir", engine],
        stdout=subprocess.DEVNULL, check=True,
    )  # fmt: skip
    bundle: Any = vars(openvino)["Bundle"]  # which has stood in several modules
    runtime = openvino.OpenVINORuntime.open(bundle.open(engine))
    runtime.take_together(Batches(TOGETHER))
    for line in sys.stdin:
        answer: dict[str, Any]
        if line.strip() == "open":
            scores = [float(runtime.infer(photo[None])[0][0]) for photo in photos]
            answer = {"precision": runtime.precision, "scores": scores, "mib": _resident_mib()}
        else:
            answer = {"ms": _timed(runtime, photos[: int(line)])}
        print(json.dumps(answer), flush=True)


def _timed(runtime: Any, images: NDArray[np.uint8]) -> list[float]:
    taken = []
    for _ in range(IN_A_ROW):
        began = time.perf_counter()
        runtime.infer(images)
        taken.append((time.perf_counter() - began) * 1000)
    return taken


def _resident_mib() -> float:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmRSS:")) / 1024


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), *sys.argv[3:])
    else:
        main()
