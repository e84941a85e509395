"""Statistics are sums of what was decided, whatever was pruned since and wherever a day begins."""

from __future__ import annotations

import random
from datetime import datetime, time, timezone
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
import pytest

from app.decisions.database import Filter, open_or_make
from app.decisions.quarters import MS, Quarter, Spans
from support.decisions import decision

TOKYO, BERLIN = ZoneInfo("Asia/Tokyo"), ZoneInfo("Europe/Berlin")
SHIFTS = [time(6), time(14), time(22)]


def ms(*when: int, zone: ZoneInfo | timezone = timezone.utc) -> int:
    return round(datetime(*when, tzinfo=zone).timestamp() * 1000)  # type: ignore[arg-type,misc]


def test_quantiles_are_those_of_all_parts_to_half_a_step() -> None:
    draw = random.Random(0)
    scores = [min(max(draw.gauss(0.3, 0.1), 0), 1) for _ in range(5000)]
    times = [draw.lognormvariate(3, 0.4) for _ in scores]
    total = Quarter()
    for score, taken in zip(scores, times, strict=True):
        total.add(decision(score=score, total_ms=taken))
    for share in (0.5, 0.95, 0.99):
        score, taken = total.score_at(share), total.ms_at(share)
        assert score == pytest.approx(np.quantile(scores, share), abs=0.005)
        assert taken == pytest.approx(np.quantile(times, share), rel=0.06)
    assert (Quarter().score_at(0.5), Quarter().ms_at(0.5)) == (None, None)


def test_what_is_written_in_batches_is_summed_by_model_and_quarter_and_stays_when_pruned(
    tmp_path: Path,
) -> None:
    begin = ms(2026, 11, 29, 6)
    with open_or_make(tmp_path) as database:
        for batch in range(4):
            database.append([
                decision(at=begin + (batch * 10 + n) * 60_000, model="ab"[n % 2],
                         verdict="anomaly" if n == 0 else "normal")
                for n in range(10)
            ])  # fmt: skip
        none = decision(at=begin, model="a", verdict="none", code="overloaded", score=None,
                        total_ms=None)  # fmt: skip
        database.append([none])
        before = list(database.quarters(begin, begin + 4 * MS))
        database.prune(30, "as this test needs it")
        assert list(database.quarters(begin, begin + 4 * MS)) == before
        assert len(database.find(Filter(), 100)) == 11
    assert [(name, at - begin) for name, at, _ in before][:4] == [
        ("a", 0), ("b", 0), ("a", MS), ("b", MS),
    ]  # fmt: skip
    of_a = Quarter()
    for name, _, quarter in before:
        if name == "a":
            of_a += quarter
    assert (of_a.parts, of_a.rejects, dict(of_a.none)) == (20, 4, {"overloaded": 1})


@pytest.mark.parametrize(
    ("moment", "since", "until"),
    [
        (ms(2026, 11, 29, 6, zone=TOKYO), (29, 6), (29, 14)),
        (ms(2026, 11, 29, 5, 59, zone=TOKYO), (28, 22), (29, 6)),
        (ms(2026, 11, 29, 23, 30, zone=TOKYO), (29, 22), (30, 6)),
    ],
)
def test_a_shift_may_begin_on_the_day_before(
    moment: int, since: tuple[int, int], until: tuple[int, int]
) -> None:
    began, ends = Spans(TOKYO, SHIFTS).around(moment)
    assert ((began.day, began.hour), (ends.day, ends.hour)) == (since, until)


def test_when_clocks_are_changed_a_shift_is_an_hour_longer_or_shorter_and_nothing_is_lost() -> None:
    spans = Spans(BERLIN, SHIFTS)
    for day, hours in ((datetime(2026, 10, 25), 9), (datetime(2026, 3, 29), 7)):
        began, ends = spans.around(ms(day.year, day.month, day.day, 1))
        assert (began.hour, ends.hour) == (22, 6)
        assert (ends.timestamp() - began.timestamp()) / 3600 == hours
        moment = round(began.timestamp() * 1000)
        while moment < ends.timestamp() * 1000:
            assert spans.around(moment) == (began, ends)
            moment += MS
        assert spans.around(moment)[0] == ends


@pytest.mark.parametrize("day", [datetime(2026, 10, 25), datetime(2026, 3, 29)])
def test_no_two_shifts_overlap_where_one_begins_at_a_time_that_clocks_leave_out(
    day: datetime,
) -> None:
    """Parts would be counted twice."""
    spans = Spans(BERLIN, [time(2, 15), time(3), time(14)])
    moment = ms(day.year, day.month, day.day, 0)
    last = spans.around(moment)
    for _ in range(40):
        moment += MS
        began, ends = spans.around(moment)
        assert began.timestamp() * 1000 <= moment < ends.timestamp() * 1000
        assert (began, ends) == last or began.timestamp() == last[1].timestamp()
        last = began, ends
