"""What the pictures of a training look like, so that one of another kind is known on the line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engines.camera import LEAST, NAMES, PLACED, SIDE, Camera, Learned, Reference, Small, Values


class Look(NamedTuple):
    """A picture that was read."""

    width: int
    height: int
    values: Values
    small: Small


def learn(
    looks: Iterable[Look], before: Camera | None, scores: NDArray[np.float64]
) -> Camera | None:
    """What pictures of good parts look like; None where there are too few to say.

    Each is placed on the mean of the others, as a new one will be on that of all.

    Args:
        looks: of those that `before` does not know.
        before: what an update goes on from.
        scores: raw scores of parts that the model had not learned, all that are known.
    """
    new = list(looks)
    known = before.pictures if before is not None else 0
    pictures = known + len(new)
    if pictures < LEAST:
        return before
    total = np.zeros((SIDE, SIDE))
    for one in new:
        total += one.small
    if before is not None:
        total = total + known * before.mean.astype(np.float64)
    sizes = Counter((one.width, one.height) for one in new)
    size = sizes.most_common(1)[0][0] if new else (1, 1)
    if before is not None and sizes[size] < known:
        size = before.size
    values = np.array([_placed(one, total, pictures, size) for one in new])  # (n, numbers)
    statistics = {}
    for number, name in enumerate(NAMES):
        now = Learned.of(values[:, number]) if new else None
        then = before.statistics.get(name) if before is not None else None
        merged = then.merged(now) if then is not None else now
        if merged is not None:
            statistics[name] = merged
    of_scores = Learned.of(scores)
    if of_scores is not None:
        statistics["score"] = of_scores
    mean = (total / pictures).astype(np.float32)
    return Camera(statistics, pictures, size, mean)


def _placed(look: Look, total: NDArray[np.float64], pictures: int, size: tuple[int, int]) -> Values:
    others = ((total - look.small) / (pictures - 1)).astype(np.float32)
    place = Reference(others, size[0] / size[1]).place(look.small)
    values = np.array(look.values)
    values[[NAMES.index(name) for name in PLACED]] = place
    return values
