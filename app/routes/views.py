"""Several views of a part: each picture is judged as it comes, and the part once, from all."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Awaitable
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi import Path as InPath
from pydantic import Field

from app.decisions.recorder import Asked, why_none
from app.http.accept import Answer, wanted
from app.http.access import needs, who
from app.http.base_body import Body, error_response
from app.http.deadlines import until_gone, within_deadline
from app.http.part import SCHEMA, checked
from app.http.request_log import request_id
from app.routes.infer import (
    EXAMPLE,
    ID_PARAMETER,
    REQUEST_BODY,
    RESPONSES,
    InspectionBody,
    Words,
    how_to_answer,
    inspection_body,
    picture_of,
    text_line,
)
from app.serving.inspection import Drawing, Inspection, Inspector
from app.serving.views import MISSING, MOST_VIEWS, Key, Look, Of, Part, State, Views
from engines.errors import BadImage, BadRequest, Conflict
from engines.logs import note
from engines.verdict import Label

MOST_MS = 600_000  # that a part may wait for its views, or a request for its verdict
_NAME = "[A-Za-z0-9_-]{1,32}"  # of a view, or a line: it names a file, and stands in headers


class ViewBody(Body):
    """A view that was sent, and what was said of it."""

    view: str
    id: str = Field(description="Of the request that brought it.")
    model_name: str
    model_version: str | None = Field(description="Which judged; null without a verdict.")
    label: Label | None = Field(description="Null without a verdict: being judged, or see `code`.")
    is_anomalous: bool | None
    raw_score: float | None
    score: float | None
    threshold: float | None
    raw_threshold: float | None
    code: str | None = Field(
        description="Why it has no verdict, and may be sent again; or why its verdict is not what"
        " its score says, such as `camera_dark` or `not_released`; else null."
    )


class PartBody(Body):
    """A part, as far as its views have come."""

    id: str = Field(
        description="Of the first request for the part, and of the decision in the record."
    )
    part: str
    line: str | None = Field(description="As the requests named it.")
    verdict: State = Field(
        description="`pending` until the last view or the deadline; `none` where a view is missing"
        " and no other is an anomaly."
    )
    is_anomalous: bool | None = Field(
        description="Null while it is pending; true for all but `normal`: nobody may pass it."
    )
    code: str | None = Field(
        description=f"`{MISSING}` with `none`; else as of the worst view, such as `camera_dark`."
    )
    decided_by: str | None = Field(description="The worst view, or the first that is missing.")
    score: float | None = Field(
        description="Of the worst view; null while it is pending, and with `none`."
    )
    threshold: float | None = Field(description="The limit for it.")
    of: int = Field(description="How many views it has.")
    missing: list[str] = Field(
        description="Views without a verdict; `?` where nobody has said what one is called."
    )
    left_ms: int = Field(description="Until the deadline; 0 once it is decided.")
    views: list[ViewBody] = Field(description="Those that were sent.")


class ViewAnswerBody(PartBody):
    """The verdict on one view, and the part as far as its views have come."""

    view: str
    inspection: InspectionBody = Field(description="Of this view, as POST /infer answers.")


router = APIRouter(tags=["inspection"], dependencies=[needs("line")])

_PENDING: dict[str, Any] = {
    "id": EXAMPLE["id"], "part": "KB-2046/A 17", "line": None, "verdict": "pending",
    "is_anomalous": None, "code": None, "decided_by": None, "score": None, "threshold": None,
    "of": 2, "missing": ["top"], "left_ms": 1480,
    "views": [
        {"view": "left", "id": EXAMPLE["id"], "model_name": "sample_bracket",
         "model_version": "0001-3f9a0c41d2e8", "label": "Anomaly", "is_anomalous": True,
         "raw_score": 2.8731, "score": 0.8712, "threshold": 0.5, "raw_threshold": 1.6204,
         "code": None}
    ],
}  # fmt: skip
_DECIDED = {
    **_PENDING, "verdict": "anomaly", "is_anomalous": True, "decided_by": "left",
    "score": 0.8712, "threshold": 0.5, "left_ms": 0,
}  # fmt: skip
_HEADERS = {
    "X-Kensa-Id": "The id of the part's decision.",
    "X-Kensa-Part": "The part's name, percent-encoded where it is not ASCII.",
    "X-Kensa-Verdict": "pending, normal, anomaly, unusable or none.",
    "X-Kensa-Views": "How many views have a verdict, of how many: 2/4.",
    "X-Kensa-Missing": "The views without a verdict, separated by commas; absent without any.",
    "X-Kensa-Decided-By": "The view whose verdict is the part's; absent while it is pending.",
    "X-Kensa-Unusable": "Why the part's picture is not usable, such as camera_dark; else absent.",
    "X-Kensa-Repeat-Of": "The id of the request that brought this picture first; else absent.",
}


def _success(example: dict[str, Any], *media_types: str) -> dict[str, Any]:
    binary = {"schema": {"type": "string", "format": "binary"}}
    return {
        "description": "The part, in the form that the header `Accept` asks for.",
        "headers": {
            name: {"description": meaning, "schema": {"type": "string"}}
            for name, meaning in _HEADERS.items()
        },
        "content": {
            "application/json": {"example": example},
            "text/plain": {"schema": {"type": "string"}, "example": "PENDING 1/2\n"},
            **dict.fromkeys(media_types, binary),
        },
    }


_EXAMPLE_OF_VIEW = {
    **_PENDING, "view": "left", "inspection": {**EXAMPLE, "part": "KB-2046/A 17"},
}  # fmt: skip
_OF_VIEW: dict[int | str, dict[str, Any]] = {
    **RESPONSES,
    200: _success(_EXAMPLE_OF_VIEW, "image/png"),
    409: error_response(
        "It does not fit to what is known of the part.",
        late_view="The view top of the part 'KB-2046' came too late: it was decided, NG ...",
        conflict="The part 'KB-2046' began with of=4, and its view top says of=3: say the same ...",
    ),
}
_OF_PART: dict[int | str, dict[str, Any]] = {
    200: _success(_DECIDED),
    404: error_response(
        "No view of such a part came lately.",
        unknown_decision="No view of a part 'KB-2046' came from you without a line, within ...",
    ),
}

PartPath = Annotated[
    str, InPath(description="The part's name, percent-encoded.", json_schema_extra=SCHEMA)
]
ViewPath = Annotated[
    str,
    InPath(
        description="What the view is called: up to 32 letters, digits, - and _.",
        pattern=f"^{_NAME}$",
        examples=["left"],
    ),
]
Line = Annotated[
    str,
    Query(
        description="Which of several lines that send with the same key and may call their parts"
        " alike.",
        pattern=f"^({_NAME})?$",
        examples=["line-3"],
    ),
]


@router.post(
    "/parts/{part:path}/views/{view}",
    summary="Inspect one view of a part",
    response_model=ViewAnswerBody,
    responses=_OF_VIEW,
    openapi_extra={"requestBody": REQUEST_BODY, "parameters": [ID_PARAMETER]},
)
async def infer_view(
    request: Request,
    part: PartPath,
    view: ViewPath,
    of: Annotated[
        str,
        Query(
            description=f"How many views the part has, 1 to {MOST_VIEWS}; or their names, separated"
            " by commas.",
            pattern=rf"^([1-9][0-9]?|{_NAME}(,{_NAME})*)$",
            max_length=MOST_VIEWS * 33,
            examples=["4"],
        ),
    ],
    model: Annotated[
        str, Query(description="Which model judges this view; may be left out as in POST /infer.")
    ] = "",
    line: Line = "",
    heatmap: Annotated[
        bool, Query(description="Add a heat map of this view to the JSON answer.")
    ] = False,
    deadline_ms: Annotated[
        int | None,
        Query(
            ge=1,
            le=MOST_MS,
            examples=[2000],
            description="How long the part waits for its views, from the first request for it on,"
            " whose value counts; KENSA_DEADLINE_MS where it is left out.",
        ),
    ] = None,
    words: Words = "2",
) -> Response:
    """Send a picture of one view; the answer has its verdict, and the part's with the last one.

    Views come in any order, and those of many parts beside each other. Any NG is NG, and so is a
    view that is missing at the deadline. `Accept: text/plain` answers `PENDING 2/4` until the last
    view, then `OK 0.1234` or `NG 0.8712`, by the worst view.
    """
    inspector: Inspector = request.app.state.inspector
    views: Views = request.app.state.views
    named = model or inspector.residents.only or ""
    looking = Look(view, request_id(request), named)
    key = _key(request, part, line)
    within_ms = deadline_ms or request.app.state.settings.deadline_ms
    awaited = views.part(key, _of(of), view, looking.id, within_ms / 1000)
    data: bytes | None = None
    try:
        answer, drawing = how_to_answer(request, heatmap=heatmap)
        async with picture_of(request, model) as (data, _):
            with inspector.admission.admitted():
                judging = _judge(request, awaited, looking, data, drawing)
                left_ms = max(1, _left_ms(awaited))
                inspection, repeat_of = await within_deadline(request, judging, left_ms)
    except Conflict:  # it is not a view of this part
        raise
    except Exception as error:
        bad = isinstance(error, BadImage)
        inspector.counts.refused += bad
        views.failed(awaited, looking, why_none(error), data if bad else None)
        raise
    judged_by = inspection.model
    note(model=judged_by.name, version=judged_by.version, label=inspection.verdict.label)
    return _answer_view(awaited, looking, inspection, repeat_of, answer, words)


@router.get(
    "/parts/{part:path}/verdict",
    summary="What is the verdict on a part of several views?",
    response_model=PartBody,
    responses=_OF_PART,
)
async def verdict(
    request: Request,
    part: PartPath,
    line: Line = "",
    wait_ms: Annotated[
        int, Query(ge=0, le=MOST_MS, description="How long to wait for it, in ms.")
    ] = 0,
    words: Words = "2",
) -> Response:
    """It is there with the last view, or at the deadline, and for KENSA_REPEAT_S afterwards.

    The part has to be the key's own: its views were sent with the same key, and the same `line`.
    """
    views: Views = request.app.state.views
    known = views.known(_key(request, part, line))
    await _wait(request, known, wait_ms / 1000)
    answer = wanted(request.headers.get("accept", ""))
    if answer == "text/plain":
        return Response(_line(known, words), media_type=answer, headers=_headers(known))
    body = PartBody(**_state(known)).model_dump_json()
    return Response(body, media_type="application/json", headers=_headers(known))


async def _judge(
    request: Request, part: Part, look: Look, data: bytes, drawing: Drawing | None
) -> tuple[Inspection, str | None]:
    """The inspection of a view, and the id of the one that it repeats, if it does."""
    inspector: Inspector = request.app.state.inspector
    views: Views = request.app.state.views
    look.sha256 = await inspector.beside(lambda: hashlib.sha256(data).hexdigest())
    model = look.model or None

    def inspect() -> Awaitable[Inspection]:
        return inspector.inspect(data, model, drawing, f"{part.key.part} {look.view}")

    inspection, repeat_of = await views.judge(part, look, data, inspect)
    if repeat_of is not None and drawing is not None:  # which are not remembered
        drawn = await inspector.draw_again(data, model, drawing)
        inspection = replace(inspection, drawing=drawn)
    return inspection, repeat_of


async def _wait(request: Request, part: Part, seconds: float) -> None:
    """Until the part is decided, the time is up, or nobody waits for the answer any more."""
    if part.is_decided or not seconds:
        return
    ends = [part.decided.wait(), request.app.state.stopping.wait(), until_gone(request)]
    waiting = {asyncio.ensure_future(one) for one in ends}
    try:
        await asyncio.wait(waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for one in waiting:
            one.cancel()


def _key(request: Request, part: str, line: str) -> Key:
    if not checked(part):
        raise BadRequest("The part has no name: say it in the path, as in /parts/KB-2046/verdict.")
    note(part=part)
    return Key(who(request), line, part)


def _of(text: str) -> Of:
    """How many views there are, or which."""
    if re.fullmatch("[0-9]+", text):
        count, names = int(text), []
    else:
        names = text.split(",")
        count = len(names)
    if not 1 <= count <= MOST_VIEWS:
        raise BadRequest(f"A part has 1 to {MOST_VIEWS} views; of says {count}.")
    if len({*names}) < len(names):
        raise BadRequest(f"In of={text} a view stands twice: each has a name of its own.")
    return Of(count, tuple(names))


def _left_ms(part: Part) -> int:
    return max(0, round((part.until - asyncio.get_running_loop().time()) * 1000))


# ---- what is answered ----------------------------------------------------------------------------


def _answer_view(
    part: Part,
    look: Look,
    inspection: Inspection,
    repeat_of: str | None,
    answer: Answer,
    words: str,
) -> Response:
    headers = _headers(part)
    if repeat_of is not None:
        headers["X-Kensa-Repeat-Of"] = repeat_of
    if answer == "image/png":
        return Response(inspection.drawing, media_type=answer, headers=headers)
    if answer == "text/plain":
        return Response(_line(part, words), media_type=answer, headers=headers)
    asked = Asked(look.id, part.key.part, look.model, part.key.who)
    body = ViewAnswerBody(
        **_state(part), view=look.view, inspection=inspection_body(inspection, asked, repeat_of)
    )
    return Response(body.model_dump_json(), media_type=answer, headers=headers)


def _line(part: Part, words: str) -> str:
    if part.state == "pending":
        return f"PENDING {len(part.judged)}/{part.of.total}\n"
    worst = part.worst
    if part.state == "none" or worst is None or worst.inspection is None:
        return f"NG {MISSING}\n"
    return text_line(worst.inspection.verdict, words)


def _headers(part: Part) -> dict[str, str]:
    found = {
        "X-Kensa-Id": part.id,
        "X-Kensa-Verdict": part.state,
        "X-Kensa-Views": f"{len(part.judged)}/{part.of.total}",
    }
    if part.missing:
        found["X-Kensa-Missing"] = ",".join(part.missing)
    if part.is_decided:
        found["X-Kensa-Decided-By"] = part.decided_by
    worst = part.worst
    if part.state == "unusable" and worst is not None and worst.inspection is not None:
        found["X-Kensa-Unusable"] = worst.inspection.code
    return found


def _state(part: Part) -> dict[str, Any]:
    """What `PartBody` says."""
    state = part.state
    worst = part.worst if state not in ("pending", "none") else None
    found = worst.inspection if worst is not None else None
    return {
        "id": part.id, "part": part.key.part, "line": part.key.line or None, "verdict": state,
        "is_anomalous": state != "normal" if part.is_decided else None,
        "code": MISSING if state == "none" else (found.code if found else "") or None,
        "decided_by": part.decided_by if part.is_decided else None,
        "score": found.verdict.score if found else None,
        "threshold": found.verdict.threshold if found else None,
        "of": part.of.total, "missing": part.missing,
        "left_ms": 0 if part.is_decided else _left_ms(part),
        "views": [_view(look) for look in part.looks.values()],
    }  # fmt: skip


def _view(look: Look) -> ViewBody:
    judged = look.inspection
    verdict = judged.verdict if judged is not None else None
    return ViewBody(
        view=look.view, id=look.id,
        model_name=judged.model.name if judged is not None else look.model,
        model_version=judged.model.version if judged is not None else None,
        label=verdict.label if verdict else None,
        is_anomalous=verdict.is_anomalous if verdict else None,
        raw_score=verdict.raw_score if verdict else None,
        score=verdict.score if verdict else None,
        threshold=verdict.threshold if verdict else None,
        raw_threshold=verdict.raw_threshold if verdict else None,
        code=look.code or (judged.code if judged is not None else "") or None,
    )  # fmt: skip
