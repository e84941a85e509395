"""Graphs of every kind as the exporter writes them, from weights that have learned nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engines.meta import Meta
from engines.store.plan_record import Precision
from workers import models
from workers.converting.export import Opset, export_onnx
from workers.converting.quantise import quantise
from workers.models import Training
from workers.models.backbone import UNTRAINED
from workers.models.patchcore import Bank
from workers.progress import Progress

ROWS = 500  # of a memory bank
LAYERS: dict[str, list[str]] = {
    "resnet18": ["layer1", "layer2", "layer3"],
    "wide_resnet50_2": ["layer1", "layer2", "layer3"],
    "tf_efficientnet_lite0": ["blocks.1", "blocks.2", "blocks.4"],
}
OWN: dict[str, dict[str, Any]] = {
    "patchcore": {"coreset_ratio": 0.1, "memory_bank": "memory_bank.npz"},
    "padim": {"n_features": 100, "stats": "stats.npz"},
    "efficientad": {"model_size": "small"},
    "vae": {"latent_dim": 64},
}


@dataclass(frozen=True)
class Kind:
    """A graph that the exporter offers."""

    model: str
    backbone: str | None
    opset: Opset
    precision: Precision
    side: int = 256

    def __str__(self) -> str:
        words = [self.model, self.backbone, self.precision, str(self.opset)]
        return "-".join(word for word in words if word)

    @property
    def meta(self) -> Meta:
        known = {"model": self.model, "image_size": self.side, **OWN[self.model]}
        if self.backbone is not None:
            layers = LAYERS[self.backbone]  # PatchCore's are usually without the first
            known |= {
                "backbone": self.backbone,
                "layers": layers[1:] if self.model == "patchcore" else layers,
            }
        return Meta.parse(known)


def write(kind: Kind, path: Path) -> int:
    """Write the graph; returns the rows of its memory bank, 0 where it has none."""
    bank = None
    pictures = np.random.default_rng(3).integers(0, 255, (4, kind.side, kind.side, 3), np.uint8)
    module = models.module(kind.model)
    model = module.build(kind.meta, UNTRAINED)
    if kind.model == "patchcore":
        bank = _bank(model, pictures)
        model.bank = Bank(torch.from_numpy(bank), 1.0)
    elif kind.model == "padim":
        module.train(model, kind.meta, [pictures], Training(), Progress(quiet=True))
    model.learned = True
    graph, inputs = module.graph(model, half=kind.precision == "f16")
    export_onnx(graph, inputs, path, kind.opset)
    if kind.precision == "int8":
        quantise(path, pictures[:2], bank, lambda done, total: None)
    return 0 if bank is None else len(bank)


def _bank(model: Any, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
    with torch.inference_mode():
        patches = model.embed(torch.from_numpy(pictures))[0].flatten(0, 1)
    found: NDArray[np.float32] = patches[:ROWS].numpy().copy()
    return found
