#!/usr/bin/env python3
"""Take over a model that anomalib has trained: see docs/commands.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import engines.missing_packages  # noqa: F401 (it says what to install)
from engines.image import ImageLimits
from workers.commands import must_be_there, run, show
from workers.progress import Progress


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="import_anomalib.py",
        description="Turn a Lightning checkpoint of anomalib 2.x into what retrain.py leaves, for"
        " convtrt.py: the same scores of the same pixels, the same threshold and score range.",
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="F", help="the .ckpt of a Patchcore,"
        " Padim or EfficientAd that was trained and validated")  # fmt: skip
    add("--out_dir", type=Path, required=True, metavar="D", help="where the files go")
    add("--image_size", type=int, metavar="N", help="side of the model's input, where the"
        " checkpoint does not say it")  # fmt: skip
    add("--backbone", metavar="NAME", help="timm name, where the checkpoint does not say it")
    add("--layers", metavar="A,B", help="layers of the backbone, where the checkpoint does not say"
        " them")  # fmt: skip
    add("--model", choices=("patchcore", "padim", "efficientad"), help="refuse any other kind;"
        " the checkpoint itself says which it is")  # fmt: skip
    add("--images", type=Path, metavar="D", help="folder of normal parts that it has not learned:"
        " some are kept to check later forms of the model with, so that bf16 may be used; a"
        " checkpoint without a threshold gets one from them")  # fmt: skip
    add("--bit_depth", type=int, choices=(8, 10, 12, 14, 16), help="bits that the camera gives, in"
        " 16-bit files of --images, and later of the line")  # fmt: skip
    ImageLimits.add_flags(parser)
    parsed = parser.parse_args(arguments)
    if parsed.layers is not None:
        parsed.layers = [layer.strip() for layer in parsed.layers.split(",")]
    return parsed


def main(arguments: list[str] | None = None) -> int:
    flags = vars(parse(arguments))
    flags["limits"] = ImageLimits.of_flags(flags)
    progress = Progress()

    def work() -> None:
        must_be_there(flags, "checkpoint", "images")
        from workers.importing.import_anomalib import Import, import_anomalib, summarise_import

        report = import_anomalib(Import(**flags), progress)
        show(summarise_import(report, flags["out_dir"]))

    return run(work, progress)


if __name__ == "__main__":
    sys.exit(main())
