"""Regions of a picture that never count, and the places of a model that they take out.

A model looks at a picture place by place, and its score is the largest of what it finds at one. A
place does not count where a region, or what spreads from it inside the model, touches it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from engines.errors import BadBundle

# How far what lies in a region spreads, by the kind of model: pixels of the model's input around
# it. docs/line.md has what was measured.
REACH = {"patchcore": 24, "padim": 16, "efficientad": 24, "vae": 8}


@dataclass(frozen=True, eq=False)
class Regions:
    """What never counts: `mask` (H, W) is true there, and is stretched as pictures are."""

    mask: NDArray[np.bool_]

    @property
    def share(self) -> float:
        """Of the picture's pixels, how many never count; 0 to 1."""
        return float(self.mask.mean())

    @property
    def digest(self) -> str:
        """The same for the same mask, whatever file it comes from; "" for one that is empty."""
        if not self.mask.any():
            return ""
        shape = "x".join(map(str, self.mask.shape))
        return hashlib.sha256(shape.encode() + np.packbits(self.mask).tobytes()).hexdigest()

    def white(self, shape: tuple[int, int]) -> NDArray[np.bool_]:
        """Which of (h, w) pixels of a picture never count: all that a region touches."""
        return _touched(self.mask, shape)

    def reached(self, size: int, reach: int) -> NDArray[np.bool_]:
        """What of a model's input (size, size) is in a region or within its reach, both pixels."""
        white = self.white((size, size)).astype(np.uint8)
        side = 2 * reach + 1
        disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
        return np.asarray(cv2.dilate(white, disc) > 0)

    def cells(self, size: int, shape: tuple[int, int], reach: int) -> NDArray[np.float32]:
        """Which of (h, w) places of a model count: 1 where they do, else 0.

        Args:
            size: side of the model's input, pixels.
            reach: how far a region spreads there, pixels.

        Raises:
            BadBundle: none of them counts.
        """
        keep = ~_touched(self.reached(size, reach), shape)
        if not keep.any():
            raise BadBundle(
                f"These regions leave no place that counts: what is in them reaches {reach} pixels"
                f" further, of the {size} that the model sees. Draw them smaller."
            )
        return keep.astype(np.float32)


def shown(keep: NDArray[np.float32], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Which places of a map (h, w) hold any place that counts."""
    return _touched(keep > 0, shape)


def hide(maps: NDArray[np.float32], places: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Raw maps (N, h, w) with the least of these places wherever else."""
    least = maps[:, places].min(axis=1)
    return np.where(places, maps, least[:, None, None])


def _touched(mask: NDArray[np.bool_], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Which of (h, w) equal parts of a mask (H, W) hold any of it."""
    rows, columns = (_overlaps(*sides) for sides in zip(shape, mask.shape, strict=True))
    return np.asarray(rows @ mask.astype(np.float32) @ columns.T > 0)


def _overlaps(parts: int, pixels: int) -> NDArray[np.float32]:
    """1 where a part of a side, of so many, touches a pixel of it, of so many: (parts, pixels)."""
    part, pixel = np.arange(parts)[:, None] * pixels, np.arange(pixels) * parts
    return ((pixel < part + pixels) & (pixel + parts > part)).astype(np.float32)
