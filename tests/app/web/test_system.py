"""Claims about logging in, and about the page System: the real server in a real browser."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.http.keys import ROLES, add_key, read_keys
from app.routes.web import FOLDER
from app.settings import table
from support.browser import Shown, shown
from support.damage import seeds
from support.server import Server, serving

MARKUP = "<img src=x onerror=document.title='broken'>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keyed")


@pytest.fixture(scope="module")
def keys(folder: Path) -> dict[str, str]:
    """The text of a key for each role."""
    return {role: add_key(folder / "data" / "keys.json", f"the-{role}", role) for role in ROLES}


@pytest.fixture(scope="module")
def keyed(folder: Path, keys: dict[str, str], kensa_model: Path) -> Iterator[Server]:
    """A server that wants keys, with the model `bracket`."""
    named = {"KENSA_MODEL_DIR": str(kensa_model), "KENSA_MODEL_NAME": "bracket"}
    with serving(folder, **named) as running:
        yield running


def log_in(it: Shown, key: str, stays: bool = False) -> None:
    it.page.get_by_label("Key", exact=True).fill(key)
    it.page.get_by_label("Keep on this device").set_checked(stays)
    it.page.get_by_role("button", name="Enter").click()


def tab(it: Shown, name: str) -> None:
    it.page.get_by_role("navigation", name="Parts of this page").get_by_role(
        "link", name=name, exact=True
    ).click()
    it.page.locator(".tabs a[aria-current]", has_text=name).wait_for()


def accept(it: Shown, words: str) -> None:
    it.page.get_by_role("dialog").get_by_role("button", name=words, exact=True).click()


# Logging in


@pytest.mark.parametrize("role", ROLES)
def test_each_role_logs_in_for_a_tab_and_sees_what_it_may_do(
    browser: Any, keyed: Server, keys: dict[str, str], role: str
) -> None:
    with shown(browser, keyed.url, refused=True) as it:
        it.go("#/system")
        log_in(it, keys[role])
        it.page.wait_for_selector("main.system h1")
        it.expect(f"the-{role}")
        it.expect("Models in memory")
        assert it.page.context.cookies() == []
        for name, needed, shows in (
            ("Keys", "admin", "the-line"),
            ("Doctor", "operator", "Nothing has to be mended."),
            ("Settings", "operator", "KENSA_DATA_DIR"),
            ("Audit trail", "operator", "Who changed what"),
        ):
            tab(it, name)
            is_let_in = ROLES.index(role) >= ROLES.index(needed)
            it.expect(shows if is_let_in else f"This needs a key with the role {needed}.", 30)
        tab(it, "Jobs")
        it.expect("Schedules")
        add = it.page.get_by_role("button", name="Learn regularly")
        assert add.is_disabled() == (role == "line")
        if role == "line":
            assert add.get_attribute("title") == "This needs a key with the role operator."
        it.page.reload()  # the same tab
        it.expect(f"the-{role}")
        other = it.page.context.new_page()  # another one
        other.goto(f"{keyed.url}/#/system")
        other.get_by_label("Key", exact=True).wait_for()
        it.page.get_by_role("button", name=f"the-{role}").click()
        it.page.get_by_label("Key", exact=True).wait_for()
        it.page.reload()
        it.page.get_by_label("Key", exact=True).wait_for()


def test_a_key_that_stays_on_the_device_is_in_a_cookie_that_no_script_reads(
    browser: Any, keyed: Server, keys: dict[str, str]
) -> None:
    with shown(browser, keyed.url, refused=True) as it:
        it.go("#/system?part=keys")
        log_in(it, keys["admin"], stays=True)
        it.expect("the-operator")
        assert it.page.evaluate("document.cookie + JSON.stringify(sessionStorage)") == "{}"
        (cookie,) = it.page.context.cookies()
        assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
        other = it.page.context.new_page()
        other.goto(f"{keyed.url}/#/system?part=keys")
        other.get_by_text("the-operator").first.wait_for()
        it.page.get_by_role("button", name="the-admin").click()
        it.page.get_by_label("Key", exact=True).wait_for()
        assert it.page.context.cookies() == []
        other.reload()
        other.get_by_label("Key", exact=True).wait_for()


def test_a_wrong_key_is_told_in_the_language_of_the_screen(
    browser: Any, keyed: Server, keys: dict[str, str], screenshots: Path
) -> None:
    with shown(browser, keyed.url, refused=True) as it:
        it.go("")
        for wrong in (keys["admin"][:-1], "ｋｅｎｓａ＿キー"):
            for stays in (False, True):
                log_in(it, wrong, stays)
                it.expect("This key is not known")
        it.must_be_accessible()
        it.page.get_by_role("button", name="日本語").click()
        it.expect("このサーバーの利用にはキーが必要です。")
        it.expect("このキーは登録されていません。")
        it.keep(screenshots, "login-desktop-ja-light")
        assert it.page.context.cookies() == []
        assert it.page.evaluate("sessionStorage.length") == 0


def test_a_key_that_is_removed_while_it_is_used_leads_back_to_the_log_in(
    browser: Any, keyed: Server, keys: dict[str, str], folder: Path
) -> None:
    admin = {"X-API-Key": keys["admin"]}
    body = {"name": "short", "role": "line"}
    key = keyed.client.post("/keys", json=body, headers=admin).json()["key"]
    with shown(browser, keyed.url, refused=True) as it:
        it.go("#/system")
        log_in(it, key)
        it.expect("Models in memory")
        assert keyed.client.delete("/keys/short", headers=admin).status_code == 204
        it.page.get_by_label("Key", exact=True).wait_for(timeout=10_000)


@contextmanager
def another_page() -> Iterator[str]:
    """The page of another server on this machine: of the same site, to a browser."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<h1>elsewhere</h1>")

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Page)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()


POST = """async ([url, options]) => {
  try { return (await fetch(url, {credentials: 'include', ...options})).status; }
  catch (error) { return 'stopped by the browser'; }
}"""


def test_the_page_of_another_server_does_nothing_with_the_cookie(
    browser: Any, keyed: Server, keys: dict[str, str], folder: Path
) -> None:
    with shown(browser, keyed.url, refused=True) as it, another_page() as elsewhere:
        it.go("#/system")
        log_in(it, keys["admin"], stays=True)
        it.expect("Models in memory")
        own = it.page.evaluate(POST, [f"{keyed.url}/session", {"method": "GET"}])
        assert own == 200
        before = read_keys(folder / "data" / "keys.json")
        foreign = it.page.context.new_page()
        foreign.goto(elsewhere)
        body = '{"name": "evil", "role": "admin"}'
        json = {"Content-Type": "application/json", "X-Kensa-Page": "1"}
        for options in (
            {"method": "POST", "mode": "no-cors", "body": body},
            {"method": "POST", "body": body, "headers": json},
            {"method": "DELETE", "headers": {"X-Kensa-Page": "1"}},
        ):
            assert foreign.evaluate(POST, [f"{keyed.url}/keys", options]) in (
                0, "stopped by the browser",
            )  # fmt: skip
        assert foreign.evaluate(POST, [f"{keyed.url}/keys", {}]) == "stopped by the browser"
        foreign.evaluate(
            """url => {
              const form = document.createElement('form');
              Object.assign(form, {method: 'POST', action: url});
              document.body.append(form); form.submit();
            }""",
            f"{keyed.url}/jobs/none/cancel",
        )
        foreign.wait_for_url(f"{keyed.url}/**")
        assert "foreign_origin" in foreign.content()
        assert read_keys(folder / "data" / "keys.json") == before
        it.wrong = [one for one in it.wrong if elsewhere not in one and "CORS" not in one]


# Keys


def test_the_first_key_is_made_on_the_screen_without_locking_its_maker_out(
    browser: Any, tmp_path: Path, screenshots: Path
) -> None:
    path = tmp_path / "data" / "keys.json"
    with serving(tmp_path) as local, shown(browser, local.url, refused=True) as it:
        it.go("#/system?part=keys")
        it.expect("There is no key")
        it.page.get_by_role("button", name="Make a key").click()
        it.page.get_by_label("Whose is it?").fill("anna")
        assert it.page.get_by_role("radio").all_inner_texts() == ["admin"]
        accept(it, "Make it")
        it.expect("It is shown only now.")
        it.must_be_accessible()
        it.keep(screenshots, "key-made-desktop-en-light")
        key = it.page.get_by_role("dialog").get_by_label("Key", exact=True).input_value()
        assert key.startswith("kensa_")
        accept(it, "Copy")
        it.expect("Copied")
        box = it.page.get_by_role("dialog").get_by_label("Key", exact=True)
        assert box.evaluate("(it) => it.scrollWidth <= it.clientWidth")  # all of it is seen
        assert box.evaluate("(it) => it.scrollHeight <= it.clientHeight")
        with it.page.expect_response("**/keys"):  # written down slowly: the list is asked for again
            pass
        it.expect("From now on a key is needed here.")
        accept(it, "I have it")
        it.page.get_by_role("button", name="anna").wait_for()  # in the frame: known in this tab
        assert it.page.get_by_text("KENSA_ACCESS=anyone").count() == 0
        it.expect("in use here")
        assert key not in it.page.content()

        it.page.get_by_role("button", name="Make a key").click()
        it.page.get_by_label("Whose is it?").fill("line-3")
        it.page.get_by_role("radio", name="line").click()
        accept(it, "Make it")
        made = it.page.get_by_role("dialog").get_by_label("Key", exact=True).input_value()
        accept(it, "I have it")
        used = httpx.get(f"{local.url}/session", headers={"X-API-Key": made}, trust_env=False)
        assert used.json() == {"keys": True, "key": "line-3", "role": "line"}

        own = it.page.locator("li", has_text="anna").get_by_role("button", name="Remove")
        own.click()
        it.expect("It is the key that you are using now.")
        accept(it, "Remove")
        it.expect("make one with the role admin first")
        it.page.locator("li", has_text="line-3").get_by_role("button", name="Remove").click()
        accept(it, "Remove")
        it.page.locator("li", has_text="line-3").wait_for(state="detached")
        own.click()
        it.expect("It is the last key")
        accept(it, "Remove")
        it.expect("There is no key")
        assert read_keys(path) == []
        tab(it, "Audit trail")
        it.expect("Key removed")
        it.expect("line-3")


# What there is


def test_doctor_and_settings_say_what_is_without_telling_passwords(
    browser: Any, tmp_path: Path, kensa_model: Path
) -> None:
    settings = {
        "KENSA_MODEL_DIR": str(kensa_model),
        "KENSA_MODEL_NAME": "bracket",
        "KENSA_RECORD_URL": "postgresql://kensa:hunter2@127.0.0.1:1/kensa",
        "KENSA_KEYS_FILE": str(tmp_path / MARKUP / "keys.json"),
        "KENSA_DRIFT_PARTS": "50",
    }
    with serving(tmp_path, **settings) as local, shown(browser, local.url) as it:
        it.go("#/system")
        it.expect("Decisions are not collected")
        it.expect("bracket")
        it.expect("Memory of the server")
        tab(it, "Doctor")
        it.expect("Worth knowing:" if "note" in local.client.get("/doctor").text else "Nothing")
        it.expect("answers here")
        it.expect("patchcore")
        tab(it, "Settings")
        it.expect(MARKUP)
        assert "hunter2" not in it.page.content()
        record = it.page.locator(".settings li", has_text="KENSA_RECORD_URL")
        assert "set, never shown" in record.inner_text()
        it.page.get_by_label("Only those that were changed").check()
        it.page.locator(".settings li", has_text="KENSA_QUEUE_URL").wait_for(state="detached")
        drift = it.page.locator(".settings li", has_text="KENSA_DRIFT_PARTS")
        assert (
            " ".join(drift.locator(".value").inner_text().split()) == "50 parts changed default 0"
        )
        it.page.get_by_label("Search").fill("no such words")
        it.expect("0 of ")
        it.page.get_by_label("Search").fill("drift parts")
        it.page.wait_for_function("document.querySelectorAll('.settings li').length === 1")
        assert it.page.title().startswith("System")


def test_every_setting_has_its_meaning_and_its_unit_in_japanese_too() -> None:
    text = (FOLDER / "pages" / "system_settings_ja.js").read_text()
    meanings, units = text.split("export const UNITS")
    told = re.findall(r"^  ([A-Z_]+): '[^']+',$", meanings, re.MULTILINE)
    assert told == [variable.removeprefix("KENSA_") for variable, *_ in table()]
    known = {one or other for one, other in re.findall(r"(?:'([^']+)'|(\w+)): '[^']+'", units)}
    assert known == {unit for *_, unit, _ in table() if unit}


def test_text_of_the_trail_is_never_markup(browser: Any, server: Server) -> None:
    change = {"threshold": 0.51, "reason": MARKUP, "gate": False}
    answer = server.client.put("/models/bracket/threshold", json=change)
    assert answer.is_success, answer.text
    with shown(browser, server.url) as it:
        it.go("#/system?part=trail")
        it.expect("Threshold changed")
        it.expect(MARKUP)
        assert it.page.title().startswith("System")


def test_a_schedule_is_added_in_the_words_of_people_and_removed(
    browser: Any, server: Server, screenshots: Path
) -> None:
    photo = seeds()["png_colour"]
    files = [("file", ("1.png", photo, "image/png"))]
    assert server.client.post("/datasets/bracket/train", files=files).is_success
    with shown(browser, server.url) as it:
        it.go("#/system?part=jobs")
        it.expect("Nothing is learned regularly.")
        it.page.get_by_role("button", name="Learn regularly").click()
        it.page.get_by_label("Name", exact=True).fill("sundays")
        it.page.get_by_role("radio", name="Every week").click()
        it.page.get_by_label("Time", exact=True).fill("23:30")
        it.must_be_accessible()
        it.keep(screenshots, "schedule-desktop-en-light")
        accept(it, "Add")
        it.expect("every Sunday at 23:30")
        (kept,) = server.client.get("/schedules").json()["schedules"]
        assert (kept["name"], kept["cron"], kept["timezone"]) == ("sundays", "30 23 * * 0", "UTC")
        assert kept["retrain"] | {"model": "bracket", "category": "bracket"} == kept["retrain"]
        it.page.locator("li", has_text="sundays").get_by_role("button", name="Remove").click()
        accept(it, "Remove")
        it.expect("Nothing is learned regularly.")
        assert server.client.get("/schedules").json() == {"schedules": []}


@pytest.mark.parametrize("stays", [False, True])
def test_the_report_of_a_shift_opens_with_the_key_in_a_tab_to_print(
    browser: Any, keyed: Server, keys: dict[str, str], screenshots: Path, stays: bool
) -> None:
    answer = keyed.client.post(
        "/infer", params={"part": MARKUP}, content=seeds()["png_colour"],
        headers={"Content-Type": "image/png", "X-API-Key": keys["line"]},
    )  # fmt: skip
    assert answer.is_success, answer.text
    with shown(browser, keyed.url, refused=True) as it:
        it.go("#/system")
        log_in(it, keys["line"], stays)
        it.expect("Report of a shift")
        it.page.get_by_role("button", name="日本語").click()
        it.page.get_by_role("combobox").select_option("bracket")
        with it.page.expect_popup() as popup:
            it.page.get_by_role("link", name="現在のシフト").click()
        report = popup.value
        report.get_by_text("検査数").first.wait_for()
        assert report.evaluate("document.documentElement.lang") == "ja"
        assert report.evaluate("document.title.includes('broken')") is False
        width = "document.querySelector('svg').getBoundingClientRect().width"
        assert report.evaluate(width) > 300  # drawn, with its styles
        report.evaluate("window.print = () => { document.title = 'printed'; }")
        report.get_by_role("button", name="印刷").click()
        assert report.title() == "printed"
        report.screenshot(path=screenshots / f"report-{stays}.png")
