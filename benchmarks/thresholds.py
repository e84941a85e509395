"""Does the threshold hold? Random draws of normal pictures, and what it does to all the others.

    python -m benchmarks.thresholds [--sets alien,biscuit] [--backbones resnet18] [--kinds padim]
                                    [--normals 10,20] [--draws 10]

docs/models.md says what the columns mean. The soak tests promise what is in them.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import ASSETS, begin, print_load, print_machine, print_table
from benchmarks.drawn_parts import KINDS as DRAWN
from benchmarks.drawn_parts import defective, normal
from engines.meta import FIRST
from engines.promise import FEW_FOUND

PHOTOS = ("alien", "cookie", "hazelnut_toy")
BACKBONES: dict[str, dict[str, Any]] = {
    "resnet18": {"layers": ["layer2", "layer3"]},
    "mobilenetv2_100": {"layers": ["blocks.2", "blocks.4"]},
    FIRST["backbone"]: {key: FIRST[key] for key in ("layers", "centre_weight", "feature_power")},
}
ONE_MORE = {  # PaDiM's first layer
    "resnet18": "layer1",
    "mobilenetv2_100": "blocks.1",
    "tf_efficientnet_lite0": "blocks.1",
}
SIDE, RATIO, CHANNELS = 256, 0.1, 100
NORMALS, DEFECTS = 80, 60  # of the drawn parts
MOST_OTHERS = 60

Scores = NDArray[np.float64]
Limit = Callable[[Scores], float]


@dataclass(frozen=True)
class Pictures:
    """A set of parts, as the model sees them."""

    normal: NDArray[np.uint8]
    defective: NDArray[np.uint8]


@dataclass(frozen=True)
class Draw:
    """One draw of normals, and the scores of everything else by the model that learned them."""

    left_out: Scores  # of those that were learned, each without itself
    parts: NDArray[np.int64]
    others: Scores  # normals
    defects: Scores
    drawn: list[tuple[Any, float]]


class Contestant:
    """One kind of model on one backbone; the features of all pictures are computed once."""

    def __init__(self, kind: str, backbone: str, pictures: Pictures, weights: Path | None) -> None:
        from engines.meta import Meta
        from workers import models

        known: dict[str, Any] = {"coreset_ratio": RATIO, **BACKBONES[backbone]}
        if kind == "padim":
            layers = [ONE_MORE[backbone], *BACKBONES[backbone]["layers"]]
            known = {"n_features": CHANNELS, "layers": layers}
        self.meta = Meta.parse(
            {"model": kind, "backbone": backbone, "image_size": SIDE, "bit_depth": 8, **known}
        )
        self.kind: Any = models.module(kind)
        self.model = self.kind.build(self.meta, weights)
        self.pictures = pictures
        self.normal, self.defective = self.embed(pictures.normal), self.embed(pictures.defective)

    def embed(self, pictures: NDArray[np.uint8]) -> Any:
        """Embeddings (n, P, C)."""
        import torch

        with torch.inference_mode():
            batches = [pictures[i : i + 4] for i in range(0, len(pictures), 4)]
            return torch.cat([self.model.embed(torch.from_numpy(one))[0] for one in batches])

    def learn(self, embeddings: Any, before: Any = None) -> Any:
        """The lesson of embeddings, on top of a bank or statistics, or of nothing."""
        from workers.models import padim
        from workers.models.padim_gaussians import LeftOut, Stats
        from workers.progress import Progress

        if self.meta.model == "patchcore":
            quiet = Progress(quiet=True)
            return self.kind.learn(self.model, self.meta, embeddings, before, quiet)
        stats = Stats.of(embeddings)
        stats = stats if before is None else before.merged(stats)
        self.model.learn(stats)
        numbers = np.arange(len(embeddings))
        return padim.Lesson(self.model, embeddings, numbers, stats, LeftOut(stats))

    def lesson(
        self, embeddings: Any, before: Any = None, known: Any = None
    ) -> tuple[Any, NDArray[np.int64], Scores, NDArray[np.int64]]:
        """What is learned as retrain.py does it: the lesson, parts, scores, and who was strange."""
        from engines.store.known_scores import KnownScores
        from workers.learning.same_part import same_part
        from workers.learning.strange import strange
        from workers.progress import Progress

        lesson = self.learn(embeddings, before)
        parts = same_part(lesson.descriptors())
        scores = lesson.scores(parts, lambda done, total: None)
        found = strange(scores, known or KnownScores.none(), self.kind.USUAL_SCALE)
        if len(found):
            kept = np.setdiff1d(np.arange(len(scores)), found)
            lesson = lesson.keeping(kept, Progress(quiet=True))
            parts = same_part(lesson.descriptors())
            scores = lesson.scores(parts, lambda done, total: None)
        return lesson, parts, scores, found

    def judge(self, embeddings: Any) -> Scores:
        """Raw scores (n,) of embeddings, by what was learned last."""
        import torch

        with torch.inference_mode():
            if self.meta.model == "patchcore":
                bank = self.model.bank.embeddings
                return np.array([float(self.model.judge(e[None], bank)[0]) for e in embeddings])
            away = (embeddings - self.model.mean).permute(1, 2, 0)
            distances = (self.model.whitening @ away).square().sum(dim=1).sqrt().T
            return np.asarray(self.model.highest(distances).double())

    def limit(self, scores: Scores) -> float:
        """The limit of Kensa for 1 % of false rejects."""
        from workers.learning.normal_scores import NormalScores

        return NormalScores.of(scores, usual_scale=self.kind.USUAL_SCALE).limit(0.01)

    def draw(self, normals: int, seed: int, *, with_drawn: bool = True) -> Draw:
        """Learn some normals, and score all the others."""
        from workers.learning.eyesight import drawn_scores
        from workers.learning.normals import to_draw_on

        order = np.random.default_rng([normals, seed]).permutation(len(self.normal))
        learned, others = order[:normals], order[normals : normals + MOST_OTHERS]
        lesson, parts, left_out, strange = self.lesson(self.normal[learned])
        learned = np.delete(learned, strange)
        on = to_draw_on(parts, left_out, left_out)
        drawn = drawn_scores(
            self.pictures.normal[learned[on]],
            lambda drawn, number: lesson.judge(
                drawn, np.flatnonzero(parts == parts[on[number]])
            ),
            lambda done, total: None,
        ) if with_drawn else []  # fmt: skip
        return Draw(
            left_out,
            parts,
            self.judge(self.normal[others]),
            self.judge(self.defective),
            drawn,
        )


@dataclass(frozen=True)
class Update:
    """What an update did."""

    named: set[int]  # strange ones, by their place among the new
    missed: tuple[int, int]  # of the defects, before and after
    rejects: tuple[float, float]  # share of the normals that are looked at, before and after


def update(one: Contestant, known: Any, new: Any, others: Any, defects: Any) -> Update:
    """Learn embeddings, add others, and judge normals and defects with the limits of both."""
    from engines.store.known_scores import KnownScores

    def what() -> Any:
        return one.model.bank if one.meta.model == "patchcore" else one.model.stats

    def look(limit: float) -> tuple[float, int]:
        return float((one.judge(others) > limit).mean()), int((one.judge(defects) <= limit).sum())

    _, parts, scores, _ = one.lesson(known)
    first = KnownScores(scores, parts)
    rejects_before, missed_before = look(one.limit(first.scores))
    _, parts, scores, strange = one.lesson(new, what(), first)
    both = first.followed_by(KnownScores(scores, parts))
    rejects_after, missed_after = look(one.limit(both.scores))
    return Update(
        {int(number) for number in strange},
        (missed_before, missed_after),
        (rejects_before, rejects_after),
    )


@dataclass(frozen=True)
class Found:
    """What a limit does, over all draws: shares of other normals and of defects."""

    false_rejects: float
    misses: float
    best: float  # what one limit for all draws with as many false rejects would miss
    blind: int  # draws in which more than nine in ten defects are missed
    unsaid: int  # of these, how many the drawn defects had not told before
    held: int  # draws that the drawn defects would hold

    def holds(self, normals: int) -> bool:
        """Whether it misses few more than the best one."""
        factor = 1.3 if normals >= 20 else 1.6
        return self.misses <= max(factor * self.best, self.best + 0.05)


def weigh(draws: list[Draw], limit: Limit) -> Found:
    """Judge a way to find the limit."""
    from workers.learning.eyesight import eyesight

    limits = [limit(draw.left_out) for draw in draws]
    rejects = float(np.mean([(d.others > at).mean() for d, at in zip(draws, limits, strict=True)]))
    missed = [d.defects <= at for d, at in zip(draws, limits, strict=True)]
    every = np.sort(np.concatenate([draw.others for draw in draws]))[::-1]
    as_many = every[min(round(rejects * len(every)), len(every) - 1)]
    shares = [
        eyesight(draw.drawn, at)["share"] if draw.drawn else 1.0
        for draw, at in zip(draws, limits, strict=True)
    ]
    blind = np.array([one.mean() > 0.9 for one in missed])
    return Found(
        rejects,
        float(np.mean(missed)),  # of all at once: the mean of means is off by its last bit
        float(np.mean([draw.defects <= as_many for draw in draws])),
        int(blind.sum()),
        sum(share >= FEW_FOUND for share, is_blind in zip(shares, blind, strict=True) if is_blind),
        sum(share < FEW_FOUND for share in shares),
    )


def normal_limit(scores: Scores) -> float:
    """As if scores were normally distributed: mean + t * s * sqrt(1 + 1/n)."""
    from scipy.stats import t

    n = len(scores)
    factor = t.ppf(0.99, n - 1) * math.sqrt(1 + 1 / n)
    return float(scores.mean() + factor * scores.std(ddof=1))


def lognormal_limit(scores: Scores) -> float:
    """The same of the logarithms: for scores that are skewed."""
    return math.exp(normal_limit(np.log(scores)))


def fitted_tail(scores: Scores) -> float:
    """The most likely Gumbel distribution, believed."""
    from scipy.stats import gumbel_r

    location, scale = gumbel_r.fit(scores)
    return float(location - scale * math.log(-math.log(0.99)))


def highest(scores: Scores) -> float:
    """The highest score: an order statistic."""
    return float(scores.max())


def of_four(scores: Scores) -> float:
    """As Kensa did before: a normal limit from a fifth of the scores."""
    return normal_limit(scores[:: max(1, len(scores) // max(4, round(len(scores) / 5)))])


OTHER_WAYS: dict[str, Limit] = {
    "normal limit": normal_limit,
    "log-normal limit": lognormal_limit,
    "fitted Gumbel": fitted_tail,
    "highest score": highest,
    "normal limit, a fifth held out (before)": of_four,
}


@lru_cache(maxsize=2)
def pictures_of(name: str) -> Pictures:
    """Photos of the assets, or drawn parts."""
    if name in DRAWN:
        return Pictures(
            np.stack([normal(name, seed, SIDE) for seed in range(NORMALS)]),
            np.stack([defective(name, seed, SIDE)[0] for seed in range(DEFECTS)]),
        )
    from engines import image
    from workers.learning.dataset import Category

    category = Category.find(ASSETS / "data", name)

    def load(paths: list[Path]) -> NDArray[np.uint8]:
        return np.stack([image.load(path.read_bytes(), SIDE, bit_depth=8) for path in paths])

    return Pictures(
        load([*category.train, *category.test_normal]), load(list(category.test_anomaly))
    )


def contestant(kind: str, backbone: str, name: str) -> Contestant:
    """A kind of model on a backbone of the assets, or of a package, with the pictures of a set."""
    weights = ASSETS / "weights" / f"{backbone}.safetensors"
    given = weights if weights.is_file() else None
    return Contestant(kind, backbone, pictures_of(name), given)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.thresholds", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("--sets", default=",".join((*PHOTOS, *DRAWN)), help="of photos or drawn parts")
    add(
        "--backbones",
        default=",".join(BACKBONES),
        help="whose weights are in the assets, or in an installed package",
    )
    add("--kinds", default="patchcore,padim", help="of models")
    add("--normals", default="5,10,20,40", help="how many are learned")
    add("--draws", type=int, default=10, help="random ones for each")
    flags = parser.parse_args()
    begin()
    if not (ASSETS / "weights").is_dir():
        sys.exit(f"{ASSETS} holds no weights: set KENSA_ASSETS.")
    print_machine(["anomalib", "torch"])
    counts = [int(one) for one in flags.normals.split(",")]
    for kind in flags.kinds.split(","):
        for normals in counts:
            rows = list(_rows(kind, normals, flags))
            columns = ["false rejects", "misses", "best", "over 9 in 10 missed", "held"]
            print_table(f"{kind}, {normals} normals", ["set", "limit", *columns], rows)
    print_load("after")


def _rows(kind: str, normals: int, flags: argparse.Namespace) -> Iterator[list[str]]:
    for backbone in flags.backbones.split(","):
        for name in flags.sets.split(","):
            one = contestant(kind, backbone, name)
            if len(one.normal) < normals + 8:
                continue
            draws = [one.draw(normals, seed) for seed in range(flags.draws)]
            for way, limit in {"Kensa": one.limit, **OTHER_WAYS}.items():
                found = weigh(draws, limit)
                yield [
                    f"{name} {backbone}",
                    way + ("" if found.holds(normals) else " *"),
                    f"{found.false_rejects:.1%}",
                    f"{found.misses:.0%}",
                    f"{found.best:.0%}",
                    f"{found.blind}, {found.unsaid} unsaid",
                    f"{found.held} of {len(draws)}",
                ]


if __name__ == "__main__":
    main()
