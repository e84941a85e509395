"""`BatchRetrial`: a batch size that is provisional is looked at again.

What a model is opened beside, such as a job or a machine that starts, may decide wrongly for as
long as the model stays in memory, and the next version takes over what was found. So the trial is
made again, a step in each gap of the line, until it has the machine to itself. Of models that are
opened when the server starts, for which parts wait, it is the first one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

from app.serving.inspection import Inspector
from engines.errors import KensaError
from engines.machine.memory import free_bytes
from engines.serving.batch_trial import STOPWATCH, Step, Stopwatch, Trial
from engines.serving.resident import Resident, at_once

EVERY_S = 5.0
PAUSES_S = (10.0, 60.0, 300.0, 1800.0, 7200.0, 28800.0)  # before each look at a version

log = logging.getLogger("kensa")


@dataclass
class _Looks:
    """How often a version was looked at, and when the next time is."""

    due: float
    made: int = 0


class BatchRetrial:
    """Tries provisional batch sizes again. Its methods belong to the event loop's thread."""

    def __init__(
        self,
        inspector: Inspector,
        load: Callable[[Callable[[], Any]], Awaitable[Any]],
        may_take_memory: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
        watch: Stopwatch = STOPWATCH,
    ) -> None:
        """
        Args:
            load: does work in the thread that opens and closes models.
            may_take_memory: whether none is promised to a version that is about to be opened.
            clock: seconds, for the pauses.
            watch: for the trial.
        """
        self._inspector, self._residents = inspector, inspector.residents
        self._load, self._may_take_memory = load, may_take_memory
        self._clock, self._watch = clock, watch
        self._looks: WeakKeyDictionary[Resident, _Looks] = WeakKeyDictionary()

    async def run(self) -> None:
        """For ever."""
        while True:
            await asyncio.sleep(EVERY_S)
            await self.look()

    async def look(self) -> None:
        """Look at every version whose time has come, one after another."""
        for model in self._residents.all():
            # The first one may be gone, and closed, when the look at another has ended.
            if not (self._residents.is_live(model) and model.runtime.batches.provisional):
                continue
            now = self._clock()
            looks = self._looks.setdefault(model, _Looks(now + PAUSES_S[0]))
            if looks.made < len(PAUSES_S) and now >= looks.due and self._fits(model):
                await self._look_at(model, is_first=looks.made == 0)
                looks.made += 1
                if looks.made < len(PAUSES_S):
                    looks.due = self._clock() + PAUSES_S[looks.made]

    def _fits(self, model: Resident) -> bool:
        """As when it was opened: to try batches may take as much memory again."""
        return self._may_take_memory() and free_bytes() > 2 * model.runtime.nbytes

    async def _look_at(self, model: Resident, is_first: bool) -> None:
        """Make the trial again, and keep what it finds, the first time even if it is provisional.

        Until then a model that the start opened has only its images alone.
        """
        trial = Trial(model.runtime, self._watch)

        def settle() -> None:
            before = model.runtime.batches
            after = before if trial.found.provisional and not is_first else trial.found
            model.runtime.take_together(after)  # also gives back what was prepared
            if after.size != before.size:
                was = at_once(replace(before, provisional=False))
                log.info(
                    "%s %s: %s from now on; it was %s until batches could be tried in peace",
                    *(model.name, model.version, at_once(after), was),
                )

        is_there = True

        async def make() -> None:
            nonlocal is_there
            for step in trial.steps():
                # A batch is prepared some gaps later, and memory may have been promised meanwhile.
                if step.beside and not self._fits(model):
                    return
                is_there = await self._step(model, step)
                if not is_there:
                    return

        await self._told(model, make())
        if is_there:
            await self._told(model, self._step(model, Step(settle, beside=True)))

    async def _told(self, model: Resident, work: Awaitable[object]) -> None:
        """Wait for work. What goes wrong is said, and other models are looked at all the same."""
        try:
            await work
        except KensaError as error:
            log.warning("%s %s: batches cannot be tried: %s", model.name, model.version, error)
        except Exception:
            log.exception("%s %s: batches cannot be tried", model.name, model.version)

    async def _step(self, model: Resident, step: Step) -> bool:
        """Whether it was done: a version that has been replaced may be closed at any time.

        It is closed by the loader's thread, once the engine's has nothing left to do for it. So
        where the very thread that works finds it live, it stays open until the work is done.
        """

        def work() -> bool:
            if live := self._residents.is_live(model):
                step.work()
            return live

        if step.beside:
            return bool(await self._load(work))
        return await self._inspector.in_a_gap(work)
