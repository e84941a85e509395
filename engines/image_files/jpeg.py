"""JPEG through simplejpeg (libjpeg-turbo), where a warning is an error.

libjpeg takes a file whose scans bring only a part of the coefficients for a preview that is still
arriving, and warns of nothing. Here that is damage.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

import simplejpeg

from engines.errors import BadImage, UnsupportedImage
from engines.image_files.reading import CheckSize, Pixels, exif_orientation, upright

_MAX_SCANS = 500  # 883 scans over 16 million pixels, in 58 KB, took 2.3 s; 1 to 20 are usual
_MAX_SEGMENTS = 1_000
_TRIES = 64  # places where a segment may go on, and segments behind each
_SOF = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # frames; the others are tables
_BASELINE, _EXTENDED, _PROGRESSIVE = 0xC0, 0xC1, 0xC2
_ARITHMETIC = {0xC9, 0xCA}
_USUAL = {bytes((luma, 0x11, 0x11)) for luma in (0x11, 0x21, 0x12, 0x22, 0x41, 0x14)}
_SOI, _EOI, _SOS, _APP1 = 0xD8, 0xD9, 0xDA, 0xE1
_DQT, _DHT = 0xDB, 0xC4
_NOTES = {*range(0xE0, 0xF0), 0xFE}  # of applications and people
_ALONE = {0x01, *range(0xD0, 0xD8), _SOI}  # markers without a length
# Where a scan's data end: at a marker that is no restart and no stuffed 0xFF.
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


class _Frame(NamedTuple):
    """What SOF says: its marker, the picture's size, ids and sampling of the components."""

    marker: int
    bits: int
    height: int
    width: int
    components: list[int]
    sampling: bytes  # of each component, across in the upper four bits and down in the lower


def read(data: bytes, check_size: CheckSize) -> Pixels:
    data = _mended(data)
    frame, exif = _proven(data, check_size)
    if data.count(b"\xff\xda") > _MAX_SCANS:
        raise UnsupportedImage(f"The JPEG image has more than {_MAX_SCANS} scans.")
    orientation = exif_orientation(exif)
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB", strict=True)
    except ValueError as error:
        if len(frame.sampling) == 1 or frame.sampling in _USUAL:
            raise
        raise UnsupportedImage(
            "The JPEG image samples its colours in a way that Kensa does not read; save it with"
            " 4:4:4, 4:2:2 or 4:2:0."
        ) from error
    if pixels.shape[:2] != (frame.height, frame.width):
        raise BadImage("The JPEG image is damaged: it has two sizes.")
    return upright(pixels, orientation)


def _proven(data: bytes, check_size: CheckSize) -> tuple[_Frame, list[bytes]]:
    """The frame, and all EXIF data, of a file whose scans bring the whole picture."""
    frame, missing, exif = None, {}, []
    for marker, body in _segments(data):
        if marker == _APP1 and body.startswith(b"Exif\0\0"):
            exif.append(body)
        elif marker in _SOF and frame is None:  # libjpeg refuses a second one
            frame = _frame(marker, body)
            check_size(frame.width, frame.height)
            _check_form(frame)
            missing = {one: set(range(64)) for one in frame.components}
        elif marker == _SOS:
            if frame is None:
                break
            _take_off(missing, frame, body)
            if frame.marker != _PROGRESSIVE and not any(missing.values()):
                break  # nothing that follows can add to the picture
    if frame is None:
        raise BadImage("The JPEG image is damaged: it has no header.")
    if any(missing.values()):
        raise BadImage("The JPEG image is cut short: some of its scans are missing.")
    return frame, exif


def _mended(data: bytes) -> bytes:
    """The file with the length of its EXIF put right where it reaches into the note behind it.

    Programs that cut EXIF short leave such lengths. The picture behind these notes is whole.
    """
    position = 2
    for _ in range(_MAX_SEGMENTS):
        start = _past_padding(data, position)
        if start + 4 > len(data) or data[start] != 0xFF or data[start + 1] in (_SOS, _EOI):
            break
        end = _end(data, start)
        exif = data[start + 1] == _APP1 and data.startswith(b"Exif\0\0", start + 4)
        if exif and data[end : end + 1] != b"\xff":
            end = _note_before(data, start + 10, end)
            return data[: start + 2] + (end - start - 2).to_bytes(2, "big") + data[start + 4 :]
        position = end
    return data


def _note_before(data: bytes, start: int, end: int) -> int:
    """Where a note begins that reaches over `end`, with a picture behind it; else `end`."""
    markers = [found.start() for found in _NEXT_MARKER.finditer(data, start, end + 1)]
    for place in markers[: -_TRIES - 1 : -1]:
        reaches = data[place + 1] in _NOTES and end < _end(data, place)
        if reaches and _leads_to_a_picture(data, place):
            return place
    return end


def _leads_to_a_picture(data: bytes, position: int) -> bool:
    """Whether segments stand there, one behind the other, with all that a scan needs."""
    seen: set[int] = set()
    for _ in range(_TRIES):
        position = _past_padding(data, position)
        if position + 4 > len(data) or data[position] != 0xFF or data[position + 1] in _ALONE:
            return False
        seen.add(data[position + 1])
        if data[position + 1] == _SOS:
            return bool(seen & _SOF) and {_DQT, _DHT} <= seen
        position = _end(data, position)
    return False


def _past_padding(data: bytes, position: int) -> int:
    while data[position : position + 2] == b"\xff\xff":  # 0xFF may be repeated
        position += 1
    return position


def _end(data: bytes, segment: int) -> int:
    """Where a segment ends by its length, or right behind its marker where that has none."""
    if data[segment + 1] in _ALONE:
        return segment + 2
    return segment + 2 + int.from_bytes(data[segment + 2 : segment + 4], "big")


def _segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The marker and body of each segment up to the end; libjpeg is strict about their order."""
    position = 2
    for _ in range(_MAX_SEGMENTS):
        position = _past_padding(data, position)
        if position + 4 > len(data) or data[position] != 0xFF:
            return
        marker = data[position + 1]
        if marker == _EOI:
            return
        end = _end(data, position)
        if marker not in _ALONE:
            yield marker, data[position + 4 : end]
        position = end
        if marker == _SOS:
            found = _NEXT_MARKER.search(data, position)
            if found is None:
                return
            position = found.start()
    raise UnsupportedImage(f"The JPEG image has more than {_MAX_SEGMENTS:,} segments.")


def _frame(marker: int, body: bytes) -> _Frame:
    bits, height, width, count = struct.unpack_from(">BHHB", body)
    components = list(body[6 : 6 + 3 * count : 3])
    sampling = body[7 : 7 + 3 * count : 3]
    if len(components) < count or len(set(components)) < count:
        raise BadImage("The JPEG image is damaged: its header contradicts itself.")
    return _Frame(marker, bits, height, width, components, sampling)


def _check_form(frame: _Frame) -> None:
    if frame.marker in _ARITHMETIC:  # libjpeg decodes a scan of no bytes, and warns of nothing
        raise UnsupportedImage(
            "The JPEG image is coded arithmetically, where damage goes unnoticed; save it with"
            " Huffman codes, as nearly every program does, or as PNG."
        )
    if frame.marker not in (_BASELINE, _EXTENDED, _PROGRESSIVE) or frame.bits != 8:
        raise UnsupportedImage(
            f"The JPEG image is lossless or hierarchical, or has {frame.bits} bits a channel; save"
            " it as a plain JPEG of 8 bits, or as PNG or TIFF."
        )
    if len(frame.components) not in (1, 3):
        raise UnsupportedImage("The JPEG image is CMYK, or of other inks; save it as RGB or grey.")


def _take_off(missing: dict[int, set[int]], frame: _Frame, scan: bytes) -> None:
    """Take the coefficients that a scan completes off those that are missing."""
    count = scan[0]
    low, high, precision = struct.unpack_from("BBB", scan, 1 + 2 * count)
    brought = set(range(64))
    if frame.marker == _PROGRESSIVE:
        # The last bit decides: libjpeg warns where one before it was left out.
        brought = set(range(low, high + 1)) if precision & 15 == 0 else set()
    for one in scan[1 : 1 + 2 * count : 2]:
        if one in missing:
            missing[one] -= brought
