"""The versions of a model: what each is, what the gate found of it; make it live, or discard it."""

from __future__ import annotations

import contextlib
import json
from typing import Annotated, Any, BinaryIO
from urllib.parse import quote

from fastapi import APIRouter, Request, Response
from fastapi import Path as InPath
from fastapi.responses import StreamingResponse

from app.http.access import KeyFirst, needs
from app.http.base_body import error_response, given_reason
from app.http.model_zip import pack_model
from app.routes.models import (
    CHANGE,
    FILE,
    FULL,
    UNKNOWN,
    UNUSABLE,
    ZIP,
    Name,
    StoredModelBody,
    Version,
    VersionBody,
    aside,
    described,
    rollout_of,
    store_of,
    versions_of,
)
from app.routes.record import Why
from engines.errors import BadBundle, UnknownVersion
from engines.meta import Meta
from engines.store.bundle import PLAN, REPORT, read_report, read_strange
from engines.store.plan_record import PLAN_RECORD
from engines.store.versions import META

router = APIRouter(tags=["models"], route_class=KeyFirst)

Number = Annotated[int, InPath(ge=0, le=999_999, description="As in `gate.flips`.", examples=[0])]

_PICTURE: dict[int | str, dict[str, Any]] = {
    200: {"description": "A JPEG.", "content": {"image/jpeg": FILE}},
    404: UNKNOWN,
}


@router.get(
    "/models/{name}/versions/{version}",
    dependencies=[needs("line")],
    summary="What is this version?",
    responses={404: UNKNOWN},
)
async def version(request: Request, name: Name, version: Version) -> VersionBody:
    """Where it came from, its meta.json, its report, and what the gate found."""
    return await aside(lambda: versions_of(request, name, [version])[0])


@router.get(
    "/models/{name}/versions/{version}/flips/{number}",
    dependencies=[needs("line")],
    summary="See a part whose verdict changes",
    response_class=Response,
    responses=_PICTURE,
)
async def flip(request: Request, name: Name, version: Version, number: Number) -> Response:
    """The picture of a part that the new version judges otherwise, as the model sees it."""
    store = store_of(request)
    await aside(store.folder, name, version)
    path = store.gate_folder(name, version) / f"{number}.jpg"
    try:
        data = await aside(path.read_bytes)  # whole: no ranges, which FileResponse has
    except FileNotFoundError:
        raise UnknownVersion(f"The gate found no flip {number} of {name} {version}.") from None
    return Response(data, media_type="image/jpeg")


@router.get(
    "/models/{name}/versions/{version}/strange",
    dependencies=[needs("line")],
    summary="See the pictures that were not learned",
    response_class=Response,
    responses=_PICTURE,
)
async def strange(request: Request, name: Name, version: Version) -> Response:
    """Those that are unlike the others, and beside each what is strange about it; up to 20."""
    store = store_of(request)

    def look() -> bytes | None:
        folder = store.folder(name, version)
        return read_strange(folder, Meta.read(folder / META))

    if (picture := await aside(look)) is None:
        raise UnknownVersion(f"No picture was left out of {name} {version} as strange.")
    return Response(picture, media_type="image/jpeg")


@router.get(
    "/models/{name}/versions/{version}/report",
    dependencies=[needs("line")],
    summary="See what its making found",
    response_class=Response,
    responses={
        200: {"description": "Its report.json.", "content": {"application/json": {
            "schema": {"type": "object"},
            "example": {"parity": {"max_relative_error": 2.1e-06}, "bank": {"rows": 1024}},
        }}},
        404: UNKNOWN,
        422: UNUSABLE,
    },
)  # fmt: skip
async def report(request: Request, name: Name, version: Version) -> Response:
    """What training and converting wrote down: times, the bank, parity, the calibration."""
    store = store_of(request)

    def look() -> bytes:
        folder = store.folder(name, version)
        if not (folder / REPORT).is_file():
            raise UnknownVersion(f"{name} {version} has no report: whoever made it left none.")
        return _as_json(read_report(folder), f"{REPORT} of {name} {version}")

    return Response(await aside(look), media_type="application/json")


def _as_json(found: dict[str, Any], what: str) -> bytes:
    """Raises BadBundle where it has numbers that JSON has not, or is absurdly deep."""
    try:
        return json.dumps(found, ensure_ascii=False, allow_nan=False).encode(errors="replace")
    except (ValueError, RecursionError) as error:
        raise BadBundle(f"{what} is damaged: {error}.") from None


@router.get(
    "/models/{name}/versions/{version}/archive",
    dependencies=[needs("admin")],
    summary="Download a version",
    response_class=StreamingResponse,
    responses={
        200: {"description": "A zip that POST /models takes.", "content": {ZIP: FILE}},
        404: UNKNOWN,
        422: UNUSABLE,
    },
)
async def archive(request: Request, name: Name, version: Version) -> StreamingResponse:
    """A zip of its files, for a backup or another server; without the plan, which is this one's."""
    store = store_of(request)

    def opened() -> dict[str, BinaryIO]:
        folder, known = store.folder(name, version), store.manifest(name, version).files
        with contextlib.ExitStack() as stack:
            files: dict[str, BinaryIO] = {
                file: stack.enter_context((folder / file).open("rb"))
                for file in known
                if file not in (PLAN, PLAN_RECORD)
            }
            stack.pop_all()  # who packs them closes them
            return files

    try:
        files = await aside(opened)
    except FileNotFoundError as error:
        raise BadBundle(f"{name} {version} is not whole: {error.filename} is gone.") from error
    saved_as = f"attachment; filename*=UTF-8''{quote(f'{name}-{version}.zip')}"
    headers = {"Content-Disposition": saved_as}
    return StreamingResponse(pack_model(files), media_type=ZIP, headers=headers)


@router.post(
    "/models/{name}/versions/{version}/activate",
    dependencies=[needs("operator")],
    summary="Make a version live",
    responses=CHANGE,
)
async def activate(request: Request, name: Name, version: Version) -> StoredModelBody:
    """Whatever the gate said of it. Parts keep coming; no request is lost."""
    await rollout_of(request).activate(name, version)
    return await described(request, name)


@router.delete(
    "/models/{name}/versions/{version}",
    dependencies=[needs("operator")],
    summary="Discard a version",
    status_code=204,
    response_class=Response,
    responses={
        404: UNKNOWN,
        409: error_response(
            "It judges, or a rollback goes to it.",
            conflict="bracket 0002-9d1f5c4b7a20 judges, so it is not discarded: make another ...",
        ),
        507: FULL,
    },
)
async def discard(request: Request, name: Name, version: Version, reason: Why) -> None:
    """Delete it for good, with what the gate found of it. Files that others share stay.

    Neither the live one nor the one before is discarded. Its number is never given again.
    """
    await rollout_of(request).discard(name, version, given_reason(reason))
