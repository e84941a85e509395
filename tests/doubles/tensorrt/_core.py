"""Loggers, shapes, weights: what building and running share."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable
from typing import Any

import numpy as np
from double_gpu import missing
from numpy.typing import NDArray

from ._names import (
    API,
    ENUMS,
    MAJOR,
    MOST_SIDES,
    Bound,
    Severity,
    bound,
    call_back,
    is_number,
    pure,
)

DataType = ENUMS["DataType"]
float32, float16, int8, int32 = DataType.FLOAT, DataType.HALF, DataType.INT8, DataType.INT32
int64, uint8, bfloat16 = DataType.INT64, DataType.UINT8, DataType.BF16
NUMPY = {
    DataType.FLOAT: np.float32,
    DataType.HALF: np.float16,
    DataType.INT8: np.int8,
    DataType.INT32: np.int32,
    DataType.INT64: np.int64,
    DataType.BOOL: np.bool_,
    DataType.UINT8: np.uint8,
}
ONNX_TYPES = {1: "FLOAT", 2: "UINT8", 3: "INT8", 6: "INT32", 7: "INT64", 9: "BOOL", 10: "HALF"}
_OTHER_SIZES = {"BF16": 2, "FP8": 1, "INT4": 0.5, "FP4": 0.5}


def _itemsize(kind: Any) -> float | None:
    return np.dtype(NUMPY[kind]).itemsize if kind in NUMPY else _OTHER_SIZES.get(kind.name)


DataType.itemsize = property(_itemsize)


def nptype(trt_type: Any) -> Any:
    """The numpy type; TypeError where there is none (bfloat16, fp8)."""
    if trt_type in NUMPY:
        return NUMPY[trt_type]
    raise TypeError("Could not resolve TensorRT datatype to an equivalent numpy datatype.")


def volume(iterable: Iterable[int]) -> int:
    found = 1
    for side in iterable:
        found *= side
    return found


@bound
class Dims(Bound):
    """Like a tuple, but unhashable, and two of them cannot be compared: that is a TypeError."""

    MAX_DIMS = MOST_SIDES
    __hash__ = None

    _sides: tuple[int, ...] = ()

    def __init__(self, shape: list = ()) -> None:
        if not all(is_number(side, "side") for side in shape):
            raise TypeError("__init__(): incompatible constructor arguments.")
        if len(shape) > MOST_SIDES:
            raise ValueError(f"Input length {len(shape)}. Max expected length is {MOST_SIDES}")
        self._sides = tuple(int(side) for side in shape)

    def __len__(self) -> int:
        return len(self._sides)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int) and not -len(self) <= index < len(self):
            raise IndexError("Out of bounds")
        if not isinstance(index, int | slice):
            raise TypeError("__getitem__(): incompatible function arguments.")
        return self._sides[index]

    def __setitem__(self, index: int, side: int) -> None:
        sides = list(self._sides)
        sides[index] = side
        self._sides = tuple(sides)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, tuple | list):
            raise TypeError("__eq__(): incompatible function arguments.")
        return self._sides == tuple(other)

    def __repr__(self) -> str:
        return str(self._sides)


# Loggers


@bound
class ILogger(Bound):
    """To be subclassed; `log` is called in whatever thread TensorRT is in."""

    Severity = Severity
    INTERNAL_ERROR, ERROR, WARNING = Severity.INTERNAL_ERROR, Severity.ERROR, Severity.WARNING
    INFO, VERBOSE = Severity.INFO, Severity.VERBOSE

    def __init__(self) -> None:
        pass

    def log(self, severity: Severity, msg: str) -> None:
        call_back("log", pure, "ILogger::log")


@bound
class Logger(ILogger):
    """Writes to stdout, also errors, what is at least as bad as `min_severity`."""

    def __init__(self, min_severity: Severity = Severity.WARNING) -> None:
        self._minimum = min_severity

    @property
    def min_severity(self) -> Any:
        return self._minimum

    @min_severity.setter
    def min_severity(self, value: Severity) -> None:
        self._minimum = value

    def log(self, severity: Severity, msg: str) -> None:
        if severity <= self._minimum:
            when, letter = time.strftime("%m/%d/%Y-%H:%M:%S"), "FEWIV"[int(severity)]
            print(f"[{when}] [TRT] [{letter}] {msg}", flush=True)


# The loggers in use, of which only the first counts: builder, runtime, refitter -> their logger.
_owners: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def register(owner: Any, logger: Any, function: str) -> None:
    """TensorRT has one logger at a time: that of the first builder, runtime or refitter alive."""
    known = next(iter(_owners.values()), None)
    _owners[owner] = logger if known is None else known
    if known is not None and known is not logger:
        say(
            owner,
            Severity.WARNING,
            f"The logger passed into {function} differs from one already provided for an existing"
            " builder, runtime, or refitter. TensorRT maintains only a single logger pointer at"
            " any given time, so the existing value, which can be retrieved with getLogger(),"
            " will be used instead. In order to use a new logger, first destroy all existing"
            " builder, runner or refitter objects.",
        )


def register_on_a_device(owner: Any, logger: Any, function: str) -> None:
    """As the builder and the runtime do, which cannot be made where there is no GPU."""
    register(owner, logger, function)
    if missing("device"):
        failure = "CUDA initialization failure with error: 100. Please check your CUDA installation"
        say(owner, Severity.ERROR, f"{function}: Error Code 6: API Usage Error ({failure})")
        raise TypeError("pybind11::init(): factory function returned nullptr")


def say(owner: Any, severity: Any, message: str) -> None:
    """Through the logger that counts for this builder, runtime or refitter."""
    write(_owners[owner], severity, message)


def write(logger: Any, severity: Any, message: str) -> None:
    call_back("log", logger.log, severity, message)


# Weights and memory


@bound
class Weights(Bound):
    """Of a numpy array, which is not copied: keep it until it was used. It has no shape."""

    def __init__(self, a: Any) -> None:
        kinds = {np.dtype(numpy): kind for kind, numpy in NUMPY.items()}
        if isinstance(a, DataType):
            a = np.empty(0, NUMPY.get(a, np.uint8))
        if not isinstance(a, np.ndarray):
            raise TypeError("__init__(): incompatible constructor arguments.")
        if a.dtype not in kinds:
            text = "[TRT] [E] Could not implicitly convert NumPy data type:"
            raise ValueError(f"{text} {_code(a.dtype)} to TensorRT.")
        if not a.flags.c_contiguous:
            text = "Could not convert non-contiguous NumPy array to Weights. Please use"
            raise ValueError(f"{text} numpy.ascontiguousarray() to fix this.")
        self._array: NDArray[Any] = a.reshape(-1)
        self._kind = kinds[a.dtype]

    @property
    def dtype(self) -> Any:
        return self._kind

    @property
    def size(self) -> int:
        return int(self._array.size)

    @property
    def nbytes(self) -> int:
        return int(self._array.nbytes)

    def numpy(self) -> NDArray[Any]:
        return self._array

    def __len__(self) -> int:
        return self.size


def _code(dtype: np.dtype[Any]) -> str:
    """As TensorRT names it: f64, u16. That of 10.3 has no number of bits."""
    return f"{dtype.kind}{8 * dtype.itemsize if MAJOR >= 11 else 0}"


def _no_sequence(*_: object) -> Any:
    raise TypeError("'IHostMemory' object is no sequence: it is a buffer")


class IHostMemory(bytearray):
    """Bytes that TensorRT holds: a buffer (`bytes(it)`, `file.write(it)`) and nothing else.

    A program may write into it, as into the real one, and compares only with itself.
    """

    __len__ = __getitem__ = __setitem__ = __iter__ = __contains__ = __add__ = _no_sequence
    __eq__, __hash__ = object.__eq__, object.__hash__

    def __new__(cls, *_: object) -> IHostMemory:
        raise TypeError("tensorrt.tensorrt.IHostMemory: No constructor defined!")

    def __bool__(self) -> Any:
        return True

    def __dir__(self) -> list[str]:
        return [*API["IHostMemory"]]

    def __getattribute__(self, name: str) -> Any:
        if name[0] != "_" and name not in API["IHostMemory"]:
            raise AttributeError(f"'IHostMemory' object has no attribute {name!r}")
        return super().__getattribute__(name)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"'IHostMemory' object has no attribute {name!r}")

    @property
    def dtype(self) -> Any:
        return DataType.INT8

    @property
    def nbytes(self) -> int:
        return bytearray.__len__(self)


def host_memory(data: bytes) -> IHostMemory:
    made = bytearray.__new__(IHostMemory)
    bytearray.__init__(made, data)
    return made
