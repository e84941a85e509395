"""Each write of a change made to fail once, over HTTP: what is answered is what judges."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.serving.rollout import Rollout
from engines.store.versions import Store
from support.failing import failing
from support.in_process import in_process, settings_of
from support.plans import tiny_bundle
from support.server import RAW

NAME = "part"
Send = Callable[[httpx.AsyncClient, Store], Awaitable[httpx.Response]]


def store_of(folder: Path) -> Store:
    return Store(folder / "data" / "models")


async def activate(client: httpx.AsyncClient, store: Store) -> httpx.Response:
    held = store.versions(NAME)[2]
    return await client.post(f"/models/{NAME}/versions/{held}/activate")


async def roll_back(client: httpx.AsyncClient, _: Store) -> httpx.Response:
    return await client.post(f"/models/{NAME}/rollback")


async def change_threshold(client: httpx.AsyncClient, _: Store) -> httpx.Response:
    body = {"threshold": 0.7, "reason": "Too many."}
    return await client.put(f"/models/{NAME}/threshold", json=body)


async def change_regions(client: httpx.AsyncClient, _: Store) -> httpx.Response:
    asked = {"width": 32, "height": 32, "polygons": [[[0, 0], [9, 0], [9, 9]]], "reason": "A clamp"}
    return await client.put(f"/models/{NAME}/regions", json=asked)


async def upload(client: httpx.AsyncClient, store: Store) -> httpx.Response:
    data = (store.root.parent.parent / "new.zip").read_bytes()
    wanted = {"name": NAME, "activate": "false"}
    return await client.post("/models", params=wanted, content=data, headers=RAW)


async def seen(client: httpx.AsyncClient) -> dict[str, Any]:
    """What the server says of the model; not the moments at which versions were made."""
    found: dict[str, Any] = (await client.get(f"/models/{NAME}")).json()
    for version in found["versions"]:
        del version["created"]
    return found


@pytest.mark.parametrize("send", [activate, roll_back, change_threshold, change_regions, upload])
def test_what_is_answered_holds_now_and_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, send: Send
) -> None:
    async def nothing(_: Rollout) -> None:
        """Old versions are deleted beside it, which may fail and is no part of a change."""

    monkeypatch.setattr(Rollout, "_prune", nothing)
    store = store_of(tmp_path)
    for number in range(3):
        bundle = tiny_bundle(tmp_path / f"bundle{number}", offset=number + 1.0)
        version = store.take_in(NAME, bundle, {})
        if number < 2:
            store.activate(NAME, version)
    store.record_gate(NAME, version, {"ok": False, "reasons": ["It sees nothing."]})
    new = tiny_bundle(tmp_path / "new", offset=9.0)
    shutil.make_archive(str(tmp_path / "new"), "zip", new)

    async def fail(client: httpx.AsyncClient, app: Any) -> tuple[int, dict[str, Any]]:
        before = first = await seen(client)
        changes: list[str] = []  # as the audit trail says them
        app.state.rollout.on_change = lambda what, *_: changes.append(what)
        for step in range(
            200
        ):  # a mark of an opening may be missing: what is said holds all the same
            with failing(store.root, step, spared=("/opening", "/opened")) as write:
                answer = await send(client, store)
            if answer.is_success and write.failed is None:
                break
            if answer.is_success:  # what only tidies up may fail; the writes behind it come, too
                before = await seen(client)
                changes.clear()
                continue
            assert answer.status_code == 507, (write.failed, answer.text)
            assert await seen(client) == before, write.failed
            pointer = store.pointer(NAME)
            assert pointer is not None
            assert pointer.live == before["live"], write.failed
            assert changes == [], write.failed
        after = await seen(client)
        assert after != first or send is roll_back  # which goes back and forth
        return step, after

    failures, after = in_process(settings_of(tmp_path), fail)
    assert failures >= 4

    async def look(client: httpx.AsyncClient, _: Any) -> dict[str, Any]:
        return await seen(client)

    assert in_process(settings_of(tmp_path), look) == after


@pytest.mark.parametrize("error", [errno.EMFILE, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("file", ["manifest.json", "meta.json"])
def test_a_version_that_the_system_does_not_give_is_not_put_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, error: int
) -> None:
    """It may be whole: it judges again once that has passed."""
    store = store_of(tmp_path)
    live = store.take_in(NAME, tiny_bundle(tmp_path / "bundle", offset=1.0), {})
    store.activate(NAME, live)
    waiting = store.take_in(NAME, tiny_bundle(tmp_path / "other", offset=2.0), {"activate": True})

    async def look(client: httpx.AsyncClient, _: Any) -> dict[str, Any]:
        await asyncio.sleep(1.0)  # so that new versions are looked for
        found: dict[str, Any] = (await client.get(f"/models/{NAME}")).json()
        return found

    def read_text(path: Path, *arguments: Any, **named: Any) -> str:
        if path.name == file and path.is_relative_to(store.root):
            raise OSError(error, os.strerror(error), str(path))
        return whole(path, *arguments, **named)

    whole = Path.read_text
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", read_text)
        found = in_process(settings_of(tmp_path), look)
    assert found["live"] is None
    assert f"{file} cannot be read at the moment ({os.strerror(error)})" in found["problem"]
    assert store.refused(NAME) == {}
    assert store.versions(NAME) == [live, waiting]
    found = in_process(settings_of(tmp_path), look)
    assert found["live"] in (live, waiting)
    assert store.refused(NAME) == {}


@pytest.mark.parametrize("lost", ["raw_image_min", "raw_image_max", "image_threshold_auto"])
def test_a_model_that_was_verified_in_part_takes_no_list_away(tmp_path: Path, lost: str) -> None:
    store = store_of(tmp_path)
    store.activate(NAME, store.take_in(NAME, tiny_bundle(tmp_path / "bundle"), {}))
    odd = tiny_bundle(tmp_path / "odd", offset=1.0)
    content = json.loads((odd / "meta.json").read_text())
    (odd / "meta.json").write_text(json.dumps({k: v for k, v in content.items() if k != lost}))
    version = store.take_in("odd", odd, {})

    async def look(client: httpx.AsyncClient, _: Any) -> httpx.Response:
        return await client.get("/models")

    answer = in_process(settings_of(tmp_path), look)
    assert answer.status_code == 200, answer.text
    models = {one["name"]: one for one in answer.json()["models"]}
    (described,) = models["odd"]["versions"]
    assert (described["version"], described["state"], described["raw_threshold"]) == (
        version,
        "kept",
        None,
    )
    assert models[NAME]["live"]
