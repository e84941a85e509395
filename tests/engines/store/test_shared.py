"""Claims about the shared store: what arrives is what was sent, or it is refused by name."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from engines.errors import BadSettings, BadShared, NoShared
from engines.queue.fleet import Fleet
from engines.store.shared import MARK, Shared

PLACE = "line/inputs"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    (folder / "train" / "検査").mkdir(parents=True)
    (folder / "train" / "検査" / "部品 1.png").write_bytes(os.urandom(5000))
    (folder / "train" / "検査" / "部品 2.png").write_bytes(os.urandom(3000))
    (folder / "model.pth").write_bytes(os.urandom(2_000_000))
    (folder / "empty").write_bytes(b"")
    return folder


@pytest.fixture
def shared(tmp_path: Path) -> Shared:
    return Shared.open(str(tmp_path / "shared"))


def files(folder: Path) -> dict[str, Path]:
    return {
        path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in files(folder).items()}


def objects(tmp_path: Path) -> dict[str, Path]:
    return {path.name: path for path in (tmp_path / "shared" / PLACE).iterdir()}


def of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_what_arrives_is_what_was_sent(shared: Shared, source: Path, tmp_path: Path) -> None:
    digest = shared.push(PLACE, files(source))
    target = tmp_path / "target"
    target.mkdir()
    (target / "of before").write_bytes(b"x")
    shared.pull(PLACE, digest, target)
    assert contents(target) == contents(source)


def test_only_what_is_new_travels(shared: Shared, source: Path, tmp_path: Path) -> None:
    digest, target = shared.push(PLACE, files(source)), tmp_path / "target"
    shared.pull(PLACE, digest, target)
    sent = {name: path.stat().st_mtime_ns for name, path in objects(tmp_path).items()}
    arrived = (target / "model.pth").stat().st_mtime_ns
    (source / "new.png").write_bytes(b"new")
    again = shared.push(PLACE, files(source))
    shared.pull(PLACE, again, target)
    assert contents(target) == contents(source)
    now = {name: path.stat().st_mtime_ns for name, path in objects(tmp_path).items()}
    assert len(now) == len(sent) + 2, "the new image and the new list"
    assert sent.items() <= now.items()
    assert (target / "model.pth").stat().st_mtime_ns == arrived


def test_a_damaged_object_is_refused_by_name_and_can_be_sent_again(
    shared: Shared, source: Path, tmp_path: Path
) -> None:
    digest = shared.push(PLACE, files(source))
    path = objects(tmp_path)[of(source / "model.pth")]
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadShared, match=r"^model\.pth in the shared store is damaged"):
        shared.pull(PLACE, digest, tmp_path / "target")
    assert not (tmp_path / "target" / "model.pth").exists()
    assert shared.push(PLACE, files(source)) == digest
    shared.pull(PLACE, digest, tmp_path / "target")
    assert contents(tmp_path / "target") == contents(source)


def test_a_damaged_list_is_refused(shared: Shared, source: Path, tmp_path: Path) -> None:
    digest = shared.push(PLACE, files(source))
    objects(tmp_path)[digest].write_text('{"files": {"../../etc/passwd": "%s"}}' % ("0" * 64))
    with pytest.raises(BadShared, match="a list of files in the shared store is damaged"):
        shared.pull(PLACE, digest, tmp_path / "target")


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "a//b", "a\\b", ".", "", "a/./b"])
def test_no_name_leads_out_of_a_folder(
    name: str, shared: Shared, source: Path, tmp_path: Path
) -> None:
    """Even where whoever wrote the list also wrote its hash into the queue."""
    shared.push(PLACE, files(source))
    content = json.dumps({"files": {name: of(source / "empty")}}).encode()
    digest = hashlib.sha256(content).hexdigest()
    shared.write(f"{PLACE}/{digest}", content)
    with pytest.raises(BadShared, match="it is refused"):
        shared.pull(PLACE, digest, tmp_path / "target")


@pytest.mark.parametrize("place", ["../x", "/x", "a/../../x", "a//b", ".", ""])
def test_no_place_leads_out_of_the_store(place: str, shared: Shared) -> None:
    for call in (shared.read, shared.names, shared.sweep):
        with pytest.raises(BadShared, match="is no place in the shared store"):
            call(place)


def test_a_missing_object_is_named_and_an_unmounted_store_is_waited_for(
    shared: Shared, source: Path, tmp_path: Path
) -> None:
    digest = shared.push(PLACE, files(source))
    objects(tmp_path)[of(source / "model.pth")].unlink()
    with pytest.raises(BadShared, match=r"model\.pth .* is missing in the shared store"):
        shared.pull(PLACE, digest, tmp_path / "target")
    (tmp_path / "shared").rename(tmp_path / "elsewhere")
    with pytest.raises(NoShared, match=f"has no {MARK}: is it mounted"):
        shared.pull(PLACE, digest, tmp_path / "target")
    (tmp_path / "elsewhere").rename(tmp_path / "shared")


def test_what_is_cut_off_is_no_object_and_is_sent_again(
    shared: Shared, source: Path, tmp_path: Path
) -> None:
    digest = shared.push(PLACE, files(source))
    path = objects(tmp_path)[of(source / "model.pth")]
    os.truncate(path, 1000)
    assert shared.push(PLACE, files(source)) == digest
    shared.pull(PLACE, digest, tmp_path / "target")
    assert contents(tmp_path / "target") == contents(source)


def test_a_sweep_leaves_what_is_needed(shared: Shared, source: Path, tmp_path: Path) -> None:
    first = shared.push(PLACE, files(source))
    (source / "model.pth").write_bytes(b"another")
    second = shared.push(PLACE, files(source))
    (tmp_path / "shared" / PLACE / ".killed.1234").write_bytes(b"half")
    shared.sweep(PLACE, keep=[second])
    assert len(objects(tmp_path)) == len(files(source)) + 1
    shared.pull(PLACE, second, tmp_path / "target")
    with pytest.raises(BadShared, match="missing"):
        shared.pull(PLACE, first, tmp_path / "target")
    shared.sweep("line")
    assert shared.names("line") == []
    shared.sweep("line")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
def test_a_full_store_says_so_and_loses_nothing(source: Path, tmp_path: Path) -> None:
    where = tmp_path / "small"
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(where)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        shared = Shared.open(str(where))
        with pytest.raises(NoShared, match="The shared store is full: free some space there"):
            shared.push(PLACE, files(source))
        assert not [name for name in shared.names(PLACE) if name == of(source / "model.pth")]
        (source / "model.pth").write_bytes(b"small")
        digest = shared.push(PLACE, files(source))
        shared.pull(PLACE, digest, tmp_path / "target")
    finally:
        subprocess.run(["umount", "--lazy", str(where)], check=True)


def test_a_file_that_changes_while_it_is_sent_is_not_taken_for_the_one_before(
    shared: Shared, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Shared._put

    def put(self: Shared, path: Path, where: str) -> None:
        before(self, path, where)
        (source / "model.pth").write_bytes(b"changed")

    monkeypatch.setattr(Shared, "_put", put)
    with pytest.raises(NoShared, match=r"model\.pth was changed while it was sent"):
        shared.push(PLACE, {"model.pth": source / "model.pth"})


def test_what_a_file_system_raises_is_a_sentence(shared: Shared, tmp_path: Path) -> None:
    (tmp_path / "shared").write_text("a file where the folder should be")
    with pytest.raises(NoShared, match=r"cannot be used now: File exists \(.*/shared"):
        shared.push(PLACE, {})


# Another file system


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A bucket in moto's server, spoken to by s3fs."""
    if not (importlib.util.find_spec("moto") and importlib.util.find_spec("s3fs")):
        pytest.skip("needs moto[server] and s3fs")
    server = subprocess.Popen(
        [sys.executable, "-c", "from moto.server import ThreadedMotoServer as S; import time\n"
         "s = S('127.0.0.1', 0); s.start(); print(s.get_host_and_port()[1], flush=True)\n"
         "time.sleep(3600)"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert server.stdout is not None
    server.stdout.readline()  # it greets
    url = f"http://127.0.0.1:{int(server.stdout.readline())}"
    names = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_ENDPOINT_URL": url,
             "AWS_DEFAULT_REGION": "us-east-1"}  # fmt: skip
    os.environ.update(names)
    urllib.request.urlopen(urllib.request.Request(f"{url}/kensa", method="PUT"))
    yield "s3://kensa/store"
    server.kill()
    server.wait()
    for name in names:
        del os.environ[name]


@pytest.fixture(params=["memory", "s3"])
def elsewhere(request: Any) -> str:
    """A store that is no folder."""
    if request.param == "s3":
        return str(request.getfixturevalue("s3"))
    return "memory://kensa"


def test_another_file_system_than_a_folder_does_as_well(
    elsewhere: str, source: Path, tmp_path: Path
) -> None:
    shared, place, target = Shared.open(elsewhere), f"line/{time.time_ns()}", tmp_path / "target"
    assert shared.names(place) == []
    assert shared.read(f"{place}/1") is None
    digest = shared.push(place, files(source))
    shared.pull(place, digest, target)
    assert contents(target) == contents(source)
    (source / "new.png").write_bytes(b"new")
    again = shared.push(place, files(source))
    Shared.open(elsewhere).pull(place, again, target)
    assert contents(target) == contents(source)
    shared.write(f"{place}.news/1", b"news")
    assert (shared.names(f"{place}.news"), shared.read(f"{place}.news/1")) == (["1"], b"news")
    fs, root = fsspec.core.url_to_fs(elsewhere)
    fs.pipe_file(f"{root}/{place}/{of(source / 'model.pth')}", b"damaged")
    with pytest.raises(BadShared, match=r"^model\.pth in the shared store is damaged"):
        shared.pull(place, again, tmp_path / "other")
    assert shared.push(place, files(source)) == again
    shared.sweep(place, keep=[again])
    shared.pull(place, again, tmp_path / "other")
    shared.sweep(place)
    assert shared.names(place) == []


# Settings


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"KENSA_SHARED_URL": ""}, "KENSA_QUEUE_URL is set without KENSA_SHARED_URL"),
        ({"KENSA_SHARED_URL": "nope://secret@x"}, "begins with nope, which fsspec does not know"),
        ({"KENSA_SHARED_URL": "shared"}, "it takes the whole path of a folder"),
        ({"KENSA_SHARED_URL": "gdrive://x"}, "KENSA_SHARED_URL begins with gdrive: "),
        ({"KENSA_QUEUE_URL": "mysql://kensa:secret@host/kensa"}, "is no PostgreSQL URL"),
        ({"KENSA_QUEUE_URL": "postgresql://kensa:secret@host"}, "is no PostgreSQL URL"),
        ({"KENSA_QUEUE_URL": "secret"}, "is no PostgreSQL URL"),
        ({"KENSA_DEVICE": "line 1"}, "KENSA_DEVICE is 'line 1'"),
        ({"KENSA_QUEUE_URL": "", "KENSA_WORKER": "convert"}, "it needs KENSA_QUEUE_URL"),
    ],
)
def test_a_fleet_that_is_set_up_wrongly_is_refused_without_a_password(
    variables: dict[str, str], says: str
) -> None:
    good = {"KENSA_QUEUE_URL": "postgresql://kensa:secret@host/kensa", "KENSA_SHARED_URL": "/x"}
    with pytest.raises(BadSettings) as refused:
        Fleet.read({**good, **variables})
    assert says in str(refused.value)
    assert "secret" not in str(refused.value)


def test_a_password_is_never_shown() -> None:
    fleet = Fleet.of("postgresql://kensa:se%40cret@host/kensa", "/x", "line", "on")
    assert fleet is not None
    assert "se@cret" in fleet.database_url or "se%40cret" in fleet.database_url
    assert "cret" not in repr(fleet)
    assert fleet.shown(ValueError("no se@cret")) == "no ***"


def test_a_url_may_say_more_and_keeps_what_it_says() -> None:
    fleet = Fleet.of("postgresql://kensa@host/kensa?sslmode=verify-full&connect_timeout=9", "/x",
                     None, "on")  # fmt: skip
    assert fleet is not None
    assert "sslmode=verify-full" in fleet.database_url
    assert "connect_timeout=9" in fleet.database_url
    assert fleet.device
