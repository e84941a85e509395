"""PatchCore (arXiv:2106.08265): a bank of normal patch embeddings; what is far from it is strange.

anomalib cuts the features out of the backbone. The coreset and the search in the bank are ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from engines.errors import BadBundle, BadDataset, BadMeta
from engines.meta import Meta
from engines.runtimes.bank_search import NEIGHBOURS
from engines.store.bundle import read_bank, read_coverage_radius, write_bank
from workers.models import Training, that_count
from workers.models.backbone import (
    Normalise,
    describe,
    describe_pictures,
    extractor,
    write_weights,
)
from workers.models.bank_search import BankSearch, scores_of
from workers.models.coreset import k_centre_greedy, on_one_thread
from workers.models.origin import Origin
from workers.progress import Progress, Tick

Batches = Iterable[NDArray[np.uint8]]

SCORE_KIND = "patchcore/weighted-distance"  # anomalib's PatchcoreModel with num_neighbors=9
LEARNED = "memory_bank"
INCREMENTAL = True
USUAL_SCALE = 0.05  # of the scores of new normal parts, as a share of the median: 0.03 to 0.1
TOGETHER = 4  # pictures through the backbone: more gain nothing, and take memory
STEEPEST = 1e-3  # the value of a feature below which its power grows no steeper
CHUNK = 1024  # patches searched at once, so that memory does not grow with the batch
FEW = 64  # rows compared with all others at once, for the same reason


@dataclass(frozen=True)
class Bank:
    """A memory bank and how well it covers what it was made from."""

    embeddings: torch.Tensor  # (M, C) float32
    coverage_radius: float  # the largest distance of any training patch to it, feature units


class PatchCore(nn.Module):
    """The whole model: images and a memory bank -> raw scores and raw anomaly maps.

    Scores are those of anomalib's PatchcoreModel. Only the one patch of each image that decides
    the score is compared with its neighbours' neighbours; for all others the nearest distance
    is enough, and that is a matrix product and a minimum.
    """

    def __init__(self, meta: Meta, weights: str | Path | None) -> None:
        super().__init__()
        if meta.model != "patchcore" or meta.backbone is None or meta.layers is None:
            raise BadMeta(f"meta.json describes a {meta.model} model, not a patchcore model.")
        if (meta.model_extra or {}).get("grid") is not None:
            raise BadMeta(
                "meta.json names a `grid`, which is no more: learn all pictures anew without it and"
                ' the layers before it (a job: "update": false, "meta": {"grid": null, "layers":'
                " [...]}). What serves goes on as it is."
            )
        self.features = extractor(meta.backbone, meta.layers, weights)
        self.origin: Origin | None = self.features.origin
        self.pool = nn.AvgPool2d(3, 1, 1)  # as PatchcoreModel.feature_pooler
        self.layers = meta.layers
        self.centre_weight = meta.centre_weight or 0.0
        self.feature_power = meta.feature_power or 1.0
        self.image_size = meta.image_size
        self.half_backbone = False
        self.bank: Bank | None = None
        self.keep = torch.empty(0)  # (h, w)
        self.normalise = Normalise()

    def forward(
        self, image: torch.Tensor, memory_bank: torch.Tensor, keep: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Score images.

        Args:
            image: (N, S, S, 3) uint8 RGB.
            memory_bank: (M, C) float32.
            keep: (h, w) float32, 1 for patches that count in scores; None: as the model has it.

        Returns:
            Raw scores (N,), raw maps (N, h, w), and the embeddings (N, h*w, C) they come from.
        """
        embedding, (height, width) = self.embed(image)
        score, distance = self.judge(embedding, memory_bank, keep)
        n = embedding.shape[0]  # len() would be a constant of the graph
        return score, distance.reshape(n, height, width), embedding

    def judge(
        self,
        embedding: torch.Tensor,
        memory_bank: torch.Tensor,
        keep: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings (N, P, C) -> raw scores (N,) and the distance of each patch (N, P)."""
        n, patches, channels = embedding.shape
        # Distances do not change when both sides move by the mean; rounding errors shrink.
        mean = memory_bank.mean(dim=0)
        bank = memory_bank - mean
        query = (embedding - mean).reshape(n * patches, channels)
        half_norm = 0.5 * bank.square().sum(dim=1)  # (M,)
        # |q - b|^2 = |q|^2 + 2 (|b|^2 / 2 - q.b)
        nearest = (half_norm - query @ bank.T).amin(dim=1)  # (n*patches,)
        squared = query.square().sum(dim=1) + 2 * nearest
        # Cut off at zero, where rounding may end; a clamp would make a number of NaN in an engine.
        distance = ((squared + squared.abs()) / 2).sqrt().reshape(n, patches)

        counting = that_count(distance, (self.keep if keep is None else keep).reshape(-1))
        decides = counting.argmax(dim=1)  # (n,)
        query = query.reshape(n, patches, channels)[torch.arange(n), decides]  # (n, C)
        near = bank[(half_norm - query @ bank.T).argmin(dim=1)]  # (n, C)
        count = min(NEIGHBOURS, len(memory_bank))
        neighbours = (half_norm - near @ bank.T).topk(count, dim=1, largest=False).indices
        reach = (query[:, None] - bank[neighbours]).square().sum(dim=2).sqrt()  # (n, count)
        weight = 1 - torch.softmax(reach, dim=1)[:, 0]
        return weight * counting.amax(dim=1), distance

    def embed(self, image: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """Images (N, S, S, 3) uint8 -> patch embeddings (N, h*w, C) float32, and (h, w).

        Each place of a layer is averaged with those around it, and other layers are stretched to
        the size of the first one, as in anomalib's PatchcoreModel. Two keys of meta.json go beyond
        that: with `feature_power` p each value x becomes sign(x) |x|^p (power normalisation, as in
        Perronnin et al., ECCV 2010), so that strong edges drown faint differences less; and
        `centre_weight` is the share that a place has beside the average around it.
        """
        x = self.normalise(image)
        features = self.features(x.half() if self.half_backbone else x)
        columns = [self._around(features[layer]) for layer in self.layers]
        size = columns[0].shape[-2:]
        columns = [
            one if one.shape[-2:] == size else functional.interpolate(one, size, mode="bilinear")
            for one in columns
        ]
        embedding = torch.cat(columns, 1).float()  # (N, C, h, w)
        # int(): the sizes of the graph that is exported are fixed, whatever the backbone does.
        channels, height, width = (int(side) for side in embedding.shape[1:])
        return embedding.permute(0, 2, 3, 1).reshape(-1, height * width, channels), (height, width)

    def _around(self, feature: torch.Tensor) -> torch.Tensor:
        """A layer (N, C, h, w), each place with what is around it."""
        if self.feature_power != 1:
            feature = feature.float()
            # As sign(x) |x|^p, but not infinitely steep at 0, where rounding decides.
            feature = feature * (feature.abs() + STEEPEST).pow(self.feature_power - 1)
        around: torch.Tensor = self.pool(feature)
        if self.centre_weight:
            around = self.centre_weight * feature + (1 - self.centre_weight) * around
        return around

    def channels(self) -> int:
        """Columns of an embedding."""
        return sum(self.features.out_dims)


def build(meta: Meta, weights: str | Path | None) -> PatchCore:
    """The model with its backbone and no bank yet; see `backbone.extractor` for `weights`.

    Raises:
        BadMeta: the backbone or its layers are unknown, or cannot take images of that size.
        BadWeights: the weights are not to be had or do not fit.
    """
    model = PatchCore(meta, weights)
    size = meta.image_size
    try:
        with torch.inference_mode():
            embedding, places = model.embed(torch.zeros(1, size, size, 3, dtype=torch.uint8))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise BadMeta(f"{meta.backbone} cannot take images of {size} x {size}: {error}.") from error
    if embedding.shape[2] != model.channels():
        raise BadMeta(f"{meta.backbone} gives features in a form that anomalib does not read.")
    model.keep = torch.ones(places)
    return model


def load(model: PatchCore, path: Path) -> None:
    """Give the model a bank from a file.

    Raises:
        BadBundle: the bank is damaged or was made with another backbone or other layers.
    """
    embeddings = torch.from_numpy(read_bank(path))
    channels = model.channels()
    if embeddings.shape[1] != channels:
        raise BadBundle(
            f"{path} does not fit meta.json: its embeddings have {embeddings.shape[1]} channels,"
            f" and the backbone and layers of meta.json make {channels}."
            " Pass the meta.json that was written with this bank."
        )
    radius = read_coverage_radius(path)
    model.bank = Bank(embeddings, _spacing(embeddings) if radius is None else radius)


def knows(model: PatchCore) -> bool:
    """Whether it has a bank."""
    return model.bank is not None


@dataclass
class Lesson:
    """What was learned from which picture, so that each can be judged as if it had not been.

    Attributes:
        embeddings: (N, P, C) of the pictures.
        before: the bank that was added to, None where it was made from nothing.
        rows: (K,) the patches, counted over all pictures, that are in the bank now.
        owners: (N*P,) which of the K is nearest to each patch; -1 where `before` has a nearer one,
            or the patch never counts.
        pictures: the numbers of the pictures that can be left out: all of them.
    """

    model: PatchCore
    meta: Meta
    embeddings: torch.Tensor
    before: Bank | None
    rows: torch.Tensor
    owners: torch.Tensor
    _without_now: bytes | None = field(default=b"", init=False)  # which pictures `_search` lacks

    @property
    def pictures(self) -> NDArray[np.int64]:
        return np.arange(len(self.embeddings))

    def descriptors(self) -> NDArray[np.float32]:
        """(N, d): what the pictures look like, coarsely."""
        return describe(self.embeddings)

    def describe(self, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(n, d): the same of other pictures (n, S, S, 3), of which there is at least one."""
        return describe_pictures(self.model.embed, pictures)

    def can_spare(self, parts: NDArray[np.int64]) -> bool:
        """Whether something is left to judge by, whichever of the parts (N,) is left out."""
        in_the_bank = parts[(self.rows // self.embeddings.shape[1]).numpy()]
        left = len(in_the_bank) - int(np.bincount(in_the_bank).max(initial=0))
        return self.before is not None or left > 1  # by one row alone everything scores 0

    @on_one_thread  # as fast as on two, and the line has the other one
    def scores(self, parts: NDArray[np.int64], tick: Tick) -> NDArray[np.float64]:
        """Raw scores (N,) by the bank as it would be without the pictures of the same part.

        Args:
            parts: (N,) pictures with the same number are left out together.
        """
        found = np.empty(len(parts))
        assert self.model.bank is not None, "train() gives it one"
        radius = self.model.bank.coverage_radius
        with torch.inference_mode():
            for part in np.unique(parts):
                same = np.flatnonzero(parts == part)
                search, gone = self._without(same), self._gone(self._are(same))
                for number in same:
                    covered = ~gone[self.owners.view(len(parts), -1)[number]]
                    found[number] = search.score(self.embeddings[number], covered, radius)
                tick(int(part) + 1, int(parts.max()) + 1)
        return found

    def judge(self, pictures: NDArray[np.uint8], without: NDArray[np.int64]) -> NDArray[np.float64]:
        """Raw scores (n,) of other pictures (n, S, S, 3) by the bank without some it learned."""
        with torch.inference_mode():
            embeddings = self.model.embed(torch.from_numpy(pictures))[0]
            return scores_of(self._without(without), embeddings)

    def keeping(self, kept: NDArray[np.int64], progress: Progress) -> Lesson:
        """Learn again, from these pictures only."""
        return learn(
            self.model, self.meta, self.embeddings[torch.from_numpy(kept)], self.before, progress
        )

    def _without(self, pictures: NDArray[np.int64]) -> BankSearch:
        """The bank as it would be had some pictures not been learned, until this is called again.

        Their rows cover patches of others as well. In a bank made anew some of these would be rows
        instead; without them the bank has holes, where normal parts score up to a fifth too high.
        So what is farther from the rest than the coverage radius is chosen from in the same way.
        """
        assert self.model.bank is not None, "train() gives it one"
        search, radius = self._search, self.model.bank.coverage_radius
        if pictures.tobytes() == self._without_now:  # again for each defect drawn onto a picture
            return search
        self._without_now, left_out = None, self._are(pictures)
        numbers = self._gone(left_out).nonzero().flatten()
        gone = numbers + len(search) - len(self.rows)  # the newest rows of the bank are these
        patches = self.embeddings.flatten(0, 1)
        search.exchange(gone, patches[:0])
        uncovered = patches[self._uncovered(numbers, left_out, radius)]
        if len(uncovered):
            chunks = torch.split(uncovered, CHUNK)
            away = torch.cat([search.squared(chunk).amin(dim=1) for chunk in chunks])
            chosen = k_centre_greedy(
                uncovered, len(gone), covered_to=away.clamp_min(0).sqrt(), stop_radius=radius
            ).chosen
            search.exchange(gone, uncovered[chosen])
        self._without_now = pictures.tobytes()
        return search

    def _are(self, pictures: NDArray[np.int64]) -> torch.Tensor:
        """Which of all pictures these are: (N,)."""
        found = torch.zeros(len(self.embeddings), dtype=torch.bool)
        found[torch.from_numpy(pictures)] = True
        return found

    def _gone(self, left_out: torch.Tensor) -> torch.Tensor:
        """Which of the K rows are of pictures (N,): (K + 1,), the last for `owners` of -1."""
        of_rows = left_out[self.rows // self.embeddings.shape[1]]
        return torch.cat([of_rows, left_out.new_zeros(1)])

    def _uncovered(self, gone: torch.Tensor, left_out: torch.Tensor, radius: float) -> torch.Tensor:
        """Patches (n,), counted over all, that nothing covers but some of the K rows.

        By the triangle only rows may cover a patch that lie no farther from the row that it had
        than the patch and the radius together: a few in a hundred of all.

        Args:
            gone: (k,) of the K.
            left_out: (N,) pictures whose patches do not matter.
        """
        patches, places = self.embeddings.flatten(0, 1), self.embeddings.shape[1]
        search, (by_row, ends) = self._search, self._owned
        is_out, left = left_out.numpy(), [by_row[:0]]
        for few in torch.split(gone, FEW):
            rows = patches[self.rows[few]]
            to_all = search.squared(rows).numpy()
            for number, row, to_others in zip(few.tolist(), rows.numpy(), to_all, strict=True):
                own = by_row[ends[number] : ends[number + 1]]
                own = own[~is_out[own // places]]
                if not len(own):
                    continue
                its = patches.numpy().take(own, axis=0)
                reach = np.sqrt(np.square(its - row).sum(axis=1).max()) + radius
                near = np.flatnonzero(to_others <= reach**2)
                left.append(own[~search.covers(its, near, radius)])
        return torch.from_numpy(np.concatenate(left))

    @cached_property
    def _owned(self) -> tuple[NDArray[np.int64], list[int]]:
        """The patches by the row that is nearest; those of the k-th begin and end at [k], [k+1]."""
        counts = torch.bincount(self.owners + 1, minlength=len(self.rows) + 1)
        return self.owners.argsort().numpy(), counts.cumsum(0).tolist()

    @cached_property
    def _search(self) -> BankSearch:
        assert self.model.bank is not None, "train() gives it one"
        return BankSearch(self.model.bank.embeddings, self.model.keep)


def train(
    model: PatchCore, meta: Meta, batches: Batches, how: Training, progress: Progress
) -> Lesson:
    """Learn a bank from nothing: all patches of all images, thinned to `coreset_ratio`.

    Args:
        batches: uint8 arrays (N, S, S, 3) of normal parts.

    Raises:
        BadDataset: there was no image.
    """
    return learn(model, meta, _embed_all(model, batches), None, progress)


def update(
    model: PatchCore, meta: Meta, batches: Batches, how: Training, progress: Progress
) -> Lesson:
    """Keep what the bank knows and add the patches of new images that it does not cover yet.

    A patch is covered when it lies no farther from the bank than the farthest patch of the first
    training did. At the most `coreset_ratio` of the new patches are added.

    Raises:
        BadDataset: there was no image.
    """
    assert model.bank is not None, "load a bank, or train one, first"
    return learn(model, meta, _embed_all(model, batches), model.bank, progress)


def learn(
    model: PatchCore, meta: Meta, embeddings: torch.Tensor, before: Bank | None, progress: Progress
) -> Lesson:
    """Give the model the bank that comes of embeddings (N, P, C), on top of one or of nothing.

    Patches that never count are not learned.
    """
    patches = embeddings.flatten(0, 1)
    numbers = torch.arange(len(patches))
    if not model.keep.all():  # else it would be a copy for nothing
        numbers = numbers[model.keep.bool().flatten().repeat(len(embeddings))]
        patches = patches[numbers]
    count = max(1, int(len(patches) * _ratio(meta)))
    report = progress.phase("coreset")
    if before is None:
        rows, radius, owners = k_centre_greedy(patches, count, report=report)
        model.bank = Bank(patches[rows], radius)
    else:
        known, radius = before.embeddings, before.coverage_radius
        mean = known.mean(dim=0)  # distances do not change, rounding errors shrink
        centred = known - mean
        chunks = torch.split(patches, CHUNK)
        covered_to = torch.cat([_distance(chunk - mean, centred, radius) for chunk in chunks])
        rows, new_radius, owners = k_centre_greedy(
            patches, count, covered_to=covered_to, stop_radius=radius, report=report
        )
        model.bank = Bank(torch.cat([known, patches[rows]]), max(radius, new_radius))
    of_all = torch.full((embeddings.shape[0] * embeddings.shape[1],), -1)
    of_all[numbers] = owners
    return Lesson(model, meta, embeddings, before, numbers[rows], of_all)


def scores(model: PatchCore, batches: Batches) -> NDArray[np.float32]:
    """Raw scores (n,) of images (N, S, S, 3) uint8 in batches."""
    assert model.bank is not None, "load a bank, or train one, first"
    found = [np.empty(0)]
    with torch.inference_mode():
        search = BankSearch(model.bank.embeddings, model.keep)
        for batch in batches:
            few = torch.split(torch.from_numpy(batch), TOGETHER) if len(batch) else ()
            found += [scores_of(search, model.embed(some)[0]) for some in few]
    return np.concatenate(found).astype(np.float32)


def summary(model: PatchCore) -> dict[str, Any]:
    """What report.json says of the bank."""
    assert model.bank is not None, "load a bank, or train one, first"
    rows, channels = model.bank.embeddings.shape
    return {
        "memory_bank": {
            "rows": rows,
            "channels": channels,
            "mib": round(rows * channels * 4 / 2**20, 1),
            "coverage_radius": model.bank.coverage_radius,
        }
    }


def save(model: PatchCore, meta: Meta, folder: Path) -> list[str]:
    """Write the files to retrain from into a folder, and return their names."""
    assert model.bank is not None, "load a bank, or train one, first"
    assert meta.memory_bank is not None, "Meta requires it of a patchcore model"
    state = model.features.feature_extractor.state_dict()
    write_weights(folder / meta.weights_pth, meta, state)
    bank = model.bank.embeddings.numpy()
    write_bank(folder / meta.memory_bank, bank, model.bank.coverage_radius)
    return [meta.weights_pth, meta.memory_bank]


@torch.inference_mode()
def _embed_all(model: PatchCore, batches: Batches) -> torch.Tensor:
    """All patch embeddings of all images, (N, P, C)."""
    embeddings = [model.embed(torch.from_numpy(batch))[0] for batch in batches]
    if not embeddings:
        raise BadDataset("There is no usable training image, so nothing can be learned.")
    return torch.cat(embeddings)


def _distance(patches: torch.Tensor, bank: torch.Tensor, enough: float) -> torch.Tensor:
    """Distance of each patch (n, C) to the nearest row of a bank (M, C): (n,).

    Of a patch that lies within `enough` of a row among the first, which cover most, to that one.
    """
    first, others = bank[: len(bank) // 4], bank[len(bank) // 4 :]
    nearest = torch.full((len(patches),), torch.inf)
    if len(first):
        nearest = torch.cdist(patches, first).amin(dim=1)
    far = nearest > enough
    if far.any():
        last = torch.cdist(patches[far], others).amin(dim=1)
        nearest[far] = torch.minimum(nearest[far], last)
    return nearest


def _spacing(bank: torch.Tensor) -> float:
    """The coverage radius of a bank that does not say its own.

    k-centre greedy chooses each row at least as far from the others as the radius in the end. So
    nearly all rows lie farther than that from their nearest neighbour; 1 % for other makers' ways.
    """
    if len(bank) < 2:
        return 0.0
    chunks = torch.split(bank, CHUNK)
    nearest = [torch.cdist(rows, bank).topk(2, largest=False).values[:, 1] for rows in chunks]
    return float(torch.cat(nearest).quantile(0.01))


def _ratio(meta: Meta) -> float:
    assert meta.coreset_ratio is not None, "Meta requires it of a patchcore model"
    return meta.coreset_ratio


def graph(model: PatchCore, *, half: bool) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """What is exported: the module, and an example of each of its inputs by name.

    With `half` the backbone becomes float16 for good; the search stays in float32.
    """
    assert model.bank is not None, "load a bank, or train one, first"
    if half:
        model.features.half()
        model.half_backbone = True
    image = torch.zeros(2, model.image_size, model.image_size, 3, dtype=torch.uint8)
    return model, {"image": image, "memory_bank": model.bank.embeddings, "keep": model.keep}
