"""Claims about the task that looks for new versions: nothing that happens to one model ends it."""

from __future__ import annotations

import asyncio
import errno
import json
import shutil
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from app.serving import loader as loading
from app.serving.gate_replay import GateReplay
from app.serving.stale_plans import StalePlans
from engines.store import versions as stored
from engines.store.versions import Manifest, Store
from support.damage import picture, saved
from support.in_process import in_process, settings_of
from support.plans import tiny_bundle
from support.server import RAW

PHOTO = saved(Image.fromarray(picture(64, 64)), "PNG")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "data" / "models")


@pytest.fixture
def publish(store: Store, tmp_path: Path) -> Callable[..., str]:
    """Publish a version, each another one; `live`: and activate it."""
    number = 0

    def one(name: str = "part", *, live: bool = False, **origin: Any) -> str:
        nonlocal number
        number += 1
        bundle = tiny_bundle(tmp_path / f"bundle{number}", offset=number / 100)
        version = store.take_in(name, bundle, {"activate": True, **origin})
        if live:
            store.activate(name, version)
        return version

    return one


async def until(look: Callable[[], Awaitable[bool]]) -> None:
    for _ in range(300):
        if await look():
            return
        await asyncio.sleep(0.05)
    raise AssertionError("it does not come")


def live_is(client: httpx.AsyncClient, version: str, name: str = "part") -> Any:
    async def look() -> bool:
        return bool((await client.get(f"/models/{name}")).json()["live"] == version)

    return look


async def degraded(client: httpx.AsyncClient) -> list[str]:
    found: list[str] = (await client.get("/healthz")).json()["degraded"]
    return found


@pytest.mark.parametrize("when", ["before its manifest is read", "before the gate"])
def test_a_version_that_vanishes_keeps_no_other_one_waiting(
    store: Store, publish: Callable[..., str], tmp_path: Path, monkeypatch: Any, when: str
) -> None:
    publish(live=True)
    vanishing: list[str] = []
    manifest = Store.manifest

    def delete(self: Store, name: str, version: str) -> Manifest:
        if version not in vanishing:
            return manifest(self, name, version)
        found = None if when == "before its manifest is read" else manifest(self, name, version)
        shutil.rmtree(self.root / name / version, ignore_errors=True)
        return found or manifest(self, name, version)

    monkeypatch.setattr(Store, "manifest", delete)

    async def work(client: httpx.AsyncClient, _: Any) -> list[str]:
        vanishing.append(publish())
        await asyncio.sleep(1.5)
        assert vanishing[0] not in store.versions("part")
        await until(live_is(client, publish()))
        return await degraded(client)

    assert in_process(settings_of(tmp_path), work) == []


def test_where_the_task_itself_dies_it_is_said_and_begun_again(
    publish: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(live=True)
    look, dies = StalePlans.look, [True]

    async def die(self: StalePlans) -> None:
        if dies.pop() if dies else False:
            raise ZeroDivisionError("a bug")
        await look(self)

    monkeypatch.setattr(StalePlans, "look", die)

    async def work(client: httpx.AsyncClient, _: Any) -> list[str]:
        await until(live_is(client, publish()))
        await until(live_is(client, publish()))
        return await degraded(client)

    (said,) = in_process(settings_of(tmp_path), work)
    assert "looks for new versions died (ZeroDivisionError)" in said


def test_a_model_whose_folder_cannot_be_read_takes_no_other_one_away(
    publish: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("bolt", "nut"):
        publish(name, live=True)
    list_them = stored._versions_in

    def refuse(folder: Path) -> list[str]:
        if "nut" in folder.parts:
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return list_them(folder)

    monkeypatch.setattr(stored, "_versions_in", refuse)

    async def work(client: httpx.AsyncClient, _: Any) -> None:
        part = {"params": {"model": "bolt"}, "content": PHOTO, "headers": RAW}
        assert (await client.post("/infer", **part)).status_code == 200
        bolt, nut = (await client.get("/models")).json()["models"]
        assert bolt["problem"] is None
        assert nut["live"] is None
        assert "Permission denied" in nut["problem"]
        assert "Permission denied" in (await client.get("/models/nut")).json()["problem"]
        index = await client.post("/v2/repository/index")
        assert [one["state"] for one in index.json()] == ["READY", "UNAVAILABLE"]
        assert (await client.get("/metrics")).status_code == 200
        await until(live_is(client, publish("bolt"), "bolt"))

    in_process(settings_of(tmp_path), work)


@pytest.mark.parametrize("damage", ["live", "gates", "refused", "folder"])
def test_a_folder_in_the_place_of_a_file_takes_no_model_away(
    store: Store, publish: Callable[..., str], tmp_path: Path, damage: str
) -> None:
    for name in ("bolt", "nut"):
        publish(name, live=True)
    place = store.root / "nut" / damage
    if place.is_dir():
        shutil.rmtree(place)
        place.touch()
    else:
        place.unlink(missing_ok=True)
        place.mkdir()

    async def work(client: httpx.AsyncClient, _: Any) -> None:
        part = {"params": {"model": "bolt"}, "content": PHOTO, "headers": RAW}
        assert (await client.post("/infer", **part)).status_code == 200
        assert (await client.get("/models")).status_code == 200
        await until(live_is(client, publish("bolt"), "bolt"))

    in_process(settings_of(tmp_path), work)


# ---- what both versions see ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "replayed"),
    [(10, 12, 0), (None, 12, 0), (10, 10, 1), (None, None, 1), (8, None, 1), (None, 16, 1)],
)
def test_a_part_is_shown_to_a_version_that_sees_it_as_bright_alone(
    store: Store, tmp_path: Path, before: int | None, after: int | None, replayed: int
) -> None:
    """A camera's bit depth was put right: what was seen with the old one is too bright now."""
    first = tiny_bundle(tmp_path / "first")
    second = tiny_bundle(tmp_path / "second", offset=0.01)
    for bundle, bits in ((first, before), (second, after)):
        meta = json.loads((bundle / "meta.json").read_text())
        (bundle / "meta.json").write_text(json.dumps({**meta, "bit_depth": bits}))
    store.activate("part", store.take_in("part", first, {}))

    async def work(client: httpx.AsyncClient, _: Any) -> None:
        await client.post("/infer", content=PHOTO, headers=RAW)
        version = store.take_in("part", second, {"activate": True})
        await until(live_is(client, version))
        gate = store.gate("part", version)
        assert gate is not None
        assert gate["groups"]["recent"]["images"] == replayed

    in_process(settings_of(tmp_path), work)


# ---- a person goes first ------------------------------------------------------------------------


def test_a_rollback_does_not_wait_for_a_gate_which_begins_again(
    publish: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = publish(live=True), publish(live=True)
    ask, began, slow = GateReplay.ask, asyncio.Event(), [True]

    async def replay(self: GateReplay, *what: Any) -> Any:
        began.set()
        if slow:
            await asyncio.sleep(60)
        return await ask(self, *what)

    monkeypatch.setattr(GateReplay, "ask", replay)

    async def work(client: httpx.AsyncClient, app: Any) -> None:
        await client.post("/infer", content=PHOTO, headers=RAW)  # something to replay
        third = publish()
        await asyncio.wait_for(began.wait(), 20)
        since = time.monotonic()
        answer = await client.post("/models/part/rollback")
        assert time.monotonic() - since < 5
        assert (answer.status_code, answer.json()["live"]) == (200, first)
        slow.clear()
        await until(live_is(client, third))
        assert [*app.state.models.loader._holders.values()] == [1], "the others are closed"

    in_process(settings_of(tmp_path), work)


def test_a_version_whose_opening_was_given_up_is_closed_before_another_is_opened(
    publish: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = publish(live=True), publish(live=True)
    really, opened, given_up = loading.open_model, asyncio.Event(), []
    events: list[str] = []

    def slowly(folder: Path, name: str, version: str, *others: Any) -> Any:
        if given_up == [False]:
            opened_in.call_soon_threadsafe(opened.set)
            time.sleep(1)
            given_up[0] = others[-1]()
        model = really(folder, name, version, *others)
        events.append(f"open {version[:4]}")
        close = model.runtime.close
        model.runtime.close = lambda: [close(), events.append(f"close {version[:4]}")]
        return model

    monkeypatch.setattr(loading, "open_model", slowly)
    opened_in = asyncio.new_event_loop()

    async def work(client: httpx.AsyncClient, _: Any) -> None:
        nonlocal opened_in
        opened_in = asyncio.get_running_loop()
        given_up.append(False)
        publish()
        await asyncio.wait_for(opened.wait(), 20)
        answer = await client.post("/models/part/rollback")
        assert answer.json()["live"] == first
        assert given_up == [True]

    in_process(settings_of(tmp_path), work)
    assert events[:4] == ["open 0002", "open 0003", "close 0003", "open 0001"]


# ---- how many are kept --------------------------------------------------------------------------


@pytest.mark.parametrize("origin", [{"activate": False}, {"activate": True, "max_flips": 0.0}])
@pytest.mark.parametrize("live", [True, False])
def test_versions_that_never_go_live_are_not_kept_without_end(
    store: Store,
    publish: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    origin: dict[str, Any],
    live: bool,
) -> None:
    """Held by the gate, or only kept; also where none was ever live."""
    held = {"ok": False, "reasons": ["It sees nothing."]}
    monkeypatch.setattr("app.serving.rollout.gate.weigh", lambda *_: dict(held))
    first = publish(live=live)

    async def work(client: httpx.AsyncClient, _: Any) -> None:
        sent = [publish(**origin) for _ in range(8)]
        kept = {*sent[-3:], first} if live else {*sent[-3:]}

        async def look() -> bool:
            return {*store.versions("part")} == kept

        await until(look)

    in_process(settings_of(tmp_path, keep_versions=3), work)


# ---- what was asked for -------------------------------------------------------------------------


@pytest.mark.parametrize("before", ["kept", "held", "live"])
def test_known_files_that_are_uploaded_to_go_live_go_live(
    store: Store, tmp_path: Path, publish: Callable[..., str], before: str
) -> None:
    publish(live=True)
    bundle = tiny_bundle(tmp_path / "bundle", offset=5.0)
    known = store.take_in("part", bundle, {})
    if before == "held":
        store.record_gate("part", known, {"ok": False, "reasons": ["It sees nothing."]})
    if before == "live":
        store.activate("part", known)
    data = Path(shutil.make_archive(str(tmp_path / "model"), "zip", bundle)).read_bytes()

    async def work(client: httpx.AsyncClient, _: Any) -> None:
        answer = await client.post("/models?name=part", content=data, headers=RAW)
        version = answer.json()["version"]
        assert answer.status_code == 201
        assert (version == known) == (before == "live")
        await until(live_is(client, version))

    in_process(settings_of(tmp_path), work)
