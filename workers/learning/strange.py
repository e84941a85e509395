"""Pictures among the new ones that are unlike the others, and unlike what is known."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engines.store.known_scores import KnownScores
from workers.learning.normal_scores import NormalScores

MOST = 0.15  # share of the pictures: what is more frequent is how parts vary
LEAST = 8  # pictures, fewer of which do not say what is usual
ODDS = 0.005  # of a normal part to score as high, where earlier ones are known
ODDS_ALONE = 0.001  # where none are


def strange(scores: NDArray[np.float64], known: KnownScores) -> NDArray[np.int64]:
    """Which pictures score, by a model without them, as hardly any normal part would.

    The highest scores are not believed to be of normal parts: two defective pictures among twenty
    would make room for themselves. New light or a new place raises all scores: then those that are
    known are raised as much before they are compared.

    Args:
        scores: (n,) of the new pictures.
        known: of earlier ones.

    Returns:
        Indices of the strange ones, ascending.
    """
    unsure = int(MOST * len(scores))
    if len(scores) < LEAST or not unsure or _alike(scores, unsure):
        return np.empty(0, np.int64)
    raised, odds = np.empty(0), ODDS_ALONE
    if len(known) >= LEAST:
        raised, odds = known.scores * max(1.0, np.median(scores) / np.median(known.scores)), ODDS
    limit = NormalScores.of(np.concatenate([raised, scores]), unsure).limit(odds)
    if len(raised):
        limit = max(limit, float(np.sort(raised)[-2]))  # two that are known are as high
    found = np.flatnonzero(scores > limit)
    return found if len(found) <= unsure else np.empty(0, np.int64)


def _alike(scores: NDArray[np.float64], unsure: int) -> bool:
    """Whether those that are believed are all the same."""
    sure = np.sort(scores)[: len(scores) - unsure]
    return bool(sure[0] == sure[-1])
