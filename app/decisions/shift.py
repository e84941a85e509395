"""`Shift`: what was decided in a shift, who changed what, and what the days before were like."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime

from app.decisions.database import DecisionDatabase, Filter, Judged, Kept, Line
from app.decisions.quarters import Quarter, Spans

WEEK = 7  # days that a shift is compared with
MOST_LINES = 40  # of the trail; labels are counted
MOST_PICTURES = 12  # of rejects, of all models together
MOST_BYTES = 32 * 1024**2  # of a picture and its map; larger ones are not drawn
MOST_PIXELS = 25_000_000


@dataclass(frozen=True)
class OfModel:
    """What was decided by a model; an empty name is of requests that named none that is known."""

    name: str
    total: Quarter
    quarters: list[tuple[int, Quarter]]  # when each began, milliseconds since 1970
    day_before: Quarter | None  # None: nothing is known of it
    week: list[Quarter]  # of the days before on which something came
    judged: list[Judged]
    rejects: list[tuple[str, str, int]]  # label, kind of defect, how many
    missed: int  # that passed, and that a person has marked as defects
    worst: list[Kept]

    @property
    def kept(self) -> int:
        """How many of the parts are still in the record, one by one."""
        return sum(one.parts for one in self.judged)


@dataclass(frozen=True)
class Shift:
    """All of one moment."""

    since: datetime
    until: datetime
    made: datetime
    models: list[OfModel]
    lines: list[Line]
    markers: list[tuple[str, int]]  # who marked how many parts meanwhile
    decisions_head: tuple[int, str]  # number and hash of the last line
    trail_head: tuple[int, str]

    @property
    def is_running(self) -> bool:
        return self.since <= self.made < self.until


def look(
    database: DecisionDatabase, spans: Spans, at: int, made: datetime, model: str | None
) -> Shift:
    """What the record says of the shift of a moment.

    Args:
        at: the moment, milliseconds since 1970.
        made: now, in the zone of the shifts. Of a shift that is running, the days before are
            counted up to the same time.
        model: this one alone; None for all.
    """
    since, until = spans.around(at)
    passed_s = max(made.timestamp() - since.timestamp(), 0.0) if made < until else math.inf
    with database.reading():
        found = dict(sorted(_quarters(database, since, until.timestamp(), model).items()))
        days = []
        for day in range(1, WEEK + 1):
            began, ends = spans.days_before(since, day)
            end = min(began.timestamp() + passed_s, ends.timestamp())
            days.append({name: _sum(some) for name, some in
                         _quarters(database, began, end, model).items()})  # fmt: skip
        first, last = _ms(since), _ms(until)
        shown = [name for name, some in found.items() if _sum(some).rejects][:MOST_PICTURES]
        each = MOST_PICTURES // len(shown) if shown else 0
        return Shift(
            since, until, made,
            [
                _of_model(database, name, some, days, first, last, each if name in shown else 0)
                for name, some in found.items()
            ],
            database.changes(first, last, MOST_LINES + 1, model),
            database.markers(first, last, model),
            database.last("decisions"), database.last("trail"),
        )  # fmt: skip


def _of_model(
    database: DecisionDatabase,
    name: str,
    quarters: list[tuple[int, Quarter]],
    days: list[dict[str, Quarter]],
    since: int,
    until: int,
    pictures: int,
) -> OfModel:
    of_all = Filter(model=name, since=since, until=until)
    rejects = Filter(model=name, since=since, until=until, verdict="anomaly")
    passed = Filter(model=name, since=since, until=until, verdict="normal", label="defect")
    return OfModel(
        name, _sum(quarters), quarters, days[0].get(name),
        [day[name] for day in days if name in day],
        database.judged(of_all), database.marks(rejects),
        sum(count for *_, count in database.marks(passed)),
        database.worst(rejects, pictures, MOST_BYTES, MOST_PIXELS),
    )  # fmt: skip


def _quarters(
    database: DecisionDatabase, since: datetime, until: float, model: str | None
) -> dict[str, list[tuple[int, Quarter]]]:
    found: dict[str, list[tuple[int, Quarter]]] = {}
    for name, at, quarter in database.quarters(_ms(since), round(until * 1000), model):
        found.setdefault(name, []).append((at, quarter))
    return found


def _sum(quarters: list[tuple[int, Quarter]]) -> Quarter:
    total = Quarter()
    for _, quarter in quarters:
        total += quarter
    return total


def _ms(time: datetime) -> int:
    return round(time.timestamp() * 1000)
