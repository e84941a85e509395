"""The worker of one machine among several that share a queue.

A job belongs to the machine that was asked for it, and is a workflow in that machine's own queue,
with up to three steps: `prepare` sends the images and the version to start from to the shared
store, `follow` lets any machine learn (a workflow `train` in the queue of all), `attend` converts
and publishes here. What a step returned stands in the database, so whoever dies in between goes on
where it was.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import psycopg
from dbos import DBOS
from sqlalchemy.exc import SQLAlchemyError

from engines.errors import EXIT_CODE, BadSettings, KensaError, NoShared
from engines.files import write_atomically
from engines.image import ImageLimits
from engines.queue.fleet import Fleet
from engines.queue.job_folder import JobFolder
from engines.queue.job_requests import RetrainRequest, makes
from engines.queue.protocol import (
    ACTIVE,
    QUEUE,
    TRAINING,
    WORKFLOW,
    enqueue_options,
    job_of,
    training_of,
)
from engines.store.plan_record import builds_plans
from engines.store.shared import Shared
from engines.store.versions import Store
from workers.jobs import exchange, parent_and_child, single_worker
from workers.jobs.attempts import attend, attended, children, was_cancelled
from workers.jobs.exchange import Relay, mirror, needed, patiently
from workers.jobs.lease import Lease

OWN_AT_ONCE = 32  # jobs of this machine that other machines learn for
LOST_LOOKS = 30  # so often a job must be seen that runs, says the queue, and nobody attends
INTERNAL_QUEUE = "_dbos_internal_queue"  # DBOS's, for rows that have lost the name of theirs

# What DBOS logs several times a second while the database is away, and `Lease` says once; and that
# a job was cancelled.
_TOLD = re.compile(
    r"\(psycopg\.OperationalError\)|AdminShutdown|CannotConnectNow|Notification listener error"
    r"|no longer owned by this execution"
)

log = logging.getLogger("kensa.worker")
Result = TypeVar("Result")
Ended = dict[str, Any]


def work_with_others(data: Path, fleet: Fleet) -> None:
    """Take jobs until told to stop, or until the queue's database is lost for too long."""
    can_learn = find_spec("torch") is not None and find_spec("anomalib") is not None
    if not can_learn and not builds_plans():
        raise BadSettings("Nothing can be learned or converted here: pip install 'kensa[train]'.")
    shared, lease = Shared.open(fleet.shared_url), Lease(fleet)
    if not lease.take(single_worker.stopping):
        return
    lease.keep(end_at_once)
    dbos = single_worker.configured(data, fleet)
    logging.getLogger("dbos").addFilter(lambda record: not _TOLD.search(record.getMessage()))
    register(data, fleet, shared)
    learns = can_learn and fleet.worker != "convert"
    DBOS.listen_queues([fleet.own_queue, *([QUEUE] if learns else [])])
    try:
        DBOS.launch()  # which takes back what this machine had before
        for queue, at_once in ((fleet.own_queue, OWN_AT_ONCE), (QUEUE, 1)):
            DBOS.register_queue(
                queue, worker_concurrency=at_once, polling_interval_sec=single_worker.POLL_S,
                on_conflict="always_update",
            )  # fmt: skip
        single_worker.sweep(data)
    except SQLAlchemyError as error:
        log.error("The queue's database is lost: %s", fleet.shown(error))
        os._exit(EXIT_CODE)
    threading.Thread(target=watch, args=[data, fleet, lease, dbos], daemon=True).start()
    log.info("Waiting for jobs, as %s%s", fleet.device, "" if learns else ", to convert")
    single_worker.stopping.wait()
    os._exit(0)  # as a worker alone does


def end_at_once() -> None:
    """Others may take over soon: kill what runs here, and begin anew."""
    for child in list(children):
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    log.error("The queue's database is lost for too long; this worker ends, the next one waits")
    os._exit(EXIT_CODE)


# ---- workflows --------------------------------------------------------------------------------


def register(data: Path, fleet: Fleet, shared: Shared) -> None:
    """Tell DBOS what a job is, and what its training is."""

    @DBOS.step(name="prepare")
    def prepare_step(job_id: str, kind: str, request: dict[str, Any]) -> Ended:
        return named(lambda: prepare(data, fleet, shared, job_id, kind, request))

    @DBOS.step(name="follow")
    def follow_step(job_id: str) -> Ended:
        return follow(data, fleet, shared, job_id)

    @DBOS.step(name="attend")
    def attend_step(job_id: str, kind: str, request: dict[str, Any]) -> Ended:
        return attend(data, job_id, kind, request)

    @DBOS.step(name="train")
    def train_step(training_id: str, wanted: dict[str, Any]) -> Ended:
        return train(data, fleet, shared, training_id, wanted)

    # How often a job may be begun is counted beside it: DBOS counts what only waited, too.
    @DBOS.workflow(name=WORKFLOW, max_recovery_attempts=None)
    def job(kind: str, request: dict[str, Any]) -> Ended:
        job_id = _own_id()
        attended.add(job_id)
        try:
            ready = prepare_step(job_id, kind, request)
            if "state" in ready:
                return ready
            if kind != "retrain":
                return {**attend_step(job_id, kind, request), "machine": fleet.device}
            options = enqueue_options(training_of(job_id), None, [])
            options["workflow_name"], options["priority"] = TRAINING, ready["place"]
            DBOS.enqueue_workflow_with_options(options, ready)  # once, however often it is asked
            learned = follow_step(job_id)
            if learned.get("state") != "succeeded":
                return learned
            ended = attend_step(job_id, "finish", {**ready, **learned})
            return {**learned, **ended}  # where it was learned, and how often it was begun
        finally:
            attended.discard(job_id)

    @DBOS.workflow(name=TRAINING, max_recovery_attempts=None)
    def training(wanted: dict[str, Any]) -> Ended:
        training_id = _own_id()
        attended.add(training_id)
        try:
            return train_step(training_id, wanted)
        finally:
            attended.discard(training_id)


def _own_id() -> str:
    """The id of the workflow that runs, which is a folder's name as well."""
    own = DBOS.workflow_id or ""
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}", own):
        raise ValueError(f"{own[:100]!r} is no job's id")
    return own


# ---- the machine that a job belongs to --------------------------------------------------------


def prepare(
    data: Path, fleet: Fleet, shared: Shared, job_id: str, kind: str, request: dict[str, Any]
) -> Ended:
    """Wait for the model's jobs before this one, and send what another machine needs to learn.

    Returns:
        What the other is to be told, or how the job ended where it cannot begin.

    Raises:
        KensaError: what the request names is not there or does not fit.
    """
    folder = JobFolder(data, job_id)
    while is_behind(fleet, job_id, makes(request)):
        if was_cancelled(job_id):
            return {"state": "cancelled"}
        time.sleep(parent_and_child.LOOK_EVERY_S)
    if kind != "retrain":
        return {}
    folder.root.mkdir(parents=True, exist_ok=True)
    limits = ImageLimits.read(os.environ).environment()  # of the line, wherever it is learned
    wanted = {"device": fleet.device, "model": request["model"], "retrain": request}
    wanted |= {"limits": limits}
    parent = RetrainRequest(**request).start(Store(data / "models"))

    def send() -> str:
        try:
            files = needed(data, RetrainRequest(**request), parent, folder.say)
            return shared.push(f"{fleet.device}/inputs", files, _shown(folder, "send"))
        except FileNotFoundError as error:
            raise NoShared(f"{error.filename} went away while it was sent.") from None

    with _sending:
        inputs = patiently(send, folder, lambda: was_cancelled(job_id))
        if inputs is None:
            return {"state": "cancelled"}
        sent = data / "sent" / f"{request['model']}.json"
        sent.parent.mkdir(exist_ok=True)
        write_atomically(sent, json.dumps({"inputs": inputs}).encode())
        with suppress(NoShared, SQLAlchemyError):  # the next job sweeps, too
            sweep(data, fleet, shared)
    waiting = DBOS.list_workflows(status=ACTIVE, name=TRAINING, load_input=False, load_output=False)
    place = 1 + max((one.priority or 0 for one in waiting), default=0)
    return {**wanted, "inputs": inputs, "parent": parent, "place": place}


def is_behind(fleet: Fleet, job_id: str, made: str) -> bool:
    """Whether a job of the same model came before this one: it starts from what that one makes."""
    mine = DBOS.list_workflows(status=ACTIVE, attributes=fleet.mark, load_output=False)
    places = {
        one.workflow_id: (one.priority or 0, one.workflow_id)
        for one in mine
        if one.input and makes(one.input["args"][1]) == made
    }
    own = places.get(job_id)
    return own is not None and any(place < own for place in places.values())


def follow(data: Path, fleet: Fleet, shared: Shared, job_id: str) -> Ended:
    """Show progress and log of the machine that learns as this job's own; how that ended."""
    training_id, folder = training_of(job_id), JobFolder(data, job_id)
    said: dict[str, str] = {}
    while True:
        status = DBOS.get_workflow_status(training_id)
        with suppress(NoShared):
            mirror(fleet, shared, job_id, folder, said)
        if status is None or status.status == "CANCELLED":
            return {"state": "cancelled"}
        if status.status == "SUCCESS":
            return dict(status.output or {})
        if status.status not in ACTIVE:
            error = f"The queue failed: {status.error}."
            return {"state": "failed", "code": "internal_error", "error": error}
        if was_cancelled(job_id):
            DBOS.cancel_workflow(training_id)
            return {"state": "cancelled"}
        time.sleep(exchange.RELAY_EVERY_S)


def sweep(data: Path, fleet: Fleet, shared: Shared) -> None:
    """Remove what jobs of this machine that have ended left, here and in the shared store.

    The images and versions that each model was last learned from stay: only what is new is sent
    next time.
    """
    mine = DBOS.list_workflows(
        status=ACTIVE, attributes=fleet.mark, load_input=False, load_output=False
    )
    active = {one.workflow_id for one in mine}
    for place in (f"{fleet.device}/results", f"{fleet.device}/progress"):
        for job_id in shared.names(place):
            if job_id not in active:
                shared.sweep(f"{place}/{job_id}")
    sent = [json.loads(path.read_bytes())["inputs"] for path in (data / "sent").glob("*.json")]
    if sent:
        shared.sweep(f"{fleet.device}/inputs", keep=sent)
    sweep_trainings(data)


def sweep_trainings(data: Path) -> None:
    """Remove what this machine kept of trainings whose jobs have ended."""
    folders = {job_of(path.name): path for path in (data / "jobs").glob("*.train")}
    if folders:
        found = DBOS.list_workflows(
            workflow_ids=list(folders), status=ACTIVE, load_input=False, load_output=False
        )
        for job_id in folders.keys() - {one.workflow_id for one in found}:
            shutil.rmtree(folders[job_id], ignore_errors=True)


_sending = threading.Lock()  # nobody sweeps what is being sent


# ---- the machine that learns ------------------------------------------------------------------


def train(
    data: Path, fleet: Fleet, shared: Shared, training_id: str, wanted: dict[str, Any]
) -> Ended:
    """Learn in a child process, and tell the machine that asked how it goes."""
    sweep_trainings(data)
    folder = CountedInTheQueue(data, training_id)
    relay = Relay(shared, f"{wanted['device']}/progress/{job_of(training_id)}", folder)
    try:
        ended = attend(data, training_id, "train", wanted, folder)
    finally:
        relay.end()
    return {**ended, "machine": fleet.device, "attempts": folder.attempts()}


class CountedInTheQueue(JobFolder):
    """A job whose attempts are counted over all machines, in its row of the queue."""

    def __init__(self, data: Path, job_id: str) -> None:
        super().__init__(data, job_id)
        self._job_id = job_id

    def attempts(self) -> int:
        found = DBOS.list_workflows(
            workflow_ids=[self._job_id], load_input=False, load_output=False
        )
        return int((found[0].attributes or {}).get("attempts", 0)) if found else 0

    def begin(self) -> int:
        self.root.mkdir(parents=True, exist_ok=True)
        self.log.unlink(missing_ok=True)  # each attempt has its own here
        attempts = self.attempts() + 1
        DBOS.update_workflow_attributes(self._job_id, {"attempts": attempts}, merge=True)
        return attempts


# ---- both -------------------------------------------------------------------------------------


def watch(data: Path, fleet: Fleet, lease: Lease, dbos: DBOS) -> None:
    """Begin what is scheduled, take over from machines that died, and what fell through."""
    lost: dict[str, int] = {}
    while True:
        time.sleep(single_worker.WATCH_EVERY_S)
        try:
            single_worker.begin_scheduled(data, time.time(), fleet)
            running = DBOS.list_workflows(status="PENDING", load_input=False, load_output=False)
            machines = {str(one.executor_id) for one in running} - {fleet.device}
            for machine in lease.dead(machines, single_worker.WATCH_EVERY_S):
                with lease.instead_of(machine) as is_dead:
                    if is_dead:
                        take_over(dbos, machine, [x.workflow_id for x in running
                                                  if x.executor_id == machine])  # fmt: skip
            mine = {one.workflow_id for one in running if one.executor_id == fleet.device}
            lost = {one: lost.get(one, 0) + 1 for one in mine - attended}
            take_over(dbos, fleet.device, [one for one in lost if lost[one] > LOST_LOOKS])
        except (SQLAlchemyError, psycopg.Error) as error:
            log.warning("The queue does not answer: %s", fleet.shown(error))


def take_over(dbos: DBOS, machine: str, job_ids: list[str]) -> None:
    """Give back what a machine runs, says the queue, and does not: each to the queue it came from.

    As DBOS does when a worker starts, and with its own statement, which does nothing once another
    machine has the job.
    """
    for job_id in job_ids:
        if dbos._sys_db.reenqueue_for_recovery(job_id, [machine], INTERNAL_QUEUE):
            log.warning("%s does not attend to job %s any more: it waits again", machine, job_id)


def named(work: Callable[[], Ended]) -> Ended:
    """How a job ended whose step raised an error that has a name."""
    try:
        return work()
    except KensaError as error:
        return {"state": "failed", "code": error.code, "error": " ".join(str(error).split())}
    except OSError as error:
        return {"state": "failed", "code": "os_error", "error": f"It cannot be begun: {error}."}


def _shown(folder: JobFolder, phase: str) -> Callable[[int, int], None]:
    """Progress of what this process does itself, at most a few times a second."""
    last = [-1.0]

    def tick(done: int, total: int) -> None:
        if done >= total or time.monotonic() - last[0] > exchange.RELAY_EVERY_S:
            last[0] = time.monotonic()
            folder.write_progress({"phase": phase, "done": done, "total": total, "fraction": 0.0})

    return tick
