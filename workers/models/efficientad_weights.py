"""Weights for EfficientAD: a model.pth, a checkpoint of anomalib, or a teacher alone."""

from __future__ import annotations

from pathlib import Path

import torch
from anomalib.models.image.efficient_ad.torch_model import EfficientAdModel
from anomalib.utils.path import get_pretrained_weights_dir
from torch import nn

from engines.errors import BadWeights
from workers.models.backbone import UNTRAINED

State = dict[str, torch.Tensor]

_PREFIXES = ("model.", "module.", "")  # of names: Lightning's, DataParallel's, none


def cached_teacher(size: str) -> Path:
    """Where anomalib keeps the teacher that it downloads. Kensa downloads nothing itself."""
    name = f"pretrained_teacher_{size}.pth"
    path: Path = get_pretrained_weights_dir() / "efficientad_pretrained_weights" / name
    if not path.is_file():
        raise BadWeights(
            f"No teacher: {path} does not exist. Make one from pictures of good parts (python3 -m"
            ' workers.distil --images DIR; over HTTP POST /teacher {"category": "..."}), or take'
            f" {name} of anomalib's release, and pass it with --pretrained_pth."
            f" --pretrained_pth {UNTRAINED} takes a random one."
        )
    return path


def copy_weights(networks: EfficientAdModel, weights: State, path: Path, size: str) -> bool:
    """Copy a whole model, or a teacher alone; whether its student has learned anything.

    Raises:
        BadWeights: they are of something else or of the other size, or are not finite.
    """
    found = _without_prefix(weights, "teacher.conv1.weight")
    if any(name.startswith("student.") for name in found):
        _copy(networks, found, path, size)
        learned = bool(networks.is_set(networks.mean_std))
        if learned and not networks.is_set(networks.quantiles):
            for key in ("qb_st", "qb_ae"):  # saved before a validation: anomalib's maps are raw
                networks.quantiles[key].data.fill_(0.1)
        return learned
    teacher = {name.removeprefix("teacher."): tensor for name, tensor in found.items()}
    _copy(networks.teacher, _without_prefix(teacher, "conv1.weight"), path, size)
    return False


def _without_prefix(weights: State, landmark: str) -> State:
    """The weights without what stands before the name that every such file has."""
    prefix = next((prefix for prefix in _PREFIXES if prefix + landmark in weights), "")
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in weights.items()
        if name.startswith(prefix)
    }


def _copy(module: nn.Module, weights: State, path: Path, size: str) -> None:
    chosen = {}
    for name, target in module.state_dict().items():
        tensor = weights.get(name)
        if tensor is None:
            raise BadWeights(
                f"{path} does not fit: it has no {name}. EfficientAD takes its own model.pth, an"
                " anomalib checkpoint of EfficientAd, or a teacher (a patch description network)."
            )
        if tensor.shape != target.shape:
            raise BadWeights(
                f"{path} does not fit model_size {size}: {name} is {tuple(tensor.shape)}, and"
                f" {tuple(target.shape)} is needed. Is it of the other size?"
            )
        if not torch.isfinite(tensor).all():
            raise BadWeights(f"{path}: {name} holds values that are not finite.")
        chosen[name] = tensor.to(target.dtype)
    module.load_state_dict(chosen)
