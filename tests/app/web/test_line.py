"""The page of the line: a part comes and is seen, whatever happens to tabs, network and server."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest

from app.http.keys import add_key
from engines.store.versions import Store
from support.browser import Shown, shown
from support.proxy import proxy
from support.server import RAW, Server, serving

CATEGORY = "sample_bracket"
MARKUP = "<img src=x onerror=\"document.title='bad'\"><b>KB-1</b>&amp;"
NO_SHARED_WORKER = "delete window.SharedWorker"
HIDE = """hidden => {
  Object.defineProperty(document, 'hidden', { configurable: true, get: () => hidden });
  document.dispatchEvent(new Event('visibilitychange'));
}"""


@pytest.fixture(scope="module")
def good(sample_data: Path) -> bytes:
    return (sample_data / "test" / CATEGORY / "normal" / "0000.png").read_bytes()


@pytest.fixture(scope="module")
def bad(sample_data: Path) -> bytes:
    return (sample_data / "test" / CATEGORY / "anomaly" / "stain_00.png").read_bytes()


def send(server: Server, picture: bytes, part: str, model: str = "") -> dict[str, Any]:
    answer = server.client.post(
        "/infer", params={"part": part, "model": model}, content=picture, headers=RAW
    )
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def open_line(it: Shown, query: str = "") -> None:
    it.go(f"#/line{query}")
    it.page.wait_for_selector(".link.open, .onwall")


def see(it: Shown, part: str, within_s: float = 5) -> None:
    """Wait until a part is the large one."""
    it.page.locator(".called, .onwall b", has_text=part).wait_for(timeout=within_s * 1000)


# ---- a part comes --------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "language"), [("desktop", "en"), ("tablet", "ja")])
def test_a_part_comes_is_judged_and_seen_within_a_second(
    browser: Any, server: Server, good: bytes, size: str, language: str, screenshots: Path
) -> None:
    with shown(browser, server.url, size=size, language=language) as it:
        open_line(it)
        it.page.wait_for_timeout(600)
        send(server, good, f"KB-2046/A {size}")
        began = time.monotonic()
        see(it, f"KB-2046/A {size}", within_s=1)
        assert time.monotonic() - began < 1
        assert it.page.locator(".big").inner_text() == "OK"
        it.page.locator(".picture:not(.before) img").wait_for()
        natural = it.page.locator(".picture img").evaluate("one => one.naturalWidth")
        assert natural == 320
        it.keep(screenshots, f"line-ok-{size}-{language}")


def test_a_reject_is_seen_with_what_is_anomalous_and_said_to_who_listens(
    browser: Any, server: Server, bad: bytes, screenshots: Path
) -> None:
    with shown(browser, server.url) as it:
        open_line(it)
        said = send(server, bad, "KB-2046/B 1")
        see(it, "KB-2046/B 1")
        assert it.page.locator(".big").inner_text() == "NG"
        assert f"{said['score']:.3f}" in it.page.locator(".scores").inner_text()
        assert it.page.locator("[aria-live=assertive]").inner_text() == "NG: KB-2046/B 1"
        over = it.page.locator(".picture .over")
        over.wait_for()
        assert over.evaluate("one => one.naturalWidth") == 320
        it.page.get_by_label("Heat map").fill("30")
        assert over.evaluate("one => one.style.opacity") == "0.3"
        it.keep(screenshots, "line-ng")
        it.must_be_accessible()
        it.page.reload()
        see(it, "KB-2046/B 1")
        over.wait_for()
        assert over.evaluate("one => one.style.opacity") == "0.3"
        assert over.evaluate("one => one.naturalWidth") == 320  # now from the record


def test_a_reject_stays_for_a_moment_though_good_parts_follow(
    browser: Any, server: Server, good: bytes, bad: bytes
) -> None:
    with shown(browser, server.url) as it:
        open_line(it)
        send(server, bad, "the reject")
        send(server, good, "after it")
        see(it, "the reject")
        began = time.monotonic()
        see(it, "after it")
        assert time.monotonic() - began > 0.7


def test_what_had_no_verdict_is_shown_with_its_reason(
    browser: Any, server: Server, good: bytes
) -> None:
    with shown(browser, server.url, language="ja") as it:
        open_line(it)
        server.client.post("/infer", params={"part": "broken"}, content=good[:99], headers=RAW)
        see(it, "broken")
        assert it.page.locator(".big").inner_text() == "判定なし"
        assert it.page.locator(".why").inner_text() == "画像が壊れています。"


def test_one_is_looked_at_and_it_goes_on_afterwards(
    browser: Any, server: Server, good: bytes, bad: bytes
) -> None:
    with shown(browser, server.url) as it:
        open_line(it)
        send(server, bad, "look at me")
        see(it, "look at me")
        send(server, good, "newer")
        see(it, "newer")
        it.page.get_by_role("button", name="NG, look at me").first.click()
        see(it, "look at me")
        it.page.locator(".picture .over").wait_for()
        send(server, good, "newest")
        it.page.locator(".strip button", has_text="newest").wait_for()
        assert it.page.locator(".called").inner_text() == "look at me"
        it.page.get_by_role("button", name="Go on").click()
        see(it, "newest")


def test_what_comes_from_outside_is_text(browser: Any, server: Server, bad: bytes) -> None:
    with shown(browser, server.url) as it:
        open_line(it)
        send(server, bad, MARKUP)
        see(it, MARKUP)
        assert it.page.locator(".called").inner_text() == MARKUP
        assert it.page.locator(".called *, .strip .name *").count() == 0
        assert MARKUP in it.page.locator("[aria-live=assertive]").inner_text()
        it.go("#/line?wall=1")
        see(it, MARKUP)
        assert it.page.locator(".onwall b *").count() == 0
        assert "bad" not in it.page.title()


def test_the_last_minutes_are_drawn(browser: Any, server: Server, good: bytes) -> None:
    with shown(browser, server.url) as it:
        open_line(it)
        send(server, good, "counted")
        found = it.page.locator(".minutes svg[role=img]")
        found.wait_for()
        before = int(re.findall(r"of ([\d,]+) parts", found.get_attribute("aria-label"))[0])
        send(server, good, "counted, too")
        it.page.wait_for_function(
            "before => Number(document.querySelector('.minutes svg').ariaLabel"
            ".match(/of ([0-9]+) parts/)[1]) > before", arg=before,
        )  # fmt: skip


# ---- tabs, network and server --------------------------------------------------------------------


def streams(server: Server) -> int:
    """How many streams of the line have ended."""
    text = server.client.get("/metrics").text
    found = re.findall(r'^kensa_requests_total\{.*route="/line/events".*\} (\S+)', text, re.M)
    return sum(int(float(one)) for one in found)


def test_many_tabs_share_one_stream(browser: Any, kensa_model: Path, tmp_path: Path,
                                    good: bytes) -> None:  # fmt: skip
    with serving(tmp_path, KENSA_MODEL_DIR=str(kensa_model)) as server:
        with shown(browser, server.url) as first:
            tabs = [first]
            for _ in range(2):
                tab = Shown(first.page.context.new_page(), server.url, first.wrong)
                tabs.append(tab)
            for tab in tabs:
                open_line(tab)
            send(server, good, "for all")
            for tab in tabs:
                see(tab, "for all")
            tabs[2].page.close()
            send(server, good, "for two")
            for tab in tabs[:2]:
                see(tab, "for two")
            assert streams(server) == 0
        for _ in range(300):  # it is seen at the next word, 2 s later at most
            if streams(server):
                break
            time.sleep(0.1)
        assert streams(server) == 1


def test_without_shared_workers_each_tab_has_its_own_and_pauses_it_while_hidden(
    browser: Any, server: Server, good: bytes
) -> None:
    with shown(browser, server.url) as it:
        it.page.add_init_script(NO_SHARED_WORKER)
        open_line(it)
        send(server, good, "seen")
        see(it, "seen")
        ended = streams(server)
        it.page.evaluate(HIDE, True)
        for number in range(5):
            send(server, good, f"slept {number}")
        for _ in range(50):
            if streams(server) > ended:  # with the first part that nobody takes any more
                break
            time.sleep(0.1)
        assert streams(server) > ended
        assert it.page.locator(".strip button", has_text="slept").count() == 0
        it.page.evaluate(HIDE, False)
        see(it, "slept 4")
        assert it.page.locator(".strip button", has_text="slept").count() == 5


def test_a_tab_that_slept_for_an_hour_over_a_dead_connection_catches_up(
    browser: Any, server: Server, good: bytes
) -> None:
    with proxy(server.url) as between, shown(browser, between.url) as it:
        it.page.add_init_script(NO_SHARED_WORKER)  # the clock of a worker cannot be set
        it.page.clock.install()
        open_line(it)
        send(server, good, "before it slept")
        see(it, "before it slept")
        it.page.locator(".picture:not(.before) img").wait_for()
        between.fall_silent()
        for number in range(3):
            send(server, good, f"asleep {number}")
        it.page.wait_for_timeout(500)
        assert it.page.locator(".strip button", has_text="asleep").count() == 0
        it.page.clock.fast_forward(3_600_000)
        it.page.locator(".strip button", has_text="asleep 2").wait_for(timeout=10_000)
        assert it.page.locator(".strip button", has_text="asleep").count() == 3


def test_the_server_dies_and_comes_back_and_the_page_heals(
    browser: Any, kensa_model: Path, tmp_path: Path, good: bytes
) -> None:
    named = {"KENSA_MODEL_DIR": str(kensa_model)}
    with serving(tmp_path, **named) as server:
        port = server.url.rpartition(":")[2]
        with shown(browser, server.url, refused=True) as it:
            open_line(it)
            send(server, good, "before")
            see(it, "before")
            server.process.kill()
            server.process.wait()
            it.page.locator(".warn", has_text="The server restarts").wait_for(timeout=5000)
            assert it.page.locator(".hero.old").count() == 1
            with serving(tmp_path, **named, KENSA_PORT=port) as again:
                it.page.wait_for_selector(".link.open", timeout=15_000)
                assert it.page.locator(".warn", has_text="The server restarts").count() == 0
                send(again, good, "after")
                see(it, "after")
                names = it.page.locator(".strip .name").all_inner_texts()
                assert names == ["after", "before"]


def test_a_server_without_a_record_is_followed_through_its_restart(
    browser: Any, kensa_model: Path, tmp_path: Path, good: bytes
) -> None:
    named = {"KENSA_MODEL_DIR": str(kensa_model), "KENSA_RECORD": "off"}
    with serving(tmp_path, **named) as server, shown(browser, server.url, refused=True) as it:
        port = server.url.rpartition(":")[2]
        open_line(it)
        for number in range(3):
            send(server, good, f"before {number}")
        see(it, "before 2")
        it.page.locator(".picture:not(.before) img").wait_for()
        server.process.terminate()
        server.process.wait()
        with serving(tmp_path, **named, KENSA_PORT=port) as again:
            it.page.wait_for_selector(".link.open", timeout=15_000)
            send(again, good, "after")
            see(it, "after")


def test_the_key_of_a_tab_opens_its_stream(
    browser: Any, kensa_model: Path, tmp_path: Path, good: bytes
) -> None:
    key = add_key(tmp_path / "data" / "keys.json", "tablet", "line")
    with (
        serving(tmp_path, KENSA_MODEL_DIR=str(kensa_model)) as server,
        shown(browser, server.url) as it,
    ):
        it.page.add_init_script(f"sessionStorage.setItem('kensa.key', '{key}')")
        server.client.headers["X-API-Key"] = key
        open_line(it)
        send(server, good, "with a key")
        see(it, "with a key")
        it.page.locator(".picture:not(.before) img").wait_for()
        assert it.page.locator(".problem").count() == 0


# ---- on the wall ---------------------------------------------------------------------------------


def test_the_wall_shows_one_word_and_nothing_to_press(
    browser: Any, server: Server, good: bytes, bad: bytes, screenshots: Path
) -> None:
    with shown(browser, server.url) as it:
        open_line(it, "?wall=1")
        send(server, good, "KB-2046/A 17")
        it.page.wait_for_selector(".onwall.normal")
        see(it, "KB-2046/A 17")
        it.keep(screenshots, "wall-ok")
        send(server, bad, "KB-2046/A 18")
        it.page.wait_for_selector(".onwall.anomaly .beside .over")
        it.keep(screenshots, "wall-ng")
        assert it.page.locator("nav, button, select, a").count() == 0
        height = it.page.locator(".word span").evaluate("one => one.getBoundingClientRect().height")
        assert (
            height > 0.4 * 800
        )  # a person reads 2 cm of letters from 5 m; here it is half of it all
        it.must_fit()
        it.must_be_accessible()
        it.page.keyboard.press("Escape")
        it.page.wait_for_selector(".hero")
        assert "wall" not in it.page.url


def test_the_wall_shows_no_verdict_while_the_server_is_away(
    browser: Any, kensa_model: Path, tmp_path: Path, good: bytes
) -> None:
    named = {"KENSA_MODEL_DIR": str(kensa_model)}
    with serving(tmp_path, **named) as server, shown(browser, server.url, refused=True) as it:
        open_line(it, "?wall=1")
        send(server, good, "A-1")
        it.page.wait_for_selector(".onwall.normal")
        server.process.kill()
        it.page.wait_for_selector(".onwall.away")
        it.expect("The server restarts")
        assert it.page.get_by_text("OK", exact=True).count() == 0


# ---- nothing yet, several models, and what to see to ---------------------------------------------


def test_without_a_model_the_next_step_is_to_teach_one(browser: Any, tmp_path: Path) -> None:
    with serving(tmp_path) as server, shown(browser, server.url) as it:
        open_line(it)
        link = it.page.get_by_role("link", name="Teach the first model")
        assert link.get_attribute("href") == "#/teach"
        it.must_be_accessible()


def test_without_a_part_it_says_how_one_comes(
    browser: Any, kensa_model: Path, tmp_path: Path
) -> None:
    named = {"KENSA_MODEL_DIR": str(kensa_model)}
    with serving(tmp_path, **named) as server, shown(browser, server.url) as it:
        open_line(it)
        line = it.page.locator("pre").inner_text()
        assert line == f"curl '{server.url}/infer?part=A-1' -F file=@part.jpg"


def test_of_several_models_all_are_shown_or_one(
    browser: Any, kensa_model: Path, tmp_path: Path, good: bytes
) -> None:
    store = Store(tmp_path / "data" / "models")
    for name in ("left", "right"):
        store.activate(name, store.take_in(name, kensa_model, {}, plan=True))
    with serving(tmp_path) as server, shown(browser, server.url) as it:
        open_line(it)
        send(server, good, "L-1", "left")
        send(server, good, "R-1", "right")
        see(it, "R-1")
        it.page.get_by_label("Model").select_option("left")
        see(it, "L-1")
        assert it.page.locator(".strip .name").all_inner_texts() == ["L-1"]
        send(server, good, "R-2", "right")
        send(server, good, "L-2", "left")
        see(it, "L-2")
        assert "model=left" in it.page.url
        it.page.get_by_label("Model").select_option("")
        it.page.locator(".strip button", has_text="R-2").wait_for()
        assert it.page.locator(".strip button").count() == 4


def test_a_challenge_is_asked_for_and_one_that_fails_closes_the_line(
    browser: Any, kensa_model: Path, tmp_path: Path, good: bytes, bad: bytes, screenshots: Path
) -> None:
    named = {"KENSA_MODEL_DIR": str(kensa_model), "KENSA_MODEL_NAME": "bracket"}
    with serving(tmp_path, **named) as server, shown(browser, server.url) as it:
        open_line(it)
        send(server, good, "A-1")
        see(it, "A-1")
        asking = it.page.get_by_role("button", name="Challenge")
        assert asking.is_disabled()
        with_known(server, good=good, bad=bad)
        it.page.locator("button:enabled", has_text="Challenge").click()
        it.expect("Passed")
        it.expect("2 of 2 judged rightly")
        it.page.get_by_role("button", name="Close").click()
        with_known(server, good=bad, bad=good)
        asking.click()
        it.expect("Failed")
        assert it.page.locator(".wrong li").count() == 2
        it.page.locator(".wrong img").nth(1).wait_for()
        it.keep(screenshots, "line-challenge-failed")
        it.must_be_accessible()
        it.page.get_by_role("button", name="Close").click()
        it.page.locator(".problem", has_text="bracket is not released").wait_for()
        refused = server.client.post("/infer?part=A-2", content=good, headers=RAW)
        assert refused.status_code == 503
        see(it, "A-2")
        assert it.page.locator(".why").inner_text() == "The line is closed."
        it.keep(screenshots, "line-not-released")
        it.page.get_by_role("button", name="Release").click()
        it.page.get_by_label("Why?").fill("the pictures were named wrongly")
        it.page.locator("dialog .danger").click()
        it.page.locator(".problem").wait_for(state="detached")


def with_known(server: Server, good: bytes, bad: bytes) -> None:
    answer = server.client.put(
        "/models/bracket/challenges", data={"reason": "a test"},
        files=[("good", ("good.png", good)), ("bad", ("bad.png", bad))],
    )  # fmt: skip
    assert answer.status_code == 200, answer.text
