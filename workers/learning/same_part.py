"""Which pictures show one part: a score of one says little once the model has learned another."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components

from engines.store.known_scores import LOOK

# As shares of the distance between pictures of different parts (docs/models.md has the figures).
NEAR = 0.42  # nearly equal, wherever they stand
AGAIN = 0.25  # the same picture, saved again; coarse JPEGs differ by more
NEAR_IN_A_ROW = 0.6  # taken one after the other: turned a little, or under other light
# Percentile of all distances: what lies between different parts. Two parts have half of them, and
# strange pictures, up to 15 % of all, have 28 % that must not be taken for what is usual.
DIFFERENT = 70


def same_part(descriptors: NDArray[np.float32]) -> NDArray[np.int64]:
    """Number the parts that pictures show.

    Pictures that lie near each other, and those that lie near one of these, are of one part.

    Args:
        descriptors: (n, d), one row per picture, in the order in which they were taken.

    Returns:
        (n,) numbers from 0, in the order of the first pictures.
    """
    n = len(descriptors)
    if n < 3:  # nothing to compare a distance with
        return np.arange(n)
    distance = _distances(descriptors.astype(np.float64))
    usual = np.percentile(distance[np.triu_indices(n, 1)], DIFFERENT)
    near = distance <= NEAR * usual
    rows = np.arange(n - 1)
    near[rows, rows + 1] |= distance[rows, rows + 1] <= NEAR_IN_A_ROW * usual
    return np.asarray(connected_components(near, directed=False)[1], np.int64)


def looks(descriptors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Descriptors (n, d) in a form short enough to keep: (n, LOOK).

    A random projection keeps distances (Johnson and Lindenstrauss, 1984), here within a tenth or
    so. The numbers of RandomState are the same in every numpy.
    """
    random = np.random.RandomState(0).standard_normal((descriptors.shape[1], LOOK))
    projected = descriptors @ (random / np.sqrt(LOOK)).astype(np.float32)
    return np.asarray(projected, np.float32)


def known_again(new: NDArray[np.float32], known: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which of the new pictures (n,) are copies of one that is known, in other files.

    Args:
        new, known: looks (n, LOOK) and (m, LOOK); NaN where nobody knows.
    """
    known = known[np.isfinite(known).all(axis=1)]
    if not len(known) or len(known) + len(new) < 3:
        return np.zeros(len(new), bool)
    distance = _distances(np.concatenate([new, known]).astype(np.float64))
    usual = np.percentile(distance[np.triu_indices(len(distance), 1)], DIFFERENT)
    nearest = distance[: len(new), len(new) :].min(axis=1)
    return np.asarray(nearest <= AGAIN * usual, np.bool_)


def _distances(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Between all rows (n, d): (n, n)."""
    rows = rows - rows.mean(axis=0)
    square = (rows**2).sum(axis=1)
    squared: NDArray[np.float64] = np.maximum(square[:, None] + square - 2 * rows @ rows.T, 0)
    return np.asarray(np.sqrt(squared))
