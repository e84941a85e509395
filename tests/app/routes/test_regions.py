"""Claims about the regions of a model that never count: said, shown, undone. Over HTTP."""

from __future__ import annotations

import io
import random
import shutil
import signal
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from app.routes.regions import PolygonsBody
from engines.image import decode
from engines.meta import Meta
from engines.regions import REACH, Regions
from engines.store.golden import Golden
from engines.store.regions import REGIONS, as_png, of_polygons
from engines.store.versions import Store
from support.damage import picture, saved
from support.line import NAME, Line, line
from support.plans import SIDE, seal, tiny_bundle, tiny_onnx
from support.server import agreed

WIDTH, HEIGHT = 64, 48
WHY = "The clamp above the part."
PATH = f"/models/{NAME}/regions"
PNG = {"Content-Type": "image/png"}
CLAMP = [[0, 0], [64, 0], [64, 12], [0, 12]]  # a quarter
POLYGONS = {"width": WIDTH, "height": HEIGHT, "polygons": [CLAMP], "reason": WHY}


def mask(rows: int = 12) -> bytes:
    """A PNG that hides the first rows."""
    hidden = np.zeros((HEIGHT, WIDTH), np.bool_)
    hidden[:rows] = True
    return as_png(Regions(hidden))


@pytest.fixture(scope="module")
def photo() -> bytes:
    return saved(Image.fromarray(picture(HEIGHT, WIDTH)), "PNG")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that knows how large the pictures were that it learned, and keeps some."""
    made = tiny_bundle(tmp_path_factory.mktemp("model") / "tiny")
    Golden(np.full((2, SIDE, SIDE, 3), 90, np.uint8)).write(made)
    with_camera(made, WIDTH, HEIGHT)
    return made


def with_camera(bundle: Path, width: int, height: int) -> None:
    meta = Meta.read(bundle / "meta.json").with_(camera={"size": [width, height]})
    meta.with_(files={**(meta.files or {}), "golden.npz": ""}).write(bundle / "meta.json")
    seal(bundle)


def put(running: Line, data: bytes, **query: Any) -> httpx.Response:
    query = {"reason": WHY, **query}
    return running.server.client.put(PATH, content=data, headers=PNG, params=query)


def changed(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def get(running: Line, **query: str) -> dict[str, Any]:
    return changed(running.server.client.get(PATH, params=query))


def png(running: Line, **query: str) -> httpx.Response:
    return running.server.client.get(PATH, params=query, headers={"Accept": "image/png"})


def version_of(running: Line, version: str) -> dict[str, Any]:
    (found,) = (one for one in running.model()["versions"] if one["version"] == version)
    return dict(found)


# ---- said, shown, undone ----------------------------------------------------------------------


def test_a_mask_is_given_back_as_it_was_drawn_and_judges_at_once(
    model: Path, photo: bytes, tmp_path: Path
) -> None:
    with line(tmp_path, model, KENSA_RECORD="on") as running:
        before = get(running)
        assert (before["width"], before["height"], before["never_counts"]) == (None, None, 0)
        after = changed(put(running, mask()))
        assert after == get(running)
        assert (after["model"], after["state"]) == (NAME, "live")
        assert (after["width"], after["height"], after["never_counts"]) == (WIDTH, HEIGHT, 0.25)
        for one in (before, after):  # what a page needs that draws one
            assert (one["image_size"], one["reach"]) == (SIDE, REACH["vae"])
            assert one["sizes"] == [[WIDTH, HEIGHT]]
        assert after["version"] == running.score(photo)[0] != before["version"]
        shown = png(running)
        assert shown.headers["content-type"] == "image/png"
        assert shown.content == mask()
        made = version_of(running, after["version"])
        assert (made["state"], made["never_counts"]) == ("live", 0.25)
        assert made["origin"] == {
            "activate": False, "reason": WHY, "never_counts": 0.25,
            "parent": before["version"], "regions_of": before["version"],
        }  # fmt: skip
        assert version_of(running, before["version"])["never_counts"] is None
        (said,) = (one for one in running.server.client.get("/trail").json()["lines"]
                   if one["what"] == "regions")  # fmt: skip
        assert (said["subject"], said["reason"]) == (NAME, WHY)
        assert said["details"]["version"] == after["version"]
        assert (said["details"]["never_counts"], said["details"]["gate"]) == (0.25, False)
    with line(tmp_path) as again:
        assert get(again) == after
        assert png(again).content == mask()


def test_polygons_are_the_mask_that_they_enclose(model: Path, tmp_path: Path) -> None:
    with line(tmp_path, model) as running:
        found = changed(running.server.client.put(PATH, json=POLYGONS))
        assert found["never_counts"] == 0.25
        assert png(running).content == mask()
        example = PolygonsBody.model_json_schema()["examples"][0]
        sent = PolygonsBody.model_validate(example)
        assert of_polygons(sent.width, sent.height, sent.polygons).share == 90 / 1024


def test_a_rollback_undoes_it_and_so_does_delete(model: Path, tmp_path: Path) -> None:
    with line(tmp_path, model) as running:
        client = running.server.client
        before = get(running)
        first = changed(put(running, mask()))
        assert client.post(f"/models/{NAME}/rollback").status_code == 200
        assert get(running) == before
        assert client.post(f"/models/{NAME}/rollback").status_code == 200  # and forward again
        assert get(running) == first
        without = changed(client.delete(PATH, params={"reason": "The clamp is gone."}))
        assert (without["width"], without["never_counts"]) == (None, 0)
        assert without["version"] not in (before["version"], first["version"])
        assert version_of(running, without["version"])["never_counts"] is None
        meta = Meta.read(running.store.folder(NAME, without["version"]) / "meta.json")
        assert meta == Meta.read(model / "meta.json")
        assert not (running.store.folder(NAME, without["version"]) / REGIONS).exists()
        # A version that judged before is asked for by its name.
        assert get(running, version=first["version"])["never_counts"] == 0.25
        assert png(running, version=first["version"]).content == mask()
        for answer in (png(running), client.get(f"{PATH}/overlay")):
            assert (answer.status_code, agreed(answer)) == (404, "unknown_version")
            assert "every pixel counts" in answer.json()["error"]
        again = client.delete(PATH, params={"reason": "The clamp is gone."})
        assert (again.status_code, agreed(again)) == (409, "conflict")


def test_large_files_are_those_of_the_version_before_and_a_threshold_keeps_the_mask(
    model: Path, photo: bytes, tmp_path: Path
) -> None:
    with line(tmp_path, model, KENSA_KEEP_VERSIONS="2") as running:
        old = get(running)["version"]
        new = changed(put(running, mask()))["version"]
        one, two = (running.store.folder(NAME, version) for version in (old, new))
        names = {path.name for path in one.iterdir()}
        assert {path.name for path in two.iterdir()} == names | {REGIONS}
        for name in names - {"meta.json", "manifest.json"}:
            assert (one / name).samefile(two / name), name
        assert running.store.differences(NAME, old, new) == {"meta.json", REGIONS}
        body = {"threshold": 0.7, "reason": "Too many."}
        limit = changed(running.server.client.put(f"/models/{NAME}/threshold", json=body))
        found = get(running)
        assert (found["version"], found["never_counts"]) == (limit["version"], 0.25)
        again = changed(put(running, mask(6)))
        meta = Meta.read(running.store.folder(NAME, again["version"]) / "meta.json")
        assert (meta.image_threshold, again["never_counts"]) == (0.7, 0.125)
        for rows in range(1, 5):
            last = changed(put(running, mask(rows)))["version"]
        assert running.store.versions(NAME)[0] == old  # which was trained, and is not pushed out
        assert len(running.store.versions(NAME)) == 3
        assert running.score(photo)[0] == last


def test_where_it_is_is_seen_on_a_part(model: Path, photo: bytes, tmp_path: Path) -> None:
    with line(tmp_path, model, KENSA_RECORD="on", KENSA_RECORD_SAMPLE="1") as running:
        changed(put(running, mask()))

        def shown() -> np.ndarray[Any, Any]:
            answer = running.server.client.get(f"{PATH}/overlay")
            assert answer.headers["content-type"] == "image/png"
            return decode(answer.content)

        learned = shown()
        assert learned.shape == (HEIGHT, WIDTH, 3)
        assert (learned[30:] == 90).all()  # a picture that it learned, while none came
        assert learned[5, 5, 0] > learned[5, 5, 1] + 50
        running.score(photo)
        assert (shown()[30:] == picture(HEIGHT, WIDTH)[30:]).all()


# ---- what judges ------------------------------------------------------------------------------


def part(top: int = 90, bottom: int = 90) -> bytes:
    """A grey part with a stripe at its upper edge, where the clamp is, and one at the lower."""
    pixels = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
    pixels[:6] = top
    pixels[-6:] = bottom
    return saved(Image.fromarray(pixels), "PNG")


def test_what_a_region_hides_is_no_part_of_the_score_and_all_else_is_the_same(
    model: Path, tmp_path: Path
) -> None:
    with line(tmp_path, model) as running:
        clean, marked, low, both = part(), part(top=255), part(bottom=200), part(255, 200)
        _, of_clean = running.score(clean)
        _, of_low = running.score(low)
        assert of_clean < of_low < running.score(marked)[1] == running.score(both)[1]
        assert running.server.infer(marked).json()["label"] == "Anomaly"
        changed(put(running, mask()))
        assert running.score(low)[1] == running.score(both)[1] == of_low
        assert running.score(clean)[1] == running.score(marked)[1] == of_clean
        assert running.server.infer(marked).json()["label"] == "Normal"
        assert running.server.infer(both).json()["label"] == "Anomaly"
        changed(put(running, mask(0)))  # an empty mask changes nothing
        assert running.score(low)[1] == of_low
        assert running.server.infer(marked).json()["label"] == "Anomaly"
        loaded = [one for one in running.server.log.read_text().splitlines() if "Loaded " in one]
        assert ["the regions alone" in one for one in loaded] == [False, True, True]


def test_a_mask_that_leaves_a_model_no_place_is_refused_and_nothing_changes(
    model: Path, tmp_path: Path
) -> None:
    with line(tmp_path, model) as running:
        before = running.model()
        answer = put(running, mask(HEIGHT - 2))
        assert (answer.status_code, agreed(answer)) == (422, "bad_bundle")
        assert "leave no place that counts" in answer.json()["error"]
        assert running.model() == before
        assert changed(put(running, mask()))["never_counts"] == 0.25


def test_a_model_of_an_older_kensa_is_to_be_converted_first(tmp_path: Path) -> None:
    old = tiny_bundle(tmp_path / "old")
    tiny_onnx(old / "model.onnx", bank=False, keep=False)
    seal(old)
    with line(tmp_path, old) as running:
        before, score = running.model(), running.score(part())
        answer = put(running, mask())
        assert (answer.status_code, agreed(answer)) == (422, "bad_bundle")
        assert "convert the model again" in answer.json()["error"]
        assert running.model() == before
        assert running.score(part()) == score


def test_the_gate_holds_a_mask_that_hides_a_known_defect(model: Path, tmp_path: Path) -> None:
    known = tmp_path / "known"
    shutil.copytree(model, known)
    images = np.full((2, SIDE, SIDE, 3), 90, np.uint8)
    images[1, :4] = 255
    Golden(images, np.array([False, True])).write(known)
    seal(known)
    with line(tmp_path, known) as running:
        held = changed(put(running, mask(), gate=True))
        assert running.wait(held["version"], "live", "held") == "held"
        gate = version_of(running, held["version"])["gate"]
        assert "1 of 1 known defects pass now" in gate["reasons"][0]
        assert gate["regions"] == {"was": 0.0, "becomes": 0.25}
        assert running.server.infer(part(top=255)).json()["label"] == "Anomaly"


# ---- the gate, zips ---------------------------------------------------------------------------


def test_the_gate_says_which_share_no_longer_counts(model: Path, tmp_path: Path) -> None:
    with line(tmp_path, model) as running:
        first = changed(put(running, mask(), gate=True))
        assert running.wait(first["version"], "live", "held") == "live"
        gate = version_of(running, first["version"])["gate"]
        assert (gate["regions"], gate["by_hand"]) == ({"was": 0.0, "becomes": 0.25}, False)
        body = {**POLYGONS, "polygons": [CLAMP, [[0, 45], [64, 45], [64, 48], [0, 48]]]}
        second = changed(running.server.client.put(PATH, json={**body, "gate": True}))
        assert running.wait(second["version"], "live", "held") == "live"
        gate = version_of(running, second["version"])["gate"]
        assert gate["regions"] == {"was": 0.25, "becomes": 0.3125}
        limit = {"threshold": 0.6, "reason": "Too many.", "gate": True}
        third = running.server.client.put(f"/models/{NAME}/threshold", json=limit).json()
        assert running.wait(third["version"], "live", "held") == "live"
        assert version_of(running, third["version"])["gate"]["regions"] is None
        asked = {"reason": "The clamp is gone.", "gate": "true"}
        last = changed(running.server.client.delete(PATH, params=asked))
        assert running.wait(last["version"], "live", "held") == "live"
        gate = version_of(running, last["version"])["gate"]
        assert gate["regions"] == {"was": 0.3125, "becomes": 0.0}


def test_a_job_that_began_before_the_regions_were_changed_does_not_take_that_back(
    model: Path, tmp_path: Path
) -> None:
    with line(tmp_path, model) as running:
        old = get(running)["version"]
        live = changed(put(running, mask()))["version"]
        learned = tmp_path / "learned"
        shutil.copytree(model, learned)
        Golden(np.full((2, SIDE, SIDE, 3), 91, np.uint8)).write(learned)
        seal(learned)
        late = running.publish(learned, job="retrain-1", parent=old)
        assert running.wait(late, "live", "held") == "held"
        (reason,) = version_of(running, late)["gate"]["reasons"]
        assert f"made of {old}, whose regions are not those of {live}" in reason
        assert get(running)["version"] == live
        kept = tmp_path / "kept"
        shutil.copytree(running.store.folder(NAME, live), kept)
        Golden(np.full((2, SIDE, SIDE, 3), 92, np.uint8)).write(kept)
        seal(kept)
        new = running.publish(kept, job="retrain-2", parent=old)
        assert running.wait(new, "live", "held") == "live"  # the same regions, whatever it began of
        assert version_of(running, new)["gate"]["regions"] is None
        assert get(running)["never_counts"] == 0.25


def test_a_zip_and_a_folder_carry_the_mask(model: Path, tmp_path: Path) -> None:
    with line(tmp_path, model) as running:
        client = running.server.client
        version = changed(put(running, mask()))["version"]
        zipped = client.get(f"/models/{NAME}/versions/{version}/archive").content
        assert REGIONS in zipfile.ZipFile(io.BytesIO(zipped)).namelist()
        sent = client.post(
            "/models", params={"name": "copy"}, content=zipped,
            headers={"Content-Type": "application/zip"},
        )  # fmt: skip
        assert sent.status_code == 201, sent.text
        assert running.wait(sent.json()["version"], "live", name="copy") == "live"
        shown = client.get("/models/copy/regions", headers={"Accept": "image/png"})
        assert shown.content == mask()
        folder = tmp_path / "taken"
        zipfile.ZipFile(io.BytesIO(zipped)).extractall(folder)
        store = Store(tmp_path / "other")
        taken = store.take_in(NAME, folder, {})
        assert (store.folder(NAME, taken) / REGIONS).read_bytes() == mask()
        (folder / REGIONS).unlink()
        without = io.BytesIO()
        with zipfile.ZipFile(without, "w") as archive:
            for path in folder.iterdir():
                archive.write(path, path.name)
        refused = client.post(
            "/models", params={"name": "lost"}, content=without.getvalue(),
            headers={"Content-Type": "application/zip"},
        )  # fmt: skip
        assert (refused.status_code, agreed(refused)) == (422, "bad_bundle")
        assert REGIONS in refused.json()["error"]


# ---- what cannot be ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def refusing(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Line]:
    """A server that only refuses; no picture may have more than 4,000 pixels or 20,000 bytes."""
    settings = {"KENSA_MAX_IMAGE_PIXELS": "4000", "KENSA_MAX_IMAGE_BYTES": "20000"}
    with line(tmp_path_factory.mktemp("refusing"), model, **settings) as running:
        yield running


def unchanged(running: Line, answer: httpx.Response, status: int, code: str, words: str) -> None:
    assert (answer.status_code, agreed(answer)) == (status, code), answer.text
    assert words in answer.json()["error"]
    assert len(running.store.versions(NAME)) == 1
    assert running.model()["refused"] == {}
    assert get(running)["never_counts"] == 0


def drawn(pixels: Any, mode: str | None = None) -> bytes:
    image = Image.fromarray(np.asarray(pixels))
    return saved(image.convert(mode) if mode else image, "PNG")


BLACK = np.zeros((HEIGHT, WIDTH), np.uint8)


@pytest.mark.parametrize(
    ("data", "status", "code", "words"),
    [
        (drawn(BLACK[:, :60]), 422, "bad_request", "is 60 x 48 pixels, and the pictures that part"),
        (drawn(BLACK + np.uint8(255)), 422, "bad_request", "leaves no pixel that counts"),
        (drawn(BLACK, "RGBA"), 422, "bad_request", "colours, a palette or alpha"),
        (drawn(BLACK + np.uint8(128)), 422, "bad_request", "neither black (0) nor white (255)"),
        (drawn(BLACK.astype(np.uint16)), 422, "bad_request", "16 bits"),
        (saved(Image.fromarray(BLACK), "JPEG"), 415, "unsupported_image", "this is a JPEG image"),
        (b"hello", 415, "unsupported_image", "no image that Kensa knows"),
        (b"", 400, "bad_image", "empty"),
        (mask()[:-20], 400, "bad_image", "cut short"),
        (drawn(np.zeros((80, 80), np.uint8)), 413, "image_too_large", "4,000"),
        (mask() + bytes(20_000), 413, "image_too_large", "KENSA_MAX_IMAGE_BYTES"),
    ],
)
def test_a_png_that_is_no_such_mask_is_refused_and_nothing_changes(
    data: bytes, status: int, code: str, words: str, refusing: Line
) -> None:
    unchanged(refusing, put(refusing, data), status, code, words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 63, "polygons": []}, "is 63 x 48 pixels, and the pictures that part learned"),
        ({"width": 0}, "width"),
        ({"height": "48"}, "height"),
        ({"width": None}, "width"),
        ({"polygons": [[[0, 0], [9, 0]]]}, "polygons.0"),
        ({"polygons": [[[0, 0], [9, 0], [9]]]}, "polygons.0.2"),
        ({"polygons": [[[0, 0], [9, 0], [9, 9, 9]]]}, "polygons.0.2"),
        ({"polygons": [[[0, 0], [9, 0], ["9", 9]]]}, "polygons.0.2.0"),
        ({"polygons": [[[0, 0], [9, 0], [True, 9]]]}, "polygons.0.2.0"),
        ({"polygons": [[[0, 0], [65, 0], [9, 9]]]}, "outside of the picture of 64 x 48"),
        ({"polygons": [[[0, 0], [9, -1], [9, 9]]]}, "outside of the picture of 64 x 48"),
        ({"polygons": [[[0, 0], [0.5, 0], [0.5, 0.5]]]}, "not shares of it"),
        ({"polygons": [CLAMP] * 101}, "polygons"),
        ({"polygons": [CLAMP * 51]}, "polygons.0"),
        ({"polygons": [[[0, 0], [64, 0], [64, 48], [0, 48]]]}, "leaves no pixel that counts"),
        ({"reason": ""}, "reason"),
        ({"reason": " "}, "Say why"),
        ({"reason": None}, "Say why"),
        ({"reason": "x" * 501}, "500"),
        ({"gate": "yes"}, "gate"),
        ({"polygon": []}, "polygon"),
    ],
)
def test_polygons_that_cannot_be_meant_are_refused_and_nothing_changes(
    changes: dict[str, Any], words: str, refusing: Line
) -> None:
    answer = refusing.server.client.put(PATH, json={**POLYGONS, **changes})
    unchanged(refusing, answer, 422, "bad_request", words)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400])
def test_a_point_that_is_no_place_is_refused(number: str, refusing: Line) -> None:
    text = f'{{"width": 64, "height": 48, "polygons": [[[0, 0], [{number}, 0], [9, 9]]],'
    headers = {"Content-Type": "application/json"}
    answer = refusing.server.client.put(PATH, content=f'{text} "reason": "why"}}', headers=headers)
    assert answer.status_code == 422, answer.text
    unchanged(refusing, answer, 422, "bad_request", "")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "The body is not JSON: EOF while parsing"),
        ("{", "The body is not JSON: EOF while parsing"),
        ("[" * 5000, "The body is not JSON: recursion limit"),
        ("\xff", "The body is not JSON: "),
        ("[]", "The body is wrong: "),
        ("null", "The body is wrong: "),
        ('{"width": 1}', "The body parameter height is wrong: Field required"),
    ],
    ids=["nothing", "cut short", "deep", "no UTF-8", "a list", "null", "half of it"],
)
def test_what_is_no_such_json_is_refused(text: str, words: str, refusing: Line) -> None:
    answer = refusing.server.client.put(
        PATH, content=text.encode("latin-1"), headers={"Content-Type": "application/json"}
    )
    unchanged(refusing, answer, 422, "bad_request", words)


def test_another_type_of_body_and_one_without_a_reason_are_refused(refusing: Line) -> None:
    client = refusing.server.client
    answer = client.put(PATH, content=mask(), headers={"Content-Type": "image/bmp"})
    unchanged(refusing, answer, 415, "unsupported_body", "image/png, or polygons")
    answer = client.put(PATH, content=mask(), headers=PNG)
    unchanged(refusing, answer, 422, "bad_request", "Say why")
    answer = put(refusing, mask(), reason="x" * 501)
    unchanged(refusing, answer, 422, "bad_request", "500")
    for unseen in ("A clamp\n", "\0", "A \u202epmalc"):
        answer = put(refusing, mask(), reason=unseen)
        unchanged(refusing, answer, 422, "bad_request", "cannot be seen")
    unchanged(refusing, client.delete(PATH), 422, "bad_request", "reason")
    answer = client.delete(PATH, params={"reason": " "})
    unchanged(refusing, answer, 422, "bad_request", "Say why")


def test_without_a_live_version_there_is_nothing_to_change(model: Path, tmp_path: Path) -> None:
    with line(tmp_path) as running:
        client = running.server.client
        asked = {"reason": WHY}
        for answer in (put(running, mask()), client.get(PATH), client.delete(PATH, params=asked)):
            assert (answer.status_code, agreed(answer)) == (404, "unknown_model")
        running.publish(model, activate=False)
        for answer in (put(running, mask()), client.get(PATH), client.delete(PATH, params=asked)):
            assert (answer.status_code, agreed(answer)) == (409, "conflict")
            assert "has no live version" in answer.json()["error"]


def test_a_model_that_does_not_know_its_pictures_is_told_by_the_parts_that_came(
    photo: bytes, tmp_path: Path
) -> None:
    old = tiny_bundle(tmp_path / "old")
    with line(tmp_path, old, KENSA_RECORD="on") as running:
        small = as_png(Regions(np.eye(9, dtype=np.bool_)))
        assert changed(put(running, small))["width"] == 9  # nobody can say
        running.score(photo)
        answer = put(running, small)
        assert (answer.status_code, agreed(answer)) == (422, "bad_request")
        assert "is 9 x 9 pixels, and the last parts of part are 64 x 48" in answer.json()["error"]
        assert changed(put(running, mask()))["width"] == WIDTH


# ---- at the same time, and cut short ----------------------------------------------------------


def test_changes_at_the_same_time_follow_each_other_and_none_is_lost(
    model: Path, photo: bytes, tmp_path: Path
) -> None:
    with line(tmp_path, model, KENSA_KEEP_VERSIONS="50") as running:
        made: list[dict[str, Any]] = []

        def change(rows: int) -> None:
            with httpx.Client(base_url=running.server.url, timeout=60, trust_env=False) as client:
                answer = client.put(PATH, content=mask(rows), headers=PNG, params={"reason": WHY})
                made.append({"rows": rows, **answer.json()})

        threads = [threading.Thread(target=change, args=(rows,)) for rows in range(1, 9)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        versions = sorted(one["version"] for one in made)
        assert len({*versions}) == 8
        parents = [version_of(running, one)["origin"]["parent"] for one in versions]
        assert parents == [running.store.versions(NAME)[0], *versions[:-1]]
        for one in made:
            assert png(running, version=one["version"]).content == mask(one["rows"])
        assert running.score(photo)[0] == versions[-1]


def test_a_server_that_is_killed_meanwhile_comes_back_with_the_old_or_the_new_whole(
    model: Path, photo: bytes, tmp_path: Path
) -> None:
    chance = random.Random(0)
    store = Store(tmp_path / "data" / "models")
    first = store.take_in(NAME, model, {})
    store.activate(NAME, first)
    masks = [mask(rows) for rows in range(1, 17)]
    for _ in range(4):
        with line(tmp_path) as running:
            version = running.score(photo)[0]
            assert get(running)["version"] == version
            store.check(NAME, version)
            shown = png(running)
            assert shown.content in masks or (version == first and shown.status_code == 404)
            assert running.model()["refused"] == {}

            def change(url: str = running.server.url) -> None:
                with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
                    try:
                        for data in masks * 3:
                            client.put(PATH, content=data, headers=PNG, params={"reason": WHY})
                    except httpx.HTTPError:
                        pass  # it was killed

            changer = threading.Thread(target=change)
            changer.start()
            time.sleep(chance.uniform(0.1, 0.6))
            running.server.process.send_signal(signal.SIGKILL)
            changer.join()
