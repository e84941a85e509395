"""TensorRT, 10.3 to 11.4, and TensorRT for RTX with one code path: the runtime of NVIDIA's GPUs.

`Machine.read` must have found TensorRT before anything here is called, and the plan's fingerprint
must have been compared: a plan is executable, and this file runs what it is given.
"""

from __future__ import annotations

import logging
import mmap
import re
import threading
import weakref
from collections import deque
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.errors import BadBundle, KensaError, RuntimeFailed, StalePlan
from engines.nvidia.library import Library, here
from engines.regions import hide, shown
from engines.runtimes import ALONE, WORTH, Batches, only_whole
from engines.runtimes.cuda import CHUNK, NON_BLOCKING, Bank, Buffer, Gpu, gpu
from engines.runtimes.kernel_cache import KernelCache

_FULL = re.compile(r"out ?of ?memory|could not be allocated", re.IGNORECASE)
_BANK, _KEEP = "memory_bank", "keep"

log = logging.getLogger("kensa.tensorrt")


class TensorRTRuntime:
    """A model on the GPU; see `engines.runtimes.Runtime`. `infer` may be called by any thread."""

    name = "tensorrt"
    pads, worth = False, WORTH

    def __init__(
        self,
        plan: Path,
        memory_bank: NDArray[np.float32] | None = None,
        *,
        precision: str = "f32",
        keep_warm_s: float = 0.0,
        cache_dir: Path | None = None,
    ) -> None:
        """Deserialise a plan, in this thread, and make it ready to run.

        Args:
            plan: whose fingerprint fits.
            memory_bank: (M, C) float32, for a plan that has the input `memory_bank`. Copied.
            precision: of its fingerprint.
            keep_warm_s: how long the GPU may be idle before the last image is computed again.
            cache_dir: where kernels are kept that this machine made of the plan.

        Raises:
            StalePlan: TensorRT does not take the plan.
            BadBundle: it is none of ours, or does not fit the bank.
            OutOfMemory: there is no room for it.
            GpuLost, RuntimeFailed: the GPU failed.
        """
        self.precision = precision
        self.batches = ALONE
        self._gpu, self._keep_warm_s = gpu(), keep_warm_s
        engine = Engine(self._gpu, plan, cache_dir)
        try:
            self._open(engine, memory_bank)
        finally:
            engine.leave()  # the session has it

    def _open(self, engine: Engine, bank: NDArray[np.float32] | None) -> None:
        engine.check_bank(bank)
        self._shown: NDArray[np.bool_] | None = None  # of a map, where not all is
        self._session = session = Session(self._gpu, engine)
        weakref.finalize(self, self._gpu.forget, session).atexit = False
        try:
            self._gpu.call(lambda: session.take(bank))
            if bank is not None:
                for start in range(0, bank.nbytes, CHUNK):  # parts may come in between
                    values = bank.reshape(-1)[start // 4 : (start + CHUNK) // 4]
                    self._gpu.call(lambda at=start, some=values: session.fill(at, some))  # type: ignore[misc]
            session.compile()
            self._gpu.call(lambda: setattr(self._gpu, "keep_warm_s", self._keep_warm_s))
        except BaseException:
            self.close()
            raise

    @property
    def image_size(self) -> int:
        return self._session.engine.image_size

    @property
    def bank_rows(self) -> int | None:
        return None if self._session.bank is None else self._session.bank.rows

    @property
    def places(self) -> tuple[int, int] | None:
        return self._session.engine.places

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Powers of two up to what the plan was built for."""
        most = self._session.engine.max_batch
        return tuple(2**n for n in range(1, most.bit_length()) if 2**n <= most)

    @property
    def nbytes(self) -> int:
        return self._session.nbytes

    def infer(
        self, images: NDArray[np.uint8], size: int | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        side = self.image_size
        if images.shape[1:] != (side, side, 3) or images.dtype != np.uint8 or not len(images):
            raise RuntimeFailed(
                f"The engine takes images (N, {side}, {side}, 3) of uint8, not {images.shape} of"
                f" {images.dtype}."
            )
        session, size = self._session, size or self.batches.size
        parts = [images[start : start + size] for start in range(0, len(images), size)]
        found = [self._gpu.call(lambda part=part: session.run(part)) for part in parts]  # type: ignore[misc]
        scores, maps = (np.concatenate(one) for one in zip(*found, strict=True))
        whole = only_whole(scores, maps)
        return whole, maps if self._shown is None else hide(maps, self._shown)

    def prepare(self, size: int) -> None:
        """Nothing: memory for the largest batch was taken when it was opened."""

    def take_together(self, batches: Batches) -> None:
        most = self._session.engine.max_batch
        self.batches = replace(batches, size=min(batches.size, most))

    def count_only(self, keep: NDArray[np.float32]) -> None:
        session = self._session
        self._gpu.call(lambda: session.count_only(keep))
        self._shown = shown(keep, session.map_size)

    def with_bank(self, bank: NDArray[np.float32] | None, precision: str) -> TensorRTRuntime | None:
        engine = self._session.engine
        if precision != self.precision or not engine.takes(bank):
            return None
        other = object.__new__(TensorRTRuntime)
        other.precision, other.batches = self.precision, self.batches
        other._gpu, other._keep_warm_s = self._gpu, self._keep_warm_s
        other._open(engine, bank)
        return other

    def close(self) -> None:
        self._gpu.forget(self._session).result()


class Engine:
    """A deserialised plan, what it takes, and how many sessions use it.

    Deserialising takes seconds, and parts must not wait for it. So it is done in the thread that
    opens the model, as is making an execution context. Both only call TensorRT, which names them
    as safe beside executions of others, and allocates in the primary context by itself.
    """

    def __init__(self, gpu: Gpu, plan: Path, cache_dir: Path | None = None) -> None:
        self.library: Library = here()
        trt = self.library.load()
        self._gpu, self._plan = gpu, plan
        self._users = 1  # who opens it
        self._counting = threading.Lock()
        self._log = logger(trt)
        before = self._log.count
        self._runtime = trt.Runtime(self._log)
        self._plan_bytes = plan.stat().st_size
        self._engine = self._deserialise()
        if self._engine is None:
            raise self._refusal(before, StalePlan(f"TensorRT does not take {plan}"))
        self.kernels: KernelCache | None = None
        try:
            self._look(trt)
            if self.library.compiles_when_opened:
                self.kernels = KernelCache(gpu, trt, self._engine, plan, cache_dir)
        except BaseException:
            self.leave()
            raise

    def _deserialise(self) -> Any:
        with self._plan.open("rb") as file:
            if not self._plan_bytes:
                raise BadBundle(f"{self._plan} is empty: convert the model again.")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return self._runtime.deserialize_cuda_engine(data)

    def _refusal(self, before: int, error: KensaError) -> KensaError:
        """The error for a None of TensorRT's, with what it logged."""
        lines = self._log.since(before)
        if any(_FULL.search(line) for line in lines):
            sentence = f"{self._plan} does not fit"
            return self._gpu.call(lambda: self._gpu.full(sentence))
        failed = self._gpu.call(lambda: self._gpu.failure(""))
        if str(failed):  # the GPU is lost
            return failed
        return type(error)(f"{error}: {' '.join(lines) or 'it does not say why'}.")

    def _look(self, trt: Any) -> None:
        """Learn sizes. Raises BadBundle where the engine is not ours."""
        engine = self._engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        kinds = {name: engine.get_tensor_dtype(name) for name in names}
        shapes = {name: tuple(engine.get_tensor_shape(name)) for name in names}
        image_type, number = trt.DataType.UINT8, trt.DataType.FLOAT
        ours = {"image": image_type, "score": number, "map": number}
        may_be = {_BANK: number, _KEEP: number}
        image, map_ = shapes.get("image", ()), shapes.get("map", ())
        square = len(image) == 4 and image[1] == image[2] > 0 and image[3] == 3
        keep = shapes.get(_KEEP, (1, 1))
        fits = square and len(map_) == 3 and len(keep) == 2 and min(keep) > 0
        if not ours.items() <= kinds.items() <= {**ours, **may_be}.items() or not fits:
            raise BadBundle(
                f"{self._plan} was not built by convtrt.py: it needs an input `image`"
                " (N, S, S, 3) of uint8 and the outputs `score` and `map`."
            )
        self.image_size = int(image[1])
        self.max_batch = int(engine.get_tensor_profile_shape("image", 0)[2][0])
        self.places = (int(keep[0]), int(keep[1])) if _KEEP in names else None
        self.channels: int | None = None
        if _BANK in names:
            self.channels = int(shapes[_BANK][1])
            low, _, high = engine.get_tensor_profile_shape(_BANK, 0)
            self.min_rows, self.max_rows = int(low[0]), int(high[0])

    def takes(self, bank: NDArray[np.float32] | None) -> bool:
        if bank is None:
            return self.channels is None
        rows, channels = bank.shape
        return bool(channels == self.channels and self.min_rows <= rows <= self.max_rows)

    def check_bank(self, bank: NDArray[np.float32] | None) -> None:
        """Raise BadBundle for a bank that this engine does not take."""
        if bank is None:
            if self.channels is not None:
                raise BadBundle(f"{self._plan} needs a memory bank, and none was given.")
            return
        rows, channels = bank.shape
        if self.channels is None:
            raise BadBundle(f"{self._plan} takes no memory bank.")
        if channels != self.channels:
            raise BadBundle(
                f"The memory bank has {channels} channels, but {self._plan} takes {self.channels}:"
                " they are from different trainings."
            )
        if rows < self.min_rows:
            raise BadBundle(
                f"The memory bank has {rows:,} rows, and TensorRT needs at least"
                f" {self.min_rows:,}: learn from more images."
            )
        if rows > self.max_rows:
            raise BadBundle(
                f"The memory bank has {rows:,} rows, and {self._plan} was built for up to"
                f" {self.max_rows:,}: convert it again."
            )

    def new_context(self) -> Any:
        before = self._log.count
        if self.kernels is None:
            context = self._engine.create_execution_context()
        else:
            context = self._engine.create_execution_context(self.kernels.config)
        if context is None:
            raise self._refusal(before, RuntimeFailed(f"TensorRT cannot run {self._plan}"))
        return context

    def failure(self, before: int) -> RuntimeFailed:
        """What to raise after an execution that failed. In the GPU's thread."""
        said = " ".join(self._log.since(before))
        return self._gpu.failure(f"TensorRT failed: {said or 'it does not say why'}.")

    @property
    def said(self) -> int:
        """How many errors TensorRT has logged until now, for `failure`."""
        return int(self._log.count)

    @property
    def nbytes(self) -> int:
        """Of the device: weights, as the plan's file has them, and what one context takes."""
        return self._plan_bytes + int(self._engine.device_memory_size_v2)

    def use(self) -> None:
        """For one more session."""
        with self._counting:
            self._users += 1

    def leave(self) -> None:
        """It goes with the last one that uses it, in the GPU's thread."""
        with self._counting:
            self._users -= 1
            last = self._users == 0
        if last:
            self._gpu.call(self._drop)

    def _drop(self) -> None:
        self.kernels = None
        self._engine = None
        self._runtime = None


class Session:
    """One execution context with its buffers and its memory bank.

    Made by the thread that opens the model; everything else is done in the GPU's.
    """

    def __init__(self, gpu: Gpu, engine: Engine) -> None:
        self._gpu, self.engine = gpu, engine
        self._context = engine.new_context()
        engine.use()
        self._buffers = {name: Buffer(gpu) for name in ("image", "score", "map")}
        self._keep = Buffer(gpu)  # which places count; empty for an engine that does not ask
        self.bank: Bank | None = None
        self.map_size = (0, 0)
        self._stream: Any = None
        self._event: Any = None
        self._count = 0  # of the images that it ran last
        self.nbytes = engine.nbytes
        self._in_use = True

    def take(self, bank: NDArray[np.float32] | None) -> None:
        """Take memory for the largest batch, and for the bank."""
        self._gpu.hold(self)
        cuda, engine = self._gpu.cuda, self.engine
        self._stream = cuda.Stream(NON_BLOCKING)
        kinds = cuda.event_flags  # waiting for it sleeps; waiting for a stream keeps a core busy
        self._event = cuda.Event(int(kinds.BLOCKING_SYNC) | int(kinds.DISABLE_TIMING))
        side, most = engine.image_size, engine.max_batch
        self._set_shape("image", (most, side, side, 3))
        if bank is not None:
            self.bank = Bank(self._gpu, *bank.shape)
            self.bank.take()
            self._set_shape(_BANK, bank.shape)
        # The engine may leave it open.
        _, height, width = tuple(self._context.get_tensor_shape("map"))
        self.map_size = (height, width)
        self._buffers["image"].take((most, side, side, 3), np.uint8)
        self._buffers["score"].take((most,), np.float32)
        self._buffers["map"].take((most, *self.map_size), np.float32)
        taken: list[Buffer | Bank] = [*self._buffers.values()]
        addresses = {name: buffer.address for name, buffer in self._buffers.items()}
        if self.bank is not None:
            taken.append(self.bank)
            addresses[_BANK] = self.bank.address
        if engine.places is not None:
            self._keep.take(engine.places, np.float32)
            taken.append(self._keep)
            addresses[_KEEP] = self._keep.address
            self.count_only(np.ones(engine.places, np.float32))
        self.nbytes += sum(one.nbytes for one in taken)
        for name, address in addresses.items():
            before = engine.said
            if not self._context.set_tensor_address(name, address):
                raise engine.failure(before)

    def count_only(self, keep: NDArray[np.float32]) -> None:
        """Which places (h, w) count from now on."""
        np.copyto(self._keep.host, keep)
        self._keep.send(len(keep), self._stream)
        self._stream.synchronize()

    def fill(self, start: int, values: NDArray[np.float32]) -> None:
        """A part of the bank, from a byte on."""
        assert self.bank is not None
        self.bank.write(start, values, self._stream)

    def compile(self) -> None:
        """Let kernels be made for each number of images, where the library makes them here.

        In the thread that opens the model: it takes seconds, and parts must not wait for them. It
        only calls TensorRT, as making a context does, and nothing else runs in this one yet.
        """
        if self.engine.kernels is None:
            return
        for count in range(1, self.engine.max_batch + 1):
            shape = (count, *self._buffers["image"].host.shape[1:])
            self._gpu.call(lambda shape=shape: self._set_shape("image", shape))  # type: ignore[misc]
            before = self.engine.said
            if not self._context.execute_async_v3(self._stream.handle):
                raise self._gpu.call(lambda said=before: self.engine.failure(said))  # type: ignore[misc]
            self._gpu.call(self._stream.synchronize)
        self._count = 0  # of no part
        self.engine.kernels.keep()

    def run(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Raw scores (N,) and maps (N, h, w) of images (N, S, S, 3), at most `max_batch`."""
        count = len(images)
        if count != self._count:
            self._set_shape("image", images.shape)
            self._count = count
        image, score, map_ = self._buffers.values()
        np.copyto(image.host[:count], images)
        score.host[:count] = np.nan  # what was not computed is no score of the part before
        image.send(count, self._stream)
        self._execute()
        self._gpu.last = self
        return score.host[:count].copy(), map_.host[:count].copy()

    def again(self) -> None:
        if self._count:
            self._execute()

    def _execute(self) -> None:
        before = self.engine.said
        if not self._context.execute_async_v3(self._stream.handle):
            raise self.engine.failure(before)
        for name in ("score", "map"):
            self._buffers[name].fetch(self._count, self._stream)
        self._event.record(self._stream)
        self._event.synchronize()

    def _set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        before = self.engine.said
        if not self._context.set_input_shape(name, shape):
            self._count = 0
            raise self.engine.failure(before)

    def free(self) -> None:
        if not self._in_use:
            return
        self._in_use = False
        self._context = self._stream = self._event = None
        for buffer in self._buffers.values():
            buffer.free()
        self._keep.free()
        if self.bank is not None:
            self.bank.free()
        self.engine.leave()


@cache
def logger(trt: Any) -> Any:
    """The logger for everything of TensorRT in this process: it takes only one at a time."""
    severity = trt.ILogger.Severity
    levels = {
        severity.INTERNAL_ERROR: logging.ERROR,
        severity.ERROR: logging.ERROR,
        severity.WARNING: logging.WARNING,
        severity.INFO: logging.DEBUG,
    }

    class Log(trt.ILogger):  # type: ignore[misc]
        """Lines of TensorRT as lines of ours; the last errors are kept for sentences."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.count = 0  # errors
            self._errors: deque[tuple[int, str]] = deque(maxlen=8)

        def log(self, severity: Any, msg: str) -> None:
            level = levels.get(severity)
            if level is None:
                return
            log.log(level, "TensorRT: %s", msg)
            if level == logging.ERROR:
                self.count += 1
                self._errors.append((self.count, msg))

        def since(self, count: int) -> list[str]:
            """The errors after so many."""
            return [line for number, line in self._errors if number > count]

    return Log()
