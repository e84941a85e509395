"""`python -m workers.sample_parts`: draw a dataset of brackets, and a sheet that shows them."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import engines.missing_packages  # noqa: F401 (it says what to install)
from engines.errors import EXIT_CODE, KensaError
from workers.progress import Progress
from workers.sample_parts.defects import DEFECTS
from workers.sample_parts.write_dataset import CATEGORY, draw_sheet, write_dataset, write_png


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = _arguments(argv)
    began, progress = time.monotonic(), Progress()
    try:
        counts = args.train, args.normal, args.per_kind
        write_dataset(args.out, args.category, *counts, args.size, args.seed, progress)
        if args.sheet is not None:
            write_png(args.sheet, draw_sheet(args.seed, args.size))
    except KensaError as error:
        progress.fail(str(error))
        return EXIT_CODE
    except OSError as error:
        progress.fail(f"cannot write the pictures: {error}")
        return EXIT_CODE
    print(_summary(args, time.monotonic() - began))
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m workers.sample_parts",
        description="Draw pictures of a machined bracket, good and defective, with masks.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--category", default=CATEGORY, help="<dataset>_<class>")
    parser.add_argument("--train", type=int, default=24, help="normal pictures to learn from")
    parser.add_argument("--normal", type=int, default=8, help="normal pictures to test with")
    parser.add_argument("--per-kind", type=int, default=4, help="pictures of each defect")
    parser.add_argument("--size", type=int, default=512, help="width and height, px")
    parser.add_argument("--seed", type=int, default=0, help="other parts for another seed")
    parser.add_argument("--sheet", type=Path, help="also draw a contact sheet to this PNG file")
    return parser.parse_args(argv)


def _summary(args: argparse.Namespace, took_s: float) -> str:
    defective = args.per_kind * len(DEFECTS)
    return (
        f"{args.out}: {args.train} pictures to learn from, {args.normal} normal and {defective} "
        f"defective ones to test with ({args.size} px, category {args.category}, {took_s:.1f} s)"
    )


if __name__ == "__main__":
    sys.exit(main())
