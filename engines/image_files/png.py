"""PNG: the checksum and order of every chunk are proven here, and the stream of rows inside.

libpng (in cv2) undoes the filters of the rows. It writes a line to stderr about whatever it does
not like, and shows a picture whose stream holds too much, or whose own checksum is wrong. So it
gets to see a twin in which nothing can be wrong: the header, and rows that are proven, unpacked.
The palette is applied here, because libpng forgives colours beyond it: what it sees of such a
picture is grey, and its values are the indices.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator
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
_CHANNELS = {_GREY: 1, 2: 3, _PALETTE: 1, 4: 2, 6: 4}
_CRITICAL = {b"IHDR", b"PLTE", b"IDAT", b"IEND"}
_MAX_FILTER = 4  # the ways in which a row may be told from the one above
_STEP = 0xFFFF  # bytes that are unpacked together: a stored block holds no more
_ZLIB, _LAST_BLOCK = b"\x78\x01", b"\1\0\0\xff\xff"  # how a stream begins; an empty block
# Adam7: the passes of an interlaced picture, each with its first column and row, and its steps.
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
           (0, 1, 1, 2))  # fmt: skip
_PLAIN = ((0, 0, 1, 1),)


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
    """What is proven of a file: its header, palette and EXIF data, and where its pixels are."""

    header: _Header
    palette: bytes
    exif: list[bytes]
    packed: bytes  # what IDAT holds


def read(data: bytes, check_size: CheckSize) -> Pixels:
    contents = _contents(data, check_size)
    pixels = decode_with_cv2(_twin(contents))
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
        for wanted in (b"PLTE", b"eXIf", b"IDAT")
    }
    palette = b"".join(bodies[b"PLTE"])
    if header.colour == _PALETTE and (len(palette) % 3 or not 0 < len(palette) <= 3 << header.bits):
        raise BadImage("The PNG image is damaged: its palette is missing, or of a wrong length.")
    return _Contents(header, palette, bodies[b"eXIf"], b"".join(bodies[b"IDAT"]))


def _twin(contents: _Contents) -> bytearray:
    """A PNG of the same pixels with nothing but these, stored as they are."""
    header = contents.header
    if header.colour == _PALETTE:
        header = header._replace(colour=_GREY)
    twin = bytearray(_SIGNATURE + _chunk(b"IHDR", struct.pack(">IIBBBBB", *header)))
    twin += _chunk(b"IDAT", _ZLIB)
    checksum = 1
    for rows in _proven(_unpacked(contents.packed), header):
        checksum = zlib.adler32(rows, checksum)
        block = struct.pack("<BHH", 0, len(rows), len(rows) ^ 0xFFFF)  # stored, not the last one
        sum_of_all = zlib.crc32(rows, zlib.crc32(b"IDAT" + block))
        twin += struct.pack(">I", len(block) + len(rows)) + b"IDAT" + block
        twin += rows
        twin += sum_of_all.to_bytes(4, "big")
    last = _LAST_BLOCK + checksum.to_bytes(4, "big")
    twin += _chunk(b"IDAT", last) + _chunk(b"IEND", b"")
    return twin


def _proven(parts: Iterable[bytes], header: _Header) -> Iterator[bytes]:
    """The parts of a stream. Raises BadImage unless they are all the rows of the picture."""
    passes, length = _rows(header)
    begin = 0
    for part in parts:
        end = begin + len(part)
        for start, stop, step in passes:
            first = start - min(start - begin, 0) // step * step  # the first row in here
            if max(part[first - begin : max(0, stop - begin) : step], default=0) > _MAX_FILTER:
                raise BadImage("The PNG image is damaged: a row has a filter that no PNG has.")
        if end > length:
            break
        yield part
        begin = end
    if begin != length or end > length:
        raise BadImage("The PNG image is damaged: it does not unpack to its rows.")


def _rows(header: _Header) -> tuple[list[tuple[int, int, int]], int]:
    """Where each pass starts, stops and has its rows in the unpacked stream; and how long that is.

    A row is its filter, one byte, and its pixels.
    """
    bits = header.bits * _CHANNELS[header.colour]
    passes, length = [], 0
    for left, top, across, down in _PASSES if header.interlaced else _PLAIN:
        width, height = -(-(header.width - left) // across), -(-(header.height - top) // down)
        if width > 0 and height > 0:
            step = 1 + -(-width * bits // 8)
            passes.append((length, length + height * step, step))
            length += height * step
    return passes, length


def _unpacked(packed: bytes) -> Iterator[bytes]:
    """What a stream holds. Raises zlib.error for damage, BadImage where it does not end."""
    stream = zlib.decompressobj()
    for start in range(0, len(packed), _STEP):
        rest, full = packed[start : start + _STEP], True
        while (rest or full) and not stream.eof:  # some may be left though all is read
            part = stream.decompress(rest, _STEP)
            rest, full = stream.unconsumed_tail, len(part) == _STEP
            yield part
    if not stream.eof:
        raise BadImage("The PNG image is cut short.")


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
