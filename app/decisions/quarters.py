"""`Quarter`: what was decided within a quarter of an hour, in numbers that can be added up.

They are kept when decisions are pruned. Quantiles come from histograms: of scores in steps of
0.005, of times in steps of a tenth.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, time, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from app.decisions.decision import Decision

MS = 900_000  # of a quarter of an hour
SCORES = 200  # steps of the scores from 0 to 1
_RATIO = math.log(1.1)  # of one step of the times to the next


@dataclass
class Quarter:
    """Sums of decisions of one model; of a quarter of an hour, or of several."""

    parts: int = 0  # that got a verdict by a usable picture
    rejects: int = 0
    unusable: Counter[str] = field(default_factory=Counter)  # pictures, by the reason; no parts
    none: Counter[str] = field(default_factory=Counter)  # without a verdict, by the reason
    scores: Counter[int] = field(default_factory=Counter)  # step -> parts
    times: Counter[int] = field(default_factory=Counter)

    def add(self, one: Decision) -> None:
        if one.verdict == "none":
            self.none[one.code] += 1
            return
        if one.verdict == "unusable":
            self.unusable[one.code] += 1
            return
        self.parts += 1
        self.rejects += one.verdict == "anomaly"
        if one.score is not None:
            self.scores[min(int(one.score * SCORES), SCORES - 1)] += 1
        if one.total_ms is not None:
            self.times[math.floor(math.log(max(one.total_ms, 0.1)) / _RATIO)] += 1

    def __iadd__(self, other: Quarter) -> Quarter:
        self.parts += other.parts
        self.rejects += other.rejects
        for mine, theirs in ((self.unusable, other.unusable), (self.none, other.none),
                             (self.scores, other.scores), (self.times, other.times)):  # fmt: skip
            mine.update(theirs)  # type: ignore[arg-type]  # of like counters
        return self

    def score_at(self, share: float) -> float | None:
        """The score that so many parts do not exceed, to half a step; None without parts."""
        step = _step(self.scores, share)
        return None if step is None else round((step + 0.5) / SCORES, 4)

    def ms_at(self, share: float) -> float | None:
        """The milliseconds within which so many parts had their verdict, to half a step."""
        step = _step(self.times, share)
        return None if step is None else round(math.exp((step + 0.5) * _RATIO), 2)

    def content(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {name: dict(one) if isinstance(one, Counter) else one
                for name, one in vars(self).items()}  # fmt: skip

    @classmethod
    def of(cls, content: dict[str, Any]) -> Quarter:
        scores, times = (
            Counter({int(step): count for step, count in content[name].items()})
            for name in ("scores", "times")
        )
        unusable = Counter(content.get("unusable", {}))  # which an older Kensa did not know
        none = Counter(content["none"])
        return cls(content["parts"], content["rejects"], unusable, none, scores, times)


def _step(counts: Counter[int], share: float) -> int | None:
    wanted, seen = share * counts.total(), 0
    for step in sorted(counts):
        seen += counts[step]
        if seen >= wanted:
            return step
    return None


def of_batch(decisions: Iterable[Decision]) -> dict[tuple[str, int], Quarter]:
    """The sums of some decisions: (model, when the quarter began) -> them."""
    found: dict[tuple[str, int], Quarter] = {}
    for one in decisions:
        # Clients may ask for any text, and quarters are kept for ever.
        model = "" if one.code == "unknown_model" else one.model
        found.setdefault((model, one.at // MS * MS), Quarter()).add(one)
    return found


class Spans:
    """Hours, days, or shifts, which begin at the same times every day; whatever the clock does."""

    def __init__(self, zone: ZoneInfo, begins: list[time]) -> None:
        """`begins`: when a span begins, each day."""
        self._zone, self._begins = zone, sorted(begins)

    def around(self, at: int) -> tuple[datetime, datetime]:
        """When the span of a moment, milliseconds since 1970, began and when it ends."""
        moment = datetime.fromtimestamp(at / 1000, self._zone)
        found = [
            datetime.combine(moment.date() + timedelta(days=days), begin, self._zone)
            for days in (-1, 0, 1)
            for begin in self._begins
        ]
        # Compared by their moments: twice a year two clocks times are one, or none.
        passed = [one for one in reversed(found) if one.timestamp() <= moment.timestamp()]
        to_come = [one for one in found if one.timestamp() > moment.timestamp()]
        began, ends = max(passed, key=datetime.timestamp), min(to_come, key=datetime.timestamp)
        return began, ends

    def days_before(self, began: datetime, days: int) -> tuple[datetime, datetime]:
        """The span of so many days before that begins at the same time of the day."""
        # Within a zone, Python counts by what clocks show: a day may have 23 or 25 hours.
        return self.around(round((began - timedelta(days=days)).timestamp() * 1000))
