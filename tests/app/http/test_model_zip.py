"""Of a zip the files of one model are taken, and nothing else happens."""

from __future__ import annotations

import errno
import json
import random
import stat
import struct
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.http.model_zip import MAX_ENTRIES, MAX_META, unpack_model
from engines.errors import BadBundle, BadMeta, BadRequest, KensaError, UploadTooLarge
from engines.store.bundle import Bundle
from engines.store.versions import Store
from support.project import PATCHCORE

MB = 1 << 20
PLENTY = 1 << 40
META = json.dumps(PATCHCORE)
MODEL = {"meta.json": META, "model.onnx": "graph " * 5000, "memory_bank.npz": "bank " * 5000,
         "model.pth": "weights", "golden.npz": "images", "report.json": "{}",
         "scores.json": "{}"}  # fmt: skip

Files = dict[str, Any]  # name -> content


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a zip is unpacked; around it nothing may change."""
    folder = tmp_path / "staging" / "tmp1"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def zipped(tmp_path: Path) -> Path:
    return tmp_path / "model.zip"


def write(path: Path, files: Files, compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def found_in(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def around(folder: Path) -> set[Path]:
    """Every path of the test but those in the folder itself."""
    return {path for path in folder.parents[1].rglob("*") if folder not in path.parents}


def refusal(path: Path, folder: Path, kind: type[KensaError], most: int = PLENTY) -> str:
    """What is said to a zip that is refused; nothing outside the folder was touched."""
    before = around(folder)
    with pytest.raises(kind) as caught:
        unpack_model(path, folder, most)
    assert type(caught.value) is kind
    assert around(folder) == before
    assert str(folder) not in str(caught.value)  # which says nothing to who sent the zip
    return str(caught.value)


# A model


@pytest.mark.parametrize("inside", ["", "bracket/", "a/b/c/", "./", "嵌合部品/", "/", "/bracket/"])
def test_a_model_is_taken_wherever_it_lies_in_the_zip(
    zipped: Path, folder: Path, inside: str
) -> None:
    write(zipped, {f"{inside}{name}": content for name, content in MODEL.items()})
    unpack_model(zipped, folder, PLENTY)
    assert found_in(folder) == MODEL


@pytest.mark.parametrize("inside", ["", "engine/"])
def test_a_real_model_is_taken_whole_and_opens(
    zipped: Path, folder: Path, inside: str, kensa_model: Path, tmp_path: Path
) -> None:
    files = {path.name: path.read_bytes() for path in kensa_model.iterdir()}
    write(zipped, {f"{inside}{name}": content for name, content in files.items()})
    unpack_model(zipped, folder, PLENTY)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    Bundle.open(folder)
    store = Store(tmp_path / "models")
    Bundle.open(store.check("bolt", store.take_in("bolt", folder, {})))


def test_what_retrain_made_is_taken_without_an_engine(
    zipped: Path, folder: Path, trained: Path
) -> None:
    files = {path.name: path.read_bytes() for path in trained.iterdir()}
    log = files.pop("retrain.log")
    write(zipped, {**files, "retrain.log": log}, zipfile.ZIP_STORED)
    unpack_model(zipped, folder, PLENTY)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


def test_files_under_the_names_that_meta_json_gives_them_are_taken(
    zipped: Path, folder: Path
) -> None:
    meta = json.dumps({**PATCHCORE, "weights_pth": "重み.pth", "memory_bank": "bank.npz"})
    named = {"meta.json": meta, "重み.pth": "weights", "bank.npz": "bank"}
    write(zipped, {**named, "model.pth": "not that", "memory_bank.npz": "nor that"})
    unpack_model(zipped, folder, PLENTY)
    assert found_in(folder) == named


def test_a_byte_order_mark_of_windows_does_no_harm(zipped: Path, folder: Path) -> None:
    write(zipped, {**MODEL, "meta.json": b"\xef\xbb\xbf" + META.encode()})
    unpack_model(zipped, folder, PLENTY)
    assert set(found_in(folder)) == set(MODEL)


def test_whatever_else_is_in_the_zip_is_left(zipped: Path, folder: Path) -> None:
    more = ("notes.txt", "engine/model.onnx", "old/model.onnx", "engine/sub/model.pth",
            "__MACOSX/engine/._meta.json", "engine/.DS_Store", "engine/meta.json.bak",
            "engine/manifest.json", "engine/live", "engine/stats.npz")  # fmt: skip
    write(zipped, {"engine/meta.json": META, **dict.fromkeys(more, "other"), "engine/sub/": ""})
    unpack_model(zipped, folder, PLENTY)
    assert found_in(folder) == {"meta.json": META, "model.onnx": "other"}


@pytest.mark.parametrize("key", ["weights_pth", "memory_bank", "stats"])
def test_a_plan_is_left_whatever_meta_json_calls_it(zipped: Path, folder: Path, key: str) -> None:
    """It is machine code."""
    meta = json.dumps({**PATCHCORE, key: "model.plan"})
    write(zipped, {**MODEL, "meta.json": meta, "model.plan": "machine code"})
    unpack_model(zipped, folder, PLENTY)
    assert "model.plan" not in found_in(folder)
    assert found_in(folder)["model.onnx"] == MODEL["model.onnx"]


def test_folders_that_are_named_like_files_are_no_files(zipped: Path, folder: Path) -> None:
    write(zipped, {**MODEL, "meta.json/": "", "old/meta.json/": "", "stats.npz/": ""})
    unpack_model(zipped, folder, PLENTY)
    assert found_in(folder) == MODEL


# meta.json


def test_a_zip_without_meta_json_is_no_model(zipped: Path, folder: Path) -> None:
    for files in ({}, {"model.onnx": "graph"}, {"Meta.json": META}, {"meta.json/": ""}):
        assert "has no meta.json" in refusal(write(zipped, files), folder, BadBundle)


def test_a_zip_with_two_models_is_refused(zipped: Path, folder: Path) -> None:
    write(zipped, {"a/meta.json": META, "b/meta.json": META})
    assert "has 2 meta.json; it must have one" in refusal(zipped, folder, BadBundle)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_zip_with_the_same_meta_json_twice_is_refused(zipped: Path, folder: Path) -> None:
    with zipfile.ZipFile(zipped, "w") as archive:
        for threshold in (0.1, 0.9):
            archive.writestr("meta.json", json.dumps({**PATCHCORE, "image_threshold": threshold}))
    assert "has 2 meta.json" in refusal(zipped, folder, BadBundle)


@pytest.mark.parametrize(
    "content",
    ["", "{", "meta", b"\xff\xfe", b"\0" * 9, "[" * 100_000, "1" * 10_000, "{" * 9, '{"a":}'],
    ids=["empty", "half", "a word", "not UTF-8", "zeros", "deep", "a long number", "braces", "gap"],
)
def test_a_meta_json_that_is_no_json_is_refused(
    zipped: Path, folder: Path, content: str | bytes
) -> None:
    write(zipped, {**MODEL, "meta.json": content})
    assert refusal(zipped, folder, BadMeta).startswith("meta.json in the zip is not JSON: ")


@pytest.mark.parametrize("content", ["[]", "null", "7", '"meta"', "{}", '{"model": "resnet"}'])
def test_a_meta_json_that_describes_no_model_is_refused(
    zipped: Path, folder: Path, content: str
) -> None:
    write(zipped, {**MODEL, "meta.json": content})
    assert "meta.json in the zip is not a valid meta.json" in refusal(zipped, folder, BadMeta)


@pytest.mark.parametrize("key", ["weights_pth", "memory_bank", "stats"])
@pytest.mark.parametrize(
    "value",
    [
        "../x",
        "../../x",
        "/etc/passwd",
        "..",
        ".",
        "",
        "a/b",
        "a\\b",
        "..\\x",
        "a\0b",
        5,
        True,
        ["a"],
    ],
)
def test_a_name_in_meta_json_that_is_no_plain_file_name_is_refused(
    zipped: Path, folder: Path, key: str, value: Any
) -> None:
    meta = json.dumps({**PATCHCORE, key: value})
    write(zipped, {"a/b/meta.json": meta, f"a/b/{value}": "out", "a/x": "out", "x": "out"})
    assert key in refusal(zipped, folder, BadMeta)
    assert set(found_in(folder)) == {"meta.json"}


def test_a_meta_json_that_is_absurdly_long_is_not_read(zipped: Path, folder: Path) -> None:
    write(zipped, {**MODEL, "meta.json": META + " " * MAX_META})
    assert "meta.json in the zip has 1,0" in refusal(zipped, folder, BadBundle)
    assert found_in(folder) == {}


# Names and links


def test_no_name_in_a_zip_leads_out_of_the_folder(zipped: Path, folder: Path) -> None:
    tricks = ["../model.onnx", "../../model.onnx", "/model.onnx", "/tmp/model.onnx", "a/../../x",
              "..", "../..", "C:\\model.onnx", "..\\model.onnx", "\\model.onnx"]  # fmt: skip
    write(zipped, {"meta.json": META, **dict.fromkeys(tricks, "out")})
    before = around(folder)
    unpack_model(zipped, folder, PLENTY)
    assert found_in(folder) == {"meta.json": META}
    assert around(folder) == before


@pytest.mark.parametrize("inside", ["..", "../..", "/etc", "/"])
def test_a_model_below_a_name_that_leads_out_is_unpacked_in_the_folder(
    zipped: Path, folder: Path, inside: str
) -> None:
    write(zipped, {f"{inside}/{name}": content for name, content in MODEL.items()})
    before = around(folder)
    unpack_model(zipped, folder, PLENTY)
    assert found_in(folder) == MODEL
    assert around(folder) == before


def test_a_link_in_a_zip_becomes_a_file_with_its_text(
    zipped: Path, folder: Path, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("meta.json", META)
        for name in ("model.onnx", "model.pth"):
            link = zipfile.ZipInfo(name)
            link.create_system = 3  # Unix
            link.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(link, str(secret))
    unpack_model(zipped, folder, PLENTY)
    assert not any(path.is_symlink() for path in folder.iterdir())
    assert found_in(folder)["model.onnx"] == str(secret)
    assert secret.read_text() == "secret"


# Too much


@pytest.fixture(scope="module")
def bomb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zip of 1 MB that unpacks to 1 GB of zeros."""
    path = tmp_path_factory.mktemp("bomb") / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("meta.json", META)
        with archive.open("model.onnx", "w") as file:
            for _ in range(1024):
                file.write(bytes(MB))
    assert path.stat().st_size < 8 * MB
    return path


@pytest.mark.parametrize("most", [len(META), MB - 1, 8 * MB])
def test_a_bomb_is_stopped_at_the_limit(bomb: Path, folder: Path, most: int) -> None:
    assert "KENSA_MAX_UPLOAD_BYTES" in refusal(bomb, folder, UploadTooLarge, most)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= most


def test_the_limit_is_for_all_files_together(zipped: Path, folder: Path) -> None:
    write(zipped, MODEL)
    size = sum(map(len, MODEL.values()))
    refusal(zipped, folder, UploadTooLarge, size - 1)
    refusal(zipped, folder, UploadTooLarge, len(META) - 1)
    unpack_model(zipped, folder, size)
    assert found_in(folder) == MODEL


def test_a_file_that_is_larger_than_it_says_is_not_unpacked(bomb: Path, folder: Path) -> None:
    """Its size stands in the zip's list: 1 KB, says this one."""
    data = bytearray(bomb.read_bytes())
    told = data.rindex(struct.pack("<L", 1024 * MB))
    data[told : told + 4] = struct.pack("<L", 1024)
    path = folder.parents[1] / "liar.zip"
    path.write_bytes(data)
    assert "cannot be read" in refusal(path, folder, BadRequest)
    assert sum(file.stat().st_size for file in folder.iterdir()) < MB


def test_a_zip_of_very_many_files_is_refused(zipped: Path, folder: Path) -> None:
    write(zipped, {**MODEL, **{f"{number}": "" for number in range(MAX_ENTRIES)}})
    assert "1,007 files" in refusal(zipped, folder, BadRequest)


def test_a_list_of_files_that_would_fill_the_memory_is_not_read(zipped: Path, folder: Path) -> None:
    """zipfile would read it in one piece, and make an object of each entry."""
    write(zipped, {f"{'a' * 1000}{number}": "" for number in range(30_000)})
    tracemalloc.start()
    try:
        assert "lists too many files" in refusal(zipped, folder, BadRequest)
        assert tracemalloc.get_traced_memory()[1] < 2 * MB
    finally:
        tracemalloc.stop()


# No zip, or a damaged one


@pytest.mark.parametrize(
    "content", [b"", b"PK\3\4", b"no zip", bytes(1000), b"PK\5\6", b"\x1f\x8b"]
)
def test_what_is_no_zip_is_refused(zipped: Path, folder: Path, content: bytes) -> None:
    zipped.write_bytes(content)
    assert "The zip cannot be read" in refusal(zipped, folder, BadRequest)


def encrypted(path: Path) -> Path:
    """Every entry says that it needs a password."""
    data = bytearray(write(path, MODEL, zipfile.ZIP_STORED).read_bytes())
    for signature, offset in ((b"PK\1\2", 8), (b"PK\3\4", 6)):
        at = data.find(signature)
        while at >= 0:
            data[at + offset] |= 1
            at = data.find(signature, at + 4)
    path.write_bytes(data)
    return path


def test_an_encrypted_zip_is_refused(zipped: Path, folder: Path) -> None:
    assert "encrypted" in refusal(encrypted(zipped), folder, BadRequest)


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compression_that_cannot_be_unpacked_in_pieces_is_refused(
    zipped: Path, folder: Path, compression: int
) -> None:
    write(zipped, MODEL, compression)
    assert "use Deflate" in refusal(zipped, folder, BadRequest)


def test_a_zip_cut_anywhere_is_refused(zipped: Path, folder: Path) -> None:
    whole = write(zipped, MODEL).read_bytes()
    for length in range(0, len(whole), 13):
        zipped.write_bytes(whole[:length])
        refusal(zipped, folder, BadRequest)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_damaged_in_the_middle_of_a_file_is_refused(
    zipped: Path, folder: Path, compression: int
) -> None:
    data = bytearray(write(zipped, MODEL, compression).read_bytes())
    with zipfile.ZipFile(zipped) as archive:
        entry = archive.getinfo("model.onnx")
    data[entry.header_offset + 30 + len("model.onnx") + entry.compress_size // 2] ^= 0x10
    zipped.write_bytes(data)
    assert "The zip cannot be read" in refusal(zipped, folder, BadRequest)


def damaged(whole: bytes, count: int) -> Iterator[bytes]:
    """A few bytes changed, most of them where the zip describes itself."""
    chance = random.Random(0)
    headers = [at for at in range(len(whole)) if whole[at : at + 2] == b"PK"]
    for number in range(count):
        data = bytearray(whole)
        for _ in range(chance.randrange(1, 4)):
            at = chance.randrange(len(data)) if number % 3 == 0 else chance.choice(headers)
            at = min(at + chance.randrange(46), len(data) - 1)
            data[at] = chance.choice([0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)])
        yield bytes(data)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_zip_is_refused_or_what_is_taken_is_right(
    zipped: Path, folder: Path, compression: int
) -> None:
    """And no other error leaves."""
    whole = write(zipped, MODEL, compression).read_bytes()
    before, refused = around(folder), 0
    for data in damaged(whole, 1000):
        for path in folder.iterdir():
            path.unlink()
        zipped.write_bytes(data)
        try:
            unpack_model(zipped, folder, PLENTY)
        except (BadRequest, BadBundle):
            refused += 1
            continue
        assert found_in(folder).items() <= MODEL.items()
    assert refused > 300
    assert around(folder) == before


def test_a_file_without_a_name_is_left(zipped: Path, folder: Path) -> None:
    data = write(zipped, {**MODEL, "nameless": "other"}).read_bytes()
    zipped.write_bytes(data.replace(b"nameless", b"\0ameless"))  # it ends at the zero
    unpack_model(zipped, folder, PLENTY)
    assert found_in(folder) == MODEL


# A full disk


@pytest.mark.parametrize("name", ["meta.json", "model.onnx", "model.pth"])
def test_a_full_disk_is_not_blamed_on_the_zip(zipped: Path, folder: Path, name: str) -> None:
    write(zipped, MODEL)
    (folder / name).symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught:
        unpack_model(zipped, folder, PLENTY)
    assert caught.value.errno == errno.ENOSPC
