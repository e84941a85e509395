"""Turn a trained model into what serves: a graph, its bank, and the proof that they agree."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engines.bundle import ONNX, REPORT, read_bank, read_report, write_report
from engines.errors import BadMeta, BadWeights
from engines.files import sha256, staged
from engines.golden import Golden
from engines.image import resize
from engines.meta import Meta
from workers import models
from workers.export import Opset, export_onnx, parity
from workers.progress import Progress
from workers.sample_parts import draw_part

NO_GOLDEN = "drawn sample parts (no golden.npz beside the weights, so bf16 stays off)"


@dataclass(frozen=True)
class Convert:
    """What to convert: the flags of convtrt.py."""

    model: str
    weights_pth: Path
    meta_json: Path
    out_dir: Path
    memory_bank: Path | None = None
    stats: Path | None = None
    opset: Opset = 17
    fp16: bool = False
    workspace: int = 4096  # MiB, for building a plan
    use_dla: bool = False


def convert(request: Convert, progress: Progress) -> dict[str, Any]:
    """Export, compare with the torch model, and write the bundle into `out_dir`.

    Returns:
        The report, as report.json holds it.

    Raises:
        KensaError: the files do not fit together, or the graph does not agree with the model.
            `out_dir` is as it was.
    """
    started = time.perf_counter()
    meta = _meta_of_these_weights(request, progress)
    kind = models.module(meta.model)
    model = kind.build(meta, request.weights_pth)
    learned = request.memory_bank or request.stats
    if learned is None and kind.LEARNED is not None:
        learned = request.weights_pth.with_name(getattr(meta, kind.LEARNED))
    if learned is not None:
        kind.load(model, learned)
    if not kind.knows(model):
        raise BadWeights(f"{request.weights_pth} has learned nothing yet: run retrain.py first.")
    bank = read_bank(learned) if learned is not None and meta.memory_bank is not None else None
    golden = Golden.read(request.weights_pth.parent, meta.image_size)
    images = golden.images if golden else _sample_parts(meta.image_size)
    report = read_report(request.weights_pth.parent)

    with staged(request.out_dir) as folder:
        expected = kind.scores(model, [images])  # before half precision, which is for good
        progress.say(f"exporting with opset {request.opset}{' in float16' * request.fp16}")
        graph, inputs = kind.graph(model, half=request.fp16)
        export_onnx(graph, inputs, folder / ONNX, request.opset)
        progress.say(f"comparing with the torch model on {len(images)} images")
        agreement = parity(folder / ONNX, expected, images, bank, meta, half=request.fp16)
        if golden is None:
            agreement.get("openvino_bf16", {})["ok"] = False
        report["export"] = {
            "opset": request.opset,
            "precision": "f16" if request.fp16 else "f32",
            "torch": torch.__version__,
            "seconds": round(time.perf_counter() - started, 2),
        }
        report["parity"] = agreement
        report["parity_images"] = f"{len(images)} {'of its own images' if golden else NO_GOLDEN}"
        write_report(folder, report)
        names = [ONNX, REPORT]
        for source, name in ((learned, meta.memory_bank or meta.stats),
                             (request.weights_pth, meta.weights_pth)):  # fmt: skip
            if source is not None and name is not None:  # with them it can be retrained
                shutil.copyfile(source, folder / name)
                names.append(name)
        if golden is not None:
            names.append(golden.write(folder))
        hashes = {name: sha256(folder / name) for name in names}
        meta.with_(files=hashes).write(folder / "meta.json")
    progress.say(_about_the_plan(request))
    return report


def _meta_of_these_weights(request: Convert, progress: Progress) -> Meta:
    """meta.json as given, with the calibration that was made for just these weights.

    The usual command names the meta.json of the first training beside retrained weights. Its
    thresholds are stale: those of the training that made the weights stand beside them.
    """
    meta = Meta.read(request.meta_json)
    if meta.model != request.model:
        raise BadMeta(
            f"{request.meta_json} describes a {meta.model} model, but --model says {request.model}."
        )
    beside = request.weights_pth.with_name("meta.json")
    if not beside.is_file() or beside.resolve() == request.meta_json.resolve():
        return meta
    made = Meta.read(beside)
    if (made.files or {}).get(request.weights_pth.name) != sha256(request.weights_pth):
        return meta
    progress.say(
        f"thresholds and score range come from {beside}, which was written with these weights;"
        f" the hand-set image_threshold ({meta.image_threshold}) from {request.meta_json}"
    )
    return made.with_(image_threshold=meta.image_threshold)


def _sample_parts(size: int) -> NDArray[np.uint8]:
    parts = [draw_part(seed, defect) for seed, defect in enumerate([None, None, "stain", "burr"])]
    return np.stack([resize(image, size) for image, _ in parts])


def _about_the_plan(request: Convert) -> str:
    """What became of model.plan."""
    if find_spec("tensorrt") is None:
        return (
            "no model.plan: TensorRT is not on this machine. OpenVINO runs model.onnx as it is;"
            " the same command on the Jetson makes the plan."
        )
    return "no model.plan: this Kensa does not build plans yet. OpenVINO runs model.onnx."
