"""Claims about Try: pictures are judged at once, and leave nothing behind unless they are to."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from app.http.keys import add_key
from support.browser import Shown, shown
from support.server import Server, serving

MARKUP = "<img src=x onerror=alert(1)>"
LOOKS = [
    ("desktop", "en", False), ("tablet", "ja", True), ("phone", "en", True), ("phone", "ja", False),
]  # fmt: skip
CAMERA = """() => {
  const canvas = Object.assign(document.createElement('canvas'), {width: 320, height: 320});
  const draw = () => {
    canvas.getContext('2d').fillRect(0, 0, 320, 320);
    requestAnimationFrame(draw);
  };
  draw();
  navigator.mediaDevices.getUserMedia = async () => canvas.captureStream(10);
}"""  # a stream as a camera's, of a machine that has none


@pytest.fixture(scope="module")
def pictures(sample_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A good part, a stained one, the same as TIFF, half a file, and one with a name like code."""
    folder = tmp_path_factory.mktemp("pictures")
    test = sample_data / "test" / "sample_bracket"
    good, stained = test / "normal" / "0000.png", test / "anomaly" / "stain_00.png"
    named = {name: folder / name for name in ("good.png", "stain.png", "stain.tif", "half.png")}
    named["good.png"].write_bytes(good.read_bytes())
    named["stain.png"].write_bytes(stained.read_bytes())
    Image.open(stained).save(named["stain.tif"])
    named["half.png"].write_bytes(good.read_bytes()[:4000])
    named["markup"] = folder / f"{MARKUP}.png".replace("/", "")
    named["markup"].write_bytes(good.read_bytes())
    return named


@pytest.fixture
def tried(browser: Any, server: Server) -> Iterator[Shown]:
    with shown(browser, server.url, refused=True) as it:
        it.go("#/try")
        it.expect("Drop pictures here")
        yield it


def choose(it: Shown, *paths: Path) -> None:
    it.page.set_input_files("input[type=file][multiple]", [str(path) for path in paths])


def drop(it: Shown, *paths: Path) -> None:
    """As if somebody let the files go over the page."""
    files = it.page.evaluate_handle("() => new DataTransfer()")
    for path in paths:
        it.page.evaluate(
            "([files, name, data]) => files.items.add("
            "new File([Uint8Array.from(data)], name, {type: 'image/png'}))",
            [files, path.name, list(path.read_bytes())],
        )
    for event in ("dragover", "drop"):
        it.page.dispatch_event("main", event, {"dataTransfer": files})


def row(it: Shown, name: str) -> Any:
    return it.page.locator(".tried button", has_text=name)


def said(it: Shown, name: str) -> str:
    """The verdict in the list, once it is there."""
    found = row(it, name).locator(".verdict")
    found.wait_for(timeout=20_000)
    return str(found.inner_text())


def counted(server: Server) -> tuple[int, float]:
    """Decisions of the record, and parts of the statistics."""
    decisions = server.client.get("/decisions", params={"limit": 500}).json()["decisions"]
    spans = server.client.get("/statistics").json()["spans"]
    return len(decisions), sum(one["parts"] for one in spans)


def chooser(it: Shown, key: str) -> Any:
    """What opens at a key."""
    with it.page.expect_file_chooser() as chosen:
        it.page.wait_for_timeout(300)  # until the browser has heard that somebody waits for it
        it.page.keyboard.press(key)
    return chosen.value


def test_five_pictures_that_are_dropped_are_judged_and_leave_nothing_behind(
    tried: Shown, server: Server, pictures: dict[str, Path], screenshots: Path
) -> None:
    before = counted(server)
    drop(tried, *pictures.values())
    verdicts = {name: said(tried, path.name) for name, path in pictures.items()}
    assert verdicts == {"good.png": "OK", "stain.png": "NG", "stain.tif": "NG",
                        "half.png": "No verdict", "markup": "OK"}  # fmt: skip
    summary = tried.page.locator(".summary").inner_text().split("\n")
    assert summary[:6] == ["OK", "2", "NG", "2", "No verdict", "1"]
    assert summary[6] == "Mean"

    row(tried, "stain.png").click()
    answer = server.client.post(
        "/infer", params={"record": "false"}, content=pictures["stain.png"].read_bytes()
    ).json()
    tried.expect(f"{answer['score']:.3f}")
    tried.expect(f"limit {answer['threshold']:.3f}")
    tried.page.locator(".heat path.under[d^=M]").wait_for(state="attached")
    assert tried.page.locator(".heat canvas").evaluate(
        "canvas => canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height)"
        ".data.some((value, n) => n % 4 === 3 && value > 100)"
    )
    tried.keep(screenshots, "try-story-stain")

    row(tried, "stain.tif").click()
    tried.expect("the server has drawn it")
    drawn = tried.page.locator(".stage img")
    assert drawn.evaluate("image => image.decode().then(() => image.naturalWidth)") == 320

    row(tried, "half.png").click()
    tried.expect("The picture is damaged. The PNG image is cut short.")
    assert counted(server) == before


def test_the_heat_map_is_where_the_server_paints_it(
    tried: Shown, server: Server, pictures: dict[str, Path]
) -> None:
    choose(tried, pictures["stain.png"])
    tried.page.locator(".heat path.under[d^=M]").wait_for(state="attached")
    box = tried.page.locator(".heat svg").get_attribute("viewBox").split()
    left, top, wide, high = tried.page.locator(".heat path.under").evaluate(
        "path => { const box = path.getBBox(); return [box.x, box.y, box.width, box.height]; }"
    )
    data = pictures["stain.png"].read_bytes()
    drawn = server.client.post(
        "/infer", params={"record": "false"}, content=data, headers={"Accept": "image/png"}
    )
    with Image.open(io.BytesIO(drawn.content)) as painted, Image.open(io.BytesIO(data)) as plain:
        changed = np.abs(np.asarray(painted, int) - np.asarray(plain.convert("RGB"), int)).max(2)
        white = (np.asarray(painted).min(2) > 240) & (changed > 20)  # the outline
    ys, xs = np.nonzero(white)
    scale = 320 / float(box[2])
    ours = [left * scale, top * scale, (left + wide) * scale, (top + high) * scale]
    theirs = [xs.min(), ys.min(), xs.max(), ys.max()]
    assert np.allclose(ours, theirs, atol=4), (ours, theirs)


def test_a_reject_whose_hot_place_is_not_outlined_has_a_ring_there(tried: Shown) -> None:
    box = tried.page.evaluate(
        """import('/web/heat.js').then(({ring}) => {
          const grey = new Uint8Array(100 * 50).fill(40);
          grey[100 * 20 + 70] = 90;
          const [svg, path] = ['svg', 'path'].map(
            (name) => document.createElementNS('http://www.w3.org/2000/svg', name));
          path.setAttribute('d', ring({width: 100, height: 50, grey}));
          svg.append(path);
          document.body.append(svg);
          const {x, y, width, height} = path.getBBox();
          return [x, y, width, height];
        })"""
    )
    assert np.allclose(box, [66.5, 16.5, 8, 8], atol=0.1)


def test_what_is_wanted_is_recorded_under_the_files_name(
    tried: Shown, server: Server, pictures: dict[str, Path]
) -> None:
    before, _ = counted(server)
    tried.page.get_by_label("Record it").check()
    tried.expect("recorded and counted, under the file’s name")
    choose(tried, pictures["markup"], pictures["stain.tif"])
    assert said(tried, "stain.tif") == "NG"
    said(tried, MARKUP)
    row(tried, "stain.tif").click()
    tried.expect("the server has drawn it")
    newest = server.client.get("/decisions").json()["decisions"][:2]
    assert {one["part"] for one in newest} == {pictures["markup"].name, "stain.tif"}
    assert counted(server)[0] == before + 2  # what was drawn of the TIFF is no part
    row(tried, "<img").click()
    tried.expect("Yes, under the file’s name")


def test_a_name_like_code_is_text(tried: Shown, pictures: dict[str, Path]) -> None:
    choose(tried, pictures["markup"])
    assert said(tried, MARKUP) == "OK"
    tried.page.locator(".numbers dd", has_text=MARKUP).wait_for()
    assert tried.page.locator("img[src=x]").count() == 0


def test_all_of_it_works_with_keys_alone(tried: Shown, pictures: dict[str, Path]) -> None:
    page = tried.page
    chosen = chooser(tried, "c")
    chosen.set_files([str(pictures["good.png"]), str(pictures["stain.png"])])
    said(tried, "stain.png")
    page.keyboard.press("ArrowDown")
    assert page.locator(".tried [aria-current=true] .name").inner_text() == "stain.png"
    page.locator(".heat svg").wait_for(state="attached")
    page.keyboard.press("h")
    page.locator(".heat svg").wait_for(state="detached")
    page.keyboard.press("Delete")
    assert page.locator(".tried [aria-current=true] .name").inner_text() == "good.png"
    assert row(tried, "stain.png").count() == 0
    # And what is pressed is reached with Tab.
    page.get_by_role("button", name="Clear the list").focus()
    page.keyboard.press("Enter")
    tried.expect("Drop pictures here")
    page.locator(".ways button").first.focus()
    assert chooser(tried, "Space").is_multiple()


def test_a_picture_is_pasted_and_the_list_stays_while_other_pages_are_seen(
    tried: Shown, pictures: dict[str, Path]
) -> None:
    tried.page.evaluate(
        "data => { const held = new DataTransfer();"
        " held.items.add(new File([Uint8Array.from(data)], 'pasted.png', {type: 'image/png'}));"
        " dispatchEvent(new ClipboardEvent('paste', {clipboardData: held})); }",
        list(pictures["good.png"].read_bytes()),
    )
    assert said(tried, "pasted.png") == "OK"
    tried.page.get_by_role("link", name="System").click()
    tried.page.wait_for_selector("main.system")
    tried.page.get_by_role("link", name="Try").click()
    assert said(tried, "pasted.png") == "OK"


def test_a_camera_takes_pictures_that_are_judged(tried: Shown) -> None:
    page = tried.page
    page.evaluate(CAMERA)
    page.get_by_role("button", name="Camera").click()
    shoot = page.get_by_role("button", name="Take the picture")
    shoot.click()
    shoot.click()
    page.keyboard.press("Escape")
    page.locator(".tried .verdict").nth(1).wait_for()
    assert page.locator(".tried .name").first.inner_text().startswith("camera-")


def test_where_no_camera_is_it_is_said(tried: Shown) -> None:
    tried.page.get_by_role("button", name="Camera").click()
    tried.page.locator("dialog .warn").wait_for()


def test_a_lines_key_may_try_only_what_is_recorded(
    browser: Any, kensa_model: Path, pictures: dict[str, Path], tmp_path: Path
) -> None:
    key = add_key(tmp_path / "data" / "keys.json", "tablet", "line")
    settings = {"KENSA_MODEL_DIR": str(kensa_model), "KENSA_MODEL_NAME": "bracket"}
    with serving(tmp_path, **settings) as server, shown(browser, server.url, refused=True) as it:
        it.page.add_init_script(f"sessionStorage.setItem('kensa.key', '{key}')")
        it.go("#/try")
        it.expect("Only a key with the role operator may try without that.")
        switch = it.page.get_by_label("Record it")
        assert switch.is_checked()
        assert switch.is_disabled()
        choose(it, pictures["stain.tif"])
        assert said(it, "stain.tif") == "NG"
        it.expect("the server has drawn it")
        answer = server.client.get("/decisions", headers={"X-API-Key": key}).json()
        assert [(one["part"], one["key"]) for one in answer["decisions"]] == [
            ("stain.tif", "tablet")
        ]


def test_what_fails_can_be_tried_again(tried: Shown, pictures: dict[str, Path]) -> None:
    tried.page.route("**/infer*", lambda route: route.abort())
    choose(tried, pictures["good.png"])
    tried.expect("The server does not answer.")
    tried.page.unroute("**/infer*")
    tried.page.get_by_role("button", name="Try again").click()
    assert said(tried, "good.png") == "OK"


@pytest.mark.parametrize(("size", "language", "dark"), LOOKS)
def test_try_fits_and_can_be_used_by_everybody(
    browser: Any, server: Server, pictures: dict[str, Path], screenshots: Path,
    size: str, language: str, dark: bool,
) -> None:  # fmt: skip
    with shown(browser, server.url, size=size, language=language, dark=dark, refused=True) as it:
        it.go("#/try")
        it.page.locator("main.try .empty").wait_for()
        it.must_fit()
        it.must_be_accessible()
        choose(it, *pictures.values())
        it.page.locator(".tried .verdict").nth(4).wait_for(timeout=20_000)
        for name in ("stain.png", "half.png", "stain.tif"):
            row(it, name).click()
            it.page.locator(".said .verdict").wait_for()
            it.must_fit()
            it.must_be_accessible()
            look = f"try-{name.replace('.', '-')}-{size}-{language}-{'dark' if dark else 'light'}"
            it.keep(screenshots, look)
