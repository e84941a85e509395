"""Claims about versions that nobody let through: they never take another one's place. Over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.settings import Settings
from app.watching.doctor.command import examine
from engines.files import sha256
from engines.meta import Meta
from engines.store.versions import Store
from support.damage import picture, saved
from support.line import NAME, Line, line, variant
from support.server import agreed


@pytest.fixture(scope="module")
def photo() -> bytes:
    return saved(Image.fromarray(np.roll(picture(300, 256), 31, 1)), "PNG")


@pytest.fixture(scope="module")
def other(kensa_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return variant(kensa_model, tmp_path_factory.mktemp("other") / "model", bank=0.9)


@pytest.fixture(scope="module")
def third(kensa_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return variant(kensa_model, tmp_path_factory.mktemp("third") / "model", bank=0.95)


def edit_threshold(store: Store, version: str) -> None:
    """As somebody does who finds the server's data folder."""
    path = store.folder(NAME, version) / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_threshold": 0.6}))


def hold(store: Store, bundle: Path) -> str:
    version = store.take_in(NAME, bundle, {"activate": True})
    store.record_gate(NAME, version, {"ok": False, "reasons": ["It finds nothing."]})
    return version


def findings(folder: Path) -> str:
    settings = Settings(
        data_dir=folder / "data", cache_dir=folder / "cache", port=0, gate_found=0.0
    )
    report = examine(settings, folder / "no such root")
    return " ".join(one.what for one in report.findings if one.level == "wrong")


def stands_in(running: Line) -> float:
    text = running.server.client.get("/metrics").text
    (found,) = (row for row in text.splitlines() if row.startswith("kensa_model_stands_in{"))
    return float(found.split()[-1])


def degraded(running: Line) -> str:
    return " ".join(running.server.client.get("/healthz").json()["degraded"])


@contextmanager
def well(running: Line, version: str, photo: bytes) -> Iterator[None]:
    """It judges, and nothing is wrong."""
    assert running.server.client.get("/readyz").status_code == 200
    assert running.score(photo)[0] == version
    assert running.model()["problem"] is None
    assert stands_in(running) == 0
    assert "served from" not in degraded(running)
    yield


def test_a_version_that_was_held_does_not_judge_where_the_live_ones_meta_json_was_edited(
    kensa_model: Path, other: Path, photo: bytes, tmp_path: Path
) -> None:
    store = Store(tmp_path / "data" / "models")
    live = store.take_in(NAME, kensa_model, {})
    store.activate(NAME, live)
    held = hold(store, other)
    with line(tmp_path) as running, well(running, live, photo):
        pass
    edit_threshold(store, live)
    assert f"its live version {live} cannot be used: " in findings(tmp_path)
    for _ in range(2):  # a second start is no different
        with line(tmp_path) as running:
            ready = running.server.client.get("/readyz")
            assert (ready.status_code, agreed(ready)) == (503, "not_ready")
            assert running.server.infer(photo).status_code == 503
            found = running.model()
            assert found["live"] is None
            assert found["problem"] == ready.json()["error"]
            assert f"its live version {live} " in found["problem"]
            assert "meta.json" in found["problem"]
            assert f"POST /models/{NAME}/versions/VERSION/activate" in found["problem"]
            assert found["problem"] in degraded(running)
            assert stands_in(running) == 0
            assert running.state(held) == "held"
            unknown = running.server.client.get(f"/models/{NAME}/threshold")
            assert (unknown.status_code, agreed(unknown)) == (409, "conflict")
        assert f"its live version {live} was refused: " in findings(tmp_path)
    with line(tmp_path) as running:  # a person decides
        assert running.activate(held).status_code == 200
        with well(running, held, photo):
            pass
    assert findings(tmp_path) == ""


def test_one_that_was_rolled_back_from_does_not_judge_either(
    kensa_model: Path, other: Path, photo: bytes, tmp_path: Path
) -> None:
    with line(tmp_path, kensa_model, other) as running:
        assert running.server.client.post(f"/models/{NAME}/rollback").status_code == 200
    edit_threshold(running.store, running.store.versions(NAME)[0])
    with line(tmp_path) as running:
        assert running.server.infer(photo).status_code == 503
        # A rollback is what a person says: to the one that was rolled back from.
        assert running.server.client.post(f"/models/{NAME}/rollback").status_code == 200
        assert running.server.infer(photo).status_code == 200


@pytest.mark.parametrize("settled_by", ["activating it", "rolling back", "a new version"])
def test_one_that_stands_in_is_said_until_somebody_settles_it(
    settled_by: str, kensa_model: Path, other: Path, third: Path, photo: bytes, tmp_path: Path
) -> None:
    store = Store(tmp_path / "data" / "models")
    for bundle in (kensa_model, other):
        store.activate(NAME, store.take_in(NAME, bundle, {}))
    before, live = store.versions(NAME)
    held = hold(store, third)
    edit_threshold(store, live)
    pointer = store.pointer(NAME)
    assert f"{NAME} is served from {before} in place of {live}" in findings(tmp_path)
    for _ in range(2):
        with line(tmp_path) as running:
            assert stands_in(running) == 1, "from the first scrape"
            assert running.server.client.get("/readyz").status_code == 200
            assert running.score(photo)[0] == before
            found = running.model()
            assert found["live"] == before
            assert f"is served from {before} in place of {live}, which " in found["problem"]
            assert f"{live}/meta.json" in found["problem"]
            assert f"/versions/{before}/activate keeps it so" in found["problem"]
            assert found["problem"] in degraded(running)
            assert running.state(held) == "held"
        assert store.pointer(NAME) == pointer, "nobody decided"
    with line(tmp_path) as running:
        expected = before
        if settled_by == "activating it":
            assert running.activate(before).json()["problem"] is None
        elif settled_by == "rolling back":
            assert running.server.client.post(f"/models/{NAME}/rollback").status_code == 200
        else:
            new = variant(kensa_model, tmp_path / "new", bank=1.0001)
            expected = running.publish(new)
            assert running.wait(expected, "live", "held") == "live"
        with well(running, expected, photo):
            pass
    with line(tmp_path) as running, well(running, expected, photo):
        pass
    assert findings(tmp_path) == ""


def test_one_that_stands_in_is_said_again_after_it_was_unloaded(
    kensa_model: Path, other: Path, photo: bytes, tmp_path: Path
) -> None:
    store = Store(tmp_path / "data" / "models")
    for bundle in (kensa_model, other):
        store.activate(NAME, store.take_in(NAME, bundle, {}))
    before, live = store.versions(NAME)
    (store.folder(NAME, live) / "model.onnx").write_bytes(b"garbage")
    with line(tmp_path) as running:
        client = running.server.client
        assert client.post(f"/v2/repository/models/{NAME}/unload").status_code == 200
        assert stands_in(running) == 0, "nothing judges"
        assert client.post(f"/v2/repository/models/{NAME}/load").status_code == 200
        assert running.score(photo)[0] == before
        assert stands_in(running) == 1
        assert live in running.model()["problem"]


def test_with_a_damaged_pointer_it_is_said_which_version_serves_and_that_nobody_knows(
    kensa_model: Path, other: Path, photo: bytes, tmp_path: Path
) -> None:
    store = Store(tmp_path / "data" / "models")
    for bundle in (kensa_model, other):
        store.activate(NAME, store.take_in(NAME, bundle, {}))
    newest = store.versions(NAME)[1]
    (store.root / NAME / "live").write_bytes(b"\xff")
    with line(tmp_path) as running:
        assert running.score(photo)[0] == newest
        assert "the file that says which version is live is damaged" in running.model()["problem"]
        assert running.activate(newest).status_code == 200
        with well(running, newest, photo):
            pass


def test_a_job_does_not_start_from_a_version_that_was_held_unless_it_names_it(
    kensa_model: Path, photo: bytes, tmp_path: Path
) -> None:
    held = hold(Store(tmp_path / "data" / "models"), kensa_model)
    with line(tmp_path) as running:
        client = running.server.client
        sent = client.post("/datasets/bolt/train", files=[("file", ("1.png", photo))])
        assert sent.status_code == 201, sent.text
        wanted = {"model": NAME, "category": "bolt"}
        answer = client.post("/retrain", json=wanted)
        assert (answer.status_code, agreed(answer)) == (422, "bad_meta")
        assert f'"version": "{held}"' in answer.json()["error"]
        named = client.post("/retrain", json={**wanted, "version": held})
        assert named.status_code in (202, 503), named.text  # the queue is perhaps not open yet


# ---- a folder that is taken in ----------------------------------------------------------------


def write_threshold(folder: Path, threshold: float) -> None:
    path = folder / "meta.json"
    Meta.read(path).with_(image_threshold=threshold).write(path)


def test_a_threshold_that_is_edited_by_hand_in_the_model_folder_holds_after_a_restart(
    own_model: Path, photo: bytes, tmp_path: Path
) -> None:
    settings = {"KENSA_MODEL_DIR": str(own_model), "KENSA_MODEL_NAME": NAME}
    for threshold, starts in ((0.5, 1), (0.75, 1), (0.5, 2)):  # back to what was there before, too
        write_threshold(own_model, threshold)
        for _ in range(starts):
            with line(tmp_path, **settings) as running:
                answer = running.server.infer(photo).json()
                assert answer["threshold"] == threshold
                (live,) = (one for one in running.model()["versions"] if one["state"] == "live")
                assert live["raw_threshold"] == answer["raw_threshold"]
    assert len(running.store.versions(NAME)) == 2


def test_a_folder_that_was_rolled_back_from_does_not_come_back_by_itself(
    own_model: Path, other: Path, photo: bytes, tmp_path: Path
) -> None:
    settings = {"KENSA_MODEL_DIR": str(own_model), "KENSA_MODEL_NAME": NAME}
    with line(tmp_path, other, **settings) as running:
        good, bad = running.store.versions(NAME)
        assert running.score(photo)[0] == bad
        assert running.server.client.post(f"/models/{NAME}/rollback").status_code == 200
    edit_threshold(running.store, good)
    with line(tmp_path, **settings) as running:
        assert running.server.infer(photo).status_code == 503
        assert f"its live version {good} " in running.model()["problem"]


def test_a_folder_that_cannot_be_taken_in_is_said_while_another_version_serves(
    own_model: Path, other: Path, photo: bytes, tmp_path: Path
) -> None:
    settings = {"KENSA_MODEL_DIR": str(own_model), "KENSA_MODEL_NAME": NAME}
    (own_model / "model.onnx").write_bytes(b"garbage")
    with line(tmp_path, other, **settings) as running:
        version = running.store.versions(NAME)[0]
        assert running.score(photo)[0] == version
        assert "model.onnx is not the file" in running.model()["problem"]
        assert f"{NAME} is served from {version}, as before." in degraded(running)
        assert stands_in(running) == 1


def test_a_live_version_that_was_damaged_is_replaced_by_the_folder_it_came_from(
    own_model: Path, photo: bytes, tmp_path: Path
) -> None:
    settings = {"KENSA_MODEL_DIR": str(own_model), "KENSA_MODEL_NAME": NAME}
    with line(tmp_path, **settings) as running:
        first = running.score(photo)[0]
    edit_threshold(running.store, first)
    with line(tmp_path, **settings) as running:  # which finds out
        assert running.server.infer(photo).status_code == 503
    with line(tmp_path, **settings) as running:
        again = running.score(photo)[0]
        assert again.partition("-")[2] == first.partition("-")[2]
        assert running.model()["problem"] is None


def test_the_hashes_of_the_edited_folder_are_those_of_its_files(own_model: Path) -> None:
    """Else the tests above would show another thing: meta.json is not among its own files."""
    write_threshold(own_model, 0.7)
    files = Meta.read(own_model / "meta.json").files or {}
    assert files
    assert "meta.json" not in files
    assert all(sha256(own_model / name) == digest for name, digest in files.items())
