"""Claims about the lists of models: they stay quick, however many versions there are."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.routes import models as routes
from engines.meta import Meta
from engines.store import versions as stored
from engines.store.versions import Store
from support.in_process import in_process, settings_of
from support.plans import tiny_bundle


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "data" / "models")


def fill(store: Store, tmp_path: Path, count: int) -> list[str]:
    """A model of so many versions, the first one live."""
    bundle = tiny_bundle(tmp_path / "bundle")
    meta = json.loads((bundle / "meta.json").read_text())
    for generation in range(count):
        (bundle / "meta.json").write_text(json.dumps({**meta, "generation": generation}))
        store.take_in("part", bundle, {})
    store.activate("part", store.versions("part")[0])
    return store.versions("part")


def test_versions_are_listed_in_pages_newest_first(store: Store, tmp_path: Path) -> None:
    versions = fill(store, tmp_path, 120)[::-1]

    async def ask(client: httpx.AsyncClient, _: Any) -> None:
        async def page(**wanted: int) -> list[str]:
            found = (await client.get("/models/part", params=wanted)).json()
            return [one["version"] for one in found["versions"]]

        assert await page() == versions[:100]
        assert await page(limit=7) == versions[:7]
        assert await page(limit=7, offset=116) == versions[116:]
        assert await page(offset=500) == []
        (listed,) = (await client.get("/models", params={"limit": 3})).json()["models"]
        assert [one["version"] for one in listed["versions"]] == versions[:3]
        assert (await client.get("/models?limit=201")).status_code == 422

    in_process(settings_of(tmp_path, keep_versions=1000), ask)


def test_a_version_takes_no_look_at_the_others(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each looked at all of them: 1,000 versions took 40 s."""
    fill(store, tmp_path, 50)
    list_them, looks = stored._versions_in, []

    def count(folder: Path) -> list[str]:
        if threading.current_thread().name.startswith("models"):
            looks.append(folder)
        return list_them(folder)

    monkeypatch.setattr(stored, "_versions_in", count)

    async def ask(client: httpx.AsyncClient, _: Any) -> None:
        for limit in (1, 50):
            looks.clear()
            assert (await client.get("/models", params={"limit": limit})).status_code == 200
            assert 0 < len(looks) < 50  # one a version, and those of the server's own rounds

    in_process(settings_of(tmp_path), ask)


def test_what_a_version_is_is_read_once_and_again_where_a_file_of_it_is_another(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most of a list's time was this: 0.4 ms of Python for each version."""
    versions = fill(store, tmp_path, 3)
    read, reads = Meta.read, []

    def count(path: Path) -> Meta:
        reads.append(path.parent.name)
        return read(path)

    monkeypatch.setattr(Meta, "read", count)

    async def ask(client: httpx.AsyncClient, _: Any) -> None:
        async def states() -> dict[str, str]:
            found = (await client.get("/models/part")).json()["versions"]
            return {one["version"]: one["state"] for one in found}

        first = await states()
        reads.clear()
        assert await states() == first
        assert reads == []
        store.record_gate("part", versions[1], {"ok": False, "reasons": ["Too dark."]})
        assert await states() == {**first, versions[1]: "held"}
        assert reads == [versions[1]]
        manifest = store.root / "part" / versions[2] / "manifest.json"
        manifest.write_text("{")
        assert await states() == {**first, versions[1]: "held", versions[2]: "damaged"}

    in_process(settings_of(tmp_path), ask)


def test_a_version_that_vanishes_while_models_are_listed_takes_no_other_one_away(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as one that another process prunes."""
    first, gone, last = fill(store, tmp_path, 3)
    describe: Callable[..., Any] = routes._record

    def delete(store: Store, name: str, version: str, **others: Any) -> Any:
        if version == gone:
            shutil.rmtree(store.root / name / version, ignore_errors=True)
        return describe(store, name, version, **others)

    monkeypatch.setattr(routes, "_record", delete)

    async def ask(client: httpx.AsyncClient, _: Any) -> None:
        answer = await client.get("/models")
        assert answer.status_code == 200, answer.text
        (model,) = answer.json()["models"]
        states = {one["version"]: one["state"] for one in model["versions"]}
        assert states == {last: "kept", gone: "damaged", first: "live"}
        assert (await client.get(f"/models/part/versions/{gone}")).status_code == 404

    in_process(settings_of(tmp_path), ask)


def test_whoever_lists_models_takes_no_thread_that_a_part_needs(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store, tmp_path, 1)
    seen: set[str] = set()
    describe: Callable[..., Any] = routes._record

    def slowly(*arguments: Any, **named: Any) -> Any:
        seen.add(threading.current_thread().name.partition("_")[0])
        time.sleep(0.01)
        return describe(*arguments, **named)

    monkeypatch.setattr(routes, "_record", slowly)

    async def ask(client: httpx.AsyncClient, _: Any) -> None:
        assert (await client.get("/models")).status_code == 200

    in_process(settings_of(tmp_path), ask)
    assert seen == {"models"}
