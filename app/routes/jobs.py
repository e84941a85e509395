"""Retrain, convert, make a teacher while parts keep coming: ask for it, watch it, stop it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Query, Request, Response
from fastapi import Path as InPath
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import ConfigDict, Field

from app.http.access import KeyFirst, may_still, needs
from app.http.base_body import Body
from app.http.base_body import error_response as problem
from app.jobs.job_queue import ENDED, JobQueue
from app.routes.marked_parts import TeachBody, taught
from app.serving.model_manager import ModelManager
from engines.errors import BadDataset, KensaError, NoWorker
from engines.machine import job_memory
from engines.meta import Meta
from engines.queue.job_requests import (
    ConvertRequest,
    JobKind,
    RetrainRequest,
    TeacherRequest,
    weights_in,
)
from engines.queue.schedules import NAME
from engines.store.datasets import Datasets
from engines.store.versions import META, Store

MOST_WAIT_S = 10.0  # of a submission for those before it


class ProgressBody(Body):
    """How far a job is."""

    phase: str = Field(
        description="starting, images, coreset, epochs, verify, convert, publish, gate ..., or"
        " what it waits for."
    )
    done: int = Field(0, description="Images or epochs of this phase.")
    total: int = 0
    fraction: float = Field(0.0, description="Of the whole job, 0 to 1.")
    seconds_left: float | None = None
    held_back: float = Field(
        0.0, description="Share of the last seconds that it was stopped, because the line was busy."
    )


class ImagesBody(Body):
    """What became of the images that a job learned from."""

    learned: int
    known: int = Field(description="Left out, because the version that it started from knows them.")
    strange: int = Field(
        description="Left out, because they are unlike the others and unlike what is known."
    )
    names: list[str] = Field(description="Of the strange ones, up to 20.")
    skipped: int = Field(description="That could not be read; the job's log names them.")
    note: str | None = Field(None, description="What to do about the strange ones.")
    notes: list[str] = Field([], description="What else a person should know of the pictures.")


class JobBody(Body):
    """A job that learns or converts."""

    id: str
    kind: str = Field(description="retrain, convert or teacher.")
    model: str = Field(description="Empty where a teacher is made.")
    state: str = Field(
        description="queued, running, succeeded, failed, cancelled, or interrupted: its process"
        " died three times."
    )
    created: str | None
    ended: str | None
    attempts: int = Field(description="How often it was begun.")
    request: dict[str, Any]
    progress: ProgressBody | None
    version: str | None = Field(description="What it published.")
    outcome: str | None = Field(
        description="What became of that: live, held by the gate, refused, published, or replaced"
        " by a later one."
    )
    error: str | None
    code: str | None
    machine: str | None = Field(
        None, description="Which machine learns or learned, where several share a queue."
    )
    images: ImagesBody | None = Field(
        None, description="What became of the images, once a training has succeeded."
    )


class JobsBody(Body):
    """Jobs, newest first."""

    jobs: list[JobBody]
    no_worker: str | None = Field(
        description="Why nothing beside this server takes a job; null where something does, or"
        " where several machines share the queue."
    )


class RetrainBody(RetrainRequest):
    """Learn from the images of a category, and put the result in the place of the live version."""

    from_decisions: bool = Field(
        False,
        strict=True,
        description="First put the parts of this model that somebody has marked into the category,"
        " as POST /datasets/{category}/from-decisions does.",
    )


class ScheduleRequest(Body):
    """Retrain again and again."""

    model_config = ConfigDict(
        strict=True,
        json_schema_extra={
            "examples": [
                {
                    "cron": "0 2 * * *",
                    "timezone": "Asia/Tokyo",
                    "retrain": {"model": "my-part", "category": "my-part"},
                }
            ]
        },
    )

    cron: str = Field(
        max_length=100,
        description="Minute, hour, day, month, weekday: `0 2 * * *` is 2 at night.",
    )
    timezone: str = Field("UTC", max_length=100, description="Such as Asia/Tokyo.")
    retrain: RetrainRequest = Field(description="The body of POST /retrain.")


class ScheduleBody(ScheduleRequest):
    """A schedule."""

    name: str
    last: str | None = Field(description="When it last began a job.")


class SchedulesBody(Body):
    """All schedules."""

    schedules: list[ScheduleBody]


router = APIRouter(tags=["jobs"], route_class=KeyFirst)
Result = TypeVar("Result")
Asked = TypeVar("Asked", RetrainRequest, ConvertRequest, TeacherRequest)

JobId = Annotated[
    str, InPath(description="As in the job's `id`.", examples=["retrain-5d3c0a8e91f7"])
]
ScheduleName = Annotated[
    str, InPath(pattern=NAME, description="What to call it.", examples=["nightly"])
]

REPLY_WITHIN_S = 10.0  # of the queue; a locked database is waited for that long
LOOK_EVERY_S = 0.5  # of a stream of events
ALIVE_EVERY_S = 15.0  # a comment that keeps proxies from closing a stream

# Of their own: while the database is locked, nothing else must wait for a thread.
_THREADS = ThreadPoolExecutor(4, thread_name_prefix="queue")
_NO_WORKER = problem(
    "No worker, or no queue.",
    no_worker="Nothing can be learned here: ... pip install 'kensa[train]'",
)
_UNKNOWN = problem("No such job.", unknown_job="There is no job 'retrain-0123456789ab'.")
_ASKED: dict[int | str, dict[str, Any]] = {
    202: {"headers": {"Location": {"schema": {"type": "string"}, "description": "The job."}}},
    404: problem(
        "No such model, version or category.",
        unknown_model="There is no model 'bolt'; there is 'bracket'.",
        unknown_version="bracket has no version '0009-...'.",
        unknown_dataset="There is no category 'bolt'.",
    ),
    409: problem(
        "The model has a job already.",
        conflict="bracket has a job already, retrain-5d3c... (running): wait for it, cancel it, or"
        ' send "queue": true to wait behind it.',
    ),
    422: problem(
        "What is asked for does not fit.",
        bad_request="The body parameter epochs is wrong: Input should be at least 1.",
        bad_meta="Every version of bolt was held by the gate or rolled back from: name the one ...",
        bad_dataset="The category bolt has no training images: POST some to /datasets/bolt/train.",
        bad_weights=".../weights/resnet18.safetensors does not exist: put the weights there, ...",
        bad_bundle="...manifest.json is damaged ...",
    ),
    503: _NO_WORKER,
    507: problem(
        "No room, on the disk or in memory.",
        disk_full="Nothing was queued: the disk is full. Free some space.",
        read_only="Nothing was queued, because the data folder cannot be written: ...",
        out_of_memory="Retraining bolt needs about 2100 MiB, and 1500 MiB are free: unload ...",
    ),
}


@router.post(
    "/retrain",
    dependencies=[needs("operator")],
    status_code=202,
    summary="Learn from the images of a category",
    responses=_ASKED,
)
async def retrain(request: Request, response: Response, body: RetrainBody) -> JobBody:
    """The answer comes at once; `Location` names the job. Parts are inspected all the while."""
    if body.from_decisions:
        await taught(request, body.category, TeachBody.model_validate({"model": body.model}))
    asked = RetrainRequest(**body.model_dump(exclude={"from_decisions"}, exclude_unset=True))
    here = request.app.state.settings.fleet is None  # else any machine may learn
    return await _submit(request, response, "retrain", asked, _check_retrain, here=here)


@router.post(
    "/convert",
    dependencies=[needs("operator")],
    status_code=202,
    summary="Make an engine of a version",
    responses=_ASKED,
)
async def convert(request: Request, response: Response, body: ConvertRequest) -> JobBody:
    """As convtrt.py does: export, compare with the trained model, publish."""
    return await _submit(request, response, "convert", body, _check_version)


@router.post(
    "/teacher",
    dependencies=[needs("operator")],
    status_code=202,
    summary="Make a teacher for EfficientAD",
    responses=_ASKED,
)
async def teacher(request: Request, response: Response, body: TeacherRequest) -> JobBody:
    """As `python3 -m workers.distil` does, out of the training images of a category."""
    return await _submit(request, response, "teacher", body, _check_learning)


@router.get(
    "/jobs",
    dependencies=[needs("line")],
    summary="Which jobs are there?",
    response_model=JobsBody,
    responses={503: _NO_WORKER},
)
async def jobs(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=500, description="The newest so many.")] = 50,
) -> Response:
    """Newest first."""

    def written() -> str:  # in the thread: 500 jobs are 300 KB, and parts need the loop
        bodies = [_body(request, one) for one in _jobs(request).newest(limit)]
        return JobsBody(jobs=bodies, no_worker=_no_worker(request)).model_dump_json()

    return Response(await _ask(written), media_type="application/json")


@router.get(
    "/jobs/{job_id}",
    dependencies=[needs("line")],
    summary="How is this job?",
    responses={404: _UNKNOWN, 503: _NO_WORKER},
)
async def job(request: Request, job_id: JobId) -> JobBody:
    """Its state, its progress and, in the end, the version it made and what became of it."""
    return _body(request, await _ask(lambda: _jobs(request).get(job_id)))


@router.get(
    "/jobs/{job_id}/log",
    dependencies=[needs("line")],
    summary="What did it say?",
    response_class=Response,
    responses={
        200: {"content": {"text/plain": {}, "application/json": {"example": {"lines": ["..."]}}}},
        404: _UNKNOWN,
        503: _NO_WORKER,
    },
)
async def log(request: Request, job_id: JobId) -> Response:
    """All lines until now, as text, or as JSON where `Accept` asks for that."""
    await _ask(lambda: _jobs(request).get(job_id))
    lines, _ = await _ask(lambda: _jobs(request).lines(job_id))
    if "application/json" in request.headers.get("accept", ""):
        return JSONResponse({"lines": lines})
    return Response("".join(f"{line}\n" for line in lines), media_type="text/plain")


@router.get(
    "/jobs/{job_id}/events",
    dependencies=[needs("line")],
    summary="Watch a job",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {}}}, 404: _UNKNOWN, 503: _NO_WORKER},
)
async def events(request: Request, job_id: JobId) -> StreamingResponse:
    """Server-sent events until it ends: `log` with a line, `job` with all of GET /jobs/{id}.

    They end as well when the key is removed.
    """
    await _ask(lambda: _jobs(request).get(job_id))
    return StreamingResponse(
        _follow(request, job_id, await may_still(request, "line")),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store"},
    )


@dataclass(frozen=True)
class _Look:
    """What a job is and has said, as events of its stream."""

    job: bytes
    lines: bytes
    after: int  # the byte of the log that comes next
    has_ended: bool


def _look(request: Request, job_id: str, after: int) -> _Look:
    now = _body(request, _jobs(request).get(job_id))
    if now.progress is not None:  # in tenths: else every look were news to all who watch
        now.progress.held_back = round(now.progress.held_back, 1)
    lines, after = _jobs(request).lines(job_id, after)
    job = f"event: job\ndata: {now.model_dump_json()}\n\n"
    said = "".join(f"event: log\ndata: {json.dumps(line)}\n\n" for line in lines)
    return _Look(job.encode(), said.encode(), after, now.state in ENDED)


class Looks:
    """What all who watch a job would ask at the same time is asked once, and written once."""

    def __init__(self) -> None:
        self._under_way: dict[tuple[str, int], asyncio.Task[_Look]] = {}

    async def ask(self, request: Request, job_id: str, after: int) -> _Look:
        """A look that is under way, or was for `LOOK_EVERY_S`."""
        key, loop = (job_id, after), asyncio.get_running_loop()
        task = self._under_way.get(key)
        if task is None:
            task = loop.create_task(_ask(partial(_look, request, job_id, after)))
            self._under_way[key] = task
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            loop.call_later(LOOK_EVERY_S, self._under_way.pop, key, None)
        if not task.done():
            await asyncio.wait([task])  # it goes on where one who watches leaves
        return task.result()


async def _follow(request: Request, job_id: str, may: Callable[[], bool]) -> AsyncIterator[bytes]:
    """The events of one who watches. 400 may: a round without news must cost the loop nothing."""
    looks: Looks = request.app.state.looks
    stopping: asyncio.Event = request.app.state.stopping
    after, before, silent = 0, b"", 0.0
    while not stopping.is_set():
        try:
            now = await looks.ask(request, job_id, after)
        except KensaError as error:  # it was forgotten, or the queue does not answer any more
            yield f"event: error\ndata: {json.dumps(str(error))}\n\n".encode()
            return
        after = now.after
        if news := now.lines + (now.job if now.job != before else b""):
            if not may():
                return
            yield news
        if now.has_ended:
            return
        silent = 0.0 if news else silent + LOOK_EVERY_S
        if silent >= ALIVE_EVERY_S:
            yield b": still running\n\n"
            silent = 0.0
        before = now.job
        await asyncio.sleep(LOOK_EVERY_S)  # a wait that also ends at the stop costs a task each


@router.post(
    "/jobs/{job_id}/cancel",
    dependencies=[needs("operator")],
    summary="Stop a job",
    responses={
        404: _UNKNOWN,
        409: problem("It has ended.", conflict="Job retrain-5d3c... has ended (succeeded)."),
        503: _NO_WORKER,
    },
)
async def cancel(request: Request, job_id: JobId) -> JobBody:
    """Its process is killed, and what it made until then is removed."""
    return JobBody(**await _ask(lambda: _jobs(request).cancel(job_id)))


@router.get(
    "/schedules",
    dependencies=[needs("line")],
    summary="What is learned when?",
    responses={503: _NO_WORKER},
)
async def schedules(request: Request) -> SchedulesBody:
    """All schedules."""
    found = await _ask(_jobs(request).schedules)
    return SchedulesBody(schedules=[ScheduleBody(**one) for one in found])


@router.put(
    "/schedules/{name}",
    dependencies=[needs("operator")],
    summary="Retrain regularly",
    responses={
        404: _ASKED[404],
        422: problem(
            "No such time, or what is to be learned does not fit.",
            bad_request="'25 * * *' is no cron expression: it takes minute, hour, ...",
            bad_meta="Every version of bolt was held by the gate or rolled back from: ...",
            bad_dataset="The category bolt has no training images: POST some to ...",
        ),
        503: _NO_WORKER,
        507: problem(
            "No room.",
            disk_full="The schedule cannot be written: ...",
            read_only="Nothing was changed, because the data folder cannot be written (...): ...",
        ),
    },
)
async def schedule(request: Request, name: ScheduleName, body: ScheduleRequest) -> ScheduleBody:
    """Such as every night at two: `{"cron": "0 2 * * *", "retrain": {"model": ..., ...}}`."""
    await asyncio.to_thread(_check_retrain, request, body.retrain)
    return ScheduleBody(**await _ask(lambda: _jobs(request).schedule(name, body)))


@router.delete(
    "/schedules/{name}",
    dependencies=[needs("operator")],
    status_code=204,
    summary="End a schedule",
    responses={
        404: problem("No such schedule.", unknown_job="There is no schedule 'nightly'."),
        503: _NO_WORKER,
    },
)
async def unschedule(request: Request, name: ScheduleName) -> Response:
    """Jobs that it has begun go on."""
    await _ask(lambda: _jobs(request).unschedule(name))
    return Response(status_code=204)


@contextlib.asynccontextmanager
async def _one_by_one(request: Request) -> AsyncIterator[None]:
    """Submit alone: parts need Python's lock, too. Raises NoWorker where it takes too long."""
    lock: asyncio.Lock = request.app.state.submitting
    try:
        await asyncio.wait_for(lock.acquire(), MOST_WAIT_S)
    except asyncio.TimeoutError:  # which is not Python's own before 3.11
        raise NoWorker("The queue does not get on with what was asked; try again later.") from None
    try:
        yield
    finally:
        lock.release()


async def _submit(
    request: Request,
    response: Response,
    kind: JobKind,
    body: Asked,
    check: Callable[[Request, Asked], None],
    *,
    here: bool = True,
) -> JobBody:
    """Queue a job, once it has been looked at; `here`: this machine is to do it."""
    async with _one_by_one(request):
        await asyncio.to_thread(check, request, body)
        if here:
            await _must_fit(request, body)
        found = await _ask(lambda: _jobs(request).submit(kind, body))
    response.headers["Location"] = f"/jobs/{found['id']}"
    return JobBody(**found)


def _check_retrain(request: Request, body: RetrainRequest) -> None:
    """Say at once what a job would only find out later."""
    _check_learning(request, body)
    store: Store = request.app.state.store
    parent = body.start(store)
    if parent is None:
        body.first_meta()
    else:
        body.meta_after(Meta.read(store.folder(body.model, parent) / META))


def _check_learning(request: Request, body: RetrainRequest | TeacherRequest) -> None:
    """Raise BadDataset, BadWeights where there are no images, or not the weights it names."""
    datasets: Datasets = request.app.state.datasets
    if not datasets.most_to_learn(body.category, "train"):
        raise BadDataset(
            f"The category {body.category} has no training images:"
            f" POST some to /datasets/{body.category}/train."
        )
    weights_in(request.app.state.settings.data, body.pretrained)


def _check_version(request: Request, body: ConvertRequest) -> None:
    store: Store = request.app.state.store
    store.must_know(body.model)
    if body.version is not None:
        store.folder(body.model, body.version)


async def _must_fit(request: Request, body: job_memory.Request) -> None:
    """Raise OutOfMemory for a job that does not fit into memory, unless it is to wait for it.

    While another job runs it is not known what will be free; the job looks when it begins.
    """
    models: ModelManager = request.app.state.models
    settings = request.app.state.settings
    if settings.job_memory == "off":
        return
    found = await models.memory.job_short_of(body)
    if found is None:
        return
    waits = settings.job_memory == "wait" or await _ask(_jobs(request).active)
    if not waits or job_memory.never(found):
        raise job_memory.refusal(body, found)


async def _ask(work: Callable[[], Result]) -> Result:
    """Ask the queue in a thread; a database that somebody locks must not hold up the answer."""
    try:
        run = copy_context().run  # so that what is logged carries the request's id
        asked = asyncio.get_running_loop().run_in_executor(_THREADS, run, work)
        return await asyncio.wait_for(asked, REPLY_WITHIN_S)
    except asyncio.TimeoutError:
        raise NoWorker(
            f"The queue did not answer within {REPLY_WITHIN_S:.0f} s: something locks its database,"
            " or its network is slow."
            " What was asked for may still be done: see GET /jobs before sending it again."
        ) from None


def _body(request: Request, found: dict[str, Any]) -> JobBody:
    body = JobBody(**found)
    if body.state == "running":  # also while its process begins, which a busy line holds up, too
        body.progress = body.progress or ProgressBody.model_validate({"phase": "starting"})
        body.progress.held_back = round(request.app.state.worker.held_back, 2)
    return body


def _no_worker(request: Request) -> str | None:
    if request.app.state.settings.fleet is not None:
        return None  # another machine may learn
    state = request.app.state.worker.state
    if state == "off":
        return "KENSA_WORKER is off: jobs wait for a worker that somebody starts."
    if state.startswith("not installed"):
        return "What learns is not installed: pip install '.[train]', and start Kensa again."
    return None


def _jobs(request: Request) -> JobQueue:
    found: JobQueue = request.app.state.jobs
    return found
