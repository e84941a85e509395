"""EfficientAD (arXiv:2303.14535): a student imitates a teacher, but only on normal parts.

Where the student fails to say what the teacher says, the part is strange: a wrong texture. Where
it fails to say what an autoencoder says, which sees the whole part at once: a wrong arrangement.
The networks are anomalib's.
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from anomalib.models.image.efficient_ad.torch_model import EfficientAdModel, EfficientAdModelSize
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F  # noqa: N812

from engines.errors import BadDataset, BadMeta
from engines.files import sha256, write_atomically
from engines.meta import Meta
from engines.runtimes.openvino import cpu_has_bf16
from workers.models import Training, that_count
from workers.models.backbone import UNTRAINED, read_weights
from workers.models.efficientad_penalty_images import penalty_images
from workers.models.efficientad_weights import cached_teacher, copy_weights
from workers.models.origin import Origin
from workers.progress import Progress

Batches = Iterable[NDArray[np.uint8]]

SCORE_KIND = "efficientad/combined-map"  # the largest value of anomalib's anomaly_map
LEARNED = None  # model.pth is all there is
INCREMENTAL = False
USUAL_SCALE = 0.05  # of new normal parts: at least; see `hold_some_out`

CHANNELS = 384  # of what the teacher says of a patch
SMALLEST_PX = 256  # the encoder halves five times, and then takes 8 x 8
LEARNING_RATE = 1e-4
WEIGHT_DECAY = 1e-5
DECAY_AT = 0.95  # as anomalib's schedule
HARD = 0.999  # the quantile above which differences from the teacher count in the loss
HELD_OUT = 10  # one in ten normals finds the quantiles and the best moment
LEAST_SPREAD = 1.1  # what is rare in a map is at least so many times what is usual
MOST_CHECKS = 20  # validations of one training
MOST_LINES = 10  # that a training says of its losses


class EfficientAd(nn.Module):
    """The whole model: images -> raw scores and raw anomaly maps, those of anomalib's model."""

    def __init__(self, meta: Meta) -> None:
        super().__init__()
        if meta.model != "efficientad" or meta.model_size is None:
            raise BadMeta(f"meta.json describes a {meta.model} model, not an efficientad model.")
        if meta.image_size < SMALLEST_PX:
            raise BadMeta(
                f"EfficientAD cannot take images of {meta.image_size} x {meta.image_size}:"
                f" image_size must be {SMALLEST_PX} or more, and 256 is usual."
            )
        self.networks = EfficientAdModel(CHANNELS, EfficientAdModelSize(meta.model_size))
        self.networks.to(memory_format=torch.channels_last)  # a sixth faster on CPUs
        self.networks.teacher.requires_grad_(False)
        self.model_size = meta.model_size
        self.image_size = meta.image_size
        self.keep = torch.ones(meta.image_size, meta.image_size)
        self.learned = False
        self.training_record: dict[str, Any] = {}
        self.origin: Origin | None = None

    def forward(
        self, image: torch.Tensor, keep: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Score images (N, S, S, 3) uint8 RGB: raw scores (N,), raw maps (N, h, w).

        A map is a bit smaller than S / 4, and is padded to that with zeros before the quantiles.
        `keep` (S, S) float32 is 1 for pixels that count in scores; None: as the model has it.
        """
        # float() first: TensorRT takes uint8 as an input, and only a cast may follow it.
        pixels = image.float().permute(0, 3, 1, 2) / 255  # the networks themselves normalise
        from_teacher, from_autoencoder = self.maps(pixels)
        quantiles = self.networks.quantiles
        combined = 0.05 * (
            (from_teacher - quantiles["qa_st"]) / (quantiles["qb_st"] - quantiles["qa_st"])
            + (from_autoencoder - quantiles["qa_ae"]) / (quantiles["qb_ae"] - quantiles["qa_ae"])
        )
        # anomalib enlarges both maps before it combines them; enlarging is linear.
        large = that_count(self.enlarged(combined), self.keep if keep is None else keep)
        score = large.amax(dim=(1, 2, 3))
        return score, combined[:, 0]

    def maps(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """RGB in [0, 1] (N, 3, S, S) -> how far the student is from both, (N, 1, h, w) each."""
        size = (self.image_size, self.image_size)
        said = self.networks.student(pixels).float()  # (N, 2 * CHANNELS, h, w)
        reconstructed = self.networks.ae(pixels, size).float()
        from_teacher = (self.teaches(pixels) - said[:, :CHANNELS]).square()
        from_autoencoder = (reconstructed - said[:, CHANNELS:]).square()
        return (
            F.pad(from_teacher.mean(dim=1, keepdim=True), (4, 4, 4, 4)),
            F.pad(from_autoencoder.mean(dim=1, keepdim=True), (4, 4, 4, 4)),
        )

    def teaches(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the teacher says of each patch, each channel normalised: (N, CHANNELS, h, w)."""
        mean_std = self.networks.mean_std
        found = self.networks.teacher(pixels).float()
        normalised: torch.Tensor = (found - mean_std["mean"]) / mean_std["std"]
        return normalised

    def enlarged(self, maps: torch.Tensor) -> torch.Tensor:
        """(N, 1, h, w) -> (N, 1, S, S)."""
        return F.interpolate(maps, size=(self.image_size, self.image_size), mode="bilinear")


# ---- building --------------------------------------------------------------------------------


def build(meta: Meta, weights: str | Path | None) -> EfficientAd:
    """The model, with a teacher that knows and a student that may know already.

    Args:
        weights: our model.pth or anomalib's checkpoint, from which training goes on; the weights
            of a teacher alone; "untrained" for a random teacher by a fixed seed; None for
            anomalib's pretrained teacher from its cache.

    Raises:
        BadMeta: the images are too small.
        BadWeights: the weights are not to be had or do not fit.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = EfficientAd(meta)
    if weights is None or str(weights) != UNTRAINED:
        path = cached_teacher(model.model_size) if weights is None else Path(weights)
        if weights is None:
            model.origin = {"cache": "anomalib", "model": path.name, "sha256": sha256(path)}
        model.learned = copy_weights(model.networks, read_weights(path), path, model.model_size)
    model.eval()
    return model


def new_teacher(size: str) -> nn.Module:
    """A patch description network that knows nothing: (N, 3, S, S) in [0, 1] -> (N, C, h, w)."""
    teacher: nn.Module = EfficientAdModel(CHANNELS, EfficientAdModelSize(size)).teacher
    return teacher


def knows(model: EfficientAd) -> bool:
    """Whether its student has learned anything that training would go on from."""
    return model.learned


# ---- learning --------------------------------------------------------------------------------


def train(
    model: EfficientAd, meta: Meta, batches: Batches, how: Training, progress: Progress
) -> None:
    """Let student and autoencoder imitate the teacher on normal parts, from what they know.

    One in ten of the images is not learned: it tells the best moment of the training, which is
    kept, and the quantiles that make both maps comparable.

    Args:
        batches: uint8 arrays (N, S, S, 3) of normal parts, read once.
        how: epochs over the images, images in a step, and a folder of natural images.

    Raises:
        BadDataset: there was no image, or the folder of natural images has none.
        BadMeta: the learning rate is so high that the losses are no longer finite.
    """
    pictures = _all_pictures(batches)
    validation, learned = _held_out(pictures)
    penalty = None
    if how.penalty_dir is not None:
        penalty = penalty_images(how.penalty_dir, meta.image_size, how.limits, progress)
    else:
        progress.say(
            "no folder of natural images: the student may imitate the teacher on defects too"
            " (--penalty_dir names one, any few hundred photos of other things)"
        )
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        if not model.learned:
            _measure_teacher(model, pictures)
        record = _fit(model, meta, learned, validation, penalty, how, progress)
    _measure_quantiles(model, validation)
    model.learned = True
    model.training_record = {
        **record,
        "images": {"learned": len(learned), "validation": len(validation)},
        "penalty_dir": how.penalty_dir and str(how.penalty_dir),
    }


def update(
    model: EfficientAd, meta: Meta, batches: Batches, how: Training, progress: Progress
) -> None:
    """Go on from what the model knows; `train` does so too. Errors are the same.

    A network forgets: old normals that are to stay normal must be among the images.
    """
    train(model, meta, batches, how, progress)


def _all_pictures(batches: Batches) -> torch.Tensor:
    """The pictures (n, S, S, 3) uint8, in memory: 0.2 MB each at 256 px."""
    pictures = [torch.from_numpy(batch) for batch in batches if len(batch)]
    if not pictures:
        raise BadDataset("There is no usable training image, so nothing can be learned.")
    return torch.cat(pictures)


def _held_out(pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(validation, learned): a tenth, at least two, spread over the list. Few are used twice."""
    if len(pictures) < 4:
        return pictures, pictures
    count = max(2, len(pictures) // HELD_OUT)
    chosen = torch.zeros(len(pictures), dtype=torch.bool)
    chosen[torch.linspace(0, len(pictures) - 1, count).long()] = True
    return pictures[chosen], pictures[~chosen]


def _pixels(pictures: torch.Tensor) -> torch.Tensor:
    """(N, S, S, 3) uint8 -> (N, 3, S, S) in [0, 1]."""
    return pictures.permute(0, 3, 1, 2).float() / 255


@torch.inference_mode()
def _measure_teacher(model: EfficientAd, pictures: torch.Tensor) -> None:
    """Find the mean and the standard deviation of each channel that the teacher gives."""
    count, total, squares = 0, torch.zeros(CHANNELS).double(), torch.zeros(CHANNELS).double()
    for picture in torch.split(pictures, 1):
        found = model.networks.teacher(_pixels(picture)).double()
        count += found[:, 0].numel()
        total += found.sum(dim=(0, 2, 3))
        squares += found.square().sum(dim=(0, 2, 3))
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(1e-12).sqrt()
    shape = (1, CHANNELS, 1, 1)
    model.networks.mean_std["mean"].data.copy_(mean.reshape(shape))
    model.networks.mean_std["std"].data.copy_(std.reshape(shape))


@torch.inference_mode()
def _measure_quantiles(model: EfficientAd, pictures: torch.Tensor) -> None:
    """Find what is usual (0.9) and rare (0.995) in both maps of normals, as anomalib does."""
    both = [model.maps(_pixels(picture)) for picture in torch.split(pictures, 1)]
    for index, name in enumerate(("st", "ae")):
        large = torch.cat([model.enlarged(maps[index]) for maps in both])
        values = large[:, 0, model.keep > 0].numpy()
        usual, rare = (float(value) for value in np.quantile(values, (0.9, 0.995)))
        # A plain background may be as strange everywhere: both quantiles are then the same.
        rare = max(rare, LEAST_SPREAD * usual)
        model.networks.quantiles[f"qa_{name}"].data.fill_(usual)
        model.networks.quantiles[f"qb_{name}"].data.fill_(rare)


class _Losses(NamedTuple):
    student: torch.Tensor  # from the teacher, where it is farthest
    everywhere: torch.Tensor  # from the teacher, on the whole: ours, not anomalib's
    penalty: torch.Tensor  # what it says of natural images
    autoencoder: torch.Tensor  # from the teacher
    both: torch.Tensor  # student from autoencoder


def decayed(meta: Meta, done: float) -> float:
    """What the learning rate is multiplied with when that share of the training is done."""
    return 1.0 if done < (meta.decay_at or DECAY_AT) else 0.1


def _fit(
    model: EfficientAd,
    meta: Meta,
    learned: torch.Tensor,
    validation: torch.Tensor,
    penalty: Iterator[torch.Tensor] | None,
    how: Training,
    progress: Progress,
) -> dict[str, Any]:
    """Train for `how.epochs`; the model ends as it was at its best validation."""
    networks = model.networks
    trained = nn.ModuleList([networks.student, networks.ae])
    rate = meta.learning_rate or LEARNING_RATE
    optimizer = torch.optim.Adam(trained.parameters(), lr=rate, weight_decay=WEIGHT_DECAY)
    steps = how.epochs * math.ceil(len(learned) / how.batch)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: decayed(meta, step / steps))
    check_every = math.ceil(how.epochs / MOST_CHECKS)
    say_every = math.ceil(how.epochs / MOST_LINES)
    best = _validate(model, validation) if model.learned else math.inf
    best_state, best_epoch, checked = copy.deepcopy(trained.state_dict()), 0, best
    half = cpu_has_bf16()
    tick, done = progress.phase("epochs"), 0

    for epoch in range(1, how.epochs + 1):
        trained.train()  # the autoencoder has dropout
        for chosen in torch.split(torch.randperm(len(learned)), how.batch):
            pixels = _pixels(learned[chosen]).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                losses = _losses(model, pixels, None if penalty is None else next(penalty))
            loss = torch.stack(list(losses)).sum()
            if not math.isfinite(loss.item()):
                raise BadMeta(f"Training ran away: learning_rate ({rate}) is too high for it.")
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            decay.step()
            done += 1
            tick(done, steps)
        last = epoch == how.epochs
        if epoch % check_every == 0 or last:
            checked = _validate(model, validation)
            if checked < best:
                best, best_epoch = checked, epoch
                best_state = copy.deepcopy(trained.state_dict())
        if epoch % say_every == 0 or last:
            progress.say(_epoch_line(epoch, how.epochs, losses, checked))
    trained.load_state_dict(best_state)
    model.eval()
    return {
        "epochs": how.epochs,
        "steps": steps,
        "learning_rate": rate,
        "best_epoch": best_epoch,
        "validation_loss": best,
        "losses": {name: value.item() for name, value in losses._asdict().items()},
    }


def _losses(model: EfficientAd, pixels: torch.Tensor, penalty: torch.Tensor | None) -> _Losses:
    """What a step makes smaller, for pixels (N, 3, S, S) and one natural image (1, 3, S, S)."""
    networks = model.networks
    with torch.no_grad():
        augmented = torch.stack([networks.choose_random_aug_image(one) for one in pixels])
        taught, taught_augmented = model.teaches(pixels), model.teaches(augmented)
    of_teacher, of_autoencoder = slice(0, CHANNELS), slice(CHANNELS, 2 * CHANNELS)
    said = _student_channels(networks.student, pixels, of_teacher)
    distance = (taught - said).square().flatten(1)  # (N, CHANNELS * h * w)
    above = distance.shape[1] - math.ceil(HARD * (distance.shape[1] - 1))
    hard = distance.topk(above, dim=1, sorted=False).values.mean()

    reconstructed = networks.ae(augmented, pixels.shape[-2:]).float()
    echoed = _student_channels(networks.student, augmented, of_autoencoder)
    natural = torch.zeros(())
    if penalty is not None:
        natural = _student_channels(networks.student, penalty, of_teacher).square().mean()
    return _Losses(
        student=hard,
        everywhere=distance.mean(),
        penalty=natural,
        autoencoder=(taught_augmented - reconstructed).square().mean(),
        both=(reconstructed - echoed).square().mean(),
    )


def _student_channels(student: nn.Module, pixels: torch.Tensor, of: slice) -> torch.Tensor:
    """Some of the student's channels (N, c, h, w). The others cost nothing, forwards or back.

    In the small one the last convolution is half of all work, and no loss needs all of it.
    """
    *_, last = (name for name, part in student.named_modules() if isinstance(part, nn.Conv2d))
    names = (f"{last}.weight", f"{last}.bias")
    some = {name: student.get_parameter(name)[of] for name in names}
    found: torch.Tensor = torch.func.functional_call(student, some, (pixels,))
    return found.float()


@torch.inference_mode()
def _validate(model: EfficientAd, pictures: torch.Tensor) -> float:
    """The loss on normals that are not learned, without penalty, dropout and chance."""
    model.eval()
    found = []
    for picture in torch.split(pictures, 1):
        pixels = _pixels(picture)
        taught = model.teaches(pixels)
        said = model.networks.student(pixels)
        reconstructed = model.networks.ae(pixels, pixels.shape[-2:])
        distance = (taught - said[:, :CHANNELS]).square().flatten()
        hard = distance.topk(math.ceil((1 - HARD) * len(distance))).values.mean()
        found.append(
            hard
            + distance.mean()
            + (taught - reconstructed).square().mean()
            + (reconstructed - said[:, CHANNELS:]).square().mean()
        )
    return float(torch.stack(found).mean())


def _epoch_line(epoch: int, epochs: int, losses: _Losses, checked: float) -> str:
    parts = ", ".join(f"{name} {value.item():.4f}" for name, value in losses._asdict().items())
    return f"epoch {epoch} of {epochs}: {parts}; on unlearned normals {checked:.4f}"


# ---- using -----------------------------------------------------------------------------------


def scores(model: EfficientAd, batches: Batches) -> NDArray[np.float32]:
    """Raw scores (n,) of images (N, S, S, 3) uint8 in batches."""
    assert model.learned, "train it, or build it from a model.pth, first"
    model.eval()
    with torch.inference_mode():
        found = [
            model(torch.from_numpy(picture[None]))[0].numpy()
            for batch in batches
            for picture in batch
        ]
    return np.concatenate(found) if found else np.empty(0, np.float32)


def summary(model: EfficientAd) -> dict[str, Any]:
    """What report.json says of the training."""
    quantiles = {name: value.item() for name, value in model.networks.quantiles.items()}
    return {
        "efficientad": {
            "model_size": model.model_size,
            **model.training_record,
            "quantiles": quantiles,
        }
    }


def save(model: EfficientAd, meta: Meta, folder: Path) -> list[str]:
    """Write the file to retrain from into a folder, and return its name."""
    assert model.learned, "train it, or build it from a model.pth, first"
    content = {
        "model": meta.model,
        "model_size": model.model_size,
        "state_dict": model.networks.state_dict(),
    }
    buffer = io.BytesIO()  # torch's own file writer turns a full disk into a RuntimeError
    torch.save(content, buffer)
    write_atomically(folder / meta.weights_pth, buffer.getvalue())
    return [meta.weights_pth]


def graph(model: EfficientAd, *, half: bool) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """What is exported: the module, and an example of its input by name.

    With `half` the networks become float16 for good; differences, means and quantiles stay in
    float32, and so does the normalising of the pixels.
    """
    assert model.learned, "train it, or build it from a model.pth, first"
    networks = model.networks
    if half:
        firsts = (networks.teacher.conv1, networks.student.conv1, networks.ae.encoder.enconv1)
        for network in (networks.teacher, networks.student, networks.ae):
            network.half()
        for first in firsts:  # the networks normalise in float32 before it
            first.register_forward_pre_hook(lambda _, pixels: (pixels[0].half(),))
    image = torch.zeros(2, model.image_size, model.image_size, 3, dtype=torch.uint8)
    return model, {"image": image, "keep": model.keep}
