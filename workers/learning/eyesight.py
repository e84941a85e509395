"""Whether a model sees at all: the share of drawn defects that it finds, on parts it does not know.

A threshold from normal parts alone says nothing of defects. So some are drawn onto normal pictures,
each judged by a model that has not learned the picture that it is drawn on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.learning.drawn_defects import DEFECTS, Drawn, draw, on_the_part
from workers.progress import Tick

# What any model has to find: faint and tiny ones are drawn as well, and reported, but good models
# miss them, too (docs/models.md).
STRONG, LEAST_SIDE = "strong", 0.02
STRONG_TWICE = (*DEFECTS, *(what for what in DEFECTS if what.strength == STRONG))

TOGETHER = 4  # pictures that are judged at once: more gain nothing, and take memory

# Pictures (n, S, S, 3), n at least 1, and on which one all of them are drawn -> raw scores (n,).
Judge = Callable[[NDArray[np.uint8], int], NDArray[np.floating[Any]]]


def drawn_scores(
    pictures: NDArray[np.uint8],
    judge: Judge,
    tick: Tick,
    counting: NDArray[np.bool_] | None = None,
) -> list[tuple[Drawn, float]]:
    """Draw defects onto normal pictures (n, S, S, 3) in turn, and judge them: raw scores.

    Each has its middle on a pixel that counts (S, S); None: all do. Where none of a part does, it
    lies beside the part.
    """
    found, done = dict[int, float](), 0
    for on, picture in enumerate(pictures[: len(STRONG_TWICE)]):
        where = on_the_part(picture[None])
        if counting is not None:
            where = where & counting if (where & counting).any() else counting
        numbers = range(on, len(STRONG_TWICE), len(pictures))
        for some in (numbers[at : at + TOGETHER] for at in range(0, len(numbers), TOGETHER)):
            drawn = [draw(picture, STRONG_TWICE[number], number, where) for number in some]
            found |= zip(some, map(float, judge(np.stack(drawn), on)), strict=True)
            done += len(some)
            tick(done, len(STRONG_TWICE))
    return [(what, found[number]) for number, what in enumerate(STRONG_TWICE)]


def eyesight(scores: list[tuple[Drawn, float]], threshold: float) -> dict[str, Any]:
    """What is found at a threshold, as report.json and meta.json hold it.

    `found` and `of` count those that any model has to find, `share` is the one by the other, and
    `scores` has their raw scores, for who changes the threshold later. `by` has those of all, by
    strength and side.
    """
    by: dict[str, dict[str, list[float]]] = {}
    for what, score in scores:
        by.setdefault(what.strength, {}).setdefault(f"{what.side:.0%}", []).append(_short(score))
    for of_side in (one for sides in by.values() for one in sides.values()):
        of_side.sort()
    plain = [_short(score) for what, score in scores if must_be_found(what)]
    return counted({"scores": sorted(plain), "by": by}, threshold)


def counted(drawn: dict[str, Any], threshold: float) -> dict[str, Any]:
    """The same at another threshold."""
    scores = drawn["scores"]
    found = sum(score > threshold for score in scores)
    share = round(found / len(scores), 3)
    return {**drawn, "found": found, "of": len(scores), "share": share}


def _short(score: float) -> float:
    return float(f"{score:.7g}")


def must_be_found(what: Drawn) -> bool:
    return what.strength == STRONG and what.side > LEAST_SIDE
