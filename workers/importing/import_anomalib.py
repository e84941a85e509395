"""A Lightning checkpoint of anomalib 2.x -> the files that retrain.py would have left."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engines.errors import BadBundle, BadDataset, BadMeta, BadWeights
from engines.files import sha256, staged
from engines.image import DEFAULT_LIMITS, ImageLimits
from engines.meta import Kind, Meta
from engines.runtimes.bank_search import NEIGHBOURS
from engines.runtimes.parity import FLOAT32_LIMIT
from engines.store.bundle import REPORT, write_report
from engines.store.golden import GOLDEN, Golden
from engines.store.known_scores import KnownScores
from workers import models
from workers.importing.checkpoint import Checkpoint
from workers.importing.preparation import DEFAULT_SIZE, preparation
from workers.learning.calibrate import Budget, calibrate
from workers.learning.dataset import MOST_BROKEN, Images, bit_depth_of, find_pictures
from workers.progress import Progress

CORESET_RATIO = 0.1  # anomalib's default


@dataclass(frozen=True)
class Import:
    """What to import: the flags of import_anomalib.py. None where the checkpoint must say it."""

    checkpoint: Path
    out_dir: Path
    model: Kind | None = None
    backbone: str | None = None
    layers: list[str] | None = None
    image_size: int | None = None
    images: Path | None = None
    bit_depth: int | None = None
    limits: ImageLimits = DEFAULT_LIMITS  # of pictures


def import_anomalib(request: Import, progress: Progress) -> dict[str, Any]:
    """Read a checkpoint, and write the files of the model into `out_dir`.

    Returns:
        The report, as report.json holds it.

    Raises:
        KensaError: the checkpoint is damaged, of another model or of one that scores otherwise,
            or does not say what is needed. `out_dir` is as it was.
    """
    checkpoint = Checkpoint.read(request.checkpoint)
    meta, notes = describe(checkpoint, request)
    _check_no_old_golden(request)
    kind = models.module(meta.model)
    progress.say(f"building {meta.model} from {request.checkpoint}")
    model = kind.build(meta, request.checkpoint)
    with staged(request.out_dir) as folder:
        if kind.LEARNED is None:
            if not kind.knows(model):
                raise _untrained(checkpoint)
        else:
            _load_learned(checkpoint, meta, kind, model, folder / getattr(meta, kind.LEARNED))
        names, golden = [], None
        if request.images is not None:
            meta, pictures = _read_pictures(request, request.images, meta, progress)
            scores = kind.scores(model, [pictures])
            meta = _with_threshold(checkpoint, meta, pictures, scores)
            golden = _golden(pictures, scores, meta)
            names.append(golden.write(folder))
        else:
            meta = _with_threshold(checkpoint, meta.with_(bit_depth=request.bit_depth))
        report = {
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "model": meta.model,
            "imported": {**checkpoint.origin(), "notes": notes},
            **kind.summary(model),
            "calibration": meta.calibration,
            "golden_images": 0 if golden is None else len(golden.images),
        }
        write_report(folder, report)
        names += [*kind.save(model, meta, folder), REPORT]
        hashes = {name: sha256(folder / name) for name in names}
        meta = meta.with_(score_kind=kind.SCORE_KIND, files=hashes)
        meta.write(folder / "meta.json")
    return {**report, "meta": meta.model_dump(exclude_none=True)}


# ---- what it says ----------------------------------------------------------------------------


def describe(checkpoint: Checkpoint, request: Import) -> tuple[Meta, list[str]]:
    """meta.json without thresholds yet, and what a person should know.

    Raises:
        BadWeights: it is another model, or scores otherwise than Kensa, or does not say something
            that no flag says either.
    """
    kind = checkpoint.kind()
    if request.model not in (None, kind):
        raise BadWeights(f"{checkpoint.path} is a {kind} model, but --model says {request.model}.")
    size, notes = preparation(checkpoint, kind)
    if kind == "efficientad":
        own = _efficientad(checkpoint, request)
    elif kind == "patchcore":
        own = {**_backbone(checkpoint, request), **_patchcore(checkpoint, notes)}
    else:
        own = {**_backbone(checkpoint, request), **_padim(checkpoint, notes)}
    if "anomalib_post_processor_config" not in checkpoint.content and not isinstance(
        checkpoint.said.get("post_processor"), bool
    ):
        notes.append("the checkpoint does not say its image_sensitivity: taken as 0.5")
    meta = Meta.model_validate({"model": kind, **own, "image_size": DEFAULT_SIZE})
    size = _agreed(checkpoint, "image_size", size, request.image_size)
    # anomalib's own averages along each axis that shrinks, too.
    return meta.with_(image_size=size, resize="each_axis"), notes


def _backbone(checkpoint: Checkpoint, request: Import) -> dict[str, Any]:
    name, layers = (checkpoint.said.get(key) for key in ("backbone", "layers"))
    name = name if isinstance(name, str) else None
    return {
        "backbone": _agreed(checkpoint, "backbone", name, request.backbone),
        "layers": _agreed(checkpoint, "layers", _names(layers), request.layers),
    }


def _patchcore(checkpoint: Checkpoint, notes: list[str]) -> dict[str, Any]:
    neighbours = checkpoint.said.get("num_neighbors", NEIGHBOURS)
    if neighbours != NEIGHBOURS:
        raise BadWeights(
            f"{checkpoint.path} scores with num_neighbors={neighbours}; Kensa's PatchCore has"
            f" {NEIGHBOURS}, anomalib's default, and would score otherwise."
        )
    if checkpoint.state["model.memory_bank"].dtype == torch.float16:
        notes.append("anomalib ran it in float16, Kensa runs it in float32: scores differ a little")
    ratio = checkpoint.said.get("coreset_sampling_ratio")
    if isinstance(ratio, (int, float)) and 0 < ratio <= 1:
        return {"coreset_ratio": float(ratio)}
    notes.append(f"the checkpoint does not say its coreset_ratio: {CORESET_RATIO} for updates")
    return {"coreset_ratio": CORESET_RATIO}


def _padim(checkpoint: Checkpoint, notes: list[str]) -> dict[str, Any]:
    notes.append(
        "no images can be added to it: the checkpoint does not say of how many images it is"
    )
    return {"n_features": max(1, checkpoint.state["model.idx"].numel())}


def _efficientad(checkpoint: Checkpoint, request: Import) -> dict[str, Any]:
    for name, ours in (("teacher_out_channels", 384), ("padding", False), ("pad_maps", True)):
        if (theirs := checkpoint.said.get(name, ours)) != ours:
            raise BadWeights(
                f"{checkpoint.path} has {name}={theirs}: Kensa's EfficientAD has {ours}, anomalib's"
                " default, and would score otherwise."
            )
    if request.backbone or request.layers:
        raise BadWeights("EfficientAd has networks of its own: omit --backbone and --layers.")
    rate = checkpoint.said.get("lr")
    return {
        "model_size": "medium" if "model.teacher.conv6.weight" in checkpoint.state else "small",
        "learning_rate": rate if isinstance(rate, float) and rate > 0 else None,
    }


def _agreed(checkpoint: Checkpoint, flag: str, found: Any, given: Any) -> Any:
    """What the checkpoint says or else the flag; raises when none does, or both and they differ."""
    if found is None and given is None:
        raise BadWeights(f"{checkpoint.path} does not say its {flag}: pass --{flag}.")
    if found is not None and given is not None and found != given:
        raise BadWeights(f"{checkpoint.path} says {flag} {found}, not {given}: omit --{flag}.")
    return given if found is None else found


def _names(found: Any) -> list[str] | None:
    listed = isinstance(found, (list, tuple)) and all(isinstance(name, str) for name in found)
    return list(found) if listed and len(found) else None


# ---- what it has learned ---------------------------------------------------------------------


def _untrained(checkpoint: Checkpoint) -> BadWeights:
    return BadWeights(f"{checkpoint.path} has learned nothing yet: train it in anomalib first.")


def _load_learned(checkpoint: Checkpoint, meta: Meta, kind: Any, model: Any, path: Path) -> None:
    """Give the model its memory bank or its statistics, by a file that other makers would write."""
    names = (
        {"embeddings": "memory_bank"}
        if meta.model == "patchcore"
        else {"mean": "gaussian.mean", "inv_cov": "gaussian.inv_covariance", "index": "idx"}
    )
    arrays: dict[str, Any] = {}
    for key, name in names.items():
        tensor = checkpoint.state.get(f"model.{name}")
        if tensor is None or not tensor.numel():
            raise _untrained(checkpoint)
        if not torch.isfinite(tensor).all():
            raise BadWeights(f"{checkpoint.path}: {name} holds values that are not finite.")
        arrays[key] = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    try:
        np.savez(path, **arrays)
        kind.load(model, path)
    except BadBundle as error:
        raise BadWeights(
            f"{checkpoint.path}: what it learned does not fit {meta.backbone} with layers"
            f" {','.join(meta.layers or [])} and images of {meta.image_size} px"
            f" ({', '.join(f'{key} {array.shape}' for key, array in arrays.items())}): are"
            " backbone, layers and image_size those of its training?"
        ) from error


# ---- thresholds ------------------------------------------------------------------------------


def _with_threshold(
    checkpoint: Checkpoint,
    meta: Meta,
    pictures: NDArray[np.uint8] | None = None,
    scores: NDArray[np.float32] | None = None,
) -> Meta:
    """meta.json with the scale of anomalib's PostProcessor, or else one found on the pictures.

    anomalib normalises as Kensa does, (raw - threshold) / (max - min) + 0.5 cut to [0, 1], and
    calls anomalous what is above 1 - image_sensitivity.
    """
    scale = _scale(checkpoint)
    if scale is None:
        if scores is None:
            raise BadWeights(
                f"{checkpoint.path} holds no image threshold and score range: it was saved before"
                " a validation. Validate it in anomalib and save it again, or pass --images with"
                " normal parts that it has not learned, to find them."
            )
        shown = KnownScores(scores.astype(np.float64), np.arange(len(scores)))
        return calibrate(shown, np.empty(0, np.float32), Budget(), "test").write_to(meta)
    threshold, low, high, sensitivity = scale
    return meta.with_(
        image_threshold_auto=threshold,
        raw_image_min=low,
        raw_image_max=high,
        image_threshold=1 - sensitivity,
        calibration={"method": "anomalib", "threshold": threshold, "raw_min": low, "raw_max": high},
    )


def _scale(checkpoint: Checkpoint) -> tuple[float, float, float, float] | None:
    """Raw threshold, lowest and highest raw score, and sensitivity; None where it has none."""
    config = checkpoint.content.get("anomalib_post_processor_config")
    config = config if isinstance(config, dict) else {}
    low, high = (checkpoint.number(f"post_processor.image_{end}") for end in ("min", "max"))
    if low is None or high is None or low >= high or config.get("enable_normalization") is False:
        return None
    threshold = checkpoint.number("post_processor._image_threshold")
    if threshold is None and config.get("enable_threshold_matching") is not False:
        threshold = checkpoint.number("post_processor._pixel_threshold")
    if threshold is None:
        threshold = (low + high) / 2
    sensitivity = config.get("image_sensitivity", 0.5)
    if not isinstance(sensitivity, (int, float)) or not 0 < sensitivity <= 1:
        raise BadMeta(
            f"{checkpoint.path} has image_sensitivity {sensitivity}, with which anomalib calls no"
            " part anomalous: set it to more than 0 and at most 1, and save again."
        )
    return threshold, low, high, float(sensitivity)


# ---- images ----------------------------------------------------------------------------------


def _check_no_old_golden(request: Import) -> None:
    """Raise when golden images of another model would lie beside this one."""
    if request.images is None and (request.out_dir / GOLDEN).exists():
        raise BadDataset(
            f"{request.out_dir / GOLDEN} is of another model, and without --images it would stay:"
            " choose another --out_dir, or pass --images."
        )


def _read_pictures(
    request: Import, folder: Path, meta: Meta, progress: Progress
) -> tuple[Meta, NDArray[np.uint8]]:
    """meta.json with their bit depth, and the pictures (n, S, S, 3) of a folder."""
    paths = find_pictures(folder, progress)
    if not paths:
        raise BadDataset(f"{folder} holds no images: --images takes a folder of normal parts.")
    meta = meta.with_(bit_depth=request.bit_depth or bit_depth_of(paths, request.limits))
    images = Images(paths, meta, 4, progress, progress.phase("images"), limits=request.limits)
    images.most_broken = len(paths) // MOST_BROKEN
    batches = list(images)
    if not batches:
        raise BadDataset(f"No image in {folder} can be read.")
    return meta, np.concatenate(batches)


def _golden(pictures: NDArray[np.uint8], scores: NDArray[np.float32], meta: Meta) -> Golden:
    """Golden images, without those on the threshold, where rounding alone decides.

    anomalib's threshold is often some image's own score.
    """
    assert meta.image_threshold_auto is not None, "set before"
    clear = np.abs(scores - meta.image_threshold_auto) > FLOAT32_LIMIT * np.abs(scores)
    if not clear.any():
        raise BadDataset("Every image of --images scores exactly the threshold: choose others.")
    none = np.empty((0, *pictures.shape[1:]), np.uint8)
    return Golden.choose(pictures[clear], scores[clear], none, np.empty(0, np.float32))


# ---- for a person ----------------------------------------------------------------------------


def summarise_import(report: dict[str, Any], out_dir: Path) -> list[str]:
    """What was imported, and what is not the same as in anomalib."""
    meta, origin, golden = report["meta"], report["imported"], report["golden_images"]
    network = meta.get("model_size") or f"{meta['backbone']} {','.join(meta['layers'])}"
    found = report["calibration"]["method"] != "anomalib"
    by = "found on --images: the checkpoint has none" if found else "the checkpoint's own"
    hand = meta["image_threshold"]
    moved = "" if math.isclose(hand, 0.5) else f"; image_threshold {hand:g} by its sensitivity"
    proof = f"{golden} of the images" if golden else "none, so bf16 stays off: --images adds them"
    return [
        "",
        f"imported     {meta['model']}, {network}, {meta['image_size']} px,"
        f" from {origin['file']} (SHA-256 {origin['sha256'][:12]})",
        f"threshold    {meta['image_threshold_auto']:.4f} on the raw score ({by}{moved})",
        f"score range  {meta['raw_image_min']:.4f} to {meta['raw_image_max']:.4f}",
        f"golden       {proof}",
        *(f"note         {note}" for note in origin["notes"]),
        f"written to   {out_dir}",
    ]
