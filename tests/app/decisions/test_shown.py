"""The picture of a decision as a page shows it: small, and without paint."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from support.damage import picture, saved
from support.line import Line, line
from support.server import agreed
from support.waiting import until

SIDES = {"thumbnail": 256, "overlay": 1024}


@pytest.fixture(scope="module")
def running(kensa_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Line]:
    """Keeps the picture of every part."""
    folder = tmp_path_factory.mktemp("shown")
    with line(folder, kensa_model, KENSA_RECORD_SAMPLE="1") as found:
        yield found


def send(running: Line, name: str, data: bytes) -> None:
    running.server.infer(data, **{"X-Request-ID": name})
    until(lambda: running.server.client.get(f"/decisions/{name}").status_code == 200)


def ask(running: Line, name: str, what: str, **query: Any) -> httpx.Response:
    paint = {"paint": "false"} if what == "overlay" else {}
    return running.server.client.get(f"/decisions/{name}/{what}", params={**paint, **query})


def read(answer: httpx.Response) -> Image.Image:
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "image/jpeg"
    return Image.open(io.BytesIO(answer.content))


@pytest.mark.parametrize("what", SIDES)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "TIFF"])
def test_whatever_kind_of_file_it_was_it_comes_as_a_jpeg(
    running: Line, kind: str, what: str
) -> None:
    down, across = np.mgrid[0:1100, 0:1500]
    pixels = np.stack([across // 6, down // 5, np.full_like(across, 40)], -1).astype(np.uint8)
    send(running, f"{kind}.{what}", saved(Image.fromarray(pixels), kind))
    found = read(ask(running, f"{kind}.{what}", what))
    assert max(found.size) == SIDES[what]
    small = Image.fromarray(pixels).resize(found.size, Image.Resampling.BOX)
    difference = np.asarray(small, int) - np.asarray(found.convert("RGB"), int)
    assert np.abs(difference).mean() < 3


@pytest.mark.parametrize("what", SIDES)
def test_a_small_one_is_not_made_larger_and_a_turned_one_stands_upright(
    running: Line, what: str
) -> None:
    image = Image.fromarray(picture(200, 120))
    exif = image.getexif()
    exif[0x0112] = 6  # a quarter turn
    data = io.BytesIO()
    image.save(data, "JPEG", exif=exif)
    send(running, f"turned.{what}", data.getvalue())
    assert read(ask(running, f"turned.{what}", what)).size == image.size[::-1]


def test_unpainted_and_painted_are_equally_large(running: Line) -> None:
    send(running, "both", saved(Image.fromarray(picture(1333, 777)), "PNG"))
    painted = running.server.client.get("/decisions/both/overlay")
    assert (
        Image.open(io.BytesIO(painted.content)).size == read(ask(running, "both", "overlay")).size
    )


def test_a_browser_may_keep_only_what_stays_so(running: Line) -> None:
    """Of an id that comes again the number says which decision is meant."""
    first, second = (saved(Image.fromarray(picture(side, side)), "PNG") for side in (300, 200))
    send(running, "twice", first)
    number = running.server.client.get("/decisions/twice").json()["number"]
    answer = ask(running, "twice", "thumbnail", number=number)
    assert answer.headers["cache-control"] == "private, max-age=600"
    assert "cache-control" not in ask(running, "twice", "thumbnail").headers
    running.server.infer(second, **{"X-Request-ID": "twice"})
    until(lambda: running.server.client.get("/decisions/twice").json()["number"] != number)
    assert read(ask(running, "twice", "thumbnail")).size == (200, 200)
    assert read(ask(running, "twice", "thumbnail", number=number)).size == (256, 256)


@pytest.mark.parametrize("what", SIDES)
def test_what_is_no_picture_or_is_not_kept_is_refused(running: Line, what: str) -> None:
    whole = saved(Image.fromarray(picture(300, 300)), "PNG")
    send(running, f"cut.{what}", whole[: len(whole) // 2])
    answer = ask(running, f"cut.{what}", what)
    assert (answer.status_code, agreed(answer)) == (400, "bad_image")
    assert agreed(ask(running, "nobody", what)) == "unknown_decision"
    send(running, f"gone.{what}", whole)
    path = f"/decisions/gone.{what}/image"
    deleted = running.server.client.delete(path, params={"reason": "a person is in it"})
    assert deleted.status_code == 204
    answer = ask(running, f"gone.{what}", what)
    assert (answer.status_code, agreed(answer)) == (404, "unknown_decision")
    assert "was deleted" in answer.json()["error"]


@pytest.mark.parametrize("what", SIDES)
def test_each_view_of_a_part_is_shown(running: Line, what: str) -> None:
    sizes = {"left": (300, 200), "top": (200, 300)}
    for view, (width, height) in sizes.items():
        data = saved(Image.fromarray(picture(height, width)), "PNG")
        path = f"/parts/P-{what}/views/{view}?of=left,top"
        answer = running.server.client.post(
            path, content=data, headers={"Content-Type": "image/png"}
        )
        assert answer.status_code == 200, answer.text
    name = answer.json()["id"]
    until(lambda: running.server.client.get(f"/decisions/{name}").status_code == 200)
    shapes = {view: read(ask(running, name, what, view=view)).size for view in sizes}
    assert shapes["left"][0] > shapes["left"][1]
    assert shapes["top"][0] < shapes["top"][1]
    assert agreed(ask(running, name, what, view="right")) == "unknown_decision"
