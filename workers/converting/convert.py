"""Turn a trained model into what serves: a graph, its bank, and the proof that they agree."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engines.errors import BadMeta, BadRequest, BadWeights, KensaError, NoTensorRT
from engines.files import sha256, staged
from engines.image import DEFAULT_LIMITS, ImageLimits
from engines.machine import memory, memory_needs
from engines.meta import Meta
from engines.nvidia.library import ANY_RTX, RTX, here
from engines.regions import Regions
from engines.store.bundle import (
    ONNX,
    PLAN,
    PLAN_RECORD,
    REPORT,
    STRANGE,
    check_hash,
    read_bank,
    read_report,
    write_report,
)
from engines.store.golden import GOLDEN_SCORES, Golden
from engines.store.known_scores import SCORES, KnownScores
from engines.store.plan_record import L4T_RELEASE, Machine, Precision, has_tensorrt
from engines.store.regions import REGIONS, read_regions, write_regions
from workers import models
from workers.converting.export import Opset, export_onnx, made_of, parity
from workers.converting.int8 import OnTestImages, Proof, to_int8
from workers.converting.plan.rebuild import (
    DLA_IS_NOT_FOR_FLOAT32,
    UNPROVED,
    builder_for,
    sample_parts,
)
from workers.learning.dataset import Category, Images
from workers.progress import Progress

RANGE_IMAGES = 64  # of a category, for the ranges of int8
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
    int8: bool = False
    data_root: Path | None = None  # with category: pictures to find and to judge int8 with
    category: str | None = None
    before: Path | None = None  # a folder whose graph and plan may do; None: out_dir
    cache: Path | None = None  # a folder for what TensorRT measured of its kernels
    target: str | None = None  # GPUs of other machines that the plan is for; None: this one's
    limits: ImageLimits = DEFAULT_LIMITS  # of pictures

    @property
    def precision(self) -> Precision:
        return "int8" if self.int8 else "f16" if self.fp16 else "f32"


def convert(request: Convert, progress: Progress) -> dict[str, Any]:
    """Export, compare with the torch model, and write the bundle into `out_dir`.

    Returns:
        The report, as report.json holds it.

    Raises:
        KensaError: the files do not fit together, or the graph does not agree with the model.
            `out_dir` is as it was.
    """
    started = time.perf_counter()
    if request.fp16 and request.int8:
        raise BadRequest("Either --fp16 or --int8: what is not in int8 stays in float32.")
    precision = request.precision
    if request.use_dla and precision == "f32":
        raise BadRequest(DLA_IS_NOT_FOR_FLOAT32)
    machine = None
    if request.target is not None or has_tensorrt():
        machine = builder_for(precision, request.use_dla, request.target)
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
    needed = memory_needs.to_convert(meta, bank.nbytes if bank is not None else 0)
    if short := memory.warning(needed):
        progress.say(short)
    golden = Golden.read(request.weights_pth.parent, meta.image_size)
    images = golden.images if golden else sample_parts(meta.image_size)
    report = read_report(request.weights_pth.parent)
    scores = _scores_beside(learned)

    with staged(request.out_dir) as folder:
        expected = kind.scores(model, [images])  # before half precision, which is for good
        before = request.before or request.out_dir
        key = None
        if bank is not None and not request.int8:
            key = made_of(meta, request.weights_pth, bank, request.opset, half=request.fp16)
        if (same := _the_same_graph(before, key)) is not None:
            progress.say("the graph is that of the version before")
            shutil.copyfile(same, folder / ONNX)
        else:
            progress.say(f"exporting with opset {request.opset}{' in float16' * request.fp16}")
            graph, inputs = kind.graph(model, half=request.fp16)
            export_onnx(graph, inputs, folder / ONNX, request.opset)
        report.pop("int8", None)
        if request.int8:
            proof = Proof(
                images, expected, bank, meta, _tests(request, kind, model, meta, bank, progress)
            )
            report["int8"] = _to_int8(request, folder / ONNX, golden, proof, progress)
        progress.say(f"comparing with the torch model on {len(images)} images")
        agreement = parity(folder / ONNX, expected, images, bank, meta, precision=precision)
        if golden is None:
            agreement.get("openvino_bf16", {})["ok"] = False
        report["export"] = {
            "opset": request.opset,
            "precision": precision,
            "torch": torch.__version__,
            "seconds": round(time.perf_counter() - started, 2),
            **({"made_of": key} if key is not None else {}),
        }
        report["parity"] = agreement
        report["parity_images"] = f"{len(images)} {'of its own images' if golden else NO_GOLDEN}"
        report.pop("plan", None)
        names = [ONNX, REPORT]
        if golden is not None:
            report[GOLDEN_SCORES] = [float(one) for one in expected]  # for who has no torch
        if machine is not None:
            from workers.converting.plan.build import Wanted, make_plan

            wanted = Wanted(
                meta, precision, request.workspace, request.use_dla, bank, images, expected,
                request.cache, any_gpu=request.target == ANY_RTX,
            )  # fmt: skip
            if machine.elsewhere:
                progress.say(UNPROVED)
            report["plan"] = make_plan(folder, machine, wanted, before, progress)
            names += [PLAN, PLAN_RECORD]
        write_report(folder, report)
        for source, name in ((learned, meta.memory_bank or meta.stats),
                             (request.weights_pth, meta.weights_pth)):  # fmt: skip
            if source is not None and name is not None:  # with them it can be retrained
                shutil.copyfile(source, folder / name)
                names.append(name)
        if golden is not None:
            names.append(golden.write(folder))
        if scores is not None:  # an update goes on from them
            shutil.copyfile(scores, folder / SCORES)
            names.append(SCORES)
        strange = request.weights_pth.with_name(STRANGE)
        if STRANGE in (meta.files or {}) and strange.is_file():  # of this training
            shutil.copyfile(strange, folder / STRANGE)
            names.append(STRANGE)
        if (regions := _regions_of(request, meta)) is not None:
            meta = write_regions(folder, regions, meta)
            names.append(REGIONS)
        hashes = {name: sha256(folder / name) for name in names}
        meta.with_(files=hashes).write(folder / "meta.json")
    if machine is None:
        progress.say(_about_no_plan())
    return report


def _the_same_graph(before: Path, key: str | None) -> Path | None:
    """The graph in a folder, where it was made of the same; None also where it is damaged."""
    try:
        if key is None or read_report(before).get("export", {}).get("made_of") != key:
            return None
        check_hash(before / ONNX, (Meta.read(before / "meta.json").files or {}).get(ONNX, ""))
    except (KensaError, OSError):  # it is exported anew; who opens it says what is wrong there
        return None
    return before / ONNX


def _regions_of(request: Convert, meta: Meta) -> Regions | None:
    """What never counts, from beside the weights, or else beside the meta.json that was named."""
    beside = request.weights_pth.parent
    there = meta.regions is not None and (beside / meta.regions).is_file()
    return read_regions(beside if there else request.meta_json.parent, meta)


def _scores_beside(learned: Path | None) -> Path | None:
    """scores.json beside what was learned, None where there is none; BadBundle if damaged."""
    if learned is None or not (learned.parent / SCORES).is_file():
        return None
    KnownScores.read(learned.parent)
    return learned.parent / SCORES


def _score(kind: Any, model: Any, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    scores: NDArray[np.float32] = kind.scores(model, [images])
    return scores


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


def _to_int8(
    request: Convert, graph: Path, golden: Golden | None, proof: Proof, progress: Progress
) -> dict[str, Any]:
    """Let the graph compute in int8; what report.json says of it."""
    images, said = _seen(request, golden, proof.meta, progress)
    progress.say(f"measuring ranges for int8 on {said}")
    return {**to_int8(graph, images, proof, progress), "ranges": said}


def _seen(
    request: Convert, golden: Golden | None, meta: Meta, progress: Progress
) -> tuple[NDArray[np.uint8], str]:
    """Pictures of parts (n, S, S, 3) that give the ranges, and where they come from.

    Those of defects as well, where some are known: EfficientAD's networks differ most there, and
    beyond the ranges of good parts alone a score was cut off by 14 %.
    """
    parts, said = [], []
    if golden is not None and golden.defective is not None and not golden.defective.all():
        parts.append(golden.images)
        said.append(f"{len(parts[0])} golden images")
    if request.category is not None and request.data_root is not None:
        paths = Category.find(request.data_root, request.category).train
        spread = paths[:: max(1, len(paths) // RANGE_IMAGES)][:RANGE_IMAGES]
        parts += list(Images(spread, meta, 4, progress, limits=request.limits))
        said.append(f"{len(spread)} training images of {request.category}")
    if not parts:
        raise BadRequest(
            "--int8 needs pictures of normal parts: golden.npz beside the weights, as retrain.py"
            " leaves it, or --data_root and --category."
        )
    return np.concatenate(parts), " and ".join(said)


def _tests(
    request: Convert,
    kind: Any,
    model: Any,
    meta: Meta,
    bank: NDArray[np.float32] | None,
    progress: Progress,
) -> OnTestImages | None:
    """The images that int8 is tested with; None where there are none of both sorts."""
    if request.category is None or request.data_root is None:
        return None
    category = Category.find(request.data_root, request.category)
    if not category.test_normal or not category.test_anomaly:
        return None
    score = partial(_score, kind, model)
    return OnTestImages(category, score, meta, bank, request.limits, progress)


def _about_no_plan() -> str:
    """Why there is no model.plan, and who makes one."""
    how = "OpenVINO runs model.onnx as it is; the same command on the Jetson makes the plan."
    if not here().installed and not L4T_RELEASE.exists():
        return f"no model.plan: TensorRT is not on this machine. {how}"
    try:
        Machine.read()
    except NoTensorRT as error:  # a part of it is missing
        rtx = "; --target rtx makes a plan for PCs with an RTX card" if here() is RTX else ""
        return f"no model.plan. {error} OpenVINO runs model.onnx as it is{rtx}."
    raise AssertionError("has_tensorrt() and Machine.read() do not agree")
