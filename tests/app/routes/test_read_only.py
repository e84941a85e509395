"""A data folder that cannot be written: parts are judged, and every change is refused in words."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from engines.store.versions import Store
from support.damage import picture, saved
from support.in_process import in_process, settings_of
from support.plans import tiny_bundle
from support.server import RAW

PHOTO = saved(Image.fromarray(picture(64, 64)), "PNG")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, to be mounted for reading alone."""
    folder = tmp_path / "data"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a file system: needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_parts_are_judged_and_changes_are_refused_in_words(disk: Path, tmp_path: Path) -> None:
    store, bundles = Store(disk / "models"), tmp_path / "bundles"
    for number in range(2):
        bundle = tiny_bundle(bundles / str(number), offset=number + 1.0)
        store.activate("part", store.take_in("part", bundle, {}))
    kept = store.versions("part")[0]
    data = Path(shutil.make_archive(str(tmp_path / "new"), "zip", bundle)).read_bytes()

    async def work(client: httpx.AsyncClient, app: Any) -> None:
        images = "/datasets/bolt/train"
        sent = {"content": PHOTO, "headers": RAW, "params": {"name": "a.png"}}
        assert (await client.post("/infer", content=PHOTO, headers=RAW)).status_code == 200
        body = {"threshold": 0.7, "reason": "Too many."}
        asked = {
            "upload": client.post(images, **sent),
            "take in": client.post("/models?name=other", content=data, headers=RAW),
            "activate": client.post(f"/models/part/versions/{kept}/activate"),
            "roll back": client.post("/models/part/rollback"),
            "threshold": client.put("/models/part/threshold", json=body),
        }
        for what, asking in asked.items():
            answer = await asking
            assert answer.status_code == 507, (what, answer.text)
            assert answer.json()["code"] == "read_only", (what, answer.text)
            assert "cannot be written" in answer.json()["error"]

    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    in_process(settings_of(tmp_path), work)
