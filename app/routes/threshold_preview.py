"""GET /models/{name}/threshold/preview: what another threshold would have said of real parts."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request
from pydantic import Field

from app.decisions.database import Filter
from app.decisions.decision import short_sha256
from app.http.access import KeyFirst, needs
from app.http.base_body import Body
from app.routes.decisions import DecisionBody, decision_body
from app.routes.models import RESIDENT, Name
from app.routes.record import OFF, Since, Until, ask, milliseconds, recorder_of
from app.serving.inspection import Inspector
from engines.limits import asked_for, share_at_most
from engines.verdict import Scale

FLIPS = 200  # that are named


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


router = APIRouter(tags=["record"], route_class=KeyFirst)


@router.get(
    "/models/{name}/threshold/preview",
    dependencies=[needs("line")],
    summary="What would another threshold have said?",
    responses={**RESIDENT, 409: OFF},
)
async def preview(
    request: Request,
    name: Name,
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
        asked = Filter(model=name, since=milliseconds(since), until=milliseconds(until))
        counts, found = recorder_of(request).read(
            lambda it: (it.count_flips(asked, scorer, limit), it.flips(asked, scorer, limit, FLIPS))
        )
        return FlipsBody(
            model=name, version=live.version, raw=limit,
            raw_threshold=live.scale.raw_threshold, **counts._asdict(),
            good_at_most=share_at_most(counts.good_would_reject, counts.good),
            defects_at_most=share_at_most(counts.defects_would_miss, counts.defects),
            flips=[decision_body(one) for one in found],
        )  # fmt: skip

    return await ask(look)
