"""What pictures look like to a camera that has learned some, and ways to spoil them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from engines import camera
from engines.camera import FEW, Camera, Fault, Values
from engines.image import resize
from workers.learning.camera import Look, learn
from workers.sample_parts.drawing import draw_part

Picture = NDArray[np.uint8]
SIDE = 256  # of what a model sees
NO_SCORES = np.empty(0)


@lru_cache(maxsize=400)
def part(seed: int) -> Picture:
    """A drawn part, (256, 256, 3) RGB."""
    return draw_part(seed, None, SIDE)[0]


def look(picture: Picture) -> Look:
    height, width = picture.shape[:2]
    return Look(width, height, *camera.measure(picture, resize(picture, SIDE)))


def learned(pictures: Iterable[Picture], before: Camera | None = None) -> Camera:
    """As meta.json gives it back."""
    found = learn(map(look, pictures), before, NO_SCORES)
    assert found is not None
    again = Camera.of(found.content())
    assert again is not None
    return again


def measured(known: Camera, picture: Picture) -> Values:
    return known.measure(picture, resize(picture, SIDE))


def faults(known: Camera, pictures: Iterable[Picture]) -> list[Fault | None]:
    """The first fault of each of some pictures that come one after another."""
    found: list[Fault | None] = []
    before: list[Values] = []
    for picture in pictures:
        values = measured(known, picture)
        found.append(next(iter(known.faults(values, before[-FEW + 1 :])), None))
        before.append(values)
    return found


def codes(known: Camera, pictures: Iterable[Picture]) -> list[str | None]:
    return [fault and fault.code for fault in faults(known, pictures)]


def dark(picture: Picture, share: float = 0.6) -> Picture:
    return (picture * share).astype(np.uint8)


def bright(picture: Picture) -> Picture:
    return np.asarray(cv2.convertScaleAbs(picture, alpha=1.5), np.uint8)


def blurred(picture: Picture) -> Picture:
    return np.asarray(cv2.GaussianBlur(picture, (0, 0), 3), np.uint8)


def shifted(
    right: float = 0, down: float = 0, border: int = cv2.BORDER_REPLICATE
) -> Callable[[Picture], Picture]:
    """`right`, `down`: pixels."""
    matrix = np.array([[1, 0, right], [0, 1, down]], np.float32)

    def shift(picture: Picture) -> Picture:
        size = picture.shape[1], picture.shape[0]
        return np.asarray(cv2.warpAffine(picture, matrix, size, borderMode=border), np.uint8)

    return shift


def turned(degrees: float, border: int = cv2.BORDER_REPLICATE) -> Callable[[Picture], Picture]:
    """In its frame, which stays as wide and as high."""

    def turn(picture: Picture) -> Picture:
        height, width = picture.shape[:2]
        matrix = cv2.getRotationMatrix2D((width / 2, height / 2), degrees, 1)
        return np.asarray(
            cv2.warpAffine(picture, matrix, (width, height), borderMode=border), np.uint8
        )

    return turn


def upended(picture: Picture) -> Picture:
    """Turned with its frame: as high as it was wide."""
    return np.ascontiguousarray(np.rot90(picture))
