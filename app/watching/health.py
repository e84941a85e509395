"""`Health.look`: how the server is at the moment, for /healthz and /metrics alike.

A look never waits for a locked database or another program: what does not answer in time is missing
in it, and named.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from app.background import Background
from app.decisions.collector import Collector
from app.decisions.recorder import Recorder
from app.jobs.job_queue import JobQueue, failures
from app.jobs.worker_process import WorkerProcess
from app.serving.drift import WATCHED, Change
from app.serving.inspection import Inspector
from app.settings import Settings
from engines.errors import KensaError
from engines.machine.memory import MIB, free_bytes
from engines.machine.sensors import Device
from engines.promise import doubts
from engines.serving.resident import Resident

FRESH_S = 2.0  # the jobs are not counted more often
WAIT_S = 0.25  # for the queue; then the last count is taken ...
STALE_S = 5.0  # ... unless it is as old as this
OPENING_S = 10.0  # the queue takes less when nothing is in its way
LOW_DISK = 1024 * MIB
LOW_MEMORY = 256 * MIB
RECENT_S = 60.0  # a worker that ended is named for so long


@dataclass(frozen=True)
class State:
    """A moment of the server. What is not known is None."""

    models: list[Resident]
    standing_in: dict[str, str | None]  # all models; why another version judges than should
    problems: dict[str, str]  # models that should be in memory, and why not
    model_bytes: dict[str, int]  # about what a resident version takes
    worker: str
    learns: bool  # there is a worker, or should be
    restarts: int
    held_back: float
    jobs: dict[str, int] | None
    queue: str | None  # what is wrong with it
    disk_free: int | None  # bytes
    disk_size: int | None
    device: Device = field(default_factory=Device)
    decisions: int = 0  # written down since the start
    decisions_lost: int = 0  # that no disk took
    decisions_behind: int = 0  # that are not collected yet
    drift: dict[str, dict[str, float]] = field(default_factory=dict)  # model -> how far off each is
    drifting: dict[str, int] = field(default_factory=dict)  # model -> how much of that matters
    degraded: list[str] = field(default_factory=list)  # sentences
    not_released: dict[str, str] = field(default_factory=dict)  # models -> why no part passes

    @property
    def ready(self) -> bool:
        return bool(self.models) and not self.problems


class Health:
    """Looks at everything. Its methods belong to the event loop's thread."""

    def __init__(
        self,
        inspector: Inspector,
        jobs: JobQueue,
        worker: WorkerProcess,
        settings: Settings,
        background: Background,
        recorder: Recorder,
        collector: Collector,
    ) -> None:
        self._recorder, self._collector = recorder, collector
        self._background = background
        self._inspector = inspector
        self._residents, self._drift = inspector.residents, inspector.drift
        self._asks_of_pictures = bool(
            inspector.usable.asked - {"camera_frozen"} or inspector.drift.parts
        )
        self._worker = worker
        self._data, self._found = settings.data, settings.gate_found
        self._queue = JobCounts(jobs)

    async def look(self) -> State:
        """As it is now, within a fraction of a second."""
        models, problems = self._residents.all(), dict(self._residents.problems)
        model_bytes = {model.name: model.runtime.nbytes for model in models}
        standing_in = {
            name: self._residents.standing_in.get(name) for name in self._residents.known()
        }
        not_released = dict(self._inspector.not_released)
        held = list(self._residents.held.values())
        stale = [one for name, one in self._residents.stale.items() if name not in problems]
        jobs, queue = await self._queue.look()
        drift = {model: self._drift.look(model) for model in models if self._drift.parts}
        changes = {model: [one for one in found if one.matters] for model, found in drift.items()}
        unknown = [model for model in models if self._asks_of_pictures and model.camera is None]
        worker = self._worker
        state, restarts, ended = worker.state, worker.restarts, worker.ended
        held_back, died = worker.held_back, self._background.degraded()

        def read() -> State:
            free, size = _disk(self._data)
            degraded = [
                *problems.values(),
                *held,
                *filter(None, standing_in.values()),
                *not_released.values(),
                *stale,
                *died,
                *(f"{one.name} {one.version}: {_UNKNOWN_PICTURES}" for one in unknown),
                *(_drifts(model, found) for model, found in changes.items() if found),
                *(doubt for model in models for doubt in _doubts(model, self._found)),
            ]
            if free is not None and free < LOW_DISK:
                degraded.append(
                    f"The disk of {self._data} has {free // MIB:,} MiB left: delete images or"
                    " models that are not needed."
                )
            if (memory := free_bytes()) < LOW_MEMORY:
                degraded.append(f"Memory is short: {memory // MIB} MiB are left.")
            device = Device.read()
            if hot := [part for part, slowed in device.throttled.items() if slowed]:
                degraded.append(
                    f"Too hot, and slowed down for it: {', '.join(hot)}. See to the fan and the air"
                    " around it, or take a lower power mode."
                )
            degraded += filter(None, (self._recorder.problem, self._collector.problem))
            if queue is not None:
                degraded.append(queue)
            if ended is not None and time.monotonic() - ended < RECENT_S:
                degraded.append(
                    "The worker ended by itself and is started again; the log says why. That makes"
                    f" {restarts} since the server's start."
                )
            return State(
                models=models,
                standing_in=standing_in,
                not_released=not_released,
                problems=problems,
                model_bytes=model_bytes,
                worker=state,
                learns=state in ("running", "starting"),
                restarts=restarts,
                held_back=held_back,
                jobs=jobs,
                queue=queue,
                disk_free=free,
                disk_size=size,
                decisions=self._recorder.written,
                decisions_lost=self._recorder.lost,
                decisions_behind=self._collector.behind,
                device=device,
                drift={
                    model.name: dict.fromkeys(WATCHED, 0.0)
                    | {one.statistic: one.spreads for one in found}
                    for model, found in drift.items()
                },
                drifting={model.name: len(found) for model, found in changes.items()},
                degraded=degraded,
            )

        return await asyncio.to_thread(read)


class JobCounts:
    """How many jobs there are, asked in a thread of its own, and never twice at a time."""

    def __init__(self, jobs: JobQueue, clock: Callable[[], float] = time.monotonic) -> None:
        self._jobs, self._clock = jobs, clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="count")
        self._since = clock()
        self._asking: asyncio.Future[dict[str, int] | str | None] | None = None
        self._asked = -STALE_S
        self._counted: dict[str, int] | None = None
        self._counted_at = -STALE_S
        self._problem: str | None = None

    async def look(self) -> tuple[dict[str, int] | None, str | None]:
        """The jobs by their state, as far as known, and what is wrong with the queue."""
        if self._asking is None and self._clock() - self._asked > FRESH_S:
            self._asked = self._clock()
            self._asking = asyncio.get_running_loop().run_in_executor(self._thread, self._count)
        if self._asking is not None:
            asking = self._asking
            await asyncio.wait([asking], timeout=WAIT_S)
            if asking.done() and self._asking is asking:
                self._asking = None
                self._take(asking.result())
        now = self._clock()
        waited = 0.0 if self._asking is None else now - self._asked
        problem = self._jobs.problem or self._problem
        if problem is None and not self._jobs.is_open and now - self._since > OPENING_S:
            problem = "The queue is not open yet: something locks it, or its disk is slow."
        if problem is None and waited > FRESH_S:
            problem = f"The queue has not answered for {waited:.0f} s: something locks it."
        return (None if now - self._counted_at > STALE_S else self._counted), problem

    def _take(self, answer: dict[str, int] | str | None) -> None:
        self._problem = answer if isinstance(answer, str) else None
        if isinstance(answer, dict):
            self._counted, self._counted_at = answer, self._clock()

    def _count(self) -> dict[str, int] | str | None:
        """In the thread: the counts, or why there are none; None while the queue is opened."""
        if not self._jobs.is_open:
            return None
        try:
            return self._jobs.count()
        except KensaError as error:
            return str(error)
        except failures() as error:
            return f"The queue does not answer: {' '.join(str(error).split())[:200]}."


_UNKNOWN_PICTURES = (
    "its training did not note what its pictures look like, so that nobody can say whether one is"
    " usable, or whether they drift. Train it again."
)


def _drifts(model: Resident, changes: list[Change]) -> str:
    found = "; ".join(one.sentence for one in changes)
    return (
        f"{model.name} {model.version}: {found}. See to the light, the lens and the camera; where"
        " it is to stay so, train with such pictures."
    )


def _doubts(model: Resident, least_found: float) -> list[str]:
    """What speaks against a version that judges all the same, because a person wants it so."""
    found = doubts(model.meta, least_found, live=True)
    return [f"{model.name} {model.version}: {one}" for one in found]


def _disk(folder: Path) -> tuple[int | None, int | None]:
    """Free bytes and size of the disk that a folder is on, or will be."""
    for place in (folder, *folder.parents):
        with suppress(FileNotFoundError):
            try:
                usage = shutil.disk_usage(place)
            except PermissionError:
                break
            return usage.free, usage.total
    return None, None
