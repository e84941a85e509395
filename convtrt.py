#!/usr/bin/env python3
"""Turn a trained model into an engine: see docs/commands.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from workers.commands import run, summarise_conversion
from workers.models import KINDS
from workers.progress import Progress


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="convtrt.py",
        description="Turn a trained model into an engine: model.onnx, which OpenVINO runs on any"
        " PC, compared with the torch model before it is written.",
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
    add("--workspace", type=int, default=4096, metavar="MIB", help="memory that building a plan may"
        " take (default 4096)")  # fmt: skip
    add("--out_dir", type=Path, required=True, metavar="D", help="where the files go")
    add("--use_dla", action="store_true", help="build the plan for DLA (default off; Orin Nano has"
        " none)")  # fmt: skip
    parsed = parser.parse_args(arguments)
    for flag, model in (("memory_bank", "patchcore"), ("stats", "padim")):
        if getattr(parsed, flag) is not None and parsed.model != model:
            parser.error(f"--{flag} is for {model}; a {parsed.model} model has none")
    return parsed


def main(arguments: list[str] | None = None) -> int:
    flags = vars(parse(arguments))
    progress = Progress()

    def work() -> None:
        from workers.convert import Convert, convert

        report = convert(Convert(**flags), progress)
        print("\n".join(summarise_conversion(report, flags["out_dir"])))

    return run(work, progress)


if __name__ == "__main__":
    sys.exit(main())
