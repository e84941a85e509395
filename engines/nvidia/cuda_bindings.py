"""pycuda's names, as far as Kensa uses them, on cuda-bindings: NVIDIA's own package, a wheel.

What belongs to a context is freed in the thread that has it, as with pycuda; `Gpu` sees to that.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
from cuda.bindings import driver
from numpy.typing import DTypeLike, NDArray

Array = NDArray[Any]


class Error(Exception):
    """A call of the driver failed."""


class MemoryError(Error):  # noqa: A001 (pycuda's name)
    """There was no memory left."""


class device_attribute:  # noqa: N801
    """What may be asked of a device."""

    INTEGRATED = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_INTEGRATED


class event_flags:  # noqa: N801
    """How an event waits."""

    BLOCKING_SYNC = int(driver.CUevent_flags.CU_EVENT_BLOCKING_SYNC)
    DISABLE_TIMING = int(driver.CUevent_flags.CU_EVENT_DISABLE_TIMING)


class host_alloc_flags:  # noqa: N801
    """How page-locked memory is taken."""

    DEVICEMAP = int(driver.CU_MEMHOSTALLOC_DEVICEMAP)


def no_driver() -> str | None:
    """Why there is no driver, None where there is one. Begins nothing."""
    try:
        _call("cuDriverGetVersion")
    except RuntimeError:  # the package's own, where it finds no library
        return "there is no libcuda.so.1"
    except Error as error:
        return str(error)
    return None


def _call(name: str, *arguments: Any) -> Any:
    """What a function of the driver gives; its error as ours, in pycuda's words."""
    code, *found = getattr(driver, name)(*arguments)
    if code == driver.CUresult.CUDA_SUCCESS:
        return found[0] if len(found) == 1 else tuple(found)
    _, words = driver.cuGetErrorString(code)
    kind = MemoryError if code == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY else Error
    said = words.decode() if words else f"error {int(code)}"
    raise kind(f"{name} failed: {said}")


def init() -> None:
    """Begin with CUDA; a second call does nothing."""
    try:
        _call("cuInit", 0)
    except RuntimeError as error:
        raise Error(str(error)) from None


class Device:
    """A GPU, by its number."""

    def __init__(self, number: int) -> None:
        self._device = _call("cuDeviceGet", number)

    def name(self) -> str:
        found: bytes = _call("cuDeviceGetName", 256, self._device)
        return found.split(b"\0")[0].decode(errors="replace")

    def compute_capability(self) -> tuple[int, int]:
        kinds = driver.CUdevice_attribute
        major = kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
        minor = kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR
        return self.get_attribute(major), self.get_attribute(minor)

    def get_attribute(self, attribute: Any) -> int:
        return int(_call("cuDeviceGetAttribute", attribute, self._device))

    def retain_primary_context(self) -> Context:
        return Context(self._device)


class Context:
    """The primary context of a device, until it is detached."""

    def __init__(self, device: Any) -> None:
        self._device = device
        self._context = _call("cuDevicePrimaryCtxRetain", device)

    def push(self) -> None:
        _call("cuCtxPushCurrent", self._context)

    @staticmethod
    def pop() -> None:
        _call("cuCtxPopCurrent")

    @staticmethod
    def synchronize() -> None:
        _call("cuCtxSynchronize")

    def detach(self) -> None:
        _call("cuDevicePrimaryCtxRelease", self._device)


class Stream:
    """Work in its order."""

    def __init__(self, flags: int = 0) -> None:
        self.handle = 0
        self._stream = _call("cuStreamCreate", flags)
        self.handle = int(self._stream)

    def synchronize(self) -> None:
        _call("cuStreamSynchronize", self._stream)

    def __del__(self) -> None:
        if self.handle:
            _give_back("cuStreamDestroy", self._stream)


class Event:
    """A place in a stream that can be waited for."""

    def __init__(self, flags: int = 0) -> None:
        self._event: Any = None
        self._event = _call("cuEventCreate", flags)

    def record(self, stream: Stream) -> None:
        _call("cuEventRecord", self._event, stream._stream)

    def synchronize(self) -> None:
        _call("cuEventSynchronize", self._event)

    def __del__(self) -> None:
        if self._event is not None:
            _give_back("cuEventDestroy", self._event)


class DeviceAllocation:
    """Memory of the device; `int` of it is the address."""

    def __init__(self, nbytes: int) -> None:
        self._pointer: Any = None
        self._pointer = _call("cuMemAlloc", nbytes)

    def __int__(self) -> int:
        return int(self._pointer)

    def free(self) -> None:
        pointer, self._pointer = self._pointer, None
        if pointer is not None:
            _give_back("cuMemFree", pointer)

    def __del__(self) -> None:
        self.free()


class PagelockedHostAllocation:
    """Page-locked memory of the host: the `base` of the array on it."""

    def __init__(self, shape: tuple[int, ...], dtype: DTypeLike, flags: int) -> None:
        self._pointer: Any = None
        kind = np.dtype(dtype)
        nbytes = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        self._pointer = int(_call("cuMemHostAlloc", nbytes, flags))
        self.__array_interface__ = {
            "shape": shape,
            "typestr": kind.str,
            "data": (self._pointer, False),
            "version": 3,
        }

    def get_device_pointer(self) -> int:
        """Its address for the device. Of memory that was taken with DEVICEMAP."""
        return int(_call("cuMemHostGetDevicePointer", self._pointer, 0))

    def free(self) -> None:
        """No array on it may be used any more."""
        pointer, self._pointer = self._pointer, None
        if pointer is not None:
            _give_back("cuMemFreeHost", pointer)

    def __del__(self) -> None:
        self.free()


def mem_get_info() -> tuple[int, int]:
    """Bytes free, and in all."""
    free, total = _call("cuMemGetInfo")
    return int(free), int(total)


def mem_alloc(nbytes: int) -> DeviceAllocation:
    """Memory of the device."""
    return DeviceAllocation(nbytes)


def pagelocked_empty(shape: tuple[int, ...], dtype: DTypeLike, mem_flags: int = 0) -> Array:
    """An array in page-locked memory, which goes with its `base`."""
    return np.asarray(PagelockedHostAllocation(tuple(shape), dtype, mem_flags))


def memcpy_htod(to: Any, array: Array) -> None:
    """Copy an array to the device, and wait."""
    _call("cuMemcpyHtoD", int(to), _address(array), array.nbytes)


def memcpy_dtoh(array: Array, of: Any) -> None:
    """Fill an array from the device, and wait."""
    _call("cuMemcpyDtoH", _address(array), int(of), array.nbytes)


def memcpy_htod_async(to: Any, array: Array, stream: Stream) -> None:
    """Copy an array to the device, when the stream comes to it."""
    _call("cuMemcpyHtoDAsync", int(to), _address(array), array.nbytes, stream._stream)


def memcpy_dtoh_async(array: Array, of: Any, stream: Stream) -> None:
    """Fill an array from the device, when the stream comes to it."""
    _call("cuMemcpyDtoHAsync", _address(array), int(of), array.nbytes, stream._stream)


def _address(array: Array) -> int:
    if not array.flags.c_contiguous:
        raise ValueError("an array that is copied must be contiguous")
    return int(array.ctypes.data)


def _give_back(name: str, *arguments: Any) -> None:
    """As pycuda does it: on a GPU that is lost nothing can be given back, and nobody is told."""
    with contextlib.suppress(Error):
        _call(name, *arguments)
