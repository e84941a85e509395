"""The worker of one machine alone: takes jobs from its queue, and begins what is scheduled."""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

from dbos import DBOS, DBOSConfig, error
from sqlalchemy.exc import SQLAlchemyError

from engines.errors import EXIT_CODE
from engines.queue.fleet import Fleet
from engines.queue.json_rows import JsonSerializer
from engines.queue.protocol import (
    ACTIVE,
    APP_VERSION,
    APPLICATION,
    DATABASE,
    QUEUE,
    WORKFLOW,
    database_url,
    enqueue_options,
    scheduled_id,
)
from engines.queue.schedules import Schedules, last_due
from workers.jobs.attempts import attend, attended

EXECUTOR = "worker"  # there is one per data folder, whatever the machine is called today
POLL_S = 0.5  # the queue
WATCH_EVERY_S = 2.0  # schedules, and what fell through
LATE_S = 60.0  # a schedule is kept when the worker was away for less
LOST_S = 60.0  # a job that runs, says the queue, and nobody attends it
log = logging.getLogger("kensa.worker")
stopping = threading.Event()


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


def _is_news(record: logging.LogRecord) -> bool:
    """All but the traceback that DBOS logs for every job that somebody cancels."""
    raised = record.exc_info[1] if record.exc_info else None
    return not isinstance(raised, error.DBOSAwaitedWorkflowCancelledError)


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None
