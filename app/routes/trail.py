"""The audit trail: who changed what, and why."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import Field

from app.decisions.database import Line
from app.http.access import KeyFirst, needs
from app.http.base_body import Body
from app.routes.record import OFF, PAGE, Before, Limit, ask, recorder_of, time_of


class LineBody(Body):
    """A line of the audit trail."""

    number: int
    time: datetime = Field(description="UTC.")
    key: str | None = Field(
        description="Whose key; null for Kensa itself, or where none is needed."
    )
    what: str = Field(
        description="label, taught, threshold, regions, live, rollback, held, challenge_passed,"
        " challenge_failed, challenges, release, discarded, key_added, key_removed, deleted, prune,"
        " lost or repair."
    )
    subject: str = Field(description="A decision's id, or a model's, a category's or a key's name.")
    reason: str | None
    details: dict[str, Any]
    hash: str = Field(description="SHA-256 of the line and of the hash before it.")


class TrailBody(Body):
    """Lines of the audit trail, newest first."""

    lines: list[LineBody]
    next: int | None = Field(description="The next page's `before`; null at the end.")


router = APIRouter(tags=["record"], route_class=KeyFirst)


@router.get(
    "/trail",
    dependencies=[needs("operator")],
    summary="Who changed what?",
    responses={409: OFF},
)
async def trail(
    request: Request,
    subject: Annotated[
        str,
        Query(
            description="A decision's id, or a model's, a category's or a key's name.",
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
        found = recorder_of(request).read(lambda it: it.lines(limit, before, subject))
        following = found[-1].number if len(found) == limit else None
        return TrailBody(lines=[line_body(one) for one in found], next=following)

    return await ask(look)


def line_body(line: Line) -> LineBody:
    return LineBody(
        number=line.number, time=time_of(line.at), key=line.who or None, what=line.what,
        subject=line.subject, reason=line.reason or None, details=line.details, hash=line.hash,
    )  # fmt: skip
