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

Judge = Callable[[NDArray[np.uint8], int], float]  # a picture (S, S, 3), and which it is drawn on


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
    found = []
    for number, what in enumerate(STRONG_TWICE):
        on = number % len(pictures)
        where = on_the_part(pictures[on][None])
        if counting is not None:
            where = where & counting if (where & counting).any() else counting
        found.append((what, judge(draw(pictures[on], what, number, where), on)))
        tick(number + 1, len(STRONG_TWICE))
    return found


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
