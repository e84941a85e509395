"""Claims about KENSA_MODEL_DIR: what it names judges, or the log says what does."""

from __future__ import annotations

import logging
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from app.settings import Settings
from engines.errors import BadSettings
from engines.serving.opening import open_model
from engines.serving.resident import Resident
from engines.store.versions import Store
from support.damage import picture, saved
from support.in_process import in_process, settings_of
from support.plans import tiny_bundle
from support.server import RAW

PHOTO = saved(Image.fromarray(picture(64, 64)), "PNG")


def judged(folder: Path, source: Path, **settings: Any) -> tuple[str, float]:
    """Start a server with a folder to take in; the model that judges, and its raw score."""
    settings = {"model_dir": source, **settings}

    async def ask(client: httpx.AsyncClient, app: Any) -> tuple[str, float]:
        there = [one["name"] for one in (await client.get("/models")).json()["models"]]
        name = app.state.settings.served_name
        name = name if name in there else "default"
        answer = await client.post("/infer", params={"model": name}, content=PHOTO, headers=RAW)
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-kensa-model-name"].isascii()
        return answer.json()["model_name"], answer.json()["raw_score"]

    return in_process(settings_of(folder, **settings), ask)


def problems(folder: Path, source: Path) -> str:
    async def ask(client: httpx.AsyncClient, _: Any) -> str:
        return str((await client.get("/healthz")).json()["degraded"])

    return in_process(settings_of(folder, model_dir=source), ask)


def store_of(folder: Path) -> Store:
    return Store(folder / "data" / "models")


def test_the_folder_that_the_variable_names_judges_also_where_it_did_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bolt = tiny_bundle(tmp_path / "bolt" / "engine")
    nut = tiny_bundle(tmp_path / "nut" / "engine", offset=7.0)
    first, second, third = (judged(tmp_path, folder) for folder in (bolt, nut, bolt))
    assert first[1] + 7 == pytest.approx(second[1])
    assert third == first
    said = [one.getMessage() for one in caplog.records if "judges from now on" in one.message]
    assert len(said) == 2
    assert str(bolt) in said[1]
    assert str(nut) in said[1]
    assert "KENSA_MODEL_NAME" in said[1]


def test_where_another_version_judges_than_the_folder_has_it_is_said_how_to_change_that(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bolt = tiny_bundle(tmp_path / "bolt")
    judged(tmp_path, bolt)
    store = store_of(tmp_path)
    learned = store.take_in("bolt", tiny_bundle(tmp_path / "new", offset=3.0), {})
    store.activate("bolt", learned)
    caplog.clear()
    judged(tmp_path, bolt)
    (said,) = [one.getMessage() for one in caplog.records if "as before" in one.getMessage()]
    assert learned in said
    assert f"POST /models/bolt/versions/{store.versions('bolt')[0]}/activate" in said


def test_names_in_japanese_are_names(tmp_path: Path) -> None:
    first = judged(tmp_path, tiny_bundle(tmp_path / "検査"))
    second = judged(tmp_path, tiny_bundle(tmp_path / "部品", offset=7.0))
    assert [first[0], second[0]] == ["検査", "部品"]
    assert store_of(tmp_path).names() == ["検査", "部品"]
    again = judged(tmp_path, tmp_path / "検査")
    assert again == first
    named = judged(tmp_path, tmp_path / "検査", model_name="ねじ-M6_左")
    assert named == ("ねじ-M6_左", first[1])


def test_a_name_has_one_spelling_however_a_file_system_writes_it(tmp_path: Path) -> None:
    decomposed = unicodedata.normalize("NFD", "ボルト")
    assert decomposed != "ボルト"
    assert Settings(model_dir=tmp_path / decomposed).served_name == "ボルト"
    assert Settings(pinned=f"{decomposed}, nut").pinned_names == {"ボルト", "nut"}


async def _upload(client: httpx.AsyncClient, name: str, folder: Path) -> httpx.Response:
    archive = shutil.make_archive(str(folder.parent / "model"), "zip", folder)
    data = Path(archive).read_bytes()
    return await client.post("/models", params={"name": name}, content=data, headers=RAW)


def test_a_model_with_a_japanese_name_is_uploaded_asked_and_changed(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "engine")

    async def ask(client: httpx.AsyncClient, _: Any) -> list[int]:
        sent = await _upload(client, "検査", bundle)
        place = sent.headers["location"]
        assert place.isascii()
        bad = await _upload(client, unicodedata.normalize("NFD", "ボルト"), bundle)
        changed = await client.post(f"{place}/activate")
        limit = {"threshold": 0.6, "reason": "試験"}
        threshold = await client.put("/models/検査/threshold", json=limit)
        seen = await client.get("/v2/models/検査")
        answers = (sent, bad, changed, threshold, seen)
        return [answer.status_code for answer in answers]

    assert in_process(settings_of(tmp_path), ask) == [201, 422, 200, 200, 200]


def test_folders_whose_names_make_the_same_name_are_refused(tmp_path: Path) -> None:
    judged(tmp_path, tiny_bundle(tmp_path / "M6 (left)"))
    said = problems(tmp_path, tiny_bundle(tmp_path / "M6-left", offset=7.0))
    assert "set KENSA_MODEL_NAME" in said
    assert str(tmp_path / "M6 (left)") in said
    assert judged(tmp_path, tmp_path / "M6-left", model_name="left")[0] == "left"
    assert judged(tmp_path, tmp_path / "M6 (left)")[0] == "M6-left"


@pytest.mark.parametrize("folder", ["/", "models/!?", "models/--", "models/_"])
def test_a_folder_whose_name_makes_no_name_is_refused(folder: str) -> None:
    with pytest.raises(BadSettings, match="KENSA_MODEL_NAME"):
        _ = Settings(model_dir=folder).served_name
    assert Settings(model_dir=folder, model_name="mine").served_name == "mine"


def test_what_an_older_kensa_called_default_keeps_its_name(tmp_path: Path) -> None:
    source = tiny_bundle(tmp_path / "検査")
    store = store_of(tmp_path)
    store.activate("default", store.take_in("default", source, {"folder": str(source)}))
    assert judged(tmp_path, source)[0] == "default"
    assert store.names() == ["default"]
    assert judged(tmp_path, tiny_bundle(tmp_path / "部品"))[0] == "部品"


def test_it_keeps_it_also_where_the_folder_is_named_in_another_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_bundle(tmp_path / "検査")
    store = store_of(tmp_path)
    store.activate("default", store.take_in("default", source, {"folder": str(source)}))
    monkeypatch.chdir(tmp_path)
    assert judged(tmp_path, Path("検査"))[0] == "default"
    assert store.names() == ["default"]


def test_a_start_with_the_same_folder_says_nothing_new(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tiny_bundle(tmp_path / "bolt")
    judged(tmp_path, source)
    caplog.clear()
    judged(tmp_path, source)
    assert [one for one in caplog.records if one.levelno >= logging.WARNING] == []


def test_a_start_tries_no_batches_and_whoever_loads_a_model_later_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later: list[bool] = []

    def opened(*words: Any) -> Resident:
        later.append(words[3].try_later)
        return open_model(*words)

    async def ask(client: httpx.AsyncClient, _: Any) -> None:
        for what in ("unload", "load"):
            (await client.post(f"/v2/repository/models/part/{what}")).raise_for_status()

    monkeypatch.setattr("app.serving.loader.open_model", opened)
    part = tiny_bundle(tmp_path / "part")
    in_process(settings_of(tmp_path, model_dir=part, model_name="part"), ask)
    assert later == [True, False]
