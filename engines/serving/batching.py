"""Requests that arrive together run together, where that is faster on this runtime.

One thread, `Batcher`, owns all engines. It never waits for a batch to fill up: while it runs one,
others arrive, and what then waits for the same engine is the next batch. So a part that comes
alone is never delayed, and under load batches form by themselves.

Whether a batch is faster is measured when a model is opened, see `engines.serving.batch_trial`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from engines.runtimes import Runtime

Result = TypeVar("Result")


@dataclass(frozen=True)
class Done(Generic[Result]):
    """What work returned, how long it waited and how long it took, milliseconds."""

    result: Result
    waited_ms: float
    worked_ms: float


Scored = tuple[float, NDArray[np.float32]]  # raw score, raw map (h, w)


@dataclass(eq=False)
class _Waiting:
    """Work for the thread: an image for an engine, or anything else."""

    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]
    asked: float
    work: Callable[[], Any] | None = None
    runtime: Runtime | None = None
    image: NDArray[np.uint8] | None = None  # (S, S, 3)
    model: str = ""

    def end(self, set_it: Callable[[Any], None], outcome: Any) -> None:
        """Hand the outcome to whoever waits; nobody does once the request was given up."""

        def hand_over() -> None:
            if not self.future.done():
                set_it(outcome)

        with suppress(RuntimeError):  # the loop has ended, and with it whoever waited
            self.loop.call_soon_threadsafe(hand_over)


class Batcher:
    """The thread of the engines. What was cancelled while it waited is never computed."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.on_batch: Callable[[str, int], None] = lambda *_: (
            None
        )  # whose, how many; in the thread
        self._queue: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    async def infer(
        self, runtime: Runtime, image: NDArray[np.uint8], model: str = ""
    ) -> Done[Scored]:
        """Raw score and raw map (h, w) of an image (S, S, 3), together with others that wait.

        Args:
            model: the name that `on_batch` is told.

        Raises:
            RuntimeFailed: the device or the runtime gave up.
        """
        done: Done[Scored] = await self._wait(runtime=runtime, image=image, model=model)
        return done

    async def call(self, work: Callable[[], Result]) -> Done[Result]:
        """Do `work` between two batches; its errors are raised here."""
        done: Done[Result] = await self._wait(work=work)
        return done

    def close(self) -> None:
        """Drop what waits, and let what runs end."""
        with self._changed:
            self._closed = True
            dropped = list(self._queue)
            self._queue.clear()
            self._changed.notify()
        for one in dropped:
            one.future.cancel()
        if self._thread is not None:
            self._thread.join()

    async def _wait(self, **what: Any) -> Any:
        loop = asyncio.get_running_loop()
        one = _Waiting(loop, loop.create_future(), self._clock(), **what)
        with self._changed:
            if self._closed:
                raise asyncio.CancelledError
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
                self._thread.start()
            self._queue.append(one)
            self._changed.notify()
        return await one.future

    def _run(self) -> None:
        while batch := self._next():
            began = self._clock()
            try:
                results = self._work(batch)
            except BaseException as error:  # noqa: BLE001 (whoever asked must hear of it)
                for one in batch:
                    one.end(one.future.set_exception, error)
                continue
            worked = (self._clock() - began) * 1000
            for one, result in zip(batch, results, strict=True):
                done = Done(result, (began - one.asked) * 1000, worked)
                one.end(one.future.set_result, done)

    def _next(self) -> list[_Waiting]:
        """What to run now, waited for; nothing once closed."""
        with self._changed:
            while True:
                while self._queue:
                    first = self._queue.popleft()
                    if not first.future.done():
                        return [first, *self._others(first)]
                if self._closed:
                    return []
                self._changed.wait()

    def _others(self, first: _Waiting) -> list[_Waiting]:
        """Those that run together with the first one, taken out of the queue in their order."""
        if first.runtime is None:
            return []
        batches = first.runtime.batches  # once: another thread may exchange it
        size, least = batches.size, batches.least
        wanted = (one for one in self._queue if one.runtime is first.runtime)
        same = list(islice((one for one in wanted if not one.future.done()), size - 1))
        if 1 + len(same) < least:
            return []
        for one in same:
            self._queue.remove(one)
        return same

    def _work(self, batch: list[_Waiting]) -> list[Any]:
        first = batch[0]
        if first.work is not None:
            return [first.work()]
        assert first.runtime is not None
        images = np.stack([one.image for one in batch if one.image is not None])
        scores, maps = first.runtime.infer(images)
        self.on_batch(first.model, len(batch))
        return [(float(score), one) for score, one in zip(scores, maps, strict=True)]
