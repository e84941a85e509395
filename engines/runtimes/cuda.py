"""The thread that owns the GPU. Everything of CUDA is done in it; others ask, and wait.

What pycuda makes belongs to the thread that made it: freed in another one it is leaked, and a
context left on the stack of a thread ends the process. So one thread holds the primary context, the
one that TensorRT works in too, from the first model to the end of the process.
"""

from __future__ import annotations

import atexit
import logging
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from engines.errors import GpuLost, OutOfMemory, RuntimeFailed
from engines.nvidia import driver

MIB = 1024 * 1024
LOST_EXIT_CODE = 75  # what the server ends with after a GpuLost; docs/operations.md
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: not held up by what others do in the default stream
CHUNK = 4 * MIB  # of a memory bank, copied between two images

log = logging.getLogger("kensa")
Result = TypeVar("Result")
Array = NDArray[Any]


class Held(Protocol):
    """What has memory of the GPU. Its methods are called in the GPU's thread only."""

    def free(self) -> None:
        """Give it back; a second call does nothing."""

    def again(self) -> None:
        """Repeat the last inference, for nobody: so that the GPU does not fall asleep."""


class Gpu:
    """The GPU of this process, through one thread. `gpu()` makes it."""

    def __init__(self) -> None:
        """Start the thread.

        Raises:
            RuntimeFailed: CUDA finds no GPU; `Machine.read` says why.
        """
        self.process = os.getpid()
        self.integrated = False  # whether it shares the memory of the machine, as a Jetson's does
        self.keep_warm_s = 0.0  # of idleness, after which `again` is called; 0 for never
        self.last: Held | None = None  # what ran last
        self._held: set[Held] = set()
        self._asked: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._letting_in = threading.RLock()  # `forget` may come in the midst, from a finalizer
        self._closed = False
        self._lost: str | None = None
        self.cuda: Any = None  # `driver.load()`; to be used in the thread only
        started: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(started,), name="gpu", daemon=True
        )  # a daemon, because Python waits for others before it calls `close`
        self._thread.start()
        started.result()

    # ---- from any thread ----------------------------------------------------------------------

    def call(self, work: Callable[[], Result]) -> Result:
        """Do `work` in the GPU's thread, in its turn, and wait for it; its errors are raised here.

        Raises:
            OutOfMemory: the memory of the GPU is full.
            GpuLost: the GPU failed for good, now or before.
            RuntimeFailed: CUDA failed otherwise, or the GPU was given back.
        """
        if threading.current_thread() is self._thread:
            return work()
        done: Future[Result] = Future()
        if not self._ask(lambda: self._do(work, done)):
            raise RuntimeFailed("The GPU was given back: this process is ending.")
        return done.result()

    def forget(self, held: Held) -> Future[None]:
        """Free it soon, on a lost GPU as well. Nothing is raised, so a finalizer may call this."""
        done: Future[None] = Future()

        def free() -> None:
            self._fulfil(lambda: self.free(held), done)

        if not self._ask(free):  # everything was freed
            done.set_result(None)
        return done

    def memory(self) -> tuple[int, int]:
        """Bytes of the GPU's memory: free, and in all."""
        free, total = self.call(lambda: self.cuda.mem_get_info())
        return int(free), int(total)

    def close(self) -> None:
        """Free everything, and let the thread end. What is asked from now on fails."""
        with self._letting_in:
            self._closed = True
            self._asked.put(None)
        self._thread.join()

    def _ask(self, work: Callable[[], None]) -> bool:
        with self._letting_in:
            if not self._closed:
                self._asked.put(work)
            return not self._closed

    # ---- in the thread ------------------------------------------------------------------------

    def _run(self, started: Future[None]) -> None:
        with ExitStack() as ending:
            try:
                self._begin(ending)
            except BaseException as error:  # noqa: BLE001 (whoever starts it must hear of it)
                why = str(error).rstrip(".")
                started.set_exception(RuntimeFailed(f"CUDA cannot be used: {why}."))
                return
            started.set_result(None)
            while self._next():
                pass

    def _begin(self, ending: ExitStack) -> None:
        self.cuda = cuda = driver.load()
        cuda.init()
        device = cuda.Device(0)
        self.integrated = bool(device.get_attribute(cuda.device_attribute.INTEGRATED))
        primary = device.retain_primary_context()
        ending.callback(primary.detach)
        primary.push()
        ending.callback(primary.pop)
        ending.callback(self._free_all)

    def _next(self) -> bool:
        """Do what is asked for next; False at the end. No name here keeps what was done alive."""
        try:
            work = self._asked.get(timeout=self.keep_warm_s or None)
        except queue.Empty:
            self._stay_warm()
            return True
        if work is not None:
            work()
        return work is not None

    def _do(self, work: Callable[[], Result], done: Future[Result]) -> None:
        if self._lost is not None:
            done.set_exception(GpuLost(self._lost))
        else:
            self._fulfil(work, done)

    def _fulfil(self, work: Callable[[], Result], done: Future[Result]) -> None:
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 (whoever asked must hear of it)
            done.set_exception(self._named(error))
        else:
            done.set_result(result)

    def _stay_warm(self) -> None:
        if self.last is None or self._lost is not None:
            return
        try:
            self.last.again()
        except Exception as error:  # noqa: BLE001 (nobody waits for it)
            self.last = None
            if not isinstance(named := self._named(error), GpuLost):  # which was logged
                log.warning("The GPU cannot be kept warm: %s", named)

    def hold(self, held: Held) -> None:
        """Know what has memory, so that it is freed in the end."""
        self._held.add(held)

    def free(self, held: Held) -> None:
        """Free it, and know it no longer."""
        self._held.discard(held)
        if self.last is held:
            self.last = None
        held.free()

    def _free_all(self) -> None:
        for held in list(self._held):
            self.free(held)

    # ---- what goes wrong ----------------------------------------------------------------------

    def failure(self, sentence: str) -> RuntimeFailed:
        """What is to be raised after something failed: a GpuLost where nothing works any more.

        CUDA has no list of the errors that stay. But after one of them every call fails, so one
        that does nothing is asked.
        """
        try:
            self.cuda.Context.synchronize()
        except self.cuda.Error as error:
            return self._lose(str(error))
        return RuntimeFailed(sentence)

    def full(self, sentence: str) -> OutOfMemory | RuntimeFailed:
        """The error for memory that ran out, with what is free."""
        try:
            free, total = self.cuda.mem_get_info()
        except self.cuda.Error as error:
            return self.failure(f"CUDA failed: {error}.")
        return OutOfMemory(
            f"{sentence}: {free // MIB} of {total // MIB} MiB of the GPU's memory are free. Unload"
            " another model, end other programs that use the GPU, or give the model a smaller"
            " memory bank."
        )

    def _named(self, error: BaseException) -> BaseException:
        """CUDA's errors by our names. Without a traceback, which would keep buffers alive."""
        if not isinstance(error, self.cuda.Error):
            return error
        if isinstance(error, self.cuda.MemoryError):
            return self.full(f"CUDA has no memory left ({error})")
        return self.failure(f"CUDA failed: {error}.")

    def _lose(self, why: str) -> GpuLost:
        self._lost = f"The GPU failed in a way that only a new process mends ({why})."
        _when_lost(self._lost)
        return GpuLost(self._lost)


class Buffer:
    """The memory of one input or output: an array of the host, and the address for TensorRT.

    A GPU that shares the machine's memory works in the array itself. Another one has a copy, and
    the array is page-locked, so that copying needs no detour. Used in the GPU's thread only.
    """

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._device: Any = None
        self.host: Array = np.empty(0)
        self.address = 0
        self.nbytes = 0

    def take(self, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        cuda = self._gpu.cuda
        flags = int(cuda.host_alloc_flags.DEVICEMAP) if self._gpu.integrated else 0
        self.host = cuda.pagelocked_empty(shape, dtype, mem_flags=flags)
        self.nbytes = self.host.nbytes
        if self._gpu.integrated:
            self.address = int(self.host.base.get_device_pointer())  # type: ignore[union-attr]
        else:
            self._device = cuda.mem_alloc(self.nbytes)
            self.address = int(self._device)

    def send(self, count: int, stream: Any) -> None:
        """Let the GPU have the first `count` rows."""
        if self._device is not None:
            self._gpu.cuda.memcpy_htod_async(self._device, self.host[:count], stream)

    def fetch(self, count: int, stream: Any) -> None:
        """Let the host have the first `count` rows, once the stream was waited for."""
        if self._device is not None:
            self._gpu.cuda.memcpy_dtoh_async(self.host[:count], self._device, stream)

    def free(self) -> None:
        taken: list[Any] = [self._device, self.host.base]
        self.host, self._device, self.address = np.empty(0), None, 0
        for memory in taken:
            if memory is not None:
                memory.free()


class Bank:
    """A matrix in the GPU's own memory, which it reads at full speed. In the GPU's thread only."""

    def __init__(self, gpu: Gpu, rows: int, columns: int) -> None:
        self._gpu = gpu
        self.rows = rows
        self.nbytes = rows * columns * 4
        self._device: Any = None

    def take(self) -> None:
        self._device = self._gpu.cuda.mem_alloc(self.nbytes)

    @property
    def address(self) -> int:
        return int(self._device)

    def write(self, start: int, values: Array, stream: Any) -> None:
        """Put float32 values at an offset in bytes. Waits, because the values may change after."""
        self._gpu.cuda.memcpy_htod_async(self.address + start, values, stream)
        stream.synchronize()

    def free(self) -> None:
        device, self._device = self._device, None
        if device is not None:
            device.free()


_gpu: Gpu | None = None
_making = threading.Lock()


def gpu() -> Gpu:
    """The GPU of this process, begun when it is first needed. Raises RuntimeFailed as `Gpu`."""
    global _gpu
    with _making:
        if _gpu is None:
            _gpu = Gpu()
            atexit.register(close)
        return _gpu


def close() -> None:
    """Give everything back, if anything was taken. The next call of `gpu` begins anew."""
    global _gpu
    with _making:
        if _gpu is not None and _gpu.process == os.getpid():  # a fork has no such thread
            atexit.unregister(close)
            _gpu.close()
            _gpu = None


def _nobody(why: str) -> None:
    log.critical("%s", why)


_when_lost: Callable[[str], None] = _nobody


def when_lost(tell: Callable[[str], None]) -> None:
    """Who is told, in the GPU's thread and once, that the GPU is lost."""
    global _when_lost
    _when_lost = tell
