#!/usr/bin/env python3
"""Measure how well a trained model judges test images: see docs/commands.md."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import engines.missing_packages  # noqa: F401 (it says what to install)
from engines.image import ImageLimits
from workers.commands import run, show
from workers.progress import Progress


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="evaluate.py",
        description="Measure a trained model on D/test, with the runtime that serves it. Leaves"
        " evaluation.html, evaluation.json, predictions.csv and overlays/ in --out_dir.",
    )
    add = parser.add_argument
    add("--model_dir", type=Path, required=True, metavar="D", help="the folder that convtrt.py"
        " left, or the one that retrain.py left: that is converted first, into a temporary"
        " folder")  # fmt: skip
    add("--category", required=True, metavar="C", help="folder name under D/test")
    add("--data_root", type=Path, required=True, metavar="D", help="folder with test/")
    add("--masks", type=Path, metavar="D", help="folder with a mask per defective image, of its"
        " name and size, as .png (default: D/masks/C of --data_root, if it exists)")  # fmt: skip
    add("--out_dir", type=Path, required=True, metavar="D", help="where the files go; what an"
        " earlier evaluation left there is replaced")  # fmt: skip
    add("--threshold", type=float, metavar="X", help="raw score above which a part is an anomaly"
        " (default: the model's own)")  # fmt: skip
    add("--worst", type=int, default=8, metavar="N", help="how many of the worst mistakes the page"
        " shows (default 8)")  # fmt: skip
    ImageLimits.add_flags(parser)
    parsed = parser.parse_args(arguments)
    if parsed.threshold is not None and not math.isfinite(parsed.threshold):
        parser.error("--threshold must be a finite number")
    if parsed.worst < 0:
        parser.error("--worst must be at least 0")
    return parsed


def main(arguments: list[str] | None = None) -> int:
    flags = vars(parse(arguments))
    flags["limits"] = ImageLimits.of_flags(flags)
    progress = Progress()

    def work() -> None:
        from workers.evaluation.evaluate import Evaluate, evaluate, summarise_evaluation

        report = evaluate(Evaluate(**flags), progress)
        show(summarise_evaluation(report, flags["out_dir"]))

    return run(work, progress)


if __name__ == "__main__":
    sys.exit(main())
