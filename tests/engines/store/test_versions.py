"""Versions in the store never change, and a kill or a full disk changes nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from engines.errors import (
    BadBundle,
    BadMeta,
    BadRequest,
    Conflict,
    UnknownModel,
    UnknownVersion,
)
from engines.meta import Meta
from engines.store.bundle import Bundle
from engines.store.versions import MANIFEST, Pointer, Store
from support.project import ROOT

PAGE = 4096  # bytes; a small file takes one
BOLT = "bolt"
KILLED = ROOT / "tests" / "support" / "killed.py"
ABSENT = "0009-aaaaaaaaaaaa"
BAD_NAMES = ["", ".", "..", "../x", "a/b", "/tmp", "a b", "bolt\n", "\0", "ホ\u3099ルト", "b" * 65,
             ".staging", "bolt/0001-aaaaaaaaaaaa"]  # fmt: skip

# Everything that is done to one model, or asked of it.
CALLS: dict[str, Callable[[Store, str], object]] = {
    "must_know": lambda store, name: store.must_know(name),
    "folder": lambda store, name: store.folder(name, ABSENT),
    "manifest": lambda store, name: store.manifest(name, ABSENT),
    "check": lambda store, name: store.check(name, ABSENT),
    "activate": lambda store, name: store.activate(name, ABSENT),
    "roll_back": lambda store, name: store.roll_back(name),
    "pointer_back": lambda store, name: store.pointer_back(name),
    "record_gate": lambda store, name: store.record_gate(name, ABSENT, {"ok": True}),
    "refuse": lambda store, name: store.refuse(name, ABSENT, "damaged"),
    "discard": lambda store, name: store.discard(name, ABSENT),
    "prune": lambda store, name: store.prune(name, 1),
}
LOOKS: dict[str, Callable[[Store, str], object]] = {
    "versions": lambda store, name: store.versions(name),
    "refused": lambda store, name: store.refused(name),
    "pointer": lambda store, name: store.pointer(name),
    "candidates": lambda store, name: store.candidates(name),
    "gate": lambda store, name: store.gate(name, ABSENT),
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "models")


def publish(store: Store, content: str, name: str = BOLT, **origin: Any) -> str:
    """A version of two files."""
    with store.staging() as folder:
        (folder / "meta.json").write_text(content)
        (folder / "model.onnx").write_text(content * 1000)
        return store.publish(name, folder, origin)


def published(store: Store, count: int) -> list[str]:
    return [publish(store, f"version {number}") for number in range(count)]


def activated(store: Store, count: int) -> list[str]:
    """Versions that went live one after the other; the last is live."""
    versions = published(store, count)
    for version in versions:
        store.activate(BOLT, version)
    return versions


def pointer_file(store: Store) -> Path:
    return store.root / BOLT / "live"


def snapshot(folder: Path) -> dict[str, tuple[int, int, bytes | None]]:
    """Every path below a folder: mode, time of the last change, content of the files."""
    paths = [folder, *folder.rglob("*")] if folder.exists() else []
    return {
        str(path): (
            path.stat().st_mode,
            path.stat().st_mtime_ns,
            path.read_bytes() if path.is_file() else None,
        )
        for path in paths
    }


def state(store: Store) -> dict[str, Any]:
    """All that can be learned from a store about its models."""
    return {
        name: {
            "versions": {one: store.check(name, one) for one in store.versions(name)},
            "pointer": store.pointer(name),
            "candidates": store.candidates(name),
            "refused": store.refused(name),
            "gates": [store.gate(name, one) for one in store.versions(name)],
        }
        for name in store.names()
    }


# What is there


def test_a_store_that_nobody_wrote_to_is_empty_and_looking_makes_nothing(store: Store) -> None:
    assert store.names() == []
    for look in LOOKS.values():
        assert not look(store, BOLT)
    assert not store.root.exists()


@pytest.mark.parametrize("call", CALLS)
def test_a_model_that_nobody_published_is_unknown_and_is_not_made(store: Store, call: str) -> None:
    publish(store, "a", "bracket")
    with pytest.raises(UnknownModel, match=r"There is no model 'bolt'; there is 'bracket'\."):
        CALLS[call](store, BOLT)
    assert store.names() == ["bracket"]
    assert not (store.root / BOLT).exists()


@pytest.mark.parametrize("call", ["folder", "manifest", "check", "activate"])
def test_a_version_that_nobody_published_is_unknown(store: Store, call: str) -> None:
    version = publish(store, "a")
    with pytest.raises(
        UnknownVersion, match=rf"bolt has no version '{ABSENT}'; there is '{version}'"
    ):
        CALLS[call](store, BOLT)
    assert store.pointer(BOLT) is None


@pytest.mark.parametrize("name", BAD_NAMES)
def test_what_is_no_name_is_never_made_a_path(store: Store, name: str, tmp_path: Path) -> None:
    publish(store, "a")
    (tmp_path / "x").mkdir()
    with store.staging() as folder:
        before = snapshot(tmp_path)
        for act in (*CALLS.values(), *LOOKS.values()):
            with pytest.raises(UnknownModel):
                act(store, name)
        with pytest.raises(BadRequest, match="up to 64 letters"):
            store.publish(name, folder, {})
        assert snapshot(tmp_path) == before
    assert store.names() == [BOLT]


@pytest.mark.parametrize(
    "version", ["", ".", "..", "../bracket", "gates", "refused", "live", "0001"]
)
def test_what_is_no_version_is_never_made_a_path(store: Store, version: str) -> None:
    publish(store, "a", "bracket")
    activated(store, 1)
    before = snapshot(store.root)
    for act in (store.folder, store.manifest, store.check, store.activate):
        with pytest.raises(UnknownVersion):
            act(BOLT, version)
    store.refuse(BOLT, version, "it is none")
    assert snapshot(store.root / BOLT / "refused") == {}
    assert snapshot(store.root).keys() == before.keys()


def test_other_things_in_the_folders_are_neither_models_nor_versions(store: Store) -> None:
    version = publish(store, "a")
    for stray in ("lost+found", "notes.txt", "empty"):
        (store.root / stray).mkdir()
    for stray in ("0002-short", "2-aaaaaaaaaaaa", f".{ABSENT}", f"{ABSENT}.tmp"):
        (store.root / BOLT / stray).mkdir()
    assert store.names() == [BOLT]
    assert store.versions(BOLT) == [version]


# Publishing


def test_a_version_is_named_by_a_running_number_and_a_hash_over_its_files(store: Store) -> None:
    version = publish(store, "a")
    files = {"meta.json": sha256(b"a").hexdigest(), "model.onnx": sha256(b"a" * 1000).hexdigest()}
    lines = "".join(f"{name} {digest}\n" for name, digest in files.items())
    assert version == f"0001-{sha256(lines.encode()).hexdigest()[:12]}"
    assert publish(store, "b").startswith("0002-")
    assert publish(store, "a", "bracket") == version  # each model counts for itself


def test_a_manifest_says_what_a_version_is_made_of_and_where_it_came_from(store: Store) -> None:
    version = publish(store, "a", job="7", parent=None, category="嵌合部品")
    manifest = store.manifest(BOLT, version)
    assert manifest.version == version
    assert manifest.origin == {"job": "7", "parent": None, "category": "嵌合部品"}
    assert manifest.created.endswith("+00:00")
    folder = store.check(BOLT, version)
    assert {path.name for path in folder.iterdir()} == {*manifest.files, MANIFEST}
    assert folder.stat().st_mode & 0o777 == 0o755  # a server of another user may read it


def test_the_same_files_are_the_same_version_wherever_they_come_from(store: Store) -> None:
    first = publish(store, "a", job="1")
    second = publish(store, "b")
    assert publish(store, "a", job="2") == first
    assert store.versions(BOLT) == [first, second]
    assert store.manifest(BOLT, first).origin == {"job": "1"}


def test_another_byte_another_name_or_another_file_is_another_version(store: Store) -> None:
    contents = [{"a": b"1"}, {"a": b"2"}, {"b": b"1"}, {"a": b"1", "b": b""}, {"a": b"", "b": b"1"}]
    versions = []
    for files in contents:
        with store.staging() as folder:
            for name, data in files.items():
                (folder / name).write_bytes(data)
            versions.append(store.publish(BOLT, folder, {}))
    assert store.versions(BOLT) == versions
    assert len({version.partition("-")[2] for version in versions}) == len(contents)


def test_a_manifest_that_a_killed_publisher_left_is_not_part_of_the_version(store: Store) -> None:
    with store.staging() as folder:
        (folder / "meta.json").write_text("a")
        (folder / "model.onnx").write_text("a" * 1000)
        (folder / MANIFEST).write_text('{"vers')
        version = store.publish(BOLT, folder, {})
    assert publish(store, "a") == version
    store.check(BOLT, version)


def test_versions_are_ordered_by_number_and_not_by_letter(store: Store) -> None:
    publish(store, "a")
    (store.root / BOLT / "9999-000000000000").mkdir()
    assert publish(store, "b").startswith("10000-")
    assert publish(store, "c").startswith("10001-")
    assert [version.partition("-")[0] for version in store.versions(BOLT)] == [
        "0001", "9999", "10000", "10001"
    ]  # fmt: skip


def test_a_number_is_never_given_twice(store: Store) -> None:
    first, second, third = published(store, 3)
    store.refuse(BOLT, third, "damaged")
    assert publish(store, "four").startswith("0004-")
    store.activate(BOLT, first)
    store.prune(BOLT, 1)
    assert publish(store, "five").startswith("0005-")
    store.prune(BOLT, 0)
    assert publish(store, "version 1").startswith("0006-")  # as was 0002 before it was pruned
    assert second not in store.versions(BOLT)


def test_everything_is_flushed_before_it_appears_and_the_folders_after(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power cut leaves cannot be tried here; this is the order that makes it whole."""
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def note_fsync(descriptor: int) -> None:
        events.append(f"fsync {Path(f'/proc/self/fd/{descriptor}').readlink().name}")
        fsync(descriptor)

    def note_rename(self: Path, target: Path) -> Path:
        events.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "rename", note_rename)
    with store.staging() as folder:
        staging = folder.name
        (folder / "meta.json").write_text("a")
        (folder / "model.onnx").write_text("a")
        store.publish(BOLT, folder, {})
    at = events.index("rename")
    assert {"fsync meta.json", "fsync model.onnx", f"fsync {MANIFEST}"} <= set(events[:at])
    assert events[at - 1] == f"fsync {staging}"
    assert events[at + 1 :] == ["fsync bolt", "fsync models"]


def test_many_processes_publish_the_same_files_as_one_version_and_others_as_many(
    store: Store,
) -> None:
    program = """
import multiprocessing, sys
from pathlib import Path
from engines.store.versions import Store
store = Store(Path(sys.argv[1]))
def publish(number):
    with store.staging() as folder:
        (folder / "meta.json").write_text(str(number))
        return store.publish("bolt", folder, {})
with multiprocessing.get_context("fork").Pool(8) as pool:
    print(*pool.map(publish, [0] * 40, chunksize=1))
    print(*pool.map(publish, range(1, 41), chunksize=1))
"""
    command = [sys.executable, "-c", program, str(store.root)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    same, others = (line.split() for line in done.stdout.splitlines())
    assert len(set(same)) == 1
    assert sorted(others) == store.versions(BOLT)[1:]
    assert [int(version[:4]) for version in store.versions(BOLT)] == list(range(1, 42))
    for version in store.versions(BOLT):
        store.check(BOLT, version)


# A version never changes


def test_nothing_that_happens_to_a_model_changes_a_version(store: Store) -> None:
    first, second, _ = activated(store, 3)
    before = snapshot(store.root / BOLT / first), snapshot(store.root / BOLT / second)
    store.activate(BOLT, first)
    store.record_gate(BOLT, second, {"ok": False})
    store.roll_back(BOLT)
    store.activate(BOLT, second)
    publish(store, "another")
    publish(store, "version 0", job="of other files")
    store.prune(BOLT, 5)
    assert (snapshot(store.root / BOLT / first), snapshot(store.root / BOLT / second)) == before


@pytest.mark.parametrize("name", ["meta.json", "model.onnx"])
@pytest.mark.parametrize("damage", ["a bit", "cut", "longer", "gone", "a folder"])
def test_a_file_that_has_changed_is_named(store: Store, name: str, damage: str) -> None:
    version = publish(store, "a")
    path = store.check(BOLT, version) / name
    data = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage != "gone":
        path.write_bytes(
            {"a bit": bytes([data[0] ^ 1]) + data[1:], "cut": data[:-1], "longer": data + b"a"}[
                damage
            ]
        )
    with pytest.raises(BadBundle, match=rf"{version}/{name}"):
        store.check(BOLT, version)


def edited(**changes: Any) -> Callable[[str], str]:
    return lambda text: json.dumps({**json.loads(text), **changes})


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "", lambda text: text[:-3], lambda text: "\0" * len(text), lambda text: "[]",
        lambda text: "null", lambda text: "7", lambda text: "{}", edited(files=None),
        edited(files={}), edited(files=["meta.json"]), edited(files={"../x": "0"}),
        edited(origin=None), edited(origin=3),
        lambda text: text.replace("meta.json", "meta.jsom"), lambda text: "[" * 100_000,
        lambda text: text.replace('"origin": {}', '"origin": {"a": NaN}'),
        lambda text: text.replace('"origin": {}', '"origin": {"a": -1e400}'),
    ],
    ids=["empty", "cut", "zeros", "a list", "null", "a number", "no keys", "no files", "0 files",
         "files without hashes", "a path", "no origin", "a number as origin", "another name",
         "deep", "NaN", "infinite"],
)  # fmt: skip
def test_a_damaged_manifest_is_refused_by_name(store: Store, damage: Callable[[str], str]) -> None:
    version = publish(store, "a")
    path = store.root / BOLT / version / MANIFEST
    path.write_text(damage(path.read_text()))
    for act in (store.manifest, store.check):
        with pytest.raises(BadBundle, match=rf"{version}/manifest\.json"):
            act(BOLT, version)


@pytest.mark.parametrize("damage", ["gone", "not UTF-8", "of another version"])
def test_a_manifest_that_is_not_its_own_is_refused_by_name(store: Store, damage: str) -> None:
    version, other = publish(store, "a"), publish(store, "b")
    path = store.root / BOLT / version / MANIFEST
    if damage == "gone":
        path.unlink()
    elif damage == "not UTF-8":
        path.write_bytes(b"\xff" + path.read_bytes())
    else:
        shutil.copyfile(store.root / BOLT / other / MANIFEST, path)
    with pytest.raises(BadBundle, match=r"manifest\.json"):
        store.check(BOLT, version)
    store.check(BOLT, other)


# Which version is live


def test_the_live_version_becomes_the_one_before_the_next(store: Store) -> None:
    first, second, third = published(store, 3)
    assert store.pointer(BOLT) is None
    store.activate(BOLT, first)
    assert store.pointer(BOLT) == Pointer(first, None)
    store.activate(BOLT, third)
    assert store.pointer(BOLT) == Pointer(third, first)
    store.activate(BOLT, third)
    assert store.pointer(BOLT) == Pointer(third, first)
    store.activate(BOLT, second)
    assert store.pointer(BOLT) == Pointer(second, third)


def test_rolling_back_twice_goes_back_and_forth(store: Store) -> None:
    _, second, third = activated(store, 3)
    assert store.roll_back(BOLT) == second
    assert store.pointer(BOLT) == Pointer(second, third)
    assert store.roll_back(BOLT) == third
    assert store.pointer(BOLT) == Pointer(third, second)


def test_without_a_version_before_there_is_no_way_back(store: Store) -> None:
    first, second = published(store, 2)
    with pytest.raises(Conflict, match="no version before the live one"):
        store.roll_back(BOLT)
    assert store.pointer(BOLT) is None
    store.activate(BOLT, first)
    with pytest.raises(Conflict):
        store.roll_back(BOLT)
    assert store.pointer(BOLT) == Pointer(first)
    store.activate(BOLT, second)
    store.refuse(BOLT, first, "damaged")
    with pytest.raises(Conflict):
        store.roll_back(BOLT)
    assert store.pointer(BOLT) == Pointer(second, first)


def test_a_version_that_is_pruned_while_others_hold_the_lock_does_not_go_live(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = activated(store, 3)
    locked = store._locked

    @contextmanager
    def late(name: str) -> Iterator[None]:
        with locked(name):
            shutil.rmtree(store.root / name / first)  # by the process that held it before
            yield

    monkeypatch.setattr(store, "_locked", late)
    with pytest.raises(UnknownVersion):
        store.activate(BOLT, first)
    assert store.pointer(BOLT) == Pointer(third, second)


def test_where_the_live_version_is_gone_its_successor_can_be_rolled_back(store: Store) -> None:
    first, second, third = activated(store, 3)
    store.refuse(BOLT, third, "damaged")
    assert store.candidates(BOLT) == [second, first]
    store.activate(BOLT, second)
    assert store.pointer(BOLT) == Pointer(second, first)
    assert store.roll_back(BOLT) == first


# Which versions may be served


def test_candidates_are_the_live_one_the_one_before_and_older_live_ones(store: Store) -> None:
    first, second, third, fourth = activated(store, 4)
    publish(store, "never live")
    assert store.candidates(BOLT) == [fourth, third, second, first]
    store.activate(BOLT, second)
    assert store.candidates(BOLT) == [second, fourth, third, first]
    store.activate(BOLT, first)
    assert store.candidates(BOLT) == [first, second, fourth, third]
    store.refuse(BOLT, first, "damaged")
    assert store.candidates(BOLT) == [second, fourth, third]


def test_what_was_never_live_is_no_candidate(store: Store) -> None:
    first, second = published(store, 2)
    store.record_gate(BOLT, first, {"ok": True})
    store.record_gate(BOLT, second, {"ok": False})
    assert store.candidates(BOLT) == []
    store.activate(BOLT, first)
    assert store.candidates(BOLT) == [first]


def test_what_was_rolled_back_is_no_candidate(store: Store) -> None:
    first, second, _ = activated(store, 3)
    store.roll_back(BOLT)
    assert store.candidates(BOLT) == [second, first]
    store.refuse(BOLT, second, "damaged")
    assert store.candidates(BOLT) == [first]
    store.refuse(BOLT, first, "damaged")
    assert store.candidates(BOLT) == []


def test_what_should_serve_is_known_although_it_cannot(store: Store) -> None:
    assert store.to_serve(BOLT) == ([], None, None)
    first, second = activated(store, 2)
    assert store.to_serve(BOLT) == ([second, first], second, None)
    store.refuse(BOLT, second, "It is damaged.")
    assert store.to_serve(BOLT) == ([first], second, "was refused: It is damaged")
    shutil.rmtree(store.root / BOLT / "refused")
    assert store.to_serve(BOLT) == ([first], second, "is not there any more")
    pointer_file(store).write_bytes(b"garbage")
    candidates, should, why = store.to_serve(BOLT)
    assert (candidates, should) == ([first], None)
    assert "damaged" in str(why)


def test_what_was_rolled_back_is_not_before_the_next_one(store: Store) -> None:
    """Else that one could go back to it by itself, when it rejects too much."""
    first, second, bad = activated(store, 3)
    store.roll_back(BOLT)
    store.refuse(BOLT, second, "damaged")
    new = publish(store, "new")
    store.activate(BOLT, new)
    assert store.pointer(BOLT) == Pointer(new, first)
    assert bad in store.versions(BOLT)


# Which version a job starts from


def test_a_version_that_is_deleted_while_others_are_looked_at_is_passed_over(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = publish(store, "a", job="one")
    gone = "0009-0123456789ab"
    monkeypatch.setattr(store, "versions", lambda _: [gone, version])
    assert store.made_by(BOLT, "one") == version
    assert store.made_by(BOLT, "two") is None
    assert store._trained(BOLT, gone) is None


def test_a_job_starts_from_what_may_serve(store: Store) -> None:
    assert store.to_start_from(BOLT) is None
    first, second, third = published(store, 3)
    assert store.to_start_from(BOLT) == third
    store.record_gate(BOLT, third, {"ok": False, "reasons": ["It finds nothing."]})
    assert store.to_start_from(BOLT) == second
    store.activate(BOLT, first)
    assert store.to_start_from(BOLT) == first
    store.activate(BOLT, second)
    store.refuse(BOLT, second, "damaged")
    assert store.to_start_from(BOLT) == first
    store.refuse(BOLT, first, "damaged")
    assert store.to_start_from(BOLT) is None, "the last one left was held"
    assert store.to_start_from(BOLT, third) == third, "a person named it"


# The folder that is taken in at each start


def test_a_folder_is_news_when_it_has_changed_since_it_was_taken_in(store: Store) -> None:
    first, second = published(store, 2)
    assert store.is_news(BOLT, first, is_there=False)
    store.note_folder(BOLT, first)
    store.activate(BOLT, first)
    store.activate(BOLT, second)
    assert not store.is_news(BOLT, first, is_there=True)
    assert store.is_news(BOLT, second, is_there=True), "edited to what was there once"
    store.note_folder(BOLT, second)
    assert store.is_news(BOLT, first, is_there=True), "and back"
    store.note_folder(BOLT, first)
    again = f"0009-{first[5:]}"  # of files that were pruned, or put aside
    assert not store.is_news(BOLT, again, is_there=False)
    store.activate(BOLT, first)
    assert store.is_news(BOLT, again, is_there=False), "it replaces the damaged live one"


def test_a_folder_that_was_rolled_back_from_is_no_news(store: Store) -> None:
    _, second = activated(store, 2)
    store.note_folder(BOLT, second)
    store.record_gate(BOLT, second, {"ok": True})
    store.roll_back(BOLT)
    assert not store.is_news(BOLT, second, is_there=True)
    pointer_file(store).unlink()
    assert not store.is_news(BOLT, second, is_there=True)


def test_what_was_rolled_back_is_no_candidate_where_the_pointer_is_damaged(store: Store) -> None:
    first, second, _ = activated(store, 3)
    store.roll_back(BOLT)
    pointer_file(store).write_bytes(b"")
    assert store.candidates(BOLT) == [second, first]


def test_what_came_back_after_a_rollback_is_one_again(store: Store) -> None:
    first, second, third = activated(store, 3)
    store.roll_back(BOLT)
    store.roll_back(BOLT)
    pointer_file(store).write_bytes(b"")
    assert store.candidates(BOLT)[0] == third
    assert second not in store.candidates(BOLT)  # that one was left for it
    store.activate(BOLT, second)
    pointer_file(store).write_bytes(b"")
    assert store.candidates(BOLT) == [third, second, first]


# A damaged pointer


def damaged_pointers() -> Iterator[bytes]:
    whole = f"0003-{'a' * 12}\n0002-{'b' * 12}\n".encode()
    yield from (whole[:length] for length in range(len(whole)))
    yield from (
        bytes(len(whole)),
        b"\xff" * 40,
        b"garbage\n",
        b"\n\n",
        b"live\nprevious\n",
        whole * 2,
    )
    yield from (whole.replace(b"0003", b"3"), b"\x80" + whole)


def test_a_damaged_pointer_names_nothing_and_nothing_is_lost(store: Store) -> None:
    versions = activated(store, 3)
    pointers = list(damaged_pointers())
    assert len(pointers) > 40
    for content in pointers:
        pointer_file(store).write_bytes(content)
        assert store.pointer(BOLT) is None, content
        assert store.candidates(BOLT) == versions[::-1]
        assert store.prune(BOLT, 1) == []
        with pytest.raises(Conflict):
            store.roll_back(BOLT)
    assert store.versions(BOLT) == versions


def test_the_next_version_that_goes_live_mends_a_damaged_pointer(store: Store) -> None:
    _, second, third = activated(store, 3)
    pointer_file(store).write_bytes(b"garbage")
    store.activate(BOLT, third)
    assert store.pointer(BOLT) == Pointer(third, second)


@pytest.mark.parametrize("second_line", ["", "garbage", "0002-short"])
def test_a_pointer_whose_second_line_is_damaged_still_names_the_live_one(
    store: Store, second_line: str
) -> None:
    first, second = activated(store, 2)
    pointer_file(store).write_text(f"{second}\n{second_line}\n")
    assert store.pointer(BOLT) == Pointer(second, None)
    assert store.candidates(BOLT) == [second, first]


def test_a_pointer_to_a_version_that_is_gone_leaves_the_one_before_and_nothing_is_pruned(
    store: Store,
) -> None:
    versions = activated(store, 4)
    shutil.rmtree(store.root / BOLT / versions[3])
    assert store.pointer(BOLT) == Pointer(versions[3], versions[2])
    assert store.candidates(BOLT) == [versions[2], versions[1], versions[0]]
    assert store.prune(BOLT, 1) == []
    assert store.roll_back(BOLT) == versions[2]


# The gate's record


def test_what_the_gate_found_is_kept(store: Store) -> None:
    first, second = published(store, 2)
    assert store.gate(BOLT, first) is None
    assert not store.passed(BOLT, first)
    store.record_gate(BOLT, first, {"ok": True, "reasons": []})
    store.record_gate(BOLT, second, {"ok": False, "reasons": ["嵌合部品"]})
    assert store.gate(BOLT, first) == {"ok": True, "reasons": []}
    assert store.gate(BOLT, second) == {"ok": False, "reasons": ["嵌合部品"]}
    assert (store.passed(BOLT, first), store.passed(BOLT, second)) == (True, False)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"7", b"null", b"\xff", b"\0" * 20, b'{"ok": true, "limit": NaN}',
        b'{"ok": true, "limit": 1e999}', b'{"ok": true, "groups": ' + b"[" * 100_000,
    ],
    ids=["empty", "cut", "list", "number", "null", "latin", "zeros", "NaN", "infinite", "deep"],
)  # fmt: skip
def test_a_damaged_record_is_none(store: Store, content: bytes) -> None:
    version = publish(store, "a")
    store.record_gate(BOLT, version, {"ok": True})
    (store.gate_folder(BOLT, version) / "gate.json").write_bytes(content)
    assert store.gate(BOLT, version) is None
    assert not store.passed(BOLT, version)


@pytest.mark.parametrize("ok", [None, "yes", 1, "missing"])
def test_only_a_plain_true_is_a_pass(store: Store, ok: Any) -> None:
    version = publish(store, "a")
    store.record_gate(BOLT, version, {} if ok == "missing" else {"ok": ok})
    assert not store.passed(BOLT, version)


def test_a_record_that_json_cannot_hold_leaves_the_old_one(store: Store) -> None:
    version = publish(store, "a")
    store.record_gate(BOLT, version, {"ok": True})
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.record_gate(BOLT, version, {"score": float("nan")})
    assert store.gate(BOLT, version) == {"ok": True}


# Refusing


def test_a_refused_version_is_put_aside_with_its_reason(store: Store) -> None:
    first, second = activated(store, 2)
    files = {path.name for path in store.folder(BOLT, second).iterdir()}
    store.refuse(BOLT, second, "model.onnx is damaged: 嵌合部品")
    assert store.versions(BOLT) == [first]
    assert store.refused(BOLT) == {second: "model.onnx is damaged: 嵌合部品"}
    aside = store.root / BOLT / "refused" / second
    assert {path.name for path in aside.iterdir()} == {*files, "reason.txt"}
    with pytest.raises(UnknownVersion):
        store.activate(BOLT, second)


def test_a_model_whose_only_version_is_refused_is_still_known(store: Store) -> None:
    version = publish(store, "a")
    store.refuse(BOLT, version, "damaged")
    assert store.names() == [BOLT]
    store.must_know(BOLT)
    assert store.versions(BOLT) == []


def test_refusing_again_or_what_is_gone_changes_nothing(store: Store) -> None:
    version = publish(store, "a")
    store.refuse(BOLT, version, "first")
    store.refuse(BOLT, version, "second")
    store.refuse(BOLT, ABSENT, "never there")
    assert store.refused(BOLT) == {version: "first"}


@pytest.mark.parametrize("damage", ["gone", "empty", "not UTF-8"])
def test_a_reason_that_was_lost_is_said(store: Store, damage: str) -> None:
    version = publish(store, "a")
    store.refuse(BOLT, version, "damaged")
    path = store.root / BOLT / "refused" / version / "reason.txt"
    path.unlink()
    if damage != "gone":
        path.write_bytes(b"" if damage == "empty" else b"\xff")
    assert store.refused(BOLT) == {version: "The reason was not kept."}


def test_files_like_those_of_a_refused_version_may_come_again(store: Store) -> None:
    """The stored ones may have been damaged; those that come now may be good."""
    version = publish(store, "a")
    store.refuse(BOLT, version, "damaged")
    again = publish(store, "a")
    assert (again[:4], again[4:]) == ("0002", version[4:])
    store.refuse(BOLT, again, "damaged too")
    assert store.refused(BOLT) == {version: "damaged", again: "damaged too"}


# Pruning


@pytest.mark.parametrize(
    ("keep", "left"),
    [(0, [1, 2, 6]), (1, [1, 2, 6]), (3, [1, 2, 4, 5, 6]), (9, [1, 2, 3, 4, 5, 6])],
)
def test_pruning_leaves_the_live_one_the_one_before_and_the_newest(
    store: Store, keep: int, left: list[int]
) -> None:
    versions = published(store, 6)
    store.activate(BOLT, versions[0])
    store.activate(BOLT, versions[1])
    for version in versions:
        store.record_gate(BOLT, version, {"ok": True})
    gone = store.prune(BOLT, keep)
    assert [int(version[:4]) for version in store.versions(BOLT)] == left
    assert sorted([*gone, *store.versions(BOLT)]) == versions
    gates = (store.root / BOLT / "gates").iterdir()
    assert sorted(path.name for path in gates) == store.versions(BOLT)
    assert store.pointer(BOLT) == Pointer(versions[1], versions[0])
    assert store.prune(BOLT, keep) == []


def test_pruning_leaves_the_trained_version_whose_threshold_was_changed(store: Store) -> None:
    """Also where newer ones were trained and held, so that it is not one of the newest."""
    trained = published(store, 4)
    store.activate(BOLT, trained[0])
    for number in (5, 6, 7):
        store.activate(BOLT, publish(store, f"limit {number}", threshold_of=trained[0]))
    store.prune(BOLT, 2)
    assert [int(version[:4]) for version in store.versions(BOLT)] == [1, 3, 4, 6, 7]


def test_before_a_version_was_live_the_newest_are_kept(store: Store) -> None:
    versions = published(store, 4)
    assert store.prune(BOLT, 2) == versions[:2]
    assert store.versions(BOLT) == versions[2:]


def test_nothing_is_pruned_where_nobody_knows_which_one_is_live(store: Store) -> None:
    versions = activated(store, 4)
    pointer_file(store).unlink()
    assert store.prune(BOLT, 1) == []
    pointer_file(store).write_bytes(b"")
    assert store.prune(BOLT, 1) == []
    assert store.versions(BOLT) == versions


# Discarding


def test_a_discarded_version_is_gone_and_so_is_what_the_gate_found_of_it(store: Store) -> None:
    versions = activated(store, 3)
    store.record_gate(BOLT, versions[0], {"ok": True})
    store.discard(BOLT, versions[0])
    assert store.versions(BOLT) == versions[1:]
    assert not store.gate_folder(BOLT, versions[0]).exists()
    assert not list((store.root / BOLT).glob(".*-*"))
    with pytest.raises(UnknownVersion):
        store.discard(BOLT, versions[0])


def test_neither_the_live_one_nor_the_one_before_is_discarded(store: Store) -> None:
    versions = activated(store, 3)
    for version, why in ((versions[2], "judges"), (versions[1], "a rollback goes to")):
        with pytest.raises(Conflict, match=why):
            store.discard(BOLT, version)
    assert store.versions(BOLT) == versions
    store.roll_back(BOLT)
    with pytest.raises(Conflict, match="a rollback goes to"):
        store.discard(BOLT, versions[2])


@pytest.mark.parametrize("what", ["missing", "damaged", "names one that is gone"])
def test_nothing_is_discarded_where_nobody_knows_which_one_is_live(store: Store, what: str) -> None:
    versions = activated(store, 3)
    if what == "missing":
        pointer_file(store).unlink()
    else:
        pointer_file(store).write_text("x" if what == "damaged" else f"{ABSENT}\n\n")
    for version in versions:
        with pytest.raises(Conflict, match="Nobody knows"):
            store.discard(BOLT, version)
    assert store.versions(BOLT) == versions


def test_before_a_version_was_live_any_may_be_discarded(store: Store) -> None:
    first, second = published(store, 2)
    store.discard(BOLT, first)
    assert store.versions(BOLT) == [second]
    store.discard(BOLT, second)
    assert store.names() == []


def test_the_number_of_a_discarded_version_is_never_given_again(store: Store) -> None:
    """Decisions and the audit trail name versions for years."""
    first, second, third = published(store, 3)
    store.activate(BOLT, first)
    store.discard(BOLT, third)
    assert publish(store, "version 2") == f"0004-{third[5:]}"
    store.discard(BOLT, second)  # an older one does not bring numbers back
    store.discard(BOLT, f"0004-{third[5:]}")
    assert publish(store, "version 2").startswith("0005-")


def test_files_that_a_discarded_version_shares_stay_with_the_others(store: Store) -> None:
    """Its thresholds are versions of their own, whose large files are its files."""
    trained = publish(store, "a")
    store.activate(BOLT, trained)
    changed = [store.publish_again(BOLT, trained, {"threshold_of": trained}) for _ in range(3)]
    for version in changed:
        store.activate(BOLT, version)
    one, other = (store.folder(BOLT, version) / "model.onnx" for version in (trained, changed[0]))
    assert one.stat().st_ino == other.stat().st_ino
    store.discard(BOLT, trained)
    for version in changed:
        store.check(BOLT, version)
    store.prune(BOLT, 5)  # what is left of it counts as before
    assert store.versions(BOLT) == changed


def test_a_disk_that_cannot_be_written_leaves_the_version(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = activated(store, 3)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for step in ("write_atomically", "sync_folder"):
        with monkeypatch.context() as patch:
            patch.setattr(f"engines.store.versions.{step}", full)
            with pytest.raises(OSError, match="space"):
                store.discard(BOLT, versions[0])
        assert store.versions(BOLT) == versions
        store.check(BOLT, versions[0])


def test_pruning_removes_what_a_killed_one_left(store: Store) -> None:
    activated(store, 2)
    hidden = store.root / BOLT / f".{ABSENT}"
    hidden.mkdir()
    (hidden / "model.onnx").write_text("half of i")
    store.gate_folder(BOLT, ABSENT).mkdir()
    store.prune(BOLT, 5)
    assert not hidden.exists()
    assert not store.gate_folder(BOLT, ABSENT).exists()
    assert len(store.versions(BOLT)) == 2


# Staging


def test_a_staging_folder_is_gone_at_the_end(store: Store) -> None:
    with store.staging() as folder:
        (folder / "half").write_text("of a file")
    assert not folder.exists()
    assert store.names() == []


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_staging_folder_is_gone_where_the_work_in_it_fails(
    store: Store, error: type[BaseException]
) -> None:
    with pytest.raises(error), store.staging() as folder:
        raise error
    assert not folder.exists()


@pytest.fixture
def other_process(store: Store) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process with a staging folder."""
    program = (
        "import sys, time; from pathlib import Path; from engines.store.versions import Store\n"
        "with Store(Path(sys.argv[1])).staging() as folder:\n"
        "    (folder / 'model.onnx').write_text('half of i')\n"
        "    print(folder, flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", program, str(store.root)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())
        process.kill()


def test_the_staging_folder_of_a_killed_process_is_swept_and_of_a_living_one_is_not(
    store: Store, other_process: tuple[subprocess.Popen[str], Path]
) -> None:
    process, folder = other_process
    for _ in range(2):
        with store.staging() as mine, store.staging() as another:
            assert mine != another
        assert (folder / "model.onnx").read_text() == "half of i"
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert folder.is_dir()
    publish(store, "a")
    assert not folder.exists()
    assert [path.name for path in (store.root / ".staging").iterdir()] == [".lock"]


def test_a_staging_folder_that_goes_while_another_sweeps_is_no_error(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its owner publishes it, or ends, after it was listed."""
    left = store.root / ".staging" / "tmpgone"
    left.mkdir(parents=True)
    opened = os.open

    def late(path: Any, *more: Any, **how: Any) -> int:
        if path == left:
            left.rmdir()
        return opened(path, *more, **how)

    monkeypatch.setattr(os, "open", late)
    publish(store, "a")
    assert not left.exists()


# Taking in what the commands made


def test_what_convtrt_made_is_taken_in_whole_and_opens(store: Store, kensa_model: Path) -> None:
    version = store.take_in(BOLT, kensa_model, {"folder": "engine"})
    folder = store.check(BOLT, version)
    names = {path.name for path in kensa_model.iterdir()}
    assert {"meta.json", "model.onnx", "memory_bank.npz", "model.pth", "golden.npz"} <= names
    assert {path.name for path in folder.iterdir()} == {*names, MANIFEST}
    for name in names:
        assert (folder / name).read_bytes() == (kensa_model / name).read_bytes()
    assert Bundle.open(folder).memory_bank() is not None
    assert store.manifest(BOLT, version).origin == {"folder": "engine"}
    assert store.take_in(BOLT, kensa_model, {}) == version
    assert store.versions(BOLT) == [version]


def test_what_retrain_made_is_taken_in_without_an_engine(store: Store, trained: Path) -> None:
    folder = store.check(BOLT, store.take_in(BOLT, trained, {}))
    assert {path.name for path in folder.iterdir()} == {
        "meta.json", "model.pth", "memory_bank.npz", "golden.npz", "scores.json", "report.json",
        MANIFEST,
    }  # fmt: skip
    with pytest.raises(BadBundle, match=r"model\.onnx"):
        Bundle.open(folder)


def test_the_meta_json_that_an_engineer_wrote_is_taken_in_alone(
    store: Store, trained: Path
) -> None:
    folder = store.check(BOLT, store.take_in(BOLT, trained.parent / "PatchCore", {}))
    assert {path.name for path in folder.iterdir()} == {"meta.json", MANIFEST}


def test_other_files_are_not_taken_in_and_the_source_stays(store: Store, own_model: Path) -> None:
    for name in ("notes.txt", "model.plan", ".hidden", MANIFEST, "report.json~"):
        (own_model / name).write_text("not part of it")
    (own_model / "engine").mkdir()
    before = snapshot(own_model)
    folder = store.check(BOLT, store.take_in(BOLT, own_model, {}))
    assert not {"notes.txt", "model.plan", ".hidden", "engine", "report.json~"} & {
        path.name for path in folder.iterdir()
    }
    assert snapshot(own_model) == before


@pytest.mark.parametrize("key", ["weights_pth", "memory_bank", "stats"])
def test_a_plan_is_not_taken_in_under_another_part(store: Store, own_model: Path, key: str) -> None:
    """It holds machine code, and Bundle.plan would find it."""
    (own_model / "model.plan").write_text("machine code")
    Meta.read(own_model / "meta.json").with_(files=None, **{key: "model.plan"}).write(
        own_model / "meta.json"
    )
    folder = store.check(BOLT, store.take_in(BOLT, own_model, {}))
    assert not Bundle(folder, Meta.read(folder / "meta.json")).plan.exists()


def test_every_file_that_meta_json_has_a_hash_of_is_taken_in(store: Store, own_model: Path) -> None:
    """Without it the version would not open."""
    (own_model / "more.npz").write_text("of a later Kensa")
    meta = Meta.read(own_model / "meta.json")
    hashes = {**(meta.files or {}), "more.npz": sha256(b"of a later Kensa").hexdigest()}
    meta.with_(files=hashes).write(own_model / "meta.json")
    Bundle.open(store.check(BOLT, store.take_in(BOLT, own_model, {})))


def test_weights_may_be_missing_because_serving_needs_none(store: Store, own_model: Path) -> None:
    (own_model / "model.pth").unlink()
    folder = store.check(BOLT, store.take_in(BOLT, own_model, {}))
    assert Bundle.open(folder).memory_bank() is not None


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.onnx", "gone"),
        ("memory_bank.npz", "gone"),
        ("golden.npz", "gone"),
        ("model.onnx", "a bit"),
        ("model.pth", "a bit"),
        ("golden.npz", "a bit"),
    ],
)
def test_a_damaged_folder_is_not_taken_in(
    store: Store, own_model: Path, name: str, damage: str
) -> None:
    data = bytearray((own_model / name).read_bytes())
    data[len(data) // 2] ^= 1
    (own_model / name).unlink()
    if damage != "gone":
        (own_model / name).write_bytes(data)
    with pytest.raises(BadBundle, match=name):
        store.take_in(BOLT, own_model, {})
    assert store.names() == []


def test_a_folder_without_a_model_is_not_taken_in(store: Store, tmp_path: Path) -> None:
    for source in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(BadMeta, match=r"meta\.json does not exist"):
            store.take_in(BOLT, source, {})
    assert store.names() == []


# A full disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB, with room for 150 files."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=150", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a small file system: needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def room_for(disk: Path, what: str, count: int) -> Iterator[None]:
    """Fill a disk until there is room for no more than `count` pages, or files."""
    filler = disk / "filler"
    filler.mkdir()
    found = os.statvfs(disk)
    if what == "pages":
        (filler / "0").write_bytes(bytes(found.f_bavail * found.f_frsize - count * PAGE))
    else:
        for number in range(found.f_ffree - count):
            (filler / str(number)).touch()
    yield
    shutil.rmtree(filler)


FULL_DISK_CALLS: dict[str, Callable[[Store], object]] = {
    "activate a new one": lambda store: store.activate(BOLT, store.versions(BOLT)[2]),
    "activate an old one": lambda store: store.activate(BOLT, store.versions(BOLT)[0]),
    "roll back": lambda store: store.roll_back(BOLT),
    "record a gate": lambda store: store.record_gate(BOLT, store.versions(BOLT)[2], {"ok": False}),
    "record it again": lambda store: store.record_gate(
        BOLT, store.versions(BOLT)[0], {"ok": False}
    ),
}


@pytest.mark.parametrize("what", ["pages", "files"])
@pytest.mark.parametrize("call", FULL_DISK_CALLS)
def test_a_disk_that_is_full_at_any_step_leaves_everything_as_it_was(
    disk: Path, call: str, what: str
) -> None:
    store = Store(disk / "models")
    first, second, _ = published(store, 3)
    store.record_gate(BOLT, first, {"ok": True})
    store.activate(BOLT, first)
    store.activate(BOLT, second)
    before, failures = state(store), 0
    for count in range(20):
        with room_for(disk, what, count):
            try:
                FULL_DISK_CALLS[call](store)
                break
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                failures += 1
        assert state(store) == before
    assert failures or (call, what) == ("roll back", "files")  # which deletes one before
    assert state(store) != before


@pytest.mark.parametrize("what", ["pages", "files"])
@pytest.mark.parametrize("name", [BOLT, "a-new-one"])
def test_a_disk_that_is_full_while_publishing_leaves_everything_as_it_was(
    disk: Path, name: str, what: str
) -> None:
    store = Store(disk / "models")
    activated(store, 2)
    before, failures = state(store), 0
    for count in range(20):
        with store.staging() as folder:
            (folder / "meta.json").write_text("a")
            with room_for(disk, what, count):
                try:
                    version = store.publish(name, folder, {})
                    break
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    failures += 1
        assert state(store) == before
    assert failures
    assert version in store.versions(name)
    store.check(name, version)
    assert [path.name for path in (store.root / ".staging").iterdir()] == [".lock"]


def test_a_disk_that_is_full_while_a_model_is_copied_leaves_nothing_of_it(
    disk: Path, kensa_model: Path
) -> None:
    store = Store(disk / "models")
    activated(store, 1)
    before = state(store)
    with pytest.raises(OSError, match="No space left"):
        store.take_in(BOLT, kensa_model, {})
    assert state(store) == before
    assert [path.name for path in (store.root / ".staging").iterdir()] == [".lock"]


def test_a_full_disk_can_still_be_pruned(disk: Path) -> None:
    store = Store(disk / "models")
    versions = activated(store, 5)
    with room_for(disk, "pages", 0):
        assert store.prune(BOLT, 1) == versions[:3]
        publish(store, "there is room again")


# Being killed


def killed(store: Store, what: str, *kills: int) -> list[dict[str, Any]]:
    """What a reader finds after each kill, by generations; see killed.py.

    It also sees to it that the next publisher and the next one who prunes mend what is left.
    """
    done = subprocess.run(
        [sys.executable, KILLED, what, store.root, *map(str, kills)],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) >= (kills[0] if kills else 8)
    assert all(one["whole"] for one in found if "whole" in one), "half of a version is listed"
    return found


def pairs(found: list[dict[str, Any]]) -> set[tuple[int, int]]:
    return {(one["live"], one["previous"]) for one in found}


def test_a_publisher_killed_at_any_step_leaves_a_whole_version_or_none(store: Store) -> None:
    found = killed(store, "publish")
    assert {tuple(one["versions"]) for one in found} == {(0, 1, 2, 3, 4), (0, 1, 2, 3, 4, 5)}
    assert pairs(found) == {(1, 0)}
    assert all(one["candidates"] == [1, 0] for one in found)


def test_a_change_of_the_live_version_killed_at_any_step_is_done_or_is_not(store: Store) -> None:
    found = killed(store, "activate")
    assert pairs(found) == {(1, 0), (2, 1)}
    for one in found:
        assert one["versions"] == [0, 1, 2, 3, 4]
        assert one["candidates"][:2] == [one["live"], one["previous"]]
        assert one["live"] in one["without pointer"]


def test_a_rollback_killed_at_any_step_is_done_or_is_not(store: Store) -> None:
    found = killed(store, "roll_back")
    assert pairs(found) == {(1, 0), (0, 1)}
    for one in found:
        assert one["versions"] == [0, 1, 2, 3, 4]
        assert 0 in one["without pointer"]
        if one["live"] == 0:  # the one that was rolled back is served on no account
            assert one["without pointer"] == [0]


def test_a_pruning_killed_at_any_step_takes_only_what_is_old_and_whole(store: Store) -> None:
    found = killed(store, "prune")
    assert pairs(found) == {(1, 0)}
    left = {tuple(one["versions"]) for one in found}
    assert left == {(0, 1, 2, 3, 4), (0, 1, 3, 4), (0, 1, 4)}


def test_a_discarding_killed_at_any_step_is_done_or_is_not(store: Store) -> None:
    found = killed(store, "discard")
    assert pairs(found) == {(1, 0)}
    assert {tuple(one["versions"]) for one in found} == {(0, 1, 2, 3, 4), (0, 1, 2, 3)}


def check_random_kills(store: Store, what: str, kills: int) -> None:
    for one in killed(store, what, kills):
        assert one["live"] in one["versions"]
        assert one["previous"] in one["versions"]
        assert one["candidates"][0] == one["live"]
        assert {0, 1} <= set(one["versions"])
        assert one["without pointer"]


@pytest.mark.parametrize("what", ["publish", "activate", "roll_back", "prune", "discard"])
def test_a_process_killed_at_any_moment_leaves_a_store_that_works(store: Store, what: str) -> None:
    check_random_kills(store, what, 10)


@pytest.mark.soak
@pytest.mark.parametrize("what", ["publish", "activate", "roll_back", "prune", "discard"])
def test_a_process_killed_at_hundreds_of_moments_leaves_a_store_that_works(
    store: Store, what: str
) -> None:
    check_random_kills(store, what, 300)


def check_many_at_once(store: Store, kills: int) -> None:
    """Killed one after the other while they publish, change what is live, and prune."""
    *during, end = killed(store, "together", kills)
    assert len(during) == kills
    assert len({one["live"] for one in during}) > 1
    assert end["published"] == end["numbers"] > kills // 10  # no number was given twice
    assert end["live"] in end["versions"]


def test_processes_killed_while_others_change_the_same_model_leave_a_store_that_works(
    store: Store,
) -> None:
    check_many_at_once(store, 40)


@pytest.mark.soak
def test_hundreds_of_processes_killed_while_others_change_the_model_leave_a_store_that_works(
    store: Store,
) -> None:
    check_many_at_once(store, 600)
