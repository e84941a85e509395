"""The worker process: takes jobs from the queue, one at a time, and gives each a child process.

    python -m workers.jobs --data_dir D

Where KENSA_QUEUE_URL is set, as for the server, it takes jobs from the queue of several machines.
It never loads torch itself, so it is small, and a child that dies takes nothing with it. A job
whose child or worker died is begun again, at most twice.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import fcntl
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from dbos import DBOS, DBOSConfig, error
from sqlalchemy.exc import SQLAlchemyError

from engines.errors import EXIT_CODE, BadBundle, BadSettings
from engines.logs import FORMAT, set_up
from engines.queue.fleet import Fleet
from engines.queue.protocol import (
    ACTIVE,
    APP_VERSION,
    APPLICATION,
    ATTEMPTS,
    DATABASE,
    PARENT,
    QUEUE,
    WORKFLOW,
    JobFolder,
    JsonSerializer,
    Schedules,
    database_url,
    enqueue_options,
    job_of,
    last_due,
    scheduled_id,
)
from engines.store.versions import Store

CHILD = [
    sys.executable,
    "-m",
    "workers.jobs.job_process",
]  # and the data folder, the job's id, its kind
EXECUTOR = "worker"  # there is one per data folder, whatever the machine is called today
LOOK_EVERY_S = 0.3  # whether a job was cancelled
POLL_S = 0.5  # the queue
WATCH_EVERY_S = 2.0  # schedules, and what fell through
LATE_S = 60.0  # a schedule is kept when the worker was away for less
LOST_S = 60.0  # a job that runs, says the queue, and nobody attends it
DISK_FULL = errno.ENOSPC  # exit code of a child that could not even write why it failed
FULL = "The disk is full; nothing was changed. Free some space, and send the job again."
PR_SET_PDEATHSIG = 1

log = logging.getLogger("kensa.worker")
stopping = threading.Event()
attended: set[str] = set()  # the jobs that this process has in hand
children: set[int] = set()  # the processes of jobs, which lead process groups


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m workers.jobs", description=__doc__)
    parser.add_argument("--data_dir", type=Path, required=True, help="the server's KENSA_DATA_DIR")
    data = parser.parse_args(arguments).data_dir.absolute()
    set_up("info", os.environ.get(FORMAT, "text"), "worker")
    die_with_parent()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    data.mkdir(parents=True, exist_ok=True)
    with (data / "worker.lock").open("w") as lock:
        if not _locked(lock):
            log.error("Another worker has %s", data)
            return EXIT_CODE
        try:
            fleet = Fleet.read(os.environ)
            if fleet is None:
                work(data)
            else:
                from workers.jobs.fleet_worker import work_with_others  # which imports this module

                work_with_others(data, fleet)
        except BadSettings as error:
            log.error("%s", error)
            return EXIT_CODE
    return 0


def configured(data: Path, fleet: Fleet | None = None) -> DBOS:
    """DBOS, not launched yet."""
    config: DBOSConfig = {
        "name": APPLICATION,
        "system_database_url": database_url(data, fleet),
        "application_version": APP_VERSION,
        "executor_id": fleet.device if fleet else EXECUTOR,
        "serializer": JsonSerializer(),
        "log_level": "WARNING",  # each start would be ten lines, one of them an advertisement
        "max_executor_threads": 8,
    }
    if fleet is not None:  # many jobs of this machine only wait for another one
        config["max_executor_threads"], config["sys_db_pool_size"] = 64, 8
    dbos = DBOS(config=config)
    logging.getLogger("dbos").addFilter(_is_news)
    return dbos


def work(data: Path) -> None:
    """Take jobs until told to stop."""
    configured(data)
    register(data)
    DBOS.launch()
    sweep(data)
    DBOS.register_queue(
        QUEUE, worker_concurrency=1, polling_interval_sec=POLL_S, on_conflict="always_update"
    )
    threading.Thread(target=watch, args=[data], daemon=True).start()
    log.info("Waiting for jobs in %s", data)
    stopping.wait()
    # What runs is killed with this process, and begun again by the next one.
    os._exit(0)


def register(data: Path) -> None:
    """Tell DBOS what a job is."""

    @DBOS.step(name="attend")
    def attend_step(job_id: str, kind: str, request: dict[str, Any]) -> dict[str, Any]:
        return attend(data, job_id, kind, request)

    # How often a job may be begun is counted in its folder: DBOS counts what only waited, too.
    @DBOS.workflow(name=WORKFLOW, max_recovery_attempts=None)
    def job(kind: str, request: dict[str, Any]) -> dict[str, Any]:
        job_id = DBOS.workflow_id
        assert job_id is not None
        attended.add(job_id)
        try:
            return attend_step(job_id, kind, request)
        finally:
            attended.discard(job_id)


# ---- one job ----------------------------------------------------------------------------------


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
    while not _locked(lock):
        if was_cancelled(job_id):
            return False
        time.sleep(LOOK_EVERY_S)
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
            if version := published(data, job_id, str(request.get("model"))):
                return {"state": "succeeded", "version": version}
            return {
                "state": "interrupted",
                "code": "interrupted",
                "error": f"It was begun {ATTEMPTS} times, and each time {why}.",
            }
        attempt = folder.begin()
        folder.clean()
        log.info("Job %s (%s %s), attempt %d", job_id, kind, request.get("model"), attempt)
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
    child = subprocess.Popen(
        [*CHILD, str(data), job_id, kind],
        stdin=subprocess.PIPE,
        start_new_session=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, PARENT: str(os.getpid())},
        pass_fds=[lock.fileno()],
    )
    children.add(child.pid)
    try:
        assert child.stdin is not None
        with suppress(BrokenPipeError):  # it died already
            child.stdin.write(json.dumps(request).encode())
            child.stdin.close()
        while True:
            try:
                return child.wait(timeout=LOOK_EVERY_S)
            except subprocess.TimeoutExpired:  # noqa: PERF203
                if was_cancelled(job_id):
                    log.info("Job %s is cancelled", job_id)
                    return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # and what it may have started
        child.wait()
        children.discard(child.pid)


def published(data: Path, job_id: str, model: str) -> str | None:
    """The version that a job made, also where it was killed before it could say so."""
    store = Store(data / "models")
    for version in store.versions(model):
        with suppress(BadBundle):  # a damaged version is not this job's affair
            if store.manifest(model, version).origin.get("job") == job_id:
                return version
    return None


def was_cancelled(job_id: str) -> bool:
    """Whether it was, or what it is a part of; a queue that does not answer is asked again soon."""
    try:
        found = [DBOS.get_workflow_status(one) for one in {job_id, job_of(job_id)}]
    except SQLAlchemyError as why:
        log.warning("The queue does not answer: %s", why)
        return False
    return any(status is not None and status.status == "CANCELLED" for status in found)


# ---- what DBOS does not look after ------------------------------------------------------------


def watch(data: Path) -> None:
    """Begin what is scheduled, and begin anew where going on makes no sense."""
    database, lost = _inode(data / DATABASE), Lost()
    while True:
        time.sleep(WATCH_EVERY_S)
        if _inode(data / DATABASE) != database:
            log.error("The queue was put aside; this worker ends, the next one takes the new queue")
            os._exit(EXIT_CODE)
        try:
            begin_scheduled(data, time.time())
            if lost.are_there():
                log.error("A job that should run is lost; this worker ends, the next one has it")
                os._exit(EXIT_CODE)
        except SQLAlchemyError as why:
            log.warning("The queue does not answer: %s", why)


def begin_scheduled(data: Path, now: float, fleet: Fleet | None = None) -> None:
    """Queue what is due at `now`, once, and not while the schedule's last job waits or runs.

    DBOS's own scheduler reckons from one moment to the next. After a clock that was years behind is
    set, it would begin a job for each night of those years; after one that was ahead, none at all.
    """
    for name, schedule in Schedules(data).all().items():
        try:
            due = last_due(schedule["cron"], schedule["timezone"], now)
        except (ValueError, KeyError, OSError) as why:
            log.warning("The schedule %s names no time: %s", name, why)
            continue
        job_id = scheduled_id(name, due, fleet)
        if now - due.timestamp() > LATE_S or DBOS.get_workflow_status(job_id) is not None:
            continue
        active = DBOS.list_workflows(
            status=ACTIVE, load_input=False, load_output=False,
            attributes=fleet.mark if fleet else None,
        )  # fmt: skip
        options = enqueue_options(job_id, f"schedule {name}", active, fleet)
        try:
            DBOS.enqueue_workflow_with_options(options, "retrain", schedule["retrain"])
        except error.DBOSQueueDeduplicatedError:
            log.warning("The schedule %s is due, and its last job has not ended", name)


class Lost:
    """Jobs that run, says the queue, and that nobody attends: their end could not be written.

    Such as on a full disk. DBOS takes them up when a worker starts, and at no other time.
    """

    def __init__(self) -> None:
        self._since: dict[str, float] = {}

    def are_there(self) -> bool:
        """Whether one is lost for `LOST_S`, and no other job would suffer from a new start."""
        if attended:
            return False
        found = DBOS.list_workflows(status="PENDING", load_input=False, load_output=False)
        now = time.monotonic()
        self._since = {one.workflow_id: self._since.get(one.workflow_id, now) for one in found}
        return any(now - since > LOST_S for since in self._since.values())


def sweep(data: Path) -> None:
    """Remove what jobs left that were cancelled while no worker was there."""
    for work in (data / "jobs").glob("*/work"):
        status = DBOS.get_workflow_status(work.parent.name)
        if status is None or status.status not in ACTIVE:
            shutil.rmtree(work, ignore_errors=True)


# ---- processes --------------------------------------------------------------------------------


def die_with_parent() -> None:
    """Let the system kill this process when the one that started it ends, however it ends.

    That one says who it is: it may have ended before this line.
    """
    parent = int(os.environ.get(PARENT, os.getppid()))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:
        os._exit(EXIT_CODE)


def _is_news(record: logging.LogRecord) -> bool:
    """All but the traceback that DBOS logs for every job that somebody cancels."""
    raised = record.exc_info[1] if record.exc_info else None
    return not isinstance(raised, error.DBOSAwaitedWorkflowCancelledError)


def _locked(file: IO[str]) -> bool:
    """Whether this process has a file's lock now; it has it until it closes the file or dies."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def _named(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"{name} (was memory short?)" if name == "SIGKILL" else name
