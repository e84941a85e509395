"""PaDiM (arXiv:2011.08785): one Gaussian per position; what lies far from it, in it, is strange.

anomalib makes the embeddings and smooths the map. The statistics are ours: they can be added to
exactly, and stand in the graph as a factor that keeps its accuracy in half precision.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.models.image.padim.anomaly_map import AnomalyMapGenerator
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from engines.errors import BadBundle, BadDataset, BadMeta
from engines.meta import Meta
from workers.models import Training, that_count
from workers.models.backbone import (
    Normalise,
    describe,
    describe_pictures,
    extractor,
    write_weights,
)
from workers.models.origin import Origin
from workers.models.padim_gaussians import LeftOut, Stats
from workers.models.padim_stats_file import read_stats, write_stats
from workers.progress import Progress, Tick

Batches = Iterable[NDArray[np.uint8]]

SCORE_KIND = "padim/mahalanobis"  # anomalib's PadimModel: largest smoothed Mahalanobis distance
LEARNED = "stats"
INCREMENTAL = True

USUAL_SCALE = 0.08  # of the scores of new normal parts, as a share of the median: 0.06 to 0.2
DEAD = 1e-9  # variance of a channel that is the same everywhere, and so says nothing
KEPT = 256  # images whose embeddings are kept, so that they can be left out again
RUN = 16  # of them follow one another: shots of one part are kept together, and left out together
BLOCK = 32  # images whose embeddings are held before they are merged into the statistics
LARGEST_MIB = 1024  # statistics of more than this fit neither a Jetson nor an ONNX file


class PaDiM(nn.Module):
    """The whole model: images -> raw scores and raw anomaly maps, the statistics inside."""

    def __init__(self, meta: Meta, weights: str | Path | None) -> None:
        super().__init__()
        if meta.model != "padim" or meta.backbone is None or meta.layers is None:
            raise BadMeta(f"meta.json describes a {meta.model} model, not a padim model.")
        self.features = extractor(meta.backbone, meta.layers, weights)
        self.origin: Origin | None = self.features.origin
        self.normalise = Normalise()
        self.layers = meta.layers
        self.image_size = meta.image_size
        self.half_precision = False
        self.index: torch.Tensor
        self.positions = 0  # h * w
        self.stats: Stats | None = None
        self.keep = torch.ones(meta.image_size, meta.image_size)
        self.mean = self.whitening = self.smoothing = torch.empty(0)

    def choose(self, index: torch.Tensor) -> None:
        """Set the channels (n,) that are used, of all layers one after the other; ascending."""
        self.index = index
        per_layer = torch.split(torch.arange(sum(self.features.out_dims)), self.features.out_dims)
        self.chosen = [index[torch.isin(index, own)] - own[0] for own in per_layer]

    def learn(self, stats: Stats) -> None:
        """Set the statistics, and what of them stands in the graph."""
        self.stats, self.mean, self.whitening = stats, stats.mean, stats.whitening()
        self.smoothing = smoothing(math.isqrt(len(self.mean)), self.image_size)

    def forward(
        self, image: torch.Tensor, keep: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Score images.

        Args:
            image: (N, S, S, 3) uint8 RGB.
            keep: (S, S) float32, 1 for pixels that count in scores; None: as the model has it.

        Returns:
            Raw scores (N,) and raw maps (N, h, w), float32. A score is the largest value of the
            smoothed map at the size of the image, as anomalib's; the map here is that one averaged
            to the size of the first layer.
        """
        embedding, (height, width) = self.embed(image)
        difference = (embedding - self.mean).permute(1, 2, 0)  # (P, n, N)
        if self.half_precision:  # numbers of moderate size; the sum of their squares is not
            whitened = (self.whitening @ difference.half()).float()
        else:
            whitened = self.whitening @ difference
        distance = whitened.square().sum(dim=1).sqrt()  # (P, N)
        distances = distance.permute(1, 0).reshape(-1, height, width)
        smooth = self.smoothing @ distances @ self.smoothing.T  # (N, S, S)
        score = that_count(smooth, self.keep if keep is None else keep).amax(dim=(1, 2))
        smaller = _average(self.smoothing, height)
        return score, smaller @ distances @ smaller.T

    def highest(self, distances: torch.Tensor) -> torch.Tensor:
        """Raw scores (N,) of distances (N, P): as in `forward`."""
        side = math.isqrt(distances.shape[1])  # images are square
        rows = smoothing(side, self.image_size)
        smooth = rows @ distances.reshape(-1, side, side) @ rows.T
        score: torch.Tensor = that_count(smooth, self.keep).amax(dim=(1, 2))
        return score

    def embed(self, image: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """Images (N, S, S, 3) uint8 -> the chosen channels (N, h*w, n) float32, and (h, w).

        Deeper layers are stretched to the size of the first one, as in anomalib's PadimModel.
        """
        x = self.normalise(image)
        features = self.features(x.half() if self.half_precision else x)
        height, width = (int(side) for side in features[self.layers[0]].shape[2:])
        parts = [
            functional.interpolate(features[layer][:, chosen].float(), size=(height, width))
            for layer, chosen in zip(self.layers, self.chosen, strict=True)
            if len(chosen)
        ]
        return torch.cat(parts, dim=1).flatten(2).permute(0, 2, 1), (height, width)


@lru_cache(maxsize=1)  # it takes longer than what it is for
@torch.inference_mode(mode=False)  # else nobody could use it afterwards who computes gradients
@torch.no_grad()
def smoothing(side: int, image_size: int) -> torch.Tensor:
    """anomalib's enlarging and smoothing of maps, along one side, as a matrix (S, side).

    Both are linear and the same in each direction, so smoothed = A map A^T. It is measured from
    anomalib's own functions, with a picture that changes along one side only.
    """
    generator = AnomalyMapGenerator()
    steps = torch.eye(side)[:, None, :, None].expand(-1, 1, -1, side)
    enlarged = generator.up_sample(steps, (image_size, image_size))
    smooth: torch.Tensor = generator.smooth_anomaly_map(enlarged)  # (side, 1, S, S)
    return smooth[:, 0, :, image_size // 2].T.contiguous()


def _average(matrix: torch.Tensor, side: int) -> torch.Tensor:
    """(S, n) -> (side, n): the mean of neighbouring rows."""
    return functional.adaptive_avg_pool1d(matrix.T[None], side)[0].T


def build(meta: Meta, weights: str | Path | None) -> PaDiM:
    """The model with its backbone and its choice of channels, and no statistics yet.

    Raises:
        BadMeta: the backbone or its layers are unknown or cannot take images of that size, there
            are fewer channels than n_features, or the statistics would be too large.
        BadWeights: the weights are not to be had or do not fit.
    """
    model = PaDiM(meta, weights)
    available, wanted = sum(model.features.out_dims), _n_features(meta)
    if wanted > available:
        raise BadMeta(
            f"n_features is {wanted}, but {meta.backbone} has {available} channels in"
            f" {', '.join(model.layers)}: choose fewer, or more layers."
        )
    model.choose(random_channels(available, wanted, meta.channel_seed or 0))
    size = meta.image_size
    try:
        with torch.inference_mode():
            embedding, _ = model.embed(torch.zeros(1, size, size, 3, dtype=torch.uint8))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise BadMeta(f"{meta.backbone} cannot take images of {size} x {size}: {error}.") from error
    model.positions = embedding.shape[1]
    _check_size(model.positions, wanted, meta)
    return model


def random_channels(available: int, wanted: int, seed: int) -> torch.Tensor:
    """Channels (n,) at random, as the paper does, but the same for the same seed; ascending."""
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    return order[:wanted].sort().values


@torch.inference_mode()
def steady_channels(model: PaDiM, batches: Batches, wanted: int) -> torch.Tensor:
    """The channels (n,) that differ least from part to part at one position, ascending.

    Each by its variance over the images at a position, as a share of its variance over images and
    positions: what belongs to the place on the part, and not to the single part.
    """
    model.choose(torch.arange(sum(model.features.out_dims)))
    count, total, squares = 0, torch.zeros(1, dtype=torch.double), torch.zeros(1)
    for batch in batches:
        embedding = model.embed(torch.from_numpy(batch))[0].double()  # (N, P, D)
        count += len(embedding)
        total = total + embedding.sum(dim=0)
        squares = squares + embedding.square().sum(dim=(0, 1))
    mean = total / max(1, count)  # (P, D)
    power = squares / max(1, count * len(mean))
    within = power - mean.square().mean(dim=0)
    overall = power - mean.mean(dim=0).square()
    share = torch.where(overall > DEAD, within / overall, torch.inf)
    return share.argsort()[:wanted].sort().values


def _first_batches(batches: Iterator[NDArray[np.uint8]], images: int) -> list[NDArray[np.uint8]]:
    """The first batches, until they hold that many images."""
    taken: list[NDArray[np.uint8]] = []
    while sum(map(len, taken)) < images and (batch := next(batches, None)) is not None:
        taken.append(batch)
    return taken


def _check_size(positions: int, wanted: int, meta: Meta) -> None:
    mib = positions * wanted**2 * 4 / 2**20
    if mib <= LARGEST_MIB:
        return
    fits = math.isqrt(LARGEST_MIB * 2**20 // (4 * positions))
    assert meta.layers is not None, "Meta requires them of a padim model"
    deeper = f", or leave out {meta.layers[0]}" if len(meta.layers) > 1 else ""
    raise BadMeta(
        f"The statistics would take {mib / 1024:.1f} GiB ({positions:,} positions, n_features"
        f" {wanted}), and no more than {LARGEST_MIB / 1024:.0f} GiB serves: choose n_features of at"
        f" most {fits}, a smaller image_size{deeper}."
    )


def load(model: PaDiM, path: Path) -> None:
    """Give the model statistics from a file, also from one of an older tool: see `read_stats`.

    Raises:
        BadBundle: the file is damaged, or was made with another backbone, layers or n_features.
    """
    stats, index = read_stats(path, model.positions, len(model.index), model.layers)
    order = _use_channels(model, path, index)
    covariance = stats.covariance[:, order][:, :, order]
    try:
        model.learn(Stats(stats.count, stats.mean[:, order], covariance))
    except RuntimeError as error:  # torch.linalg.LinAlgError
        raise BadBundle(f"{path} holds what is no covariance: {error}.") from error


def _use_channels(model: PaDiM, path: Path, index: NDArray[Any] | None) -> torch.Tensor:
    """Give the model the channels of the statistics; returns how to bring these in their order."""
    n, available = len(model.index), sum(model.features.out_dims)
    if index is None:
        if n < available:
            raise BadBundle(
                f"{path} does not say which {n} of {available} channels it is of (it has no array"
                " named index): learn anew, without --load_stats."
            )
        return torch.arange(n)
    distinct = index.shape == (n,) and np.issubdtype(index.dtype, np.integer)
    if not distinct or len(np.unique(index)) < n or index.min() < 0 or index.max() >= available:
        raise BadBundle(f"{path}: index must hold {n} different channels below {available}.")
    chosen, order = torch.from_numpy(index.astype(np.int64)).sort()
    model.choose(chosen)
    return order


def knows(model: PaDiM) -> bool:
    """Whether it has statistics."""
    return model.stats is not None


@dataclass(frozen=True)
class Lesson:
    """What was learned from which picture, so that each can be judged as if it had not been.

    Attributes:
        embeddings: (K, P, n) of those that are kept: at the most `KEPT`, in runs that are spread
            over all.
        pictures: (K,) their numbers among all.
        stats: of all of them, and of what was known before.
        left_out: the same without some of them.
    """

    model: PaDiM
    embeddings: torch.Tensor
    pictures: NDArray[np.int64]
    stats: Stats
    left_out: LeftOut

    def descriptors(self) -> NDArray[np.float32]:
        """(K, d): what the pictures look like, coarsely."""
        return describe(self.embeddings)

    def describe(self, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(n, d): the same of other pictures (n, S, S, 3), of which there is at least one."""
        return describe_pictures(self.model.embed, pictures)

    def can_spare(self, parts: NDArray[np.int64]) -> bool:
        """Whether something is left to judge by, whichever of the parts (K,) is left out."""
        return self.stats.count - int(np.bincount(parts).max()) > 1

    def scores(self, parts: NDArray[np.int64], tick: Tick) -> NDArray[np.float64]:
        """Raw scores (K,) by the statistics without the pictures of the same part.

        Args:
            parts: (K,) pictures with the same number are left out together.
        """
        found, done = np.empty(len(parts)), 0
        names, sizes = np.unique(parts, return_counts=True)
        for k in (int(size) for size in np.unique(sizes)):  # one inverse for each
            for some in _blocks(names[sizes == k], BLOCK // k):
                pictures = np.concatenate([np.flatnonzero(parts == part) for part in some])
                whitened = self._whitened(self.embeddings[pictures], k)
                for number, part in enumerate(torch.split(whitened, k, dim=2)):
                    same = pictures[number * k : (number + 1) * k]
                    found[same] = self._scores(part, part)
                done += len(some)
                tick(done, len(names))
        return found

    def judge(self, pictures: NDArray[np.uint8], without: NDArray[np.int64]) -> NDArray[np.float64]:
        """Raw scores (n,) of other pictures (n, S, S, 3) by the statistics without some."""
        with torch.inference_mode():
            embeddings = self.model.embed(torch.from_numpy(pictures))[0]
        k = len(without)
        return self._scores(
            self._whitened(embeddings, k), self._whitened(self.embeddings[without], k)
        )

    def keeping(self, kept: NDArray[np.int64], progress: Progress) -> Lesson:
        """Learn again, without the others of those that are kept."""
        gone = np.setdiff1d(np.arange(len(self.pictures)), kept)
        stats = self.stats.without(self.embeddings[gone])
        self.model.learn(stats)
        # Numbered anew, as if the others had never been there.
        moved = self.pictures[kept] - np.searchsorted(self.pictures[gone], self.pictures[kept])
        return Lesson(self.model, self.embeddings[kept], moved, stats, LeftOut(stats))

    @torch.inference_mode()
    def _whitened(self, embeddings: torch.Tensor, k: int) -> torch.Tensor:
        return self.left_out.whitened(embeddings, k)

    @torch.inference_mode()
    def _scores(self, asked: torch.Tensor, without: torch.Tensor) -> NDArray[np.float64]:
        distances = self.left_out.distances(asked, without)
        return self.model.highest(distances).double().numpy()


def _blocks(parts: NDArray[np.int64], count: int) -> Iterator[NDArray[np.int64]]:
    """Parts (n,) in pieces of so many, at least one."""
    count = max(1, count)
    return (parts[start : start + count] for start in range(0, len(parts), count))


def train(model: PaDiM, meta: Meta, batches: Batches, how: Training, progress: Progress) -> Lesson:
    """Learn mean and covariance at each position, from nothing.

    Args:
        batches: uint8 arrays (N, S, S, 3) of normal parts.

    Raises:
        BadDataset: there were fewer than two images.
    """
    if meta.channel_choice == "steady":
        batches = iter(batches)
        first = _first_batches(batches, BLOCK)
        model.choose(steady_channels(model, first, _n_features(meta)))
        batches = chain(first, batches)
    stats, kept, numbers = _stats_of(model, batches)
    if stats.count < 2:
        raise BadDataset("PaDiM needs at least 2 usable training images: it learns how they vary.")
    progress.say("inverting the covariances")
    model.learn(stats)
    return Lesson(model, kept, numbers, stats, LeftOut(stats))


def update(model: PaDiM, meta: Meta, batches: Batches, how: Training, progress: Progress) -> Lesson:
    """Add images, exactly as if they had been learned with the others.

    Raises:
        BadDataset: there was no image.
        BadBundle: the statistics do not say of how many images they are.
    """
    assert model.stats is not None, "load statistics, or train, first"
    before = model.stats
    if before.count < 2:
        raise BadBundle(
            "These statistics do not say of how many images they are (anomalib or an older tool"
            " made them), so none can be added: learn anew, without --load_stats."
        )
    stats, kept, numbers = _stats_of(model, batches)
    progress.say("inverting the covariances")
    stats = before.merged(stats)
    model.learn(stats)
    return Lesson(model, kept, numbers, stats, LeftOut(stats))


@torch.inference_mode()
def _stats_of(model: PaDiM, batches: Batches) -> tuple[Stats, torch.Tensor, NDArray[np.int64]]:
    """Statistics of all images; embeddings and numbers of those that are kept."""
    stats: Stats | None = None
    waiting: list[torch.Tensor] = []
    kept: dict[int, torch.Tensor] = {}
    seen, every = 0, 1

    def merge() -> None:
        nonlocal stats
        found = Stats.of(torch.cat(waiting))
        stats = found if stats is None else stats.merged(found)
        waiting.clear()

    for batch in batches:
        embeddings = model.embed(torch.from_numpy(batch))[0]
        for embedding in embeddings:
            if seen // RUN % every == 0:
                kept[seen] = embedding.clone()  # not the batch that it lies in
            seen += 1
            if len(kept) > KEPT:  # every second run goes, and from now on fewer are kept
                every *= 2
                kept = {number: one for number, one in kept.items() if number // RUN % every == 0}
        waiting.append(embeddings)
        if sum(map(len, waiting)) >= BLOCK:
            merge()
    if waiting:
        merge()
    if stats is None:
        raise BadDataset("There is no usable training image, so nothing can be learned.")
    return stats, torch.stack(list(kept.values())), np.array(list(kept), np.int64)


def scores(model: PaDiM, batches: Batches) -> NDArray[np.float32]:
    """Raw scores (n,) of images (N, S, S, 3) uint8 in batches."""
    with torch.inference_mode():
        found = [model(torch.from_numpy(batch))[0].numpy() for batch in batches if len(batch)]
    return np.concatenate(found) if found else np.empty(0, np.float32)


def summary(model: PaDiM) -> dict[str, Any]:
    """What report.json says of the statistics."""
    assert model.stats is not None, "load statistics, or train, first"
    positions, n = model.stats.mean.shape
    return {
        "stats": {
            "images": model.stats.count,
            "positions": positions,
            "features": n,
            "mib": round(positions * n * n * 4 / 2**20, 1),
        }
    }


def save(model: PaDiM, meta: Meta, folder: Path) -> list[str]:
    """Write the files to retrain from into a folder, and return their names."""
    assert model.stats is not None, "load statistics, or train, first"
    assert meta.stats is not None, "Meta requires it of a padim model"
    write_weights(folder / meta.weights_pth, meta, model.features.feature_extractor.state_dict())
    seed = meta.channel_seed or 0
    write_stats(folder / meta.stats, model.stats, model.index, model.layers, seed)
    return [meta.weights_pth, meta.stats]


def graph(model: PaDiM, *, half: bool) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """What is exported: the module, and an example of its input by name.

    With `half` the backbone becomes float16 for good, and so does the whitening; the squares and
    their sum stay in float32.
    """
    assert model.stats is not None, "load statistics, or train, first"
    if half:
        model.features.half()
        model.whitening = model.whitening.half()
        model.half_precision = True
    image = torch.zeros(2, model.image_size, model.image_size, 3, dtype=torch.uint8)
    return model, {"image": image, "keep": model.keep}


def _n_features(meta: Meta) -> int:
    assert meta.n_features is not None, "Meta requires it of a padim model"
    return meta.n_features
