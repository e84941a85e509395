"""Claims about Review: a reject is marked with one touch, and what was marked can be taken back."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.http.keys import add_key
from support.browser import Shown, shown
from support.server import Server, serving
from support.waiting import until

MARKUP = "<img src=x onerror=alert(1)>"
LOOKS = [
    ("desktop", "en", True), ("tablet", "ja", False), ("phone", "ja", True), ("phone", "en", False),
]  # fmt: skip
REJECTS = 6  # of the sample parts


def with_rejects(server: Server, sample_data: Path, **headers: str) -> None:
    """A limit that rejects several parts, and parts that meet it: named, with code as a name."""

    def score(picture: Path, **query: str) -> float:
        sent = {"Content-Type": "image/png", **headers}
        answer = server.client.post(
            "/infer", params=query, content=picture.read_bytes(), headers=sent
        )
        assert answer.is_success, answer.text
        return float(answer.json()["score"])

    pictures = sorted((sample_data / "test").rglob("*.png"))
    scores = sorted((score(one, record="false") for one in pictures), reverse=True)
    body = {"threshold": sum(scores[REJECTS - 1 : REJECTS + 1]) / 2, "reason": "for rejects"}
    answer = server.client.put("/models/bracket/threshold", json=body, headers=headers)
    assert answer.is_success, answer.text
    for place, picture in enumerate(pictures):
        score(picture, part=MARKUP if picture.stem == "stain_00" else f"P-{place:02}")


@pytest.fixture(scope="module")
def inspected(
    kensa_model: Path, sample_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What a server leaves that judged the parts. To be copied."""
    folder = tmp_path_factory.mktemp("inspected")
    settings = {"KENSA_MODEL_DIR": str(kensa_model), "KENSA_MODEL_NAME": "bracket"}
    with serving(folder, **settings) as server:
        with_rejects(server, sample_data)
        server.process.terminate()
        server.process.wait()
    return folder / "data"


@pytest.fixture
def served(inspected: Path, tmp_path: Path) -> Iterator[Server]:
    """A record of its own for each test: they mark it."""
    shutil.copytree(inspected, tmp_path / "data")
    with serving(tmp_path) as server:
        yield server


@pytest.fixture
def review(browser: Any, served: Server) -> Iterator[Shown]:
    with shown(browser, served.url) as it:
        it.go("#/review")
        left(it)
        yield it


def decisions(server: Server, **query: Any) -> list[dict[str, Any]]:
    found = server.client.get("/decisions", params={"limit": 500, **query}).json()["decisions"]
    return list(found)


def rejects(server: Server, **query: Any) -> list[dict[str, Any]]:
    return decisions(server, verdict="anomaly", **query)


def left(it: Shown) -> str:
    found = it.page.locator(".left")
    found.wait_for()
    return str(found.inner_text())


def part(it: Shown) -> str:
    """The name of the part that is shown."""
    return str(it.page.locator(".about dd").first.inner_text())


def labels(server: Server) -> dict[str, str]:
    return {
        one["part"]: one["label"] + (f" {one['defect']}" if one["defect"] else "")
        for one in decisions(server)
        if one["label"]
    }


def marked(server: Server, expected: dict[str, str]) -> None:
    until(lambda: labels(server) == expected, lambda: str(labels(server)), within_s=10)


def test_a_reject_is_marked_with_one_key_and_the_next_one_is_there(
    review: Shown, served: Server, screenshots: Path
) -> None:
    first, second, third, *_ = rejects(served)
    number = len(rejects(served))
    assert number == REJECTS
    assert (left(review), part(review)) == (f"{number} left", first["part"])
    review.page.keyboard.press("g")
    assert (left(review), part(review)) == (f"{number - 1} left", second["part"])
    review.page.keyboard.press("d")
    assert part(review) == third["part"]
    review.page.keyboard.press("u")
    expected = {first["part"]: "good", second["part"]: "defect", third["part"]: "unusable"}
    marked(served, expected)
    review.keep(screenshots, "review-story-marked")
    for before, name in ((second, third["part"]), (first, second["part"])):
        review.page.keyboard.press("z")
        del expected[name]
        assert part(review) == name
        marked(served, expected)
        assert before["part"] in expected
    review.page.keyboard.press("z")
    marked(served, {})
    assert (left(review), part(review)) == (f"{number} left", first["part"])
    whole = served.client.get(f"/decisions/{first['id']}").json()
    assert [one["details"]["label"] for one in whole["history"]] == ["", "good"]
    review.expect("mark withdrawn")  # and who looks at it sees that


def test_the_next_pictures_are_here_before_they_are_wanted(review: Shown, served: Server) -> None:
    asked: list[str] = []
    following = rejects(served)[1:4]
    review.page.locator(".picture .over img").wait_for()
    review.page.on("request", lambda request: asked.append(request.url))
    review.page.wait_for_timeout(2500)  # they are drawn one after the other
    asked.clear()
    review.page.keyboard.press("ArrowRight")
    source = review.page.locator(".picture .over img").get_attribute("src")
    assert part(review) == following[0]["part"]
    assert source is not None
    assert source.startswith("blob:")
    review.page.wait_for_timeout(500)
    pictures = [url for url in asked if "/overlay" in url]
    assert not [url for one in following for url in pictures if f"/{one['id']}/" in url]


def test_a_kind_of_defect_is_typed_once_and_then_one_touch(review: Shown, served: Server) -> None:
    first, second, third, *_ = rejects(served)
    page = review.page
    page.get_by_role("button", name="New kind of defect").click()
    page.keyboard.type(f"gd {MARKUP}")  # what is typed is no command
    page.keyboard.press("Enter")
    kind = f"gd {MARKUP}"
    page.get_by_role("button", name=kind).first.click()
    page.keyboard.press("1")
    marked(served, {one["part"]: f"defect {kind}" for one in (first, second, third)})
    assert page.locator("img[src=x]").count() == 0
    page.reload()  # another tablet knows it, too: it is in the record
    chip = page.locator(".kinds button").first
    chip.wait_for()
    page.get_by_text(kind).first.wait_for()
    assert kind in chip.inner_text()


def test_a_part_whose_name_is_code_is_text(review: Shown, served: Server) -> None:
    names = [one["part"] for one in rejects(served)]
    assert MARKUP in names
    for _ in range(names.index(MARKUP)):
        review.page.keyboard.press("ArrowRight")
    assert part(review) == MARKUP
    review.page.keyboard.press("g")
    review.page.locator(".lastly .name", has_text=MARKUP).wait_for()
    review.page.locator("summary").click()
    review.page.locator(".who-marked .history li").first.wait_for()
    assert review.page.locator("img[src=x]").count() == 0


def test_an_undo_sets_back_what_somebody_else_had_said_meanwhile(
    review: Shown, served: Server
) -> None:
    first, second, *_ = rejects(served)
    body = {"label": "defect", "defect": "dent", "reason": "felt it"}
    assert served.client.post(f"/decisions/{first['id']}/label", json=body).is_success
    review.page.keyboard.press("g")
    review.page.keyboard.press("g")
    marked(served, {first["part"]: "good", second["part"]: "good"})
    review.page.locator(".lastly button", has_text=first["part"]).click()  # not only the last one
    marked(served, {first["part"]: "defect dent", second["part"]: "good"})
    assert part(review) == first["part"]
    review.page.locator(".about .history .mark", has_text="dent").first.wait_for()
    review.page.locator("summary").click()
    review.page.locator(".who-marked .mark", has_text="dent").first.wait_for()


def test_an_undo_leaves_what_somebody_else_said_since(browser: Any, served: Server) -> None:
    first, second, *_ = rejects(served)
    with shown(browser, served.url, refused=True) as it:
        it.go("#/review")
        left(it)
        it.page.keyboard.press("g")
        marked(served, {first["part"]: "good"})
        body = {"label": "defect", "defect": "dent"}
        assert served.client.post(f"/decisions/{first['id']}/label", json=body).is_success
        it.page.keyboard.press("z")
        it.expect(f"{first['part']}: somebody has marked it meanwhile (defect: dent).")
        assert labels(served) == {first["part"]: "defect dent"}
        assert (part(it), left(it)) == (second["part"], f"{REJECTS - 1} left")
        assert it.page.locator(".lastly").count() == 0


def test_a_double_click_marks_one_part_and_takes_one_back(review: Shown, served: Server) -> None:
    first, second, *_ = rejects(served)
    review.page.locator(".marks .good").dblclick()
    marked(served, {first["part"]: "good"})
    review.page.wait_for_timeout(400)
    assert part(review) == second["part"]
    review.page.locator(".marks .good").click()
    marked(served, {first["part"]: "good", second["part"]: "good"})
    review.page.wait_for_timeout(400)
    review.page.locator(".marks .button", has_text="Undo").dblclick()
    marked(served, {first["part"]: "good"})
    review.page.wait_for_timeout(400)
    assert (part(review), labels(served)) == (second["part"], {first["part"]: "good"})


def test_what_somebody_else_has_marked_waits_for_nobody(
    browser: Any, review: Shown, served: Server
) -> None:
    first = part(review)
    review.page.keyboard.press("g")
    marked(served, {first: "good"})
    with shown(browser, served.url) as other:
        other.go("#/review")
        assert left(other) == f"{REJECTS - 1} left"
        assert part(other) != first


def test_parts_near_the_limit_and_the_highest_scores_are_asked_for_at_a_touch(
    review: Shown, served: Server
) -> None:
    page = review.page
    page.get_by_role("radio", name="Highest score first").click()
    by_score = sorted(rejects(served), key=lambda one: -one["score"])
    page.locator(".about dd", has_text=by_score[0]["part"]).wait_for()
    page.get_by_role("radio", name="near the limit").click()
    limit = by_score[0]["threshold"]
    near = decisions(served, verdict="normal", min_score=limit - 0.1)
    highest = max(near, key=lambda one: one["score"])
    page.locator(".about dd", has_text=highest["part"]).wait_for()
    assert left(review) == f"{sum(one['has_picture'] for one in near)} left"
    assert "what=near" in page.url
    assert "order=score" in page.url
    page.keyboard.press("d")
    marked(served, {highest["part"]: "defect"})


def test_when_all_are_marked_it_says_so_and_what_to_do_with_them(
    review: Shown, served: Server
) -> None:
    for one in rejects(served):
        assert part(review) == one["part"]
        review.page.keyboard.press("g")
    review.expect("All looked at")
    marked(served, {one["part"]: "good" for one in rejects(served)})
    link = review.page.get_by_role("link", name="Learn from them")
    assert link.get_attribute("href") == "#/teach?from=decisions&model=bracket"
    assert review.page.locator(".beside .mark.good + b").inner_text() == str(len(rejects(served)))
    review.page.keyboard.press("z")
    left(review)


def test_a_mark_that_the_server_does_not_take_comes_back(browser: Any, served: Server) -> None:
    with shown(browser, served.url, refused=True) as it:
        it.go("#/review")
        first, number = part(it), left(it)
        it.page.route("**/label*", lambda route: route.abort())
        it.page.keyboard.press("g")
        it.expect("The server does not answer.")
        assert left(it) == number
        it.page.unroute("**/label*")
        it.page.keyboard.press("ArrowLeft")
        assert part(it) == first
        it.page.keyboard.press("g")
        marked(served, {first: "good"})


def test_a_mark_that_is_taken_back_before_the_server_refused_it_leaves_nothing(
    browser: Any, served: Server
) -> None:
    with shown(browser, served.url, refused=True) as it:
        it.go("#/review")
        first, number = part(it), left(it)
        asked: list[Any] = []
        it.page.route("**/label*", lambda route: asked.append(route))
        it.page.keyboard.press("g")
        it.page.keyboard.press("z")
        for _ in range(20):  # the mark, and what else is asked for behind it
            it.page.wait_for_timeout(100)
            while asked:
                asked.pop().abort()
        assert (part(it), left(it)) == (first, number)
        assert it.page.locator(".lastly").count() == 0


def test_a_limit_that_did_not_come_is_asked_for_again(browser: Any, served: Server) -> None:
    with shown(browser, served.url, refused=True) as it:
        it.page.route("**/threshold", lambda route: route.abort())
        it.go("#/review?what=near")
        again = it.page.get_by_role("button", name="Try again")
        again.wait_for()
        it.page.unroute("**/threshold")
        again.click()
        again.wait_for(state="detached")
        it.page.locator(".left, .empty").first.wait_for()


def test_keys_and_tab_are_enough(review: Shown, served: Server) -> None:
    first, second, *_ = rejects(served)
    page = review.page
    page.get_by_role("button", name="Good").focus()
    page.keyboard.press("Enter")
    assert part(review) == second["part"]
    page.keyboard.press("Enter")  # the focus is where it was
    marked(served, {first["part"]: "good", second["part"]: "good"})
    page.get_by_role("button", name="Undo", exact=True).focus()
    page.keyboard.press("Space")
    marked(served, {first["part"]: "good"})
    page.keyboard.press("h")
    assert page.locator(".picture .over").evaluate("over => over.style.opacity") == "0"
    assert (
        page.locator("[role=status].heard").inner_text()
        == f"{second['part']} is not marked any more."
    )


def test_views_of_a_part_are_seen_one_by_one(
    browser: Any, served: Server, sample_data: Path
) -> None:
    test = sample_data / "test" / "sample_bracket"
    views = {"left": test / "normal" / "0000.png", "top": test / "anomaly" / "stain_01.png"}
    for view, picture in views.items():
        answer = served.client.post(
            f"/parts/viewed/views/{view}", params={"of": "left,top"}, content=picture.read_bytes(),
            headers={"Content-Type": "image/png"},
        )  # fmt: skip
        assert answer.is_success, answer.text
    with shown(browser, served.url, refused=True) as it:  # a good view's picture is not kept
        it.go("#/review")
        it.page.locator(".views button").nth(1).wait_for()
        assert part(it) == "viewed"
        pressed = it.page.locator(".views [aria-pressed=true] .name")
        assert pressed.inner_text() == "top"
        it.page.get_by_role("button", name="left").click()
        assert pressed.inner_text() == "left"
        it.must_be_accessible()


def test_a_lines_key_sees_and_marks_nothing(browser: Any, inspected: Path, tmp_path: Path) -> None:
    shutil.copytree(inspected, tmp_path / "data")
    keys = tmp_path / "data" / "keys.json"
    of_line, of_boss = add_key(keys, "plc", "line"), add_key(keys, "boss", "operator")
    with serving(tmp_path) as server:
        server.client.headers["X-API-Key"] = of_boss
        with shown(browser, server.url, refused=True) as it:
            it.page.add_init_script(f"sessionStorage.setItem('kensa.key', '{of_line}')")
            it.go("#/review")
            number = left(it)
            it.expect("This needs a key with the role operator.")
            assert it.page.get_by_role("button", name="Good").is_disabled()
            it.page.keyboard.press("g")
            assert left(it) == number
        assert labels(server) == {}


@pytest.fixture(scope="module")
def looked_at(inspected: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("looked-at")
    shutil.copytree(inspected, folder / "data")
    with serving(folder) as server:
        yield server


@pytest.mark.parametrize(("size", "language", "dark"), LOOKS)
def test_review_fits_and_can_be_used_by_everybody(
    browser: Any, looked_at: Server, screenshots: Path, size: str, language: str, dark: bool
) -> None:
    look = f"review-{size}-{language}-{'dark' if dark else 'light'}"
    with shown(browser, looked_at.url, size=size, language=language, dark=dark) as it:
        it.go("#/review")
        it.page.locator(".picture .over img").wait_for()
        it.must_fit()
        it.must_be_accessible()
        it.keep(screenshots, look)
        it.page.locator(".marks .bad").click()
        it.page.locator(".lastly li").wait_for()
        it.page.locator("summary").click()
        it.page.locator(".who-marked .history li").first.wait_for()
        it.must_fit()
        it.must_be_accessible()
        it.keep(screenshots, f"{look}-marked")
        it.page.locator(".marks .button").last.click()
        it.page.locator(".lastly li").wait_for(state="detached")
