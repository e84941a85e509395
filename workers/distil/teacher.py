"""Make a teacher for EfficientAD: a small network that describes patches as a backbone does.

    python3 -m workers.distil --images data/train/bolt

As in the paper (arXiv:2303.14535, section 3.1): the backbone sees a picture at twice the size, its
features are averaged over 3 x 3 neighbours and normalised channel by channel, and the network, a
patch description network of 33 x 33 pixels, learns to give the same from the picture at its own
size. It takes images of any kind, without labels. Where there are few, each is seen in many ways:
other cuts, scales, turns and colours.
"""

from __future__ import annotations

import io
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engines import image
from engines.errors import BadMeta, BadRequest, BadWeights
from engines.files import write_atomically
from engines.image import DEFAULT_LIMITS, ImageLimits
from engines.meta import FIRST
from workers.distil.pictures import (
    Picture,
    cut_batches,
    find_pictures,
    held_out,
    random_cuts,
    read_pictures,
)
from workers.models.origin import origin_of, said
from workers.progress import Progress

if TYPE_CHECKING:  # torch is loaded when work begins: --help and Ctrl-C need not wait for it
    import torch
    from anomalib.models.components import TimmFeatureExtractor
    from torch import nn

STRIDES = (8, 16)  # pixels of the backbone's input between the features that are taken
MEASURED = 64  # cuts that tell mean and standard deviation of the features
WARM_UP = 0.05  # share of the steps


@dataclass(frozen=True)
class Distil:
    """What to distil: the flags of the command."""

    images: list[Path]
    out: Path = Path("teacher.pth")
    backbone: str = FIRST["backbone"]
    layers: list[str] | None = None  # None: those of `STRIDES`
    weights: str | None = None
    model_size: str = "small"
    image_size: int = 256
    steps: int = 2000
    batch: int = 16
    learning_rate: float = 1e-3
    limits: ImageLimits = DEFAULT_LIMITS  # of pictures


def distil(request: Distil, progress: Progress) -> dict[str, Any]:
    """Train a patch description network to say what a backbone says, and write it to `out`.

    The file is a state dict with anomalib's names, so anomalib loads it too.

    Returns:
        `losses` (mean squared error of the first and the last tenth of the steps, where 1 is that
        of a network that always says the mean), `explained` and `explained_learned` (1 - error, on
        pictures that were held out and on others), `weights` (where the backbone's came from).

    Raises:
        BadDataset: a folder is missing, or holds no picture that can be read.
        BadMeta, BadWeights: the backbone, its layers or its weights are not to be had.
        BadRequest: `out` cannot be written. In all cases it is as it was.
    """
    _check_out(request.out)
    paths = find_pictures(request.images)
    import torch

    from workers.models.efficientad import CHANNELS, new_teacher

    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = new_teacher(request.model_size)
        backbone = _Backbone.build(request, CHANNELS)
        weights = origin_of(request.weights, backbone.extractor.origin)
        progress.say(said(request.backbone, weights))
        found = read_pictures(paths, 4 * request.image_size, request.limits, progress)
        unlearned, learned = held_out(found)
        report = _fit(teacher, backbone, learned, unlearned, request, progress)
    progress.say(
        f"teacher explains {report['explained']:.0%} of what {request.backbone} tells apart in"
        f" pictures it did not learn ({report['explained_learned']:.0%} in those it did)"
    )
    buffer = io.BytesIO()
    torch.save(teacher.state_dict(), buffer)
    request.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(request.out, buffer.getvalue())
    return {"weights": weights, **report}


def _check_out(out: Path) -> None:
    """Refuse now what would fail after half an hour."""
    if out.suffix != ".pth":
        raise BadRequest(f"--out {out} must end in .pth.")
    if out.is_dir():
        raise BadRequest(f"--out {out} is a folder: name a file in it.")
    there = next(parent for parent in out.absolute().parents if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise BadRequest(f"--out {out} cannot be written: {there} does not allow it.")


# ---- what is imitated ------------------------------------------------------------------------


@dataclass
class _Backbone:
    """The features that are to be imitated."""

    extractor: TimmFeatureExtractor
    channels: int
    mean: torch.Tensor | float = 0.0  # (1, channels, 1, 1)
    std: torch.Tensor | float = 1.0

    @classmethod
    def build(cls, request: Distil, channels: int) -> _Backbone:
        from workers.models.backbone import extractor

        layers = request.layers or _middle_layers(request.backbone)
        try:
            return cls(extractor(request.backbone, layers, request.weights), channels)
        except BadWeights as error:  # whose sentence knows the flag of retrain.py
            raise BadWeights(str(error).replace("--pretrained_pth", "--weights")) from error

    def describe(self, cuts: torch.Tensor) -> torch.Tensor:
        """Pictures (N, 2S, 2S, 3) uint8 -> (N, channels, S/4 - 8, S/4 - 8), normalised.

        A patch of the teacher begins at every 4th pixel and is 33 wide, so the four outermost
        features of each side have no counterpart.
        """
        import torch
        from torch.nn import functional as F  # noqa: N812

        from workers.models.backbone import IMAGENET_MEAN, IMAGENET_STD

        mean, std = (torch.tensor(of)[:, None, None] for of in (IMAGENET_MEAN, IMAGENET_STD))
        grid = (math.ceil(cuts.shape[1] / 8), math.ceil(cuts.shape[2] / 8))
        with torch.inference_mode():
            pixels = (cuts.permute(0, 3, 1, 2).float() / 255 - mean) / std
            stages = [
                F.interpolate(F.avg_pool2d(stage.float(), 3, 1, 1), grid, mode="bilinear")
                for stage in self.extractor(pixels).values()
            ]
            features = torch.cat(stages, dim=1)[:, :, 4:-4, 4:-4]  # (N, C, h, w)
            n, channels, height, width = features.shape
            if channels != self.channels:  # as PatchCore brings them to a number
                rows = features.permute(0, 2, 3, 1).reshape(-1, 1, channels)
                rows = F.adaptive_avg_pool1d(rows, self.channels)
                features = rows.reshape(n, height, width, -1).permute(0, 3, 1, 2)
            return (features - self.mean) / self.std

    def measure(self, cuts: torch.Tensor) -> None:
        """Find mean and standard deviation of each channel over pictures (N, 2S, 2S, 3) uint8."""
        import torch

        found = torch.cat([self.describe(cut) for cut in torch.split(cuts, 4)])
        self.mean = found.mean(dim=(0, 2, 3), keepdim=True)
        self.std = found.std(dim=(0, 2, 3), keepdim=True).clamp_min(1e-6)


def _middle_layers(backbone: str) -> list[str]:
    """The stages with a feature every 8 and every 16 pixels, as the paper takes them."""
    import timm

    try:
        probe = timm.create_model(backbone, pretrained=False, features_only=True)
        found = {info["reduction"]: info["module"] for info in probe.feature_info.info}
        return [found[stride] for stride in STRIDES if stride in found] or list(found.values())[-1:]
    except (RuntimeError, AttributeError, TypeError, KeyError) as error:
        raise BadMeta(
            f"timm cannot say which stages {backbone} has ({error}): check the name, or name its"
            " stages with --layers."
        ) from error


# ---- learning --------------------------------------------------------------------------------


def _fit(
    teacher: nn.Module,
    backbone: _Backbone,
    learned: list[Picture],
    unlearned: list[Picture],
    request: Distil,
    progress: Progress,
) -> dict[str, Any]:
    """Train for `steps` steps: Adam, a short warm-up, then down along a cosine."""
    import torch

    from engines.runtimes.openvino import cpu_has_bf16

    half = cpu_has_bf16()
    backbone.extractor.to(memory_format=torch.channels_last)
    teacher.to(memory_format=torch.channels_last).train()
    size, steps = request.image_size, request.steps
    dice = np.random.default_rng(0)
    some = min(MEASURED, 4 * len(learned))
    backbone.measure(torch.from_numpy(np.stack(list(random_cuts(learned, size, some, dice)))))
    optimizer = torch.optim.Adam(teacher.parameters(), lr=request.learning_rate, weight_decay=1e-5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    losses: list[float] = []
    tick = progress.phase("distil")
    with torch.enable_grad():
        for batch in cut_batches(learned, size, request.batch, steps, dice):
            cuts = torch.from_numpy(batch)
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                taught = backbone.describe(cuts).clone()
                said = teacher(_own_size(cuts))
            loss = (said.float() - taught).square().mean()
            if not math.isfinite(loss.item()):
                raise BadRequest("The training ran away: try a lower --learning_rate.")
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            tick(len(losses), steps)
            if len(losses) % max(1, steps // 10) == 0:
                recent = float(np.mean(losses[-max(1, steps // 10) :]))
                progress.say(f"step {len(losses)} of {steps}: error {recent:.3f}")
    teacher.eval()
    tenth = max(1, steps // 10)
    return {
        "losses": [float(np.mean(losses[:tenth])), float(np.mean(losses[-tenth:]))],
        "explained": _explained(teacher, backbone, unlearned, size),
        "explained_learned": _explained(teacher, backbone, learned[: len(unlearned)], size),
    }


def _rate(step: int, steps: int) -> float:
    """The learning rate of a step, as a share of the highest."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 + 0.5 * math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))


def _own_size(cuts: torch.Tensor) -> torch.Tensor:
    """(N, 2S, 2S, 3) uint8 -> RGB in [0, 1] (N, 3, S, S): each pixel the mean of four."""
    import torch
    from torch.nn import functional as F  # noqa: N812

    halved = F.avg_pool2d(cuts.permute(0, 3, 1, 2).float(), 2) / 255
    return halved.contiguous(memory_format=torch.channels_last)


def _explained(
    teacher: nn.Module, backbone: _Backbone, pictures: list[Picture], size: int
) -> float:
    """1 - the mean squared error over the variance, on whole pictures."""
    import torch

    errors, variances = [], []
    with torch.inference_mode():
        for picture in pictures:
            cut = torch.from_numpy(image.resize(picture, 2 * size)[None])
            taught = backbone.describe(cut)
            errors.append(float((teacher(_own_size(cut)) - taught).square().mean()))
            variances.append(float(taught.square().mean()))
    return 1 - sum(errors) / max(sum(variances), 1e-12)
