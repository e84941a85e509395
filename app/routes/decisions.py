"""The record: which parts were inspected, what was decided of them, and by whom it was changed."""

from __future__ import annotations

import asyncio
import csv
import io
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, time, timezone
from functools import partial
from tempfile import SpooledTemporaryFile
from typing import IO, Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi import Path as InPath
from fastapi.responses import StreamingResponse
from pydantic import AwareDatetime, BeforeValidator, ConfigDict, Field
from starlette.background import BackgroundTask

from app.decisions.database import DecisionDatabase, Filter, Kept, Line
from app.decisions.decision import Verdict, short_sha256
from app.decisions.evidence import write_evidence
from app.decisions.quarters import Quarter, Spans
from app.decisions.recorder import DAY_MS, Recorder
from app.decisions.teaching import teach
from app.http.access import KeyFirst, needs, who
from app.http.base_body import Body, error_response
from app.http.part import SCHEMA, checked
from app.routes.infer import ImageBody, TimingBody
from app.serving.inspection import Inspector, draw
from app.serving.model_manager import ModelManager
from app.settings import Settings
from engines.errors import BadRequest, UnknownDecision
from engines.image import decode
from engines.limits import asked_for, share_at_most
from engines.meta import Meta
from engines.serving.resident import Resident
from engines.store.datasets import CATEGORY
from engines.store.versions import META, Store
from engines.verdict import Scale

PAGE, MOST = 50, 500
FLIPS = 200  # of a preview that are named
SPOOL_BYTES = 8 * 1024**2  # of a zip that are held in memory
MOST_DAYS = 400  # of statistics at once
LATEST = 32_503_680_000_000  # milliseconds since 1970: calendars end
AT_ONCE = 1000  # lines of a CSV file that are read together
Result = TypeVar("Result")


def _written(given: Any) -> Any:
    """A time in words: a number would be taken for seconds, and a large one for milliseconds."""
    if not isinstance(given, str) or not re.match(r"\d{4}-\d\d-\d\d", given):
        raise ValueError("say a time with its zone, such as 2026-11-29T06:00:00Z")
    return given


Moment = Annotated[AwareDatetime, BeforeValidator(_written)]


class DecisionBody(Body):
    """What was decided of a part, and when."""

    number: int = Field(description="Counts up, in the order in which they were written down.")
    id: str = Field(description="As in the answer of the inspection.")
    part: str | None = Field(description="What the request called the part.")
    time: datetime = Field(description="UTC.")
    model: str = Field(description="Empty where the only one was asked for and gave no verdict.")
    version: str | None = Field(description="Which judged; null without a verdict.")
    verdict: Verdict = Field(description="`normal`, `anomaly`, or `none` where there was none.")
    code: str | None = Field(description="Why there was no verdict; else null.")
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


class DecisionsBody(Body):
    """Decisions, newest first."""

    decisions: list[DecisionBody]
    next: int | None = Field(description="The next page's `before`; null at the end.")


class LineBody(Body):
    """A line of the audit trail."""

    number: int
    time: datetime = Field(description="UTC.")
    key: str | None = Field(
        description="Whose key; null for Kensa itself, or where none is needed."
    )
    what: str = Field(
        description="label, taught, threshold, live, rollback, held, key_added, key_removed, prune,"
        " lost or repair."
    )
    subject: str = Field(description="A decision's id, or a model's or a key's name.")
    reason: str | None
    details: dict[str, Any]
    hash: str = Field(description="SHA-256 of the line and of the hash before it.")


class TrailBody(Body):
    """Lines of the audit trail, newest first."""

    lines: list[LineBody]
    next: int | None = Field(description="The next page's `before`; null at the end.")


class WholeDecisionBody(DecisionBody):
    """A decision, and what was said of it since."""

    hash: str = Field(description="SHA-256 of it and of the hash of the decision before.")
    history: list[LineBody] = Field(description="Who marked it how, newest first.")


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
        "", max_length=100, description="Its kind, such as `scratch`; only with `defect`."
    )
    reason: str = Field("", max_length=500, description="Why, in a sentence.")


class ReplayBody(Body):
    """What a version says of a picture that was judged before."""

    decision: DecisionBody = Field(description="As it was decided.")
    version: str = Field(description="Which judged now.")
    verdict: Literal["normal", "anomaly"]
    raw_score: float
    score: float
    threshold: float
    raw_threshold: float


class FlipsBody(Body):
    """What another threshold would have said of parts that were inspected."""

    model: str
    version: str = Field(description="The live one.")
    raw: float = Field(description="The limit that was asked for.")
    raw_threshold: float = Field(description="The limit that is in force.")
    parts: int = Field(
        description="Decisions with a raw score of this model as it is: those of versions that were"
        " trained otherwise are left out."
    )
    rejected: int = Field(description="How many of them were rejected.")
    would_reject: int = Field(description="How many this limit rejects.")
    good: int = Field(description="Of `parts`, marked as good by a person.")
    good_rejected: int
    good_would_reject: int
    good_at_most: float | None = Field(
        description="What share of good parts this limit rejects at most, 95 % sure, by those that"
        " are marked; null where none is."
    )
    defects: int = Field(description="Of `parts`, marked as defects.")
    defects_missed: int
    defects_would_miss: int
    defects_at_most: float | None = Field(
        description="What share of defects this limit misses at most, 95 % sure."
    )
    flips: list[DecisionBody] = Field(
        description=f"Those whose verdict changes, newest first, up to {FLIPS}."
    )


class SpanBody(Body):
    """What was decided by a model within a span of time."""

    model: str = Field(description="Empty: of requests that named none, or none that is known.")
    since: datetime = Field(description="When the span began, in the zone of KENSA_TIMEZONE.")
    until: datetime
    parts: int = Field(description="That got a verdict; a part that was sent again counts once.")
    rejects: int
    reject_share: float | None = Field(description="Of `parts`; null without any.")
    no_verdict: dict[str, int] = Field(description="Requests without a verdict, by their `code`.")
    score_p50: float | None
    score_p95: float | None
    score_p99: float | None
    ms_p50: float | None = Field(description="From the whole request to the verdict.")
    ms_p95: float | None
    ms_p99: float | None


class SpansBody(Body):
    """What was decided, span by span."""

    spans: list[SpanBody] = Field(
        description="Oldest first; those in which nothing came are left out."
    )


class TeachBody(Body):
    """Which of the parts that somebody has marked."""

    model_config = ConfigDict(
        extra="forbid",
        protected_namespaces=(),
        json_schema_extra={"examples": [{"model": "bracket"}]},
    )

    model: str | None = Field(None, max_length=64, description="Of this model.")
    version: str | None = Field(None, max_length=64, description="Judged by this version.")
    part: str | None = Field(None, max_length=200, description="Only of this part.")
    since: Moment | None = Field(None, description="Only from this time on.")
    until: Moment | None = Field(None, description="Only before this time.")
    test_share: float = Field(
        0.2, ge=0, le=1, strict=True, description="Of the good ones, so many are kept to test with."
    )

    def filter(self) -> Filter:
        return Filter(part=self.part, model=self.model, version=self.version,
                      since=_ms(self.since), until=_ms(self.until))  # fmt: skip


class TaughtBody(Body):
    """What became of them."""

    category: str
    train: int = Field(description="Good ones, to learn from, that were added.")
    normal: int = Field(description="Good ones, to test with.")
    anomaly: int = Field(description="Defects, to test with.")
    moved: int = Field(description="Taken out of another split: the label is another one now.")
    already_there: int
    without_picture: int = Field(
        description="Marked, but their picture is not kept, or cannot be read any more."
    )


router = APIRouter(tags=["record"], route_class=KeyFirst)

_THREADS = ThreadPoolExecutor(2, "record")  # parts have their own

_OFF = error_response(
    "Nothing is recorded here.",
    conflict="Nothing is recorded here: set KENSA_RECORD=on and start Kensa again.",
)
_UNKNOWN = error_response(
    "No such decision, or its picture is not kept.",
    unknown_decision="There is no decision 'KB-2046': it was never made, or is too old to be kept.",
)
_PICTURE: dict[int | str, dict[str, Any]] = {
    200: {"content": {"image/png": {"schema": {"type": "string", "format": "binary"}}}},
    404: _UNKNOWN,
    409: _OFF,
}
_MODEL: dict[int | str, dict[str, Any]] = {
    404: error_response(
        "No such model.", unknown_model="There is no model 'bolt'; there is 'bracket'."
    ),
    409: _OFF,
    503: error_response(
        "The model is not in memory, such as one that rests.",
        not_ready="bracket was unloaded; POST /v2/repository/models/bracket/load brings it back.",
    ),
}

Id = Annotated[
    str, InPath(description="As in the answer of the inspection.", examples=["line-3.part_17"])
]
PartName = Annotated[
    str | None,
    Query(description="What the request called it.", max_length=200, examples=["KB-2046/A 17"]),
]
Since = Annotated[
    Moment | None,
    Query(description="Only from this time on, with its zone.", examples=["2026-11-29T06:00:00Z"]),
]
Until = Annotated[
    Moment | None,
    Query(description="Only before this time.", examples=["2026-11-29T14:00:00Z"]),
]
Before = Annotated[
    int | None,
    Query(ge=1, le=2**62, examples=[480], description="The `next` of the page before."),
]
Limit = Annotated[int, Query(ge=1, le=MOST, description="How many at once.")]


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
        score_from=min_score, score_to=max_score, since=_ms(since), until=_ms(until),
    )  # fmt: skip


Asked = Annotated[Filter, Depends(asked_for_by)]


@router.get(
    "/decisions",
    dependencies=[needs("line")],
    summary="What was decided?",
    response_model=DecisionsBody,
    responses={409: _OFF},
)
async def decisions(
    request: Request, asked: Asked, limit: Limit = PAGE, before: Before = None
) -> Response:
    """Inspections, newest first, also those that ended without a verdict."""

    def written() -> str:
        found = _recorder(request).read(lambda it: it.find(asked, limit, before))
        following = found[-1].number if len(found) == limit else None
        return DecisionsBody(
            decisions=[_body(one) for one in found], next=following
        ).model_dump_json()

    return Response(await _ask(written), media_type="application/json")


@router.get(
    "/decisions.csv",
    dependencies=[needs("line")],
    summary="The same as a table",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/csv": {"schema": {"type": "string"}}}}, 409: _OFF},
)
async def table(request: Request, asked: Asked) -> StreamingResponse:
    """All that the filter finds, newest first, as CSV in UTF-8; it is not held in memory."""
    first = await _ask(_recorder(request).read, lambda it: it.find(asked, AT_ONCE))
    return StreamingResponse(
        _csv(_recorder(request), asked, first),
        media_type="text/csv; charset=utf-8",
        headers={"Content-Disposition": 'attachment; filename="decisions.csv"'},
    )


async def _csv(recorder: Recorder, asked: Filter, page: list[Kept]) -> Any:
    names = [name for name in DecisionBody.model_fields if name not in ("image", "timing")]
    more = ["format", "width", "height", "queue_ms", "decode_ms", "infer_ms", "total_ms"]
    yield _row([*names, *more])
    while page:
        yield "".join(_rows(page, names))
        last = page[-1].number
        page = await _ask(recorder.read, lambda it, last=last: it.find(asked, AT_ONCE, last))


def _rows(page: list[Kept], names: list[str]) -> Iterator[str]:
    for kept in page:
        body, one = _body(kept).model_dump(mode="json"), kept.decision
        yield _row([
            *(body[name] for name in names),
            one.format, one.width, one.height,
            one.queue_ms, one.decode_ms, one.infer_ms, one.total_ms,
        ])  # fmt: skip


def _row(values: list[Any]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\r\n").writerow(
        # A spreadsheet takes what begins so for a formula, in Japan also in full width.
        f"'{one}" if isinstance(one, str) and one.startswith(tuple("=+-@＝＋－＠")) else one
        for one in values
    )
    return file.getvalue()


@router.get(
    "/decisions/{id}",
    dependencies=[needs("line")],
    summary="What was decided of this one?",
    responses={404: _UNKNOWN, 409: _OFF},
)
async def decision(request: Request, id: Id) -> WholeDecisionBody:  # noqa: A002 (its public name)
    """With everything that was said of it since. Of an id that came twice, the last one."""

    def look() -> WholeDecisionBody:
        def found(it: DecisionDatabase) -> tuple[Kept, list[Line]]:
            kept = _kept(it, id)
            return kept, _lines(it, kept)

        kept, lines = _recorder(request).read(found)
        return WholeDecisionBody(
            **_body(kept).model_dump(), hash=kept.hash, history=list(map(_line, lines))
        )

    return await _ask(look)


@router.get(
    "/decisions/{id}/image",
    dependencies=[needs("line")],
    summary="See its picture",
    response_class=Response,
    responses=_PICTURE,
)
async def image(request: Request, id: Id) -> Response:  # noqa: A002
    """The file as it was sent."""

    def look() -> tuple[bytes, str]:
        recorder = _recorder(request)
        kept = recorder.read(lambda it: _kept(it, id))
        return _image(recorder, kept), kept.decision.format

    data, kind = await _ask(look)
    media_type = f"image/{kind.removeprefix('Big').lower()}" if kind else "application/octet-stream"
    return Response(data, media_type=media_type, headers={"X-Content-Type-Options": "nosniff"})


@router.get(
    "/decisions/{id}/overlay",
    dependencies=[needs("line")],
    summary="See what was strange about it",
    response_class=Response,
    responses=_PICTURE,
)
async def overlay(request: Request, id: Id) -> Response:  # noqa: A002
    """Its picture with what is anomalous painted over it, as `Accept: image/png` draws it."""
    return await _drawn(request, id, over_picture=True)


@router.get(
    "/decisions/{id}/heatmap",
    dependencies=[needs("line")],
    summary="See its heat map",
    response_class=Response,
    responses=_PICTURE,
)
async def heatmap(request: Request, id: Id) -> Response:  # noqa: A002
    """A grey PNG, where a pixel's value / 255 is the normalised score of its place."""
    return await _drawn(request, id, over_picture=False)


async def _drawn(request: Request, id_: str, *, over_picture: bool) -> Response:
    recorder, store = _recorder(request), _store(request)
    limits = request.app.state.inspector.limits

    def look() -> bytes:
        kept = recorder.read(lambda it: _kept(it, id_))
        one = kept.decision
        data = _image(recorder, kept)
        try:
            anomaly_map = recorder.pictures.anomaly_map(kept.number)
            meta = Meta.read(store.folder(one.model, one.version) / META)
        except (FileNotFoundError, UnknownDecision):
            raise UnknownDecision(f"The decision {id_!r} has no map: it had no verdict.") from None
        picture = decode(data, limits, meta.bit_depth) if over_picture else None
        return draw(anomaly_map, Scale.of(meta), meta.image_size, picture)

    return Response(await _ask(look), media_type="image/png")


@router.post(
    "/decisions/{id}/label",
    dependencies=[needs("operator")],
    summary="Say what it really was",
    responses={404: _UNKNOWN, 409: _OFF},
)
async def label(request: Request, id: Id, body: LabelBody) -> WholeDecisionBody:  # noqa: A002
    """Several people may say different things: the last one counts, and all of it is kept."""
    if body.defect and body.label != "defect":
        raise BadRequest(f"A part that is {body.label} has no kind of defect: leave it out.")
    name = who(request)

    def mark(it: DecisionDatabase) -> None:
        kept = _kept(it, id)
        it.mark(kept, body.label, checked(body.defect), name, checked(body.reason))

    await _ask(_recorder(request).read, mark)
    return await decision(request, id)


@router.post(
    "/decisions/{id}/replay",
    dependencies=[needs("operator")],
    summary="Judge its picture again",
    responses={
        404: _UNKNOWN,
        409: _OFF,
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
) -> ReplayBody:
    """It counts nowhere. The same version on the same runtime gives the same raw score."""
    recorder, manager = _recorder(request), _manager(request)
    inspector: Inspector = request.app.state.inspector

    def look() -> tuple[Kept, bytes]:
        kept = recorder.read(lambda it: _kept(it, id))
        return kept, _image(recorder, kept)

    kept, data = await _ask(look)
    one = kept.decision
    wanted = version or one.version
    if not wanted:
        raise BadRequest("It had no verdict, so say which version is to judge it: version=...")

    async def judged(model: Resident) -> ReplayBody:
        verdict = await inspector.look(data, model)
        return ReplayBody(
            decision=_body(kept), version=model.version,
            verdict="anomaly" if verdict.is_anomalous else "normal",
            raw_score=verdict.raw_score, score=verdict.score, threshold=verdict.threshold,
            raw_threshold=verdict.raw_threshold,
        )  # fmt: skip

    live = manager.live(one.model)
    if live is not None and live.version == wanted:
        with inspector.residents.use(live) as held:
            return await judged(held)
    await _ask(lambda: _store(request).folder(one.model, wanted))
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
        409: _OFF,
    },
)
async def evidence(request: Request, part: PartPath) -> StreamingResponse:
    """Records, pictures, overlays, what people said, the versions' reports, and hashes of all."""
    recorder, store = _recorder(request), _store(request)
    limits = request.app.state.inspector.limits

    def found(database: DecisionDatabase) -> list[tuple[Kept, list[Line]]]:
        of_part = database.find(_of_part(part), MOST)
        if not of_part:
            raise _unknown(part)
        return [(one, _lines(database, one)) for one in of_part]

    def write() -> IO[bytes]:
        file = SpooledTemporaryFile(max_size=SPOOL_BYTES)  # noqa: SIM115 (the answer closes it)
        write_evidence(file, part, recorder.read(found), recorder, store, limits)
        file.seek(0)
        return file

    file = await _ask(write)
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
    responses={404: _UNKNOWN, 409: _OFF},
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
        found = _recorder(request).read(lambda it: it.find(asked, limit, before))
        if not found and before is None:
            raise _unknown(part)
        following = found[-1].number if len(found) == limit else None
        return DecisionsBody(decisions=[_body(one) for one in found], next=following)

    return await _ask(look)


@router.get(
    "/trail",
    dependencies=[needs("operator")],
    summary="Who changed what?",
    responses={409: _OFF},
)
async def trail(
    request: Request,
    subject: Annotated[
        str,
        Query(
            description="A decision's id, or a model's or a key's name.",
            max_length=200,
            examples=["bracket"],
        ),
    ] = "",
    limit: Limit = PAGE,
    before: Before = None,
) -> TrailBody:
    """The audit trail, newest first: labels, thresholds, versions that went live or back, keys.

    Each line has the hash of the one before in its own; `kensa verify` tells whether all are whole.
    """

    def look() -> TrailBody:
        found = _recorder(request).read(lambda it: it.lines(limit, before, subject))
        following = found[-1].number if len(found) == limit else None
        return TrailBody(lines=[_line(one) for one in found], next=following)

    return await _ask(look)


@router.get(
    "/models/{name}/threshold/preview",
    dependencies=[needs("line")],
    summary="What would another threshold have said?",
    responses=_MODEL,
)
async def preview(
    request: Request,
    name: Annotated[str, InPath(description="The model's name.", examples=["bracket"])],
    raw: Annotated[
        float | None, Query(description="The limit for `raw_score`.", examples=[2.1])
    ] = None,
    threshold: Annotated[
        float | None, Query(description="The limit for `score`, 0 to 1.", examples=[0.55])
    ] = None,
    false_rejects: Annotated[
        float | None, Query(description="The share of good parts to reject.", examples=[0.005])
    ] = None,
    since: Since = None,
    until: Until = None,
) -> FlipsBody:
    """Of parts that were inspected: which would get another verdict. Nothing is changed.

    Say one of `raw`, `threshold` and `false_rejects`; PUT /models/{name}/threshold applies it.
    """
    given = {"raw": raw, "threshold": threshold, "false_rejects": false_rejects}
    wanted = {key: value for key, value in given.items() if value is not None}
    inspector: Inspector = request.app.state.inspector
    live = inspector.residents.get(name)

    def look() -> FlipsBody:
        limit = Scale.of(asked_for(live.meta, wanted)).raw_threshold
        scorer = short_sha256(live.made_of)
        asked = Filter(model=name, since=_ms(since), until=_ms(until))
        counts, found = _recorder(request).read(
            lambda it: (it.count_flips(asked, scorer, limit), it.flips(asked, scorer, limit, FLIPS))
        )
        return FlipsBody(
            model=name, version=live.version, raw=limit,
            raw_threshold=live.scale.raw_threshold, **counts._asdict(),
            good_at_most=share_at_most(counts.good_would_reject, counts.good),
            defects_at_most=share_at_most(counts.defects_would_miss, counts.defects),
            flips=[_body(one) for one in found],
        )  # fmt: skip

    return await _ask(look)


Per = Annotated[
    Literal["hour", "shift", "day"], Query(description="How long a span is; shifts: KENSA_SHIFTS.")
]
OfModel = Annotated[
    str | None, Query(description="Of this model alone.", max_length=64, examples=["bracket"])
]


@router.get(
    "/statistics",
    dependencies=[needs("line")],
    summary="How many parts, how many rejects?",
    responses={409: _OFF},
)
async def statistics(
    request: Request,
    per: Per = "hour",
    model: OfModel = None,
    since: Since = None,
    until: Until = None,
) -> SpansBody:
    """By hour, shift or day: of the last 24 hours, where no time is said.

    They are kept when decisions grow too old. Quantiles of scores are exact to 0.0025, of times to
    5 %.
    """
    return SpansBody(spans=await _ask(_spans, request, per, model, since, until))


@router.get(
    "/statistics.csv",
    dependencies=[needs("line")],
    summary="The same as a table",
    response_class=Response,
    responses={200: {"content": {"text/csv": {"schema": {"type": "string"}}}}, 409: _OFF},
)
async def statistics_table(
    request: Request,
    per: Per = "hour",
    model: OfModel = None,
    since: Since = None,
    until: Until = None,
) -> Response:
    """As GET /statistics; the reasons for no verdict stand in one column."""
    spans = await _ask(_spans, request, per, model, since, until)
    rows = [[*SpanBody.model_fields]]
    for span in spans:
        body = span.model_dump(mode="json")
        reasons = (f"{code} {count}" for code, count in span.no_verdict.items())
        rows.append([*(body | {"no_verdict": ", ".join(reasons)}).values()])
    return Response("".join(map(_row, rows)), media_type="text/csv; charset=utf-8")


def _spans(
    request: Request, per: str, model: str | None, since: datetime | None, until: datetime | None
) -> list[SpanBody]:
    settings: Settings = request.app.state.settings
    begins = {
        "hour": [time(hour) for hour in range(24)],
        "shift": settings.shift_times,
        "day": [time(0)],
    }[per]
    spans = Spans(settings.zone, begins)
    end = _ms(until) or _ms(datetime.now(timezone.utc)) or 0
    begin = _ms(since) or end - DAY_MS
    if end - begin > MOST_DAYS * DAY_MS:
        raise BadRequest(f"Ask for {MOST_DAYS} days at most: say since and until.")
    if not 0 <= begin < LATEST:
        raise BadRequest("No part came then: ask for a time from 1970 to 2999.")
    found: dict[tuple[datetime, datetime, str], Quarter] = {}
    span = spans.around(begin)
    first = round(span[0].timestamp() * 1000)  # spans are told whole
    quarters = _recorder(request).read(lambda it: list(it.quarters(first, end, model)))
    for name, at, quarter in quarters:  # in the order of their times
        if at >= span[1].timestamp() * 1000:
            span = spans.around(at)
        total = found.setdefault((*span, name), Quarter())
        total += quarter
    return [_span(*place, total) for place, total in sorted(found.items(), key=lambda one: one[0])]


def _span(since: datetime, until: datetime, model: str, total: Quarter) -> SpanBody:
    score, ms = total.score_at, total.ms_at
    return SpanBody(
        model=model, since=since, until=until, parts=total.parts, rejects=total.rejects,
        reject_share=round(total.rejects / total.parts, 6) if total.parts else None,
        no_verdict=dict(total.none), score_p50=score(0.5), score_p95=score(0.95),
        score_p99=score(0.99), ms_p50=ms(0.5), ms_p95=ms(0.95), ms_p99=ms(0.99),
    )  # fmt: skip


@router.post(
    "/datasets/{category}/from-decisions",
    dependencies=[needs("operator")],
    status_code=201,
    summary="Let marked parts be learned from",
    responses={
        409: _OFF,
        507: error_response("No room.", disk_full="The disk of the data folder is full: ..."),
    },
)
async def from_decisions(
    request: Request,
    category: Annotated[
        str, InPath(pattern=CATEGORY, description="What the images show.", examples=["bracket"])
    ],
    body: TeachBody,
) -> TaughtBody:
    """Good parts become images to learn from, and some to test with; defects, to test with.

    A picture is in one split at most, whatever is said of it later. Asked again it adds what is
    new.
    """
    return await taught(request, category, body)


async def taught(request: Request, category: str, body: TeachBody) -> TaughtBody:
    """Put marked parts into a category, and say so in the audit trail."""
    recorder, datasets = _recorder(request), request.app.state.datasets
    limits = request.app.state.inspector.limits
    found = await _ask(teach, recorder, datasets, category, body.filter(), body.test_share, limits)
    counts: dict[str, int] = {str(split): number for split, number in found.added.items()}
    counts |= {name: getattr(found, name) for name in found._fields[1:]}
    recorder.note("taught", who(request), category, "", **counts)
    return TaughtBody(category=category, **counts)


# ---- what is shown of it -------------------------------------------------------------------------


def _body(kept: Kept) -> DecisionBody:
    one = kept.decision
    timing = None
    if one.total_ms is not None:
        timing = TimingBody(
            queue_ms=one.queue_ms or 0.0, decode_ms=one.decode_ms or 0.0,
            infer_ms=one.infer_ms or 0.0, total_ms=one.total_ms,
        )  # fmt: skip
    image = ImageBody(format=one.format, width=one.width, height=one.height) if one.format else None
    return DecisionBody(
        number=kept.number, id=one.id, part=one.part or None, time=_time(one.at), model=one.model,
        version=one.version or None, verdict=one.verdict, code=one.code or None,
        raw_score=one.raw_score, score=one.score, threshold=one.threshold,
        raw_threshold=one.raw_threshold, image=image, sha256=one.sha256 or None,
        has_picture=kept.picture_bytes > 0, timing=timing, key=one.who or None,
        label=kept.label or None,  # type: ignore[arg-type]  # the database holds no others
        defect=kept.defect or None,
    )  # fmt: skip


def _line(line: Line) -> LineBody:
    return LineBody(
        number=line.number, time=_time(line.at), key=line.who or None, what=line.what,
        subject=line.subject, reason=line.reason or None, details=line.details, hash=line.hash,
    )  # fmt: skip


def _of_part(part: str) -> Filter:
    if not part:  # as of a path that ends with a line end
        raise _unknown(part)
    return Filter(part=checked(part))


def _unknown(part: str) -> UnknownDecision:
    return UnknownDecision(f"Nothing was decided of a part {part!r}, or long ago.")


def _kept(database: DecisionDatabase, id_: str) -> Kept:
    kept = database.one(id_)
    if kept is None:
        raise UnknownDecision(
            f"There is no decision {id_[:128]!r}: it was never made, or is too old to be kept."
        )
    return kept


def _lines(database: DecisionDatabase, kept: Kept) -> list[Line]:
    """What people said of a decision, and not of another one of the same id."""
    lines = database.lines(MOST, subject=kept.decision.id)
    return [one for one in lines if one.details.get("number") == kept.number]


def _image(recorder: Recorder, kept: Kept) -> bytes:
    try:
        return recorder.pictures.image(kept.number)
    except FileNotFoundError:
        raise UnknownDecision(
            f"The picture of the decision {kept.decision.id!r} is not kept: those of rejects are,"
            " of parts near the threshold and of a sample; see KENSA_RECORD_PICTURES_MIB."
        ) from None


def _time(at: int) -> datetime:
    return datetime.fromtimestamp(at / 1000, timezone.utc)


def _ms(time: datetime | None) -> int | None:
    return None if time is None else round(time.timestamp() * 1000)


def _recorder(request: Request) -> Recorder:
    found: Recorder = request.app.state.recorder
    return found


def _store(request: Request) -> Store:
    found: Store = request.app.state.store
    return found


def _manager(request: Request) -> ModelManager:
    found: ModelManager = request.app.state.models
    return found


async def _ask(work: Callable[..., Result], *arguments: Any) -> Result:
    """Ask the record, in threads that no part needs."""
    return await asyncio.get_running_loop().run_in_executor(_THREADS, work, *arguments)
