"""GET /models/{name}/scores: how parts score, and where the limit lies among them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Query, Request, Response
from pydantic import Field

from app.decisions.database import Filter
from app.decisions.decision import short_sha256
from app.http.access import KeyFirst, needs
from app.http.base_body import Body
from app.routes.models import RESIDENT, UNUSABLE, Name, aside, store_of
from app.routes.record import recorder_of
from app.serving.inspection import Inspector
from engines.errors import Conflict, DiskFull
from engines.histogram import ENGLISH, JAPANESE, WIDTH, Group, histogram
from engines.limits import is_number, raw_range
from engines.serving.resident import Resident
from engines.store.known_scores import KnownScores

LAST = 2000  # parts
FAR = 0.35  # of the range of limits: what scores farther from it is drawn at the side
_WORDS = {"en": ENGLISH, "ja": JAPANESE}
_NAMES = {  # of the groups: colour, English, Japanese
    "normals": ("normal", "good at training", "学習時の良品"),
    "defects": ("anomaly", "known defects", "既知の不良"),
    "drawn": ("drawn", "drawn defects", "模擬欠陥"),
    "parts": ("soft", "last parts", "最近の部品"),
    "marked_good": ("good", "marked as good", "良品と確認"),
    "marked_defect": ("anomaly", "marked as defects", "不良と確認"),
}


class ScoresBody(Body):
    """Raw scores by the version that judges; lists that nothing is known of are empty."""

    model: str
    version: str
    raw_threshold: float = Field(description="The limit in force.")
    low: float = Field(description="A limit may be set from here, as PUT .../threshold takes it,")
    high: float = Field(description="up to here.")
    normals: list[float] = Field(
        description="Of good parts at training, each by a model that had not learned it: the"
        " highest of each part."
    )
    defects: list[float] = Field(description="Of known defects at training, lowest first.")
    drawn: list[float] = Field(description="Of defects that training drew onto good parts.")
    parts: list[float] = Field(description=f"Of the last {LAST:,} parts, those nobody has marked.")
    marked_good: list[float] = Field(description="Of these, parts that a person marked as good.")
    marked_defect: list[float] = Field(description="And as defects.")


router = APIRouter(tags=["models"], route_class=KeyFirst)

_ANSWERS = {**RESIDENT, 422: UNUSABLE}


@router.get(
    "/models/{name}/scores",
    dependencies=[needs("line")],
    summary="How do parts score?",
    responses=_ANSWERS,
)
async def scores(request: Request, name: Name) -> ScoresBody:
    """Those that the limit was found from, and those of the last parts, beside the limit."""
    model = _inspector(request).residents.get(name)
    low, high = raw_range(model.scale)
    groups = await aside(_groups, request, model)
    return ScoresBody(
        model=name, version=model.version, raw_threshold=model.scale.raw_threshold,
        low=low, high=high, **groups,
    )  # fmt: skip


@router.get(
    "/models/{name}/scores.svg",
    dependencies=[needs("line")],
    summary="See how parts score",
    response_class=Response,
    responses={200: {"content": {"image/svg+xml": {"schema": {"type": "string"}}}}, **_ANSWERS},
)
async def drawing(
    request: Request,
    name: Name,
    lang: Annotated[Literal["en", "ja"], Query(description="Of its words.")] = "en",
    width: Annotated[
        int, Query(ge=320, le=2000, description="How wide it is, px; it is about 400 px high.")
    ] = WIDTH,
) -> Response:
    """A histogram, as % of each group; below a tick for each part.

    The attributes data-left and data-width of the svg say between which px, and data-low and
    data-high between which raw scores it lies. What scores far beyond the limits that can be set
    is drawn at the side.
    """
    model = _inspector(request).residents.get(name)
    groups = await aside(_groups, request, model)
    return Response(await aside(_drawn, model, groups, lang, width), media_type="image/svg+xml")


def _drawn(
    model: Resident, groups: dict[str, list[float]], lang: Literal["en", "ja"], width: int
) -> str:
    low, high = raw_range(model.scale)
    far = FAR * (high - low)
    shown = [
        Group(names[lang == "ja"], colour, np.clip(groups[name], low - far, high + far))
        for name, (colour, *names) in _NAMES.items()
        if groups[name]
    ]
    limit = model.scale.raw_threshold
    if not shown:  # a model of another tool, and no part yet: the limit alone
        shown = [Group("", "soft", np.empty(0))]
    svg = histogram(shown, limit, {}, _WORDS[lang], shares=True, within=(low, high), width=width)
    # Opened by itself it has the common colours; what takes it into a page drops this line.
    return f'<?xml-stylesheet href="/web/page.css"?>\n{_standing_alone(svg)}'


def _standing_alone(svg: str) -> str:
    return svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)


def _groups(request: Request, model: Resident) -> dict[str, list[float]]:
    folder = store_of(request).folder(model.name, model.version)
    known = model.meta.calibration or {}
    drawn = known.get("drawn")
    normals = KnownScores.read(folder).highest()
    found: dict[str, list[float]] = {
        "normals": [float(one) for one in normals],
        "defects": _numbers(known.get("defect_scores")),
        "drawn": _numbers(drawn.get("scores") if isinstance(drawn, dict) else None),
        "parts": [],
        "marked_good": [],
        "marked_defect": [],
    }
    by_label = {"": "parts", "good": "marked_good", "defect": "marked_defect"}
    for raw, label in _last_parts(request, model):
        if label in by_label:
            found[by_label[label]].append(raw)
    return found


def _last_parts(request: Request, model: Resident) -> Iterable[tuple[float, str]]:
    asked, scorer = Filter(model=model.name), short_sha256(model.made_of)
    try:
        return recorder_of(request).read(lambda it: it.scores(asked, scorer, LAST))
    except (Conflict, DiskFull):  # nothing is recorded here, or not now
        return []


def _numbers(found: Any) -> list[float]:
    """None of a calibration that does not say, or is damaged."""
    is_list = isinstance(found, list) and all(map(is_number, found))
    return [float(one) for one in found] if is_list else []


def _inspector(request: Request) -> Inspector:
    inspector: Inspector = request.app.state.inspector
    return inspector
