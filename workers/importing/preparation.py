"""How anomalib prepared the images of a checkpoint, and whether Kensa prepares them so, too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from engines.errors import BadWeights
from engines.meta import Kind
from workers.importing.checkpoint import Checkpoint
from workers.models.backbone import IMAGENET_MEAN, IMAGENET_STD

DEFAULT_SIZE = 256  # pixels: anomalib's own pre-processor of all three kinds
_RESIZE_NOTE = (
    "anomalib resizes ({}) otherwise than Kensa (area): scores of the same pixels are equal, those"
    " of files of another size differ a little"
)


def preparation(checkpoint: Checkpoint, kind: Kind) -> tuple[int | None, list[str]]:
    """The side that images are resized to, None where it is not said; and notes.

    Raises:
        BadWeights: anomalib prepared the images in a way that Kensa does not.
    """
    config = checkpoint.content.get("anomalib_pre_processor_config")
    spec = config.get("transform") if isinstance(config, dict) else None
    normalises = kind != "efficientad"  # which does so inside its networks
    usual = "resized to a square" + " and normalised as for ImageNet" * normalises
    if not checkpoint.has("pre_processor"):
        if normalises:
            raise BadWeights(
                f"{checkpoint.path} was trained with pre_processor=False, so anomalib did not"
                " normalise its images; Kensa does, and would score otherwise."
            )
        return None, ["no pre-processor in the checkpoint: images are taken as resized only"]
    if spec is None:
        if checkpoint.said.get("pre_processor") is True:  # older than 2.7: its default
            return DEFAULT_SIZE, [_RESIZE_NOTE.format("bilinear")]
        note = f"the checkpoint does not say how images are prepared: taken as {usual}"
        return None, [note, _RESIZE_NOTE.format("its own way")]
    size: int | None = None
    interpolation, normalised = "its own way", False
    for name, args in _transforms(spec):
        if name == "Resize" and (side := _square(args.get("size"))) is not None:
            size, interpolation = side, str(args.get("interpolation", "bilinear"))
        elif name == "Normalize" and normalises and _is_imagenet(args):
            normalised = True
        else:
            what = ", ".join(f"{key}={args[key]}" for key in ("size", "mean", "std") if key in args)
            raise BadWeights(
                f"{checkpoint.path} prepares images with {name}({what}), and Kensa only with"
                f" {usual}: it would score otherwise. Train it in anomalib with its default"
                " pre-processor."
            )
    if normalises and not normalised:
        raise BadWeights(
            f"{checkpoint.path} does not normalise its images; Kensa does, and would score"
            " otherwise. Train it in anomalib with its default pre-processor."
        )
    return size, [_RESIZE_NOTE.format(interpolation)]


def _transforms(spec: Any) -> list[tuple[str, dict[str, Any]]]:
    """The transforms of a pre-processor one after the other, as names and arguments."""
    if not isinstance(spec, dict):
        return [("something unknown", {})]
    name, args = str(spec.get("class_path")).rpartition(".")[2], spec.get("init_args")
    args = args if isinstance(args, dict) else {}
    inner = args.get("transforms")
    if name == "Compose" and isinstance(inner, list):
        return [one for part in inner for one in _transforms(part)]
    return [(name, args)]


def _square(size: Any) -> int | None:
    """S of a size [S, S]. An [S] alone is only the shorter side."""
    if isinstance(size, (list, tuple)) and len(size) == 2 and size[0] == size[1]:
        return size[0] if isinstance(size[0], int) else None
    return None


def _is_imagenet(args: dict[str, Any]) -> bool:
    def near(found: Any, expected: Sequence[float]) -> bool:
        try:
            return np.shape(found) == (3,) and bool(np.allclose(found, expected, atol=1e-4))
        except (TypeError, ValueError):
            return False

    return near(args.get("mean"), IMAGENET_MEAN) and near(args.get("std"), IMAGENET_STD)
