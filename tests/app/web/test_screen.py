"""Claims about the screen as a whole: every page, as it is opened on a PC, a tablet and a phone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.http.keys import Role, add_key
from support.browser import SIZES, shown
from support.server import Server, serving

PAGES = ("line", "try", "review", "find", "model", "teach", "regions", "system")
BELOW = (
    "line?wall=1", "find?id=seen", "teach?new=bolt&step=2", "teach?category=bolt",
    "teach?from=decisions", "system?part=jobs", "system?part=keys", "system?part=doctor",
    "system?part=settings", "system?part=trail",
)  # fmt: skip
LOOKS = {"en": False, "ja": True}  # language -> whether it is dark there
OTHERS = {"en": True, "ja": False}


@pytest.fixture(scope="module")
def line(server: Server, sample_data: Path) -> Server:
    """With some parts behind it: good ones, rejects, and one without a verdict."""
    for path in sorted((sample_data / "test").rglob("*.png")):
        assert server.client.post(
            "/infer", params={"part": path.stem}, content=path.read_bytes(),
            headers={"Content-Type": "image/png"},
        ).is_success  # fmt: skip
    server.infer(b"no image")
    return server


def look(page: Any, line: Server, size: str, looks: dict[str, bool], to: Path) -> None:
    for language, dark in looks.items():
        with shown(page, line.url, size=size, language=language, dark=dark, refused=True) as it:
            for name in PAGES:
                it.go(f"#/{name}")
                it.page.wait_for_selector(f"main.{name} h1", timeout=15_000)
                it.page.wait_for_timeout(500)  # what follows the first look: pictures, counts
                it.keep(to, f"{name}-{size}-{language}-{'dark' if dark else 'light'}")
                it.must_fit()
                it.must_be_accessible()


@pytest.mark.parametrize("size", SIZES)
def test_every_page_fits_and_can_be_used_by_everybody(
    browser: Any, line: Server, size: str, screenshots: Path
) -> None:
    look(browser, line, size, LOOKS, screenshots)


@pytest.mark.soak
@pytest.mark.parametrize("size", SIZES)
def test_every_page_in_the_other_colours(
    browser: Any, line: Server, size: str, screenshots: Path
) -> None:
    look(browser, line, size, OTHERS, screenshots)


def test_the_language_is_chosen_at_a_touch_and_stays(browser: Any, line: Server) -> None:
    with shown(browser, line.url, refused=True) as it:  # one has no picture that can be shown
        it.go("#/find")
        it.page.get_by_role("button", name="日本語").click()
        it.page.get_by_role("link", name="検索").wait_for()
        assert it.page.evaluate("document.documentElement.lang") == "ja"
        it.page.reload()
        it.page.get_by_role("link", name="検索").wait_for()
        it.page.get_by_role("button", name="English").click()
        it.page.get_by_role("link", name="Find").wait_for()


def test_a_finger_is_told_why_a_button_cannot_be_pressed(browser: Any, line: Server) -> None:
    with shown(browser, line.url, size="tablet") as it:
        it.go("#/line")
        box = it.page.locator("button:disabled", has_text="Challenge").bounding_box()
        for _ in range(2):
            it.page.touchscreen.tap(box["x"] + 20, box["y"] + 20)
        it.page.locator(".toast", has_text="No known pictures are named").wait_for()
        assert it.page.locator(".toast").count() == 1


def test_a_page_has_an_address_that_can_be_sent_on_and_gone_back_from(
    browser: Any, line: Server
) -> None:
    with shown(browser, line.url) as it:
        it.go("")
        it.page.wait_for_selector("main.line")
        it.page.get_by_role("link", name="System").click()
        it.page.wait_for_selector("main.system")
        assert it.page.url.endswith("#/system")
        it.page.go_back()
        it.page.wait_for_selector("main.line")
        it.go("#/nothing-of-that-name")
        it.page.wait_for_selector("main.line")


def test_who_uses_no_mouse_gets_to_the_content_at_once(browser: Any, line: Server) -> None:
    with shown(browser, line.url) as it:
        it.go("#/system")
        it.page.wait_for_selector("main.system")
        it.page.keyboard.press("Tab")
        assert it.page.evaluate("document.activeElement.className") == "skip"
        it.page.keyboard.press("Enter")
        assert it.page.evaluate("document.activeElement.id") == "main"
        assert it.page.url.endswith("#/system")


def test_the_server_that_is_away_is_said_and_waited_for(browser: Any, tmp_path: Path) -> None:
    with serving(tmp_path) as server, shown(browser, server.url, refused=True) as it:
        it.go("#/system")
        it.page.wait_for_selector("main.system h1")
        it.page.route("**/session", lambda route: route.abort())
        it.page.reload()
        it.expect("The server does not answer.")
        it.page.unroute("**/session")
        it.page.wait_for_selector("main.system h1", timeout=10_000)


def test_a_page_that_could_not_come_comes_by_itself_once_the_server_is_back(
    browser: Any, line: Server
) -> None:
    with shown(browser, line.url, refused=True) as it:
        it.go("#/system")
        it.page.wait_for_selector("main.system h1")
        it.page.route("**/pages/find.js", lambda route: route.abort())
        it.page.route("**/livez", lambda route: route.abort())
        it.page.get_by_role("link", name="Find").click()
        it.expect("The server does not answer.")
        it.page.unroute("**/pages/find.js")
        it.page.unroute("**/livez")
        it.page.wait_for_selector("main.find h1", timeout=10_000)


@pytest.fixture
def nothing(tmp_path: Path) -> Iterator[Server]:
    """A server as it is after the installation: without a model."""
    with serving(tmp_path) as server:
        yield server


def test_with_no_model_each_page_says_what_to_do(browser: Any, nothing: Server) -> None:
    with shown(browser, nothing.url, refused=True) as it:
        for name in PAGES:
            it.go(f"#/{name}")
            it.page.wait_for_selector(f"main.{name} h1")
            it.page.wait_for_timeout(400)
            assert it.page.locator("main .problem").count() == 0, name
            it.must_be_accessible()


@pytest.mark.parametrize("role", ["line", "operator"])
def test_no_page_asks_for_what_the_key_may_not_see(
    browser: Any, kensa_model: Path, sample_data: Path, tmp_path: Path, role: Role
) -> None:
    key = add_key(tmp_path / "data" / "keys.json", "somebody", role)
    picture = next((sample_data / "test").rglob("*.png")).read_bytes()
    settings = {"KENSA_MODEL_DIR": str(kensa_model), "KENSA_RECORD_SAMPLE": "1"}
    with serving(tmp_path, **settings) as server, shown(browser, server.url) as it:
        sent = {"X-API-Key": key, "Content-Type": "image/png", "X-Request-ID": "seen"}
        assert server.client.post("/infer", content=picture, headers=sent).is_success
        it.page.add_init_script(f"sessionStorage.setItem('kensa.key', '{key}')")
        refused: list[str] = []
        it.page.on("response", lambda one: one.ok or refused.append(f"{one.status} {one.url}"))
        for where in (*PAGES, *BELOW):
            it.go(f"#/{where}")
            it.page.wait_for_selector("main h1")
            it.page.wait_for_timeout(500)  # what follows the first look
            assert it.page.locator("main .problem, dialog .problem, .toast.bad").count() == 0, where
        assert refused == []
