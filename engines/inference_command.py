"""The inference commands: score an image or a folder of images with one model."""

from __future__ import annotations

import argparse
import csv
import io
import math
import re
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engines import image
from engines.errors import (
    EXIT_CODE,
    BadBundle,
    BadDataset,
    BadImage,
    GpuLost,
    KensaError,
    RuntimeFailed,
    StalePlan,
)
from engines.files import print_anything, printable, write_atomically
from engines.meta import Kind, Meta
from engines.runtimes import Runtime, look_past_regions
from engines.runtimes.plan_proof import prove
from engines.store.bundle import ONNX, PLAN, Bundle, read_bank, read_report
from engines.store.onnx_weights import check_weights
from engines.store.plan_record import PLAN_RECORD, Fingerprint, Machine
from engines.verdict import decide

# What ends a line, moves a terminal's cursor or turns the direction of what follows.
_UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")

NOT_ALL_JUDGED = 1  # exit code when some images could not be read; the others are in the CSV


def main(kind: Kind, arguments: list[str] | None = None) -> int:
    """Run `./patchcore` and its like; returns the exit code."""
    print_anything()
    flags = _parse(kind, arguments)
    try:
        return _inspect_all(kind, flags)
    except KensaError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)  # libraries say paragraphs
        return EXIT_CODE
    except OSError as error:
        print(f"error: {error.strerror}: {error.filename}", file=sys.stderr)
        return EXIT_CODE
    except KeyboardInterrupt:
        print(f"Stopped. result_{kind}.csv was not written.", file=sys.stderr)
        return 130


def _inspect_all(kind: Kind, flags: argparse.Namespace) -> int:
    """Print a line per image, write result_<kind>.csv into the working folder."""
    paths = _images(flags.data)
    meta = _meta_beside(flags.engine, kind)
    runtime = _open(flags.engine, flags.memory_bank if kind == "patchcore" else None)
    if runtime.image_size != flags.image_size:
        raise BadBundle(
            f"This model takes images of {runtime.image_size} x {runtime.image_size}:"
            f" pass -i {runtime.image_size}, or convert a model of size {flags.image_size}."
        )
    if meta is not None:
        look_past_regions(runtime, Bundle(flags.engine.parent, meta))
    rows: list[tuple[str, str, str]] = []
    hints: dict[str, str | None] = {}
    failed: RuntimeFailed | None = None
    for path in paths:
        name = printable(path.name)
        shown = _on_one_line(name)
        try:
            data, bit_depth = path.read_bytes(), meta.bit_depth if meta else None
            picture = image.decode(data, flags.limits, bit_depth)
            height, width = picture.shape[:2]
            seen = image.resize(picture, runtime.image_size, meta.resize if meta else None)
            raw_score = float(runtime.infer(seen[None])[0][0])
            hints[name] = image.hint_on(width, height, runtime.image_size)
            rows.append((name, f"{raw_score:.6f}", decide(raw_score, flags.threshold)))
        except OSError as error:  # it went away, or the disk does not give it
            print(f"{shown}: not judged: it cannot be read: {error.strerror}", file=sys.stderr)
            continue
        except BadImage as error:
            print(f"{shown}: not judged: {error}", file=sys.stderr)
            continue
        except MemoryError:  # the others may be smaller
            print(f"{shown}: not judged: memory was short", file=sys.stderr)
            continue
        except GpuLost:
            raise
        except RuntimeFailed as error:
            failed = error
            print(f"{shown}: not judged: {error}", file=sys.stderr)
            continue
        print(f"{shown}  {raw_score:.6f}  {rows[-1][2]}", flush=True)
    if hint := image.hints_in_short(hints):
        print(f"hint: {hint}", file=sys.stderr)
    if failed is not None and not rows:  # it is not the pictures
        raise failed
    table = Path(f"result_{kind}.csv")
    write_atomically(table.resolve(), _csv(rows))
    rejects = sum(row[2] == "Anomaly" for row in rows)
    unread = len(paths) - len(rows)
    print(
        f"{len(rows)} judged, {rejects} Anomaly, {len(rows) - rejects} Normal"
        f"{f', {unread} not judged' if unread else ''}: {table}",
        file=sys.stderr,
    )
    return NOT_ALL_JUDGED if unread else 0


def _on_one_line(name: str) -> str:
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), name)


def _parse(kind: Kind, arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=kind, description=f"Score images with a {kind} model; writes result_{kind}.csv."
    )
    add = parser.add_argument
    add("-e", "--engine", type=Path, required=True, metavar="F.plan", help="model.plan, on"
        " TensorRT; where it is missing, the model.onnx beside it runs on OpenVINO")  # fmt: skip
    if kind == "patchcore":
        add("-m", "--memory_bank", type=Path, required=True, metavar="F.npz", help="memory bank")
    add("-d", "--data", type=Path, required=True, metavar="PATH", help="an image, or a folder")
    add("-i", "--image_size", type=int, required=True, metavar="N", help="side of the model's"
        " square input, pixels")  # fmt: skip
    add("-t", "--threshold", type=float, required=True, metavar="X", help="raw score above which a"
        " part is an anomaly")  # fmt: skip
    image.ImageLimits.add_flags(parser)
    flags = parser.parse_args(arguments)
    flags.limits = image.ImageLimits.of_flags(vars(flags))
    if not math.isfinite(flags.threshold):
        parser.error("-t must be a finite number")
    return flags


def _images(data: Path) -> list[Path]:
    if data.is_file():
        return [data]
    read = image.SUFFIXES
    paths = [
        path for path in image.visible(data) if path.suffix.lower() in read | image.OTHER_PICTURES
    ]  # the others are refused one by one, rather than passed over
    if not data.exists():
        raise BadDataset(f"{data} does not exist: -d takes an image or a folder of images.")
    if not any(path.suffix.lower() in read for path in paths):
        raise BadDataset(f"{data} holds no images ({', '.join(sorted(image.SUFFIXES))}).")
    return paths


def _meta_beside(engine: Path, kind: Kind) -> Meta | None:
    """meta.json beside the engine; engines of older tools have none."""
    path = engine.with_name("meta.json")
    if not path.is_file():
        return None
    meta = Meta.read(path)
    if meta.model != kind:
        raise BadBundle(f"{engine.parent} holds a {meta.model} model: run ./{meta.model}.")
    return meta


def _open(engine: Path, memory_bank: Path | None) -> Runtime:
    """The plan on TensorRT; the graph on OpenVINO where it is named, or where there is no plan.

    A plan that is there and cannot be used is an error, rather than something slower in its place.
    """
    onnx = engine if engine.suffix == ".onnx" else engine.with_name(ONNX)
    bank = None if memory_bank is None else read_bank(memory_bank)
    if engine != onnx and engine.is_file():
        return _on_tensorrt(engine, bank)
    if not onnx.is_file():
        both = "" if onnx == engine else f", and {onnx} does not exist either"
        raise BadBundle(f"{engine} does not exist{both}: make it with convtrt.py.")
    if onnx != engine:
        print(f"{engine} does not exist: running {onnx} on OpenVINO instead", file=sys.stderr)
    from engines.runtimes.openvino import OpenVINORuntime, choose_precision, float32_convolutions

    report = read_report(onnx.parent)
    in_part = float32_convolutions(report)
    return OpenVINORuntime(
        onnx, bank, precision=choose_precision(report), float32_convolutions=in_part
    )


def _on_tensorrt(plan: Path, bank: NDArray[np.float32] | None) -> Runtime:
    """Raises NoTensorRT, StalePlan or BadBundle where the plan is of no use here."""
    machine = Machine.read()
    record = Fingerprint.read(plan.parent) if plan.name == PLAN else None
    if record is None:
        raise StalePlan(
            f"Nothing says what {plan} was built for: {PLAN_RECORD} belongs beside it. Make it"
            " again on this machine, with convtrt.py."
        )
    if reason := record.stale(plan.parent, machine):
        raise StalePlan(reason)
    check_weights(plan.with_name(ONNX))  # of which it was built
    from engines.runtimes.tensorrt import TensorRTRuntime

    runtime = TensorRTRuntime(plan, bank, precision=record.precision)
    if not record.proved:
        prove(Bundle.open(plan.parent), runtime, bank)
    return runtime


def _csv(rows: list[tuple[str, str, str]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("filename", "raw_score", "decision"))
    writer.writerows(rows)
    return text.getvalue().encode()
