"""Loggers, shapes, weights: what building and running share."""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import Iterable
from typing import Any

import numpy as np
from double_gpu import missing
from numpy.typing import NDArray

from ._names import API, ENUMS, Bound, Severity, bound, call_back, pure, size_or_int

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
DataType.itemsize = property(lambda self: np.dtype(NUMPY[self]).itemsize if self in NUMPY else 2)


def nptype(trt_type: Any) -> Any:
    """The numpy type; TypeError where there is none (bfloat16, fp8)."""
    if trt_type in NUMPY:
        return NUMPY[trt_type]
    raise TypeError("Could not resolve TensorRT datatype to an equivalent numpy datatype.")


def volume(iterable: Iterable[int]) -> int:
    return int(np.prod(tuple(iterable), dtype=np.int64))


@bound
class Dims(Bound):
    """Like a tuple, but unhashable, and two of them cannot be compared: that is a TypeError."""

    MAX_DIMS = 8
    __hash__ = None

    def __init__(self, shape: list = ()) -> None:
        if not all(size_or_int(side) for side in shape):
            raise TypeError("__init__(): incompatible constructor arguments.")
        self._sides = tuple(int(side) for side in shape)

    def __len__(self) -> int:
        return len(self._sides)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int) and not -len(self) <= index < len(self):
            raise IndexError("Out of bounds")
        return self._sides[index]

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
    """Writes to stderr what is at least as bad as `min_severity`."""

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
            print(f"[{when}] [TRT] [{letter}] {msg}", file=sys.stderr, flush=True)


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
    """Of a numpy array, which is not copied: keep it until it was used."""

    def __init__(self, a: Any) -> None:
        kinds = {np.dtype(numpy): kind for kind, numpy in NUMPY.items()}
        if not isinstance(a, np.ndarray):
            raise TypeError("__init__(): incompatible constructor arguments.")
        if a.dtype not in kinds:
            raise ValueError("Could not implicitly convert NumPy data type to TensorRT.")
        self._array: NDArray[Any] = a
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


def _no_sequence(*_: object) -> Any:
    raise TypeError("'IHostMemory' object is no sequence: it is a buffer")


class IHostMemory(bytes):
    """Bytes that TensorRT holds: a buffer (`bytes(it)`, `file.write(it)`) and nothing else."""

    __len__ = __getitem__ = __iter__ = __contains__ = __add__ = _no_sequence

    def __bool__(self) -> Any:
        return True

    def __getattribute__(self, name: str) -> Any:
        if name[0] != "_" and name not in API["IHostMemory"]:
            raise AttributeError(f"'IHostMemory' object has no attribute {name!r}")
        return super().__getattribute__(name)

    @property
    def dtype(self) -> Any:
        return DataType.INT8

    @property
    def nbytes(self) -> int:
        return bytes.__len__(self)


host_memory = IHostMemory
