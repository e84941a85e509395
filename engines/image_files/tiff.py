"""TIFF and BigTIFF: the directory is read here, strictly; libtiff only unpacks the pixels.

libtiff guesses where a directory is incomplete, and Pillow, cv2 and libtiff differ in what they
make of one that contradicts itself. So they get to see a twin of the file whose directory says just
what was understood here.

Uncompressed, LZW, Deflate and PackBits only: libtiff shows damaged JPEG and fax data as a picture.
Of LZW and PackBits it does not notice what is left over when a picture is full; of Deflate, which
is unpacked here, that is damage too.
Through Pillow, not cv2, which returns the rows that failed to unpack as black, and darkens colours
by their alpha.
"""

from __future__ import annotations

import ctypes
import struct
import warnings
import zlib
from collections.abc import Iterable
from contextlib import suppress
from io import BytesIO
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, TiffImagePlugin, UnidentifiedImageError, _imaging

from engines.errors import BadImage, UnsupportedImage
from engines.image_files.reading import ORIENTATION, CheckSize, Pixels, decode_with_cv2, upright

_WIDTH, _LENGTH, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER = 256, 257, 258, 259, 262, 266
_STRIPS, _SAMPLES, _STRIP_ROWS, _STRIP_BYTES, _PLANAR, _PREDICTOR = 273, 277, 278, 279, 284, 317
_COLOURS, _TILE_WIDTH, _TILE_LENGTH, _TILES, _TILE_BYTES = 320, 322, 323, 324, 325
_EXTRA, _SAMPLE_FORMAT = 338, 339
_KNOWN = {_WIDTH, _LENGTH, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER, _STRIPS, ORIENTATION,
          _SAMPLES, _STRIP_ROWS, _STRIP_BYTES, _PLANAR, _PREDICTOR, _COLOURS, _TILE_WIDTH,
          _TILE_LENGTH, _TILES, _TILE_BYTES, _EXTRA, _SAMPLE_FORMAT}  # fmt: skip
_LONGS = {_WIDTH, _LENGTH, _STRIPS, _STRIP_ROWS, _STRIP_BYTES, _TILE_WIDTH, _TILE_LENGTH, _TILES,
          _TILE_BYTES}  # fmt: skip
_TYPES = {3: "H", 4: "I", 16: "Q"}  # whole numbers without sign, as struct writes them
_RAW, _LZW, _DEFLATE, _OLD_DEFLATE, _PACKBITS = 1, 5, 8, 32946, 32773
_UNPACKED = {_RAW, _LZW, _DEFLATE, _OLD_DEFLATE, _PACKBITS}
_HIDE_DAMAGE = {2: "fax", 3: "fax (Group 3)", 4: "fax (Group 4)", 6: "JPEG", 7: "JPEG"}
_COLOUR_KINDS = {5: "CMYK", 6: "YCbCr", 8: "LAB", 9: "LAB", 10: "LAB", 32803: "of a raw sensor"}
_RGB, _PALETTE = 2, 3
_UNSPECIFIED = (
    0  # an extra sample that nobody shall multiply or divide colours by: alpha is dropped
)
_MAX_EXTRA = 3  # samples of a pixel that are no colours
_MAX_SLACK = 16 << 20  # bytes by which tiles may be larger than a small picture
_MAX_VALUES = 3 << 8  # of a tag: a palette
_MAX_BLOCKS = 1 << 18  # strips or tiles; 16 million pixels in tiles of 16 x 16 are 62,500
_MODES = {"1", "L", "LA", "P", "RGB", "RGBA", "RGBX", "I;16", "I;16B"}

# Pillow reads uncompressed TIFF itself, and leaves strips that are missing black. libtiff does not.
TiffImagePlugin.READ_LIBTIFF = True
# How many pixels are read is a setting, which was asked before Pillow sees them.
Image.MAX_IMAGE_PIXELS = None
# What is wrong with a file is in the answer; the log of a server must not fill with it too.
warnings.filterwarnings("ignore", module=r"PIL\.")
with suppress(OSError, AttributeError):  # where Pillow's libtiff has no names that others may call
    _libtiff = ctypes.CDLL(_imaging.__file__)  # with the libraries that it needs
    _libtiff.TIFFSetErrorHandler(None)
    _libtiff.TIFFSetWarningHandler(None)

_Range = tuple[int, int]  # of bytes in the file


class _Block(NamedTuple):
    """A strip or tile: where it is, its bytes in the file, and those of its pixels."""

    offset: int
    size: int
    unpacked: int


class _Directory(NamedTuple):
    """The tags that matter, with all their values, and the bytes that tell of them."""

    order: Literal["<", ">"]
    tags: dict[int, tuple[int, ...]]
    occupied: list[_Range]

    def one(self, tag: int, default: int | None = None) -> int:
        """The value of a tag that has one. Raises BadImage without a default."""
        values = self.tags.get(tag, () if default is None else (default,))
        if len(values) != 1:
            raise _nonsense()
        return values[0]

    def same(self, tag: int, default: int) -> int:
        """The value that all samples share. Raises UnsupportedImage where they do not."""
        values = self.tags.get(tag, (default,))
        if len(values) not in (1, self.one(_SAMPLES, 1)):
            raise _nonsense()
        if len(set(values)) != 1:
            raise UnsupportedImage("The TIFF image has unequal channels; save it as grey or RGB.")
        return values[0]


def read(data: bytes, check_size: CheckSize) -> Pixels:
    directory = _directory(data)
    check_size(directory.one(_WIDTH), directory.one(_LENGTH))
    _check_form(directory)
    pixels = _places(directory, len(data), check_size)
    twin = _twin(data, directory, pixels)
    orientations = directory.tags.get(ORIENTATION, ())
    return upright(_decoded(twin, directory), orientations[0] if len(orientations) == 1 else 1)


def _decoded(twin: bytes, directory: _Directory) -> Pixels:
    """The pixels as they are stored, (H, W) or (H, W, 3)."""
    try:
        image = Image.open(BytesIO(twin), formats=["TIFF"])
    except UnidentifiedImageError:  # Pillow has no mode for these
        raise _unsupported(directory) from None
    with image:
        if image.mode not in _MODES:
            raise _unsupported(directory)
        image.load()
        if image.mode.startswith("I;16"):
            # In this machine's order of bytes: cv2 turns others as if they were in that.
            return np.asarray(image).astype(np.uint16, copy=False)
        if directory.same(_BITS, 1) <= 8:
            return _rgb_of(image)
    # Pillow keeps 8 bits of 16-bit colour, so it only was the judge.
    return decode_with_cv2(twin)


def _rgb_of(image: Image.Image) -> Pixels:
    """(H, W, 3) RGB in bands of rows, because Pillow's conversions copy the picture three times."""
    width, height = image.size
    rgb = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, 256):
        bottom = min(top + 256, height)
        rgb[top:bottom] = np.asarray(image.crop((0, top, width, bottom)).convert("RGB"))
    return rgb


# ---- the directory ------------------------------------------------------------------------------


def _directory(data: bytes) -> _Directory:
    """The first directory of a file. Tags that say nothing about pixels are passed over.

    Raises BadImage where it is cut or has a tag that matters twice, since libraries differ in which
    one counts, and UnsupportedImage where there is a second one.
    """
    order: Literal["<", ">"] = "<" if data[:2] == b"II" else ">"
    big = 43 in data[2:4]
    count_form, length_form, width = ("Q", "Q", 8) if big else ("H", "I", 4)
    header = 16 if big else 8
    if big and struct.unpack_from(f"{order}HH", data, 4) != (8, 0):
        raise _nonsense()
    (start,) = struct.unpack_from(order + length_form, data, header - width)
    (count,) = struct.unpack_from(order + count_form, data, start)
    entries = start + struct.calcsize(order + count_form)
    step = 4 + 2 * width
    end = entries + count * step
    if start < header or end > len(data):
        raise _nonsense()
    directory = _Directory(order, {}, [(0, header), (start, min(end + width, len(data)))])
    for entry in range(entries, end, step):
        tag, kind = struct.unpack_from(f"{order}HH", data, entry)
        if tag in _KNOWN:
            (length,) = struct.unpack_from(order + length_form, data, entry + 4)
            _take(directory, data, tag, kind, length, entry + 4 + width, width)
    if len(data) >= end + width and struct.unpack_from(order + length_form, data, end)[0]:
        raise UnsupportedImage("The TIFF image has several pages; send one picture.")
    return directory


def _take(
    directory: _Directory, data: bytes, tag: int, kind: int, length: int, place: int, width: int
) -> None:
    """Read the values of an entry, which stand at `place` where they fit there, else elsewhere."""
    most = _MAX_BLOCKS if tag in (_STRIPS, _STRIP_BYTES, _TILES, _TILE_BYTES) else _MAX_VALUES
    if tag in directory.tags or kind not in _TYPES or not 0 < length <= most:
        raise _nonsense()
    size = length * struct.calcsize(f"<{_TYPES[kind]}")
    if size > width:
        (place,) = struct.unpack_from(directory.order + ("Q" if width == 8 else "I"), data, place)
        _, own = directory.occupied[:2]  # after the header
        if (place < own[1] and place + size > own[0]) or place < directory.occupied[0][1]:
            raise _nonsense()
        directory.occupied.append((place, place + size))
    if place + size > len(data):
        raise _nonsense()
    directory.tags[tag] = struct.unpack_from(
        f"{directory.order}{length}{_TYPES[kind]}", data, place
    )


def _nonsense() -> BadImage:
    return BadImage("The TIFF image is damaged: its directory of tags makes no sense.")


# ---- what is read -------------------------------------------------------------------------------


def _check_form(directory: _Directory) -> None:
    """Raises for what cannot be read, or not strictly."""
    compression = directory.one(_COMPRESSION, _RAW)
    if compression not in _UNPACKED:
        name = _HIDE_DAMAGE.get(compression)
        why = f"as {name}, where damage goes unnoticed" if name else f"by method {compression}"
        raise UnsupportedImage(
            f"The TIFF image is compressed {why}; save it uncompressed, as LZW or Deflate, or as a"
            " JPEG or PNG file."
        )
    bits, photometric = directory.same(_BITS, 1), directory.one(_PHOTOMETRIC)
    plain = (0, 1, _RGB, _PALETTE) if bits <= 8 else (1, _RGB)  # white is 0, black is 0
    readable = (
        photometric in plain
        and bits in ((8, 16) if photometric == _RGB else (1, 2, 4, 8, 16))
        and directory.one(_PLANAR, 1) in (1, 2)
        and (bits <= 8 or not _in_planes(directory))
        and directory.same(_SAMPLE_FORMAT, 1) == 1  # unsigned
        and directory.one(_FILL_ORDER, 1) == 1
        and (compression in (_RAW, _PACKBITS) or directory.one(_PREDICTOR, 1) in (1, 2))
    )
    if not readable:
        raise _unsupported(directory)
    _check_extra(directory)
    if photometric == _PALETTE and len(directory.tags.get(_COLOURS, ())) != 3 << bits:
        raise BadImage("The TIFF image is damaged: its palette is missing, or of another length.")


def _in_planes(directory: _Directory) -> bool:
    """Whether each sample stands by itself; of one alone the tag says nothing."""
    return directory.one(_PLANAR, 1) == 2 and directory.one(_SAMPLES, 1) > 1


def _extra(directory: _Directory) -> int:
    """How many samples of a pixel are no colours; below 0 where colours are missing."""
    return directory.one(_SAMPLES, 1) - (3 if directory.one(_PHOTOMETRIC) == _RGB else 1)


def _check_extra(directory: _Directory) -> None:
    """Raises BadImage where there are not the colours, or other samples than the file says."""
    extra = _extra(directory)
    if extra > _MAX_EXTRA:
        raise _unsupported(directory)
    told = directory.tags.get(_EXTRA, (_UNSPECIFIED,) * max(0, extra))
    if extra < 0 or len(told) != extra or not set(told) <= {_UNSPECIFIED, 1, 2}:
        raise _nonsense()


def _unsupported(directory: _Directory) -> UnsupportedImage:
    photometric = directory.one(_PHOTOMETRIC)
    kind = _COLOUR_KINDS.get(photometric, f"of photometric {photometric}")
    return UnsupportedImage(
        f"The TIFF image is {kind}, {directory.one(_SAMPLES, 1)} channels of"
        f" {directory.same(_BITS, 1)} bits, sample format {directory.same(_SAMPLE_FORMAT, 1)}; save"
        " it as grey or RGB of 8 or 16 bits."
    )


def _places(directory: _Directory, length: int, check_size: CheckSize) -> list[_Block]:
    """The strips, or tiles. Raises BadImage unless each lies whole and by itself in the file."""
    offsets, sizes, needed = _blocks(directory, check_size)
    if len(offsets) != len(needed) or len(sizes) != len(needed):
        raise BadImage("The TIFF image is damaged: some of its strips or tiles are missing.")
    pixels_bits = directory.same(_BITS, 1) * directory.one(_SAMPLES, 1)
    picture = directory.one(_WIDTH) * directory.one(_LENGTH) * pixels_bits // 8
    if sum(needed) > max(4 * picture, _MAX_SLACK):  # a bomb; tiles as large as the picture fit
        raise BadImage("The TIFF image is damaged: its tiles are far larger than the picture.")
    if directory.one(_COMPRESSION, _RAW) == _RAW:
        # The last strip may be as long as the others though the picture ends before.
        whole = all(
            size in (n, needed[0]) and size >= n for size, n in zip(sizes, needed, strict=True)
        )
        if not whole:
            raise BadImage("The TIFF image is damaged: its strips are not as long as its rows.")
        sizes = tuple(needed)
    if 0 in sizes:
        raise BadImage("The TIFF image is damaged: some of its strips or tiles are missing.")
    pixels = [(start, start + size) for start, size in zip(offsets, sizes, strict=True)]
    if max(end for _, end in pixels) > length:
        raise BadImage("The TIFF image is cut short.")
    if _overlap(pixels, directory.occupied):
        raise BadImage("The TIFF image is damaged: its pixels lie where something else does.")
    return [_Block(*one) for one in zip(offsets, sizes, needed, strict=True)]


def _blocks(
    directory: _Directory, check_size: CheckSize
) -> tuple[tuple[int, ...], tuple[int, ...], list[int]]:
    """Offsets and byte counts of the strips or tiles, and the bytes of pixels in each of them."""
    width, height = directory.one(_WIDTH), directory.one(_LENGTH)
    samples = directory.one(_SAMPLES, 1)
    planes = samples if _in_planes(directory) else 1
    bits = directory.same(_BITS, 1) * samples // planes  # of a pixel
    if _TILES in directory.tags:
        across, down = directory.one(_TILE_WIDTH), directory.one(_TILE_LENGTH)
        check_size(across, down)  # a tile is unpacked whole, however small the picture
        if _STRIPS in directory.tags:
            raise _nonsense()
        tiles = -(-width // across) * -(-height // down)
        needed = [-(-across * bits // 8) * down] * tiles
        found = directory.tags[_TILES], directory.tags.get(_TILE_BYTES, ())
    else:
        rows = min(directory.one(_STRIP_ROWS, height), height)
        if rows < 1 or {_TILE_WIDTH, _TILE_LENGTH, _TILE_BYTES} & directory.tags.keys():
            raise _nonsense()
        stride = -(-width * bits // 8)
        needed = [stride * min(rows, height - top) for top in range(0, height, rows)]
        found = directory.tags.get(_STRIPS, ()), directory.tags.get(_STRIP_BYTES, ())
    return *found, needed * planes


def _overlap(pixels: list[_Range], others: list[_Range]) -> bool:
    """Whether pixels lie over other pixels or over something else; the others may share bytes."""
    merged: list[_Range] = []
    for start, end in sorted(others):
        if merged and start < merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    ranges = sorted(pixels + merged)
    return any(end > start for (_, end), (start, _) in pairwise(ranges))


# ---- the twin -----------------------------------------------------------------------------------


def _twin(data: bytes, directory: _Directory, pixels: list[_Block]) -> bytes:
    """A TIFF of the same pixels with nothing but these and the tags that tell of them."""
    tags = {tag: values for tag, values in directory.tags.items() if tag not in _LEFT_OUT}
    compression = directory.one(_COMPRESSION, _RAW)
    if compression in (_RAW, _PACKBITS):
        tags.pop(_PREDICTOR, None)
    if not _in_planes(directory):
        tags.pop(_PLANAR, None)
    if extra := _extra(directory):  # said also where the file does not: Pillow mixes planes up
        tags[_EXTRA] = (_UNSPECIFIED,) * extra
    if _COLOURS in tags:
        tags[_COLOURS] = _16_bit(tags[_COLOURS])
    view = memoryview(data)
    blocks = [view[one.offset : one.offset + one.size] for one in pixels]
    if compression in (_DEFLATE, _OLD_DEFLATE):
        blocks = [_stored(packed, one.unpacked) for packed, one in zip(blocks, pixels, strict=True)]
    sizes = tuple(map(len, blocks))
    tiles = _TILES in tags
    tags[_TILE_BYTES if tiles else _STRIP_BYTES] = sizes
    tags[_TILES if tiles else _STRIPS] = tuple(accumulate(sizes, initial=8))[:-1]
    end = 8 + sum(sizes)
    start = end + end % 2
    entries, values = _written(tags, directory.order, start + 2 + 12 * len(tags) + 4)
    mark = b"II*\0" if directory.order == "<" else b"MM\0*"
    header = mark + struct.pack(f"{directory.order}I", start)
    count = struct.pack(f"{directory.order}H", len(tags))
    return b"".join([header, *blocks, bytes(end % 2), count, entries, bytes(4), values])


_LEFT_OUT = {ORIENTATION, _FILL_ORDER}  # the first is undone here, and the second is as always


def _stored(packed: memoryview, size: int) -> memoryview:
    """A zlib stream of the same `size` bytes that nothing can be wrong with: it only holds them."""
    stream = zlib.decompressobj()
    unpacked = stream.decompress(packed, size + 1)
    rest = b"" if stream.eof else stream.decompress(stream.unconsumed_tail, 1)
    if len(unpacked) != size or rest or not stream.eof:
        raise BadImage("The TIFF image is damaged: a strip does not unpack to its rows.")
    return memoryview(zlib.compress(unpacked, 0))


def _written(tags: dict[int, tuple[int, ...]], order: str, place: int) -> tuple[bytes, bytes]:
    """The entries of a directory, and what they point to, which will stand at `place`."""
    entries, below = [], b""
    for tag, values in sorted(tags.items()):
        kind, form = (4, "I") if tag in _LONGS else (3, "H")
        value = struct.pack(f"{order}{len(values)}{form}", *values)
        if len(value) > 4:
            where = place + len(below)
            below += value + bytes(len(value) % 2)
            value = struct.pack(f"{order}I", where)
        entries.append(struct.pack(f"{order}HHI", tag, kind, len(values)) + value.ljust(4, b"\0"))
    return b"".join(entries), below


def _16_bit(colours: Iterable[int]) -> tuple[int, ...]:
    """A colour map in 16 bits, as the format has it. Where all fits into 8, a writer left it there.

    libtiff's own tools decide it the same way (tiff2rgba, checkcmap).
    """
    found = tuple(colours)
    return tuple(value * 257 for value in found) if max(found) <= 255 else found
