"""`create_app`: the HTTP application, and the one place that decides how errors leave it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi_offline import FastAPIOffline
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import Route

from app.background import Background
from app.decisions.collector import Collector
from app.decisions.past_parts import past_parts
from app.decisions.quarters import Spans
from app.decisions.recorder import Recorder
from app.decisions.repeats import Repeats
from app.http.accept import error_line, sentence_header, wanted
from app.http.access import Access
from app.http.body_limit import BodyLimit
from app.http.head import HeadAsGet
from app.http.known_hosts import KnownHosts
from app.http.openapi import describe, operation_id
from app.http.part import given_back_at_once
from app.http.request_log import CLIENT_LEFT, RequestLog, request_id
from app.jobs.job_queue import JobQueue
from app.jobs.worker_process import WorkerProcess
from app.routes import (
    access,
    challenges,
    datasets,
    decisions,
    infer,
    line,
    marked_parts,
    model_scores,
    model_versions,
    models,
    open_inference,
    regions,
    setup,
    statistics,
    system,
    threshold_preview,
    trail,
    views,
    web,
)
from app.routes import jobs as jobs_routes
from app.serving.challenges import Challenger
from app.serving.inspection import Inspection, Inspector
from app.serving.model_manager import ModelManager
from app.serving.rollout import Rollout
from app.serving.stale_plans import StalePlans
from app.serving.views import Part, Views
from app.settings import Settings, version
from app.watching.doctor.examination import Examination
from app.watching.health import Health
from app.watching.metrics import Metrics
from engines.errors import BadRequest, KensaError, UnsupportedBody
from engines.logs import note, noted
from engines.store.datasets import Datasets, cannot_write
from engines.store.versions import Store

DESCRIPTION = """Visual inspection over HTTP: send a picture of a part, get a verdict.

Every answer that is not a success has the form `{"error": "one sentence", "code": "snake_case"}`;
where `Accept` prefers `text/plain`, it is one line, `ERR snake_case`, and the sentence a header.
"""
RETRY_AFTER_S = "2"
_UNAUTHORIZED = 401
_UNAVAILABLE = 503
_UNREADABLE = 400  # FastAPI's word for JSON that no parser takes; images have errors of their own
_CODES = {404: "not_found", 405: "method_not_allowed"}
_ROUTERS = (
    # `views` before `decisions`, whose /parts/{part} takes whatever follows.
    infer.router, line.router, views.router, decisions.router, trail.router, marked_parts.router,
    statistics.router, threshold_preview.router, models.router, model_versions.router,
    model_scores.router, regions.router, jobs_routes.router, datasets.router,
    system.router, open_inference.router, open_inference.control, open_inference.health,
    challenges.router, access.router, setup.router, web.router,
)  # fmt: skip


def create_app(settings: Settings) -> FastAPI:
    """The application. Models are opened when the server starts it, and closed when it ends."""
    inspector = Inspector(settings)
    store = Store(settings.data / "models")
    jobs = JobQueue(settings.data, store, settings.fleet)
    plans = StalePlans(jobs, inspector.residents, settings.worker)
    manager = ModelManager(store, inspector, settings, plans)
    background = Background()
    rollout = Rollout(store, manager, inspector, settings, plans, background)
    jobs.answering = rollout.answering
    jobs.coming = rollout.coming
    worker = WorkerProcess(settings.data, settings, background)
    metrics = Metrics(version())
    recorder = Recorder(settings)
    collector = Collector(settings, recorder.opened)
    inspector.admission.on_busy = worker.on_busy
    inspector.batcher.on_batch = metrics.batch
    rollout.on_swap = metrics.swapped
    manager.on_rest = metrics.rested
    metrics.queue_length = lambda: inspector.admission.under_way

    def on_inspection(done: Inspection) -> None:
        metrics.inspected(done)
        note(model=done.model.name, version=done.model.version, label=done.verdict.label)

    inspector.on_inspection = on_inspection
    of_views = Views(settings)

    def on_decided(part: Part) -> None:
        recorder.viewed(part)
        metrics.decided(part.state)

    of_views.on_decided = on_decided
    metrics.parts_open = lambda: of_views.open

    def on_change(what: str, name: str, of: str, reason: str, details: dict[str, Any]) -> None:
        recorder.note(what, noted("key") or "", name, reason, version=of, **details)

    rollout.on_change = on_change
    rollout.replay.decisions_of = partial(past_parts, recorder)
    shifts = Spans(settings.zone, settings.shift_times)
    challenger = Challenger(store, inspector, partial(_began, shifts))
    repeats = Repeats(settings.repeat_s)
    challenger.on_note = lambda what, who, name, reason, details: recorder.note(
        what, who, name, reason, **details
    )

    def on_release() -> None:
        repeats.forget()
        of_views.forget(inspector.not_released)

    challenger.on_change = on_release
    rollout.doubts_of = challenger.doubts

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        recorder.start()
        collector.start()
        await run_in_threadpool(app.state.datasets.sweep)  # whose first use is 35 ms of the loop
        await challenger.open()
        await rollout.open()
        manager.loader.begin(background.keep("challenges models", challenger.look_out))
        opening = asyncio.create_task(asyncio.to_thread(jobs.open))  # parts need no queue
        worker.start(after=opening)
        yield
        await worker.close()
        await challenger.close()
        await rollout.close()
        await inspector.close()
        of_views.close()
        await asyncio.to_thread(jobs.close)
        await asyncio.to_thread(recorder.close)
        await asyncio.to_thread(collector.close)

    app: FastAPI = FastAPIOffline(
        docs_url="/docs",
        redoc_url=None,
        title="Kensa",
        version=version(),
        description=DESCRIPTION,
        lifespan=lifespan,
        redirect_slashes=False,
        generate_unique_id_function=operation_id,
        swagger_ui_parameters={"tryItOutEnabled": True, "displayRequestDuration": True},
    )
    app.state.settings = settings
    app.state.inspector = inspector
    app.state.store = store
    app.state.models = manager
    app.state.views = of_views
    app.state.rollout = rollout
    app.state.jobs = jobs
    app.state.worker = worker
    app.state.metrics = metrics
    app.state.recorder = recorder
    app.state.repeats = repeats
    app.state.challenger = challenger
    health = Health(inspector, jobs, worker, settings, background, recorder, collector)
    app.state.health = health
    app.state.datasets = Datasets(settings.data / "datasets")
    app.state.access = Access(settings)
    app.state.examination = Examination(settings)
    app.state.stopping = stopping = asyncio.Event()
    app.state.line = line.Watched(recorder, inspector, challenger, health, background, stopping)
    app.state.looks = jobs_routes.Looks()
    app.state.submitting = asyncio.Lock()
    for router in _ROUTERS:
        app.include_router(router)
    describe(app)
    for kind in (
        KensaError, RequestValidationError, HTTPException, ClientDisconnect, OSError, Exception,
    ):  # fmt: skip
        app.add_exception_handler(kind, answer_error)
    app.add_middleware(BodyLimit, answer=answer_error)
    app.add_middleware(HeadAsGet)
    if origins := settings.origin_names:
        everything = ["*"]
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=everything,
            allow_headers=everything,
            expose_headers=everything,
        )
    app.add_middleware(KnownHosts, settings=settings, answer=answer_error)
    app.add_middleware(RequestLog, metrics=metrics)  # the last one is the outermost
    return app


def _began(shifts: Spans) -> int:
    """When the shift began that is running, milliseconds since 1970."""
    return round(shifts.around(round(time.time() * 1000))[0].timestamp() * 1000)


async def answer_error(request: Request, error: Exception) -> Response:
    """Turn whatever was raised into the agreed form; what nobody foresaw keeps its details."""
    headers: dict[str, str] = {}
    if isinstance(error, ClientDisconnect):
        return Response(status_code=CLIENT_LEFT)
    if isinstance(error, OSError):
        found = cannot_write(error)
        if found is None:
            raise error  # nobody foresaw it: uvicorn logs the traceback
        error = found
    if isinstance(error, RequestValidationError):
        error = _malformed(request, error)
    if isinstance(error, HTTPException) and error.status_code == _UNREADABLE:
        error = BadRequest("The body cannot be read: send JSON in UTF-8, and not nested so deeply.")
    if isinstance(error, HTTPException):
        headers.update(error.headers or {})
        if error.status_code == 405:
            headers["Allow"] = _allowed(request) or headers.get("Allow", "")
        code = _CODES.get(error.status_code, "http_error")
        sentence = _sentence(request, error, headers.get("Allow"))
        return _form(request, error.status_code, sentence, code, headers)
    if not isinstance(error, KensaError):
        # Outside of all middleware; uvicorn logs the traceback.
        known_id = request_id(request)
        back = given_back_at_once(request.scope["query_string"], request.headers.raw, known_id)
        headers.update({name.decode(): value.decode() for name, value in back})
        sentence = f"Kensa failed; its log says why, at request {known_id}."
        return _form(request, 500, sentence, KensaError.code, headers)
    if error.status == _UNAVAILABLE:
        headers["Retry-After"] = RETRY_AFTER_S
    if error.status == _UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    return _form(request, error.status, str(error), error.code, headers)


def _form(
    request: Request, status: int, sentence: str, code: str, headers: dict[str, str]
) -> Response:
    sentence = sentence.encode(errors="replace").decode()  # half a character would be no UTF-8
    note(code=code, error=sentence)
    if wanted(request.headers.get("accept", "")) == "text/plain":
        headers = headers | sentence_header(sentence)
        return PlainTextResponse(error_line(code), status_code=status, headers=headers)
    return JSONResponse({"error": sentence, "code": code}, status_code=status, headers=headers)


def _malformed(request: Request, error: RequestValidationError) -> BadRequest:
    problem = error.errors()[0]
    place, *names = problem["loc"]
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "json_invalid":
        where = f"at character {names[0]}: {problem.get('ctx', {}).get('error', 'cut short')}"
        return BadRequest(f"The body is not JSON, {where}.")
    if place == "body" and not names:
        media_type = request.headers.get("content-type", "").partition(";")[0].strip()
        if problem["type"] != "missing" and not media_type.lower().endswith("json"):
            return UnsupportedBody(
                f"Kensa does not read a body of type {media_type[:100] or 'unknown'} here: send"
                " JSON with Content-Type application/json."
            )
        return BadRequest(f"The body is wrong: {message}.")
    name = ".".join(str(name) for name in names)
    return BadRequest(f"The {place} parameter {name[:100]} is wrong: {message}.")


def _allowed(request: Request) -> str:
    """The methods of all routes of a path. Starlette names those of the first one only."""
    path = request.scope["path"]
    allowed: set[str] = set()
    for router in _ROUTERS:
        for route in router.routes:
            if isinstance(route, Route) and route.path_regex.match(path):
                allowed |= route.methods or set()
    if "GET" in allowed:
        allowed.add("HEAD")
    return ", ".join(sorted(allowed))


def _sentence(request: Request, error: HTTPException, allowed: str | None) -> str:
    path = request.url.path[:200]
    if error.status_code == 404:
        return f"There is no {path}; /docs shows what there is."
    if error.status_code == 405:
        return f"{request.method} does not work on {path}; use {allowed or 'another method'}."
    return f"{str(error.detail).rstrip('.')}."
