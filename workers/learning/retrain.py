"""Learn from normal images: from nothing, or on top of what a model knows already."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.errors import BadMeta
from engines.files import sha256, staged
from engines.machine import memory, memory_needs
from engines.meta import Meta
from engines.store.bundle import REPORT, check_hash, write_report
from engines.store.golden import Golden
from workers import models
from workers.learning.calibrate import Calibration, calibrate
from workers.learning.dataset import Category, Images, measure_bit_depth
from workers.progress import Progress

HELD_OUT = 0.2  # share of the training images that find the threshold where there are no others


@dataclass(frozen=True)
class Retrain:
    """What to learn: the flags of retrain.py."""

    model: str
    category: str
    data_root: Path
    out_dir: Path
    meta_json: Path
    pretrained_pth: str | None = None
    load_bank: Path | None = None
    load_stats: Path | None = None
    epochs: int = 1
    batch: int = 4
    penalty_dir: Path | None = None


def retrain(request: Retrain, progress: Progress) -> dict[str, Any]:
    """Learn, verify, calibrate, and write the files of the model into `out_dir`.

    Returns:
        The report, as report.json holds it.

    Raises:
        KensaError: the flags, the files or the images do not allow it. `out_dir` is as it was.
    """
    started = time.perf_counter()
    meta = Meta.read(request.meta_json)
    if meta.model != request.model:
        raise BadMeta(
            f"{request.meta_json} describes a {meta.model} model, but --model says {request.model}."
        )
    kind = models.module(meta.model)
    learned_before = request.load_bank or request.load_stats
    if learned_before is not None:
        _check_origin(learned_before, meta, kind, request.meta_json)
    category = Category.find(request.data_root, request.category)
    if meta.bit_depth is None:
        meta = meta.with_(bit_depth=measure_bit_depth(category.train))
    if short := memory.warning(memory_needs.to_learn(_learning(request, meta, category))):
        progress.say(short)
    model = kind.build(meta, request.pretrained_pth)
    if learned_before is not None:
        kind.load(model, learned_before)
    known = kind.summary(model) if kind.knows(model) else None
    loaded = time.perf_counter()
    learned = _learn(request, meta, kind, model, category, progress)
    meta = learned.calibration.write_to(meta).with_(score_kind=kind.SCORE_KIND)
    report = {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": meta.model,
        "category": request.category,
        "images": {"learned": len(learned.images), "skipped": learned.broken},
        **({"before": known} if known else {}),
        **kind.summary(model),
        "calibration": learned.calibration.record(),
        "seconds": {
            "load": round(loaded - started, 2),
            "learn": round(learned.seconds, 2),
            "verify": round(time.perf_counter() - loaded - learned.seconds, 2),
        },
    }
    _write(request.out_dir, meta, kind, model, learned.golden, report)
    return report


def _learning(request: Retrain, meta: Meta, category: Category) -> memory_needs.Learning:
    """What is to be done, as far as memory goes."""
    known = request.load_bank or request.load_stats
    return memory_needs.Learning(
        meta,
        len(category.train),
        len(category.test_normal) + len(category.test_anomaly),
        request.batch,
        memory_needs.size(known) if known is not None else 0,
    )


@dataclass(frozen=True)
class _Learned:
    calibration: Calibration
    golden: Golden
    images: list[Path]
    broken: dict[str, str]
    seconds: float  # spent on learning alone


def _learn(
    request: Retrain, meta: Meta, kind: Any, model: Any, category: Category, progress: Progress
) -> _Learned:
    """Train or update, and calibrate on images that the model has not learned at that time."""
    seconds = 0.0
    read: list[Images] = []
    training = models.Training(request.epochs, request.batch, request.penalty_dir)

    def images(paths: list[Path], phase: str) -> Images:
        found = Images(paths, meta.image_size, request.batch, meta.bit_depth, progress)
        found.tick = progress.phase(phase)
        read.append(found)
        return found

    learned_images: set[Path] = set()

    def learn(how: Any, paths: list[Path]) -> None:
        nonlocal seconds
        began = time.perf_counter()
        how(model, meta, images(paths, "images"), training, progress)
        seconds += time.perf_counter() - began
        learned_images.update(read[-1].used)

    def verify(paths: list[Path]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        pictures = _stack(images(paths, "verify"), meta.image_size)
        return pictures, kind.scores(model, [pictures])

    held = [] if len(category.test_normal) >= 2 else _held_out(category.train)
    kept = None
    if kind.INCREMENTAL and kind.knows(model) and len(category.test_normal) + len(held) < 2:
        # A few new normals are no ground for a new threshold, and other scores stay as they were.
        kept = Calibration.kept(meta)
        held = [] if kept else held
    first = [path for path in category.train if path not in held]
    learn(kind.update if kind.knows(model) else kind.train, first)
    normal, normal_scores = verify([*category.test_normal, *held])
    defective, defective_scores = verify(category.test_anomaly)
    calibration = kept or calibrate(normal_scores, defective_scores)
    golden = Golden.choose(normal, normal_scores, defective, defective_scores)
    if kept is not None:
        golden = _golden_before(request, meta) or golden
    if held and kind.INCREMENTAL:
        learn(kind.update, held)
    return _Learned(
        calibration,
        golden,
        sorted(learned_images),
        {str(path): why for source in read for path, why in source.broken.items()},
        seconds,
    )


def _golden_before(request: Retrain, meta: Meta) -> Golden | None:
    """The golden images that lie beside what is updated."""
    learned = request.load_bank or request.load_stats
    return None if learned is None else Golden.read(learned.parent, meta.image_size)


def _held_out(train: list[Path]) -> list[Path]:
    """A fifth of the training images, at least 4 and at most half, spread over the list."""
    count = min(max(4, math.ceil(len(train) * HELD_OUT)), len(train) // 2)
    return train[:: math.ceil(len(train) / count)][:count] if count else []


def _stack(images: Images, size: int) -> NDArray[np.uint8]:
    batches = list(images)
    return np.concatenate(batches) if batches else np.empty((0, size, size, 3), np.uint8)


def _check_origin(learned: Path, meta: Meta, kind: Any, meta_json: Path) -> None:
    """Raise unless a bank or statistics beside meta.json are those that it was written with."""
    name = getattr(meta, kind.LEARNED or "", None)
    if name is None:
        raise BadMeta(f"{learned} cannot be loaded: a {meta.model} model keeps all in its weights.")
    if meta.files and name in meta.files:
        beside = meta_json.parent / name
        if learned.resolve() == beside.resolve():
            check_hash(beside, meta.files[name])


def _write(
    out_dir: Path, meta: Meta, kind: Any, model: Any, golden: Golden, report: dict[str, Any]
) -> None:
    with staged(out_dir) as folder:
        write_report(folder, report)
        names = [*kind.save(model, meta, folder), REPORT]
        if len(golden.images):
            names.append(golden.write(folder))
        hashes = {name: sha256(folder / name) for name in names}
        meta.with_(files=hashes).write(folder / "meta.json")
