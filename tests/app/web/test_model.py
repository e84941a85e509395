"""The page of a model: its limit is moved, versions come and go, known pictures close it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.browser import SIZES, Shown, shown
from support.line import NAME, Line, line, variant
from support.waiting import until

CATEGORY = "sample_bracket"
MARKUP = '<img src="/x" onerror="window.hacked=1"><b>KB</b>'
LANGUAGES = {"desktop": "en", "tablet": "ja", "phone": "ja"}


@pytest.fixture(scope="module")
def pictures(sample_data: Path) -> dict[str, Path]:
    """By the names of the parts that they are sent as."""
    folder = sample_data / "test" / CATEGORY
    return {
        path.stem: path for group in ("normal", "anomaly") for path in (folder / group).iterdir()
    }


@pytest.fixture(scope="module")
def running(
    kensa_model: Path, pictures: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Line]:
    """Two versions, and a part behind them for each picture, all of which are kept."""
    folder = tmp_path_factory.mktemp("model")
    before = variant(kensa_model, folder / "before", bank=1.01)
    with line(folder, before, kensa_model, KENSA_RECORD_SAMPLE="1") as found:
        for name, path in pictures.items():
            sent = {"part": name}
            answer = found.server.client.post(
                "/infer", params=sent, content=path.read_bytes(),
                headers={"Content-Type": "image/png"},
            )  # fmt: skip
            assert answer.status_code == 200, answer.text
        until(lambda: len(decisions(found)) == len(pictures))
        yield found


@pytest.fixture
def page(browser: Any, running: Line) -> Iterator[Shown]:
    with shown(browser, running.server.url) as it:
        opened(it)
        yield it


def opened(it: Shown) -> None:
    it.go("#/model")
    it.page.wait_for_selector("[role=slider]", timeout=30_000)


def get(running: Line, path: str, **query: Any) -> Any:
    answer = running.server.client.get(path, params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


def decisions(running: Line) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = get(running, "/decisions", limit=200)["decisions"]
    return found


def limit(running: Line) -> dict[str, Any]:
    found: dict[str, Any] = get(running, f"/models/{NAME}/threshold")
    return found


def said(it: Shown) -> float:
    """The limit that the slider tells who does not see it."""
    return float(it.page.get_attribute("[role=slider]", "aria-valuenow"))


def drag_to(it: Shown, raw: float) -> None:
    """With a pointer, from the grip to where a score lies, as the drawing says."""
    found = it.page.locator(".drawing svg")
    left, width, low, high = (
        float(found.get_attribute(f"data-{name}")) for name in ("left", "width", "low", "high")
    )
    box = found.bounding_box()
    of = float(found.get_attribute("viewBox").split()[2])
    to = box["x"] + box["width"] * (left + (raw - low) / (high - low) * width) / of
    it.page.locator("[role=slider] b").scroll_into_view_if_needed()
    grip = it.page.locator("[role=slider] b").bounding_box()
    y = grip["y"] + grip["height"] / 2
    it.page.mouse.move(grip["x"] + grip["width"] / 2, y)
    it.page.mouse.down()
    it.page.mouse.move((grip["x"] + to) / 2, y)
    it.page.mouse.move(to, y)
    it.page.mouse.up()


def confirm(it: Shown, reason: str | None = None) -> None:
    """Answer what the window asks; where a reason must be given, not before it is."""
    yes = it.page.locator("dialog[open] .row.end button").last
    yes.wait_for()
    if reason is not None:
        assert yes.is_disabled()
        it.page.fill("dialog[open] input", reason)
    yes.click()
    it.page.wait_for_selector("dialog[open]", state="detached")


# ---- the limit ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_a_limit_is_dragged_previewed_applied_and_rolled_back(
    browser: Any, running: Line, pictures: dict[str, Path], size: str, screenshots: Path
) -> None:
    before, scores = limit(running), get(running, f"/models/{NAME}/scores")
    wanted = scores["low"] + 0.1 * (scores["high"] - scores["low"])
    with shown(
        browser, running.server.url, size=size, language=LANGUAGES[size], dark=size == "tablet"
    ) as it:
        opened(it)
        assert said(it) == pytest.approx(before["raw"])
        drag_to(it, wanted)
        raw = said(it)
        assert raw == pytest.approx(wanted, abs=0.01 * (scores["high"] - scores["low"]))
        foreseen = get(running, f"/models/{NAME}/threshold/preview", raw=raw)
        assert foreseen["flips"]
        it.page.wait_for_selector(".preview:not(.looking)")
        changed = it.page.locator(".preview .flip")
        assert changed.count() == min(24, len(foreseen["flips"]))
        assert str(len(foreseen["flips"])) in it.page.inner_text(".preview [role=status]")
        changed.first.scroll_into_view_if_needed()
        changed.first.locator("img").wait_for()
        it.must_fit()
        it.must_be_accessible()
        it.keep(screenshots, f"model-dragged-{size}")
        assert limit(running) == before, "looking at it changed it"
        it.page.click(".apply .main")
        confirm(it, "Scratches are not allowed any more.")
        until(lambda: limit(running)["raw"] == pytest.approx(raw))
        made = get(running, f"/models/{NAME}/versions/{limit(running)['version']}")
        assert made["origin"]["reason"] == "Scratches are not allowed any more."
        flipped = next(one for one in foreseen["flips"] if one["verdict"] == "normal")
        verdict = running.server.infer(pictures[flipped["part"]].read_bytes()).json()
        assert verdict["is_anomalous"], "the part that was foreseen to flip does not"
        it.page.locator(".toast .button:not(.plain)").click()  # undo
        until(lambda: limit(running) == before)
        it.page.wait_for_function(
            "raw => Math.abs(document.querySelector('[role=slider]')?.ariaValueNow - raw) < 1e-6",
            arg=before["raw"],
        )
        assert it.page.locator(".preview").count() == 0


def test_an_undo_rolls_back_nothing_that_somebody_else_made_live_meanwhile(
    browser: Any, running: Line
) -> None:
    with shown(browser, running.server.url, refused=True) as it:
        opened(it)
        it.page.locator("[role=slider]").press("PageDown")
        it.page.wait_for_selector(".preview:not(.looking)")
        it.page.click(".apply .main")
        confirm(it, "Mine.")
        undo = it.page.locator(".toast .button:not(.plain)")
        undo.wait_for()
        body = {"threshold": 0.52, "reason": "Somebody else's."}
        client = running.server.client
        theirs = client.put(f"/models/{NAME}/threshold", json=body).json()
        undo.click()
        it.expect(f"{theirs['version']} judges by now.")
        assert limit(running) == theirs


@pytest.mark.parametrize("size", ["tablet", "phone"])
def test_the_numbers_at_the_limits_drawing_can_be_read(
    browser: Any, running: Line, size: str, screenshots: Path
) -> None:
    with shown(browser, running.server.url, size=size) as it:
        opened(it)
        it.page.wait_for_selector(".drawing svg text")
        high = it.page.evaluate(
            "[...document.querySelectorAll('.drawing svg text')]"
            ".filter(one => one.checkVisibility())"
            ".map(one => parseFloat(getComputedStyle(one).fontSize) * one.getScreenCTM().a)"
        )
        assert min(high) >= 12, high
        assert len(high) >= 8, "an axis with hardly a number"
        it.page.locator(".histogram").scroll_into_view_if_needed()
        it.keep(screenshots, f"model-limit-{size}")


def test_the_keyboard_alone_moves_the_limit_and_applies_it(page: Shown, running: Line) -> None:
    before, scores = limit(running), get(running, f"/models/{NAME}/scores")
    span = scores["high"] - scores["low"]
    keys = page.page.keyboard
    for _ in range(60):  # as who has nothing else gets there
        if page.page.evaluate("document.activeElement.getAttribute('role')") == "slider":
            break
        keys.press("Tab")
    for name, steps in (("ArrowLeft", -1), ("ArrowUp", 1), ("PageDown", -10), ("ArrowRight", 1)):
        was = said(page)
        keys.press(name)
        assert said(page) - was == pytest.approx(steps * span / 200)
    keys.press("End")
    assert said(page) == pytest.approx(scores["high"])
    keys.press("ArrowRight")
    assert said(page) == pytest.approx(scores["high"]), "a limit beyond what can be set"
    keys.press("Escape")
    assert said(page) == pytest.approx(before["raw"])
    keys.press("Home")
    assert said(page) == pytest.approx(scores["low"])
    page.page.wait_for_selector(".preview:not(.looking)")
    for _ in range(60):
        if page.page.evaluate("document.activeElement.closest('.apply') !== null"):
            break
        keys.press("Tab")
    keys.press("Enter")
    page.page.locator("dialog[open] input").focus()
    keys.type("by keyboard")
    keys.press("Enter")
    until(lambda: limit(running)["raw"] == pytest.approx(scores["low"]))
    assert running.server.client.post(f"/models/{NAME}/rollback").status_code == 200


def test_a_goal_for_false_rejects_is_a_limit_and_so_is_a_number(page: Shown, running: Line) -> None:
    goal = get(running, f"/models/{NAME}/threshold/preview", false_rejects=0.05)["raw"]
    page.page.get_by_role("button", name="5%", exact=True).click()
    page.page.wait_for_function(
        "raw => Math.abs(document.querySelector('[role=slider]')?.ariaValueNow - raw) < 1e-6",
        arg=goal,
    )
    assert float(page.page.get_by_role("spinbutton", name="Goal").input_value()) == pytest.approx(5)
    page.page.get_by_label("Limit (raw score)").fill("0.5")
    page.page.keyboard.press("Tab")
    assert said(page) == pytest.approx(0.5)
    at_once = page.page.get_by_role("button", name="Leave it as it is").evaluate(
        "async button => { button.click(); await null; await null;"
        " return document.querySelector('[role=slider]').ariaValueNow; }"
    )
    assert float(at_once) == said(page) == pytest.approx(limit(running)["raw"])


# ---- versions -----------------------------------------------------------------------------------


def card(it: Shown, version: str) -> Any:
    return it.page.locator(".versions > li", has_text=version)


def test_a_held_version_shows_what_it_flips_and_is_let_judge_and_taken_back(
    page: Shown, running: Line, kensa_model: Path, tmp_path: Path, screenshots: Path
) -> None:
    before = limit(running)["version"]
    held = running.publish(variant(kensa_model, tmp_path / "strict", image_threshold=0.0))
    assert running.wait(held, "held", "live") == "held"
    gate = get(running, f"/models/{NAME}/versions/{held}")["gate"]
    its = card(page, held)
    its.get_by_text(gate["reasons"][0]).wait_for()
    its.locator(".opener").click()
    flips = its.locator(".details .flip")
    flips.first.wait_for()
    assert flips.count() == len(gate["flips"]) + len(gate["record"]["flips"]) > 0
    flips.first.scroll_into_view_if_needed()
    flips.first.locator("img").wait_for()
    page.keep(screenshots, "model-held")
    page.must_be_accessible()
    its.get_by_role("button", name="Let it judge").click()
    confirm(page)
    until(lambda: running.model()["live"] == held)
    its.get_by_text("judges", exact=True).wait_for()
    page.page.get_by_role("button", name="Back to").click()
    confirm(page)
    until(lambda: running.model()["live"] == before)


def test_a_double_click_asks_once_and_answers_nothing(page: Shown, running: Line) -> None:
    live = running.model()["live"]
    page.page.get_by_role("button", name="Back to").dblclick()
    page.page.wait_for_timeout(500)
    assert page.page.locator("dialog[open]").count() == 1
    assert running.model()["live"] == live
    page.page.locator("dialog[open] .row.end button").last.dblclick()
    page.expect("judges again.")
    page.page.wait_for_timeout(500)
    after = running.model()
    assert (after["live"] != live, after["previous"]) == (True, live)
    assert page.page.locator("dialog[open]").count() == 0
    back = {"live": after["live"], "to": live}
    assert running.server.client.post(f"/models/{NAME}/rollback", params=back).is_success


def test_a_model_that_was_unloaded_is_let_judge_again(page: Shown, running: Line) -> None:
    live = running.model()["live"]
    at = f"/v2/repository/models/{NAME}/unload"
    assert running.server.client.post(at).status_code == 200
    page.expect("no version")
    card(page, live).get_by_role("button", name="Let it judge").click()
    confirm(page)
    until(lambda: running.model()["live"] == live)


def test_a_version_is_discarded_with_a_reason_and_the_live_one_cannot_be(
    page: Shown, running: Line, kensa_model: Path, tmp_path: Path
) -> None:
    kept = running.store.take_in(
        NAME, variant(kensa_model, tmp_path / "kept", bank=1.02), {"activate": False}
    )
    its = card(page, kept)
    its.locator(".opener").click()
    its.get_by_text("AUROC").wait_for()  # of its report
    its.get_by_role("button", name="Discard").click()
    confirm(page, "Trained on the wrong parts.")
    its.wait_for(state="detached")
    assert kept not in [one["version"] for one in running.model()["versions"]]
    live = card(page, running.model()["live"])
    live.locator(".opener").click()
    assert live.get_by_role("button", name="Discard").is_disabled()
    with page.page.expect_download() as loading:
        live.get_by_role("button", name="Download").click()
    assert loading.value.suggested_filename.endswith(".zip")


# ---- known pictures -----------------------------------------------------------------------------


def side(it: Shown, name: str) -> Any:
    return it.page.get_by_role("group", name=name, exact=True)


def take(it: Shown, name: str, part: str) -> None:
    side(it, name).get_by_role("button", name="From the record").click()
    it.page.locator(".pick .flip", has_text=part).first.click()
    it.page.locator("dialog[open] .row.end button").click()
    side(it, name).get_by_text(part).wait_for()


def test_known_pictures_are_chosen_fail_the_model_and_it_is_released(
    browser: Any, running: Line, pictures: dict[str, Path], screenshots: Path
) -> None:
    found = decisions(running)
    good, other, bad = (
        [one["part"] for one in found if one["verdict"] == verdict and one["part"] in pictures][
            place
        ]
        for verdict, place in (("normal", 0), ("normal", 1), ("anomaly", 0))
    )
    of = f"/models/{NAME}/challenges"
    with shown(browser, running.server.url) as page:
        opened(page)
        take(page, "Good parts", good)
        assert page.page.get_by_role("button", name="Save").is_disabled(), "without a defect"
        take(page, "Defects", bad)
        page.page.get_by_role("button", name="Save").click()
        confirm(page, "The master parts.")
        until(lambda: len(get(running, of)["pictures"]) == 2)
        page.page.get_by_role("button", name="Challenge it now").click()
        page.expect("Challenge passed: 2 of 2")
        side(page, "Defects").locator("input[type=file]").set_input_files(pictures[other])
        page.page.get_by_role("button", name="Save").click()
        confirm(page, "A defect that nobody can see.")
        until(lambda: len(get(running, of)["pictures"]) == 3 and get(running, of)["last"] is None)
        page.page.get_by_role("button", name="Challenge it now").click()
        page.expect("Closed: the model failed its challenge")
        assert not running.model()["released"]
        page.keep(screenshots, "model-closed")
        page.must_be_accessible()
        page.page.get_by_role("button", name="Release by hand").click()
        confirm(page, "It is a good part.")
        until(lambda: running.model()["released"])
        page.page.locator(".closed").wait_for(state="detached")
        for _ in range(3):
            page.page.get_by_role("button", name="Take out").first.click()
        page.page.get_by_role("button", name="Save").click()
        confirm(page, "No more of this.")
        until(lambda: get(running, of)["pictures"] == [])


# ---- what comes from outside --------------------------------------------------------------------


def test_markup_in_names_and_reasons_stays_text(
    browser: Any, running: Line, pictures: dict[str, Path]
) -> None:
    count = len(decisions(running))
    answer = running.server.client.post(
        "/infer", params={"part": MARKUP}, content=pictures["0000"].read_bytes(),
        headers={"Content-Type": "image/png"},
    )  # fmt: skip
    assert answer.status_code == 200
    until(lambda: len(decisions(running)) > count)
    body = {"label": "defect", "defect": MARKUP}
    marked = running.server.client.post(f"/decisions/{answer.json()['id']}/label", json=body)
    assert marked.status_code == 200, marked.text
    changed = running.server.client.put(
        f"/models/{NAME}/threshold", json={"threshold": 0.51, "reason": MARKUP}
    )
    assert changed.status_code == 200
    with shown(browser, running.server.url) as it:
        opened(it)
        it.expect(f"limit changed: {MARKUP}")
        it.page.locator("[role=slider]").press("Home")
        it.page.locator(".preview .flip").get_by_text(MARKUP).first.wait_for()
        assert it.page.evaluate("window.hacked") is None
        assert it.page.locator('img[src="/x"]').count() == 0
    assert running.server.client.post(f"/models/{NAME}/rollback").status_code == 200


@pytest.mark.parametrize("what", ["threshold", "scores.svg*"])
def test_what_did_not_come_of_the_limit_is_said_and_asked_for_again(
    browser: Any, running: Line, what: str
) -> None:
    with shown(browser, running.server.url, refused=True) as it:
        it.page.route(f"**/{NAME}/{what}", lambda route: route.abort())
        it.go("#/model")
        again = it.page.locator("main .problem").get_by_role("button", name="Try again")
        again.wait_for()
        it.page.unroute(f"**/{NAME}/{what}")
        again.click()
        it.page.wait_for_selector("[role=slider]")
        again.wait_for(state="detached")
