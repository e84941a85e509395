"""BMP, read here: Pillow and cv2 both show wrong pixels where a header contradicts itself.

Uncompressed only: nothing in a run-length file says how many pixels it should hold. The format has
no checksum.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from engines.errors import BadImage, UnsupportedImage
from engines.image_files.reading import CheckSize, Pixels, looked_up

_CORE, _INFO, _OS2 = 12, 40, 64
_HEADERS = {_CORE, _INFO, 52, 56, _OS2, 108, 124}  # by their length in bytes
_PLAIN, _MASKS, _ALPHA_MASKS = 0, 3, 6
_RUNS = "run-length encoded"
_COMPRESSIONS = {1: _RUNS, 2: _RUNS, 4: "a JPEG inside", 5: "a PNG inside"}
_FIVE_BITS = (0x7C00, 0x03E0, 0x001F)  # of red, green and blue, where nothing else is said
_SIX_BITS = (0xF800, 0x07E0, 0x001F)
_BYTES = tuple(0xFF << shift for shift in (0, 8, 16, 24))


class _Header(NamedTuple):
    """What the headers say, and where the pixels and the colour table stand."""

    size: int  # bytes of the second header
    width: int
    height: int  # negative where the first row is the topmost
    bits: int  # of a pixel
    compression: int
    size_of_pixels: int  # bytes, as it says; 0 where it does not
    colours: int  # in the table; 0 for as many as the bits can tell apart
    table: int  # where it starts
    pixels: int  # where they start


def read(data: bytes, check_size: CheckSize) -> Pixels:
    header = _header(data)
    height = abs(header.height)
    check_size(header.width, height)
    _check_form(header)
    stride = (header.width * header.bits + 31) // 32 * 4
    _check_places(header, len(data), stride * height)
    rows = np.frombuffer(data, np.uint8, stride * height, header.pixels).reshape(height, stride)
    if header.height > 0:
        rows = rows[::-1]
    if header.bits <= 8:
        return _of_indices(_indices(rows, header), _table(data, header))
    if header.bits == 16:
        return _of_words(rows[:, : 2 * header.width].view("<u2"), _masks(data, header))
    channels = header.bits // 8
    pixels = rows[:, : channels * header.width].reshape(height, header.width, channels)
    return _of_bytes(pixels, _masks(data, header))


def _header(data: bytes) -> _Header:
    pixels, size = struct.unpack_from("<II", data, 10)
    if size not in _HEADERS:
        raise UnsupportedImage(
            f"The BMP image has a header of {size:,} bytes, which is no kind that Kensa reads; save"
            " it as BMP of Windows, or as PNG."
        )
    if len(data) < 14 + size:
        raise BadImage("The BMP image is cut short.")
    if size == _CORE:
        width, height, _, bits = struct.unpack_from("<HHHH", data, 18)
        return _Header(size, width, height, bits, _PLAIN, 0, 0, 14 + size, pixels)
    width, height, _, bits, compression, told = struct.unpack_from("<iiHHII", data, 18)
    (colours,) = struct.unpack_from("<I", data, 46)
    masks = {_MASKS: 12, _ALPHA_MASKS: 16}.get(compression, 0) if size == _INFO else 0
    table = 14 + size + masks
    return _Header(size, width, height, bits, compression, told, colours, table, pixels)


def _check_form(header: _Header) -> None:
    if header.compression in _COMPRESSIONS:
        raise UnsupportedImage(
            f"The BMP image is {_COMPRESSIONS[header.compression]}; save it uncompressed."
        )
    masked = header.compression in (_MASKS, _ALPHA_MASKS)
    if header.bits not in (1, 4, 8, 16, 24, 32) or not (
        header.compression == _PLAIN
        or (masked and header.bits in (16, 32) and header.size not in (_CORE, _OS2))
    ):
        raise UnsupportedImage(
            f"The BMP image has {header.bits} bits a pixel, compression {header.compression}; save"
            " it uncompressed, as 8, 24 or 32 bits a pixel."
        )


def _check_places(header: _Header, length: int, size: int) -> None:
    """Raises BadImage where the pixels are not whole, or overlap the headers or the table."""
    if header.pixels + size > length:
        raise BadImage("The BMP image is cut short.")
    # Photoshop counts two bytes behind the pixels, others get it wrong; two signs are needed.
    told_right = header.size_of_pixels == 0 or 0 <= header.size_of_pixels - size < 4
    if not told_right and header.pixels + size != length:
        raise BadImage("The BMP image is damaged: its width and height do not fit its pixels.")
    entry = 3 if header.size == _CORE else 4
    most = 1 << header.bits
    colours = header.colours
    if header.bits <= 8:
        if colours > most:
            raise BadImage("The BMP image is damaged: it has more colours than pixels can name.")
        colours = colours or most
    elif colours > 256 or header.table + entry * colours + size > length:
        colours = 0  # a table that pixels do not need: many headers claim one that is not there
    if header.pixels < header.table + entry * colours:
        raise BadImage("The BMP image is damaged: its pixels start inside its headers or colours.")


def _table(data: bytes, header: _Header) -> NDArray[np.uint8]:
    """The colours, (N, 3) RGB."""
    entry = 3 if header.size == _CORE else 4
    colours = header.colours or 1 << header.bits
    table = np.frombuffer(data, np.uint8, entry * colours, header.table)
    return table.reshape(colours, entry)[:, 2::-1]


def _indices(rows: NDArray[np.uint8], header: _Header) -> NDArray[np.uint8]:
    """(H, W) of the table's indices; the first pixel stands in the highest bits of a byte."""
    if header.bits == 8:
        return rows[:, : header.width]
    shifts = np.arange(8 - header.bits, -1, -header.bits, dtype=np.uint8)
    spread = rows[..., None] >> shifts  # (H, stride, pixels of a byte)
    spread &= np.uint8((1 << header.bits) - 1)
    return spread.reshape(len(rows), -1)[:, : header.width]


def _of_indices(indices: NDArray[np.uint8], table: NDArray[np.uint8]) -> Pixels:
    grey = np.arange(256, dtype=np.uint8)[:, None].repeat(3, axis=1)
    if np.array_equal(table, grey):  # as of most cameras: its own picture
        return np.ascontiguousarray(indices)
    return looked_up(indices, table)


def _masks(data: bytes, header: _Header) -> tuple[int, ...]:
    """Which bits of a pixel are red, green and blue."""
    if header.compression == _PLAIN:
        return _FIVE_BITS if header.bits == 16 else (_BYTES[2], _BYTES[1], _BYTES[0])
    masks: tuple[int, ...] = struct.unpack_from("<III", data, 14 + _INFO)
    known = (_FIVE_BITS, _SIX_BITS) if header.bits == 16 else ()
    if masks not in known and (header.bits == 16 or not set(masks) <= set(_BYTES)):
        raise UnsupportedImage(
            "The BMP image keeps its colours in unusual bits; save it as 24 bits a pixel."
        )
    if len(set(masks)) < 3:
        raise BadImage("The BMP image is damaged: two of its colours are the same bits.")
    return masks


def _of_words(words: NDArray[np.uint16], masks: tuple[int, ...]) -> Pixels:
    """(H, W, 3) RGB of (H, W) pixels of 5 or 6 bits a colour, spread over 0 to 255."""
    image = np.empty((*words.shape, 3), np.uint8)
    for channel, mask in enumerate(masks):
        lowest = mask & -mask
        values = np.arange(mask // lowest + 1) * 255 // (mask // lowest)  # as Pillow does
        image[..., channel] = values.astype(np.uint8)[(words & mask) // lowest]
    return image


def _of_bytes(pixels: NDArray[np.uint8], masks: tuple[int, ...]) -> Pixels:
    """(H, W, 3) RGB of (H, W, 3 or 4) bytes."""
    if pixels.shape[2] == 3:
        rgb: Pixels = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
        return rgb
    return np.ascontiguousarray(pixels[..., [_BYTES.index(mask) for mask in masks]])
