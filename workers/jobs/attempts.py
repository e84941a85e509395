"""One job in the worker's hands: a process that does it, and is begun again where it dies."""

from __future__ import annotations

import errno
import json
import logging
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from dbos import DBOS
from sqlalchemy.exc import SQLAlchemyError

from engines.queue.job_folder import JobFolder
from engines.queue.job_requests import makes
from engines.queue.protocol import job_of
from engines.store.versions import Store
from workers.jobs import parent_and_child
from workers.jobs.parent_and_child import DISK_FULL, FULL, begin, has_lock
from workers.jobs.spare import Spare, end

ATTEMPTS = 3  # the first, and twice more when its process died
CHILD = [sys.executable, "-m", "workers.jobs.job_process"]  # and the data folder, the job, its kind

log = logging.getLogger("kensa.worker")
attended: set[str] = set()  # the jobs that this process has in hand
children: set[int] = set()  # the processes of jobs, which lead process groups
spare = Spare(CHILD)


def attend(
    data: Path,
    job_id: str,
    kind: str,
    request: dict[str, Any],
    folder: JobFolder | None = None,
) -> dict[str, Any]:
    """Let a child do the job; begin again where it dies. Returns how the job ended."""
    folder = folder or JobFolder(data, job_id)
    try:
        with (data / "job.lock").open("w") as lock:
            if not wait_for_the_last(lock, job_id):
                return {"state": "cancelled"}
            return begin_until_it_ends(data, job_id, kind, request, lock, folder)
    except OSError as why:
        if why.errno == errno.ENOSPC:
            return {"state": "failed", "code": "disk_full", "error": FULL}
        return {"state": "failed", "code": "os_error", "error": f"It cannot be begun: {why}."}
    finally:
        folder.clean()


def wait_for_the_last(lock: IO[str], job_id: str) -> bool:
    """Wait until the job's process of a worker that died is gone as well; False once cancelled.

    Children inherit the lock, so the system gives it back when the last of them has ended.
    """
    while not has_lock(lock):
        if was_cancelled(job_id):
            return False
        time.sleep(parent_and_child.LOOK_EVERY_S)
    return True


def begin_until_it_ends(
    data: Path,
    job_id: str,
    kind: str,
    request: dict[str, Any],
    lock: IO[str],
    folder: JobFolder,
) -> dict[str, Any]:
    """At most `ATTEMPTS` times, over all workers."""
    why = "its worker or the machine stopped"
    while (ended := folder.result()) is None:
        if folder.attempts() >= ATTEMPTS:
            if version := Store(data / "models").made_by(str(request.get("model")), job_id):
                return {"state": "succeeded", "version": version}
            return {
                "state": "interrupted",
                "code": "interrupted",
                "error": f"It was begun {ATTEMPTS} times, and each time {why}.",
            }
        attempt = folder.begin()
        folder.clean()
        log.info("Job %s (%s %s), attempt %d", job_id, kind, makes(request), attempt)
        code = run_child(data, job_id, kind, request, lock)
        if code is None:
            return {"state": "cancelled"}
        if code == DISK_FULL:
            return {"state": "failed", "code": "disk_full", "error": FULL}
        why = f"its process ended with {_named(code)}"
    log.info("Job %s: %s", job_id, ended.get("error") or ended.get("state"))
    return ended


def run_child(
    data: Path, job_id: str, kind: str, request: dict[str, Any], lock: IO[str]
) -> int | None:
    """The exit code of the job's process, or None after it was killed by a cancel."""
    child = _with_its_job(data, job_id, kind, request, lock)
    children.add(child.pid)
    try:
        while True:
            try:
                return child.wait(timeout=parent_and_child.LOOK_EVERY_S)
            except subprocess.TimeoutExpired:  # noqa: PERF203
                if was_cancelled(job_id):
                    log.info("Job %s is cancelled", job_id)
                    return None
    finally:
        end(child)
        children.discard(child.pid)


def _with_its_job(
    data: Path, job_id: str, kind: str, request: dict[str, Any], lock: IO[str]
) -> subprocess.Popen[bytes]:
    """A process that knows what to do: the spare one, else a new one."""
    if (taken := spare.take(lock)) is not None:
        child, worker = taken
        with worker, suppress(ConnectionError):  # it died already
            worker.sendall(json.dumps([job_id, kind, request]).encode())
        return child
    child = begin([*CHILD, str(data), job_id, kind], subprocess.PIPE, lock.fileno())
    assert child.stdin is not None
    with suppress(BrokenPipeError):
        child.stdin.write(json.dumps(request).encode())
        child.stdin.close()
    return child


def was_cancelled(job_id: str) -> bool:
    """Whether it was, or what it is a part of; a queue that does not answer is asked again soon."""
    try:
        found = [DBOS.get_workflow_status(one) for one in {job_id, job_of(job_id)}]
    except SQLAlchemyError as why:
        log.warning("The queue does not answer: %s", why)
        return False
    return any(status is not None and status.status == "CANCELLED" for status in found)


def _named(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"{name} (was memory short?)" if name == "SIGKILL" else name
