"""The record: which parts were inspected, what was decided of them, and by whom it was changed."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from functools import partial
from tempfile import SpooledTemporaryFile
from typing import IO, Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi import Path as InPath
from fastapi.responses import StreamingResponse
from pydantic import ConfigDict, Field
from starlette.background import BackgroundTask

from app.decisions.database import DecisionDatabase, Filter, Kept, Line
from app.decisions.decision import OfViews, Verdict, View
from app.decisions.evidence import write_evidence
from app.decisions.recorder import Recorder
from app.http.access import KeyFirst, needs, who
from app.http.base_body import MOST_REASON, Body, error_response, given_reason
from app.http.part import SCHEMA, checked, visible
from app.routes.infer import ImageBody, TimingBody
from app.routes.record import (
    MOST,
    OFF,
    PAGE,
    Before,
    Limit,
    Moment,
    Since,
    Until,
    Why,
    ask,
    csv_row,
    milliseconds,
    recorder_of,
    time_of,
)
from app.routes.trail import LineBody, line_body
from app.serving.inspection import Inspector
from app.serving.model_manager import ModelManager
from engines.errors import BadRequest, UnknownDecision
from engines.serving.resident import Resident
from engines.store.versions import Store
from engines.verdict import OVERLAY_SIDE

MOST_KIND = 100  # characters
SPOOL_BYTES = 8 * 1024**2  # of a zip that are held in memory
AT_ONCE = 1000  # lines of a CSV file that are read together


class ViewDecisionBody(Body):
    """What was decided of one of a part's views."""

    view: str = Field(description="`?` where nobody has said what the missing one is called.")
    id: str | None = Field(description="Of the request that brought it; null where none came.")
    time: datetime = Field(description="UTC.")
    model: str
    version: str | None
    verdict: Verdict = Field(description="`none` where there was none in time.")
    code: str | None = Field(description="Why; `view_missing` where no picture of it came.")
    raw_score: float | None
    score: float | None
    threshold: float | None
    raw_threshold: float | None
    image: ImageBody | None
    sha256: str | None


class ViewsBody(Body):
    """The views of a part that has its verdict from all of them."""

    line: str | None = Field(description="As the requests named it.")
    of: int = Field(description="How many there should have been.")
    decided_by: str = Field(description="The view whose verdict and numbers are the part's.")
    views: list[ViewDecisionBody]


class DecisionBody(Body):
    """What was decided of a part, and when."""

    number: int = Field(description="Counts up, in the order in which they were written down.")
    id: str = Field(description="As in the answer of the inspection.")
    part: str | None = Field(description="What the request called the part.")
    time: datetime = Field(description="UTC.")
    model: str = Field(description="Empty where none was named, and there was not just one.")
    version: str | None = Field(description="Which judged; null without a verdict.")
    verdict: Verdict = Field(
        description="`normal`, `anomaly`, `unusable`, or `none` where there was none."
    )
    code: str | None = Field(
        description="Why there was no verdict, or the picture was not usable, or `not_released`"
        " where the verdict is not the model's; else null."
    )
    raw_score: float | None
    score: float | None = Field(description="0 to 1.")
    threshold: float | None = Field(description="The limit for `score`.")
    raw_threshold: float | None = Field(description="The same limit for `raw_score`.")
    image: ImageBody | None = Field(description="What was judged.")
    sha256: str | None = Field(description="Of the image file, as it was sent.")
    has_picture: bool = Field(description="Whether the image is kept.")
    timing: TimingBody | None
    key: str | None = Field(description="The name of the key that asked.")
    label: Literal["good", "defect", "unusable"] | None = Field(
        description="What a person said last; /decisions/{id} has all of it."
    )
    defect: str | None = Field(description="The kind of defect, where it is one.")
    views: ViewsBody | None = Field(
        description="Of a part of several views: each of them; else null. Everything else is of the"
        " worst one then."
    )


class DecisionsBody(Body):
    """Decisions, newest first."""

    decisions: list[DecisionBody]
    next: int | None = Field(description="The next page's `before`; null at the end.")


class WholeDecisionBody(DecisionBody):
    """A decision, and what was said of it since."""

    hash: str = Field(description="SHA-256 of it and of the hash of the decision before.")
    history: list[LineBody] = Field(description="Who marked it how, newest first.")


_AFTER = (
    "Only where this line of its `history` is the last one with a label, else 409: so an undo takes"
    " back nobody else's."
)


class LabelBody(Body):
    """What a person says of a part."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"label": "good", "reason": "Only dust, wiped off."}]},
    )

    label: Literal["good", "defect", "unusable"] = Field(
        description="unusable: the picture shows nothing of the part."
    )
    defect: str = Field(
        "", max_length=MOST_KIND, description="Its kind, such as `scratch`; only with `defect`."
    )
    reason: str = Field("", max_length=MOST_REASON, description="Why, in a sentence.")
    after: int | None = Field(None, ge=1, le=2**62, description=_AFTER)


class DeletedBody(Body):
    """What is gone."""

    decisions: int = Field(description="How many were deleted, with their pictures.")


class ReplayBody(Body):
    """What a version says of a picture that was judged before."""

    decision: DecisionBody = Field(description="As it was decided.")
    view: str | None = Field(description="Which was judged, of a part of several views.")
    version: str = Field(description="Which judged now.")
    verdict: Literal["normal", "anomaly"]
    raw_score: float
    score: float
    threshold: float
    raw_threshold: float


router = APIRouter(tags=["record"], route_class=KeyFirst)

_UNKNOWN = error_response(
    "No such decision, or its picture is not kept.",
    unknown_decision="There is no decision 'KB-2046': it was never made, or is too old to be kept.",
)
_BYTES = "application/octet-stream"  # of what was no picture, and of pixels without a file
_MEDIA_TYPES = {kind: f"image/{kind.lower()}" for kind in ("JPEG", "PNG", "BMP", "TIFF")}
_BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
_PICTURE: dict[int | str, dict[str, Any]] = {
    200: {"content": {"image/png": _BINARY}},
    404: _UNKNOWN,
    409: OFF,
}
JPEG = "image/jpeg"
THUMBNAIL_SIDE = 256  # pixels
_SMALL, _FINE = 80, 92  # quality
_SHOWN: dict[int | str, dict[str, Any]] = {
    200: {"content": {JPEG: _BINARY}},
    400: error_response(
        "Its picture is damaged: so it had no verdict.", bad_image="The PNG image is cut short."
    ),
    404: _UNKNOWN,
    409: OFF,
    413: error_response(
        "It is larger than pictures may be by now.",
        image_too_large="The image has 20 million pixels, more than the 16 million allowed by ...",
    ),
    415: error_response(
        "It was none that Kensa reads, and had no verdict.",
        unsupported_image="WebP is not read: save it as PNG or JPEG.",
    ),
}
Id = Annotated[
    str, InPath(description="As in the answer of the inspection.", examples=["line-3.part_17"])
]
Which = Annotated[
    int | None,
    Query(
        ge=1, le=2**62, examples=[481],
        description="Its `number`, where clients gave an id twice; the last one, if left out.",
    ),
]  # fmt: skip
OfView = Annotated[
    str,
    Query(
        max_length=32, examples=["left"],
        description="Of a part of several views, this one; the worst, if left out.",
    ),
]  # fmt: skip
PartName = Annotated[
    str | None,
    Query(description="What the request called it.", max_length=200, examples=["KB-2046/A 17"]),
]
BeforeThis = Annotated[
    Moment, Query(description="What is older than this time.", examples=["2026-01-01T00:00:00Z"])
]


def asked_for_by(
    part: PartName = None,
    model: Annotated[
        str | None, Query(description="Of this model.", max_length=64, examples=["bracket"])
    ] = None,
    version: Annotated[
        str | None,
        Query(description="By this version.", max_length=64, examples=["0001-3f9a0c41d2e8"]),
    ] = None,
    verdict: Annotated[
        Verdict | None, Query(description="`none`: without a verdict.", examples=["anomaly"])
    ] = None,
    label: Annotated[
        Literal["good", "defect", "unusable", "none"] | None,
        Query(description="What a person said; `none`: nobody has looked.", examples=["none"]),
    ] = None,
    min_score: Annotated[
        float | None, Query(ge=0, le=1, description="At least.", examples=[0.4])
    ] = None,
    max_score: Annotated[
        float | None, Query(ge=0, le=1, description="At most.", examples=[0.6])
    ] = None,
    since: Since = None,
    until: Until = None,
) -> Filter:
    """The filter that a query asks for."""
    return Filter(
        part=part, model=model, version=version, verdict=verdict, label=label,
        score_from=min_score, score_to=max_score,
        since=milliseconds(since), until=milliseconds(until),
    )  # fmt: skip


Asked = Annotated[Filter, Depends(asked_for_by)]


@router.get(
    "/decisions",
    dependencies=[needs("line")],
    summary="What was decided?",
    response_model=DecisionsBody,
    responses={409: OFF},
)
async def decisions(
    request: Request, asked: Asked, limit: Limit = PAGE, before: Before = None
) -> Response:
    """Inspections, newest first, also those that ended without a verdict."""

    def written() -> str:
        found = recorder_of(request).read(lambda it: it.find(asked, limit, before))
        following = found[-1].number if len(found) == limit else None
        return DecisionsBody(
            decisions=[decision_body(one) for one in found], next=following
        ).model_dump_json()

    return Response(await ask(written), media_type="application/json")


@router.get(
    "/decisions.csv",
    dependencies=[needs("line")],
    summary="The same as a table",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/csv": {"schema": {"type": "string"}}}}, 409: OFF},
)
async def table(request: Request, asked: Asked) -> StreamingResponse:
    """All that the filter finds, newest first, as CSV in UTF-8; it is not held in memory."""
    first = await ask(recorder_of(request).read, lambda it: it.find(asked, AT_ONCE))
    return StreamingResponse(
        _csv(recorder_of(request), asked, first),
        media_type="text/csv; charset=utf-8",
        headers={"Content-Disposition": 'attachment; filename="decisions.csv"'},
    )


async def _csv(recorder: Recorder, asked: Filter, page: list[Kept]) -> Any:
    bodies = ("image", "timing", "views")
    names = [name for name in DecisionBody.model_fields if name not in bodies]
    more = ["format", "width", "height", "queue_ms", "decode_ms", "infer_ms", "total_ms"]
    yield csv_row([*names, *more, "views"])
    while page:
        yield "".join(_rows(page, names))
        last = page[-1].number
        page = await ask(recorder.read, lambda it, last=last: it.find(asked, AT_ONCE, last))


def _rows(page: list[Kept], names: list[str]) -> Iterator[str]:
    for kept in page:
        body, one = decision_body(kept).model_dump(mode="json"), kept.decision
        yield csv_row([
            *(body[name] for name in names),
            one.format, one.width or None, one.height or None,
            one.queue_ms, one.decode_ms, one.infer_ms, one.total_ms, one.views or None,
        ])  # fmt: skip


@router.delete(
    "/decisions",
    dependencies=[needs("admin")],
    summary="Delete what is older than a time",
    responses={409: OFF},
)
async def delete(request: Request, until: BeforeThis, reason: Why) -> DeletedBody:
    """With the pictures. The rest can be proved as before: a line of the audit trail vouches.

    What lies between newer decisions, of a clock that was wrong, stays. Sums for GET /statistics
    stay, too.
    """
    if more := sorted(request.query_params.keys() - {"until", "reason"}):
        raise BadRequest(
            f"DELETE /decisions takes until and reason, and no {more[0][:100]}: it deletes all that"
            " is older, of every model."
        )
    end, why, name = milliseconds(until), given_reason(reason), who(request)
    count = await ask(lambda: recorder_of(request).delete_before(end, name, why))
    return DeletedBody(decisions=count)


@router.get(
    "/decisions/{id}",
    dependencies=[needs("line")],
    summary="What was decided of this one?",
    responses={404: _UNKNOWN, 409: OFF},
)
async def decision(request: Request, id: Id, number: Which = None) -> WholeDecisionBody:  # noqa: A002 (its public name)
    """With everything that was said of it since."""

    def look() -> WholeDecisionBody:
        def found(it: DecisionDatabase) -> tuple[Kept, list[Line]]:
            kept = _kept(it, id, number)
            return kept, it.lines_about(kept)

        kept, lines = recorder_of(request).read(found)
        return WholeDecisionBody(
            **decision_body(kept).model_dump(), hash=kept.hash, history=list(map(line_body, lines))
        )

    return await ask(look)


@router.get(
    "/decisions/{id}/image",
    dependencies=[needs("line")],
    summary="See its picture",
    response_class=Response,
    responses={
        200: {"content": dict.fromkeys((*_MEDIA_TYPES.values(), _BYTES), _BINARY)},
        404: _UNKNOWN,
        409: OFF,
    },
)
async def image(
    request: Request,
    id: Id,  # noqa: A002
    number: Which = None,
    view: OfView = "",
) -> Response:
    """The file as it was sent."""

    def look() -> tuple[bytes, str]:
        recorder = recorder_of(request)
        kept = recorder.read(lambda it: _kept(it, id, number))
        place, one = _view(kept, view)
        return _image(recorder, kept, place), (one or kept.decision).format

    data, kind = await ask(look)
    media_type = _MEDIA_TYPES.get(kind.removeprefix("Big"), _BYTES)
    return Response(data, media_type=media_type, headers={"X-Content-Type-Options": "nosniff"})


@router.delete(
    "/decisions/{id}/image",
    dependencies=[needs("admin")],
    summary="Delete its picture",
    status_code=204,
    response_class=Response,
    responses={404: _UNKNOWN, 409: OFF},
)
async def delete_image(
    request: Request,
    id: Id,  # noqa: A002
    reason: Why,
    number: Which = None,
) -> None:
    """And its map, of all views: the decision stays.

    A copy that somebody has learned from is in its category.
    """
    recorder, why, name = recorder_of(request), given_reason(reason), who(request)

    def forget() -> None:
        kept = recorder.read(lambda it: _kept(it, id, number))
        if not kept.picture_bytes:
            _image(recorder, kept)  # raises
        recorder.delete_picture(kept, name, why)

    await ask(forget)


@router.get(
    "/decisions/{id}/overlay",
    dependencies=[needs("line")],
    summary="See what was strange about it",
    response_class=Response,
    responses={
        **_SHOWN,
        200: {"content": {"image/png": _BINARY, JPEG: _BINARY}},
    },
)
async def overlay(
    request: Request,
    id: Id,  # noqa: A002
    number: Which = None,
    view: OfView = "",
    paint: Annotated[
        bool, Query(description="`false`: the same picture as large, a JPEG, with nothing on it.")
    ] = True,
) -> Response:
    """Its picture with what is anomalous painted over it, as `Accept: image/png` draws it."""
    if not paint:
        return await _shown(request, id, number, view, OVERLAY_SIDE, _FINE)
    return await _drawn(request, id, number, view, over_picture=True)


@router.get(
    "/decisions/{id}/thumbnail",
    dependencies=[needs("line")],
    summary="See its picture, small",
    response_class=Response,
    responses=_SHOWN,
)
async def thumbnail(
    request: Request,
    id: Id,  # noqa: A002
    number: Which = None,
    view: OfView = "",
) -> Response:
    """A JPEG whose longer side has up to 256 pixels. A browser may keep it for ten minutes."""
    answer = await _shown(request, id, number, view, THUMBNAIL_SIDE, _SMALL)
    if number is not None:  # without, the id may be another decision's by then
        answer.headers["Cache-Control"] = "private, max-age=600"
    return answer


@router.get(
    "/decisions/{id}/heatmap",
    dependencies=[needs("line")],
    summary="See its heat map",
    response_class=Response,
    responses=_PICTURE,
)
async def heatmap(
    request: Request,
    id: Id,  # noqa: A002
    number: Which = None,
    view: OfView = "",
) -> Response:
    """A grey PNG, where a pixel's value / 255 is the normalised score of its place."""
    return await _drawn(request, id, number, view, over_picture=False)


async def _shown(
    request: Request, id_: str, number: int | None, view: str, side: int, quality: int
) -> Response:
    recorder, limits = recorder_of(request), request.app.state.inspector.limits

    def look() -> bytes:
        kept = recorder.read(lambda it: _kept(it, id_, number))
        place, _ = _view(kept, view)
        try:
            return recorder.pictures.shown(kept.number, limits, side, quality, place)
        except FileNotFoundError:
            _image(recorder, kept, place)  # raises where it is not kept
            raise

    return Response(await ask(look), media_type=JPEG)


async def _drawn(
    request: Request, id_: str, number: int | None, view: str, *, over_picture: bool
) -> Response:
    recorder, limits = recorder_of(request), request.app.state.inspector.limits

    def look() -> bytes:
        kept = recorder.read(lambda it: _kept(it, id_, number))
        place, _ = _view(kept, view)
        pictures = recorder.pictures
        try:
            return pictures.drawn(kept.number, limits, over_picture=over_picture, view=place)
        except FileNotFoundError:
            _image(recorder, kept, place)  # raises where it is not kept either
            raise UnknownDecision(f"The decision {id_!r} has no map: it had no verdict.") from None

    return Response(await ask(look), media_type="image/png")


@router.post(
    "/decisions/{id}/label",
    dependencies=[needs("operator")],
    summary="Say what it really was",
    responses={404: _UNKNOWN, 409: OFF},
)
async def label(
    request: Request,
    id: Id,  # noqa: A002
    body: LabelBody,
    number: Which = None,
) -> WholeDecisionBody:
    """Several people may say different things: the last one counts, and all of it is kept."""
    if body.defect and body.label != "defect":
        raise BadRequest(f"A part that is {body.label} has no kind of defect: leave it out.")
    name = who(request)
    defect = visible(body.defect, "kind of defect", MOST_KIND)
    reason = visible(body.reason, "reason", MOST_REASON)

    def mark(it: DecisionDatabase) -> None:
        kept = _kept(it, id, number)
        it.mark(kept, body.label, defect, name, reason, body.after)

    await ask(recorder_of(request).read, mark)
    return await decision(request, id, number)


@router.delete(
    "/decisions/{id}/label",
    dependencies=[needs("operator")],
    summary="Withdraw what was said of it",
    responses={404: _UNKNOWN, 409: OFF},
)
async def withdraw(
    request: Request,
    id: Id,  # noqa: A002
    number: Which = None,
    reason: Annotated[
        str,
        Query(
            max_length=MOST_REASON,
            description="Why.",
            examples=["The wrong key."],
            json_schema_extra={"pattern": SCHEMA["pattern"]},
        ),
    ] = "",
    after: Annotated[int | None, Query(ge=1, le=2**62, description=_AFTER, examples=[17])] = None,
) -> WholeDecisionBody:
    """It has no label then, as if nobody had looked; the audit trail keeps that somebody had.

    To set back the label before, post it again. Of a part that has none, nothing changes.
    """
    name, why = who(request), visible(reason, "reason", MOST_REASON)

    def take_off(it: DecisionDatabase) -> None:
        kept = _kept(it, id, number)
        if kept.label:
            it.mark(kept, "", "", name, why, after)

    await ask(recorder_of(request).read, take_off)
    return await decision(request, id, number)


@router.post(
    "/decisions/{id}/replay",
    dependencies=[needs("operator")],
    summary="Judge its picture again",
    responses={
        400: error_response(
            "Its picture is damaged: so it had no verdict.", bad_image="The PNG image is cut short."
        ),
        404: error_response(
            "No such decision or version, or its picture is not kept.",
            unknown_decision="There is no decision 'KB-2046': it was never made, or is too old to"
            " be kept.",
            unknown_version="bracket has no version '0009-3f9a0c41d2e8'; there is ...",
        ),
        409: OFF,
        507: error_response(
            "That version does not fit beside what is in memory.",
            out_of_memory="bracket 0001-3f9a0c41d2e8 needs about 900 MiB, and 700 MiB are free.",
        ),
    },
)
async def replay(
    request: Request,
    id: Id,  # noqa: A002
    version: Annotated[
        str | None,
        Query(
            description="By this version of its model; that which judged it, if left out.",
            examples=["0001-3f9a0c41d2e8"],
        ),
    ] = None,
    number: Which = None,
    view: OfView = "",
) -> ReplayBody:
    """It counts nowhere. The same version on the same runtime gives the same raw score.

    Of a part of several views, one is judged: the worst, or `view`.
    """
    recorder, manager = recorder_of(request), _manager(request)
    inspector: Inspector = request.app.state.inspector

    def look() -> tuple[Kept, View | None, bytes]:
        kept = recorder.read(lambda it: _kept(it, id, number))
        place, of_view = _view(kept, view)
        return kept, of_view, _image(recorder, kept, place)

    kept, of_view, data = await ask(look)
    one = of_view or kept.decision
    wanted = version or one.version
    if not wanted:
        raise BadRequest("It had no verdict, so say which version is to judge it: version=...")

    async def judged(model: Resident) -> ReplayBody:
        verdict = await inspector.look(data, model)
        return ReplayBody(
            decision=decision_body(kept), view=of_view.view if of_view else None,
            version=model.version,
            verdict="anomaly" if verdict.is_anomalous else "normal",
            raw_score=verdict.raw_score, score=verdict.score, threshold=verdict.threshold,
            raw_threshold=verdict.raw_threshold,
        )  # fmt: skip

    live = manager.live(one.model)
    if live is not None and live.version == wanted:
        with inspector.residents.use(live) as held:
            return await judged(held)
    await ask(lambda: _store(request).folder(one.model, wanted))
    # Nothing that judges parts has to go for a look at an old one.
    opening = manager.opened(one.model, wanted, exchange=False)
    async with manager.change(one.model), opening as opened:
        return await judged(opened)


PartPath = Annotated[str, InPath(description="Its name.", json_schema_extra=SCHEMA)]


@router.get(
    "/parts/{part:path}/evidence",
    dependencies=[needs("line")],
    summary="All that is known of this part, as a zip",
    response_class=StreamingResponse,
    responses={
        200: {"content": {"application/zip": {"schema": {"type": "string", "format": "binary"}}}},
        404: _UNKNOWN,
        409: OFF,
    },
)
async def evidence(request: Request, part: PartPath) -> StreamingResponse:
    """Records, pictures, overlays, what people said, the versions' reports, and hashes of all."""
    recorder, store = recorder_of(request), _store(request)
    limits = request.app.state.inspector.limits

    def found(database: DecisionDatabase) -> list[tuple[Kept, list[Line]]]:
        of_part = database.find(_of_part(part), MOST)
        if not of_part:
            raise _unknown(part)
        return [(one, database.lines_about(one)) for one in of_part]

    def write() -> IO[bytes]:
        file = SpooledTemporaryFile(max_size=SPOOL_BYTES)  # noqa: SIM115 (the answer closes it)
        write_evidence(file, part, recorder.read(found), recorder, store, limits)
        file.seek(0)
        return file

    file = await ask(write)
    return StreamingResponse(
        iter(partial(file.read, 2**16), b""),
        media_type="application/zip",
        headers={"Content-Disposition": 'attachment; filename="evidence.zip"'},
        background=BackgroundTask(file.close),
    )


@router.get(
    "/parts/{part:path}",
    dependencies=[needs("line")],
    summary="What was decided of this part?",
    responses={404: _UNKNOWN, 409: OFF},
)
async def part(
    request: Request,
    part: PartPath,
    limit: Limit = PAGE,
    before: Before = None,
) -> DecisionsBody:
    """All inspections of a part, newest first."""

    def look() -> DecisionsBody:
        asked = _of_part(part)
        found = recorder_of(request).read(lambda it: it.find(asked, limit, before))
        if not found and before is None:
            raise _unknown(part)
        following = found[-1].number if len(found) == limit else None
        return DecisionsBody(decisions=[decision_body(one) for one in found], next=following)

    return await ask(look)


# ---- what is shown of it -------------------------------------------------------------------------


def decision_body(kept: Kept) -> DecisionBody:
    one = kept.decision
    timing = None
    if one.total_ms is not None:
        timing = TimingBody(
            queue_ms=one.queue_ms or 0.0, decode_ms=one.decode_ms or 0.0,
            infer_ms=one.infer_ms or 0.0, total_ms=one.total_ms,
        )  # fmt: skip
    image = ImageBody(format=one.format, width=one.width, height=one.height) if one.format else None
    return DecisionBody(
        number=kept.number, id=one.id, part=one.part or None, time=time_of(one.at), model=one.model,
        version=one.version or None, verdict=one.verdict, code=one.code or None,
        raw_score=one.raw_score, score=one.score, threshold=one.threshold,
        raw_threshold=one.raw_threshold, image=image, sha256=one.sha256 or None,
        has_picture=kept.picture_bytes > 0, timing=timing, key=one.who or None,
        label=kept.label or None,  # type: ignore[arg-type]  # the database holds no others
        defect=kept.defect or None, views=_views_body(one.views),
    )  # fmt: skip


def _views_body(text: str) -> ViewsBody | None:
    found = OfViews.read(text)
    if found is None:
        return None
    return ViewsBody(
        line=found.line or None, of=found.of, decided_by=found.decided_by,
        views=[_view_body(one) for one in found.views],
    )  # fmt: skip


def _view_body(one: View) -> ViewDecisionBody:
    image = ImageBody(format=one.format, width=one.width, height=one.height) if one.format else None
    return ViewDecisionBody(
        view=one.view, id=one.id or None, time=time_of(one.at), model=one.model,
        version=one.version or None, verdict=one.verdict, code=one.code or None,
        raw_score=one.raw_score, score=one.score, threshold=one.threshold,
        raw_threshold=one.raw_threshold, image=image, sha256=one.sha256 or None,
    )  # fmt: skip


def _of_part(part: str) -> Filter:
    if not part:  # as of a path that ends with a line end
        raise _unknown(part)
    return Filter(part=checked(part))


def _unknown(part: str) -> UnknownDecision:
    return UnknownDecision(f"Nothing was decided of a part {part!r}, or long ago.")


def _kept(database: DecisionDatabase, id_: str, number: int | None) -> Kept:
    kept = database.one(id_, number)
    if kept is None:
        which = f"{id_[:128]!r}" + (f" with the number {number}" if number is not None else "")
        raise UnknownDecision(
            f"There is no decision {which}: it was never made, or is too old to be kept."
        )
    return kept


def _view(kept: Kept, name: str) -> tuple[str, View | None]:
    """Where the picture of a view lies, as `Pictures` knows it, and what was decided of it.

    Args:
        name: empty for the worst, or where there are none.

    Raises:
        UnknownDecision: the part has no such view.
    """
    found = OfViews.read(kept.decision.views)
    if found is None and not name:
        return "", None
    of_view = found.view(name or found.decided_by) if found is not None else None
    if found is None or of_view is None:
        raise UnknownDecision(
            f"The decision {kept.decision.id!r} has no view {name!r}; it has:"
            f" {', '.join(one.view for one in found.views) if found else 'none, but one picture'}."
        )
    return "" if of_view.view == found.decided_by else of_view.view, of_view


def picture_of(recorder: Recorder, id_: str, number: int | None) -> bytes:
    """The picture of a decision, as it was sent. Blocks; UnknownDecision where it is not kept."""
    return _image(recorder, recorder.read(lambda it: _kept(it, id_, number)))


def _image(recorder: Recorder, kept: Kept, view: str = "") -> bytes:
    try:
        return recorder.pictures.image(kept.number, view)
    except FileNotFoundError:
        which = f"The picture of the decision {kept.decision.id!r}"
        which += f", view {view}," if view else ""
        if any(one.what == "deleted" for one in recorder.read(lambda it: it.lines_about(kept))):
            sentence = f"{which} was deleted: the decision's history says by whom and why."
        else:
            sentence = (
                f"{which} is not kept: those of rejects are, of parts near the threshold and of a"
                " sample; see KENSA_RECORD_PICTURES_MIB."
            )
            sentence += " Others of its views may be: say view=..." * bool(kept.decision.views)
        raise UnknownDecision(sentence) from None


def _store(request: Request) -> Store:
    found: Store = request.app.state.store
    return found


def _manager(request: Request) -> ModelManager:
    found: ModelManager = request.app.state.models
    return found
