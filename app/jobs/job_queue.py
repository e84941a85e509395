"""`JobQueue`: the queue as the server sees it. What is done stands in `workers`."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from engines.errors import (
    BadRequest,
    Conflict,
    DiskFull,
    KensaError,
    NoWorker,
    ReadOnly,
    UnknownJob,
)
from engines.queue.fleet import Fleet
from engines.queue.job_folder import JobFolder
from engines.queue.job_requests import JobKind, JobRequest, makes
from engines.queue.protocol import (
    ACTIVE,
    DATABASE,
    enqueue_options,
    scheduled_id,
    training_of,
)
from engines.queue.schedules import NAME, Schedules, last_due
from engines.store.datasets import cannot_write
from engines.store.versions import GATE, Store, stamp

State = Literal["queued", "running", "succeeded", "failed", "cancelled", "interrupted"]
Outcome = Literal["live", "held", "refused", "published", "replaced"]

KEPT = 500  # ended jobs
REMEMBERED = 2 * KEPT  # jobs and versions whose files are not read again
TIDY_EVERY_S = 600.0  # old jobs are looked for at least so often
AT_ONCE = 100  # jobs that are forgotten in one go
LOOK_EVERY_S = 1.0  # whether a locked database can be opened, or one far away still answers
SILENT_S = 15.0  # a database far away that did not answer for so long is gone
ENDED: tuple[State, ...] = ("succeeded", "failed", "cancelled", "interrupted")

_STATES: dict[str, State] = {
    "ENQUEUED": "queued",
    "DELAYED": "queued",
    "PENDING": "running",
    "CANCELLED": "cancelled",
    "ERROR": "failed",
    "MAX_RECOVERY_ATTEMPTS_EXCEEDED": "interrupted",
}

# Five fields of numbers, signs and names (MON, JAN, L for the last), without what croniter draws by
# lot (R, H). A run of letters can be read in one way only: else 50 of them would take years.
_CRON = re.compile(
    r"\s*((?:[\d*/,#-]|(?<![A-Z])(?:L|[A-Z]{3})(?![A-Z]))+(\s+|$)){5}", re.IGNORECASE
)

log = logging.getLogger("kensa")


class _OfModel(NamedTuple):
    """What the outcome of a job depends on, besides what the gate found."""

    live: str | None
    coming: set[str]
    refused: dict[str, str]  # -> why


class JobQueue:
    """Jobs of one data folder. Its methods block: call them in a thread."""

    def __init__(self, data: Path, store: Store, fleet: Fleet | None = None) -> None:
        self._data = data
        self._store = store
        self._fleet = fleet
        self._mine: dict[str, Any] = {"attributes": fleet.mark} if fleet else {}  # of all rows
        self._client: Any = None
        self._answered = 0.0  # on the monotonic clock
        self._opening = threading.Lock()
        self._closing = threading.Event()
        self._tidy = threading.Event()  # set: old jobs are looked for now
        self._schedules = Schedules(data)
        self.answering: Callable[[str], str | None] | None = None  # the server's, for outcomes
        self.coming: Callable[[str], set[str]] | None = None  # the same
        self._problem: str | None = None

    @property
    def problem(self) -> str | None:
        """Why the queue cannot be used at the moment; None when it can."""
        silent = time.monotonic() - self._answered
        if self._fleet and self._client and not self._problem and silent > SILENT_S:
            return f"The queue's database did not answer for {silent:.0f} s."
        return self._problem

    def open(self) -> None:
        """Make the queue where there is none; a damaged one is put aside, a locked one waited for.

        One on another machine is waited for as well, and looked after from then on. `problem` says
        why there is none afterwards, and `submit` raises it.
        """
        with self._opening:
            while self._client is None:
                self._try_to_open()
                if self._client is not None:
                    threading.Thread(target=self._keep_tidy, daemon=True).start()
                    return
                may_pass = self._fleet or "database is locked" in (self.problem or "")
                if not may_pass or self._closing.wait(LOOK_EVERY_S):
                    return

    def _try_to_open(self) -> None:
        if self._fleet is not None:
            self._try_to_reach(self._fleet)
            return
        try:
            from app.jobs.queue_database import connect  # half a second, beside what opens models

            self._client = connect(self._data)
            self._problem = None
        except Exception as error:  # DBOS and SQLAlchemy raise what they like
            log.exception("The queue cannot be opened")
            self._problem = f"The queue in {self._data / DATABASE} cannot be opened: {error}."

    def _try_to_reach(self, fleet: Fleet) -> None:
        """Connect to the database that several machines share, and look after the connection."""
        try:
            from app.jobs.queue_database import reach

            self._client = reach(fleet)
            self._answered = time.monotonic()
            self._problem = None
        except Exception as error:  # noqa: BLE001 (DBOS and SQLAlchemy raise what they like)
            self._say(f"The queue's database cannot be reached: {fleet.shown(error)}.")
            return
        log.info("The queue is reached; this machine is %s in it", fleet.device)
        threading.Thread(target=self._look_after, daemon=True).start()

    def _look_after(self) -> None:
        """Know within a moment whether the database is there."""
        while not self._closing.wait(LOOK_EVERY_S):
            try:
                self._client.check_connection()
                self._answered = time.monotonic()
                if self._problem is not None:
                    log.info("The queue is reached again")
                self._problem = None
            except Exception as error:  # noqa: BLE001, PERF203 (whatever it is, it may pass)
                self._say(str(error))

    def _say(self, problem: str) -> None:
        if problem != self._problem:
            log.error("%s", problem)
        self._problem = problem

    def close(self) -> None:
        self._closing.set()
        self._tidy.set()
        if self._client is not None:
            self._client.destroy()

    # ---- asking for work ----------------------------------------------------------------------

    def submit(self, kind: JobKind, request: JobRequest) -> dict[str, Any]:
        """Queue a job, and describe it.

        Raises:
            Conflict: the model, or teacher, has a job already; the sentence names it.
            NoWorker: the queue cannot be reached.
            DiskFull, ReadOnly: it cannot be written.
        """
        from dbos import error as dbos_error

        client = self._reached()
        content = request.model_dump(exclude_none=True)
        if not request.queue:
            self._refuse_a_second(makes(content))
        job_id = f"{kind}-{secrets.token_hex(6)}"
        once = None if request.queue else makes(content)
        active = client.list_workflows(
            status=ACTIVE, load_input=False, load_output=False, **self._mine
        )
        try:
            with _written("queued"):
                client.enqueue(enqueue_options(job_id, once, active, self._fleet), kind, content)
        except NoWorker as error:
            raise NoWorker(
                f"{error} The job may be queued all the same: see GET /jobs before sending it"
                " again."
            ) from error
        except dbos_error.DBOSQueueDeduplicatedError:  # it came between the look above and now
            self._refuse_a_second(makes(content))
            raise Conflict(f"{makes(content)} has a job already.") from None
        self._tidy.set()  # beside it: who asks for a job does not wait for old ones to go
        return self.get(job_id)

    def _refuse_a_second(self, made: str) -> None:
        for job in self.active():
            if makes(job["request"]) == made:
                raise Conflict(
                    f"{made} has a job already, {job['id']} ({job['state']}): wait for it, cancel"
                    ' it, or send "queue": true to wait behind it.'
                )

    def cancel(self, job_id: str) -> dict[str, Any]:
        """Stop a job; one that has ended stays as it is.

        Raises:
            UnknownJob: there is no such job.
            Conflict: it has ended, or what it made is published.
            DiskFull, ReadOnly: the queue cannot be written; the job goes on.
        """
        job = self.get(job_id)
        if job["state"] in ENDED:
            raise Conflict(f"Job {job_id} has ended ({job['state']}).")
        with _written("cancelled"):
            self._reached().cancel_workflow(job_id)
        if self._fleet is not None:  # after the job itself, which begins no training from then on
            self._reached().cancel_workflow(training_of(job_id))
        job = self.get(job_id)
        if job["state"] != "cancelled":
            raise Conflict(f"Job {job_id} is past being cancelled ({job['state']}).")
        return job

    # ---- looking at it ------------------------------------------------------------------------

    def get(self, job_id: str) -> dict[str, Any]:
        """One job. Raises UnknownJob where there is none of that id."""
        found = self._reached().list_workflows(workflow_ids=[job_id], **self._mine)
        if not found:
            raise UnknownJob(f"There is no job {job_id[:100]!r}.")
        return self._all_described(found)[0]

    def newest(self, limit: int = 50) -> list[dict[str, Any]]:
        """The newest jobs, newest first."""
        found = self._reached().list_workflows(limit=limit, sort_desc=True, **self._mine)
        return self._all_described(found)

    def active(self) -> list[dict[str, Any]]:
        """Those that have not ended."""
        found = self._reached().list_workflows(status=ACTIVE, **self._mine)
        return self._all_described(found)

    def lines(self, job_id: str, after: int = 0) -> tuple[list[str], int]:
        """What a job said, from a byte of its log on."""
        return JobFolder(self._data, job_id).lines(after)

    @property
    def is_open(self) -> bool:
        return self._client is not None

    def count(self) -> dict[str, int]:
        """How many jobs are in each state, of those that are kept."""
        counts: dict[str, int] = dict.fromkeys(get_args(State), 0)
        for status, output, number in self._reached().count_workflows(**self._mine):
            state = _STATES.get(status) or _state_in(output)
            counts[state if state in counts else "failed"] += number
        return counts

    def _all_described(self, found: list[Any]) -> list[dict[str, Any]]:
        """The jobs, and what the machines say that learn for them."""
        trainings = {}
        if self._fleet is not None:
            ids = [training_of(one.workflow_id) for one in found if one.status == "PENDING"]
            rows = self._reached().list_workflows(workflow_ids=ids, load_input=False) if ids else []
            trainings = {row.workflow_id: row for row in rows}
        jobs = [self._described(one, trainings.get(training_of(one.workflow_id))) for one in found]
        self._add_outcomes([job for job in jobs if job["version"] is not None])
        return jobs

    def _described(self, status: Any, training: Any) -> dict[str, Any]:
        attempts, progress = self._files(status)
        kind, request = status.input["args"][:2] if status.input else ("retrain", {})
        ended = status.output if isinstance(status.output, dict) else {}
        job: dict[str, Any] = {
            "id": status.workflow_id,
            "kind": kind,
            "model": request.get("model", ""),
            "state": _STATES.get(status.status) or ended.get("state", "failed"),
            "created": _time(status.created_at),
            "ended": _time(status.completed_at),
            "attempts": max(attempts, ended.get("attempts", 0)),
            "request": request,
            "progress": None,
            "version": ended.get("version"),
            "outcome": None,
            "error": ended.get("error"),
            "code": ended.get("code"),
            "machine": ended.get("machine"),
            "images": ended.get("images"),
        }
        if self._fleet is not None and kind == "retrain" and status.status == "PENDING":
            self._add_training(job, training)
        if status.status == "ERROR":
            job["error"], job["code"] = f"The queue failed: {status.error}.", "internal_error"
        if job["state"] in ("running", "failed", "succeeded"):
            if job["state"] == "running" and progress.get("phase") in ("failed", "succeeded"):
                progress = {**progress, "phase": "ending"}  # the queue does not know of it yet
            job["progress"] = progress or None
        return job

    def _files(self, status: Any) -> tuple[int, dict[str, Any]]:
        """How often a job was begun, and how far it is. Of one that has ended it is known."""
        if status.status == "SUCCESS":  # so nobody writes them any more
            return _ended_files(self._data, status.workflow_id, status.completed_at)
        return _read_files(self._data, status.workflow_id)

    def _add_training(self, job: dict[str, Any], training: Any) -> None:
        """Where a job learns, or that it still waits for a machine."""
        if training is None or training.status in ("ENQUEUED", "DELAYED"):
            job["state"] = "queued"
        else:
            job["machine"] = training.executor_id
        if training is not None:
            begun = int((training.attributes or {}).get("attempts", 0))
            job["attempts"] = max(job["attempts"], begun)

    def _add_outcomes(self, jobs: list[dict[str, Any]]) -> None:
        """What became of the versions that jobs published.

        Each model is asked once, and what the gate found before what is in memory: that is the
        order in which a version goes live.
        """
        known = cache(lambda name: frozenset(self._store.versions(name)))

        def gate(job: dict[str, Any]) -> dict[str, Any] | None:
            with contextlib.suppress(OSError):  # of a model that cannot be read
                if job["version"] in known(job["model"]):  # else its record is gone as well
                    return _gate(self._store, job["model"], job["version"])
            return None

        gates = [gate(job) for job in jobs]
        models = cache(self._of_model)
        for job, found in zip(jobs, gates, strict=True):
            with contextlib.suppress(OSError):
                is_there = job["version"] in known(job["model"])
                self._add_outcome(job, found, models(job["model"]), is_there=is_there)

    def _of_model(self, name: str) -> _OfModel:
        if self.answering is not None:
            live = self.answering(name)
        else:
            pointer = self._store.pointer(name)
            live = pointer.live if pointer else None
        coming = self.coming(name) if self.coming is not None else set()
        return _OfModel(live, coming, self._store.refused(name))

    def _add_outcome(
        self,
        job: dict[str, Any],
        gate: dict[str, Any] | None,
        model: _OfModel,
        *,
        is_there: bool,
    ) -> None:
        """What became of the version that a job published. Until the gate has seen it, it runs."""
        version = job["version"]
        if version in model.refused:
            error = model.refused[version]
            job.update(outcome="refused", state="failed", code="bad_bundle", error=error)
        elif version == model.live:
            job["outcome"] = "live"
        elif version in model.coming:
            self._is_at_the_gate(job)
        elif gate is not None and gate.get("ok") is False:
            job.update(outcome="held", error=" ".join(gate.get("reasons", [])))
        elif gate is not None:
            job["outcome"] = "replaced"
        elif is_there and self._goes_live(job["model"], version):
            self._is_at_the_gate(job)
        else:
            job["outcome"] = "published"

    def _is_at_the_gate(self, job: dict[str, Any]) -> None:
        job["state"] = "running"
        job["progress"] = {**(job["progress"] or {}), "phase": "gate"}

    def _goes_live(self, name: str, version: str) -> bool:
        try:
            return _is_to_go_live(self._store, name, version)
        except KensaError:
            return False

    # ---- again and again ----------------------------------------------------------------------

    def schedule(self, name: str, wanted: Any) -> dict[str, Any]:
        """Retrain by a cron expression; one of the same name is replaced.

        Raises:
            BadRequest: the name, the expression or the time zone is wrong.
        """
        if not re.fullmatch(NAME, name):
            raise BadRequest(
                f"A schedule's name has up to 64 letters, digits, - and _, not {name!r}."
            )
        try:
            ZoneInfo(wanted.timezone)
        except (ValueError, OSError, ZoneInfoNotFoundError):
            raise BadRequest(f"There is no time zone {wanted.timezone!r}.") from None
        try:
            if not _CRON.fullmatch(wanted.cron):
                raise ValueError
            last_due(wanted.cron, wanted.timezone, time.time())
        except (ValueError, KeyError):
            raise BadRequest(
                f"{wanted.cron!r} is no cron expression: it takes minute, hour, day, month and"
                " weekday, such as 0 2 * * * for every night at two."
            ) from None
        content = {
            "cron": wanted.cron,
            "timezone": wanted.timezone,
            "retrain": wanted.retrain.model_dump(exclude_none=True),
        }
        try:
            self._schedules.write(name, content)
        except OSError as error:
            if isinstance(found := cannot_write(error), ReadOnly):
                raise found from None
            raise DiskFull(f"The schedule cannot be written: {error.strerror}.") from None
        return next(one for one in self.schedules() if one["name"] == name)

    def schedules(self) -> list[dict[str, Any]]:
        """All of them, and when each last began a job."""
        return [
            {"name": name, **content, "last": self._last_begun(name)}
            for name, content in self._schedules.all().items()
        ]

    def _last_begun(self, name: str) -> str | None:
        prefix = scheduled_id(name, fleet=self._fleet)
        found = self._reached().list_workflows(
            workflow_id_prefix=prefix, sort_desc=True, load_input=False, load_output=False,
            **self._mine,
        )  # fmt: skip
        pattern = re.compile(re.escape(prefix) + r"\d{8}T\d{4}")
        return next((_time(one.created_at) for one in found if pattern.fullmatch(one.workflow_id)),
                    None)  # fmt: skip

    def unschedule(self, name: str) -> None:
        """End a schedule. Raises UnknownJob where there is none of that name."""
        if name not in self._schedules.all():
            raise UnknownJob(f"There is no schedule {name[:100]!r}.")
        self._schedules.remove(name)

    # ---- keeping it small ---------------------------------------------------------------------

    def _keep_tidy(self) -> None:
        """Forget old jobs, whoever began them: schedules begin some, and nobody asks for these."""
        while not self._closing.is_set():
            self._tidy.clear()
            try:
                self.prune()
            except Exception as error:  # noqa: BLE001 (whatever it is, it may pass)
                if self._closing.is_set():
                    return
                log.warning("Old jobs cannot be deleted: %s", " ".join(str(error).split())[:200])
            self._tidy.wait(TIDY_EVERY_S)

    def prune(self) -> None:
        """Forget the oldest ended jobs beyond `KEPT`."""
        client = self._reached()
        ended = ["SUCCESS", "ERROR", "CANCELLED", "MAX_RECOVERY_ATTEMPTS_EXCEEDED"]
        while not self._closing.is_set():
            old = client.list_workflows(
                status=ended, sort_desc=True, offset=KEPT, limit=AT_ONCE,
                load_input=False, load_output=False, **self._mine,
            )  # fmt: skip
            for one in old:
                # In this order, so that the next call ends what a kill in between leaves.
                shutil.rmtree(JobFolder(self._data, one.workflow_id).root, ignore_errors=True)
            if not old:
                return
            ids = [one.workflow_id for one in old]
            if self._fleet is not None:
                client.delete_workflows([training_of(one) for one in ids])
            client.delete_workflows(ids)

    def _reached(self) -> Any:
        if self._client is None or (self._fleet and self.problem):
            raise NoWorker(self.problem or "The queue is being opened; try again in a few seconds.")
        return self._client


def failures() -> tuple[type[Exception], ...]:
    """What may be raised where the queue is asked for something."""
    from dbos import error
    from sqlalchemy.exc import SQLAlchemyError

    return KensaError, SQLAlchemyError, error.DBOSException


@contextlib.contextmanager
def _written(what: str) -> Iterator[None]:
    """Turns the error of a database that cannot be written into a sentence; nothing is changed."""
    from sqlalchemy.exc import OperationalError

    try:
        yield
    except OperationalError as error:
        if "disk is full" in str(error):
            raise DiskFull(f"Nothing was {what}: the disk is full. Free some space.") from error
        if "readonly database" in str(error):
            raise ReadOnly(
                f"Nothing was {what}, because the data folder cannot be written: mount it for"
                " writing, or let this user write there."
            ) from error
        raise


def _read_files(data: Path, job_id: str) -> tuple[int, dict[str, Any]]:
    folder = JobFolder(data, job_id)
    progress = folder.progress()
    progress.pop("pid", None)
    return folder.attempts(), progress


@lru_cache(REMEMBERED)
def _ended_files(data: Path, job_id: str, _ended: int | None) -> tuple[int, dict[str, Any]]:
    return _read_files(data, job_id)


def _gate(store: Store, name: str, version: str) -> dict[str, Any] | None:
    """What the gate found, which is read again where the file is another."""
    return _read_gate(store, name, version, stamp(_gate_file(store, name, version)))


@lru_cache(REMEMBERED)
def _gate_file(store: Store, name: str, version: str) -> Path:
    return store.gate_folder(name, version) / GATE


@lru_cache(REMEMBERED)
def _read_gate(
    store: Store, name: str, version: str, _stamp: tuple[int, ...]
) -> dict[str, Any] | None:
    return store.gate(name, version)


@lru_cache(REMEMBERED)
def _is_to_go_live(store: Store, name: str, version: str) -> bool:
    """A version never changes, so its manifest is read once."""
    return store.manifest(name, version).origin.get("activate") is True


def _state_in(output: str | None) -> str:
    """How a job ended by what it left, the queue's JSON."""
    try:
        ended = json.loads(output or "null")
    except (ValueError, RecursionError):
        return "failed"
    return str(ended.get("state")) if isinstance(ended, dict) else "failed"


def _time(epoch_ms: int | None) -> str | None:
    if epoch_ms is None:
        return None
    return datetime.fromtimestamp(epoch_ms / 1000, timezone.utc).isoformat(timespec="seconds")
