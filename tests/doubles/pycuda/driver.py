"""A double of pycuda.driver, after its source (2024.1.2: src/cpp/cuda.hpp, wrap_cudadrv.cpp).

Names, argument names, the tree of errors, their words and the rules about contexts are pycuda's:
a context belongs to the thread that retained it; what was allocated is freed only there (elsewhere
pycuda warns and leaks); a context left on the stack at the end of a thread ends the process.
"""

from __future__ import annotations

import functools
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from double_gpu import (
    INVALID_CONTEXT,
    INVALID_DEVICE,
    INVALID_HANDLE,
    INVALID_VALUE,
    LAUNCH_FAILED,
    LAUNCH_TIMEOUT,
    NO_DEVICE,
    NOT_INITIALIZED,
    NOT_READY,
    OUT_OF_MEMORY,
    WORDS,
    Bytes,
    Crash,
    Fault,
    Memory,
    Work,
    gpu,
    missing,
    now,
)

if missing("libcuda"):  # the container was started without the nvidia runtime
    raise ImportError("libcuda.so.1: cannot open shared object file: No such file or directory")

__all__ = ["Crash", "gpu"]  # for tests: `cuda.gpu.alive()`, `cuda.gpu.fail()`, `cuda.Crash`
Function = TypeVar("Function", bound=Callable[..., Any])


class Error(Exception):
    """The root of pycuda's errors."""


class MemoryError(Error):
    """Out of memory."""


class LogicError(Error):
    """Everything that is none of the others: also illegal addresses, see `_error`."""


class LaunchError(Error):
    """A kernel failed."""


class RuntimeError(Error):
    """No device, or not ready."""


def _error(routine: str, code: int, more: str = "") -> Error:
    """As `translate_cuda_error`. An illegal address is a LogicError there, surprisingly."""
    kinds: dict[int, type[Error]] = {
        LAUNCH_FAILED: LaunchError,
        LAUNCH_TIMEOUT: LaunchError,
        OUT_OF_MEMORY: MemoryError,
        NO_DEVICE: RuntimeError,
        NOT_READY: RuntimeError,
    }
    words = f"{routine} failed: {WORDS[code]}" + (f" - {more}" if more else "")
    return kinds.get(code, LogicError)(words)


def _calls(routine: str) -> Callable[[Function], Function]:
    """A function that calls the driver's `routine`: its faults become pycuda's errors."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def wrapped(*args: Any, **named: Any) -> Any:
            try:
                return function(*args, **named)
            except Fault as fault:
                raise _error(routine, fault.code) from None

        return wrapped

    return decorate


def _initialised() -> None:
    if not gpu.initialised:
        raise Fault(NOT_INITIALIZED)


# Devices and contexts


def init(flags: int = 0) -> None:
    if missing("device"):
        raise _error("cuInit", NO_DEVICE)
    gpu.initialised = True


def get_version() -> tuple[int, int, int]:
    return (12, 6, 0)


def get_driver_version() -> int:
    return 12060


class device_attribute:
    """Those of CUdevice_attribute that matter here."""

    MULTIPROCESSOR_COUNT = 16
    INTEGRATED = 18
    CAN_MAP_HOST_MEMORY = 19
    UNIFIED_ADDRESSING = 41
    COMPUTE_CAPABILITY_MAJOR = 75
    COMPUTE_CAPABILITY_MINOR = 76


class host_alloc_flags:
    PORTABLE = 1
    DEVICEMAP = 2
    WRITECOMBINED = 4


class ctx_flags:
    SCHED_AUTO, SCHED_SPIN, SCHED_YIELD, SCHED_BLOCKING_SYNC = 0, 1, 2, 4
    MAP_HOST = 8


class event_flags:
    DEFAULT, BLOCKING_SYNC, DISABLE_TIMING = 0, 1, 2


class Device:
    """The one device, number 0."""

    def __init__(self, number: int) -> None:
        if not gpu.initialised:
            raise _error("cuDeviceGet", NOT_INITIALIZED)
        if number != 0:
            raise _error("cuDeviceGet", INVALID_DEVICE)
        self._model = gpu.model

    @staticmethod
    @_calls("cuDeviceGetCount")
    def count() -> int:
        _initialised()
        return 1

    def name(self) -> str:
        return self._model.name

    def pci_bus_id(self) -> str:
        return "0000:00:00.0"

    def compute_capability(self) -> tuple[int, int]:
        return self._model.compute

    def total_memory(self) -> int:
        return gpu.total

    def get_attribute(self, attr: int) -> int:
        values = {
            device_attribute.MULTIPROCESSOR_COUNT: self._model.multiprocessors,
            device_attribute.INTEGRATED: int(self._model.integrated),
            device_attribute.CAN_MAP_HOST_MEMORY: 1,
            device_attribute.UNIFIED_ADDRESSING: 1,
            device_attribute.COMPUTE_CAPABILITY_MAJOR: self._model.compute[0],
            device_attribute.COMPUTE_CAPABILITY_MINOR: self._model.compute[1],
        }
        return values[attr]

    def retain_primary_context(self) -> Context:
        """Not current yet: push it."""
        gpu.contexts.add(gpu.primary)
        gpu.primary.users += 1
        return Context(gpu.primary)

    def make_context(self, flags: int = 0) -> Context:
        """A context of its own, and current."""
        from double_gpu import Context as Made

        made = Made(gpu.new_handle(), primary=False, users=1)
        gpu.contexts.add(made)
        context = Context(made)
        context.push()
        return context

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device)

    def __hash__(self) -> int:
        return 0


class Context:
    """A context, and this thread's stack of them. Comes from a Device, not from a call."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self._valid = True
        self._thread = threading.get_ident()

    @property
    def handle(self) -> int:
        return int(self._context.handle)

    def push(self) -> None:
        if not self._valid or self._context not in gpu.contexts:
            raise _error("cuCtxPushCurrent", INVALID_CONTEXT)
        gpu.stack().append(self)

    @staticmethod
    def pop() -> None:
        if not gpu.stack():
            raise _error("context::pop", INVALID_CONTEXT, "cannot pop non-current context")
        gpu.stack().pop()

    def detach(self) -> None:
        """Release it. In a thread other than its own pycuda does nothing, and so leaks it."""
        if not self._valid:
            raise _error("context::detach", INVALID_CONTEXT, "cannot detach from invalid context")
        self._valid = False
        stack = gpu.stack()
        stack[:] = [context for context in stack if context is not self]
        if threading.get_ident() != self._thread:
            return
        self._context.users -= 1
        if not self._context.users:
            gpu.contexts.discard(self._context)
        gpu.write_report()

    def __del__(self) -> None:
        if self._valid:
            self.detach()

    @staticmethod
    @_calls("cuCtxSynchronize")
    def synchronize() -> None:
        gpu.check_context()
        for queue in list(gpu.streams.values()):
            queue.drain()
        gpu.check()

    @staticmethod
    @_calls("cuCtxGetDevice")
    def get_device() -> Device:
        if gpu.current() is None:
            raise Fault(INVALID_CONTEXT)
        return Device(0)

    @staticmethod
    def get_current() -> Context | None:
        stack = gpu.stack()
        return stack[-1] if stack else None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Context) and self._context is other._context

    def __hash__(self) -> int:
        return hash(self._context)


class _Dependent:
    """What belongs to the context that was current when it was made (`context_dependent`)."""

    def _acquire(self) -> None:
        stack = gpu.stack()
        if not stack:
            raise _error(
                "explicit_context_dependent", INVALID_CONTEXT, "no currently active context?"
            )
        self._ward: Context = stack[-1]

    def _may_clean_up(self) -> bool:
        """Whether its context can be made current here; else pycuda warns and leaks."""
        if not self._ward._valid:
            return False
        if self._ward in gpu.stack() or threading.get_ident() == self._ward._thread:
            return True
        message = f"{type(self).__name__} in out-of-thread context could not be cleaned up"
        warnings.warn(message, UserWarning, stacklevel=3)
        return False


def _cleaned(routine: str) -> bool:
    """Whether a clean-up call works; pycuda says so on stderr when not, and goes on."""
    if gpu.sticky is None:
        return True
    print(
        "PyCUDA WARNING: a clean-up operation failed (dead context maybe?)\n"
        f"{routine} failed: {WORDS[gpu.sticky]}",
        file=sys.stderr,
    )
    return False


# Streams and events


class Stream(_Dependent):
    """flags: 1 is CU_STREAM_NON_BLOCKING, which the default stream does not wait for."""

    def __init__(self, flags: int = 0) -> None:
        self._acquire()
        try:
            gpu.check_context()
        except Fault as fault:
            raise _error("cuStreamCreate", fault.code) from None
        self._queue = gpu.new_stream(self._ward._context, blocking=not flags & 1)

    @property
    def handle(self) -> int:
        return self._queue.handle

    @_calls("cuStreamSynchronize")
    def synchronize(self) -> None:
        gpu.check()
        self._queue.drain()
        gpu.check()

    @_calls("cuStreamQuery")
    def is_done(self) -> bool:
        gpu.check()
        self._queue.step()  # time goes by
        gpu.check()
        return not self._queue.work

    @_calls("cuStreamWaitEvent")
    def wait_for_event(self, evt: Event) -> None:
        gpu.check()
        self._queue.add(evt._wait)

    def __del__(self) -> None:
        if hasattr(self, "_queue") and self._may_clean_up() and _cleaned("cuStreamDestroy"):
            gpu.streams.pop(self._queue.handle, None)


class Event(_Dependent):
    def __init__(self, flags: int = 0) -> None:
        self._acquire()
        self._handle = gpu.new_handle()
        gpu.events.add(self._handle)
        self._work: Work | None = None
        self._stream: Any = None
        self._time: float | None = None

    @_calls("cuEventRecord")
    def record(self, stream: Stream | None = None) -> Event:
        gpu.check_context()
        self._stream = stream._queue if stream is not None else gpu.default_stream
        self._work = self._stream.add(self._reached)
        return self

    def _reached(self) -> None:
        self._time = now()

    def _wait(self) -> None:
        if self._work is not None:
            self._stream.drain(self._work)

    @_calls("cuEventSynchronize")
    def synchronize(self) -> Event:
        gpu.check()
        self._wait()
        gpu.check()
        return self

    @_calls("cuEventQuery")
    def query(self) -> bool:
        gpu.check()
        if self._work is not None and not self._work.done:
            self._stream.step()  # time goes by
        gpu.check()
        return self._work is None or self._work.done

    @_calls("cuEventElapsedTime")
    def time_since(self, start: Event) -> float:
        """Milliseconds."""
        gpu.check()
        for event in (start, self):
            if event._work is None:
                raise Fault(INVALID_HANDLE)
            if not event._work.done:
                raise Fault(NOT_READY)
        assert self._time is not None
        assert start._time is not None
        return 1000 * (self._time - start._time)

    def time_till(self, end: Event) -> float:
        return end.time_since(self)

    def __del__(self) -> None:
        if hasattr(self, "_handle") and self._may_clean_up() and _cleaned("cuEventDestroy"):
            gpu.events.discard(self._handle)


# Memory of the device


class PointerHolderBase:
    """To be subclassed: an object that stands for an address."""

    def get_pointer(self) -> int:
        raise NotImplementedError

    def __int__(self) -> int:
        return self.get_pointer()

    __index__ = __int__


class DeviceAllocation(_Dependent):
    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._freed = False
        self._acquire()

    def __int__(self) -> int:
        return self._memory.address

    __index__ = __int__

    def free(self) -> None:
        if self._freed:
            raise _error("device_allocation::free", INVALID_HANDLE)
        self._freed = True
        if self._may_clean_up() and _cleaned("cuMemFree"):
            gpu.release(self._memory)

    def __del__(self) -> None:
        if not self._freed:
            self.free()


@_calls("cuMemAlloc")
def mem_alloc(bytes: int) -> DeviceAllocation:
    gpu.check_context()
    if bytes <= 0:
        raise Fault(INVALID_VALUE)
    return DeviceAllocation(gpu.allocate(bytes, "device memory"))


@_calls("cuMemGetInfo")
def mem_get_info() -> tuple[int, int]:
    """Bytes free and in all."""
    gpu.check_context()
    return gpu.free, gpu.total


@_calls("cuMemGetAddressRange")
def mem_get_address_range(ptr: Any) -> tuple[int, int]:
    gpu.check_context()
    for memory in gpu._memory.values():
        if memory.address <= _address(ptr) < memory.address + memory.nbytes:
            return memory.address, memory.nbytes
    raise Fault(INVALID_VALUE)


# Page-locked memory of the host


class HostPointer(_Dependent):
    """Memory of the process that the device can reach; the `base` of the array on it."""

    def __init__(self, memory: Memory, flags: int, array: Any) -> None:
        self._memory, self._flags, self._freed = memory, flags, False
        self._acquire()
        self._array = array

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """numpy keeps the object that it asked for this as the base of the array."""
        found: dict[str, Any] = self._array.__array_interface__
        return found

    @_calls("cuMemHostGetDevicePointer")
    def get_device_pointer(self) -> int:
        """Only of memory that was allocated with DEVICEMAP.

        Another number than the address in the process: CUDA promises they are the same on some
        machines only.
        """
        gpu.check_context()
        if self._freed or not self._memory.mapped:
            raise Fault(INVALID_VALUE)
        return self._memory.address


class PagelockedHostAllocation(HostPointer):
    def get_flags(self) -> int:
        return self._flags

    def free(self) -> None:
        if self._freed:
            raise _error("pagelocked_host_allocation::free", INVALID_HANDLE)
        self._freed = True
        if self._may_clean_up() and _cleaned("cuMemFreeHost"):
            gpu.release(self._memory)

    def __del__(self) -> None:
        if not self._freed:
            self.free()


@_calls("cuMemHostAlloc")
def pagelocked_empty(shape: Any, dtype: Any, order: Any = "C", mem_flags: int = 0) -> Any:
    """An array whose `base` is its PagelockedHostAllocation.

    A Jetson's GPU has no memory of its own, so there this takes from what mem_get_info shows.
    """
    gpu.check_context()
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    memory = gpu.allocate(nbytes, "page-locked memory", counted=gpu.model.integrated)
    assert memory.data is not None
    memory.host = memory.data.__array_interface__["data"][0]
    memory.mapped = bool(mem_flags & host_alloc_flags.DEVICEMAP)
    array = memory.data.view(dtype).reshape(shape, order=order)
    return np.asarray(PagelockedHostAllocation(memory, mem_flags, array))


# Copies


def _address(pointer: Any) -> int:
    """Boost.Python takes an int or one of pycuda's own pointers; a numpy integer it refuses."""
    if isinstance(pointer, int):
        return pointer
    if isinstance(pointer, DeviceAllocation | PointerHolderBase):
        return int(pointer)
    raise TypeError(
        f"Python argument types did not match C++ signature: {type(pointer).__name__} is no address"
    )


def _of_host(buffer: Any, *, write: bool) -> Bytes:
    """The bytes of a contiguous array or buffer, as a view."""
    if isinstance(buffer, np.ndarray):
        if not (buffer.flags.c_contiguous or buffer.flags.f_contiguous):
            raise ValueError("ndarray is not contiguous")
        if write and not buffer.flags.writeable:
            raise ValueError("buffer source array is read-only")
        return buffer.reshape(-1, order="A").view(np.uint8)
    found = np.frombuffer(buffer, np.uint8)
    if write and not found.flags.writeable:
        raise BufferError("Object is not writable.")
    return found


def _copy_in(dest: int, src: Bytes) -> None:
    gpu.at(dest, len(src), "cuMemcpyHtoD")[:] = src


def _copy_out(dest: Bytes, src: int) -> None:
    dest[:] = gpu.at(src, len(dest), "cuMemcpyDtoH")


def _check_range(pointer: Any, nbytes: int) -> int:
    """The driver refuses a copy that does not lie in one allocation."""
    gpu.check_context()
    address = _address(pointer)
    if not gpu.holds(address, nbytes):
        raise Fault(INVALID_VALUE)
    return address


@_calls("cuMemcpyHtoD")
def memcpy_htod(dest: Any, src: Any) -> None:
    """Waits for the default stream, and so for all blocking ones."""
    data = _of_host(src, write=False)
    address = _check_range(dest, len(data))
    gpu.synchronise_default()
    gpu.check()
    _copy_in(address, data)


@_calls("cuMemcpyDtoH")
def memcpy_dtoh(dest: Any, src: Any) -> None:
    data = _of_host(dest, write=True)
    address = _check_range(src, len(data))
    gpu.synchronise_default()
    gpu.check()
    _copy_out(data, address)


def _add(stream: Stream | None, work: Callable[[], None]) -> Any:
    queue = stream._queue if stream is not None else gpu.default_stream
    queue.add(work)
    return queue


def _host_address(data: Bytes) -> int:
    address: int = data.__array_interface__["data"][0]
    return address


@_calls("cuMemcpyHtoDAsync")
def memcpy_htod_async(dest: Any, src: Any, stream: Stream | None = None) -> None:
    """Page-locked memory is read when the stream comes to it; other memory is read at once."""
    data = _of_host(src, write=False)
    address = _check_range(dest, len(data))
    locked = gpu.page_locked(_host_address(data), len(data))
    source = data if locked else data.copy()
    _add(stream, lambda: _copy_in(address, _still_locked(source) if locked else source))


@_calls("cuMemcpyDtoHAsync")
def memcpy_dtoh_async(dest: Any, src: Any, stream: Stream | None = None) -> None:
    """Into page-locked memory later; into other memory before it returns, after all before it."""
    data = _of_host(dest, write=True)
    address = _check_range(src, len(data))
    locked = gpu.page_locked(_host_address(data), len(data))
    queue = _add(stream, lambda: _copy_out(_still_locked(data) if locked else data, address))
    if not locked:
        queue.drain()
        gpu.check()


def _still_locked(data: Bytes) -> Bytes:
    if not gpu.page_locked(_host_address(data), len(data)):
        gpu.crash("page-locked memory was freed before the copy that uses it was done")
    return data


@_calls("cuMemcpyDtoD")
def memcpy_dtod(dest: Any, src: Any, size: int) -> None:
    target, source = _check_range(dest, size), _check_range(src, size)
    gpu.synchronise_default()
    gpu.check()
    gpu.at(target, size, "cuMemcpyDtoD")[:] = gpu.at(source, size, "cuMemcpyDtoD")


@_calls("cuMemcpyDtoDAsync")
def memcpy_dtod_async(dest: Any, src: Any, size: int, stream: Stream | None = None) -> None:
    target, source = _check_range(dest, size), _check_range(src, size)

    def copy() -> None:
        gpu.at(target, size, "cuMemcpyDtoD")[:] = gpu.at(source, size, "cuMemcpyDtoD")

    _add(stream, copy)


@_calls("cuMemsetD8")
def memset_d8(dest: Any, data: int, size: int) -> None:
    address = _check_range(dest, size)
    gpu.synchronise_default()
    gpu.check()
    gpu.at(address, size, "cuMemsetD8")[:] = data


@_calls("cuMemsetD8Async")
def memset_d8_async(dest: Any, data: int, size: int, stream: Stream | None = None) -> None:
    address = _check_range(dest, size)

    def fill() -> None:
        gpu.at(address, size, "cuMemsetD8")[:] = data

    _add(stream, fill)


def to_device(bf_obj: Any) -> DeviceAllocation:
    """Allocate, and copy a buffer there."""
    data = _of_host(bf_obj, write=False)
    allocation = mem_alloc(len(data))
    memcpy_htod(allocation, data)
    return allocation
