"""POST /datasets/{category}/from-decisions: parts that a person has marked are learned from."""

from __future__ import annotations

from fastapi import APIRouter, Request
from pydantic import ConfigDict, Field

from app.decisions.database import Filter
from app.decisions.teaching import teach
from app.http.access import KeyFirst, needs, who
from app.http.base_body import Body, error_response
from app.routes.datasets import Category
from app.routes.record import OFF, Moment, ask, milliseconds, recorder_of


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
                      since=milliseconds(self.since), until=milliseconds(self.until))  # fmt: skip


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


@router.post(
    "/datasets/{category}/from-decisions",
    dependencies=[needs("operator")],
    status_code=201,
    summary="Let marked parts be learned from",
    responses={
        409: OFF,
        507: error_response("No room.", disk_full="The disk of the data folder is full: ..."),
    },
)
async def from_decisions(request: Request, category: Category, body: TeachBody) -> TaughtBody:
    """Good parts become images to learn from, and some to test with; defects, to test with.

    A picture is in one split at most, whatever is said of it later. Asked again it adds what is
    new.
    """
    return await taught(request, category, body)


async def taught(request: Request, category: str, body: TeachBody) -> TaughtBody:
    """Put marked parts into a category, and say so in the audit trail."""
    recorder, datasets = recorder_of(request), request.app.state.datasets
    limits = request.app.state.inspector.limits
    found = await ask(teach, recorder, datasets, category, body.filter(), body.test_share, limits)
    counts: dict[str, int] = {str(split): number for split, number in found.added.items()}
    counts |= {name: getattr(found, name) for name in found._fields[1:]}
    recorder.note("taught", who(request), category, "", **counts)
    return TaughtBody(category=category, **counts)
