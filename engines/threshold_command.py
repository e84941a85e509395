"""`kensa threshold FOLDER`: the threshold of a model in a folder, shown or changed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from engines.errors import EXIT_CODE, BadBundle, BadRequest, KensaError
from engines.limits import KEYS, InForce, asked_for, in_force
from engines.meta import Meta
from engines.promise import drawn_found
from engines.store.bundle import ONNX
from engines.store.versions import MANIFEST, META


def main(arguments: list[str]) -> int:
    """Do what the arguments say; 0, or 2 and a sentence when something is wrong."""
    asked = _parser().parse_args(arguments)
    try:
        wanted = {key: getattr(asked, key) for key in KEYS if getattr(asked, key) is not None}
        meta = _read(asked.folder)
        if wanted:
            meta = asked_for(meta, wanted)
            meta.write(asked.folder / META)
        _print(in_force(meta))
        drawn, found = drawn_found(meta)
        if drawn is not None:
            print(f"drawn defects  {found} of {drawn} found")
    except KensaError as error:
        sys.stderr.write(f"kensa: {error}\n")
        return EXIT_CODE
    except OSError as error:
        sys.stderr.write(f"kensa: {asked.folder / META} is as it was: {error.strerror}.\n")
        return EXIT_CODE
    return 0


def _read(folder: Path) -> Meta:
    """The meta.json of a folder that a command made.

    Raises:
        BadMeta, BadBundle: there is none, or nothing of a model beside it.
        BadRequest: it is in a server's store.
    """
    meta = Meta.read(folder / META)
    if (folder / MANIFEST).exists():
        raise BadRequest(
            f"{folder} is a version in a server's store, which never changes: ask the server, with"
            " GET and PUT /models/NAME/threshold."
        )
    if not any((folder / name).is_file() for name in (ONNX, meta.weights_pth)):
        raise BadBundle(
            f"{folder} has neither {ONNX} nor {meta.weights_pth}: name a folder that retrain.py or"
            " convtrt.py made."
        )
    return meta


def _print(found: InForce) -> None:
    print(f"threshold      {found.threshold:.6g} on the normalised score, {found.raw:.6g} raw")
    if found.false_rejects is not None:
        print(f"false_rejects  {found.false_rejects:.3g}{_bound(found.at_most)}")
    else:
        print("false_rejects  not known")
    for row in found.rows:
        print(f"  {row.false_rejects:<10.3g}   {row.raw:.6g} raw{_bound(row.at_most)}")


def _bound(at_most: float | None) -> str:
    return "" if at_most is None else f", at most {at_most:.3g} (95 % sure)"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kensa threshold",
        description="Show the threshold of a model in a folder that retrain.py or convtrt.py made,"
        " or write another one into its meta.json. Exit code 2 when that cannot be.",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="that has the meta.json")
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--threshold", type=float, metavar="X",
        help="limit for the normalised score, 0 to 1; 0.5 is the one that training found",
    )  # fmt: skip
    how.add_argument("--raw", type=float, metavar="X", help="limit for the raw score")
    how.add_argument(
        "--false_rejects", type=float, metavar="X",
        help="share of good parts to reject, such as 0.005; within the table that is shown",
    )  # fmt: skip
    return parser
