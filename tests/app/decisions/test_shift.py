"""The report of a shift says what the record says, on one page that loads nothing."""

from __future__ import annotations

import re
import time as clock
from collections.abc import Iterator
from datetime import datetime, time, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from app.decisions.database import DecisionDatabase, Note, open_or_make
from app.decisions.pictures import Pictures
from app.decisions.quarters import Spans
from app.decisions.shift import MOST_BYTES, MOST_LINES, MOST_PICTURES, Shift, look
from app.decisions.shift_page import overlays, shift_page
from app.decisions.words import CHANGES, REASONS, SENTENCES, Language, Words
from app.http.openapi import operations
from app.main import create_app
from app.routes.trail import LineBody
from app.settings import Settings
from engines.image import DEFAULT_LIMITS
from support.decisions import decision
from support.line import NAME, line

CATEGORY = "sample_bracket"
ZONE = ZoneInfo("Asia/Tokyo")
SPANS = Spans(ZONE, [time(6), time(14), time(22)])
BEGAN = datetime(2026, 11, 28, 6, tzinfo=ZONE)
AFTER = datetime(2026, 11, 28, 20, tzinfo=ZONE)  # when the reports are made
LOADS = re.compile(r"https?:|//\w|url\(|@import|<script|<link|<iframe|<object")


@pytest.fixture
def record(tmp_path: Path) -> Iterator[DecisionDatabase]:
    with open_or_make(tmp_path / "decisions") as database:
        yield database


def ms(after: float, days_before: int = 0) -> int:
    """So many hours after the shift of a day began."""
    moment = BEGAN - timedelta(days=days_before) + timedelta(hours=after)
    return round(moment.timestamp() * 1000)


def parts(count: int, rejects: int = 0, days_before: int = 0, **changes: Any) -> list[Any]:
    """Decisions over the whole shift of a day, the rejects first."""
    return [
        decision(**{"id": f"d{days_before}-{n}", "at": ms(8 * n / count, days_before),
                    "verdict": "anomaly" if n < rejects else "normal",
                    "score": 0.9 if n < rejects else 0.25, **changes})
        for n in range(count)
    ]  # fmt: skip


def shift_of(database: DecisionDatabase, made: datetime = AFTER, model: str | None = None) -> Shift:
    return look(database, SPANS, ms(1), made, model)


def drawn(
    database: DecisionDatabase, lang: Language = "en", made: datetime = AFTER,
    model: str | None = None,
) -> str:  # fmt: skip
    picture = "data:image/jpeg;base64,AAAA"
    return shift_page(shift_of(database, made, model), model, lambda _: picture, Words(lang), "1")


class _Seen(HTMLParser):
    """The tags of a page and its words."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] != ["style"]:
            self.words.append(data)


def tiles(page: str) -> dict[str, tuple[str, list[str]]]:
    """Name -> value and what stands below it, of the first model."""
    found = re.findall(r'<div class="tile ?\w*"><span>(.*?)</span><b>(.*?)</b>(.*?)</div>', page)
    return {name: (value, re.findall(r"<small>(.*?)</small>", small))
            for name, value, small in found[:4]}  # fmt: skip


def rows(page: str, heading: str) -> list[list[str]]:
    """The cells of the table below a heading."""
    table = re.search(rf"<h\d[^>]*>{re.escape(heading)}.*?<table.*?</table>", page, re.S)
    assert table, heading
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in table[0].split("<tr>")[1:]]
    return [row for row in cells if row]


# ---- figures ------------------------------------------------------------------------------------


def test_the_figures_are_those_of_get_statistics_and_the_worst_rejects_are_seen(
    kensa_model: Path, sample_data: Path, tmp_path: Path
) -> None:
    folder = sample_data / "test" / CATEGORY
    with line(tmp_path, kensa_model) as running:
        server = running.server
        server.client.put(
            f"/models/{NAME}/threshold", json={"threshold": 0, "reason": "<i>all</i>"}
        )
        for path in sorted(folder.rglob("*.png")):
            server.infer(path.read_bytes(), **{"X-Part": path.stem})
        server.infer(b"nothing that is a picture")
        said = server.client.get("/statistics", params={"per": "shift", "model": NAME}).json()
        answer = server.client.get("/statistics.html", params={"shift": "running", "model": NAME})
        assert answer.status_code == 200, answer.text
        page, (span,) = answer.text, said["spans"]
        whole = server.client.get("/statistics.html", params={"shift": "running"}).text
        before = server.client.get("/statistics.html").text
        _damage_a_picture(tmp_path)
        less = server.client.get("/statistics.html", params={"at": span["since"]}).text
    shown = {name: value for name, (value, _) in tiles(page).items()}
    assert shown["Parts"] == str(span["parts"])
    assert shown["Rejects"] == str(span["rejects"])
    assert shown["Reject share"] == f"{100 * span['reject_share']:.2f} %"
    assert span["parts"] - span["rejects"] in (0, 1)  # the lowest score is the limit, to rounding
    assert shown["No verdict"] == "1"
    quantiles = rows(page, "Scores and times")
    assert quantiles[0][1:] == [f"{span[f'score_{at}']:.4f}" for at in ("p50", "p95", "p99")]
    assert quantiles[1][1:] == [f"{span[f'ms_{at}']:.2f} ms" for at in ("p50", "p95", "p99")]
    (nothing,) = rows(whole, "Why there was no verdict")
    assert nothing == ["a kind of image that is not read", "1"]
    assert page.count("<img") == MOST_PICTURES < span["rejects"]
    assert less.count("<img") == MOST_PICTURES - 1
    assert "Nothing was inspected in this shift." in before
    assert "&lt;i&gt;all&lt;/i&gt;" in page
    policy = answer.headers["content-security-policy"]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert not LOADS.search(re.sub(r"base64,[\w+/=]+", "", page))


def _damage_a_picture(folder: Path) -> None:
    """The map of the most anomalous reject, which stands first."""
    import sqlite3

    with sqlite3.connect(folder / "data" / "decisions" / "decisions.sqlite") as database:
        order = "SELECT number FROM decisions WHERE verdict = 'anomaly' ORDER BY score DESC,"
        (number,) = database.execute(f"{order} raw_score DESC").fetchone()
    database.close()
    (path,) = (folder / "data" / "decisions" / "pictures").rglob(f"{number}.map")
    path.write_bytes(path.read_bytes()[:-40])


def test_a_shift_is_compared_with_the_same_one_of_the_day_before_and_of_a_week(
    record: DecisionDatabase,
) -> None:
    record.append(parts(200, 10))
    record.append(parts(100, 1, days_before=1))
    record.append(parts(300, 3, days_before=4))
    record.append(parts(999, 9, days_before=8))  # too long ago
    record.append([decision(at=ms(-1)), decision(at=ms(8)), decision(at=ms(-1, 1))])
    found = tiles(drawn(record))
    assert found["Parts"] == ("200", ["day before: 100", "mean of 2 of 7 days: 200"])
    assert found["Rejects"] == ("10", ["day before: 1", "mean of 2 of 7 days: 2"])
    assert found["Reject share"] == (
        "5.00 %",
        ["day before: 1.00 %", "mean of 2 of 7 days: 1.00 %"],
    )


def test_where_nothing_is_known_of_the_days_before_no_number_stands_for_it(
    record: DecisionDatabase,
) -> None:
    record.append(parts(20))
    for _, details in tiles(drawn(record)).values():
        assert details == ["day before: not known", "7-day mean: not known"]


def test_a_shift_that_is_running_is_compared_up_to_the_same_time(record: DecisionDatabase) -> None:
    record.append(parts(80, 0, days_before=1))
    record.append([decision(at=ms(0.5))])
    page = drawn(record, made=BEGAN + timedelta(hours=2))
    assert tiles(page)["Parts"] == ("1", ["day before: 20", "mean of 1 of 7 days: 20"])
    assert "The shift is still running: these are its figures up to 08:00." in page
    assert "still running" not in drawn(record)


def test_an_empty_shift_says_so_and_one_that_has_not_begun(record: DecisionDatabase) -> None:
    page = drawn(record)
    assert "Nothing was inspected in this shift." in page
    assert "No version, threshold, region or key was changed." in page
    assert "2026-11-28 (Sat) 06:00 – 14:00" in page
    assert "Asia/Tokyo" in page
    assert "This shift has not begun." in drawn(record, made=BEGAN - timedelta(hours=1))


def test_a_shift_without_any_verdict_says_why(record: DecisionDatabase) -> None:
    record.append(parts(3, verdict="none", code="overloaded", score=None, total_ms=None))
    page = drawn(record)
    assert tiles(page)["No verdict"][0] == "3"
    assert rows(page, "Why there was no verdict") == [["too many requests at once", "3"]]


def test_each_model_has_its_own_figures_and_one_can_be_asked_for_alone(
    record: DecisionDatabase,
) -> None:
    record.append(parts(8, 2, model="bolt") + parts(5, 1, model="nut"))
    page = drawn(record)
    overview = rows(page, "Shift report")
    assert [row[:3] for row in overview] == [["bolt", "8", "2"], ["nut", "5", "1"]]
    assert re.findall("<h2>(.*?)</h2>", page) == ["bolt", "nut", "What was changed"]
    alone = drawn(record, model="nut")
    assert re.findall("<h2>(.*?)</h2>", alone) == ["nut", "What was changed"]
    assert "Model nut alone" in alone


def test_versions_and_limits_stand_there_with_what_each_has_judged(
    record: DecisionDatabase,
) -> None:
    record.append([decision(at=ms(0.25 * n), version="0001-a", threshold=0.5) for n in range(8)])
    record.append([decision(at=ms(4 + n), version="0002-b", threshold=0.625, raw_threshold=1.75,
                            verdict="anomaly", score=0.9) for n in range(2)])  # fmt: skip
    assert rows(drawn(record), "Versions and limits that judged") == [
        ["0001-a", "06:00 – 07:45", "0.5 (1.5000)", "8", "0", "0.00 %"],
        ["0002-b", "10:00 – 11:00", "0.625 (1.7500)", "2", "2", "100.00 %"],
    ]


def test_of_decisions_that_were_pruned_the_sums_stay_and_the_page_says_so(
    record: DecisionDatabase,
) -> None:
    record.append(parts(10))
    assert "only" not in drawn(record)
    record.prune(4, "too old")
    page = drawn(record)
    assert tiles(page)["Parts"][0] == "10"
    assert "Of 10 parts of part only 6 are still in the record one by one" in page


# ---- what people said ---------------------------------------------------------------------------


def test_rejects_are_counted_by_what_people_said_of_them_and_misses_too(
    record: DecisionDatabase,
) -> None:
    record.append(parts(30, 10))
    for number, (label, kind) in enumerate(
        [("good", ""), ("good", ""), ("defect", "scratch"), ("defect", "burr"),
         ("defect", "scratch"), ("unusable", "")]
    ):  # fmt: skip
        mark(record, f"d0-{number}", label, kind)
    mark(record, "d0-20", "defect", "dent")
    found = {words: count for words, count, *_ in rows(drawn(record), "Rejects, as people")}
    assert found == {
        "False reject: good": "2", "Defect: scratch": "2", "Defect: burr": "1",
        "Picture unusable": "1", "Not marked yet": "4",
        '<b class="anomaly">Passed, but marked as a defect</b>': "1",
    }  # fmt: skip


def mark(database: DecisionDatabase, id_: str, label: Any, kind: str = "", who: str = "") -> None:
    kept = database.one(id_)
    assert kept is not None
    database.mark(kept, label, kind, who, "")


def test_what_was_changed_in_the_shift_stands_there_with_who_and_why(
    record: DecisionDatabase,
) -> None:
    def note(after: float, what: str, subject: str, reason: str = "", **details: Any) -> Note:
        return Note(ms(after), "anna", what, subject, reason, details)

    record.append([*parts(4), note(-0.5, "threshold", "part", "before"), note(2, "threshold",
                   "part", "dust", threshold=0.55, gate=False), note(2.001, "live", "part"),
                   note(3, "held", "other", "flips"), note(4, "key_added", "tablet"),
                   note(8, "live", "part", "after")])  # fmt: skip
    page = drawn(record)
    listed = rows(page, "What was changed")
    assert [(row[0], row[1], row[2], row[4], row[5]) for row in listed] == [
        ("1", "08:00:00", "threshold changed", "anna", "dust"),
        ("2", "08:00:03", "version went live", "anna", ""),
        ("3", "09:00:00", "version held back by the gate", "anna", "flips"),
        ("4", "10:00:00", "API key added", "anna", ""),
    ]
    assert listed[0][3] == "part<br><small>threshold 0.55</small>"
    assert ">1, 2</text>" in page  # in the chart, at one moment
    alone = rows(drawn(record, model="part"), "What was changed")
    assert [row[2] for row in alone] == ["threshold changed", "version went live", "API key added"]


def test_marks_are_counted_by_who_gave_them_and_a_long_trail_is_cut_in_words(
    record: DecisionDatabase,
) -> None:
    many = [Note(ms(n / 60), "", "live", "part", "", {}) for n in range(MOST_LINES + 1)]
    labels = [Note(ms(3), who, "label", "d0-1", "", {"number": 1}) for who in ("taro", "", "taro")]
    withdrawn = {"number": 1, "label": "", "defect": ""}
    labels.append(Note(ms(3), "taro", "label", "d0-1", "", withdrawn))
    record.append([*parts(2), *many, *labels])
    page = drawn(record)
    assert len(rows(page, "What was changed")) == MOST_LINES
    assert "And more, which GET /trail lists." in page
    assert "Parts were marked by: taro (2), no key (1)." in page
    other = Note(ms(3), "jiro", "label", "other", "", {"number": 3})
    record.append([decision(id="other", at=ms(2), model="other"), other])
    for model, marked_by in (("part", "taro (2), no key (1)"), ("other", "jiro (1)")):
        assert f"Parts were marked by: {marked_by}." in drawn(record, model=model)


def test_paper_can_be_held_against_the_record(record: DecisionDatabase) -> None:
    assert "kensa verify" not in drawn(record)  # which would not know the decision 0
    record.append([*parts(3), Note(ms(1), "", "live", "part", "", {})])
    (decision_number, hash_), (_, line_hash) = record.last("decisions"), record.last("trail")
    page = drawn(record)
    assert f"kensa verify --decision {decision_number} --hash {hash_}" in page
    assert line_hash in page
    assert "Shift leader, name" in page
    assert "Made 2026-11-28 20:00:00 (Asia/Tokyo)" in page


# ---- pictures -----------------------------------------------------------------------------------


def test_the_worst_are_those_with_the_highest_scores_and_models_share_the_places(
    record: DecisionDatabase,
) -> None:
    for model in ("a", "b"):
        record.append(
            [decision(id=f"{model}{n}", part=f"{model}{n}", model=model, at=ms(n / 4), score=1.0,
                      raw_score=float(n), verdict="anomaly") for n in range(20)],
            keep=lambda place, number: MOST_BYTES + 1 if place == 19 else 0 if place == 18 else 9,
        )  # fmt: skip
    shown = re.findall(r'alt="(\w+)"', drawn(record))
    assert shown == [f"{model}{n}" for model in "ab" for n in range(17, 17 - 6, -1)]
    none = shift_page(shift_of(record), None, lambda _: None, Words("en"), "1")
    assert "<img" not in none
    assert "most anomalous" not in none


def test_what_cannot_be_read_is_left_out_and_drawing_ends_in_time(tmp_path: Path) -> None:
    pictures = Pictures(tmp_path)
    draw = overlays(pictures, DEFAULT_LIMITS)
    assert draw(1) is None
    pictures.keep(1, b"no picture", None)
    path = tmp_path / "pictures" / "0" / "1.map"
    for damaged in (b"", b"no zip", b"PK\3\4" + bytes(40)):
        path.write_bytes(damaged)
        assert draw(1) is None
    late = overlays(pictures, DEFAULT_LIMITS, within_s=-1.0)
    pictures.drawn = lambda *_, **__: pytest.fail("it is late")  # type: ignore[method-assign]
    assert late(1) is None


# ---- words --------------------------------------------------------------------------------------

MARKUP = "</td><script>alert(1)</script>\"'><img src=//x onerror=y>&amp;"


def with_names(database: DecisionDatabase, name: str) -> str:
    """A page with a text from outside in each place where one can stand."""
    database.append(
        [decision(id="bad", part=name, model=name, version=name, at=ms(1), verdict="anomaly",
                  score=0.9), decision(at=ms(2), model=name, verdict="none", code=name),
         Note(ms(3), name, "threshold", name, name, {"threshold": name, name: name}),
         Note(ms(3), name, name, name, name, {})],
        keep=lambda *_: 9,
    )  # fmt: skip
    mark(database, "bad", "defect", name, name)
    return drawn(database, model=name)


def test_text_from_outside_is_never_markup(tmp_path: Path) -> None:
    pages = []
    for number, name in enumerate(("harmless", MARKUP)):
        with open_or_make(tmp_path / str(number)) as database:
            pages.append(with_names(database, name))
    plain, hostile = (_Seen(page) for page in pages)
    assert hostile.tags == plain.tags
    assert [name for name, _ in hostile.attributes] == [name for name, _ in plain.attributes]
    assert sum(words.count(MARKUP) for words in hostile.words) == sum(
        words.count("harmless") for words in plain.words
    )
    assert pages[0].count("harmless") > 12
    assert not LOADS.search(pages[0])


def test_japanese_has_every_sentence_that_english_has() -> None:
    for table in (SENTENCES, REASONS, CHANGES):
        for name, (english, japanese) in table.items():
            values = [set(re.findall(r"{(\w+)}", words)) for words in (english, japanese)]
            assert values[0] == values[1], name
            assert re.search(r"[぀-ヿ一-鿿]", japanese), name
            assert not re.search(r"[぀-ヿ一-鿿]", english), name
            assert not re.search(r"[<>&]", english + japanese), name


def test_no_english_is_left_on_a_japanese_page(record: DecisionDatabase) -> None:
    record.append(parts(9, 3), keep=lambda *_: 9)
    record.append([decision(at=ms(1), verdict="none", code=code) for code in REASONS])
    record.append([Note(ms(2), "", what, "part", "", {}) for what in CHANGES])
    mark(record, "d0-1", "defect", "")
    page = drawn(record, "ja")
    assert '<html lang="ja">' in page
    allowed = {"kensa", "verify", "--decision", "--hash", "part", "asia/tokyo", "api",
               "tensorrt", "gpu", "ms", "0001-3f9a0c41d2e8", "get", "trail"}  # fmt: skip
    words = re.findall(r"[A-Za-z][\w/-]*[A-Za-z]|--\w+", " ".join(_Seen(page).words))
    hashes = {word for word in words if re.fullmatch(r"[0-9a-f]{10,}", word)}
    assert {word.lower() for word in set(words) - hashes} <= allowed


def test_each_reason_for_no_verdict_and_each_kind_of_change_has_words() -> None:
    app = create_app(Settings(data_dir=Path("unused"), worker="off"))
    answers = operations(app.openapi())["POST /infer"]["responses"]
    codes = {
        code for answer in answers.values()
        for code in answer["content"].get("application/json", {}).get("examples", {})
    }  # fmt: skip
    before_it_is_asked = {
        "unknown_host", "bad_http", "head_too_large", "too_many_connections", "unauthorized",
        "forbidden", "foreign_origin", "bad_keys",
    }  # fmt: skip
    assert codes - before_it_is_asked <= REASONS.keys()
    told = LineBody.model_fields["what"].description or ""
    assert set(re.findall(r"\w+", told)) - {"label", "or"} == CHANGES.keys()


def test_a_day_of_a_fast_line_is_reported_in_time(record: DecisionDatabase) -> None:
    """28,800 parts: one each second of the shift."""
    for first in range(0, 28_800, 1800):
        record.append([
            decision(at=ms((first + n) / 3600), verdict="anomaly" if n % 90 == 0 else "normal")
            for n in range(1800)
        ])  # fmt: skip
    began = clock.perf_counter()
    page = drawn(record)
    assert clock.perf_counter() - began < 2
    assert tiles(page)["Parts"][0] == "28,800"
    assert len(page) < 100_000
