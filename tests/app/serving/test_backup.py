"""Claims about a data folder that was copied while the server ran, and is put back later."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import httpx
import pytest

from engines.store.versions import Store
from support.in_process import in_process, settings_of
from support.plans import tiny_bundle

NAME = "part"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder with two versions that were live, as a server of its own left it."""
    store = Store(tmp_path / "data" / "models")
    for number in range(2):
        bundle = tiny_bundle(tmp_path / f"bundle{number}", offset=number + 1.0)
        store.activate(NAME, store.take_in(NAME, bundle, {}))

    async def look(client: httpx.AsyncClient, app: Any) -> None:
        while not app.state.jobs.is_open:
            await asyncio.sleep(0.05)

    in_process(settings_of(tmp_path), look)
    return tmp_path / "data"


def lose_the_live_one(data: Path, live: str) -> None:
    """`live` was copied after an activation, the versions before the new one was there."""
    shutil.rmtree(data / "models" / NAME / live)


def lose_half_of_it(data: Path, live: str) -> None:
    """The copy went through the folder while the version appeared: large files came too late."""
    (data / "models" / NAME / live / "model.onnx").unlink()


def cut_a_file(data: Path, live: str) -> None:
    path = data / "models" / NAME / live / "model.onnx"
    path.write_bytes(path.read_bytes()[:100])


def lose_the_manifest(data: Path, live: str) -> None:
    (data / "models" / NAME / live / "manifest.json").unlink()


def lose_the_pointer(data: Path, live: str) -> None:
    """It was replaced while the copy went through the folder."""
    (data / "models" / NAME / "live").unlink()


def halve_the_queue(data: Path, live: str) -> None:
    """The database was copied without its write-ahead log, or amid a write."""
    path = data / "jobs.sqlite"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (data / "jobs.sqlite-wal").write_bytes(b"\0" * 100)


def keep_what_was_being_written(data: Path, live: str) -> None:
    """Staging folders, temporary names, locks and marks of the server that ran."""
    staged = data / "models" / ".staging" / "tmpabc"
    staged.mkdir(parents=True)
    (staged / "meta.json").write_text("{")
    (data / "models" / NAME / f".{live}").mkdir()
    (data / "models" / NAME / ".live.0badcafe").write_text("0009")


@pytest.mark.parametrize(
    ("change", "judges"),
    [
        (lose_the_live_one, 0), (lose_half_of_it, 0), (cut_a_file, 0), (lose_the_manifest, 0),
        (lose_the_pointer, 1), (halve_the_queue, 1), (keep_what_was_being_written, 1),
    ],
)  # fmt: skip
def test_a_copy_that_was_taken_while_the_server_ran_starts_with_a_whole_version_and_says_which(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, change: Any, judges: int
) -> None:
    restored = tmp_path / "restored" / "data"
    shutil.copytree(data, restored)
    versions = Store(restored / "models").versions(NAME)
    change(restored, versions[1])
    caplog.set_level("INFO")

    async def ask(client: httpx.AsyncClient, app: Any) -> dict[str, Any]:
        while not app.state.jobs.is_open:
            await asyncio.sleep(0.05)
        assert (await client.get("/jobs")).status_code == 200
        found: dict[str, Any] = (await client.get(f"/models/{NAME}")).json()
        return found

    found = in_process(settings_of(tmp_path / "restored"), ask)
    expected = versions[judges]
    assert found["live"] == expected
    assert f"Loaded {NAME} {expected}" in caplog.text
    if change in (lose_the_live_one, lose_half_of_it, cut_a_file, lose_the_manifest):
        assert f"is served from {expected} in place of {versions[1]}" in found["problem"]
        assert found["problem"] in caplog.text
    with sqlite3.connect(restored / "jobs.sqlite") as database:
        assert database.execute("PRAGMA quick_check").fetchone() == ("ok",)
