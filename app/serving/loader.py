"""`Loader`: the thread that opens and closes versions, behind the line."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from app.serving.inspection import Inspector
from app.settings import Settings
from engines.errors import BadBundle, BadMeta, DiskFull, ReadOnly, Unreadable
from engines.machine.memory import give_back
from engines.runtimes.compiled_cache import usable_cache
from engines.serving.opening import Opening, open_model
from engines.serving.resident import Resident, describe
from engines.store.datasets import cannot_write
from engines.store.versions import Store

log = logging.getLogger("kensa")
Result = TypeVar("Result")


class Loader:
    """Works with disks and engines beside the line. Its methods belong to the event loop's thread.

    There is one thread, so two versions are never opened at once.
    """

    def __init__(self, store: Store, inspector: Inspector, settings: Settings) -> None:
        self.opening = Opening(
            settings.precision,
            settings.threads,
            batching=settings.batching == "on",
            runtime=settings.runtime,
            fallback=settings.fallback,
            keep_warm_s=settings.keep_warm_s,
        )
        self._store = store
        self._inspector = inspector
        self._compiled_dir = settings.compiled_dir
        self._thread = ThreadPoolExecutor(1, "loader", initializer=_behind_the_line)
        self._is_closing = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._leaving: dict[str, set[asyncio.Task[None]]] = {}  # versions that were replaced
        self._holders: Counter[int] = Counter()  # of a runtime, by its id: versions may share one

    async def start(self) -> None:
        """Find out where compiled networks may be kept."""
        cache = await self.do(lambda: usable_cache(self._compiled_dir))
        self.opening = replace(self.opening, cache_dir=cache)

    async def close(self) -> None:
        """Give up what was begun, and let what runs in the thread end."""
        self._is_closing = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._thread.shutdown, wait=True, cancel_futures=True)

    # ---- how work is done ---------------------------------------------------------------------

    def begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Do work that nobody waits for; `close` gives it up."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def do(self, work: Callable[[], Result]) -> Result:
        """Do work in the thread; its errors are raised here."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def write(self, work: Callable[[], Result]) -> Result:
        """The same for writing to the store, where what keeps it from that gets its name."""
        try:
            return await self.do(work)
        except OSError as error:
            if isinstance(found := cannot_write(error), ReadOnly):
                raise found from error
            raise DiskFull(f"Nothing was changed: {error.strerror}. Free some space.") from error

    @contextmanager
    def trying_batches_later(self) -> Iterator[None]:
        """Open models without a trial of batches, which takes longer than all the rest.

        `BatchRetrial` makes it soon after, in gaps of the line.
        """
        how = self.opening
        self.opening = replace(how, try_later=True)
        try:
            yield
        finally:
            self.opening = how

    # ---- a version comes, and goes ------------------------------------------------------------

    async def open(self, name: str, version: str, beside: Resident | None) -> Resident:
        """Check and open a version; one that cannot be used is put aside.

        Args:
            beside: the live version, whose engine may be shared.

        Raises:
            BadBundle, BadMeta, StalePlan, NoTensorRT, OutOfMemory: as `open_model`.
        """

        given_up = threading.Event()

        def work() -> Resident:
            try:
                folder = self._store.check(name, version)
                with self._store.opening(name, version):
                    return open_model(folder, name, version, self.opening, beside, given_up.is_set)
            except Unreadable:  # nothing is known against it
                raise
            except (BadBundle, BadMeta) as error:
                try:
                    self._store.refuse(name, version, str(error))
                except OSError as why:  # it is tried again at the next start, and fails again
                    log.warning("%s %s cannot be put aside: %s", name, version, why.strerror)
                raise

        began = time.perf_counter()
        opening = asyncio.get_running_loop().run_in_executor(self._thread, work)
        try:
            model = await asyncio.shield(opening)
        except asyncio.CancelledError:
            given_up.set()
            if not self._is_closing:
                self._leave(name, self._shut_unwanted(opening))
            raise
        self._holders[id(model.runtime)] += 1
        log.info("Loaded %s, in %.2f s", describe(model), time.perf_counter() - began)
        return model

    async def _shut_unwanted(self, opening: asyncio.Future[Resident]) -> None:
        """Close what was opened for a change that was given up meanwhile."""
        await asyncio.wait([opening])
        if not opening.cancelled() and opening.exception() is None:
            model = opening.result()
            self._holders[id(model.runtime)] += 1
            await self.shut(model)

    async def let_go(self, model: Resident) -> None:
        """Close a version once the last request that it has to answer is answered."""
        await self._inspector.residents.until_unused(model)
        await self.shut(model)

    def let_go_soon(self, model: Resident) -> None:
        """The same, and `until_gone` waits for it."""
        self._leave(model.name, self.let_go(model))

    def _leave(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        leaving = self._leaving.setdefault(name, set())
        task = self.begin(work)
        leaving.add(task)
        task.add_done_callback(leaving.discard)

    async def until_gone(self, name: str) -> None:
        """Wait until all versions of a model that were replaced have given their memory back."""
        if leaving := self._leaving.get(name):
            await asyncio.wait({*leaving})

    async def shut(self, model: Resident) -> None:
        """Close a version that nobody uses; its runtime with the last one that shares it."""
        runtime = id(model.runtime)
        self._holders[runtime] -= 1
        if self._holders[runtime] > 0:
            return
        del self._holders[runtime]

        def close() -> None:
            model.runtime.close()
            give_back()

        # A request that was given up counts no longer, and its image may still be in the engine.
        await self._inspector.batcher.call(lambda: None)
        await self.do(close)
        log.debug("Closed %s %s", model.name, model.version)


def _behind_the_line() -> None:
    thread = threading.get_native_id()
    already = os.getpriority(os.PRIO_PROCESS, thread)  # only root may go back to less
    os.setpriority(os.PRIO_PROCESS, thread, max(already, 10))
