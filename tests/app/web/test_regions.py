"""Claims about the page of regions: what is drawn in a browser is what never counts."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from app.http.keys import add_key
from engines.image import decode
from engines.regions import Regions
from engines.store.regions import of_png, of_polygons
from support.browser import Shown, shown
from support.server import Server, serving

SIDE = 320  # of the sample parts
PATH = "/models/bracket/regions"
WHY = "A label that is printed anew each day"
LABEL = (200, 80, 240, 120)  # where it is: left, top, right, bottom
NUMBERS = itertools.count(1)
Point = tuple[float, float]


@pytest.fixture(scope="module")
def machine(kensa_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that keeps the picture of each part."""
    folder = tmp_path_factory.mktemp("machine")
    settings = {"KENSA_MODEL_DIR": str(kensa_model), "KENSA_MODEL_NAME": "bracket"}
    with serving(folder, **settings, KENSA_RECORD_SAMPLE="1") as server:
        yield server


@pytest.fixture
def line(machine: Server) -> Server:
    """The same, where every pixel counts."""
    if machine.client.get(PATH).json()["width"]:
        assert machine.client.delete(PATH, params={"reason": "The next test."}).is_success
    return machine


@pytest.fixture
def printed(line: Server, sample_data: Path) -> bytes:
    """The picture of the last part, which was rejected for what is printed on it."""
    good = sample_data / "test" / "sample_bracket" / "normal" / "0000.png"
    assert send(line, good.read_bytes(), "good") == "Normal"
    left, top, right, bottom = LABEL
    pixels = decode(good.read_bytes()).copy()
    pixels[top:bottom, left:right] = (230, 30, 200)
    data = as_file(pixels)
    assert send(line, data, "printed") == "Anomaly"
    return data


def as_file(pixels: NDArray[np.uint8]) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def send(line: Server, picture: bytes, part: str) -> str:
    """Its verdict; its name gets a number, since each part has its own."""
    answer = line.client.post(
        "/infer",
        params={"part": f"{part}-{next(NUMBERS)}"},
        content=picture,
        headers={"Content-Type": "image/png"},
    )
    label: str = answer.json()["label"]
    return label


def open_page(it: Shown) -> None:
    """The page, with its picture to draw on."""
    it.go("#/regions?name=bracket")
    it.page.wait_for_selector(".stage .ground > img")


def at(it: Shown, x: float, y: float) -> Point:
    """Where a pixel of the picture is on the screen."""
    sheet = it.page.locator(".ground").bounding_box()
    return sheet["x"] + x * sheet["width"] / SIDE, sheet["y"] + y * sheet["height"] / SIDE


def tool(it: Shown, name: str) -> None:
    it.page.get_by_role("radio", name=name, exact=True).click()


def drag(it: Shown, *points: Point) -> None:
    mouse = it.page.mouse
    mouse.move(*at(it, *points[0]))
    mouse.down()
    for point in points[1:]:
        mouse.move(*at(it, *point), steps=5)
    mouse.up()


def click(it: Shown, *points: Point) -> None:
    for point in points:
        it.page.mouse.click(*at(it, *point))
        it.page.wait_for_timeout(450)  # two at once would be a double tap


def apply(it: Shown, *, gate: bool = False) -> bytes:
    """Apply what is drawn; the mask that the page sent."""
    it.page.get_by_role("button", name="Apply …").click()
    it.page.get_by_role("radio", name="Through the gate" if gate else "Live at once").click()
    it.page.get_by_label("Why? It stands in the record.").fill(WHY)
    with it.page.expect_request(lambda one: one.method == "PUT") as sent:
        it.page.get_by_role("button", name="Apply", exact=True).click()
    it.page.get_by_role("button", name="Discard the drawing").wait_for(state="detached")
    data: bytes = sent.value.post_data_buffer
    return data


def drawn(data: bytes) -> NDArray[np.uint8]:
    """The pixels of a PNG, which is grey and holds nothing but black and white."""
    with Image.open(io.BytesIO(data)) as picture:
        assert (picture.format, picture.mode, picture.size) == ("PNG", "L", (SIDE, SIDE))
        pixels = np.array(picture)
    assert set(np.unique(pixels)) <= {0, 255}
    return pixels


def in_force(line: Server) -> NDArray[np.bool_]:
    answer = line.client.get(PATH, headers={"Accept": "image/png"})
    assert answer.status_code == 200, answer.text
    return of_png(answer.content).mask


def wait_for_share(it: Shown, about: float) -> None:
    """Until the page says that about so many percent of the picture never count."""
    it.page.wait_for_function(
        "(about) => Math.abs(parseFloat(document.querySelector('.tiles b')?.textContent) - about)"
        " < 0.3",
        arg=about,
    )


def corners(left: float, top: float, right: float, bottom: float) -> list[list[float]]:
    return [[left, top], [right, top], [right, bottom], [left, bottom]]


# ---- the story ----------------------------------------------------------------------------------


def test_a_region_that_is_drawn_over_a_defect_is_obeyed_and_rolled_back(
    browser: Any, line: Server, printed: bytes, screenshots: Path
) -> None:
    with shown(browser, line.url) as it:
        open_page(it)
        it.expect("Part printed-")
        it.expect("All of the last")  # would be rejected again
        tool(it, "Rectangle")
        left, top, right, bottom = LABEL
        drag(it, (left - 2, top - 2), (right + 2, bottom + 2))
        it.expect("all of it hidden")
        it.expect("show nothing outside of the mask")
        it.keep(screenshots, "regions-drawn")
        drawn(apply(it))
        it.page.locator(".newest.live").get_by_text(WHY).wait_for()
        assert send(line, printed, "printed") == "Normal"
        mask = in_force(line)
        assert mask[top:bottom, left:right].all()
        assert abs(mask.sum() - 44 * 44) < 200
        it.page.get_by_role("button", name="Roll back").click()
        it.page.locator("dialog").get_by_role("button", name="Roll back").click()
        it.expect("Rolled back.")
        assert line.client.get(PATH).json()["width"] is None
        assert send(line, printed, "printed") == "Anomaly"
        wait_for_share(it, 0)


def test_the_gate_holds_what_hides_a_known_defect_and_a_person_may_accept_it(
    browser: Any, line: Server, sample_data: Path, screenshots: Path
) -> None:
    folder = sample_data / "test" / "sample_bracket" / "anomaly"
    known = [
        one
        for one in sorted(folder.iterdir())
        if send(line, one.read_bytes(), one.stem) == "Anomaly"
    ]
    picture = known[-1]  # which the page shows first
    where = np.argwhere(
        decode((sample_data / "masks" / "sample_bracket" / picture.name).read_bytes())[..., 0] > 0
    )
    (top, left), (bottom, right) = where.min(axis=0), where.max(axis=0)
    with shown(browser, line.url, size="tablet") as it:
        open_page(it)
        tool(it, "Rectangle")
        drag(
            it,
            (max(left - 12, 0), max(top - 12, 0)),
            (min(right + 12, SIDE), min(bottom + 12, SIDE)),
        )
        apply(it, gate=True)
        held = it.page.locator(".newest.held")
        held.wait_for(timeout=60_000)
        assert "known defect" in held.locator(".reasons").inner_text()
        held.locator(".flips img").first.wait_for()
        it.page.evaluate("document.querySelector('.newest').scrollIntoView()")
        it.keep(screenshots, "regions-held")
        it.must_be_accessible()
        it.expect("which is not live")
        assert line.client.get(PATH).json()["width"] is None
        held.get_by_role("button", name="Make it live all the same").click()
        it.page.locator("dialog").get_by_role("button", name="Make it live all the same").click()
        it.page.locator(".newest.live").wait_for()
        assert in_force(line).any()
        assert send(line, picture.read_bytes(), "again") == "Normal"


def test_all_regions_are_removed_with_a_reason(browser: Any, line: Server, printed: bytes) -> None:
    body = {"width": SIDE, "height": SIDE, "polygons": [corners(*LABEL)], "reason": WHY}
    assert line.client.put(PATH, json=body).is_success
    with shown(browser, line.url) as it:
        open_page(it)
        wait_for_share(it, 1.6)  # begins with what is in force
        it.page.get_by_role("button", name="Remove all regions").click()
        yes = it.page.locator("dialog").get_by_role("button", name="Remove all regions")
        assert yes.is_disabled()  # without a reason
        it.page.get_by_role("radio", name="Live at once").click()
        it.page.get_by_label("Why? It stands in the record.").fill("The label is gone.")
        yes.click()
        it.page.locator(".newest.live").get_by_text("The label is gone.").wait_for()
        assert line.client.get(PATH).json()["width"] is None
        assert send(line, printed, "printed") == "Anomaly"


# ---- every way to draw --------------------------------------------------------------------------


def test_a_polygon_is_drawn_with_the_keyboard_alone(
    browser: Any, line: Server, printed: bytes
) -> None:
    with shown(browser, line.url) as it:
        open_page(it)
        press = it.page.keyboard.press
        for _ in range(40):
            if it.page.evaluate("document.activeElement.classList.contains('stage')"):
                break
            press("Tab")
        step = SIDE // 64
        press("Space")  # in the middle
        for arrow, times in (("ArrowRight", 8), ("ArrowDown", 6), ("ArrowLeft", 8)):
            for _ in range(times):
                press(arrow)
            press("Space")
        press("ArrowLeft")
        press("Space")  # one too many
        press("Backspace")
        press("Enter")
        expected = of_polygons(SIDE, SIDE, [corners(160, 160, 160 + 8 * step, 160 + 6 * step)]).mask
        assert ((drawn(apply(it)) > 0) == expected).all()
        assert (in_force(line) == expected).all()


def test_brush_eraser_undo_and_redo_set_the_pixels_that_they_should(
    browser: Any, line: Server, printed: bytes
) -> None:
    with shown(browser, line.url) as it:
        open_page(it)
        undo, redo = (it.page.get_by_role("button", name=name) for name in ("Undo", "Redo"))
        tool(it, "Brush")
        it.page.get_by_role("slider").fill("6.2")
        it.expect("⌀ 20 px")
        drag(it, (100, 100), (200, 100))
        tool(it, "Erase")
        drag(it, (150, 60), (150, 140))
        tool(it, "Hide")
        drag(it, (250, 250), (260, 260))
        undo.click()
        mask = drawn(apply(it)) > 0
        assert (in_force(line) == mask).all()
        assert mask[100, 95:135].all()
        assert mask[93:107, 110].all()
        assert not mask[:, 143:157].any()  # erased
        assert mask[100, 165:205].all()
        assert not mask[86].any()
        assert not mask[114].any()
        assert not mask[200:].any()  # undone
        tool(it, "Rectangle")
        drag(it, (250, 250), (260, 260))
        undo.click()
        assert it.page.get_by_role("button", name="Apply …").is_disabled()
        redo.click()
        again = drawn(apply(it)) > 0
        assert again[251:259, 251:259].all()
        again[240:270, 240:270] = False
        assert (again == mask).all()  # what was in force is where it begins


def test_corners_are_dragged_and_a_double_tap_closes(
    browser: Any, line: Server, printed: bytes
) -> None:
    with shown(browser, line.url) as it:
        open_page(it)
        click(it, (100, 100), (180, 100))
        it.page.mouse.dblclick(*at(it, 180, 180))
        it.page.locator(".lines .shape").wait_for()
        drag(it, (180, 180), (100, 180))
        mask = drawn(apply(it)) > 0
        assert mask[110, 105]
        assert mask[150, 105]
        assert not mask[150, 160]  # where it was before
        assert abs(mask.sum() - 80 * 80 / 2) < 300


def test_inverted_only_what_is_inside_counts(browser: Any, line: Server, printed: bytes) -> None:
    with shown(browser, line.url) as it:
        open_page(it)
        tool(it, "Rectangle")
        drag(it, (40, 40), (280, 280))
        it.page.get_by_role("button", name="Invert").click()
        mask = drawn(apply(it)) > 0
        assert not mask[42:278, 42:278].any()
        assert mask[:38].all()
        assert mask[:, 282:].all()


def test_what_leaves_nothing_is_not_sent(browser: Any, line: Server, printed: bytes) -> None:
    with shown(browser, line.url) as it:
        open_page(it)
        it.page.get_by_role("button", name="Invert").click()
        it.expect("With its reach it hides all of the picture")
        assert it.page.get_by_role("button", name="Apply …").is_disabled()
        it.page.get_by_role("button", name="Clear").click()
        assert it.page.get_by_role("button", name="Apply …").is_enabled()


class Hand:
    """Its fingers on the screen."""

    def __init__(self, it: Shown) -> None:
        self.session = it.page.context.new_cdp_session(it.page)

    def touch(self, kind: str, *points: Point) -> None:
        """Where its fingers are now."""
        where = [{"x": x, "y": y, "id": number} for number, (x, y) in enumerate(points)]
        self.session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": where})


def test_a_finger_draws_and_two_of_them_zoom(browser: Any, line: Server, printed: bytes) -> None:
    with shown(browser, line.url, size="phone") as it:
        open_page(it)
        tool(it, "Brush")
        touch = Hand(it).touch
        scrolled = it.page.evaluate("scrollY")
        touch("touchStart", at(it, 100, 100))
        for x in range(105, 205, 5):
            touch("touchMove", at(it, x, 100))
        touch("touchEnd")
        assert it.page.evaluate("scrollY") == scrolled
        wide = it.page.locator(".ground").bounding_box()["width"]
        one, other = at(it, 120, 200), at(it, 200, 200)
        touch("touchStart", one)
        touch("touchStart", one, other)
        for by in range(0, 60, 10):
            touch("touchMove", (one[0] - by, one[1]), (other[0] + by, other[1]))
        touch("touchEnd")
        assert it.page.locator(".ground").bounding_box()["width"] > 1.5 * wide
        mask = drawn(apply(it)) > 0
        assert mask[100, 100:199].all()
        assert not mask[120:].any()  # of the two fingers nothing is drawn


def test_the_reach_that_is_shown_is_the_one_that_judges(
    browser: Any, line: Server, printed: bytes
) -> None:
    mask = np.zeros((90, 110), np.uint8)
    mask[20:25, 30:80] = mask[60:61, 5:6] = 1
    with shown(browser, line.url) as it:
        open_page(it)
        reached = it.page.evaluate(
            """async (mask) => {
                const { reached } = await import('/web/pages/regions_mask.js');
                return [...reached(Uint8Array.from(mask), 110, 90, 256, 24)];
            }""",
            mask.ravel().tolist(),
        )
    expected = Regions(mask > 0).reached(256, 24)
    assert (np.array(reached).reshape(256, 256) == expected).all()


# ---- around it ----------------------------------------------------------------------------------


def test_a_drawing_outlives_the_page_and_is_asked_about_before_it_goes(
    browser: Any, line: Server, printed: bytes
) -> None:
    with shown(browser, line.url) as it:
        open_page(it)
        tool(it, "Rectangle")
        drag(it, (100, 100), (180, 180))
        wait_for_share(it, 6.25)
        tool(it, "Polygon")
        click(it, (20, 20), (60, 20))
        it.go("#/system")
        open_page(it)
        wait_for_share(it, 6.25)
        assert it.page.locator(".lines .open circle").count() == 2
        asked = []
        it.page.on("dialog", lambda one: (asked.append(one.type), one.accept()))
        it.page.reload()
        assert asked == ["beforeunload"]
        wait_for_share(it, 6.25)
        it.page.get_by_role("button", name="Discard the drawing").click()
        it.page.locator("dialog").get_by_role("button", name="Cancel").click()
        wait_for_share(it, 6.25)
        it.page.get_by_role("button", name="Discard the drawing").click()
        it.page.locator("dialog").get_by_role("button", name="Discard the drawing").click()
        wait_for_share(it, 0)


def test_another_picture_is_drawn_on_and_one_of_another_size_is_refused(
    browser: Any, line: Server, printed: bytes, sample_data: Path, tmp_path: Path
) -> None:
    learned = sorted((sample_data / "train" / "sample_bracket").iterdir())[0]
    to = "/datasets/sample_bracket/train"
    assert line.client.post(to, params={"name": "first.png"}, content=learned.read_bytes(),
                            headers={"Content-Type": "image/png"}).is_success  # fmt: skip
    small = tmp_path / "small.png"
    small.write_bytes(as_file(np.zeros((50, 60, 3), np.uint8)))
    own = tmp_path / "own.png"
    own.write_bytes(printed)
    with shown(browser, line.url) as it:
        open_page(it)
        choose = it.page.get_by_role("button", name="Another picture")
        choose.click()
        it.page.get_by_role("radio", name="Learned pictures").click()
        it.page.get_by_role("button", name="first.png").click()
        it.expect("Learned picture first.png (sample_bracket)")
        for path, said in (
            (own, "File own.png"),
            (small, "This picture has 60 x 50 pixels; 320 x 320 are needed."),
        ):
            choose.click()
            it.page.get_by_role("radio", name="A file").click()
            it.page.locator("input[type=file]").set_input_files(path)
            it.expect(said)
        it.expect("File own.png")  # still


def test_what_a_part_is_called_is_text(browser: Any, line: Server, printed: bytes) -> None:
    name = "<img src=x onerror=alert(1)><b>KB</b>"  # and a number
    send(line, printed, name)
    with shown(browser, line.url) as it:
        open_page(it)
        it.expect(f"Part {name}")
        assert it.page.locator("main b", has_text="KB").count() == 0


def test_who_draws_is_told_that_other_regions_went_live_meanwhile(
    browser: Any, line: Server, printed: bytes
) -> None:
    with shown(browser, line.url) as it:
        open_page(it)
        tool(it, "Rectangle")
        drag(it, (40, 40), (120, 120))
        wait_for_share(it, 6.25)
        body = {"width": SIDE, "height": SIDE, "polygons": [corners(*LABEL)], "reason": WHY}
        assert line.client.put(PATH, json=body).is_success
        it.expect("You began to draw on version", within_s=20)
        wait_for_share(it, 6.25)  # nothing moves under the hand
        it.page.get_by_role("button", name="Discard the drawing").click()
        it.page.locator("dialog").get_by_role("button", name="Discard the drawing").click()
        wait_for_share(it, 1.6)


def test_a_drawing_outlives_the_version_that_it_was_drawn_on(
    browser: Any, line: Server, printed: bytes
) -> None:
    with shown(browser, line.url, refused=True) as it:
        open_page(it)
        began_on = line.client.get(PATH).json()["version"]
        tool(it, "Rectangle")
        drag(it, (40, 40), (120, 120))
        wait_for_share(it, 6.25)
        for label in ((0, 0, 32, 32), LABEL):
            body = {"width": SIDE, "height": SIDE, "polygons": [corners(*label)], "reason": WHY}
            assert line.client.put(PATH, json=body).is_success
        version = f"/models/bracket/versions/{began_on}"
        assert line.client.delete(version, params={"reason": WHY}).is_success
        it.page.on("dialog", lambda one: one.accept())
        it.page.reload()
        it.expect("The version that you drew on was discarded.")
        wait_for_share(it, 6.25 + 1.56)


def test_a_key_that_may_only_look_draws_and_is_told_why_it_cannot_apply(
    browser: Any, kensa_model: Path, tmp_path: Path
) -> None:
    key = add_key(tmp_path / "data" / "keys.json", "the-line", "line")
    settings = {"KENSA_MODEL_DIR": str(kensa_model), "KENSA_MODEL_NAME": "bracket"}
    with serving(tmp_path, **settings) as server, shown(browser, server.url) as it:
        it.page.add_init_script(f"sessionStorage.setItem('kensa.key', '{key}')")
        it.go("#/regions")
        it.expect("No picture fits")
        tool(it, "Rectangle")
        drag(it, (0, 0), (320, 40))
        it.expect("This needs a key with the role operator.")
        assert it.page.get_by_role("button", name="Apply …").is_disabled()


def test_without_any_picture_there_is_a_sheet_of_the_size_that_was_learned(
    browser: Any, server: Server
) -> None:
    with shown(browser, server.url) as it:
        it.go("#/regions")
        it.expect("No picture fits")
        tool(it, "Rectangle")
        drag(it, (0, 0), (320, 40))
        assert (drawn(apply(it)) > 0).mean() > 0.1


@pytest.mark.parametrize(
    ("size", "language", "dark"),
    [
        ("desktop", "en", False),
        ("tablet", "ja", True),
        ("phone", "ja", False),
        ("phone", "en", True),
    ],
)
def test_it_can_be_used_by_everybody(
    browser: Any,
    line: Server,
    printed: bytes,
    screenshots: Path,
    size: str,
    language: str,
    dark: bool,
) -> None:
    body = {"width": SIDE, "height": SIDE, "polygons": [corners(*LABEL)], "reason": WHY}
    assert line.client.put(PATH, json=body).is_success
    with shown(browser, line.url, size=size, language=language, dark=dark) as it:
        open_page(it)
        it.page.locator(".toolbar, .tools").get_by_role("radio").nth(1).click()
        drag(it, (40, 200), (120, 260))
        it.page.locator(".actions .soft").first.wait_for()
        it.keep(screenshots, f"regions-{size}-{language}-{'dark' if dark else 'light'}-drawn")
        it.must_fit()
        it.must_be_accessible()
        it.page.locator(".actions .button").first.click()
        it.page.wait_for_selector("dialog")
        it.keep(screenshots, f"regions-{size}-{language}-{'dark' if dark else 'light'}-asked")
        it.must_fit()
        it.must_be_accessible()
        it.page.keyboard.press("Escape")
        it.page.locator(".under-stage .button").click()
        it.page.wait_for_selector("dialog .pick img")
        it.must_fit()
        it.must_be_accessible()
