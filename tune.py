#!/usr/bin/env python3
"""Search for better hyper-parameters with test images: see docs/commands.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import engines.missing_packages  # noqa: F401 (it says what to install)
from engines.errors import INTERRUPTED
from engines.image import ImageLimits
from workers.commands import must_be_there, run, show
from workers.models import KINDS
from workers.progress import Progress


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tune.py",
        description="Search for the hyper-parameters with which a model tells defective test images"
        " best. Each trial is a training as retrain.py makes it. Leaves meta.json (the best, for"
        " retrain.py), trials.csv and study.db in --out_dir; the same command again goes on.",
    )
    add = parser.add_argument
    add("--model", required=True, choices=KINDS)
    add("--meta_json", type=Path, required=True, metavar="F", help="where to start: the first trial"
        " is this file, and what is not searched stays as it is there")  # fmt: skip
    add("--category", required=True, metavar="C", help="folder name under D/train and D/test")
    add("--data_root", type=Path, required=True, metavar="D", help="folder with train/ and test/")
    add("--out_dir", type=Path, required=True, metavar="D", help="where the search is kept")
    add("--trials", type=int, default=20, metavar="N", help="trials in all, those of earlier calls"
        " and those that could not be trained included (default 20)")  # fmt: skip
    add("--pretrained_pth", metavar="F", help="weights, as for retrain.py; of the backbone that"
        " --meta_json names")  # fmt: skip
    add("--backbones", type=_words, default=[], metavar="A,B=F", help="search these timm backbones"
        " too (patchcore, padim); =F names a file of weights, without it they come from an"
        " installed package, timm's cache or the hub")  # fmt: skip
    add("--image_sizes", type=_words, default=[], metavar="N,N", help="search these image sizes"
        " too, pixels")  # fmt: skip
    add("--epochs", type=int, default=1, metavar="N", help="as for retrain.py (default 1)")
    add("--batch", type=int, default=4, metavar="N", help="images at once (default 4)")
    add("--timeout", type=float, metavar="S", help="begin no trial after so many seconds")
    add("--penalty_dir", type=Path, metavar="D", help="as for retrain.py (efficientad)")
    add("--regions", type=Path, metavar="F", help="as for retrain.py: what never counts")
    ImageLimits.add_flags(parser)
    parsed = parser.parse_args(arguments)
    if min(parsed.trials, parsed.epochs, parsed.batch) < 1:
        parser.error("--trials, --epochs and --batch must be at least 1")
    if not all(word.isdecimal() for word in parsed.image_sizes):
        parser.error("--image_sizes takes numbers: 256,320")
    parsed.image_sizes = [int(word) for word in parsed.image_sizes]
    if parsed.backbones and parsed.model not in ("patchcore", "padim"):
        parser.error(f"--backbones is for patchcore and padim, not for {parsed.model}")
    if parsed.penalty_dir is not None and parsed.model != "efficientad":
        parser.error(f"--penalty_dir is for efficientad, not for {parsed.model}")
    return parsed


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def main(arguments: list[str] | None = None) -> int:
    flags = vars(parse(arguments))
    flags["limits"] = ImageLimits.of_flags(flags)
    progress = Progress()
    stopped = False

    def work() -> None:
        nonlocal stopped
        must_be_there(flags, "pretrained_pth", "penalty_dir", "regions")
        from workers.learning.search_space import Tune
        from workers.learning.tune import summarise_search, tune

        found = tune(request := Tune(**flags), progress)
        show(summarise_search(request, found))
        stopped = found.stopped

    return run(work, progress) or (INTERRUPTED if stopped else 0)


if __name__ == "__main__":
    sys.exit(main())
