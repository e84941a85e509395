"""The regions of a model, whose pixels never count: look, draw others, let all count again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, TypeVar

import numpy as np
from fastapi import APIRouter, Query, Request, Response
from fastapi import Path as InPath
from numpy.typing import NDArray
from pydantic import ConfigDict, Field

from app.decisions.database import Filter, Kept
from app.decisions.recorder import Recorder
from app.http.accept import wanted
from app.http.access import KeyFirst, needs
from app.http.base_body import (
    MOST_REASON,
    Body,
    error_response,
    given_reason,
    read_json,
    whole_schema,
)
from app.http.body_limit import body_of
from app.routes.models import CHANGE, state_of
from app.routes.record import Why
from app.serving.rollout import Rollout
from engines.errors import (
    BadBundle,
    BadImage,
    Conflict,
    DiskFull,
    ImageTooLarge,
    UnknownVersion,
    UnsupportedBody,
)
from engines.image import MAX_SIDE, ImageLimits, decode
from engines.meta import Meta
from engines.regions import REACH, Regions
from engines.store.golden import Golden
from engines.store.regions import (
    MOST_CORNERS,
    MOST_POLYGONS,
    Size,
    as_png,
    drawn_over,
    learned_sizes,
    of_png,
    of_polygons,
    read_regions,
)
from engines.store.versions import META, Store

LAST_PARTS = 50  # of the record, whose size and pictures are looked at


class RegionsBody(Body):
    """Which pixels never count in a version."""

    model: str
    version: str
    state: str = Field(description="As in the model's `versions`: `live`, or `at the gate`.")
    width: int | None = Field(description="Of the mask, pixels; null where every pixel counts.")
    height: int | None = Field(description="The same.")
    never_counts: float = Field(description="The share of these pixels that never count, 0 to 1.")
    image_size: int = Field(description="The side of the model's input, pixels.")
    reach: int = Field(description="How far a region reaches beyond its edge, pixels of that side.")
    sizes: list[list[int]] = Field(
        description="Which [width, height] a mask may have; empty where any will do."
    )


Coordinate = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Corners = Annotated[
    list[tuple[Coordinate, Coordinate]], Field(min_length=3, max_length=MOST_CORNERS)
]
Side = Annotated[int, Field(strict=True, ge=1, le=MAX_SIDE)]


class PolygonsBody(Body):
    """Polygons on a picture: what they enclose never counts."""

    model_config = ConfigDict(
        protected_namespaces=(),
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "width": 1280,
                    "height": 1024,
                    "polygons": [[[0, 0], [1280, 0], [1280, 90], [0, 90]]],
                    "reason": "The clamp above the part.",
                }
            ]
        },
    )

    width: Side = Field(description="Of the picture on which they are drawn, pixels.")
    height: Side = Field(description="The same.")
    polygons: list[Corners] = Field(
        max_length=MOST_POLYGONS,
        description="Corners [x, y] of each, pixels from the upper left corner of the picture, in"
        " order.",
    )
    reason: str | None = Field(
        None, min_length=1, max_length=MOST_REASON, strict=True,
        description="Why, in a sentence; here or in the query.",
    )  # fmt: skip
    gate: bool = Field(
        False, strict=True, description="True: it goes through the gate; false: live at once."
    )


router = APIRouter(tags=["models"], route_class=KeyFirst)

_THREADS = ThreadPoolExecutor(2, "regions")  # parts have their own
Result = TypeVar("Result")

Name = Annotated[str, InPath(description="The model's name.", examples=["bracket"])]
Which = Annotated[
    str | None,
    Query(
        description="As in the model's `versions`; the one that judges, if left out.",
        examples=["0001-3f9a0c41d2e8"],
    ),
]
Reason = Annotated[
    str | None,
    Query(
        max_length=MOST_REASON, examples=["The clamp above the part."],
        description="Why, in a sentence; it is needed, for JSON here or in the body.",
    ),
]  # fmt: skip
Gate = Annotated[bool, Query(description="True: it goes through the gate; false: live at once.")]

PNG, JSON = "image/png", "application/json"
_BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
_EXAMPLE = {
    "model": "bracket", "version": "0003-51e2d0c8aa17", "state": "live",
    "width": 1280, "height": 1024, "never_counts": 0.0879,
    "image_size": 256, "reach": 24, "sizes": [[1280, 1024]],
}  # fmt: skip
_NONE_LIVE = error_response(
    "No version of it is live, or that one cannot be used; or there are no regions to delete.",
    conflict="There are no regions to speak of: bracket has no live version.",
)
_LOOK: dict[int | str, dict[str, Any]] = {404: CHANGE[404], 409: _NONE_LIVE, 422: CHANGE[422]}
_PUT: dict[int | str, dict[str, Any]] = {
    **CHANGE,
    400: error_response("The PNG is damaged.", bad_image="The PNG image is cut short."),
    409: _NONE_LIVE,
    413: error_response(
        "The mask has too many bytes or pixels.",
        image_too_large="The image is 30000 x 30000 pixels; allowed are 16,000,000 in all ...",
    ),
    415: error_response(
        "No PNG, and no polygons.",
        unsupported_image="A mask of regions is a PNG, ...; this is a JPEG image.",
        unsupported_body="Send the mask as image/png, or polygons as application/json.",
    ),
    422: error_response(
        "The mask cannot be used, or the version's files are damaged; nothing was changed.",
        bad_request="The mask of regions is 640 x 480 pixels, and the pictures that bracket"
        " learned are 1280 x 1024: draw it on one of these.",
        bad_bundle="model.onnx is not the file that was written with the meta.json beside it ...",
    ),
}


@router.get(
    "/models/{name}/regions",
    dependencies=[needs("line")],
    summary="Which pixels never count?",
    response_model=RegionsBody,
    responses={200: {"content": {JSON: {"example": _EXAMPLE}, PNG: _BINARY}}, **_LOOK},
)
async def regions(request: Request, name: Name, version: Which = None) -> Any:
    """How many; with `Accept: image/png` the mask itself, white where a pixel never counts."""
    as_picture = wanted(request.headers.get("accept", "")) == PNG

    def look() -> RegionsBody | bytes:
        known = _known(request, name, version)
        if not as_picture:
            return _body(request, name, known)
        return as_png(_must_have(name, known, _read(request, name, known)))

    found = await _aside(look)
    return Response(found, media_type=PNG) if isinstance(found, bytes) else found


@router.get(
    "/models/{name}/regions/overlay",
    dependencies=[needs("line")],
    summary="See which pixels never count",
    response_class=Response,
    responses={200: {"description": "A PNG.", "content": {PNG: _BINARY}}, **_LOOK},
)
async def overlay(request: Request, name: Name, version: Which = None) -> Response:
    """Painted red over a part: the newest whose picture is kept, else one that was learned.

    Paler red is within the mask's reach: it does not count either.
    """

    def look() -> bytes:
        known = _known(request, name, version)
        mask = _must_have(name, known, _read(request, name, known))
        meta = Meta.read(_store(request).folder(name, known) / META)
        return drawn_over(_picture(request, name, known, meta, mask), mask, meta)

    return Response(await _aside(look), media_type=PNG)


@router.put(
    "/models/{name}/regions",
    dependencies=[needs("operator")],
    summary="Say which pixels never count",
    responses=_PUT,
    openapi_extra={
        "requestBody": {
            "required": True,
            "description": "A grey PNG as large as the pictures, white where a pixel never counts,"
            " black where it does; or polygons on such a picture.",
            "content": {PNG: _BINARY, JSON: {"schema": whole_schema(PolygonsBody)}},
        }
    },
)
async def change(
    request: Request, name: Name, reason: Reason = None, gate: Gate = False
) -> RegionsBody:
    """Without training again. It makes a new version, live at once unless `gate` is true.

    Its large files are those of the version before; POST /models/{name}/rollback undoes it.
    """
    limits = _limits(request)
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type == PNG:
        data = await _png(request, limits)
        reason = given_reason(reason)
        mask = await _aside(lambda: of_png(data, limits))
    elif media_type == JSON:
        body = read_json(PolygonsBody, await request.body())
        reason, gate = given_reason(body.reason or reason), gate or body.gate
        mask = await _aside(lambda: of_polygons(body.width, body.height, body.polygons, limits))
    else:
        raise UnsupportedBody(
            f"Kensa does not read a body of type {media_type[:100] or 'unknown'} here: send the"
            " mask as image/png, or polygons as application/json."
        )
    return await _changed(request, name, mask, reason, gate=gate)


@router.delete(
    "/models/{name}/regions",
    dependencies=[needs("operator")],
    summary="Let every pixel count again",
    responses={**CHANGE, 409: _NONE_LIVE},
)
async def delete(request: Request, name: Name, reason: Why, gate: Gate = False) -> RegionsBody:
    """A new version without regions, live at once unless `gate` is true."""
    return await _changed(request, name, None, given_reason(reason), gate=gate)


async def _changed(
    request: Request, name: str, mask: Regions | None, reason: str, *, gate: bool
) -> RegionsBody:
    rollout: Rollout = request.app.state.rollout
    seen = await _aside(lambda: _sizes(request, name))
    version = await rollout.change_regions(name, mask, reason, gate=gate, seen=seen)
    return await _aside(lambda: _body(request, name, version))


def _body(request: Request, name: str, version: str) -> RegionsBody:
    meta = Meta.read(_store(request).folder(name, version) / META)
    mask = _read(request, name, version)
    height, width = (None, None) if mask is None else mask.mask.shape
    return RegionsBody(
        model=name,
        version=version,
        state=state_of(request, name, version),
        width=width,
        height=height,
        never_counts=0.0 if mask is None else mask.share,
        image_size=meta.image_size,
        reach=REACH[meta.model],
        sizes=[list(one) for one in sorted(learned_sizes(meta) or _sizes(request, name))],
    )


def _known(request: Request, name: str, version: str | None) -> str:
    """The version that is asked for, or the one that judges."""
    if version is not None:
        _store(request).folder(name, version)
        return version
    rollout: Rollout = request.app.state.rollout
    return rollout.that_judges(name, "regions")


def _read(request: Request, name: str, version: str) -> Regions | None:
    folder = _store(request).folder(name, version)
    return read_regions(folder, Meta.read(folder / META))


def _must_have(name: str, version: str, mask: Regions | None) -> Regions:
    if mask is None:
        raise UnknownVersion(f"{name} {version} has no regions: every pixel counts.")
    return mask


def _picture(
    request: Request, name: str, version: str, meta: Meta, mask: Regions
) -> NDArray[np.uint8]:
    """A part (h, w, 3) to draw a mask on: the newest that is kept, one that was learned, or grey.

    A kept one is as large as the mask.
    """
    height, width = mask.mask.shape
    recorder: Recorder = request.app.state.recorder
    for kept in _last_parts(request, name):
        one = kept.decision
        if kept.picture_bytes and (one.width, one.height) == (width, height):
            try:
                data = recorder.pictures.image(kept.number)
                return decode(data, _limits(request), meta.bit_depth)
            except (BadImage, OSError):  # deleted just now, or sent to a model of other bits
                continue
    try:
        golden = Golden.read(_store(request).folder(name, version), meta.image_size)
    except BadBundle:
        golden = None
    return golden.images[0] if golden else np.full((1, 1, 3), 128, np.uint8)


def _sizes(request: Request, name: str) -> set[Size]:
    """Width and height of the last parts; none where nothing is recorded."""
    last = [kept.decision for kept in _last_parts(request, name)]
    return {(one.width, one.height) for one in last if one.width}


def _last_parts(request: Request, name: str) -> list[Kept]:
    recorder: Recorder = request.app.state.recorder
    try:
        return recorder.read(lambda it: it.find(Filter(model=name), LAST_PARTS))
    except (Conflict, DiskFull):  # nothing is recorded here, or not now
        return []


async def _png(request: Request, limits: ImageLimits) -> bytes:
    too_large = ImageTooLarge(
        f"The mask has more than the {limits.max_bytes:,} bytes allowed by KENSA_MAX_IMAGE_BYTES."
    )
    return b"".join([chunk async for chunk in body_of(request, limits.max_bytes, too_large)])


def _limits(request: Request) -> ImageLimits:
    limits: ImageLimits = request.app.state.inspector.limits
    return limits


def _store(request: Request) -> Store:
    store: Store = request.app.state.store
    return store


async def _aside(work: Callable[[], Result]) -> Result:
    """Look at the disk, or draw, in threads that no part needs."""
    return await asyncio.get_running_loop().run_in_executor(_THREADS, work)
