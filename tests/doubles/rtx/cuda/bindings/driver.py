"""A double of cuda.bindings.driver (13.5): functions of the driver that give (CUresult, ...).

Names and arguments are those of the package; tests/engines/nvidia compares them with it
where it is installed. What they do is done by `double_gpu`, as for pycuda's double. Here nothing
belongs to a thread: what wants a context wants one that is current.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import numpy as np
from double_gpu import (
    INVALID_CONTEXT,
    INVALID_DEVICE,
    INVALID_HANDLE,
    INVALID_VALUE,
    NO_DEVICE,
    NOT_INITIALIZED,
    OUT_OF_MEMORY,
    WORDS,
    Bytes,
    Crash,
    Fault,
    Memory,
    gpu,
    missing,
)

__all__ = ["Crash", "gpu"]
CU_MEMHOSTALLOC_DEVICEMAP = 2
CUresult = IntEnum(
    "CUresult",
    {"CUDA_SUCCESS": 0, "CUDA_ERROR_OUT_OF_MEMORY": OUT_OF_MEMORY}
    | {f"CUDA_ERROR_{code}": code for code in WORDS if code != OUT_OF_MEMORY},
)


class CUdevice_attribute(IntEnum):
    CU_DEVICE_ATTRIBUTE_INTEGRATED = 18
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76


class CUevent_flags(IntEnum):
    CU_EVENT_BLOCKING_SYNC = 1
    CU_EVENT_DISABLE_TIMING = 2


class _Handle:
    """CUstream, CUevent, CUdeviceptr: their number is what counts."""

    def __init__(self, number: int, of: Any = None) -> None:
        self._number, self.of = number, of

    def __int__(self) -> int:
        return self._number

    __index__ = __int__


def _result(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*arguments: Any) -> tuple[Any, ...]:
        if missing("libcuda"):
            raise RuntimeError(
                '"cuda" is an NVIDIA driver library and can only be found via system'
            )
        try:
            found = function(*arguments)
        except Fault as fault:
            return (CUresult(fault.code), None)
        if isinstance(found, tuple):
            return (CUresult.CUDA_SUCCESS, *found)
        return (CUresult.CUDA_SUCCESS,) if found is None else (CUresult.CUDA_SUCCESS, found)

    return wrapped


def cuGetErrorString(error: Any) -> tuple[Any, bytes]:
    return CUresult.CUDA_SUCCESS, WORDS[int(error)].encode()


@_result
def cuDriverGetVersion() -> int:
    return 13000


@_result
def cuInit(Flags: int) -> None:
    if missing("device"):
        raise Fault(NO_DEVICE)
    gpu.initialised = True


# Devices and contexts


@_result
def cuDeviceGet(ordinal: int) -> int:
    if not gpu.initialised:
        raise Fault(NOT_INITIALIZED)
    if ordinal != 0:
        raise Fault(INVALID_DEVICE)
    return 0


@_result
def cuDeviceGetName(length: int, dev: Any) -> bytes:
    return gpu.model.name.encode().ljust(length, b"\0")


@_result
def cuDeviceGetAttribute(attrib: Any, dev: Any) -> int:
    kinds = CUdevice_attribute
    values = {
        kinds.CU_DEVICE_ATTRIBUTE_INTEGRATED: int(gpu.model.integrated),
        kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: gpu.model.compute[0],
        kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: gpu.model.compute[1],
    }
    return values[kinds(attrib)]


class _Context:
    """What `gpu.stack()` holds, as pycuda's double does."""

    def __init__(self, context: Any) -> None:
        self._context = context


@_result
def cuDevicePrimaryCtxRetain(dev: Any) -> Any:
    gpu.contexts.add(gpu.primary)
    gpu.primary.users += 1
    return _Context(gpu.primary)


@_result
def cuDevicePrimaryCtxRelease(dev: Any) -> None:
    if not gpu.primary.users:
        raise Fault(INVALID_CONTEXT)
    gpu.primary.users -= 1
    if not gpu.primary.users:
        gpu.contexts.discard(gpu.primary)
    gpu.write_report()


@_result
def cuCtxPushCurrent(ctx: Any) -> None:
    if ctx._context not in gpu.contexts:
        raise Fault(INVALID_CONTEXT)
    gpu.stack().append(ctx)


@_result
def cuCtxPopCurrent() -> Any:
    if not gpu.stack():
        raise Fault(INVALID_CONTEXT)
    return gpu.stack().pop()


@_result
def cuCtxSynchronize() -> None:
    gpu.check_context()
    for queue in list(gpu.streams.values()):
        queue.drain()
    gpu.check()


# Streams and events


@_result
def cuStreamCreate(Flags: int) -> Any:
    gpu.check_context()
    queue = gpu.new_stream(gpu.current(), blocking=not Flags & 1)
    return _Handle(queue.handle)


def _queue(stream: Any) -> Any:
    if int(stream) not in gpu.streams:
        raise Fault(INVALID_HANDLE)
    return gpu.streams[int(stream)]


@_result
def cuStreamDestroy(hStream: Any) -> None:
    gpu.check_context()
    _queue(hStream)
    del gpu.streams[int(hStream)]


@_result
def cuStreamSynchronize(hStream: Any) -> None:
    gpu.check()
    _queue(hStream).drain()
    gpu.check()


@_result
def cuEventCreate(Flags: int) -> Any:
    gpu.check_context()
    handle = gpu.new_handle()
    gpu.events.add(handle)
    return _Handle(handle)


@_result
def cuEventDestroy(hEvent: Any) -> None:
    gpu.check_context()
    gpu.events.remove(int(hEvent))


@_result
def cuEventRecord(hEvent: Any, hStream: Any) -> None:
    gpu.check_context()
    queue = _queue(hStream)
    hEvent.of = (queue, queue.add(lambda: None))


@_result
def cuEventSynchronize(hEvent: Any) -> None:
    gpu.check()
    if hEvent.of is not None:
        queue, work = hEvent.of
        queue.drain(work)
    gpu.check()


# Memory


@_result
def cuMemGetInfo() -> tuple[int, int]:
    gpu.check_context()
    return gpu.free, gpu.total


@_result
def cuMemAlloc(bytesize: int) -> Any:
    gpu.check_context()
    if bytesize <= 0:
        raise Fault(INVALID_VALUE)
    memory = gpu.allocate(bytesize, "device memory")
    return _Handle(memory.address, memory)


@_result
def cuMemFree(dptr: Any) -> None:
    gpu.check_context()
    gpu.release(dptr.of)


_locked: dict[int, Memory] = {}
_counting = threading.Lock()


@_result
def cuMemHostAlloc(bytesize: int, Flags: int) -> int:
    """The package gives the address as a number."""
    gpu.check_context()
    memory = gpu.allocate(bytesize, "page-locked memory", counted=gpu.model.integrated)
    assert memory.data is not None
    memory.host = memory.data.__array_interface__["data"][0]
    memory.mapped = bool(Flags & CU_MEMHOSTALLOC_DEVICEMAP)
    with _counting:
        _locked[memory.host] = memory
    return memory.host


@_result
def cuMemHostGetDevicePointer(p: int, Flags: int) -> Any:
    gpu.check_context()
    memory = _locked.get(p)
    if memory is None or not memory.mapped:
        raise Fault(INVALID_VALUE)
    return _Handle(memory.address)


@_result
def cuMemFreeHost(p: int) -> None:
    gpu.check_context()
    with _counting:
        memory = _locked.pop(p, None)
    if memory is None:
        raise Fault(INVALID_VALUE)
    gpu.release(memory)


def _of_host(address: int, nbytes: int) -> Bytes:
    return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8)), (nbytes,))


def _of_device(address: int, nbytes: int) -> int:
    gpu.check_context()
    if not gpu.holds(address, nbytes):
        raise Fault(INVALID_VALUE)
    return address


@_result
def cuMemcpyHtoD(dstDevice: int, srcHost: int, ByteCount: int) -> None:
    address = _of_device(dstDevice, ByteCount)
    gpu.synchronise_default()
    gpu.check()
    gpu.at(address, ByteCount, "cuMemcpyHtoD")[:] = _of_host(srcHost, ByteCount)


@_result
def cuMemcpyDtoH(dstHost: int, srcDevice: int, ByteCount: int) -> None:
    address = _of_device(srcDevice, ByteCount)
    gpu.synchronise_default()
    gpu.check()
    _of_host(dstHost, ByteCount)[:] = gpu.at(address, ByteCount, "cuMemcpyDtoH")


@_result
def cuMemcpyHtoDAsync(dstDevice: int, srcHost: int, ByteCount: int, hStream: Any) -> None:
    """Page-locked memory is read when the stream comes to it; other memory is read at once."""
    address, data = _of_device(dstDevice, ByteCount), _of_host(srcHost, ByteCount)
    if not (locked := gpu.page_locked(srcHost, ByteCount)):
        data = data.copy()

    def copy() -> None:
        if locked and not gpu.page_locked(srcHost, ByteCount):
            gpu.crash("page-locked memory was freed before the copy that uses it was done")
        gpu.at(address, ByteCount, "cuMemcpyHtoDAsync")[:] = data

    _queue(hStream).add(copy)


@_result
def cuMemcpyDtoHAsync(dstHost: int, srcDevice: int, ByteCount: int, hStream: Any) -> None:
    """Into page-locked memory later; into other memory before it returns, after all before it."""
    address, data = _of_device(srcDevice, ByteCount), _of_host(dstHost, ByteCount)
    locked = gpu.page_locked(dstHost, ByteCount)

    def copy() -> None:
        if locked and not gpu.page_locked(dstHost, ByteCount):
            gpu.crash("page-locked memory was freed before the copy that uses it was done")
        data[:] = gpu.at(address, ByteCount, "cuMemcpyDtoHAsync")

    queue = _queue(hStream)
    queue.add(copy)
    if not locked:
        queue.drain()
        gpu.check()
