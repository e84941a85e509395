#!/usr/bin/env python3
"""Learn what normal parts look like: see docs/commands.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import engines.missing_packages  # noqa: F401 (it says what to install)
from engines.image import ImageLimits
from engines.limits import LEAST_SHARE, share
from workers.commands import must_be_there, run, show, summarise_training
from workers.models import KINDS
from workers.progress import Progress


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="retrain.py",
        description="Learn what normal parts look like, from nothing or on top of a model that"
        " exists. Leaves model.pth, the memory bank or statistics, meta.json and report.json in"
        " --out_dir.",
    )
    add = parser.add_argument
    add("--model", required=True, choices=KINDS)
    add("--pretrained_pth", metavar="F", help="weights: a model.pth, an anomalib checkpoint, a"
        " backbone's .pth or .safetensors, or an EfficientAD teacher. Without it: pretrained ones"
        " of an installed package, of timm's cache or of the hub; anomalib's teacher, from its"
        " cache; a VAE from nothing. The word 'untrained' takes random ones")  # fmt: skip
    add("--meta_json", type=Path, required=True, metavar="F", help="what to train:"
        " hyper-parameters, image size, thresholds")  # fmt: skip
    add("--category", required=True, metavar="C", help="folder name under D/train and D/test")
    add("--data_root", type=Path, required=True, metavar="D", help="folder with train/ and test/")
    add("--epochs", type=int, default=1, metavar="N", help="passes over the images; patchcore and"
        " padim need one and make one (default 1)")  # fmt: skip
    add("--batch", type=int, default=4, metavar="N", help="images at once (default 4)")
    add("--out_dir", type=Path, required=True, metavar="D", help="where the files go")
    add("--load_bank", type=Path, metavar="F", help="memory bank to keep and add to (patchcore)."
        " Without it the bank is made anew")  # fmt: skip
    add("--load_stats", type=Path, metavar="F", help="Gaussian statistics to keep and add to"
        " (padim). Without it they are made anew")  # fmt: skip
    add("--penalty_dir", type=Path, metavar="D", help="natural images, of anything but the part"
        " (efficientad): the student learns not to follow the teacher there")  # fmt: skip
    add("--false_rejects", type=float, metavar="X", help="share of good parts that may be rejected:"
        " the threshold is found for it (default: as in meta.json, else 0.01)")  # fmt: skip
    add("--false_rejects_cap", type=float, metavar="X", help="share that may be rejected where that"
        " finds more of the defects in test/ (default: as in meta.json, else 0.05)")  # fmt: skip
    add("--keep_strange", action="store_true", help="learn pictures too that are unlike the others"
        " and unlike what is known (patchcore, padim)")  # fmt: skip
    add("--bit_depth", type=int, choices=(8, 10, 12, 14, 16), help="bits that the camera gives, in"
        " 16-bit files (default: as in meta.json). Where an update changes it, all pictures are"
        " learned anew")  # fmt: skip
    add("--regions", type=Path, metavar="F", help="a PNG as large as the pictures: what is white in"
        " it never counts, in learning and in judging (default: the one that --meta_json names,"
        " beside it). Where an update changes it, all pictures are learned anew")  # fmt: skip
    add("--log", choices=("on", "off"), default="on", help="write retrain.log into --out_dir"
        " (default on)")  # fmt: skip
    ImageLimits.add_flags(parser)
    parsed = parser.parse_args(arguments)
    if parsed.epochs < 1 or parsed.batch < 1:
        parser.error("--epochs and --batch must be at least 1")
    for flag in ("false_rejects", "false_rejects_cap"):
        asked = getattr(parsed, flag)
        if asked is not None and share(asked) is None:
            parser.error(f"--{flag} is a share between {LEAST_SHARE:g} and 1, such as 0.01 for one"
                " part in 100")  # fmt: skip
    for flag, model in (("load_bank", "patchcore"), ("load_stats", "padim"),
                        ("penalty_dir", "efficientad")):  # fmt: skip
        if getattr(parsed, flag) is not None and parsed.model != model:
            parser.error(f"--{flag} is for {model}, not for {parsed.model}")
    return parsed


def main(arguments: list[str] | None = None) -> int:
    flags = vars(parse(arguments))
    flags["limits"] = ImageLimits.of_flags(flags)
    log = flags.pop("log") == "on"
    progress = Progress(flags["out_dir"] / "retrain.log" if log else None)

    def work() -> None:
        must_be_there(flags, "pretrained_pth", "load_bank", "load_stats", "penalty_dir", "regions")
        from workers.learning.retrain import Retrain, retrain

        report = retrain(Retrain(**flags), progress)
        show(summarise_training(report, flags["out_dir"]))

    return run(work, progress)


if __name__ == "__main__":
    sys.exit(main())
