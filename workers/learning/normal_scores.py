"""How high a normal part may score: the limit for a budget of false rejects, and what it promises.

The score of a picture is the largest of its patches' distances, and largest values of many are
distributed as Gumbel found (Fisher and Tippett, 1928). Location and scale come from few pictures,
so they are not estimated and then believed: what is known of them is a posterior over both, and the
limit is the one that the next normal part exceeds with the budget's probability (Aitchison and
Dunsmore, Statistical Prediction Analysis, 1975, ch. 2). docs/models.md compares it with others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv  # scipy.stats takes long to load

from engines.errors import BadDataset

CONFIDENCE = 0.95
BUDGETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)  # of the table in meta.json

# What is known before a score was seen: how far scores spread, as a share of the median, differs
# between kinds of models, and from part to part (docs/models.md). From twenty pictures on they
# decide.
USUAL_SCALE, ITS_LOG_SPREAD = 0.05, 0.35
NOT_FINITE = "The model gives scores that are not finite: its weights are damaged."
EASY = 0.15  # share of the lowest scores of which only that they are low is believed: the tail is
# at the other end, and a picture that is nearly one of the others would make it wider
ENOUGH = 3  # scores above a limit that may be chance; more are believed
NEGLIGIBLE = 1e-9  # of the likeliest pair's weight

_LOCATIONS = np.linspace(0.4, 2.0, 401)[:, None]  # as shares of the median
_SCALES = np.exp(np.linspace(math.log(0.002), math.log(0.8), 241))[None, :]

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class NormalScores:
    """What is known of the scores of normal parts.

    Attributes:
        locations, scales: (k,) of Gumbel distributions that may be the one, raw scores.
        weights: (k,) the probability of each, summing to 1.
        ordered: (n,) the scores that are believed, ascending.
    """

    locations: NDArray[np.float64]
    scales: NDArray[np.float64]
    weights: NDArray[np.float64]
    ordered: Scores

    @classmethod
    def of(cls, scores: Scores, unsure: int = 0, usual_scale: float = USUAL_SCALE) -> NormalScores:
        """Learn from raw scores (n,) of pictures that the model had not learned.

        Args:
            unsure: of so many of the highest ones only that they are high is believed: they may be
                no normal parts. Fewer than n.
            usual_scale: what the scale is expected to be, as a share of the median score.

        Raises:
            BadDataset: fewer than two scores, or scores that are all the same or not finite.
        """
        ordered = np.sort(np.asarray(scores, np.float64))
        _check(ordered)
        origin = min(0.0, float(ordered[0]))  # distances are above nothing, other scores may not be
        above = ordered - origin
        median = float(np.median(above)) or float(above.mean())
        easy = int(EASY * len(above))
        sure = above[easy : len(above) - unsure] / median
        reach = _LOCATIONS / _SCALES
        # exp(mu/s) * sum(exp(-x/s)), with the largest exponent taken out of the sum
        lowest = sure[0]
        tails = easy + np.exp((lowest - sure[:, None]) / _SCALES).sum(axis=0, keepdims=True)
        log_likelihood = (
            len(sure) * (reach - np.log(_SCALES) - sure.mean() / _SCALES)
            - np.exp(np.minimum(reach - lowest / _SCALES, 700)) * tails
        )
        if unsure:
            log_likelihood += unsure * np.log(_exceeds(_LOCATIONS, _SCALES, sure[-1]))
        prior = np.log(_SCALES / usual_scale) / ITS_LOG_SPREAD
        log_posterior = log_likelihood - prior**2 / 2
        weights = np.exp(log_posterior - log_posterior.max())
        at, of = np.nonzero(weights > NEGLIGIBLE)
        weights = weights[at, of]
        locations, scales = origin + median * _LOCATIONS[at, 0], median * _SCALES[0, of]
        believed = ordered[: len(ordered) - unsure]
        return cls(locations, scales, weights / weights.sum(), believed)

    @property
    def scale(self) -> float:
        """What the scale is expected to be, as a share of the median score."""
        return float(self.weights @ self.scales / np.median(self.ordered))

    def exceeded(self, limit: float) -> float:
        """The probability that the next normal part scores above a raw score."""
        return float(self.weights @ _exceeds(self.locations, self.scales, limit))

    def limit(self, false_rejects: float) -> float:
        """The raw score that the next normal part exceeds with this probability, within (0, 1).

        As soon as there are enough scores to say it without a distribution, theirs counts: of n + 1
        parts each is the one with the k-th highest score equally often.
        """
        low, high = min(0.0, float(self.ordered[0])), float(self.locations.max())
        step = float(self.scales.max())
        while self.exceeded(high) > false_rejects:
            low, high, step = high, high + step, 2 * step
        for _ in range(50):  # halving: to the last digit
            middle = (low + high) / 2
            low, high = (middle, high) if self.exceeded(middle) > false_rejects else (low, middle)
        count = len(self.ordered)
        if (rank := int(false_rejects * (count + 1))) >= 1:
            high = min(high, float(self.ordered[-rank]))
        above = max(ENOUGH, int(false_rejects * count))
        return max(high, float(self.ordered[-above - 1])) if above < count else high


def at_most(rejected: int, parts: int) -> float:
    """The share of false rejects that, with 95 % confidence, is not exceeded.

    Exact, whatever the scores' distribution (Clopper and Pearson, 1934): the share of normal parts
    above the k-th highest of n scores follows a beta distribution.

    Args:
        rejected: how many of the parts score above the limit.
        parts: independent ones; pictures of one part count once.
    """
    if rejected >= parts:
        return 1.0
    return float(betaincinv(rejected + 1, parts - rejected, CONFIDENCE))


def at_least(rejected: int, parts: int) -> float:
    """The share of false rejects that, with 95 % confidence, there are at least; see `at_most`."""
    if rejected == 0:
        return 0.0
    return float(betaincinv(rejected, parts - rejected + 1, 1 - CONFIDENCE))


def parts_for(false_rejects: float) -> int:
    """How many parts without a false reject would promise this budget."""
    return math.ceil(math.log(1 - CONFIDENCE) / math.log1p(-false_rejects))


def _exceeds(
    locations: NDArray[np.float64], scales: NDArray[np.float64], score: float
) -> NDArray[np.float64]:
    """P(a score > this one) for each pair of location and scale."""
    inner = np.exp(np.minimum((locations - score) / scales, 700))
    return np.maximum(-np.expm1(-inner), 1e-300)


def _check(ordered: Scores) -> None:
    if not np.isfinite(ordered).all():
        raise BadDataset(NOT_FINITE)
    if len(ordered) < 2:
        raise BadDataset(
            "A threshold needs at least 2 normal images that the model did not learn: add images to"
            " train/, or put normal images into test/<category>/normal. Pictures of one part, and"
            " copies, count as one image."
        )
    if ordered[0] == ordered[-1]:
        raise BadDataset("All normal images score alike: check that they are not copies of one.")
