"""Whole TIFF files of every form that is read, in both orders of bytes, with what they show."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from support.damage import tiff_file

_RAW, _DEFLATE, _PACKBITS = 1, 8, 32773
_WHITE_IS_0, _RGB, _PALETTE = 0, 2, 3
_FLIPPED = {1: (), 2: (1,), 3: (0, 1), 4: (0,), 5: (), 6: (1,), 7: (0, 1), 8: (0,)}


class Form(NamedTuple):
    """A file, what it is, and its pixels upright, (H, W, 3) RGB."""

    name: str
    data: bytes
    pixels: NDArray[Any]


class _Chosen(NamedTuple):
    order: str
    photometric: int
    bits: int
    extra: int  # samples that are no colours
    said: int | None  # what a tag says of them
    planar: int
    compression: int
    predictor: int
    tile: int
    rows: int  # of a strip
    orientation: int
    width: int
    height: int

    @property
    def colours(self) -> int:
        return 3 if self.photometric == _RGB else 1


def tiff_forms(count: int) -> Iterator[Form]:
    """`count` files, the same on every machine."""
    for number in range(count):
        chosen = _chosen(random.Random(number))
        numbers = np.random.default_rng(number)
        shape = chosen.height, chosen.width, chosen.colours + chosen.extra
        pixels = numbers.integers(0, 1 << chosen.bits, shape).astype(np.uint16)
        colours = numbers.integers(256, 65536, (1 << chosen.bits, 3))
        yield Form(str(chosen), _written(chosen, pixels, colours), _shown(chosen, pixels, colours))


def _chosen(chance: random.Random) -> _Chosen:
    photometric = chance.choice((_WHITE_IS_0, 1, 1, _RGB, _RGB, _PALETTE))
    bits = chance.choice({1: (1, 2, 4, 8, 16, 16), _RGB: (8, 16)}.get(photometric, (1, 4, 8)))
    most = {(1, 8): 1, (_RGB, 8): 3, (_RGB, 16): 1, (_PALETTE, 8): 1}.get((photometric, bits), 0)
    extra = chance.randint(0, most)
    one_sample = extra == 0 and photometric != _RGB
    compression = chance.choice((_RAW, _DEFLATE, _PACKBITS))
    predicts = compression == _DEFLATE and bits >= 8
    height = chance.randint(1, 40)
    return _Chosen(
        order=chance.choice("<>"),
        photometric=photometric,
        bits=bits,
        extra=extra,
        said=chance.choice((None, 0, 1, 2)) if extra else None,
        planar=chance.choice((1, 2)) if bits == 8 or one_sample else 1,
        compression=compression,
        predictor=chance.choice((1, 2)) if predicts else 1,
        tile=chance.choice((0, 0, 16, 32)),
        rows=chance.choice((height, 1, 3, 7)),
        orientation=chance.randint(1, 8),
        width=chance.randint(1, 40),
        height=height,
    )


def _written(one: _Chosen, pixels: NDArray[Any], colours: NDArray[Any]) -> bytes:
    samples = pixels.shape[2]
    planes = [pixels[..., n : n + 1] for n in range(samples)] if one.planar == 2 else [pixels]
    blocks = [_packed(one, block) for plane in planes for block in _blocks(one, plane)]
    offsets = [8 + sum(map(len, blocks[:n])) for n in range(len(blocks))]
    tags = {
        256: [one.width], 257: [one.height], 258: [one.bits] * samples, 259: [one.compression],
        262: [one.photometric], 274: [one.orientation], 277: [samples], 284: [one.planar],
        317: [one.predictor],
    }  # fmt: skip
    sizes = list(map(len, blocks))
    if one.tile:
        tags |= {322: [one.tile], 323: [one.tile], 324: offsets, 325: sizes}
    else:
        tags |= {273: offsets, 278: [one.rows], 279: sizes}
    if one.said is not None:
        tags[338] = [one.said] + [0] * (one.extra - 1)
    if one.photometric == _PALETTE:
        tags[320] = colours.T.ravel().tolist()
    return tiff_file(b"".join(blocks), tags, one.order)


def _blocks(one: _Chosen, plane: NDArray[Any]) -> Iterator[NDArray[Any]]:
    if not one.tile:
        for top in range(0, one.height, one.rows):
            yield plane[top : top + one.rows]
        return
    margin = [(0, -one.height % one.tile), (0, -one.width % one.tile), (0, 0)]
    padded = np.pad(plane, margin, mode="edge")
    for top in range(0, padded.shape[0], one.tile):
        for left in range(0, padded.shape[1], one.tile):
            yield padded[top : top + one.tile, left : left + one.tile]


def _packed(one: _Chosen, block: NDArray[Any]) -> bytes:
    if one.predictor == 2:
        block = np.concatenate([block[:, :1], block[:, 1:] - block[:, :-1]], axis=1)
    if one.bits >= 8:
        kind = np.dtype(f"{one.order}u{one.bits // 8}")
        data = (block & ((1 << one.bits) - 1)).astype(kind).tobytes()
    else:
        bits = block >> np.arange(one.bits - 1, -1, -1, dtype=np.uint16) & 1  # of (H, W, 1)
        data = np.packbits(bits.astype(np.uint8).reshape(len(block), -1), axis=1).tobytes()
    if one.compression == _DEFLATE:
        return zlib.compress(data)
    if one.compression == _PACKBITS:
        parts = (data[start : start + 128] for start in range(0, len(data), 128))
        return b"".join(bytes([len(part) - 1]) + part for part in parts)
    return data


def _shown(one: _Chosen, pixels: NDArray[Any], colours: NDArray[Any]) -> NDArray[Any]:
    image = pixels[..., : one.colours].astype(int)
    if one.photometric == _PALETTE:
        image = (colours >> 8)[image[..., 0]]
    else:
        image = image >> 8 if one.bits == 16 else image * 255 // ((1 << one.bits) - 1)
        image = 255 - image if one.photometric == _WHITE_IS_0 else image
        image = image.repeat(3 // one.colours, axis=2)
    if one.orientation >= 5:
        image = np.swapaxes(image, 0, 1)
    return np.flip(image, _FLIPPED[one.orientation])
