"""A spare process, which has loaded what a job needs before there is one: 3 s of imports less.

It is a job's process that waits for its job: it gets one, does it, and ends with it. Until then it
knows of none, runs when nothing else wants to, and ends by itself when memory is short.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, NoReturn

from engines.machine import job_memory
from engines.queue.protocol import RUNNING, WAITING
from workers.jobs import parent_and_child

SPARE = "--spare"
SETTLE_S = 5.0  # after a start, or a job: what it made is opened first
LOOK_EVERY_S = 2.0  # at the memory that is free
TAKES_S = 30.0  # at the most that a spare may take to say that it has the job
PACKAGES = ("workers.learning.retrain", "workers.converting.convert")  # and PatchCore

log = logging.getLogger("kensa.worker")


# ---- in the worker -----------------------------------------------------------------------------


class Spare:
    """Has one ready, where the setting and memory allow it."""

    def __init__(self, command: list[str]) -> None:
        self._command = command
        self._mutex = threading.Lock()
        self._waits: tuple[subprocess.Popen[bytes], socket.socket] | None = None
        self._failed = False

    def keep(self, data: Path, is_idle: Callable[[], bool]) -> None:
        """Have one for as long as this process lives; for a thread of its own.

        The system ends a child when the thread that began it ends, and this one never does.
        """
        while True:
            time.sleep(SETTLE_S)
            if not self._failed:
                self.look(data, is_idle)

    def look(self, data: Path, is_idle: Callable[[], bool]) -> None:
        """Begin one where there is none, no job, and room."""
        with self._mutex:
            if self._waits is not None and (code := self._waits[0].poll()) is not None:
                self._waits[1].close()
                self._waits = None
                self._failed = code > 0
                if self._failed:  # the next job's own process says why
                    log.warning("The spare process ended with %d: there will be no other", code)
                    return
            if self._waits is None and is_idle() and job_memory.room_for_a_spare():
                self._waits = self._begin(data)

    def take(self, lock: IO[str]) -> tuple[subprocess.Popen[bytes], socket.socket] | None:
        """The spare, and where it reads its job; None where none could be had.

        It has the lock from then on, as a process that inherits it.
        """
        with self._mutex:
            found, self._waits = self._waits, None
        if found is None:
            return None
        process, ours = found
        try:
            ours.settimeout(TAKES_S)
            socket.send_fds(ours, [b"?"], [lock.fileno()])
            if ours.recv(1):
                ours.settimeout(None)
                return process, ours
        except OSError:  # it ended just now, or does not answer
            pass
        ours.close()
        end(process)
        return None

    def _begin(self, data: Path) -> tuple[subprocess.Popen[bytes], socket.socket]:
        ours, theirs = socket.socketpair()
        with theirs:
            process = parent_and_child.begin([*self._command, str(data), SPARE], theirs.fileno())
        return process, ours


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process of a job, and what it may have started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# ---- in the spare itself -----------------------------------------------------------------------


def until_there_is_a_job(data: Path) -> bytes:
    """Load what a job needs, and wait; what the worker says of the job.

    Exits with 0 where memory is short, or the worker is gone.
    """
    with socket.socket(fileno=os.dup(0)) as worker:
        _load(data)
        while not select.select([worker], [], [], LOOK_EVERY_S)[0]:
            if job_memory.must_give_up_a_spare():
                _leave()
        try:
            question, _, _, _ = socket.recv_fds(worker, 1, 1)  # the lock: held until this one ends
            if not question:
                _leave()
            worker.sendall(b"!")
            return b"".join(iter(lambda: worker.recv(1 << 16), b""))
        except ConnectionError:
            _leave()


def _load(data: Path) -> None:
    """The packages; the server holds this process back meanwhile, as it does a job."""
    from importlib import import_module

    from workers import models

    running, own = data / RUNNING, str(os.getpid())
    running.parent.mkdir(parents=True, exist_ok=True)
    for file in (running, data / WAITING):
        file.write_text(own, encoding="ascii")
    models.module("patchcore")  # the first: it says how packages are loaded
    for name in PACKAGES:
        import_module(name)
    with suppress(OSError):
        if running.read_text(encoding="ascii") == own:
            running.unlink()


def _leave() -> NoReturn:
    os._exit(0)  # whatever the packages have begun
