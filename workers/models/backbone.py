"""A timm backbone as a feature extractor, and the weights that go into it."""

from __future__ import annotations

import io
import math
import pickle
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import huggingface_hub
import numpy as np
import timm
import torch
from anomalib.models.components import TimmFeatureExtractor
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from engines.errors import BadMeta, BadWeights
from engines.files import write_atomically
from engines.meta import Meta

HUB_TIMEOUT_S = 3.0
FIELDS = 8  # on each side, of what describes a picture
UNTRAINED = "untrained"  # asked for by this name, never by accident
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of RGB in [0, 1]; what anomalib uses for every backbone
IMAGENET_STD = (0.229, 0.224, 0.225)

# What checkpoints put before the backbone's own names: anomalib's Lightning modules and torch
# models, torch's DataParallel, and common wrappers. The empty one is a bare backbone.
_PREFIXES = (
    "model.feature_extractor.feature_extractor.",
    "feature_extractor.feature_extractor.",
    "feature_extractor.",
    "backbone.",
    "module.",
    "model.",
    "",
)

# Where the objects come from that Lightning checkpoints carry beside their weights. None of them is
# ever made: each name gets `_LeftOut` in its place.
_LEFT_OUT = (
    "anomalib.",
    "lightning.",
    "omegaconf.",
    "pathlib.",
    "pytorch_lightning.",
    "torch.nn.modules.",
    "torchmetrics.",
    "torchvision.",
)


class Normalise(nn.Module):
    """Images (N, S, S, 3) uint8 RGB -> (N, 3, S, S) float32 as ImageNet backbones expect them."""

    def __init__(self) -> None:
        super().__init__()
        self.mean: torch.Tensor
        self.std: torch.Tensor
        self.register_buffer("mean", 255 * torch.tensor(IMAGENET_MEAN)[:, None, None])
        self.register_buffer("std", 255 * torch.tensor(IMAGENET_STD)[:, None, None])

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        # float() first: TensorRT takes uint8 as an input, and only a cast may follow it.
        return (image.float().permute(0, 3, 1, 2) - self.mean) / self.std


def extractor(backbone: str, layers: list[str], weights: str | Path | None) -> TimmFeatureExtractor:
    """Build a frozen feature extractor: images (N, 3, S, S) -> {layer: (N, C, h, w)}.

    Args:
        backbone: any name that timm knows.
        layers: names of its stages, as timm lists them (`layer2`, `blocks.3`).
        weights: a file (see `read_weights`), "untrained" for random weights by a fixed seed, or
            None for timm's own pretrained ones from its cache or the hub.

    Raises:
        BadMeta: timm does not know the backbone or the layers.
        BadWeights: the weights are not to be had or do not fit.
    """
    with torch.random.fork_rng():
        _check_layers(backbone, layers)
        torch.manual_seed(0)
        module: TimmFeatureExtractor = _create(backbone, layers, pretrained=weights is None)
    if hasattr(module.feature_extractor, "reset_classifier"):
        module.feature_extractor.reset_classifier(0)  # a whole ViT stands there: drop its head
    if weights is not None and str(weights) != UNTRAINED:
        load_weights(module.feature_extractor, read_weights(Path(weights)), str(weights), backbone)
    module.eval().requires_grad_(False)
    return module


def describe(embeddings: torch.Tensor) -> NDArray[np.float32]:
    """What pictures look like, coarsely: embeddings (N, P, C) averaged over fields, (N, d)."""
    n, patches, channels = embeddings.shape
    side = math.isqrt(patches)  # images are square
    maps = embeddings.permute(0, 2, 1).reshape(n, channels, side, side)
    fields = functional.adaptive_avg_pool2d(maps, min(side, FIELDS))
    return fields.flatten(1).numpy()


@torch.inference_mode()
def describe_pictures(
    embed: Callable[[torch.Tensor], tuple[torch.Tensor, tuple[int, int]]],
    pictures: NDArray[np.uint8],
) -> NDArray[np.float32]:
    """`describe` of pictures (n, S, S, 3), n at least 1; one by one: a batch takes memory."""
    return np.concatenate([describe(embed(torch.from_numpy(one[None]))[0]) for one in pictures])


def _check_layers(backbone: str, layers: list[str]) -> None:
    """Raise BadMeta in words that help; anomalib would drop a layer that it does not find."""
    if not timm.is_model(backbone):
        near = timm.list_models(f"*{backbone.split('_')[0][:6]}*")[:5]
        hint = f" Did you mean {', '.join(near)}?" if near else ""
        raise BadMeta(f"timm has no backbone named {backbone!r}.{hint}")
    known = _blocks(backbone) if "vit" in backbone.lower() else _stages(backbone)
    unknown = [layer for layer in layers if layer not in known]
    if unknown:
        raise BadMeta(f"{backbone} has no layer {', '.join(unknown)}: it has {', '.join(known)}.")


def feature_info(backbone: str) -> list[dict[str, Any]]:
    """What timm says of the stages of a backbone: `module`, `num_chs`, `reduction`.

    Raises:
        BadMeta: timm cuts no features out of it.
    """
    try:
        probe = timm.create_model(backbone, pretrained=False, features_only=True, exportable=True)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise BadMeta(f"timm cuts no features out of {backbone}: {error}.") from error
    found: list[dict[str, Any]] = probe.feature_info.info
    return found


def _stages(backbone: str) -> list[str]:
    return [info["module"] for info in feature_info(backbone)]


def _blocks(backbone: str) -> list[str]:
    """Layers of what anomalib takes for a plain vision transformer: all with `vit` in the name."""
    probe = timm.create_model(backbone, pretrained=False)
    if not hasattr(getattr(probe, "patch_embed", None), "patch_size") or not hasattr(
        probe, "blocks"
    ):
        raise BadMeta(
            f"anomalib reads every backbone with 'vit' in its name as a plain vision transformer,"
            f" and {backbone} is none: choose another, such as mobilenetv2_100."
        )
    return [f"blocks.{index}" for index in range(len(probe.blocks))]


def _create(backbone: str, layers: list[str], *, pretrained: bool) -> TimmFeatureExtractor:
    offline = huggingface_hub.constants.HF_HUB_OFFLINE
    try:
        if pretrained and not _hub_answers():
            huggingface_hub.constants.HF_HUB_OFFLINE = True  # its cache only
        return TimmFeatureExtractor(backbone=backbone, layers=layers, pre_trained=pretrained)
    except (OSError, RuntimeError, ValueError) as error:
        # The hub's client raises OSError for no network and for a cache without the file,
        # timm RuntimeError for a backbone that was published without weights.
        if not pretrained:
            raise BadMeta(f"timm cannot build {backbone} with layers {layers}: {error}.") from error
        raise BadWeights(
            f"No pretrained weights for {backbone}: they are not in timm's cache and the hub cannot"
            " be reached. Pass a file with --pretrained_pth (.pth or .safetensors with timm or"
            f" torchvision names), or --pretrained_pth {UNTRAINED} to do without."
        ) from error
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = offline


def _hub_answers() -> bool:
    """Whether asking the hub makes sense; its client would retry for most of a minute."""
    if getproxies():
        return True  # the proxy knows
    host = urlsplit(huggingface_hub.constants.ENDPOINT).hostname or ""
    try:
        socket.create_connection((host, 443), timeout=HUB_TIMEOUT_S).close()
    except OSError:
        return False
    return True


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a .safetensors, a state dict, a Lightning checkpoint or our model.pth.

    Raises:
        BadWeights: it is missing, damaged, or holds objects that would run code when loaded.
    """
    if not path.is_file():
        raise BadWeights(f"{path} does not exist: --pretrained_pth takes a file of weights.")
    try:
        content = load_inert(path)
    except BadWeights:
        raise
    except Exception as error:  # torch.load lets any unpickling error through
        raise BadWeights(
            f"{path} is damaged, or is not a file of weights"
            f" ({(str(error) or type(error).__name__).splitlines()[0]})."
        ) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise BadWeights(f"{path} holds no weights.")
    return tensors


def write_weights(path: Path, meta: Meta, state: dict[str, torch.Tensor]) -> None:
    """Write a model.pth that `read_weights` reads, with what it belongs to."""
    buffer = io.BytesIO()  # torch's own file writer turns a full disk into a RuntimeError
    about = meta.model_dump(include={"model", "backbone", "layers"}, exclude_none=True)
    torch.save({**about, "state_dict": state}, buffer)
    write_atomically(path, buffer.getvalue())


def load_inert(path: Path) -> Any:
    """What a file of weights holds; objects that are no tensors are left out, and never made."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        foreign = _foreign_names(path)
    unknown = [name for name in foreign if not name.startswith(_LEFT_OUT)]
    if unknown or not foreign:
        raise BadWeights(
            f"{path} is not loaded: it holds more than weights"
            f" ({', '.join(unknown[:3]) or 'unreadable data'}), which could run code."
            " Save the model's state_dict() alone, or use .safetensors."
        )
    with torch.serialization.safe_globals([(_LeftOut, name) for name in foreign]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _foreign_names(path: Path) -> list[str]:
    """Classes and functions that a checkpoint wants, besides those of tensors; runs nothing."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except ValueError:  # not a zip: written by a torch older than 1.6
        return []


class _LeftOut:
    """Stands in a Lightning checkpoint where its hyper-parameters hold objects; does nothing."""

    def __new__(cls, *_args: Any) -> _LeftOut:
        return super().__new__(cls)

    def __setstate__(self, _state: Any) -> None:
        pass


def load_weights(
    module: nn.Module, weights: dict[str, torch.Tensor], source: str, backbone: str
) -> None:
    """Copy the weights that a backbone needs; what it does not need (a classifier) is left.

    timm joins the names of some stages with `_` when it cuts features out, so names are compared
    with `.` and `_` made equal.

    Raises:
        BadWeights: a tensor is missing, has another shape, or is not finite.
    """
    wanted = {k: v for k, v in module.state_dict().items() if "num_batches_tracked" not in k}
    found = max((_without(prefix, weights) for prefix in _PREFIXES), key=lambda w: _fit(wanted, w))
    chosen = {}
    for name, target in wanted.items():
        tensor = found.get(name.replace(".", "_"))
        if tensor is None:
            raise BadWeights(f"{source} does not fit {backbone}: it has no {name}.")
        if tensor.shape != target.shape:
            raise BadWeights(
                f"{source} does not fit {backbone}: {name} is {tuple(tensor.shape)},"
                f" and {tuple(target.shape)} is needed."
            )
        if not torch.isfinite(tensor).all():
            raise BadWeights(f"{source}: {name} holds values that are not finite.")
        chosen[name] = tensor.to(target.dtype)
    module.load_state_dict(chosen, strict=False)


def _without(prefix: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix(prefix).replace(".", "_"): tensor
        for name, tensor in weights.items()
        if name.startswith(prefix)
    }


def _fit(wanted: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> int:
    return sum(name.replace(".", "_") in found for name in wanted)
