"""The pretend GPU that the doubles of pycuda and TensorRT share: memory, streams, faults.

It is as strict as the documents of CUDA, stricter than hardware often is: what CUDA calls
undefined (reading beyond an allocation, using it after it was freed, one execution context in two
threads) is a `Crash` here. Work in a stream is done when somebody waits for it, and not before, so
a program that does not wait reads old bytes. New memory is full of NaN (0xFF), never of zeros.

Set by the environment, read once, when this module is imported:

    KENSA_DOUBLE_DEVICE          orin-nano (default), agx-orin, rtx
    KENSA_DOUBLE_MEMORY_MIB      total,free; default: as the device has it
    KENSA_DOUBLE_FAIL_EXECUTION  N: the Nth execution ends in a sticky CUDA error
    KENSA_DOUBLE_CRASH           abort: a crash ends the process, as a segmentation fault does
    KENSA_DOUBLE_REPORT          a folder: each process keeps `gpu.report()` in <its number>.json,
                                 and they share the memory of the device
    KENSA_DOUBLE_MISSING         what this machine lacks: bindings (of TensorRT), libnvinfer,
                                 libcuda or device
"""

from __future__ import annotations

import atexit
import itertools
import json
import os
import sys
import threading
import time
import weakref
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

MIB = 1024 * 1024
REPORTS = os.environ.get("KENSA_DOUBLE_REPORT")
ALIGNMENT = 512  # bytes; cuMemAlloc promises 256
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Model:
    """What a GPU says of itself."""

    key: str
    name: str  # what cuDeviceGetName says
    compute: tuple[int, int]
    integrated: bool
    dla_cores: int
    multiprocessors: int
    total_mib: int
    free_mib: int


MODELS = {
    model.key: model
    for model in (
        Model("orin-nano", "Orin", (8, 7), True, 0, 8, 7485, 4300),
        Model("agx-orin", "Orin", (8, 7), True, 2, 16, 62841, 58000),
        Model("rtx", "NVIDIA GeForce RTX 4070", (8, 9), False, 0, 46, 12282, 11900),
    )
}

# CUresult -> the words of cuGetErrorString
INVALID_VALUE, OUT_OF_MEMORY, NOT_INITIALIZED, NO_DEVICE, INVALID_DEVICE = 1, 2, 3, 100, 101
INVALID_CONTEXT, INVALID_HANDLE, NOT_READY, ILLEGAL_ADDRESS = 201, 400, 600, 700
CONTEXT_IS_DESTROYED, LAUNCH_TIMEOUT, LAUNCH_FAILED = 709, 702, 719
WORDS = {
    INVALID_VALUE: "invalid argument",
    OUT_OF_MEMORY: "out of memory",
    NOT_INITIALIZED: "initialization error",
    NO_DEVICE: "no CUDA-capable device is detected",
    INVALID_DEVICE: "invalid device ordinal",
    INVALID_CONTEXT: "invalid device context",
    INVALID_HANDLE: "invalid resource handle",
    NOT_READY: "device not ready",
    ILLEGAL_ADDRESS: "an illegal memory access was encountered",
    LAUNCH_TIMEOUT: "the launch timed out and was terminated",
    CONTEXT_IS_DESTROYED: "context is destroyed",
    LAUNCH_FAILED: "unspecified launch failure",
}


class Crash(BaseException):
    """What would be a segmentation fault, or silently wrong, on hardware.

    A BaseException, so that no `except Exception` of the program under test takes it for one of
    its own. All are kept in `gpu.crashes`, because a thread may die of one unseen.
    """


class Fault(Exception):
    """A CUDA call that failed; `code` is its CUresult."""

    def __init__(self, code: int) -> None:
        super().__init__(WORDS[code])
        self.code = code


@dataclass(eq=False)
class Memory:
    """One allocation, or memory that is only counted (`data` None)."""

    address: int  # of the device
    nbytes: int
    what: str
    data: Bytes | None = None
    host: int = 0  # address of page-locked memory in this process, else 0
    mapped: bool = True  # whether the device may use it
    counted: int = 0  # bytes that it takes of what cuMemGetInfo shows as free


@dataclass(eq=False)
class Work:
    """One thing in a stream."""

    do: Callable[[], None] | None
    done: bool = False


@dataclass(eq=False)
class Queue:
    """A CUDA stream: work in order, done when waited for."""

    handle: int
    context: Context | None
    blocking: bool  # whether it waits for the default stream, and that one for it
    work: deque[Work] = field(default_factory=deque)

    def add(self, do: Callable[[], None]) -> Work:
        self.work.append(Work(do))
        return self.work[-1]

    def step(self) -> None:
        """Do the next thing, if there is one."""
        with gpu.lock:
            if self.work:
                work = self.work.popleft()
                do, work.do, work.done = work.do, None, True  # it holds what it worked on no longer
                assert do is not None
                do()

    def drain(self, until: Work | None = None) -> None:
        """Do everything, or everything up to `until`."""
        with gpu.lock:
            while self.work and not (until is not None and until.done):
                self.step()


@dataclass(eq=False)
class Context:
    """A CUDA context; the primary one of a device, or one that cuCtxCreate made."""

    handle: int
    primary: bool
    users: int = 0


class GPU:
    """The state of the one device; `gpu` is the only one in a process."""

    def __init__(self, model: Model, total: int, free: int, fail_execution: int | None) -> None:
        self.model = model
        self.total = total  # bytes
        self.lowest_free = self._at_first = self._own_free = free
        self.fail_execution = fail_execution
        self.lock = threading.RLock()
        self.initialised = self.ended = False
        self.sticky: int | None = None  # the CUresult that every call fails with from now on
        self.counts = dict.fromkeys(("builds", "engines", "contexts", "refits", "executions"), 0)
        self.crashes: list[str] = []
        self.threads: set[int] = set()  # idents of those that used the device
        self.primary = Context(0x5500_0000, primary=True)
        self.contexts: set[Context] = set()  # alive: retained, or made
        self.default_stream = Queue(0, None, blocking=True)
        self.streams: dict[int, Queue] = {0: self.default_stream}
        self.events: set[int] = set()
        self.objects: dict[str, int] = {}  # of TensorRT: kind -> how many are alive
        self._addresses: list[int] = []
        self._memory: dict[int, Memory] = {}
        self._next = itertools.count(0x7_0000_0000, 0x1_0000_0000)  # never used again
        self._handles = itertools.count(0x6000_0000, 0x40)
        self._thread = threading.local()

    # Contexts

    def stack(self) -> list[Any]:
        """This thread's stack of pycuda contexts."""
        if not hasattr(self._thread, "stack"):
            self._thread.stack = _Stack()
        found: list[Any] = self._thread.stack.contexts
        return found

    def current(self) -> Context | None:
        """The context that is current in this thread."""
        stack = self.stack()
        return stack[-1]._context if stack else None

    def runtime_context(self) -> Context:
        """What TensorRT, through the CUDA runtime, works in.

        That is the current context or, where none is, the primary one: the runtime makes it
        current by itself (CUDA programming guide, "Interoperability between Runtime and Driver
        APIs"). So a missing push is no error there, and a stream of a context that somebody made
        with cuCtxCreate is.
        """
        return self.current() or self.primary

    def check(self) -> None:
        """Raise the sticky error, if there was one; note the thread."""
        self.threads.add(threading.get_ident())
        if self.sticky is not None:
            raise Fault(self.sticky)

    def check_context(self) -> None:
        """As every driver call does that needs a context."""
        if not self.initialised:
            raise Fault(NOT_INITIALIZED)
        if self.current() is None:
            raise Fault(INVALID_CONTEXT)
        self.check()

    # Memory

    @property
    def free(self) -> int:
        """Bytes that nobody has taken, in no process."""
        return self._own_free - _used_by_others()

    @free.setter
    def free(self, value: int) -> None:
        self._own_free = value

    def allocate(
        self, nbytes: int, what: str, *, backed: bool = True, counted: bool = True
    ) -> Memory:
        """Memory of the device. Raises Fault(OUT_OF_MEMORY).

        `backed` False: TensorRT's own, which is only counted; `counted` False: memory of the host.
        """
        size = -(-nbytes // ALIGNMENT) * ALIGNMENT if counted else 0
        with self.lock:
            if size > self.free:
                raise Fault(OUT_OF_MEMORY)
            self._own_free -= size
            self.lowest_free = min(self.lowest_free, self.free)
            memory = Memory(next(self._next), nbytes, what, counted=size)
            if backed:
                memory.data = np.full(nbytes, 0xFF, np.uint8)
            self._addresses.append(memory.address)
            self._memory[memory.address] = memory
        self.write_report()
        return memory

    def release(self, memory: Memory) -> None:
        with self.lock:
            if self._memory.pop(memory.address, None) is None:
                self.crash(f"{memory.what} at {memory.address:#x} was freed twice")
            self._own_free += memory.counted
            if memory.data is not None and memory.host:
                memory.data[:] = 0xFF  # who still reads it reads NaN
        self.write_report()

    def find(self, address: int, nbytes: int) -> Bytes | str:
        """The bytes at an address of the device, or why they are not the program's to use."""
        with self.lock:
            index = bisect_right(self._addresses, address) - 1
            base = self._addresses[index] if index >= 0 else 0
            memory = self._memory.get(base)
            if index < 0 or address - base >= 0x1_0000_0000:
                return f"{address:#x} is no address of the device"
            if memory is None:
                return f"the memory at {address:#x} was freed"
            if memory.data is None or not memory.mapped:
                return f"{memory.what} at {address:#x} is not the program's to use"
            start = address - base
            if start + nbytes > memory.nbytes:
                left = max(0, memory.nbytes - start)
                return f"{nbytes} bytes from {address:#x}, which has {left} of {memory.what}"
            return memory.data[start : start + nbytes]

    def at(self, address: int, nbytes: int, why: str) -> Bytes:
        """The bytes at an address of the device; Crash where they are not all allocated."""
        found = self.find(address, nbytes)
        if isinstance(found, str):
            self.crash(f"{why}: {found}")
        return found

    def holds(self, address: int, nbytes: int) -> bool:
        """Whether the bytes lie in one allocation; what the driver checks before it copies."""
        return not isinstance(self.find(address, nbytes), str)

    def page_locked(self, host: int, nbytes: int) -> bool:
        """Whether these bytes of the process lie in page-locked memory."""
        return any(
            memory.host and memory.host <= host and host + nbytes <= memory.host + memory.nbytes
            for memory in list(self._memory.values())
        )

    # Streams

    def new_stream(self, context: Context, *, blocking: bool) -> Queue:
        queue = Queue(next(self._handles), context, blocking)
        self.streams[queue.handle] = queue
        return queue

    def new_handle(self) -> int:
        return next(self._handles)

    def stream(self, handle: int, context: Context) -> Queue:
        """Raises Fault(INVALID_HANDLE) for one that is gone, or is of another context."""
        queue = self.streams.get(handle)
        if queue is None or queue.context not in (None, context):
            raise Fault(INVALID_HANDLE)
        return queue

    def synchronise_default(self) -> None:
        """What every copy that is not asynchronous waits for: the blocking streams."""
        for queue in list(self.streams.values()):
            if queue.blocking:
                queue.drain()

    def execute(self, work: Callable[[], None]) -> None:
        """One execution of a network, or the fault that was asked for."""
        self.count("executions")
        if self.counts["executions"] == self.fail_execution:
            self.sticky = ILLEGAL_ADDRESS
        if self.sticky is None:
            work()

    # What tests ask

    def fail(self, after: int = 1, code: int = ILLEGAL_ADDRESS) -> None:
        """Let the execution `after` from now end in a sticky error."""
        if code != ILLEGAL_ADDRESS:
            self.sticky = code
        else:
            self.fail_execution = self.counts["executions"] + after

    def alive(self) -> dict[str, int]:
        """What was not given back: kind -> how many. Empty at a clean end."""
        counts: dict[str, int] = {}
        for memory in self._memory.values():
            counts[memory.what] = counts.get(memory.what, 0) + 1
        counts["contexts"] = sum(context.users for context in self.contexts)
        counts["streams"] = len(self.streams) - 1
        counts["events"] = len(self.events)
        counts.update(self.objects)
        return {kind: count for kind, count in counts.items() if count}

    def count(self, kind: str) -> None:
        """One more build, engine, execution context, refit or execution."""
        self.counts[kind] += 1
        self.write_report()

    def report(self) -> dict[str, Any]:
        """What happened so far: of another process this is how a test gets to know it."""
        return {
            **self.counts,
            "used": self._at_first - self._own_free,
            "alive": self.alive(),
            "crashes": self.crashes,
            "threads": len(self.threads),
            "lowest_free_mib": self.lowest_free // MIB,
        }

    def write_report(self) -> None:
        if REPORTS and not self.ended:
            target = Path(REPORTS, f"{os.getpid()}.json")
            half = target.with_suffix(f".{threading.get_ident()}")
            half.write_text(json.dumps(self.report()))
            half.replace(target)

    def last_report(self) -> None:
        """At the end of Python, before it frees what the program forgot."""
        self.write_report()
        self.ended = True

    def crash(self, message: str) -> NoReturn:
        """Note it, say it, and raise it or end the process."""
        self.note_crash(message)
        raise Crash(message)

    def note_crash(self, message: str) -> None:
        self.crashes.append(message)
        print(f"CRASH in the double of the GPU: {message}", file=sys.stderr, flush=True)
        self.write_report()
        if os.environ.get("KENSA_DOUBLE_CRASH") == "abort":
            os.abort()


class _Stack:
    """pycuda ends the process when a thread ends, or Python does, with a context on its stack."""

    def __init__(self) -> None:
        self.contexts: list[Any] = []
        self._process = os.getpid()
        if threading.current_thread() is threading.main_thread():
            atexit.register(self.__del__)

    def __del__(self) -> None:
        if self.contexts and os.getpid() == self._process:  # in a fork the thread did not end
            gpu.note_crash(
                "PyCUDA ERROR: The context stack was not empty upon module cleanup."
                " Use Context.pop() to avoid this problem."
            )


def _of_the_environment() -> GPU:
    model = MODELS[os.environ.get("KENSA_DOUBLE_DEVICE", "orin-nano")]
    plain = f"{model.total_mib},{model.free_mib}"
    total, free = os.environ.get("KENSA_DOUBLE_MEMORY_MIB", plain).split(",")
    fail = os.environ.get("KENSA_DOUBLE_FAIL_EXECUTION")
    return GPU(model, int(total) * MIB, int(free) * MIB, int(fail) if fail else None)


def _used_by_others() -> int:
    """Bytes that other living processes have."""
    used = 0
    for path in Path(REPORTS).glob("*.json") if REPORTS else ():
        try:
            state = Path(f"/proc/{path.stem}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:  # it has ended
            continue
        if path.stem != str(os.getpid()) and state != "Z":
            used += json.loads(path.read_text())["used"]
    return used


def missing(what: str) -> bool:
    """Whether this machine is to be without it."""
    return os.environ.get("KENSA_DOUBLE_MISSING") == what


gpu = _of_the_environment()
weakref.finalize(gpu, int).atexit = False  # else, what a program frees at exit is not counted
atexit.register(gpu.last_report)
now = time.perf_counter
