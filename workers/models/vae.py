"""Our own convolutional variational autoencoder (arXiv:1312.6114), the fastest of the kinds.

It squeezes a part into `latent_dim` numbers and draws it again as a normal part. What the camera
saw and the drawing does not show is strange. The drawing is always a bit off at edges and in
texture, so the error there is compared with what it usually is there on normal parts.

The error is that of local means, over 3 x 3 and 7 x 7 pixels: a texture of fine grains, which no
`latent_dim` numbers can hold, averages out, and a defect does not. docs/models.md compares it with
the plain error, SSIM and gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F  # noqa: N812

from engines.errors import BadDataset, BadMeta, BadWeights
from engines.meta import Meta
from workers.models import Training, that_count
from workers.models.backbone import UNTRAINED, read_weights, write_weights
from workers.models.origin import Origin
from workers.progress import Progress

Batches = Iterable[NDArray[np.uint8]]
State = dict[str, torch.Tensor]

SCORE_KIND = "vae/local-mean-error"  # its largest value, in standard deviations of normal parts
LEARNED = None  # model.pth is all there is
INCREMENTAL = False
USUAL_SCALE = 0.05  # of new normal parts: at least; see `hold_some_out`

SMALLEST_PX = 64
WIDTH = 32  # channels of the outermost layer; twice as many inside
DEEPEST = 64  # channels that the latent vector is made of, at 8 x 8 places or fewer
SEEN_AT = 2  # image pixels per pixel that the network sees, both ways
CELL = 4  # of those pixels, per place of the outermost layer, both ways
SLOPE = 0.1  # of the activation below zero
LEARNING_RATE = 2e-3
CLIP = 1.0  # the longest gradient: one strange batch must not undo a training
WARM_UP = 0.1  # share of the steps until the learning rate is full; it falls as a cosine
WARM_UP_STEPS = 20  # at least: the first steps of Adam are blind, and would undo what is known
FEWEST_STEPS = 400  # of all trainings; fewer do not tell every easy defect of the sample parts
KL_WARM_UP = 0.3  # share of the steps until the KL term weighs in full (arXiv:1602.02282)
PIXEL_NOISE = 0.02  # standard deviation of a pixel around its drawing, of [0, 1]: the ELBO's sigma
MOST_SHIFT = 1 / 32  # of the width; training sees each part moved by up to this, both ways
MOST_GAIN, MOST_OFFSET = 0.08, 0.02  # and brighter or darker by up to this
NEAR, FAR = 3, 7  # pixels as the network sees them: sides of the local means
USUAL_OVER = 9  # and of the neighbourhood that says what error is usual at a pixel
SMALLEST_SPREAD = 0.5 / 255  # half a grey level


class Vae(nn.Module):
    """The whole model: images -> raw scores and raw anomaly maps. At inference nothing is drawn
    by chance: the latent vector is the mean.

    Everything is in [0, 1] from the camera's grey levels to the error, and at half the resolution:
    what is finer is grain.
    """

    def __init__(self, meta: Meta) -> None:
        super().__init__()
        if meta.model != "vae" or meta.latent_dim is None:
            raise BadMeta(f"meta.json describes a {meta.model} model, not a vae model.")
        halvings = _halvings(meta.image_size)
        self.image_size = meta.image_size
        self.latent_dim = meta.latent_dim
        self.side = meta.image_size // SEEN_AT  # of what the network sees and draws
        self.grid = self.side // CELL >> halvings  # the places that the latent vector is made of
        self.half_network = False
        self.keep = torch.ones(self.side, self.side)
        self.training_record: dict[str, Any] = {}
        self.origin: Origin | None = None  # it begins without weights

        widths = [WIDTH, *[2 * WIDTH] * (halvings - 1), DEEPEST]
        pairs = list(pairwise(widths))
        cell = 3 * CELL**2
        self.encoder = nn.Sequential(
            _layer(cell, WIDTH), *(_layer(outer, inner, stride=2) for outer, inner in pairs)
        )
        self.to_latent = nn.Linear(DEEPEST * self.grid**2, 2 * self.latent_dim)
        self.from_latent = nn.Linear(self.latent_dim, DEEPEST * self.grid**2)
        upwards = [
            nn.Sequential(nn.Upsample(scale_factor=2), _layer(inner, outer))
            for outer, inner in reversed(pairs)
        ]
        self.decoder = nn.Sequential(_layer(DEEPEST, DEEPEST), *upwards)
        self.draw = nn.Conv2d(WIDTH, cell, 3, padding=1)
        _initialise(self)
        self.mean_part: torch.Tensor
        self.usual_error: torch.Tensor
        self.error_spread: torch.Tensor
        self.steps: torch.Tensor
        self.register_buffer("mean_part", torch.full((3, self.side, self.side), 0.5))
        self.register_buffer("usual_error", torch.zeros(1, self.side, self.side))
        self.register_buffer("error_spread", torch.ones(1, self.side, self.side))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))  # of all trainings

    def forward(
        self, image: torch.Tensor, keep: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Score images.

        Args:
            image: (N, S, S, 3) uint8 RGB.
            keep: (S/2, S/2) float32, 1 for places that count in scores; None: as the model has it.

        Returns:
            Raw scores (N,) and raw maps (N, S/4, S/4), in standard deviations of the error of
            normal parts.
        """
        seen = self.see(image)
        mean, _ = self.encode(seen)
        strange = (self.error(seen, self.decode(mean)) - self.usual_error) / self.error_spread
        score = that_count(strange, self.keep if keep is None else keep).amax(dim=(1, 2, 3))
        return score, F.max_pool2d(strange, 2)[:, 0]

    def see(self, image: torch.Tensor) -> torch.Tensor:
        """Images (N, S, S, 3) uint8 -> what the network sees: (N, 3, S/2, S/2) in [0, 1]."""
        # float() first: TensorRT takes uint8 as an input, and only a cast may follow it.
        return F.avg_pool2d(image.float().permute(0, 3, 1, 2), SEEN_AT) / 255

    def encode(self, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, 3, S/2, S/2) -> mean and log variance of the latent vectors, (N, latent_dim) each."""
        x = F.pixel_unshuffle(seen - self.mean_part, CELL)
        x = self.encoder(x.half() if self.half_network else x)
        mean, log_variance = self.to_latent(x.flatten(1)).chunk(2, dim=1)
        return mean, log_variance.clamp(-10, 10)

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """Latent vectors (N, latent_dim) -> parts as they should be, (N, 3, S/2, S/2)."""
        x = self.from_latent(latent).reshape(-1, DEEPEST, self.grid, self.grid)
        return F.pixel_shuffle(self.draw(self.decoder(x)).float(), CELL) + self.mean_part

    def error(self, seen: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        """How far local means are off, the mean of red, green and blue: (N, 1, S/2, S/2)."""
        difference = seen - drawn
        near = _local_mean(difference, NEAR).abs().mean(dim=1, keepdim=True)
        far = _local_mean(difference, FAR).abs().mean(dim=1, keepdim=True)
        return near + 2 * far


def _initialise(model: Vae) -> None:
    """Weights that keep the size of what passes (arXiv:1502.01852), so that all layers learn."""
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.kaiming_normal_(parameter, a=SLOPE)
    with torch.no_grad():  # at first everything is near the mean part
        model.to_latent.weight *= 0.1
        model.draw.weight *= 0.1


def _layer(channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride, padding=1), nn.LeakyReLU(SLOPE)
    )


def _local_mean(x: torch.Tensor, side: int) -> torch.Tensor:
    """The mean over `side` x `side` pixels around each; over fewer at the rim."""
    return F.avg_pool2d(x, side, 1, side // 2, count_include_pad=False)


def _halvings(size: int) -> int:
    """How often the network halves an image of that size, after the first steps of 8 pixels.

    Twice, and more often until 8 x 8 places are left: so weights do not grow with the image.

    Raises:
        BadMeta: that does not come out even; says which sizes do.
    """
    halvings = 2
    while size > 8 * (step := SEEN_AT * CELL << halvings):
        halvings += 1
    if size < SMALLEST_PX or size % step:
        below = max(SMALLEST_PX, size // step * step)
        raise BadMeta(
            f"A VAE cannot take images of {size} x {size}: image_size must be a multiple of {step}"
            f" here, such as {below} or {below + step}."
        )
    return halvings


# ---- building --------------------------------------------------------------------------------


def build(meta: Meta, weights: str | Path | None) -> Vae:
    """The model, new by a fixed seed, or as it was saved.

    Args:
        weights: our model.pth, from which training goes on; None or "untrained" for a new one.

    Raises:
        BadMeta: the image size cannot be.
        BadWeights: the weights are not to be had, are those of something else, or do not fit.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Vae(meta)
    if weights is not None and str(weights) != UNTRAINED:
        _load(model, read_weights(Path(weights)), Path(weights))
    model.eval()
    return model


def _load(model: Vae, found: State, path: Path) -> None:
    own = model.state_dict()
    if missing := [name for name in own if name not in found]:
        raise BadWeights(
            f"{path} is not a VAE that Kensa trained: it has no {missing[0]}. Pass the model.pth of"
            f" an earlier training with --pretrained_pth, or {UNTRAINED}."
        )
    latent_dim, side = found["from_latent.weight"].shape[-1], found["mean_part"].shape[-1]
    if latent_dim != model.latent_dim:
        raise BadWeights(
            f"{path} does not fit meta.json: its latent_dim is {latent_dim}, and meta.json says"
            f" {model.latent_dim}."
        )
    if side != model.side:
        raise BadWeights(
            f"{path} does not fit meta.json: its image_size is {SEEN_AT * side}, and meta.json says"
            f" {model.image_size}."
        )
    for name, target in own.items():
        if found[name].shape != target.shape:
            raise BadWeights(
                f"{path} does not fit: {name} is {tuple(found[name].shape)}, and"
                f" {tuple(target.shape)} is needed."
            )
        if not torch.isfinite(found[name]).all():
            raise BadWeights(f"{path}: {name} holds values that are not finite.")
    model.load_state_dict({name: found[name] for name in own})


def knows(model: Vae) -> bool:
    """Whether it has been trained."""
    return int(model.steps) > 0


# ---- learning --------------------------------------------------------------------------------


def train(model: Vae, meta: Meta, batches: Batches, how: Training, progress: Progress) -> None:
    """Learn to draw normal parts, and how far the drawings are usually off.

    A model that knows something goes on from there.

    Args:
        batches: uint8 arrays (N, S, S, 3) of normal parts, read once.
        how: epochs over the images, and images in a step.

    Raises:
        BadDataset: there was no image.
        BadMeta: the learning rate is so high that the loss is no longer finite.
    """
    parts = _seen(model, batches)
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        if not knows(model):
            model.mean_part.copy_(parts.float().mean(dim=0) / 255)
        record = _fit(model, meta, parts, how, progress)
    _measure_errors(model, parts)
    model.training_record = {**record, "images": len(parts)}
    if int(model.steps) < FEWEST_STEPS:
        epochs = math.ceil(FEWEST_STEPS / math.ceil(len(parts) / how.batch))
        progress.say(
            f"this VAE has learned for {int(model.steps)} steps: below {FEWEST_STEPS} it draws"
            f" little more than the mean part (--epochs {epochs} would be enough)"
        )


def update(model: Vae, meta: Meta, batches: Batches, how: Training, progress: Progress) -> None:
    """Go on from what the model knows; `train` does so too. Errors are the same.

    A network forgets: old normals that are to stay normal must be among the images.
    """
    train(model, meta, batches, how, progress)


@torch.inference_mode()
def _seen(model: Vae, batches: Batches) -> torch.Tensor:
    """All parts as the network sees them, but for the rounding: (n, 3, S/2, S/2) uint8."""
    seen = [model.see(torch.from_numpy(batch)) for batch in batches if len(batch)]
    if not seen:
        raise BadDataset("There is no usable training image, so nothing can be learned.")
    return torch.cat([(255 * batch).round().to(torch.uint8) for batch in seen])


def _fit(
    model: Vae, meta: Meta, parts: torch.Tensor, how: Training, progress: Progress
) -> dict[str, Any]:
    """Train for `how.epochs`."""
    rate = meta.learning_rate or LEARNING_RATE
    optimizer = torch.optim.Adam(model.parameters(), rate)
    steps = how.epochs * math.ceil(len(parts) / how.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    tick, done, known = progress.phase("epochs"), 0, knows(model)
    model.train()
    for _ in range(how.epochs):
        squares, divergence = 0.0, 0.0
        for chosen in torch.split(torch.randperm(len(parts)), how.batch):
            seen = _varied(parts[chosen].float() / 255)
            squared, kl = _losses(model, seen)
            weight = 1.0 if known else kl_weight(done, steps)
            loss = (squared / (2 * PIXEL_NOISE**2) + weight * kl) / seen[0].numel()
            if not math.isfinite(float(loss.detach())):
                raise BadMeta(f"Training ran away: learning_rate ({rate}) is too high for it.")
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            schedule.step()
            squares += float(squared.detach()) * len(chosen) / len(parts)
            divergence += float(kl.detach()) * len(chosen) / len(parts)
            done += 1
        tick(done, steps)
    model.eval()
    model.steps += steps
    return {
        "epochs": how.epochs,
        "steps": steps,
        "learning_rate": rate,
        "pixel_error": math.sqrt(squares / parts[0].numel()),  # root mean square, of [0, 1]
        "kl_nats": divergence,
    }


def _losses(model: Vae, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared error of the drawing, summed over pixels, and KL in nats: means of the images.

    KL of a diagonal Gaussian from the unit one: arXiv:1312.6114, appendix B.
    """
    mean, log_variance = model.encode(seen)
    latent = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
    squared = (model.decode(latent) - seen).square().sum(dim=(1, 2, 3))
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=1)
    return squared.mean(), kl.mean()


def kl_weight(step: int, steps: int) -> float:
    """What the KL term weighs at a step of so many: it rises from 0 to 1 and stays there.

    From the first step on it would empty the latent vector before the decoder can read it.
    """
    return min(1.0, step / max(1, int(KL_WARM_UP * steps)))


def _rate(step: int, steps: int) -> float:
    """The share of the learning rate at a step of so many."""
    rising = min(1.0, (step + 1) / max(WARM_UP_STEPS, WARM_UP * steps))
    return rising * 0.5 * (1 + math.cos(math.pi * step / steps))


def _varied(parts: torch.Tensor) -> torch.Tensor:
    """The parts (N, 3, h, h) moved a little, rims repeated, and brighter or darker."""
    n, _, side, _ = parts.shape
    most = max(1, int(MOST_SHIFT * side))
    wide = F.pad(parts, (most, most, most, most), mode="replicate")
    corners = torch.randint(0, 2 * most + 1, (n, 2)).tolist()
    moved = [
        part[:, down : down + side, right : right + side]
        for part, (down, right) in zip(wide, corners, strict=True)
    ]
    gain, offset = 2 * torch.rand(2, n, 1, 1, 1) - 1
    varied = (1 + MOST_GAIN * gain) * torch.stack(moved) + MOST_OFFSET * offset
    return torch.clamp(varied, 0, 1)


@torch.inference_mode()
def _measure_errors(model: Vae, parts: torch.Tensor) -> None:
    """Find mean and standard deviation of the error at each pixel, and around it.

    Nowhere is the spread less than half of what it is on average, and half a grey level: a
    background without any would make a defect of a speck.
    """
    errors = []
    for part in torch.split(parts.float() / 255, 1):
        mean, _ = model.encode(part)
        errors.append(model.error(part, model.decode(mean)))
    found = torch.cat(errors)  # (n, 1, S/2, S/2)
    usual = _local_mean(found.mean(dim=0, keepdim=True), USUAL_OVER)
    spread = _local_mean(found.std(dim=0, correction=0, keepdim=True), USUAL_OVER)
    model.usual_error.copy_(usual[0])
    average = spread[:, :, model.keep > 0].mean()
    model.error_spread.copy_(spread[0] + 2 * average + SMALLEST_SPREAD)


# ---- using -----------------------------------------------------------------------------------


def scores(model: Vae, batches: Batches) -> NDArray[np.float32]:
    """Raw scores (n,) of images (N, S, S, 3) uint8 in batches."""
    with torch.inference_mode():
        found = [
            model(torch.from_numpy(picture[None]))[0].numpy()
            for batch in batches
            for picture in batch  # one by one, as it is served
        ]
    return np.concatenate(found) if found else np.empty(0, np.float32)


def summary(model: Vae) -> dict[str, Any]:
    """What report.json says of the training."""
    return {"vae": {**model.training_record, "steps_in_all": int(model.steps)}}


def save(model: Vae, meta: Meta, folder: Path) -> list[str]:
    """Write the file to retrain from into a folder, and return its name."""
    write_weights(folder / meta.weights_pth, meta, model.state_dict())
    return [meta.weights_pth]


def graph(model: Vae, *, half: bool) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """What is exported: the module, and an example of its input by name.

    With `half` the network becomes float16 for good; error and statistics stay in float32.
    """
    if half:
        for part in (model.encoder, model.to_latent, model.from_latent, model.decoder, model.draw):
            part.half()
        model.half_network = True
    image = torch.zeros(2, model.image_size, model.image_size, 3, dtype=torch.uint8)
    return model, {"image": image, "keep": model.keep}
