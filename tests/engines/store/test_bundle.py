"""Bundles and files: nothing damaged, mixed or foreign is opened."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.errors import BadBundle, BadMeta, Unreadable
from engines.files import staged, write_atomically
from engines.meta import Meta
from engines.store.bundle import Bundle, read_bank, read_coverage_radius, write_bank
from support.project import ROOT

ROWS = np.random.default_rng(0).standard_normal((20, 8))


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(BadBundle) as caught:
        read_bank(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def flip_a_byte(path: Path, where: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 1
    path.write_bytes(data)


def without_hashes(root: Path) -> None:
    """Make a bundle look as older tools left it."""
    meta = json.loads((root / "meta.json").read_text())
    for key in ("files", "model", "format", "score_kind", "calibration", "bit_depth"):
        meta.pop(key, None)
    (root / "meta.json").write_text(json.dumps(meta))


# Hashes


def test_what_convtrt_leaves_opens(kensa_model: Path) -> None:
    bundle = Bundle.open(kensa_model)
    bank = bundle.memory_bank()
    assert bank is not None
    assert bank.dtype == np.float32
    assert bundle.report()["parity"]["openvino_f32"]["ok"] is True


@pytest.mark.parametrize("where", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("name", ["model.onnx", "memory_bank.npz"])
def test_one_flipped_bit_is_refused_by_file_name(name: str, where: float, own_model: Path) -> None:
    flip_a_byte(own_model / name, where)
    with pytest.raises(BadBundle, match=rf"{name} is not the file that was written"):
        Bundle.open(own_model)


@pytest.mark.parametrize("name", ["model.onnx", "memory_bank.npz", "golden.npz"])
def test_a_missing_file_is_refused_by_name(name: str, own_model: Path) -> None:
    (own_model / name).unlink()
    with pytest.raises(BadBundle, match=rf"{name} does not exist"):
        Bundle.open(own_model)


def test_a_missing_meta_json_is_refused_by_name(own_model: Path) -> None:
    (own_model / "meta.json").unlink()
    with pytest.raises(BadMeta, match=r"meta\.json does not exist"):
        Bundle.open(own_model)


def test_a_bundle_without_hashes_opens_as_older_tools_left_it(own_model: Path) -> None:
    without_hashes(own_model)
    bundle = Bundle.open(own_model)
    assert bundle.meta.files is None
    assert bundle.memory_bank() is not None


def test_a_bundle_without_hashes_still_needs_its_graph(own_model: Path) -> None:
    without_hashes(own_model)
    (own_model / "model.onnx").unlink()
    with pytest.raises(BadBundle, match=r"model\.onnx does not exist: make it with convtrt\.py"):
        Bundle.open(own_model)


def test_a_bundle_without_a_report_opens(own_model: Path) -> None:
    without_hashes(own_model)
    (own_model / "report.json").unlink()
    assert Bundle.open(own_model).report() == {}


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "\0", "[" * 100_000, '{"a": ' + "1" * 5000 + "}"],
    ids=["empty", "cut", "a list", "nul", "deep", "long"],
)
def test_a_damaged_report_is_refused_by_name(text: str, own_model: Path) -> None:
    without_hashes(own_model)
    (own_model / "report.json").write_text(text)
    with pytest.raises(BadBundle, match=r"report\.json"):
        Bundle.open(own_model).report()


@pytest.mark.parametrize("name", ["model.onnx", "memory_bank.npz"])
def test_hashes_that_leave_out_what_is_served_are_refused(name: str, own_model: Path) -> None:
    """So is a graph of yesterday beside the meta.json of today's training in the same folder."""
    meta = Meta.read(own_model / "meta.json")
    assert meta.files is not None
    rest = {key: value for key, value in meta.files.items() if key != name}
    meta.with_(files=rest).write(own_model / "meta.json")
    with pytest.raises(BadBundle, match=rf"{name}.*convtrt\.py"):
        Bundle.open(own_model)


def test_every_file_that_convtrt_leaves_is_hashed(kensa_model: Path) -> None:
    """report.json too: it decides whether bf16 is allowed."""
    files = {path.name for path in kensa_model.iterdir()} - {"meta.json"}
    assert set(Meta.read(kensa_model / "meta.json").files or {}) == files


# Memory banks


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
def test_a_bank_of_any_float_becomes_float32(dtype: str, tmp_path: Path) -> None:
    bank = read_bank(npz(tmp_path / "bank.npz", embeddings=ROWS.astype(dtype)))
    assert bank.dtype == np.float32
    assert bank.flags.c_contiguous
    np.testing.assert_array_equal(bank, ROWS.astype(dtype).astype(np.float32))


def test_a_bank_in_fortran_order_becomes_contiguous(tmp_path: Path) -> None:
    bank = read_bank(npz(tmp_path / "bank.npz", embeddings=np.asfortranarray(ROWS)))
    assert bank.flags.c_contiguous
    np.testing.assert_array_equal(bank, ROWS.astype(np.float32))


def test_a_bank_that_was_written_reads_back_exactly(tmp_path: Path) -> None:
    rows = ROWS.astype(np.float32)
    write_bank(tmp_path / "bank.npz", rows, 0.25)
    np.testing.assert_array_equal(read_bank(tmp_path / "bank.npz"), rows)
    assert read_coverage_radius(tmp_path / "bank.npz") == 0.25
    assert [path.name for path in tmp_path.iterdir()] == ["bank.npz"]


def test_a_bank_of_another_maker_has_no_coverage_radius(tmp_path: Path) -> None:
    assert read_coverage_radius(npz(tmp_path / "bank.npz", embeddings=ROWS)) is None


@pytest.mark.parametrize("radius", [np.zeros(3), np.array("far"), np.float32("inf"), -1.0])
def test_a_coverage_radius_that_is_no_number_is_refused(radius: Any, tmp_path: Path) -> None:
    path = npz(tmp_path / "bank.npz", embeddings=ROWS, coverage_radius=radius)
    with pytest.raises(BadBundle, match="coverage_radius"):
        read_coverage_radius(path)


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EMFILE, "Too many open files")])
def test_a_bank_that_the_system_does_not_give_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise error

    path = npz(tmp_path / "bank.npz", embeddings=ROWS)
    monkeypatch.setattr(np, "load", load)
    with pytest.raises(Unreadable, match="at the moment"):
        read_bank(path)


def test_a_file_without_embeddings_is_told_so(tmp_path: Path) -> None:
    assert "no array named embeddings" in refusal(npz(tmp_path / "bank.npz", memory_bank=ROWS))


class _Bomb:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.proof),)


def test_a_pickled_array_is_refused_without_running_its_code(tmp_path: Path) -> None:
    proof = tmp_path / "code-ran"
    objects = np.array([[_Bomb(proof)]], dtype=object)
    path = npz(tmp_path / "bank.npz", embeddings=objects)
    refusal(path)
    assert not proof.exists()
    with np.load(path, allow_pickle=True) as file:  # the bomb is real
        assert file["embeddings"].shape == (1, 1)
    assert proof.exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_bank_that_is_not_finite_is_refused(value: float, tmp_path: Path) -> None:
    rows = ROWS.copy()
    rows[3, 4] = value
    assert "not finite" in refusal(npz(tmp_path / "bank.npz", embeddings=rows))


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_a_bank_beyond_float32_is_refused(tmp_path: Path) -> None:
    assert "not finite" in refusal(npz(tmp_path / "bank.npz", embeddings=ROWS * 1e300))


@pytest.mark.parametrize(
    "array",
    [ROWS[0], ROWS[None], np.empty((0, 8)), np.empty((8, 0)), np.float32(1), ROWS.astype(int),
     ROWS.astype(complex), ROWS > 0, np.array([["a"]])],
    ids=["1-D", "3-D", "no rows", "no channels", "a number", "int", "complex", "bool", "words"],
)  # fmt: skip
def test_a_bank_that_is_no_float_matrix_is_refused(array: Any, tmp_path: Path) -> None:
    assert "must be a float matrix" in refusal(npz(tmp_path / "bank.npz", embeddings=array))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"not a zip", b"\0" * 1000, b"\x80\x04."])
def test_a_bank_that_is_no_zip_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bank.npz").write_bytes(content)
    refusal(tmp_path / "bank.npz")


def test_a_bare_npy_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "bank.npz").open("wb") as file:
        np.save(file, ROWS)
    refusal(tmp_path / "bank.npz")


def test_a_bank_that_does_not_exist_is_named(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "bank.npz")


def test_a_folder_in_place_of_a_bank_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bank.npz").mkdir()
    refusal(tmp_path / "bank.npz")


def test_a_bank_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = npz(tmp_path / "whole.npz", embeddings=ROWS).read_bytes()
    path = tmp_path / "bank.npz"
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        refusal(path)


def test_a_bank_that_claims_more_memory_than_there_is_is_refused(tmp_path: Path) -> None:
    whole = npz(tmp_path / "bank.npz", embeddings=ROWS).read_bytes()
    grown = whole.replace(b"(20, 8), }         ", b"(200000000, 80000),")
    assert grown != whole
    (tmp_path / "bank.npz").write_bytes(grown)
    refusal(tmp_path / "bank.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_bank_is_refused_or_its_numbers_are_right(save: Any, tmp_path: Path) -> None:
    """Without a hash only the zip's checksum guards it; no other error than BadBundle leaves."""
    buffer = io.BytesIO()
    save(buffer, embeddings=ROWS.astype(np.float32), coverage_radius=np.float32(1))
    path = tmp_path / "bank.npz"
    chance, refused = random.Random(0), 0
    for _ in range(400):
        data = bytearray(buffer.getvalue())
        data[chance.randrange(len(data))] ^= chance.randrange(1, 256)
        path.write_bytes(data)
        try:
            np.testing.assert_array_equal(read_bank(path), ROWS.astype(np.float32))
            read_coverage_radius(path)
        except BadBundle:
            refused += 1
    assert refused > 200


# Writing a set of files


@pytest.mark.parametrize("exists", [True, False])
def test_a_body_that_raises_leaves_the_target_as_it_was(exists: bool, tmp_path: Path) -> None:
    target = tmp_path / "model"
    if exists:
        target.mkdir()
        (target / "meta.json").write_text("old")
    before = snapshot(tmp_path)
    with pytest.raises(ZeroDivisionError):
        write_half(target)
    assert snapshot(tmp_path) == before


def write_half(target: Path) -> None:
    with staged(target) as folder:
        (folder / "meta.json").write_text("new")
        _ = 1 / 0


def test_files_of_others_in_the_target_stay(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "notes.txt").write_text("line 3")
    with staged(target) as folder:
        (folder / "meta.json").write_text("new")
    assert snapshot(tmp_path) == {
        "model": None, "model/notes.txt": b"line 3", "model/meta.json": b"new"
    }  # fmt: skip


def test_a_target_in_a_folder_that_does_not_exist_is_made(tmp_path: Path) -> None:
    target = tmp_path / "models" / "PatchCore" / "engine"
    with staged(target) as folder:
        assert folder.parent == target.parent  # the same file system, so that a rename is one step
        (folder / "meta.json").write_text("new")
    assert (target / "meta.json").read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o755  # a server of another user may read it


def test_what_a_killed_process_left_is_removed_and_what_another_works_on_is_not(
    tmp_path: Path,
) -> None:
    target = tmp_path / "model"
    left = tmp_path / ".model.abc123"
    left.mkdir()
    (left / "model.onnx").write_text("half of i")
    with staged(target) as mine:
        assert not left.exists()
        with staged(target) as other:
            assert mine.is_dir()
            (other / "meta.json").write_text("other")
        (mine / "meta.json").write_text("mine")
    assert snapshot(tmp_path) == {"model": None, "model/meta.json": b"mine"}


def test_a_write_that_fails_leaves_no_temporary(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    (target / "inside").mkdir(parents=True)
    before = snapshot(tmp_path)
    with pytest.raises(IsADirectoryError):
        write_atomically(target, b"a file cannot replace a folder")
    assert snapshot(tmp_path) == before


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, with the content of the files."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


# Being killed


def killed(folder: Path, *kills: int, what: str = "staged") -> list[dict[str, Any]]:
    """What a reader finds after each kill; see killed.py."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "support" / "killed.py", what, folder, *map(str, kills)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_process_killed_at_any_step_leaves_no_mixture_that_opens(tmp_path: Path) -> None:
    found = killed(tmp_path / "model")
    for state in found:
        assert state["opens"] == (len(state["generations"]) == 1)
    sets = {tuple(state["generations"]) for state in found}
    assert sets == {(0,), (0, 1), (1,)}  # killed before, within and after the renames


def test_nor_where_the_old_files_had_no_hashes(tmp_path: Path) -> None:
    found = killed(tmp_path / "model", what="old")
    for state in found:
        assert state["opens"] == (len(state["generations"]) == 1)
    assert {tuple(state["generations"]) for state in found} == {(0,), (0, 1), (1,)}


def test_a_process_killed_at_any_moment_leaves_no_mixture_that_opens(tmp_path: Path) -> None:
    found = killed(tmp_path / "model", 10)
    assert len(found) == 10
    for state in found:
        assert state["opens"] == (len(state["generations"]) == 1)


@pytest.mark.soak
def test_a_process_killed_at_a_hundred_moments_leaves_no_mixture_that_opens(tmp_path: Path) -> None:
    found = killed(tmp_path / "model", 100)
    assert len(found) == 100
    for state in found:
        assert state["opens"] == (len(state["generations"]) == 1)
    assert any(max(state["generations"]) > 0 for state in found)


def test_a_model_copied_over_another_file_by_file_opens_only_when_whole(
    own_model: Path, tmp_path: Path
) -> None:
    """What `cp -r` of a new model over the one being served passes through."""
    new = Path(shutil.copytree(own_model, tmp_path / "new"))
    write_bank(new / "memory_bank.npz", np.ones((5, 384), np.float32), 1.0)
    for name in ("memory_bank.npz", "model.onnx", "golden.npz"):
        shutil.copyfile(new / name, own_model / name)
        with pytest.raises(BadBundle, match="memory_bank"):
            Bundle.open(own_model)
