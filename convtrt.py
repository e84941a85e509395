#!/usr/bin/env python3
"""Turn a trained model into an engine: see docs/commands.md."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import engines.missing_packages  # noqa: F401 (it says what to install)
from engines.image import ImageLimits
from engines.nvidia.library import TARGET, TARGETS
from workers.commands import cache_folder, must_be_there, run, show, summarise_conversion
from workers.models import KINDS
from workers.progress import Progress


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="convtrt.py",
        description="Turn a trained model into an engine: model.onnx, which OpenVINO runs on any"
        " PC, and model.plan where TensorRT is. Both are compared with the torch model before they"
        " are written.",
    )
    add = parser.add_argument
    add("--model", required=True, choices=KINDS)
    add("--weights_pth", type=Path, required=True, metavar="F", help="model.pth from retrain.py")
    add("--meta_json", type=Path, required=True, metavar="F", help="meta.json of the model. When"
        " another one was written with these weights, its thresholds are taken")  # fmt: skip
    add("--memory_bank", type=Path, metavar="F", help="memory bank (patchcore; default: the one"
        " beside the weights)")  # fmt: skip
    add("--stats", type=Path, metavar="F", help="Gaussian statistics (padim; default: those beside"
        " the weights)")  # fmt: skip
    add("--opset", type=int, choices=(17, 18), default=17, help="ONNX opset (default 17)")
    add("--fp16", action="store_true", help="backbone in half precision; distances stay in float32")
    add("--int8", action="store_true", help="convolutions in int8, with ranges from pictures:"
        " the golden images, and normal ones of --category. Those that would change scores"
        " or verdicts too much stay in float32; refused where none may")  # fmt: skip
    add("--data_root", type=Path, metavar="D", help="with --int8: folder of train/ and test/")
    add("--category", metavar="C", help="with --int8: whose training images give the ranges, and"
        " whose test images must be told apart as well as before")  # fmt: skip
    add("--workspace", type=int, default=4096, metavar="MIB", help="MiB that building a plan may"
        " take at most (default 4096; never more than a quarter of what is free)")  # fmt: skip
    add("--out_dir", type=Path, required=True, metavar="D", help="where the files go")
    add("--use_dla", action="store_true", help="build the plan for DLA, with --fp16 or --int8"
        " (default off; Orin Nano has none)")  # fmt: skip
    add("--target", metavar="rtx[:SM86,SM120]", help="build the plan for GPUs of other machines,"
        " also without one here: PCs with an RTX card of these compute capabilities, or of all"
        " that the graph can run on (needs pip install 'kensa[rtx]')")  # fmt: skip
    ImageLimits.add_flags(parser)
    parsed = parser.parse_args(arguments)
    for flag, model in (("memory_bank", "patchcore"), ("stats", "padim")):
        if getattr(parsed, flag) is not None and parsed.model != model:
            parser.error(f"--{flag} is for {model}; a {parsed.model} model has none")
    if (parsed.data_root is None) != (parsed.category is None):
        parser.error("--data_root and --category go together")
    if parsed.category is not None and not parsed.int8:
        parser.error("--category is for --int8")
    if parsed.target is not None and re.fullmatch(TARGET, parsed.target) is None:
        parser.error(f"--target {parsed.target!r} is no target: {TARGETS}")
    if parsed.target is not None and parsed.use_dla:
        parser.error("a PC's GPU has no DLA: either --target or --use_dla")
    if parsed.workspace < 1:
        parser.error(f"--workspace {parsed.workspace}: at least 1 MiB")
    if parsed.int8 and parsed.fp16:
        parser.error("either --fp16 or --int8: what is not in int8 stays in float32")
    return parsed


def main(arguments: list[str] | None = None) -> int:
    flags = vars(parse(arguments))
    flags["limits"] = ImageLimits.of_flags(flags)
    progress = Progress()

    def work() -> None:
        from engines.meta import Meta
        from workers.learning.dataset import Category

        must_be_there(flags, "weights_pth", "memory_bank", "stats")
        Meta.read(flags["meta_json"])  # what is wrong with it is said before torch is loaded
        if flags["category"] is not None:
            Category.find(flags["data_root"], flags["category"])
        from workers.converting.convert import Convert, convert

        report = convert(Convert(**flags, cache=cache_folder()), progress)
        show(summarise_conversion(report, flags["out_dir"]))

    return run(work, progress)


if __name__ == "__main__":
    sys.exit(main())
