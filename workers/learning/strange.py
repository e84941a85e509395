"""Pictures among the new ones that are unlike the others, and unlike what is known."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from engines.store.known_scores import KnownScores
from engines.verdict import Scale, overlay
from workers.learning.normal_scores import USUAL_SCALE, NormalScores

MOST = 0.15  # share of the pictures: what is more frequent is how parts vary
LEAST = 8  # pictures, fewer of which do not say what is usual
ODDS = 0.004  # of a normal part to score as high, where earlier ones are known
ODDS_ALONE = 0.001  # where none are

SHOWN = 20  # pictures on a sheet
SIDE, LABEL, GAP = 384, 30, 4  # of a sheet: pixels
INK, PAPER = (43, 32, 23), 255


def strange(
    scores: NDArray[np.float64], known: KnownScores, usual_scale: float = USUAL_SCALE
) -> NDArray[np.int64]:
    """Which pictures score, by a model without them, as hardly any normal part would.

    The highest scores are not believed to be of normal parts: two defective pictures among twenty
    would make room for themselves. Where earlier ones are known, those say how far scores spread,
    and the highest new ones are left out; else only that they are high is believed of them. New
    light or a new place raises all scores: then the known ones are raised as much before they are
    compared.

    Args:
        scores: (n,) of the new pictures.
        known: of earlier ones.
        usual_scale: see `NormalScores.of`.

    Returns:
        Indices of the strange ones, ascending.
    """
    unsure = int(MOST * len(scores))
    if len(scores) < LEAST or not unsure or _alike(scores, unsure):
        return np.empty(0, np.int64)
    if len(known) >= LEAST:
        raised = known.scores * max(1.0, np.median(scores) / np.median(known.scores))
        usual = np.concatenate([raised, np.sort(scores)[:-unsure]])
        limit = NormalScores.of(usual, 0, usual_scale).limit(ODDS)
        limit = max(limit, float(np.sort(raised)[-2]))  # two that are known are as high
    else:
        limit = NormalScores.of(scores, unsure, usual_scale).limit(ODDS_ALONE)
    found = np.flatnonzero(scores > limit)
    return found if len(found) <= unsure else np.empty(0, np.int64)


def _alike(scores: NDArray[np.float64], unsure: int) -> bool:
    """Whether those that are believed are all the same."""
    sure = np.sort(scores)[: len(scores) - unsure]
    return bool(sure[0] == sure[-1])


def sheet(
    names: list[str],
    pictures: NDArray[np.uint8],
    scores: NDArray[np.float32],
    maps: NDArray[np.float32],
    scale: Scale,
) -> bytes:
    """A JPEG for a person to look at: each picture, and beside it what is strange about it.

    Args:
        names: of the files. One that is not in ASCII, for which there are no letters, is left out.
        pictures: (n, S, S, 3) RGB, n > 0.
        scores, maps: raw ones, (n,) and (n, h, w), by a model that has not learned them.
        scale: of that model.
    """
    rows = []
    for number, (name, picture) in enumerate(zip(names, pictures, strict=True)):
        painted = np.frombuffer(overlay(picture, maps[number], scale, len(picture)), np.uint8)
        pair = (picture[..., ::-1], cv2.imdecode(painted, cv2.IMREAD_COLOR))
        row = np.full((LABEL + SIDE + GAP, 2 * SIDE + GAP, 3), PAPER, np.uint8)
        for column, one in enumerate(pair):
            at = column * (SIDE + GAP)
            row[LABEL : LABEL + SIDE, at : at + SIDE] = cv2.resize(one, (SIDE, SIDE))
        said = f"{name[-36:] if name.isascii() else ''}  {scores[number]:.3g}"
        label = f"{number + 1}  {said.strip()}, threshold {scale.raw_threshold:.3g}"
        cv2.putText(row, label, (4, 21), cv2.FONT_HERSHEY_SIMPLEX, 0.5, INK, 1, cv2.LINE_AA)
        rows.append(row)
    _, data = cv2.imencode(".jpg", np.concatenate(rows), [cv2.IMWRITE_JPEG_QUALITY, 88])
    return data.tobytes()
