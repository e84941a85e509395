"""The Open Inference Protocol v2, as Triton speaks it: `tritonclient[http]` works with Kensa.

app/open_inference/ has their bodies and tensors.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi import Path as InPath

from app.decisions.recorder import Asked, Recorder, why_none
from app.http.access import needs, who
from app.http.base_body import error_response, whole_schema
from app.http.body_limit import body_of
from app.http.deadlines import within_deadline
from app.http.part import checked, part_of
from app.http.request_log import request_id
from app.open_inference.bodies import (
    MAX_IMAGES,
    InferBody,
    InferenceStatisticsBody,
    InferredBody,
    ModelMetadataBody,
    ModelReadyBody,
    ModelStatisticsBody,
    RepositoryBody,
    RepositoryModelBody,
    ServerLiveBody,
    ServerMetadataBody,
    ServerReadyBody,
    StatisticsBody,
    TensorBody,
)
from app.open_inference.tensors import (
    HEADER_LENGTH,
    INPUTS,
    OUTPUTS,
    SHARED_MEMORY,
    InferRequest,
    TensorKind,
    most_bytes,
    read_json,
    read_request,
    write_answer,
)
from app.serving.inspection import Image, Inspection, Inspector
from app.serving.model_manager import ModelManager
from engines.errors import (
    BadImage,
    BadRequest,
    ImageTooLarge,
    NotReady,
    UnknownVersion,
)
from engines.logs import note
from engines.serving.resident import Resident
from engines.store.versions import Store

_TAG = "Open Inference Protocol"
router = APIRouter(tags=[_TAG], dependencies=[needs("line")])
control = APIRouter(tags=[_TAG], dependencies=[needs("operator")])
health = APIRouter(tags=[_TAG])  # as /livez and /readyz, without a key

Name = Annotated[str, InPath(description="The model's name.", examples=["bracket"])]

EXTENSIONS = ["binary_tensor_data", "model_configuration", "model_repository", "statistics"]
AT_ONCE = 8  # images of a request that are decoded or wait for the engine
MAX_REPOSITORY_BODY = 64 * 1024  # bytes

_LATE = error_response(
    "Not within the deadline.",
    deadline_exceeded="There was no verdict within 300 ms: it takes longer, or ...",
)
_NOT_READY = error_response(
    "The model is not in memory; the sentence says why.",
    not_ready="bolt is unloaded: POST /v2/repository/models/bolt/load loads it again.",
)
_UNKNOWN = error_response("No such model.", unknown_model="There is no model 'bolt'; there is ...")
_OF_A_MODEL: dict[int | str, dict[str, Any]] = {
    404: error_response(
        "No such model, or another version of it is live.",
        unknown_model="There is no model 'bolt'; there is 'bracket'.",
        unknown_version="bracket serves 0002-9d1f5c4b7a20, not '1': POST /models/bracket/...",
    ),
    503: _NOT_READY,
}
_BODY: dict[int | str, dict[str, Any]] = {
    413: error_response(
        "The body has too many bytes, or an image too many pixels.",
        image_too_large="The request has more than the 98,097,152 bytes allowed: send fewer ...",
    ),
    415: error_response(
        "Not an image that Kensa reads, or a body that is compressed.",
        unsupported_image="file[3]: This is not a JPEG, PNG, BMP or TIFF image; send one of these.",
        unsupported_body="Kensa does not read a body that is compressed as gzip: send it as it ...",
    ),
}
_INFER = {
    **_OF_A_MODEL,
    **_BODY,
    503: error_response(
        "The model is not in memory, or too many requests wait.",
        not_ready="bolt is unloaded: POST /v2/repository/models/bolt/load loads it again.",
        overloaded="64 parts wait for their verdict already, as many as KENSA_QUEUE_SIZE ...",
        not_released="bracket is not released: 0001-3f9a0c41d2e8 judged 1 of 12 known ...",
    ),
    504: _LATE,
    200: {
        "model": InferredBody,
        "description": "The tensors that were asked for. Where some of them are binary, the header"
        f" {HEADER_LENGTH} has the length of the JSON, and they follow it.",
        "content": {"application/octet-stream": {}},
        "headers": {HEADER_LENGTH: {"schema": {"type": "integer"}}},
    },
    400: error_response("An image is damaged.", bad_image="file[3]: The PNG image is cut short."),
}
_VERSION = {
    "name": "version",
    "in": "path",
    "required": True,
    "description": "The live one; another one cannot be used.",
    "schema": {"type": "string", "examples": ["0001-3f9a0c41d2e8"]},
}
_JSON_LENGTH = {
    "name": HEADER_LENGTH,
    "in": "header",
    "required": False,
    "description": "How many bytes of the body are JSON; binary data follows. Without it, all.",
    "schema": {"type": "integer", "minimum": 1, "examples": [243]},
}


_REPOSITORY_BODY = {
    "requestBody": {
        "required": False,
        "content": {"application/json": {"schema": whole_schema(RepositoryBody)}},
    }
}


def _of_a_model(method: str, path: str, **declared: Any) -> Callable[..., Any]:
    """A route of a model, and the same one of its version."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        extra = declared.pop("openapi_extra", {})
        for below, parameters in (("", []), ("/versions/{version}", [_VERSION])):
            router.add_api_route(
                f"/v2/models/{{model}}{below}{path}",
                function,
                methods=[method],
                openapi_extra={**extra, "parameters": [*extra.get("parameters", []), *parameters]},
                **declared,
            )
        return function

    return add


def _find(request: Request, name: str) -> Resident:
    """The live version of a model. Raises UnknownVersion where the path names another one."""
    live = _inspector(request).residents.get(name)
    version = request.path_params.get("version", live.version)
    if version != live.version:
        raise UnknownVersion(
            f"{live.name} serves {live.version}, not {version[:100]!r}: POST /models/{live.name}"
            "/versions/VERSION/activate makes another version live."
        )
    return live


async def _live(request: Request, model: Name) -> Resident:
    return _find(request, model)


async def _called(request: Request, model: Name) -> Resident:
    _inspector(request).residents.call(model)
    return _find(request, model)


Live = Annotated[Resident, Depends(_live)]
Called = Annotated[Resident, Depends(_called)]  # for parts, which wake a model that rests


# ---- the server ---------------------------------------------------------------------------------


@router.get("/v2", summary="What answers here?")
async def server(request: Request) -> ServerMetadataBody:
    """Name, version, and the extensions that work."""
    return ServerMetadataBody(name="kensa", version=request.app.version, extensions=EXTENSIONS)


@health.get("/v2/health/live", summary="Is the process alive?")
async def live() -> ServerLiveBody:
    """As `GET /livez`."""
    return ServerLiveBody(live=True)


@health.get("/v2/health/ready", summary="Can it inspect?", responses={503: _NOT_READY})
async def ready(request: Request) -> ServerReadyBody:
    """As `GET /readyz`."""
    if missing := _inspector(request).residents.missing():
        raise NotReady(missing)
    return ServerReadyBody(ready=True)


@router.get("/v2/models/stats", summary="How often, and how long, for all models?")
async def all_statistics(request: Request) -> StatisticsBody:
    """Of every model in memory."""
    inspector = _inspector(request)
    models = inspector.residents.all()
    return StatisticsBody(model_stats=[_statistics(inspector, one) for one in models])


# ---- a model ------------------------------------------------------------------------------------


@_of_a_model("GET", "", summary="What does a model take and give?", responses=_OF_A_MODEL)
async def metadata(model: Live) -> ModelMetadataBody:
    """Its tensors. One of the two inputs is sent."""
    return ModelMetadataBody(
        name=model.name,
        versions=[model.version],
        platform=f"kensa_{model.runtime.name}",
        inputs=[_tensor(kind) for kind in INPUTS],
        outputs=[_tensor(kind) for kind in OUTPUTS],
    )


@_of_a_model("GET", "/ready", summary="Is a model in memory?", responses=_OF_A_MODEL)
async def model_ready(model: Live) -> ModelReadyBody:
    """200 when it is, and warm."""
    return ModelReadyBody(name=model.name, ready=True)


@_of_a_model("GET", "/config", summary="What would Triton's config.pbtxt say?",
             responses=_OF_A_MODEL)  # fmt: skip
async def config(model: Live) -> dict[str, Any]:
    """Triton's model configuration, as far as it has a meaning here."""
    return {
        "name": model.name,
        "platform": f"kensa_{model.runtime.name}",
        "backend": "kensa",
        "max_batch_size": MAX_IMAGES,
        "input": [{**_configured(kind), "optional": True} for kind in INPUTS],
        "output": [_configured(kind) for kind in OUTPUTS],
        "parameters": {
            "kind": {"string_value": model.meta.model},
            "image_size": {"string_value": str(model.runtime.image_size)},
            "precision": {"string_value": model.runtime.precision},
        },
    }


@_of_a_model("GET", "/stats", summary="How often, and how long?", responses=_OF_A_MODEL)
async def statistics(request: Request, model: Live) -> StatisticsBody:
    """Images since the version was loaded, over whichever route, and where their time went."""
    return StatisticsBody(model_stats=[_statistics(_inspector(request), model)])


@_of_a_model(
    "POST",
    "/infer",
    summary="Inspect images",
    response_model=InferredBody,
    responses=_INFER,
    openapi_extra={
        "requestBody": {
            "required": True,
            "description": "JSON, and behind it the data of a binary tensor.",
            "content": {
                "application/json": {"schema": whole_schema(InferBody)},
                "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
            },
        },
        "parameters": [_JSON_LENGTH],
    },
)
async def infer(request: Request, model: Called) -> Response:
    """Send pixels as `image` or files as `file`; the same version judges all of them.

    One image that cannot be read is named, and the request gets no verdict at all.
    """
    recorder: Recorder = request.app.state.recorder
    called = part_of(request.scope["query_string"], request.headers.raw)
    asked = Asked(request_id(request), called, model.name, who(request))
    try:
        inspector = _inspector(request)
        inspector.admission.check_room()
        with inspector.admission.holding() as hold:
            body = await _body(request, most_bytes(inspector.limits), hold)
            arrived, length = time.monotonic(), request.headers.get(HEADER_LENGTH)
            reading = inspector.beside(partial(read_request, body, length, inspector.limits))
            wanted = await within_deadline(request, reading)
            wanted = replace(wanted, part=checked(wanted.part) or called)
            asked = replace(asked, part=wanted.part)
            if wanted.part:
                note(part=wanted.part)
            # Once more: another version may have gone live while the body arrived.
            live = _find(request, model.name)
            with inspector.residents.use(live) as held, inspector.admission.admitted():
                within_ms = math.ceil(wanted.timeout_us / 1000) or None
                answering = _answer(inspector, held, wanted)
                answered = await within_deadline(request, answering, within_ms, arrived)
    except Exception as error:
        recorder.no_verdict(asked, why_none(error))
        raise
    content, json_length, inspections = answered
    for number, (image, done) in enumerate(zip(wanted.images, inspections, strict=True)):
        one = replace(asked, id=f"{asked.id}.{number}") if len(inspections) > 1 else asked
        recorder.verdict(one, done, image if isinstance(image, bytes) else None)
    headers = {"X-Request-ID": request_id(request)}
    if json_length is None:
        return Response(content, media_type="application/json", headers=headers)
    headers[HEADER_LENGTH] = str(json_length)
    return Response(content, media_type="application/octet-stream", headers=headers)


async def _answer(
    inspector: Inspector, model: Resident, wanted: InferRequest
) -> tuple[bytes, int | None, list[Inspection]]:
    """Inspect the images of a request, and write its answer: see `write_answer`."""
    inspections = await _inspect_all(inspector, model, wanted)
    content, length = await inspector.beside(lambda: write_answer(wanted, inspections))
    return content, length, inspections


async def _inspect_all(
    inspector: Inspector, model: Resident, wanted: InferRequest
) -> list[Inspection]:
    """Inspect images side by side. Raises what is wrong with the first bad one, and names it.

    Only a few at a time, so that a part that comes meanwhile does not wait for all of them.
    """
    few, part = asyncio.Semaphore(AT_ONCE), wanted.part

    async def inspect(image: Image) -> Inspection:
        async with few:
            return await inspector.inspect(image, model, part=part)

    found = await asyncio.gather(*map(inspect, wanted.images), return_exceptions=True)
    inspector.counts.refused += sum(isinstance(one, BadImage) for one in found)
    inspections = []
    for number, one in enumerate(found):
        if isinstance(one, BadImage):
            raise type(one)(f"{wanted.tensor}[{number}]: {one}") from one
        if isinstance(one, BaseException):
            raise one
        inspections.append(one)
    return inspections


# ---- the repository -----------------------------------------------------------------------------


@router.post(
    "/v2/repository/index",
    summary="Which models are there?",
    responses=_BODY,
    openapi_extra=_REPOSITORY_BODY,
)
async def index(request: Request) -> list[RepositoryModelBody]:
    """Every model, its live version, and whether it is in memory."""
    wanted = await _repository_body(request)
    residents, store = _inspector(request).residents, _store(request)
    names = await asyncio.to_thread(store.names)
    found = [await _entry(request, name) for name in sorted({*names, *residents.problems})]
    return [one for one in found if one.state == "READY" or not wanted.ready]


@control.post(
    "/v2/repository/models/{model}/load",
    summary="Bring a model into memory",
    responses={
        **_BODY,
        404: _UNKNOWN,
        409: error_response(
            "None of its versions was ever live.", conflict="bolt has no live version: POST ..."
        ),
        503: _NOT_READY,
        507: error_response(
            "There is no room for it.",
            out_of_memory="bolt 0002-... needs about 410 MiB, and 200 MiB are free: unload ...",
        ),
    },
    openapi_extra=_REPOSITORY_BODY,
)
async def load(request: Request, model: Name) -> RepositoryModelBody:
    """Its live version; nothing happens when it is there. Answers when it can inspect."""
    if (await _repository_body(request)).parameters:
        raise BadRequest(
            "Kensa loads models without parameters: POST their files to /models, as a zip."
        )
    await _models(request).load(model)
    return await _entry(request, model)


@control.post(
    "/v2/repository/models/{model}/unload",
    summary="Take a model out of memory",
    responses={**_BODY, 404: _UNKNOWN},
    openapi_extra=_REPOSITORY_BODY,
)
async def unload(request: Request, model: Name) -> RepositoryModelBody:
    """Answers when its last request ended and its memory was given back.

    It stays so until somebody loads it, activates a version of it or goes back to one, or the
    server is started again. Versions that are published wait.
    """
    await _repository_body(request)
    await _models(request).unload(model)
    return await _entry(request, model)


async def _entry(request: Request, name: str) -> RepositoryModelBody:
    residents, store = _inspector(request).residents, _store(request)
    if name in residents.names():
        version = residents.get(name).version
        return RepositoryModelBody(name=name, version=version, state="READY", reason="")
    pointer = await asyncio.to_thread(store.pointer, name)
    return RepositoryModelBody(
        name=name,
        version=pointer.live if pointer else "",
        state="UNAVAILABLE",
        reason=residents.problem(name) or f"{name} has no live version.",
    )


# ---- what Triton has and Kensa has not ----------------------------------------------------------


async def _no_shared_memory() -> None:
    raise BadRequest(SHARED_MEMORY)


async def _no_traces() -> None:
    raise BadRequest("Kensa keeps no traces: see /v2/models/stats for where the time goes.")


async def _no_log_settings() -> None:
    raise BadRequest("Logging is set before the start: see KENSA_LOG_LEVEL.")


for _path, _refuse in {
    "/v2/systemsharedmemory/{rest:path}": _no_shared_memory,
    "/v2/cudasharedmemory/{rest:path}": _no_shared_memory,
    "/v2/trace/setting": _no_traces,
    "/v2/models/{model}/trace/setting": _no_traces,
    "/v2/logging": _no_log_settings,
}.items():
    router.add_api_route(_path, _refuse, methods=["GET", "POST"], include_in_schema=False)


# ---- helpers ------------------------------------------------------------------------------------


async def _body(
    request: Request, most: int, hold: Callable[[int], None] = lambda _: None
) -> bytearray:
    """A body of up to `most` bytes, whether or not it says its length beforehand.

    `hold` is told how many bytes have come, see `Admission.holding`.
    """
    too_large = ImageTooLarge(
        f"The request has more than the {most:,} bytes allowed: send fewer images in one."
    )
    body = bytearray()
    async for chunk in body_of(request, most, too_large, hold):
        body += chunk
    return body


async def _repository_body(request: Request) -> RepositoryBody:
    body = await _body(request, MAX_REPOSITORY_BODY)
    return read_json(RepositoryBody, body) if body.strip() else RepositoryBody()


def _tensor(kind: TensorKind) -> TensorBody:
    return TensorBody(name=kind.name, datatype=kind.datatype, shape=list(kind.shape))


def _configured(kind: TensorKind) -> dict[str, Any]:
    """Triton leaves the dimension of the batch out, and calls BYTES a string."""
    datatype = "STRING" if kind.datatype == "BYTES" else kind.datatype
    return {"name": kind.name, "data_type": f"TYPE_{datatype}", "dims": list(kind.shape[1:])}


def _statistics(inspector: Inspector, model: Resident) -> ModelStatisticsBody:
    counted = asdict(inspector.statistics.of(model))
    last = counted.pop("last_inference")
    images = counted["success"]["count"]
    return ModelStatisticsBody(
        name=model.name,
        version=model.version,
        last_inference=last,
        inference_count=images,
        execution_count=images,
        inference_stats=InferenceStatisticsBody.model_validate(counted),
    )


def _inspector(request: Request) -> Inspector:
    inspector: Inspector = request.app.state.inspector
    return inspector


def _models(request: Request) -> ModelManager:
    models: ModelManager = request.app.state.models
    return models


def _store(request: Request) -> Store:
    store: Store = request.app.state.store
    return store
