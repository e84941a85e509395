"""Claims about the page Find, and about a decision with all that is known of it."""

from __future__ import annotations

import csv
import hashlib
import io
import time
import zipfile
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import cv2
import numpy as np
import pytest

from app.decisions.decision import Decision, OfViews, View
from app.http.keys import add_key
from support.browser import Shown, shown
from support.decisions import decision, write_record
from support.server import Server, serving

COUNT = 10_000
EVERY_MS = 10_000  # a part each: 10,000 of them are a day and four hours
PART = "KB-2046/A 17"
MARKUP = "<img src=x onerror=\"document.title='broken'\"><b>bold</b>"
KIND = "<u>scratch</u>"
REASON = "<script>document.title='broken'</script>"
VERSION = "0007-3f9a0c41d2e8"
MOST_ROWS = 40  # in the page at once, however many there are
MOST_CPU_MS = 30  # of a frame while the list is scrolled fast; other tests run beside it

# Scrolls down until the end: how long frames took, and whether a part of the list was not drawn.
SCROLL = """async ([step, most]) => {
  const list = document.querySelector('.found');
  const isMore = () => document.querySelector('.head [role=status]').innerText.includes('+');
  const frames = [], places = new Set();
  let [rows, gaps, before, at] = [0, 0, performance.now(), -1];
  while (frames.length < most && (scrollY > at || isMore())) {
    if (frames.length) [at] = [scrollY, scrollBy(0, step)];
    await new Promise(requestAnimationFrame);
    frames.push(performance.now() - before);
    before = performance.now();
    const drawn = [...list.children].map((row) => row.getBoundingClientRect());
    const box = list.getBoundingClientRect();
    const above = Math.min(...drawn.map((row) => row.top)) <= Math.max(0, box.top) + 1;
    const below = Math.max(...drawn.map((row) => row.bottom));
    if (!above || below < Math.min(innerHeight, box.bottom) - 1) gaps += 1;
    rows = Math.max(rows, drawn.length);
    for (const row of list.children) places.add(Number(row.dataset.at));
  }
  frames.sort((one, other) => one - other);
  const of = (share) => frames[Math.floor(frames.length * share)];
  return { frames: frames.length, p50: of(0.5), p95: of(0.95), rows, gaps,
    places: places.size, last: Math.max(...places) };
}"""


def picture(seed: int = 0) -> bytes:
    """A PNG of 320 x 240 pixels, of a part in its middle."""
    pixels = np.full((240, 320, 3), 40 + seed % 40, np.uint8)
    cv2.circle(pixels, (160, 120), 80, (170, 180, 190), -1)
    cv2.putText(pixels, str(seed), (120, 130), cv2.FONT_HERSHEY_SIMPLEX, 1, (30, 30, 30), 2)
    return bytes(cv2.imencode(".png", pixels)[1])


def a_day(now: int) -> list[Decision]:
    """Every seventeenth part is a reject, every fifth has no name, one is of several views."""
    found = []
    for place in range(COUNT):
        is_reject = place % 17 == 0
        score = 0.5 + place % 49 / 100 if is_reject else 0.1 + place % 37 / 100
        found.append(decision(
            id=f"line-3.{place}", part=f"P-{place:05d}" if place % 5 else "", model="bracket",
            version=VERSION, at=now - (COUNT - place) * EVERY_MS,
            verdict="anomaly" if is_reject else "normal", score=score, raw_score=3 * score,
        ))  # fmt: skip
    newest = [
        decision(id="no-verdict", model=MARKUP[:64], version="", verdict="none", score=None,
                 raw_score=None, threshold=None, raw_threshold=None, code="unknown_model"),
        decision(id="dark", part="dark", model="bracket", version=VERSION, verdict="unusable",
                 code="camera_dark"),
        decision(id="markup", part=MARKUP, model="bracket", version=VERSION, verdict="anomaly",
                 score=0.91, raw_score=2.73, who="plc-3"),
        of_views(),
    ]  # fmt: skip
    times = range(now - len(newest) * 1000, now, 1000)
    return found + [one_at(one, at) for one, at in zip(newest, times, strict=True)]


def one_at(one: Decision, at: int) -> Decision:
    return Decision(**{**one.values(), "at": at})


def of_views() -> Decision:
    each = {
        "left": decision(verdict="anomaly", score=0.8, raw_score=2.4, model="bracket"),
        "top": decision(score=0.3, raw_score=0.9, model="bracket"),
    }
    views = OfViews("", 2, "left", tuple(View.of(name, one) for name, one in each.items()))
    return decision(
        id="views", part="of two views", model="bracket", version=VERSION, verdict="anomaly",
        score=0.8, raw_score=2.4, views=views.text(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def day() -> list[Decision]:
    return a_day(round(datetime.now(timezone.utc).timestamp() * 1000))


@pytest.fixture(scope="module")
def line(
    kensa_model: Path,
    sample_data: Path,
    day: list[Decision],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    """With 10,000 parts in its record, and three of now, which its model judged."""
    folder = tmp_path_factory.mktemp("find")
    names = {"markup", "dark", "views", *(one.id for one in day[9_000:9_990:33])}
    write_record(folder / "data", day, lambda one: picture(one.at) if one.id in names else None)
    with serving(
        folder,
        KENSA_MODEL_DIR=str(kensa_model),
        KENSA_MODEL_NAME="bracket",
        KENSA_RECORD_SAMPLE="1",
    ) as found:
        images = sorted((sample_data / "test").rglob("*.png"))[:3]
        for path in images:
            answer = found.client.post(
                "/infer", params={"part": PART}, content=path.read_bytes(),
                headers={"Content-Type": "image/png"},
            )  # fmt: skip
            assert answer.is_success
        yield found


@pytest.fixture
def page(browser: Any, line: Server) -> Iterator[Shown]:
    # Whether the picture of a view is kept, only its 404 tells.
    with shown(browser, line.url, refused=True) as found:
        found.go("#/find")
        found.page.wait_for_selector(".found li")
        yield found


def found_count(it: Shown) -> str:
    """What is said of how many there are, once the page has looked."""
    it.page.wait_for_selector(".found:not(.old), .empty")
    return str(it.page.locator(".head [role=status]").inner_text())


def expect_count(it: Shown, text: str) -> None:
    it.page.locator(".head [role=status]", has_text=text).wait_for()


def names(it: Shown) -> list[str]:
    return list(it.page.locator(".found .what b").all_inner_texts())


def asked(it: Shown) -> dict[str, str]:
    """The filter in the address."""
    query = parse_qs(urlsplit(urlsplit(it.page.url).fragment).query)
    return {name: values[0] for name, values in query.items()}


def until(it: Shown, claim: str, within_s: float = 20) -> None:
    """Wait until a claim in JavaScript holds; Playwright's own way needs eval, which is barred."""
    end = time.monotonic() + within_s
    while not it.page.evaluate(claim):
        assert time.monotonic() < end, claim
        it.page.wait_for_timeout(50)


def look_for(it: Shown, part: str) -> None:
    it.page.get_by_label("Part", exact=True).fill(part)
    it.page.keyboard.press("Enter")


# ---- what is found -------------------------------------------------------------------------------


def test_a_part_is_found_by_its_whole_name(page: Shown) -> None:
    look_for(page, PART)
    expect_count(page, "3 found")
    assert names(page) == [PART] * 3
    assert asked(page) == {"part": PART}
    page.page.reload()  # as whoever is sent the address
    expect_count(page, "3 found")
    look_for(page, "KB-2046")
    page.expect("No part is called exactly “KB-2046”")
    page.page.get_by_role("button", name="Clear all").first.click()
    expect_count(page, "+ found")


def test_parts_are_found_by_time(page: Shown, day: list[Decision]) -> None:
    # 396 or 402 parts, by the seconds that the fields leave out: what comes at once, at most 500.
    until, since = (datetime.fromtimestamp(day[n].at / 1000, timezone.utc) for n in (9_400, 9_000))
    page.page.get_by_label("From", exact=True).fill(f"{since:%Y-%m-%dT%H:%M}")
    page.page.get_by_label("Until", exact=True).fill(f"{until:%Y-%m-%dT%H:%M}")
    begin, end = (one.replace(second=0, microsecond=0).timestamp() * 1000 for one in (since, until))
    expect_count(page, f"{sum(begin <= one.at < end for one in day)} found")


@pytest.mark.parametrize(
    ("words", "hours"), [("Last hour", 1), ("This shift", 8), ("Today", 24), ("7 days", 168)]
)
def test_times_that_are_asked_for_most_are_a_touch_away(
    page: Shown, words: str, hours: int
) -> None:
    page.page.get_by_role("button", name=words).click()
    until(page, "location.hash.includes('since=')")
    since = datetime.fromisoformat(asked(page)["since"].replace("Z", "+00:00"))
    ago = datetime.now(timezone.utc) - since
    assert ago.total_seconds() <= hours * 3600 + 120
    if words not in ("This shift", "Today"):
        assert ago.total_seconds() >= hours * 3600 - 1
    page.page.get_by_role("button", name="Any time").click()
    until(page, "!location.hash.includes('since=')")


def test_the_running_shift_is_the_servers(line: Server, page: Shown) -> None:
    shift = line.client.get("/statistics", params={"per": "shift"}).json()["shift"]
    page.page.get_by_role("button", name="This shift").click()
    until(page, "location.hash.includes('since=')")
    assert asked(page)["since"] == shift["since"]


def test_parts_are_found_by_verdict_score_label_model_and_version(
    page: Shown, line: Server, day: list[Decision]
) -> None:
    page.page.get_by_label("Verdict").select_option("NG")
    page.page.get_by_label("Score from").fill("0.6")
    page.page.get_by_label("Score up to").fill("0.7")
    page.page.get_by_label("Version").fill(VERSION)
    page.page.keyboard.press("Enter")
    fitting = [
        one for one in day
        if one.verdict == "anomaly" and one.score and 0.6 <= one.score <= 0.7
    ]  # fmt: skip
    expect_count(page, f"{len(fitting)} found")
    line.client.post("/decisions/line-3.17/label", json={"label": "defect", "defect": "dent"})
    page.page.get_by_role("button", name="Clear all").click()
    page.page.get_by_label("Model").select_option("bracket")
    page.page.get_by_label("Marked as").select_option("defect")
    expect_count(page, "1 found")
    page.expect("defect: dent")
    assert asked(page) == {"model": "bracket", "label": "defect"}
    page.page.get_by_label("Verdict").select_option("Unusable")
    page.expect("Nothing found")


def test_without_a_verdict_it_is_said_why(page: Shown) -> None:
    page.page.get_by_label("Verdict").select_option("No verdict")
    expect_count(page, "1 found")
    page.expect("There is no such model.")


def test_an_address_that_asks_for_nonsense_is_answered_in_words(browser: Any, line: Server) -> None:
    with shown(browser, line.url, refused=True) as it:
        it.go("#/find?verdict=perhaps&since=yesterday")
        it.page.locator("main .problem").wait_for()
        it.page.get_by_role("button", name="Clear all").click()
        it.page.wait_for_selector(".found li")


# ---- ten thousand --------------------------------------------------------------------------------


def scrolled(it: Shown, step: int, frames: int = 20_000) -> dict[str, float]:
    """Scroll by so many pixels a frame. `cpu`: ms of the page's own thread for each frame."""
    session = it.page.context.new_cdp_session(it.page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})

    def worked() -> float:
        metrics = session.send("Performance.getMetrics")["metrics"]
        return next(float(one["value"]) for one in metrics if one["name"] == "TaskDuration")

    before = worked()
    found: dict[str, float] = it.page.evaluate(SCROLL, [step, frames])
    return {**found, "cpu": (worked() - before) * 1000 / found["frames"]}


@pytest.mark.parametrize("look", ["list", "grid"])
def test_ten_thousand_scroll_by_without_a_gap(
    page: Shown, day: list[Decision], look: str, record_property: Any
) -> None:
    page.go(f"#/find?look={look}")
    page.page.wait_for_selector(f".found.{look} li")
    fast = scrolled(page, 100, 200)  # 6,000 pixels a second
    for name, value in fast.items():
        record_property(f"{look} {name}", value)
    print(f"{look}: {fast}")
    assert fast["cpu"] < MOST_CPU_MS
    page.page.evaluate("scrollTo(0, 0)")
    whole = scrolled(page, 1000)
    assert whole["gaps"] == 0
    assert whole["rows"] <= MOST_ROWS * (1 if look == "list" else 1.5)
    assert whole["places"] == whole["last"] + 1 == len(day) + 3
    expect_count(page, f"{len(day) + 3:,} found")
    assert page.page.evaluate("document.querySelectorAll('*').length") < 3000


def test_far_down_parts_come_with_their_pictures(page: Shown, day: list[Decision]) -> None:
    since = datetime.fromtimestamp(day[9_496].at / 1000, timezone.utc)
    page.go(f"#/find?until={quote(since.isoformat())}")
    until(page, "!document.querySelector('.found.old')")
    page.page.evaluate("scrollTo(0, 68 * 200)")
    page.page.wait_for_selector(".found .thumbnail img")
    assert page.page.evaluate("document.querySelector('.found .thumbnail img').naturalWidth") > 0


# ---- files ---------------------------------------------------------------------------------------


def test_what_is_found_is_downloaded_as_a_table(page: Shown, day: list[Decision]) -> None:
    page.go("#/find?verdict=anomaly&min_score=0.9")
    count = sum(one.verdict == "anomaly" and (one.score or 0) >= 0.9 for one in day)
    expect_count(page, f"{count}")
    with page.page.expect_download() as waiting:
        page.page.get_by_role("button", name="CSV file").click()
    assert waiting.value.suggested_filename == "decisions.csv"
    rows = list(csv.DictReader(io.StringIO(Path(waiting.value.path()).read_text())))
    assert len(rows) >= count > 10
    assert all(row["verdict"] == "anomaly" and float(row["score"]) >= 0.9 for row in rows)


def test_the_evidence_of_a_part_is_downloaded(page: Shown) -> None:
    look_for(page, PART)
    expect_count(page, "3 found")
    page.page.locator(".found a").first.click()
    with page.page.expect_download() as waiting:
        page.page.get_by_role("button", name="Evidence (zip)").click()
    with zipfile.ZipFile(waiting.value.path()) as evidence:
        listed = [line.split("  ", 1) for line in evidence.read("sha256.txt").decode().splitlines()]
        assert len(listed) > 6  # three records, pictures and overlays
        for digest, name in listed:
            assert hashlib.sha256(evidence.read(name)).hexdigest() == digest


# ---- a decision ----------------------------------------------------------------------------------


def open_first(it: Shown, part: str) -> Any:
    look_for(it, part)
    it.page.locator(".found:not(.old) li:first-child b", has_text=part).click()
    return it.page.get_by_role("dialog")


def test_a_decision_has_an_address_and_the_way_back_closes_it(page: Shown, line: Server) -> None:
    dialog = open_first(page, "of two views")
    dialog.get_by_text("2 views").wait_for()
    address = page.page.url
    assert asked(page)["id"] == "views"
    page.page.go_back()
    dialog.wait_for(state="detached")
    assert asked(page) == {"part": "of two views"}
    page.page.goto("about:blank")
    page.page.goto(address)
    dialog.get_by_text("0.8000").wait_for()
    dialog.get_by_role("button", name="Close", exact=True).click()
    dialog.wait_for(state="detached")
    page.page.wait_for_url(lambda address: "id=" not in address)  # the browser goes back for it
    assert asked(page) == {"part": "of two views"}
    page.page.goto("about:blank")
    page.go("#/find?id=line-3.17&number=18")  # long before the first page of the list
    dialog.get_by_text("line-3.17").first.wait_for()


def test_a_decision_that_is_not_there_is_said_so(browser: Any, line: Server) -> None:
    with shown(browser, line.url, refused=True) as it:
        it.go("#/find?id=never")
        it.page.get_by_role("dialog").get_by_text("It is not in the record.").wait_for()


def test_each_view_is_looked_at_by_itself(page: Shown) -> None:
    dialog = open_first(page, "of two views")
    left, top = (dialog.get_by_role("radio", name=name) for name in ("left", "top"))
    left.locator("small", has_text="decides").wait_for()
    dialog.locator(".scores", has_text="0.8000").wait_for()
    top.click()
    dialog.locator(".scores", has_text="0.3000").wait_for()
    assert [one.get_attribute("aria-checked") for one in (left, top)] == ["false", "true"]


def test_hash_and_numbers_are_those_of_the_record(page: Shown, line: Server) -> None:
    dialog = open_first(page, PART)
    body = line.client.get(f"/decisions/{asked(page)['id']}").json()
    for text in (body["hash"], body["sha256"], body["version"], f"{body['raw_score']:.4f}"):
        dialog.get_by_text(text).first.wait_for()
    assert dialog.get_by_role("link", name=body["version"]).get_attribute("href") == (
        f"#/model?name=bracket&version={body['version']}"
    )
    assert dialog.locator(".same li").count() == 2


def test_a_picture_is_looked_into(page: Shown) -> None:
    dialog = open_first(page, PART)
    dialog.locator(".viewer img").nth(1).wait_for()
    box, moved = dialog.locator(".viewer .box"), dialog.locator(".viewer .moved")

    def scale() -> float:
        found = moved.evaluate("(one) => new DOMMatrix(getComputedStyle(one).transform).a")
        return float(found)

    box.focus()
    page.page.keyboard.press("+")
    assert scale() == pytest.approx(1.4)
    page.page.keyboard.press("0")
    assert scale() == 1
    box.hover()
    page.page.mouse.wheel(0, -300)
    until(
        page,
        "new DOMMatrix(getComputedStyle(document.querySelector('.viewer .moved')).transform).a > 1",
    )
    dialog.get_by_role("button", name="Whole picture").click()
    assert scale() == 1
    over = dialog.locator(".viewer .moved > div")
    assert float(over.evaluate("(one) => getComputedStyle(one).opacity")) == pytest.approx(0.7)
    dialog.get_by_role("slider", name="Heat map").fill("0.2")
    assert float(over.evaluate("(one) => getComputedStyle(one).opacity")) == pytest.approx(0.2)


def test_two_fingers_bring_a_picture_closer(browser: Any, line: Server) -> None:
    with shown(browser, line.url, size="tablet", refused=True) as it:
        it.go("#/find?id=views")
        it.page.locator(".viewer img").first.wait_for()
        box = it.page.locator(".viewer .box").bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        touch = it.page.context.new_cdp_session(it.page)

        def fingers(kind: str, apart: float) -> None:
            points = [{"x": x + side * apart, "y": y, "id": n} for n, side in enumerate((-1, 1))]
            touch.send(
                "Input.dispatchTouchEvent",
                {"type": kind, "touchPoints": [] if kind == "touchEnd" else points},
            )

        fingers("touchStart", 40)
        for apart in (60, 80, 100, 120):
            fingers("touchMove", apart)
        fingers("touchEnd", 0)
        scale = it.page.locator(".viewer .moved").evaluate(
            "(one) => new DOMMatrix(getComputedStyle(one).transform).a"
        )
        assert scale == pytest.approx(3, rel=0.1)


def test_an_operator_marks_a_part_and_takes_it_back(page: Shown, line: Server) -> None:
    dialog = open_first(page, "P-09996")
    dialog.get_by_text("Kind of defect, reason").click()
    dialog.get_by_label("Kind of defect, such as scratch").fill("dent")
    dialog.get_by_label("Why? (if you like)").fill("seen by eye")
    dialog.get_by_role("button", name="defect", exact=True).click()
    dialog.locator(".history", has_text="seen by eye").wait_for()
    body = line.client.get("/decisions/line-3.9996").json()
    assert (body["label"], body["defect"]) == ("defect", "dent")
    dialog.get_by_role("button", name="Withdraw").click()
    dialog.locator(".history", has_text="withdrawn").wait_for()
    assert line.client.get("/decisions/line-3.9996").json()["label"] is None
    dialog.get_by_role("button", name="good", exact=True).click()
    dialog.locator(".marking .mark.good").wait_for()
    dialog.get_by_role("button", name="Close", exact=True).click()
    page.page.locator(".found .mark.good").wait_for()


def test_a_picture_is_judged_again_to_the_same_digit(page: Shown) -> None:
    dialog = open_first(page, PART)
    dialog.get_by_role("button", name="Judge", exact=True).click()
    dialog.get_by_text("as then, to the last digit").wait_for()


def test_a_picture_is_deleted_for_a_reason(page: Shown, line: Server, day: list[Decision]) -> None:
    dialog = open_first(page, day[9_033].part)
    dialog.locator(".viewer img").first.wait_for()
    dialog.get_by_role("button", name="Delete picture").click()
    question = page.page.get_by_role("dialog", name="Delete this picture for ever?")
    assert question.get_by_role("button", name="Delete picture").is_disabled()
    question.get_by_label("Why?").fill("a person is in it")
    question.get_by_role("button", name="Delete picture").click()
    dialog.locator(".history", has_text="a person is in it").wait_for()
    dialog.locator(".viewer", has_text="no picture kept").wait_for()
    page.expect("The picture is deleted.")  # above the window, where it can be seen
    assert line.client.get(f"/decisions/{day[9_033].id}/image").status_code == 404


def test_what_people_and_clients_write_is_never_markup(page: Shown, line: Server) -> None:
    mark = {"label": "defect", "defect": KIND, "reason": REASON}
    assert line.client.post("/decisions/markup/label", json=mark).is_success
    page.page.get_by_role("button", name="Last hour").click()
    page.page.locator(".found .what b", has_text=MARKUP).wait_for()
    page.page.locator(".found .what small", has_text=MARKUP[:64]).wait_for()
    page.page.locator(".found .mark", has_text=KIND).wait_for()
    dialog = open_first(page, MARKUP)
    dialog.get_by_role("heading", name=MARKUP).wait_for()
    dialog.locator(".history q", has_text=REASON).wait_for()
    dialog.locator(".history .mark", has_text=KIND).wait_for()
    look = "document.querySelectorAll('main b b, main .mark u, main q *, img[src=x]').length"
    assert page.page.evaluate(look) == 0
    assert "broken" not in page.page.title()
    page.page.keyboard.press("Escape")
    look_for(page, f"{MARKUP} ")
    look_for(page, "<i>never</i>")
    page.expect("“<i>never</i>”")


def test_who_uses_no_mouse_opens_and_closes_a_decision(page: Shown) -> None:
    page.page.get_by_role("button", name="CSV file").focus()
    page.page.keyboard.press("Tab")
    place = "Number(document.activeElement.closest('li')?.dataset.at ?? -1)"
    assert page.page.evaluate(place) == 0
    for key in ("ArrowDown", "ArrowDown", "End", "ArrowUp", "Home", "ArrowDown"):
        page.page.keyboard.press(key)
        until(page, f"{place} >= 0")
    assert page.page.evaluate(place) == 1
    page.page.keyboard.press("Enter")
    dialog = page.page.get_by_role("dialog")
    dialog.wait_for()
    first = asked(page)["id"]
    page.page.keyboard.press("ArrowRight")
    until(page, f"!location.hash.includes('id={first}')")
    page.page.keyboard.press("Escape")
    dialog.wait_for(state="detached")
    until(page, f"{place} === 2")  # where it was left
    assert "id" not in asked(page)


# ---- who may, and where there is nothing ---------------------------------------------------------


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, dict[str, str]]]:
    """A server with one part in its record, and the text of a key for each role."""
    folder = tmp_path_factory.mktemp("keyed")
    write_record(folder / "data", [decision(id="one", part="one")], lambda _: picture())
    keys = {
        role: add_key(folder / "data" / "keys.json", f"the-{role}", role)
        for role in ("line", "operator", "admin")
    }  # fmt: skip
    with serving(folder) as server:
        yield server, keys


@pytest.mark.parametrize(
    ("role", "marks", "deletes"),
    [("line", False, False), ("operator", True, False), ("admin", True, True)],
)
def test_each_role_sees_what_it_may_do(
    browser: Any, keyed: tuple[Server, dict[str, str]], role: str, marks: bool, deletes: bool
) -> None:
    server, keys = keyed
    with shown(browser, server.url) as it:
        it.page.add_init_script(f"sessionStorage.setItem('kensa.key', {keys[role]!r})")
        it.go("#/find?id=one")
        good = it.page.get_by_role("dialog").get_by_role("button", name="good", exact=True)
        good.wait_for()
        it.page.locator(".viewer img").first.wait_for()
        assert good.is_enabled() is marks
        assert good.get_attribute("title") == (
            None if marks else "This needs a key with the role operator."
        )
        assert it.page.get_by_role("button", name="Delete picture").count() == deletes
        if marks:
            good.click()
            it.page.locator(".history", has_text=f"the-{role}").wait_for()


def test_where_nothing_is_recorded_it_is_said(browser: Any, tmp_path: Path) -> None:
    with (
        serving(tmp_path, KENSA_RECORD="off") as server,
        shown(browser, server.url, refused=True) as it,
    ):
        it.go("#/find")
        it.expect("Nothing is recorded here")
        it.expect("set KENSA_RECORD=on")


def test_a_record_that_is_empty_says_how_to_begin(browser: Any, tmp_path: Path) -> None:
    with serving(tmp_path) as server, shown(browser, server.url) as it:
        it.go("#/find")
        it.expect("No part has been inspected yet")


# ---- how it looks --------------------------------------------------------------------------------

LOOKS: Sequence[tuple[str, str, bool]] = [
    ("desktop", "en", False), ("tablet", "ja", True), ("phone", "en", True), ("phone", "ja", False),
    ("desktop", "ja", True), ("tablet", "en", False),
]  # fmt: skip


@pytest.mark.parametrize(("size", "language", "dark"), LOOKS)
def test_it_fits_and_can_be_used_by_everybody(
    browser: Any, line: Server, screenshots: Path, size: str, language: str, dark: bool
) -> None:
    name = f"{size}-{language}-{'dark' if dark else 'light'}"
    with shown(browser, line.url, size=size, language=language, dark=dark, refused=True) as it:
        for look in ("list", "grid"):
            it.go(f"#/find?look={look}")
            it.page.wait_for_selector(f".found.{look} .thumbnail img")
            it.keep(screenshots, f"find-{look}-{name}")
            it.must_fit()
            it.must_be_accessible()
        for one in ("views", "markup"):
            it.go(f"#/find?id={one}")
            it.page.wait_for_selector("dialog .viewer img")
            it.page.wait_for_selector("dialog h3")
            it.page.wait_for_timeout(500)  # what follows: history, versions, the overlay
            it.keep(screenshots, f"find-{one}-{name}")
            it.must_fit()
            it.must_be_accessible()
