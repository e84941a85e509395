"""Whether a model sees at all: the share of drawn defects that it finds, on parts it does not know.

A threshold from normal parts alone says nothing of defects. So some are drawn onto normal pictures,
each judged by a model that has not learned the picture that it is drawn on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.limits import is_number
from workers.learning.drawn_defects import DEFECTS, Drawn, draw, on_the_part
from workers.progress import Tick

# What any model has to find: faint and tiny ones are drawn as well, and reported, but good models
# miss them, too (docs/models.md).
STRONG, LEAST_SIDE = "strong", 0.02
STRONG_TWICE = (*DEFECTS, *(what for what in DEFECTS if what.strength == STRONG))

Judge = Callable[[NDArray[np.uint8], int], float]  # a picture (S, S, 3), and which it is drawn on


def drawn_scores(
    pictures: NDArray[np.uint8], judge: Judge, tick: Tick
) -> list[tuple[Drawn, float]]:
    """Draw defects onto normal pictures (n, S, S, 3) in turn, and judge them: raw scores."""
    found = []
    for number, what in enumerate(STRONG_TWICE):
        on = number % len(pictures)
        where = on_the_part(pictures[on][None])
        found.append((what, judge(draw(pictures[on], what, number, where), on)))
        tick(number + 1, len(STRONG_TWICE))
    return found


def eyesight(scores: list[tuple[Drawn, float]], threshold: float) -> dict[str, Any]:
    """What is found at a threshold, as report.json and meta.json hold it.

    `found` and `of` count those that any model has to find, `share` is the one by the other; `by`
    has all, by strength and side: how many were found, and of how many. `scores` has the raw ones
    of those that count, for who changes the threshold later.
    """
    by: dict[str, dict[str, list[int]]] = {}
    for what, score in scores:
        counts = by.setdefault(what.strength, {}).setdefault(f"{what.side:.0%}", [0, 0])
        counts[0] += score > threshold
        counts[1] += 1
    plain = [score for what, score in scores if must_be_found(what)]
    found = sum(score > threshold for score in plain)
    return {
        "found": found,
        "of": len(plain),
        "share": round(found / len(plain), 3),
        "scores": [float(f"{score:.7g}") for score in sorted(plain)],
        "by": by,
    }


def seen_again(drawn: dict[str, Any] | None, threshold: float) -> dict[str, Any] | None:
    """What `eyesight` found, at another threshold; without `by`, of which no scores are kept."""
    scores = drawn.get("scores") if isinstance(drawn, dict) else None
    if drawn is None or not isinstance(scores, list) or not all(map(is_number, scores)):
        return drawn
    found = sum(score > threshold for score in scores)
    if not scores or found == drawn.get("found"):
        return drawn
    share = round(found / len(scores), 3)
    return {"found": found, "of": len(scores), "share": share, "scores": scores}


def must_be_found(what: Drawn) -> bool:
    return what.strength == STRONG and what.side > LEAST_SIDE
