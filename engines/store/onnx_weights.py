"""Whether the weights in a model.onnx are numbers, read without the package onnx.

Of an image, which is finite, finite weights make what is finite, as long as nothing overflows. So
NaN is looked for here: further on, a Relu, a maximum or a limit may make a number of it.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from engines.errors import BadBundle

# What is in a message of onnx.proto: the number of each field that leads to weights.
_INSIDE = {
    "model": {7: "graph", 25: "function"},
    "function": {7: "node"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {2: "floats", 5: "tensor", 6: "graph", 7: "floats", 10: "tensor", 11: "graph",
                  22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor"},
}  # fmt: skip
_FLOATS, _INTEGERS, _RAW, _DOUBLES, _TYPE = 4, 5, 9, 10, 2  # fields of a tensor
_FLOAT, _HALF, _DOUBLE, _BFLOAT = 1, 10, 11, 16  # its types
# How wide a number is, and its exponent: infinity and NaN have all bits of it.
_EXPONENT: dict[object, tuple[str, int]] = {
    _FLOAT: ("<u4", 0x7F80_0000), _HALF: ("<u2", 0x7C00), _BFLOAT: ("<u2", 0x7F80),
    _DOUBLE: ("<u8", 0x7FF0_0000_0000_0000),
}  # fmt: skip
_CHUNK = 1 << 20  # bytes that are looked at together
_VARINT, _BYTES, _LENGTHS = 0, 2, {1: 8, 5: 4}  # how protobuf writes a field

_Held = int | memoryview  # what a field holds


def check_weights(onnx: Path) -> None:
    """Look at every weight of a graph; 8 ms for 11 MB.

    Raises:
        BadBundle: one is not finite (a damaged training, or a bit that fell), or the file is no
            ONNX model.
    """
    try:
        with onnx.open("rb") as file:
            finite = _all_finite(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:
        raise BadBundle(f"{onnx} is not a readable ONNX model: {error}.") from None
    if not finite:
        raise BadBundle(f"{onnx} holds weights that are not finite: train it again.")


def _all_finite(model: mmap.mmap) -> bool:
    left: list[tuple[str, memoryview]] = [("model", memoryview(model))]
    while left:
        kind, message = left.pop()
        if kind == "tensor":
            if not _is_finite_tensor(message):
                return False
            continue
        for number, held in _fields(message):
            inside = _INSIDE[kind].get(number)
            if inside is None or isinstance(held, int):
                continue
            if inside == "floats" and not _are_finite(held, _FLOAT):
                return False
            if inside != "floats":
                left.append((inside, held))
    return True


def _is_finite_tensor(message: memoryview) -> bool:
    fields = list(_fields(message))
    kind = next((held for number, held in fields if number == _TYPE), 0)
    types = {_RAW: kind, _FLOATS: _FLOAT, _DOUBLES: _DOUBLE}
    for number, held in fields:
        if number == _INTEGERS and kind in (_HALF, _BFLOAT):
            number, held = _RAW, _halves(held)
        if number in types and not isinstance(held, int) and not _are_finite(held, types[number]):
            return False
    return True


def _halves(held: _Held) -> memoryview:
    """The 16 bits each of halves that are written as integers."""
    bits, at = [held] if isinstance(held, int) else [], 0
    while not isinstance(held, int) and at < len(held):
        one, at = _varint(held, at)
        bits.append(one)
    return memoryview(b"".join(struct.pack("<H", one & 0xFFFF) for one in bits))


def _are_finite(numbers: memoryview, kind: object) -> bool:
    width, exponent = _EXPONENT.get(kind, ("", 0))
    if not width:  # integers, and what no runtime of ours computes with
        return True
    for start in range(0, len(numbers), _CHUNK):
        bits = np.frombuffer(numbers[start : start + _CHUNK], width)
        if ((bits & bits.dtype.type(exponent)) == exponent).any():
            return False
    return True


def _fields(message: memoryview) -> Iterator[tuple[int, _Held]]:
    """Number and content of each field, as protobuf writes them; ValueError for anything else."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, how = key >> 3, key & 7
        if how == _VARINT:
            held, at = _varint(message, at)
            yield number, held
            continue
        length = _LENGTHS.get(how)
        if how == _BYTES:
            length, at = _varint(message, at)
        if length is None or at + length > len(message):
            raise ValueError("it is damaged, or cut off")
        yield number, message[at : at + length]
        at += length


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """An integer of as many bytes as it takes, and where the next field begins."""
    found = 0
    for place, byte in enumerate(message[at : at + 10]):
        found |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return found, at + place + 1
    raise ValueError("it is damaged, or cut off")
