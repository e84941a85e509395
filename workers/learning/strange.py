"""Pictures among the new ones that are unlike the others, and unlike what is known."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engines.store.known_scores import KnownScores
from workers.learning.normal_scores import NormalScores

MOST = 0.15  # share of the pictures: what is more frequent is how parts vary
LEAST = 8  # pictures, fewer of which do not say what is usual
ODDS = 0.001  # of a normal part to score as high


def strange(scores: NDArray[np.float64], known: KnownScores) -> NDArray[np.int64]:
    """Which pictures score, by a model without them, as hardly any normal part would.

    The highest scores are not believed to be of normal parts: two defective pictures among twenty
    would make room for themselves. New light or a new place raises all scores, so the others among
    the new ones have to be lower, and not only the known ones.

    Args:
        scores: (n,) of the new pictures.
        known: of earlier ones.

    Returns:
        Indices of the strange ones, ascending.
    """
    unsure = int(MOST * len(scores))
    if len(scores) < LEAST or not unsure or _alike(scores, unsure):
        return np.empty(0, np.int64)
    limit = NormalScores.of(scores, unsure).limit(ODDS)
    if len(known) >= LEAST:
        both = NormalScores.of(np.concatenate([known.scores, scores]), unsure)
        limit = max(limit, both.limit(ODDS))
    found = np.flatnonzero(scores > limit)
    return found if len(found) <= unsure else np.empty(0, np.int64)


def _alike(scores: NDArray[np.float64], unsure: int) -> bool:
    """Whether those that are believed are all the same."""
    sure = np.sort(scores)[: len(scores) - unsure]
    return bool(sure[0] == sure[-1])
