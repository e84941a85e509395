"""What the server and the worker agree on: the queue's names, ids and options.

The queue (DBOS, in a database) holds which jobs there are and who has them. How they go stands in
files, see `job_folder.py`; what is learned again and again too, see `schedules.py`.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from engines.queue.fleet import Fleet

if TYPE_CHECKING:
    from dbos import EnqueueOptions, WorkflowStatus

APPLICATION = "kensa"
QUEUE = "jobs"
WORKFLOW = "job"
TRAINING = "train"  # the part of a retraining that any machine of a fleet may do, in QUEUE
APP_VERSION = "1"  # of what a job's rows mean; another one leaves old jobs alone
DATABASE = "jobs.sqlite"
RUNNING = "jobs/running"  # a file: the process of the job that runs
WAITING = "jobs/waiting"  # a file: the process that waits for the next job, where there is one
PACE = "KENSA_JOB_PACE"  # the server's setting, which its worker inherits
PARENT = "KENSA_PARENT"  # the process that started this one, and whose death ends it
ACTIVE = ["ENQUEUED", "DELAYED", "PENDING"]  # in DBOS's words: waiting or running


def scheduled_id(name: str, due: datetime | None = None, fleet: Fleet | None = None) -> str:
    """The id of the job that a schedule begins at a moment, or what all of its ids begin with."""
    whole = f"{fleet.device}.{name}" if fleet else name  # no name of either kind has a dot
    return f"scheduled-{whole}-{due:%Y%m%dT%H%M}" if due else f"scheduled-{whole}-"


def training_of(job_id: str) -> str:
    """The id of that part of a retraining that any machine of a fleet may do."""
    return f"{job_id}.train"


def job_of(training_id: str) -> str:
    """The job of a training; a job itself is its own."""
    return training_id.removesuffix(".train")


def enqueue_options(
    job_id: str, once: str | None, active: list[WorkflowStatus], fleet: Fleet | None = None
) -> EnqueueOptions:
    """What the queue is told of a job. While a job of the same `once` waits or runs, it refuses.

    The place in the line is counted: DBOS goes by the clock, which may be set back in between. In a
    fleet a job waits in the line of the machine that it belongs to.
    """
    options: EnqueueOptions = {
        "workflow_name": WORKFLOW,
        "queue_name": fleet.own_queue if fleet else QUEUE,
        "workflow_id": job_id,
        "app_version": APP_VERSION,
        "application_name": APPLICATION,
        "priority": 1 + max((job.priority or 0 for job in active), default=0),
    }
    if once is not None:
        options["deduplication_id"] = once
    if fleet is not None:
        options["attributes"] = dict(fleet.mark)
    return options


def database_url(data: Path, fleet: Fleet | None = None) -> str:
    return fleet.database_url if fleet else f"sqlite:///{data / DATABASE}"
