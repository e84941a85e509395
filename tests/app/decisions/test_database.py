"""The file of decisions: what is asked of it is looked up, not searched, however many there are."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import fields, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from app.decisions.database import FILE, DecisionDatabase, Filter, Note, open_or_make
from app.decisions.decision import FIRST_HASH, OfViews, View, hash_after
from app.decisions.verify import verify
from support.decisions import decision

ASKED: dict[str, Any] = {
    "part": "P3", "model": "m1", "version": "v2", "verdict": "anomaly", "label": "good",
    "score_from": 0.3, "score_to": 0.6, "since": 1_764_400_010_000, "until": 1_764_400_090_000,
}  # fmt: skip


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DecisionDatabase]:
    draw = random.Random(0)
    with open_or_make(tmp_path_factory.mktemp("database")) as found:
        found.append([
            decision(id=f"d{number}", part=draw.choice(["", "P1", "P2", "P3"]),
                     at=1_764_400_000_000 + draw.randrange(100_000), model=f"m{number % 3}",
                     version=f"v{number % 4}", verdict=draw.choice(["normal", "anomaly", "none"]),
                     score=draw.choice([None, draw.random()]))
            for number in range(600)
        ])  # fmt: skip
        for number in range(0, 600, 7):
            kept = found.one(f"d{number}")
            assert kept is not None
            found.mark(kept, draw.choice(["good", "unusable"]), "", "anna", "")
        yield found


def test_every_filter_finds_what_it_says_newest_first_in_pages_without_gaps(
    database: DecisionDatabase,
) -> None:
    everything = database.find(Filter(), 1000)
    assert len(everything) == 600
    names = [field.name for field in fields(Filter)]
    for several in (*combinations(names, 1), *combinations(names, 2), *combinations(names, 3)):
        asked = Filter(**{name: ASKED[name] for name in several})
        expected = [kept for kept in everything if _fits(kept, asked)]
        assert database.find(asked, 1000) == expected, asked
        paged, before = [], None
        while page := database.find(asked, 5, before):
            paged += page
            before = page[-1].number
        assert paged == expected
    times = [(kept.decision.at, kept.number) for kept in everything]
    assert times == sorted(times, reverse=True)


def _fits(kept: Any, asked: Filter) -> bool:
    one = kept.decision
    has_score = one.score is not None
    return all((
        asked.part in (None, one.part), asked.model in (None, one.model),
        asked.version in (None, one.version), asked.verdict in (None, one.verdict),
        asked.label in (None, kept.label),
        asked.score_from is None or (has_score and one.score >= asked.score_from),
        asked.score_to is None or (has_score and one.score <= asked.score_to),
        asked.since is None or one.at >= asked.since, asked.until is None or one.at < asked.until,
    ))  # fmt: skip


def test_no_question_reads_the_whole_table_or_sorts_it(database: DecisionDatabase) -> None:
    """By SQLite's own plan; only of few that have such a score all are sorted."""
    asked: list[str] = []
    database._connection.set_trace_callback(asked.append)
    for name in (field.name for field in fields(Filter)):
        database.find(Filter(**{name: ASKED[name]}), 50)
    database.find(Filter(), 50, 17)
    database.one("d3")
    database.lines(50, subject="d7")
    database.count_flips(Filter(model="m1"), "5f0c8e6c0b1d", 1.0)
    database._connection.set_trace_callback(None)
    assert len(asked) > 11
    for statement in asked:
        plan = [row[3] for row in database._connection.execute(f"EXPLAIN QUERY PLAN {statement}")]
        scans = [step for step in plan if step.startswith("SCAN") and "INDEX" not in step]
        assert all("(subquery" in step or "CONSTANT" in step for step in scans), (statement, plan)
        by_score = "decisions_by_score" in statement
        assert by_score or not any(step == "USE TEMP B-TREE FOR ORDER BY" for step in plan), (
            statement,
            plan,
        )


def test_a_pruned_record_is_whole_and_says_so_and_one_that_lost_its_beginning_does_not(
    tmp_path: Path,
) -> None:
    with open_or_make(tmp_path) as database:
        database.append([decision(id=f"d{number}") for number in range(20)])
        database.prune(8, "too old")
        database.append([decision(id="later")])
        found = verify(database)
        assert (found.problem, found.first, found.decisions) == (None, 9, 13)
        database.prune(100, "too old")
        database.append([decision(id="after all were pruned")])
        found = verify(database)
        assert (found.problem, found.first, found.decisions) == (None, 22, 1)
        database.append([decision(), decision()])
    with sqlite3.connect(tmp_path / FILE) as connection:
        connection.execute("DELETE FROM decisions WHERE number <= 22")
    connection.close()
    with DecisionDatabase(tmp_path / FILE) as database:
        assert verify(database).problem == (
            "Decision 22 is missing: 23 comes next"
            f" ({database.find(Filter(), 9)[-1].decision.id}, "
            f"{_when(database)})."
        )


def _when(database: DecisionDatabase) -> str:
    from app.decisions.verify import _time

    return _time(database.find(Filter(), 9)[-1].decision.at)


VIEWS = OfViews("A", 2, "left", (View.of("left", decision(id="r1")), View.of("top", decision())))


def record_of_before(folder: Path, count: int = 5) -> dict[int, str]:
    """A record as the Kensa without views left it; the hashes of its decisions."""
    with open_or_make(folder) as database:
        database.append([decision(id=f"d{number}") for number in range(count)])
        database.append([Note.now("live", "", "part", "", {})])
    with closing(sqlite3.connect(folder / FILE)) as connection:
        connection.execute("ALTER TABLE decisions DROP COLUMN views")
        connection.execute("PRAGMA user_version = 1")
        connection.commit()
        return dict(connection.execute("SELECT number, hash FROM decisions"))


def test_a_record_without_views_gets_them_and_keeps_its_lines_and_hashes(tmp_path: Path) -> None:
    before = record_of_before(tmp_path)
    with open_or_make(tmp_path) as database:
        assert verify(database).problem is None
        assert {number: hash_ for number, _, hash_ in database.rows("decisions")} == before
        database.append([decision(id="viewed", views=VIEWS.text())])
        assert verify(database).problem is None
        assert [kept.decision.views for kept in database.find(Filter(), 9)] == [
            VIEWS.text(), *[""] * 5,
        ]  # fmt: skip
    with open_or_make(tmp_path) as database:  # which is not changed again
        assert verify(database).decisions == 6


def test_a_record_without_views_is_verified_as_it_is(tmp_path: Path) -> None:
    """As of a copy, or of a machine whose Kensa was updated and has not started yet."""
    record_of_before(tmp_path)
    whole = (tmp_path / FILE).read_bytes()
    with DecisionDatabase(tmp_path / FILE) as database:
        found = verify(database)
        assert (found.problem, found.decisions) == (None, 5)
    assert (tmp_path / FILE).read_bytes() == whole


def test_a_damaged_record_without_views_is_taken_over(tmp_path: Path) -> None:
    before = record_of_before(tmp_path, 500)
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[: len(whole) * 3 // 4 // 4096 * 4096])  # whole pages
    with open_or_make(tmp_path) as database:
        assert [line.what for line in database.lines(1)] == ["repair"]
        rows = list(database.rows("decisions"))
        assert len(rows) > 100
        assert all(before[number] == hash_ for number, _, hash_ in rows)
        assert {content["views"] for _, content, _ in rows} == {""}


def test_a_record_of_a_later_kensa_is_left_alone(tmp_path: Path) -> None:
    record_of_before(tmp_path)
    with closing(sqlite3.connect(tmp_path / FILE)) as connection:
        connection.execute("PRAGMA user_version = 99")
        connection.commit()
    with pytest.raises(sqlite3.DatabaseError, match="of another Kensa"):
        open_or_make(tmp_path)


def test_what_was_said_of_a_view_cannot_be_changed_unseen(tmp_path: Path) -> None:
    with open_or_make(tmp_path) as database:
        database.append([decision(), decision(id="viewed", views=VIEWS.text())])
    for changed in ("", VIEWS.text().replace("normal", "anomaly", 1)):
        shutil.copytree(tmp_path, tmp_path / "copy")
        with closing(sqlite3.connect(tmp_path / "copy" / FILE)) as connection:
            connection.execute("UPDATE decisions SET views = ? WHERE number = 2", [changed])
            connection.commit()
        with DecisionDatabase(tmp_path / "copy" / FILE) as database:
            assert str(verify(database).problem).startswith("Decision 2 was changed (viewed")
        shutil.rmtree(tmp_path / "copy")


def test_the_hash_of_a_line_without_views_is_that_of_before_there_were_any() -> None:
    values = decision(part="検査 7").values()
    assert values.pop("views") == ""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    before = hashlib.sha256(f"{FIRST_HASH}\n{text}".encode()).hexdigest()
    assert hash_after(FIRST_HASH, {**values, "views": ""}) == before
    assert hash_after(FIRST_HASH, {**values, "views": VIEWS.text()}) != before


def test_views_are_read_as_they_were_written() -> None:
    assert OfViews.read(VIEWS.text()) == VIEWS
    assert OfViews.read("") is None
    assert VIEWS.view("top") == VIEWS.views[1]
    assert VIEWS.view("rear") is None


def test_two_processes_that_write_make_one_chain(tmp_path: Path) -> None:
    """As `kensa keys` does beside a server."""
    with open_or_make(tmp_path) as one, open_or_make(tmp_path) as other:
        for number in range(10):
            one.append([decision(id=f"d{number}")])
            other.append([Note.now("key_added", "", f"k{number}", "", {})])
        found = verify(one)
    assert (found.problem, found.decisions, found.lines) == (None, 10, 10)


def test_what_cannot_be_written_leaves_nothing_half(tmp_path: Path) -> None:
    with open_or_make(tmp_path) as database:
        database.append([decision(id="before")])

        def full(place: int, number: int) -> int:
            if place == 2:
                raise OSError(28, "No space left on device")
            return 100

        with pytest.raises(OSError, match="No space"):
            database.append([decision(), decision(), decision()], full)
        assert [kept.decision.id for kept in database.find(Filter(), 10)] == ["before"]
        database.append([replace(decision(), id="after")])
        assert verify(database).problem is None


def test_a_record_whose_repair_is_killed_at_its_end_is_whole_after_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next start would begin an empty one."""
    with open_or_make(tmp_path) as database:
        database.append([decision() for _ in range(50)])
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes()[:-5000])
    rename = Path.rename

    def killed_once_away(source: Path, target: Path) -> Path:
        rename(source, target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed_once_away)
        with pytest.raises(KeyboardInterrupt):
            open_or_make(tmp_path)
    assert not path.exists()
    with open_or_make(tmp_path) as database:
        assert len(database.find(Filter(), 100)) > 0
        assert [line.what for line in database.lines(10)] == ["repair"]
        aside = database.lines(1)[0].details["aside"]
    assert (tmp_path / aside).exists()
