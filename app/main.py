"""`create_app`: the HTTP application, and the one place that decides how errors leave it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import metadata

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from app.inspection import Inspector
from app.jobs import Jobs
from app.keeper import Keeper
from app.routes import datasets, infer, models, system
from app.routes import jobs as jobs_routes
from app.routes.infer import request_id
from app.schemas import error_response
from app.settings import Settings
from app.worker import Worker
from engines.datasets import Datasets
from engines.errors import BadRequest, KensaError, RuntimeFailed
from engines.store import Store

log = logging.getLogger("kensa")

DESCRIPTION = """Visual inspection over HTTP: send a picture of a part, get a verdict.

Every answer that is not a success has the form `{"error": "one sentence", "code": "snake_case"}`.
"""
RETRY_AFTER_S = "2"
_UNAVAILABLE = 503
MALFORMED = error_response(
    "The request is malformed.", bad_request="The query parameter limit is wrong: ..."
)
_CLIENT_LEFT = 499  # nginx's number for it; nobody is there to read it
_CODES = {404: "not_found", 405: "method_not_allowed"}


def create_app(settings: Settings) -> FastAPI:
    """The application. Models are opened when the server starts it, and closed when it ends."""
    inspector = Inspector(settings)
    store = Store(settings.data / "models")
    keeper = Keeper(store, inspector, settings)
    jobs = Jobs(settings.data, store, settings.fleet)
    worker = Worker(settings.data, settings)
    inspector.on_busy = worker.on_busy

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(app.state.datasets.sweep)
        await keeper.open()
        opening = asyncio.create_task(asyncio.to_thread(jobs.open))  # parts need no queue
        worker.start(after=opening)
        yield
        await worker.close()
        await keeper.close()
        await inspector.close()
        await asyncio.to_thread(jobs.close)

    app: FastAPI = FastAPIOffline(
        docs_url="/docs",
        redoc_url=None,
        title="Kensa",
        version=version(),
        description=DESCRIPTION,
        lifespan=lifespan,
        redirect_slashes=False,
        swagger_ui_parameters={"tryItOutEnabled": True, "displayRequestDuration": True},
    )
    app.state.settings = settings
    app.state.inspector = inspector
    app.state.keeper = keeper
    app.state.jobs = jobs
    app.state.worker = worker
    app.state.datasets = Datasets(settings.data / "datasets")
    app.include_router(infer.router)
    app.include_router(models.router, responses={422: MALFORMED})
    app.include_router(jobs_routes.router, responses={422: MALFORMED})
    app.include_router(datasets.router)
    app.include_router(system.router)
    for kind in (KensaError, RequestValidationError, HTTPException, ClientDisconnect, Exception):
        app.add_exception_handler(kind, answer_error)
    return app


async def answer_error(request: Request, error: Exception) -> Response:
    """Turn whatever was raised into the agreed form; what nobody foresaw keeps its details."""
    headers = {"X-Request-ID": request_id(request)}
    if isinstance(error, ClientDisconnect):
        return Response(status_code=_CLIENT_LEFT)
    if isinstance(error, RequestValidationError):
        error = _malformed(error)
    if isinstance(error, HTTPException):
        headers.update(error.headers or {})
        code = _CODES.get(error.status_code, "http_error")
        return _form(error.status_code, _sentence(request, error), code, headers)
    if not isinstance(error, KensaError):
        # uvicorn logs the traceback after this line.
        log.error("Request %s failed in a way nobody foresaw", headers["X-Request-ID"])
        sentence = f"Kensa failed; its log says why, at request {headers['X-Request-ID']}."
        return _form(500, sentence, KensaError.code, headers)
    if error.status == _UNAVAILABLE:
        headers["Retry-After"] = RETRY_AFTER_S
    if isinstance(error, RuntimeFailed):
        log.error("Request %s: %s", headers["X-Request-ID"], error)
    return _form(error.status, str(error), error.code, headers)


def version() -> str:
    """Kensa's version; 0 in a checkout that was never installed."""
    try:
        return metadata.version("kensa")
    except metadata.PackageNotFoundError:
        return "0"


def _form(status: int, sentence: str, code: str, headers: dict[str, str]) -> JSONResponse:
    return JSONResponse({"error": sentence, "code": code}, status_code=status, headers=headers)


def _malformed(error: RequestValidationError) -> BadRequest:
    problem = error.errors()[0]
    place, name = problem["loc"][0], problem["loc"][-1]
    return BadRequest(f"The {place} parameter {name} is wrong: {problem['msg']}.")


def _sentence(request: Request, error: HTTPException) -> str:
    path = request.url.path[:200]
    if error.status_code == 404:
        return f"There is no {path}; /docs shows what there is."
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        return f"{request.method} does not work on {path}; use {allowed}."
    return str(error.detail)
