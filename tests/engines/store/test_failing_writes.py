"""Every write of every change of a store, made to fail once: what was said is what is."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from app.http.keys import add_key, read_keys, remove_key
from engines.errors import BadSettings, DiskFull
from engines.queue.job_folder import JobFolder
from engines.queue.schedules import Schedules
from engines.store.datasets import SPLITS, Datasets
from engines.store.versions import Store
from support.damage import saved
from support.failing import failing

BOLT = "bolt"
HELD = {"ok": False, "reasons": ["It sees nothing."]}
BY_HAND = {"ok": True, "reasons": [], "by_hand": True}


def publish(store: Store, content: str, name: str = BOLT) -> str:
    with store.staging() as folder:
        (folder / "meta.json").write_text(content)
        (folder / "model.onnx").write_text(content * 1000)
        return store.publish(name, folder, {})


def refuse(store: Store) -> None:
    store.refuse(BOLT, store.versions(BOLT)[3], "It is damaged.")


def changes(versions: list[str]) -> dict[str, Callable[[Store], object]]:
    return {
        "activate a new one": lambda store: store.activate(BOLT, versions[2], BY_HAND),
        "activate an old one": lambda store: store.activate(BOLT, versions[0], BY_HAND),
        "activate a held one": lambda store: store.activate(BOLT, versions[3], BY_HAND),
        "activate without a word": lambda store: store.activate(BOLT, versions[2]),
        "roll back": lambda store: store.roll_back(BOLT),
        "roll back with a reason": lambda store: store.roll_back(BOLT, HELD),
        "record a gate": lambda store: store.record_gate(BOLT, versions[2], HELD),
        "record it again": lambda store: store.record_gate(BOLT, versions[3], BY_HAND),
        "publish": lambda store: publish(store, "version 4"),
        "publish a first one": lambda store: publish(store, "version 0", "nut"),
        "refuse": refuse,
        "note a folder": lambda store: store.note_folder(BOLT, versions[1]),
    }


def state(store: Store) -> dict[str, Any]:
    """All that can be learned from a store; the candidates also without its pointer."""
    found: dict[str, Any] = {"names": store.names()}
    for name in store.names():
        found[name] = {
            "versions": {one: store.manifest(name, one) for one in store.versions(name)},
            "pointer": store.pointer(name),
            "candidates": store.candidates(name),
            "refused": store.refused(name),
            "gates": [store.gate(name, one) for one in store.versions(name)],
            "folder": store.last_folder(name),
        }
        pointer = store.root / name / "live"
        if pointer.exists():
            pointer.rename(store.root / "aside")
            found[name]["without pointer"] = store.candidates(name)
            (store.root / "aside").rename(pointer)
    return found


@pytest.mark.parametrize("change", changes(["", "", "", ""]))
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_change_one_of_whose_writes_fails_is_done_whole_or_not_at_all(
    tmp_path: Path, change: str, error: int
) -> None:
    seed = Store(tmp_path / "seed")
    versions = [publish(seed, f"version {number}") for number in range(4)]
    seed.record_gate(BOLT, versions[3], HELD)
    for version in versions[:2]:
        seed.activate(BOLT, version)
    before, failures = state(seed), 0
    done = Store(tmp_path / "done")
    shutil.copytree(seed.root, done.root)
    changes(versions)[change](done)
    after = state(done)
    for step in range(200):
        store = Store(tmp_path / f"step{step}")
        shutil.copytree(seed.root, store.root)
        with failing(store.root, step, error) as write:
            try:
                changes(versions)[change](store)
                expected = after
            except OSError:
                expected, failures = before, failures + 1
        assert _alike(state(store), expected), f"{write.failed} failed"
        if write.failed is None:
            break
        if expected is before:  # a failure leaves nothing that is in the way
            changes(versions)[change](store)
            assert _alike(state(store), after), f"after {write.failed} failed"
    assert failures >= 2


# ---- other files --------------------------------------------------------------------------------


def picture(colour: int) -> bytes:
    return saved(Image.new("RGB", (8, 8), (colour, 0, 0)), "PNG")


def add(folder: Path, name: str, colour: int, **how: bool) -> None:
    Datasets(folder / "datasets").add("bolt", "train", name, picture(colour), **how)


def schedule(folder: Path, hour: int) -> None:
    retrain = {"model": "bolt", "category": "bolt"}
    content = {"cron": f"0 {hour} * * *", "timezone": "UTC", "retrain": retrain}
    Schedules(folder).write("nightly", content)


OTHERS: dict[str, Callable[[Path], object]] = {
    "an image": lambda folder: add(folder, "b.png", 2),
    "an image in the place of another": lambda folder: add(folder, "a.png", 3, replace=True),
    "an image that goes": lambda folder: Datasets(folder / "datasets").delete_image(
        "bolt", "train", "a.png"
    ),
    "a split that goes": lambda folder: Datasets(folder / "datasets").delete_split(
        "bolt", "normal"
    ),
    "a category that goes": lambda folder: Datasets(folder / "datasets").delete("bolt"),
    "a schedule": lambda folder: Schedules(folder).write(
        "weekly", Schedules(folder).all()["nightly"]
    ),
    "a schedule in the place of another": lambda folder: schedule(folder, 3),
    "a schedule that goes": lambda folder: Schedules(folder).remove("nightly"),
    "a key": lambda folder: add_key(folder / "keys.json", "line-2", "line"),
    "a key that goes": lambda folder: remove_key(folder / "keys.json", "line-1"),
    "an attempt of a job": lambda folder: JobFolder(folder, "retrain-1").begin(),
    "the result of a job": lambda folder: JobFolder(folder, "retrain-1").write_result({"ok": 1}),
}


def contents(folder: Path) -> dict[str, object]:
    """What can be read: images by their bytes, schedules, the names of keys, a job's result."""
    datasets = Datasets(folder / "datasets")
    images = {
        (category, split, image.name): datasets.read(category, split, image.name)
        for category in datasets.categories()
        for split in SPLITS
        for image in datasets.images(category, split).images
    }
    keys = [one.name for one in read_keys(folder / "keys.json") or []]
    job = JobFolder(folder, "retrain-1")
    jobs = [job.attempts(), job.result()]
    return {"images": images, "schedules": Schedules(folder).all(), "keys": keys, "jobs": jobs}


@pytest.mark.parametrize("change", OTHERS)
def test_another_file_one_of_whose_writes_fails_is_as_it_was(tmp_path: Path, change: str) -> None:
    seed, done = tmp_path / "seed", tmp_path / "done"
    add(seed, "a.png", 1)
    for split in SPLITS[1:]:
        Datasets(seed / "datasets").add("bolt", split, "c.png", picture(4))
    schedule(seed, 2)
    add_key(seed / "keys.json", "line-1", "line")
    JobFolder(seed, "retrain-1").root.mkdir(parents=True)
    before, failures = contents(seed), 0
    shutil.copytree(seed, done)
    OTHERS[change](done)
    after = contents(done)
    assert after != before
    for step in range(100):
        folder = tmp_path / f"step{step}"
        shutil.copytree(seed, folder)
        with failing(folder, step) as write:
            try:
                OTHERS[change](folder)
                expected = after
            except (OSError, DiskFull, BadSettings):
                expected, failures = before, failures + 1
        assert contents(folder) == expected, f"{write.failed} failed"
        Datasets(folder / "datasets").sweep()  # and whatever was in the making goes
        assert contents(folder) == expected, f"{write.failed} failed"
        assert not [*folder.glob("datasets/**/.*")]
        if write.failed is None:
            break
    assert failures >= 1


def _alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """The same but for the moment at which a version was made."""
    return _without_times(one) == _without_times(other)


def _without_times(found: dict[str, Any]) -> str:
    return re.sub(r"created='[^']*'", "", repr(found))
