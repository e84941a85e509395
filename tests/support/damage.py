"""Small good images of every kind, and the same 200 files damaged in the same way each time.

The decoder's tests and the HTTP tests share them: `seeds()`, `damaged()`.
"""

from __future__ import annotations

import io
import random
import struct
import zlib
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8] | NDArray[np.uint16]


class Damaged(NamedTuple):
    name: str  # such as png_grey-truncate-17
    data: bytes


def picture(height: int = 41, width: int = 53) -> NDArray[np.uint8]:
    """(H, W, 3) RGB with slopes, an edge and noise, so that compressed data is not trivial."""
    y, x = np.mgrid[0:height, 0:width]
    colours = np.stack([x * 4, y * 5, 120 + 100 * ((x + y) % 20 > 9)], axis=-1)
    noise = np.random.default_rng(0).normal(0, 6, colours.shape)
    return np.clip(colours + noise, 0, 255).astype(np.uint8)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    crc = zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)


def png(pixels: Pixels, *, packed: bytes | None = None, extra: bytes = b"") -> bytes:
    """A PNG of any depth, `extra` chunks before the pixels; `packed` replaces what IDAT holds."""
    height, width = pixels.shape[:2]
    colour = 0 if pixels.ndim == 2 else {3: 2, 4: 6}[pixels.shape[2]]
    header = struct.pack(">IIBBBBB", width, height, pixels.dtype.itemsize * 8, colour, 0, 0, 0)
    packed = zlib.compress(png_rows(pixels)) if packed is None else packed
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            png_chunk(b"IHDR", header),
            extra,
            png_chunk(b"IDAT", packed),
            png_chunk(b"IEND", b""),
        ]
    )


def png_rows(pixels: Pixels) -> bytes:
    big_endian = pixels.astype(pixels.dtype.newbyteorder(">"))
    return b"".join(b"\0" + row.tobytes() for row in big_endian)  # 0: no filter


def resealed(data: bytes) -> bytes:
    """A damaged PNG with every checksum made right again: damage that no CRC shows."""
    fixed, position = bytearray(data), 8
    while position + 12 <= len(fixed):
        end = position + 8 + int.from_bytes(fixed[position : position + 4], "big")
        if end + 4 > len(fixed):
            break
        struct.pack_into(">I", fixed, end, zlib.crc32(fixed[position + 4 : end]))
        position = end + 4
    return bytes(fixed)


def odd_streams() -> list[Damaged]:
    """PNGs with every checksum right, whose stream of rows is not what it should be."""
    rows = png_rows(picture())
    packed = zlib.compress(rows)
    step = len(rows) // len(picture())
    streams = {
        "short": zlib.compress(rows[:-1]),
        "long": zlib.compress(rows + b"\0"),
        "a_row_more": zlib.compress(rows + rows[:step]),
        "cut": packed[:-5],
        "without_its_checksum": packed[:-4],
        "with_a_wrong_checksum": packed[:-1] + bytes([packed[-1] ^ 1]),
        "empty": b"",
        "of_nothing": zlib.compress(b""),
        "no_stream": b"\x99" * 40,
        "no_block": packed[:2] + b"\x07" + packed[3:],
        "with_a_filter_too_many": zlib.compress(rows[: 5 * step] + b"\5" + rows[5 * step + 1 :]),
        "a_filter_in_the_last_row": zlib.compress(rows[:-step] + b"\xff" + rows[1 - step :]),
    }
    files = [
        Damaged(f"png_colour-stream_{name}", png(picture(), packed=one))
        for name, one in streams.items()
    ]
    for place in range(2, len(packed), 97):
        flipped = packed[:place] + bytes([packed[place] ^ 0x10]) + packed[place + 1 :]
        files.append(Damaged(f"png_colour-bit_{place}", png(picture(), packed=flipped)))
    return files


def tiff(
    pixels: NDArray[np.generic],
    *,
    tile: int = 0,
    orientation: int = 1,
    planar: int = 1,
    extra: int = 2,
) -> bytes:
    """A TIFF of any depth, Deflate, in one strip or in tiles: Pillow writes no tiles."""
    height, width = pixels.shape[:2]
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    blocks = [pixels]
    if tile:
        margin = [(0, -height % tile), (0, -width % tile), (0, 0)][: pixels.ndim]
        padded = np.pad(pixels, margin)
        rows, columns = range(0, padded.shape[0], tile), range(0, padded.shape[1], tile)
        blocks = [padded[y : y + tile, x : x + tile] for y in rows for x in columns]
    body, offsets, counts = b"", [], []
    for block in blocks:
        packed = zlib.compress(block.tobytes())
        offsets.append(8 + len(body))
        counts.append(len(packed))
        body += packed
    sample_format = {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]
    tags = {
        256: [width],
        257: [height],
        258: [pixels.dtype.itemsize * 8] * channels,
        259: [8],  # Deflate
        262: [2 if channels >= 3 else 1],  # RGB, or grey where 0 is black
        274: [orientation],
        277: [channels],
        284: [planar],
        339: [sample_format] * channels,
    }
    shape = {322: [tile], 323: [tile]} if tile else {278: [height]}
    places = {324: offsets, 325: counts} if tile else {273: offsets, 279: counts}
    alpha = {338: [extra]} if channels == 4 else {}
    return tiff_file(body, tags | shape | places | alpha)


def tiff_file(body: bytes, tags: dict[int, list[int]], order: str = "<") -> bytes:
    """Header, pixel data, the long values, and the directory at the end."""
    body += b"\0" * (len(body) % 2)
    entries = []
    for tag, values in sorted(tags.items()):
        kind, code = (4, "I") if tag in {273, 279, 324, 325} else (3, "H")
        value = struct.pack(f"{order}{len(values)}{code}", *values)
        if len(value) > 4:
            place = struct.pack(f"{order}I", 8 + len(body))
            body += value + b"\0" * (len(value) % 2)
            value = place
        head = struct.pack(f"{order}HHI", tag, kind, len(values))
        entries.append(head + value.ljust(4, b"\0"))
    mark = b"II*\0" if order == "<" else b"MM\0*"
    header = mark + struct.pack(f"{order}I", 8 + len(body))
    count = struct.pack(f"{order}H", len(entries))
    return header + body + count + b"".join(entries) + b"\0\0\0\0"


def big_tiff(pixels: NDArray[np.uint8], order: str) -> bytes:
    """A grey BigTIFF of one raw strip."""
    height, width = pixels.shape
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 16, 277: 1, 278: height,
            279: pixels.size}  # fmt: skip
    mark = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HHH", 43, 8, 0)
    header = mark + struct.pack(f"{order}Q", 16 + pixels.size)
    entries = b"".join(struct.pack(f"{order}HHQQ", tag, 16, 1, tags[tag]) for tag in tags)
    directory = struct.pack(f"{order}Q", len(tags)) + entries + bytes(8)
    return header + pixels.tobytes() + directory


@cache
def seeds() -> dict[str, bytes]:
    """A good file of every variant that is read, by name; what stands before _ is its kind."""
    pixels = picture()
    deep = pixels.astype(np.uint16) * 257
    colour = Image.fromarray(pixels)
    grey, palette, bilevel = colour.convert("L"), colour.quantize(64), colour.convert("1")
    return {
        "jpeg_colour": saved(colour, "JPEG"),
        "jpeg_grey": saved(grey, "JPEG"),
        "jpeg_progressive": saved(colour, "JPEG", progressive=True),
        "jpeg_restarts": saved(colour, "JPEG", restart_marker_blocks=2),
        "png_colour": saved(colour, "PNG"),
        "png_grey": saved(grey, "PNG"),
        "png_palette": saved(palette, "PNG"),
        "png_bilevel": saved(bilevel, "PNG"),
        "png_alpha": saved(colour.convert("RGBA"), "PNG"),
        "png_grey16": png(deep[..., 0]),
        "png_colour16": png(deep),
        "bmp_colour": saved(colour, "BMP"),
        "bmp_grey": saved(grey, "BMP"),
        "bmp_palette": saved(palette, "BMP"),
        "bmp_bilevel": saved(bilevel, "BMP"),
        "tiff_plain": saved(colour, "TIFF"),
        "tiff_lzw": saved(colour, "TIFF", compression="tiff_lzw"),
        "tiff_deflate": saved(grey, "TIFF", compression="tiff_adobe_deflate"),
        "tiff_packbits": saved(palette, "TIFF", compression="packbits"),
        "tiff_tiles": tiff(pixels, tile=16),
        "tiff_grey16": tiff(deep[..., 0]),
        "tiff_colour16": tiff(deep),
    }


def damaged(count: int = 200) -> list[Damaged]:
    """The corpus: `count` files, each a seed with one kind of damage. The same on every machine."""
    good = list(seeds().items())
    files = []
    for number in range(count):
        name, data = good[number % len(good)]
        chance = random.Random(number)
        how = chance.choice(list(_DAMAGES))
        data = _DAMAGES[how](data, chance)
        if name.startswith("png") and chance.random() < 0.5:
            how, data = f"{how}-resealed", resealed(data)
        files.append(Damaged(f"{name}-{how}-{number}", data))
    return files


def _truncate(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))]


def _lose_the_end(data: bytes, chance: random.Random) -> bytes:
    return data[: -chance.randint(1, 12)]


def _flip(data: bytes, chance: random.Random) -> bytes:
    flipped = bytearray(data)
    for place in chance.sample(range(len(data)), chance.randint(1, 50)):
        flipped[place] ^= chance.randint(1, 255)
    return bytes(flipped)


def _zero(data: bytes, chance: random.Random) -> bytes:
    start, length = chance.randrange(len(data) - 100), chance.randint(20, 100)
    return data[:start] + bytes(length) + data[start + length :]


def _splice(data: bytes, chance: random.Random) -> bytes:
    start, source = chance.randrange(len(data) - 40), chance.randrange(len(data) - 40)
    return data[:start] + data[source : source + 40] + data[start + 40 :]


def _drop(data: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(data) - 60)
    return data[:start] + data[start + chance.randint(1, 60) :]


_DAMAGES = {
    "truncate": _truncate,
    "lose_the_end": _lose_the_end,
    "flip": _flip,
    "zero": _zero,
    "splice": _splice,
    "drop": _drop,
}
