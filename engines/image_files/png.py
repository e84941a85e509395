"""PNG: the checksum and order of every chunk are proven here, the stream inside by libpng (cv2).

libpng gets to see the chunks that make the pixels and no others: it writes a line to stderr about
each of the rest that it does not like. The palette is applied here, because libpng forgives colours
beyond it: what it sees of such a picture is grey, and its values are the indices.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engines.errors import BadImage, UnsupportedImage
from engines.image_files.reading import (
    CheckSize,
    Pixels,
    decode_with_cv2,
    exif_orientation,
    looked_up,
    upright,
)

_MAX_CHUNKS = 100_000  # 32 MiB of empty chunks would keep a thread busy for seconds
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GREY, _PALETTE = 0, 3
# How many bits a channel may have, by the type of colour: grey, RGB, palette, grey and RGB + alpha.
_DEPTHS = {_GREY: (1, 2, 4, 8, 16), 2: (8, 16), _PALETTE: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_CRITICAL = {b"IHDR", b"PLTE", b"IDAT", b"IEND"}


class _Header(NamedTuple):
    """What IHDR says."""

    width: int
    height: int
    bits: int
    colour: int
    compression: int
    filters: int
    interlaced: int


class _Contents(NamedTuple):
    """What is proven of a file: its header, palette and EXIF data, and the chunks of its pixels."""

    header: _Header
    palette: bytes
    exif: list[bytes]
    pixels: bytes  # a PNG of these alone


def read(data: bytes, check_size: CheckSize) -> Pixels:
    contents = _contents(data, check_size)
    pixels = decode_with_cv2(contents.pixels)
    if contents.header.colour == _PALETTE:
        pixels = _coloured(pixels, contents.header.bits, contents.palette)
    return upright(pixels, exif_orientation(contents.exif))


def _coloured(grey: Pixels, bits: int, palette: bytes) -> Pixels:
    """(H, W, 3) RGB of indices (H, W) that are spread over 0 to 255."""
    indices = grey if bits == 8 else grey // (255 // ((1 << bits) - 1))
    table: NDArray[np.uint8] = np.frombuffer(palette, np.uint8).reshape(-1, 3)
    return looked_up(indices, table)


def _contents(data: bytes, check_size: CheckSize) -> _Contents:
    chunks = list(_chunks(data))
    _check_order([kind for kind, _, _ in chunks])
    header = _header(data[chunks[0][1] : chunks[0][2]], check_size)
    bodies = {
        wanted: [data[start:end] for kind, start, end in chunks if kind == wanted]
        for wanted in (b"PLTE", b"eXIf")
    }
    palette = b"".join(bodies[b"PLTE"])
    if header.colour == _PALETTE and (len(palette) % 3 or not 0 < len(palette) <= 3 << header.bits):
        raise BadImage("The PNG image is damaged: its palette is missing, or of a wrong length.")
    shown = header._replace(colour=_GREY) if header.colour == _PALETTE else header
    pixels = [
        _SIGNATURE,
        _chunk(b"IHDR", struct.pack(">IIBBBBB", *shown)),
        *(data[start - 8 : end + 4] for kind, start, end in chunks if kind == b"IDAT"),
        _chunk(b"IEND", b""),
    ]
    return _Contents(header, palette, bodies[b"eXIf"], b"".join(pixels))


def _check_order(kinds: list[bytes]) -> None:
    """Raises BadImage where the chunks of the pixels are not what a PNG has, in its order."""
    if kinds[0] != b"IHDR":
        raise BadImage("The PNG image is damaged: it does not start with its header.")
    if b"acTL" in kinds:
        raise UnsupportedImage("The PNG image is animated; send one picture.")
    if strange := {kind for kind in kinds if kind[:1].isupper()} - _CRITICAL:
        raise BadImage(f"The PNG image is damaged: no PNG has a chunk {min(strange)!r}.")
    pixels = [number for number, kind in enumerate(kinds) if kind == b"IDAT"]
    torn = not pixels or pixels[-1] - pixels[0] + 1 != len(pixels)
    palettes = [number for number, kind in enumerate(kinds) if kind == b"PLTE"]
    if torn or kinds.count(b"IHDR") > 1 or len(palettes) > 1 or palettes > pixels[:1]:
        raise BadImage("The PNG image is damaged: its chunks are missing or out of order.")


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """The kind of each chunk up to IEND, and where its body starts and ends.

    Raises BadImage where one is cut or altered.
    """
    position = len(_SIGNATURE)
    for _ in range(_MAX_CHUNKS):
        if position + 12 > len(data):
            raise BadImage("The PNG image is cut short.")
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 8 + length
        if end + 4 > len(data):
            raise BadImage("The PNG image is cut short.")
        checksum = zlib.crc32(memoryview(data)[position + 4 : end])
        if checksum != int.from_bytes(data[end : end + 4], "big"):
            raise BadImage("The PNG image is damaged: a checksum does not match.")
        yield kind, position + 8, end
        if kind == b"IEND":
            return
        position = end + 4
    raise BadImage(f"The PNG image has more than {_MAX_CHUNKS:,} chunks.")


def _header(body: bytes, check_size: CheckSize) -> _Header:
    if len(body) != 13:
        raise BadImage("The PNG image is damaged: its header has another length.")
    header = _Header(*struct.unpack(">IIBBBBB", body))
    check_size(header.width, header.height)
    if (
        header.bits not in _DEPTHS.get(header.colour, ())
        or (header.compression, header.filters) != (0, 0)
        or header.interlaced not in (0, 1)
    ):
        raise BadImage("The PNG image is damaged: its header makes no sense.")
    return header
