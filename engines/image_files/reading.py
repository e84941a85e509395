"""What the readers of image files share: orientations, and pixels through cv2."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from engines.errors import BadImage

Pixels = NDArray[Any]  # uint8 or uint16, (H, W) grey or (H, W, 3) RGB
CheckSize = Callable[[int, int], None]  # raises where width x height is too large, or nothing

ORIENTATION = 274  # the tag, of EXIF and of TIFF
_WHOLE_NUMBERS = {1: "B", 3: "H", 4: "I"}  # types of EXIF and TIFF, as struct writes them
_MAX_SEGMENTS, _MAX_ENTRIES = 16, 1_000  # of EXIF; a camera writes 1, and some 20
_FLIPS = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}  # cv2's codes: 1 left-right, 0 up-down, -1 both


def exif_orientation(segments: Iterable[bytes]) -> int:
    """The orientation, 1 to 8, that the EXIF data of a picture agree on; 1 where they have none.

    Cameras and the programs behind them write EXIF of every form: unknown types, padding, cut or
    empty directories. None of it touches the pixels, so whatever cannot be read counts as absent.

    Raises BadImage where there are two different orientations: nobody knows which side is up then.
    """
    read = islice(segments, _MAX_SEGMENTS)
    found = {value for segment in read for value in _orientations(segment)}
    if len(found) > 1:
        raise BadImage(
            f"The image says twice which side is up, {' and '.join(map(str, sorted(found)))} of"
            " EXIF's orientations: save it with one."
        )
    return found.pop() if found else 1


def _orientations(exif: bytes) -> Iterable[int]:
    """Every orientation from 1 to 8 in the first directory, as far as that can be read."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None or len(exif) < 8:
        return
    (place,) = struct.unpack_from(f"{order}I", exif, 4)
    if not 8 <= place <= len(exif) - 2:
        return
    (count,) = struct.unpack_from(f"{order}H", exif, place)
    end = place + 2 + 12 * min(count, _MAX_ENTRIES)
    for entry in range(place + 2, min(end, len(exif) - 11), 12):
        tag, kind, length = struct.unpack_from(f"{order}HHI", exif, entry)
        if tag == ORIENTATION and kind in _WHOLE_NUMBERS and length == 1:
            (value,) = struct.unpack_from(order + _WHOLE_NUMBERS[kind], exif, entry + 8)
            if 1 <= value <= 8:
                yield value


def upright(image: Pixels, orientation: int) -> Pixels:
    """Undo an orientation: 1 to 8, anything else counts as 1."""
    if orientation in (5, 6, 7, 8):
        image = cv2.transpose(image)
    return cv2.flip(image, _FLIPS[orientation]) if orientation in _FLIPS else image


def looked_up(indices: Pixels, table: NDArray[np.uint8]) -> Pixels:
    """(H, W, 3) RGB of the indices (H, W) of a table (N, 3).

    Raises BadImage where an index lies beyond it: libraries show black there, or what comes next.
    """
    if int(indices.max()) >= len(table):
        raise BadImage("The image is damaged: it has colours beyond its palette.")
    rgb = np.empty((*indices.shape, 3), np.uint8)
    for top in range(0, len(indices), 256):  # in bands: numpy makes 8 bytes of each index
        band = slice(top, top + 256)
        table.take(indices[band], axis=0, out=rgb[band], mode="clip")
    return rgb


def decode_with_cv2(data: bytes | bytearray) -> Pixels:
    """(H, W) or (H, W, 3) RGB, 8 or 16 bits. cv2 returns None for what it cannot decode."""
    flags = cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION
    image: Pixels | None = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if image is None:
        raise BadImage("The image is damaged: its pixels cannot be decoded.")
    if image.ndim == 3:
        for top in range(0, len(image), 256):  # in bands: a second whole picture is 48 MB
            band = image[top : top + 256]
            band[...] = cv2.cvtColor(band, cv2.COLOR_BGR2RGB)
    return image
