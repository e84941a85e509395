"""A version is downloaded whole, and is the same model wherever it is taken in."""

from __future__ import annotations

import asyncio
import io
import shutil
import zipfile
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import numpy as np
import pytest

from app.http.model_zip import pack_model
from engines.store.bundle import PLAN
from engines.store.plan_record import PLAN_RECORD
from engines.store.versions import Store
from support.damage import seeds
from support.in_process import in_process, settings_of
from support.plans import CHANNELS, tiny_bundle
from support.server import RAW

NAME = "部品-7"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A model with a memory bank, two versions of it, the second one live."""
    store = Store(tmp_path / "data" / "models")
    random = np.random.default_rng(0)
    for number in range(2):
        bank = random.normal(size=(12, CHANNELS)).astype(np.float32)
        folder = tiny_bundle(tmp_path / f"bundle{number}", bank)
        (folder / "model.pth").write_bytes(b"weights")
        store.activate(NAME, store.take_in(NAME, folder, {}))
    return store


def address(version: str) -> str:
    return f"/models/{NAME}/versions/{version}/archive"


def test_what_is_downloaded_judges_the_same_under_another_name(
    store: Store, tmp_path: Path
) -> None:
    part = seeds()["png_colour"]
    versions = store.versions(NAME)

    async def score(client: httpx.AsyncClient, name: str) -> Any:
        answer = await client.post("/infer", params={"model": name}, content=part, headers=RAW)
        assert answer.status_code == 200, answer.text
        return answer.json()["raw_score"]

    async def work(client: httpx.AsyncClient, _: Any) -> None:
        answer = await client.get(address(versions[1]))
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "application/zip"
        saved_as = answer.headers["content-disposition"].partition("''")[2]
        assert unquote(saved_as) == f"{NAME}-{versions[1]}.zip"
        zipped = zipfile.ZipFile(io.BytesIO(answer.content))
        assert zipped.testzip() is None
        folder = store.folder(NAME, versions[1])
        known = set(store.manifest(NAME, versions[1]).files)
        assert set(zipped.namelist()) == known
        assert all(zipped.read(name) == (folder / name).read_bytes() for name in known)
        sent = await client.post(
            "/models", params={"name": "copy"}, files={"file": ("m.zip", answer.content)}
        )
        assert sent.status_code == 201, sent.text
        assert sent.json()["version"].partition("-")[2] == versions[1].partition("-")[2]
        for _ in range(300):
            if (await client.get("/models/copy")).json()["live"]:
                break
            await asyncio.sleep(0.1)
        assert await score(client, "copy") == await score(client, NAME)

    in_process(settings_of(tmp_path), work)


def test_a_version_that_is_not_there_any_more_is_refused_in_words(
    store: Store, tmp_path: Path
) -> None:
    gone, live = store.versions(NAME)

    async def work(client: httpx.AsyncClient, _: Any) -> None:
        (store.folder(NAME, live) / "model.pth").unlink()
        shutil.rmtree(store.folder(NAME, gone))
        answer = await client.get(address(gone))
        assert (answer.status_code, answer.json()["code"]) == (404, "unknown_version")
        answer = await client.get(address(live))
        assert (answer.status_code, answer.json()["code"]) == (422, "bad_bundle")
        assert "model.pth is gone" in answer.json()["error"]
        answer = await client.get("/models/nothing/versions/0001-aaaaaaaaaaaa/archive")
        assert (answer.status_code, answer.json()["code"]) == (404, "unknown_model")

    in_process(settings_of(tmp_path), work)


def test_a_version_that_is_pruned_while_it_is_downloaded_comes_whole(tmp_path: Path) -> None:
    content = {"meta.json": b"{}", "model.onnx": bytes(range(256)) * 5000}
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    pieces = pack_model({name: (tmp_path / name).open("rb") for name in content})
    first = next(pieces)
    for name in content:
        (tmp_path / name).unlink()
    others = list(pieces)
    assert len(others) > 3, "it is never whole in memory"
    zipped = zipfile.ZipFile(io.BytesIO(first + b"".join(others)))
    assert {name: zipped.read(name) for name in zipped.namelist()} == content


def test_the_plan_stays_where_it_was_built(store: Store, tmp_path: Path) -> None:
    folder = tiny_bundle(tmp_path / "planned")
    with store.staging() as staged:
        for path in folder.iterdir():
            shutil.copy(path, staged)
        for name in (PLAN, PLAN_RECORD):
            (staged / name).write_bytes(b"machine code")
        version = store.publish("planned", staged, {})

    async def work(client: httpx.AsyncClient, _: Any) -> None:
        answer = await client.get(f"/models/planned/versions/{version}/archive")
        names = zipfile.ZipFile(io.BytesIO(answer.content)).namelist()
        assert "model.onnx" in names
        assert not {PLAN, PLAN_RECORD} & set(names)

    in_process(settings_of(tmp_path), work)
