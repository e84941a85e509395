"""The worker process beside the server: started, and looked after."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from app.background import Background
from app.settings import Settings
from engines.image import ImageLimits
from engines.logs import FORMAT
from engines.machine.job_memory import JOB_MEMORY, JOB_SPARE
from engines.queue.protocol import PACE, PARENT, RUNNING
from engines.store.plan_record import builds_plans

LOOK_EVERY_S = 0.1  # for the job's process
STOPPED_S = 1.0  # at most, at a stretch: then it runs for a moment, so that a busy line ...
MOMENT_S = 0.05  # ... does not keep it from ever ending
RESTART_S = (1, 2, 5, 15, 30)  # the pauses before a worker that ended is started again
STEADY_S = 60  # a worker that ran so long begins with the shortest pause again

log = logging.getLogger("kensa")


class WorkerProcess:
    """Starts `workers.jobs`, again when it ends, and stops its job while a part is inspected."""

    def __init__(self, data: Path, settings: Settings, background: Background) -> None:
        self._data = data
        self._settings = settings
        self._background = background
        self._process: asyncio.subprocess.Process | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._job: int | None = None  # the process of the job that runs; also its process group
        self._stopped_at: float | None = None
        self._free_until = 0.0
        self._busy = False
        self.restarts = 0  # how often it ended by itself
        self.ended: float | None = None  # when it did last, on the monotonic clock
        self.held_back = 0.0  # share of the last seconds that the job was stopped

    @property
    def state(self) -> str:
        """For /healthz: running, starting, off, or why there is none."""
        if self._settings.worker == "off":
            return "off"
        if not _can_work():
            return "not installed: pip install 'kensa[train]'"
        return "running" if self._process and self._process.returncode is None else "starting"

    def start(self, after: asyncio.Future[None]) -> None:
        """Start it once the queue is there, unless a setting forbids it or it can do nothing."""
        loop = asyncio.get_running_loop()
        keep = self._background.keep
        looking = keep("looks after the worker", lambda: self._look_after(after))
        self._tasks = [loop.create_task(looking)]
        if self._settings.job_pace == "pause" and self._settings.worker != "off":
            self._tasks.append(loop.create_task(keep("holds jobs back", self._hold_back)))

    async def close(self) -> None:
        """Stop it. Its job is begun again when the next one starts."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _look_after(self, after: asyncio.Future[None]) -> None:
        await after
        if self._settings.worker == "off" or not _can_work():
            return
        failures = 0
        fleet = self._settings.fleet
        limits = ImageLimits(self._settings.max_image_bytes, self._settings.max_image_pixels)
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            # The worker asks the system to end it with this process, and its job with itself. In a
            # session of its own, Ctrl-C in the terminal reaches this process alone, which ends it.
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "workers.jobs", "--data_dir", str(self._data),
                env={
                    **os.environ,
                    PACE: self._settings.job_pace,
                    JOB_MEMORY: self._settings.job_memory,
                    JOB_SPARE: self._settings.job_spare,
                    FORMAT: self._settings.log_format,
                    **limits.environment(),
                    PARENT: str(os.getpid()),
                    **(fleet.environment() if fleet else {}),
                },
                cwd=Path(__file__).parents[2],
                start_new_session=True,
            )  # fmt: skip
            try:
                code = await self._process.wait()
            except asyncio.CancelledError:
                with contextlib.suppress(ProcessLookupError):
                    self._process.kill()
                await self._process.wait()
                raise
            self.restarts, self.ended = self.restarts + 1, time.monotonic()
            failures = 0 if loop.time() - began > STEADY_S else failures + 1
            pause = RESTART_S[min(failures, len(RESTART_S)) - 1] if failures else RESTART_S[0]
            log.error("The worker ended with %d; it is started again in %d s", code, pause)
            await asyncio.sleep(pause)

    # ---- the line comes first -----------------------------------------------------------------

    def on_busy(self, busy: bool) -> None:
        """A part came, or the last one has its verdict: the job stops, or goes on."""
        self._busy = busy
        if self._job is None:
            return
        if not busy:
            self._go_on()
        elif self._stopped_at is None and time.monotonic() >= self._free_until:
            self._stopped_at = time.monotonic()
            self._signal(signal.SIGSTOP)

    async def _hold_back(self) -> None:
        """Know the job's process, and let it run a moment where the line has no gaps."""
        while True:
            self._job = await asyncio.to_thread(_job_in, self._data)
            stopped = 0.0
            if self._job is None:
                self._stopped_at = None
            elif self._stopped_at is not None:
                stopped = LOOK_EVERY_S
                if time.monotonic() - self._stopped_at > STOPPED_S or not self._busy:
                    self._free_until = time.monotonic() + MOMENT_S
                    self._go_on()
            self.held_back = 0.95 * self.held_back + 0.05 * (stopped > 0)
            await asyncio.sleep(LOOK_EVERY_S)

    def _go_on(self) -> None:
        self._stopped_at = None
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self._job is not None:
            try:
                os.killpg(self._job, number)
            except (ProcessLookupError, PermissionError):
                self._job = None


def _job_in(data: Path) -> int | None:
    """The process of the running job, which leads a process group; None where none runs."""
    try:
        pid = int((data / RUNNING).read_text(encoding="ascii"))
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        leads = os.getpgid(pid) == pid
    except (OSError, ValueError):  # it ended, perhaps just now
        return None
    return pid if leads and b"workers.jobs.job_process" in command else None


def _can_work() -> bool:
    """Learn; or, where a model is only served, at least build its plan again."""
    can_learn = find_spec("torch") is not None and find_spec("anomalib") is not None
    return can_learn or builds_plans()
