"""GET /statistics: how many parts, how many rejects, by hour, shift or day; a shift's report."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import datetime, time, timezone
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import HTMLResponse
from pydantic import Field

from app.decisions.quarters import Quarter, Spans
from app.decisions.recorder import DAY_MS
from app.decisions.shift import look
from app.decisions.shift_page import overlays, shift_page
from app.decisions.words import Language, Words
from app.http.access import KeyFirst, needs
from app.http.base_body import Body
from app.routes.record import (
    OFF,
    Moment,
    Since,
    Until,
    ask,
    csv_row,
    milliseconds,
    recorder_of,
)
from app.serving.inspection import Inspector
from app.settings import Settings, version
from engines.errors import BadRequest
from engines.page import LOADS_NOTHING

MOST_DAYS = 400  # at once
LATEST = 32_503_680_000_000  # milliseconds since 1970: calendars end


_REPORTS = ThreadPoolExecutor(1, "report")  # pictures are drawn: one report at a time
_NO_SUCH_TIME = "No part came then: ask for a time from 1970 to 2999."
_PAGE_HEADERS = {
    "Content-Security-Policy": LOADS_NOTHING,
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",  # keys decide who may see it
}


class SpanBody(Body):
    """What was decided by a model within a span of time."""

    model: str = Field(description="Empty: of requests that named none, or one that is not known.")
    since: datetime = Field(description="When the span began, in the zone of KENSA_TIMEZONE.")
    until: datetime
    parts: int = Field(
        description="That got a verdict by a usable picture; one that was sent again counts once."
    )
    rejects: int
    unusable: dict[str, int] = Field(
        description="Pictures that were not usable, by their `code`; they count nowhere else."
    )
    reject_share: float | None = Field(description="Of `parts`; null without any.")
    no_verdict: dict[str, int] = Field(description="Requests without a verdict, by their `code`.")
    score_p50: float | None
    score_p95: float | None
    score_p99: float | None
    ms_p50: float | None = Field(description="From the whole request to the verdict.")
    ms_p95: float | None
    ms_p99: float | None


class DriftBody(Body):
    """What of the last parts is no more as it was when the version learned."""

    model: str
    version: str
    statistic: str = Field(description="As in `camera.statistics` of the version, or `score`.")
    now: float = Field(description="The median of the last parts.")
    learned: float = Field(description="The mean of the training.")
    spread: float = Field(description="Its standard deviation.")
    parts: int
    sentence: str


class ShiftBody(Body):
    """When a shift begins and ends, by KENSA_SHIFTS."""

    since: datetime = Field(description="In the zone of KENSA_TIMEZONE.")
    until: datetime


class SpansBody(Body):
    """What was decided, span by span."""

    spans: list[SpanBody] = Field(
        description="Oldest first; those in which nothing came are left out."
    )
    drift: list[DriftBody] = Field(
        description="What drifts at this moment, where KENSA_DRIFT_PARTS asks; else empty."
    )
    shift: ShiftBody = Field(description="The shift of this moment.")


router = APIRouter(tags=["record"], route_class=KeyFirst)

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
    responses={409: OFF},
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
    spans = await ask(_spans, request, per, model, since, until)
    return SpansBody(spans=spans, drift=drifting(request, model), shift=_running_shift(request))


@router.get(
    "/statistics.csv",
    dependencies=[needs("line")],
    summary="The same as a table",
    response_class=Response,
    responses={200: {"content": {"text/csv": {"schema": {"type": "string"}}}}, 409: OFF},
)
async def statistics_table(
    request: Request,
    per: Per = "hour",
    model: OfModel = None,
    since: Since = None,
    until: Until = None,
) -> Response:
    """As GET /statistics; the reasons of each kind stand in one column."""
    spans = await ask(_spans, request, per, model, since, until)
    rows = [[*SpanBody.model_fields]]
    for span in spans:
        body = span.model_dump(mode="json")
        for name in ("unusable", "no_verdict"):
            body[name] = ", ".join(f"{code} {count}" for code, count in body[name].items())
        rows.append([*body.values()])
    return Response("".join(map(csv_row, rows)), media_type="text/csv; charset=utf-8")


@router.get(
    "/statistics.html",
    dependencies=[needs("line")],
    summary="The report of a shift, to be printed",
    response_class=Response,  # HTMLResponse would make the errors' schemas those of a page
    responses={200: {"content": {"text/html": {"schema": {"type": "string"}}}}, 409: OFF},
)
async def report(
    request: Request,
    shift: Annotated[
        Literal["last", "running"],
        Query(description="The last one that has ended, or the one that is running."),
    ] = "last",
    at: Annotated[
        Moment | None,
        Query(description="The shift of this moment instead.", examples=["2026-11-29T09:00:00Z"]),
    ] = None,
    model: OfModel = None,
    lang: Annotated[Language, Query(description="Of its words.")] = "en",
) -> HTMLResponse:
    """One page that loads nothing: figures, charts, the worst rejects, and what was changed."""
    loop = asyncio.get_running_loop()
    page = await loop.run_in_executor(_REPORTS, _report, request, shift, at, model, lang)
    return HTMLResponse(page, headers=_PAGE_HEADERS)


def drifting(request: Request, name: str | None) -> list[DriftBody]:
    """What drifts at this moment, of all models or of one."""
    inspector: Inspector = request.app.state.inspector
    return [
        DriftBody(model=model.name, version=model.version, sentence=one.sentence, **asdict(one))
        for model in inspector.residents.all()
        if name in (None, model.name)
        for one in inspector.drift.changes(model)
    ]


def _running_shift(request: Request) -> ShiftBody:
    settings: Settings = request.app.state.settings
    now = milliseconds(datetime.now(timezone.utc))
    since, until = Spans(settings.zone, settings.shift_times).around(now)
    return ShiftBody(since=since, until=until)


def _report(
    request: Request, shift: str, at: datetime | None, model: str | None, lang: Language
) -> str:
    settings, recorder = request.app.state.settings, recorder_of(request)
    spans = Spans(settings.zone, settings.shift_times)
    made = datetime.now(settings.zone)
    moment = milliseconds(at or made)
    if at is None and shift == "last":
        moment = round(spans.around(moment)[0].timestamp() * 1000) - 1
    if not 0 <= moment < LATEST:
        raise BadRequest(_NO_SUCH_TIME)
    found = recorder.read(lambda it: look(it, spans, moment, made, model))
    picture = overlays(recorder.pictures, request.app.state.inspector.limits)
    return shift_page(found, model, picture, Words(lang), version())


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
    end = milliseconds(until or datetime.now(timezone.utc))
    begin = milliseconds(since) if since else end - DAY_MS
    if end - begin > MOST_DAYS * DAY_MS:
        raise BadRequest(f"Ask for {MOST_DAYS} days at most: say since and until.")
    if not 0 <= begin < LATEST:
        raise BadRequest(_NO_SUCH_TIME)
    found: dict[tuple[datetime, datetime, str], Quarter] = {}
    span = spans.around(begin)
    first = round(span[0].timestamp() * 1000)  # spans are told whole
    quarters = recorder_of(request).read(lambda it: list(it.quarters(first, end, model)))
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
        unusable=dict(total.unusable),
        reject_share=round(total.rejects / total.parts, 6) if total.parts else None,
        no_verdict=dict(total.none), score_p50=score(0.5), score_p95=score(0.95),
        score_p99=score(0.99), ms_p50=ms(0.5), ms_p95=ms(0.95), ms_p99=ms(0.99),
    )  # fmt: skip
