"""What `benchmarks.peers` compares with: one training, in the forms that each contestant takes."""

from __future__ import annotations

import sys
from itertools import cycle
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from benchmarks.common import (
    BACKBONE,
    LAYERS,
    SIDE,
    Subject,
    embeddings,
    find_subject,
    phase,
    pictures,
)

PADIM = {"model": "padim", "backbone": BACKBONE, "layers": ["layer1", "layer2", "layer3"],
         "n_features": 100, "image_size": SIDE, "bit_depth": 8}  # fmt: skip
PHOTO_SIDE, PHOTO_BYTES = 1024, 90_000  # of the JPEGs that servers get
PHOTOS = 16


def learn(folder: Path, rows: int) -> str:
    """Models and pictures in `folder`, see `benchmarks.peer`; returns what they are.

    Args:
        rows: of PatchCore's memory bank.
    """
    subject = find_subject(folder)
    with phase("learning"):
        train = pictures(subject.category.train)
        patchcore = _patchcore(subject, train, rows)
        gaussian, padim = _padim(subject, train)
        state = {name: one.numpy() for name, one in patchcore.features.state_dict().items()}
        np.savez(folder / "backbone.npz", **state)
        np.save(folder / "bank.npy", patchcore.bank.embeddings.numpy())
        np.save(folder / "channels.npy", padim.index.numpy())
        np.save(folder / "train.npy", train)
    with phase("calibrating and exporting with convtrt.py's code"):
        _export(folder / "patchcore", subject, subject.meta, patchcore)
        _export(folder / "padim", subject, gaussian, padim)
    pairs = zip(cycle(subject.category.test_normal), subject.category.test_anomaly, strict=False)
    files = [file for pair in pairs for file in pair]
    np.save(folder / "pictures.npy", pictures(files))
    (folder / "photos").mkdir()
    for number, file in enumerate(files[:PHOTOS]):
        (folder / "photos" / f"{number:02}.jpg").write_bytes(photo(file))
    return (
        f"{subject.words}, {SIDE} px; PatchCore: {BACKBONE} {'+'.join(LAYERS)}, a bank of {rows:,}"
        f" rows; PaDiM: {BACKBONE}, {PADIM['n_features']} channels"
    )


def _patchcore(subject: Subject, train: Any, rows: int) -> Any:
    """A bank of random patches: a coreset would take minutes, and changes no latency."""
    import torch

    from workers.models import patchcore

    model = patchcore.build(subject.meta, subject.weights)
    patches = embeddings(model, train)
    if rows > len(patches):
        sys.exit(f"--bank {rows} is more than the {len(patches)} patches of these pictures.")
    order = torch.randperm(len(patches), generator=torch.Generator().manual_seed(0))
    model.bank = patchcore.Bank(patches[order[:rows]].clone(), 0.0)
    return model


def _padim(subject: Subject, train: Any) -> tuple[Any, Any]:
    from workers.models import Training, padim
    from workers.progress import Progress

    meta = type(subject.meta).model_validate(PADIM)
    model = padim.build(meta, subject.weights)
    batches = np.array_split(train, max(1, len(train) // 4))
    padim.train(model, meta, batches, Training(), Progress(quiet=True))
    return meta, model


def photo(file: Path) -> bytes:
    """A picture as a camera sends it: a JPEG of 1024 x 1024 and at most 90 KB."""
    from engines.image import decode

    size = (PHOTO_SIDE, PHOTO_SIDE)
    rgb = cv2.resize(decode(file.read_bytes()), size, interpolation=cv2.INTER_CUBIC)
    for quality in range(98, 20, -2):
        large = cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR)
        data = cv2.imencode(".jpg", large, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
        if len(data) <= PHOTO_BYTES:
            break
    return data


def _export(folder: Path, subject: Subject, meta: Any, model: Any) -> None:
    """As retrain.py and convtrt.py do, with what is learned at hand."""
    from engines.store.golden import Golden
    from engines.store.known_scores import KnownScores
    from workers.converting.convert import Convert, convert
    from workers.learning.calibrate import Budget, calibrate
    from workers.models import module
    from workers.progress import Progress

    kind = module(meta.model)
    normal = pictures(subject.category.test_normal)
    defective = pictures(subject.category.test_anomaly)
    scores = [kind.scores(model, [group]) for group in (normal, defective)]
    folder.mkdir()
    known = KnownScores(scores[0].astype(np.float64), np.arange(len(normal)))
    meta = calibrate(known, scores[1], Budget(), "test").write_to(meta)
    meta = meta.with_(score_kind=kind.SCORE_KIND)
    weights, learned = kind.save(model, meta, folder)
    meta.write(folder / "meta.json")
    Golden.choose(normal, scores[0], defective, scores[1]).write(folder)
    learns = {kind.LEARNED: folder / learned}  # memory_bank or stats
    convert(
        Convert(meta.model, folder / weights, folder / "meta.json", folder / "engine", **learns),
        Progress(quiet=True),
    )
