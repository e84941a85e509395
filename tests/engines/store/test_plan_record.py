"""What a plan is good for, and what a machine lacks, in words."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from engines.errors import BadBundle, NoTensorRT
from engines.files import sha256
from engines.store import plan_record as plan
from engines.store.bundle import ONNX, PLAN
from engines.store.plan_record import PLAN_RECORD, Fingerprint, Machine, has_tensorrt
from support import double as doubles
from support.double import VERSIONS, doubled
from support.project import ROOT

NANO = Machine("10.3.0", "8.7", "Orin", "36.4.0")


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """A folder with a plan (not a real one: nothing here reads it) and its record."""
    (tmp_path / ONNX).write_bytes(b"graph")
    (tmp_path / PLAN).write_bytes(b"plan")
    hashes = (sha256(tmp_path / ONNX), sha256(tmp_path / PLAN))
    Fingerprint(NANO, *hashes, "f16", 4, 1500, True, 123).write(tmp_path)
    return tmp_path


# The machine


@pytest.mark.parametrize("version", VERSIONS)
def test_a_machine_says_what_a_plan_depends_on(
    version: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    release = tmp_path / "nv_tegra_release"
    release.write_text("# R36 (release), REVISION: 4.0, GCID: 37537400, BOARD: generic\n")
    monkeypatch.setattr(plan, "L4T_RELEASE", release)
    with doubled(version) as double:
        assert Machine.read() == Machine(version, "8.7", "Orin", "36.4.0")
        double.assert_clean()


@pytest.mark.parametrize("text", ["", "R36", "# R36 (release), REVISION:", "REVISION: 4.0"])
def test_a_release_that_says_nothing_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "release").write_text(text)
    assert plan._l4t(tmp_path / "release") is None
    assert plan._l4t(tmp_path / "absent") is None


def test_another_machine_has_no_l4t() -> None:
    with doubled("11.4.0.106", device="rtx"):
        assert Machine.read() == Machine("11.4.0.106", "8.9", "NVIDIA GeForce RTX 4070", None)


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("bindings", "sudo apt install python3-libnvinfer, and make the environment with"
         " python3 -m venv --system-site-packages"),
        ("libnvinfer", "but not a library that they need (libnvinfer.so.10: cannot open shared"
         " object file"),
        ("libcuda", "a container must be started with --runtime nvidia"),
        ("device", "CUDA finds no GPU to use (cuInit failed: no CUDA-capable device is detected)"),
    ],
)  # fmt: skip
def test_what_a_machine_lacks_is_said_with_what_to_type(
    missing: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with doubled():
        monkeypatch.setenv("KENSA_DOUBLE_MISSING", missing)
        doubles._forget(())
        with pytest.raises(NoTensorRT) as caught:
            Machine.read()
    assert words in str(caught.value)


def test_without_the_packages_there_is_no_tensorrt() -> None:
    program = (
        "from engines.store.plan_record import Machine, has_tensorrt\n"
        "print(has_tensorrt())\n"
        "try: Machine.read()\n"
        "except Exception as error: print(type(error).__name__)"
    )
    for environment, said in (({}, ["False", "NoTensorRT"]), (doubles.environment(), ["True"])):
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True,
            text=True,
        )  # fmt: skip
        assert done.stdout.split() == said, done.stderr


def test_the_packages_are_looked_for_and_not_loaded() -> None:
    with doubled():
        loaded = [sys.modules.pop(name) for name in ("tensorrt", "pycuda.driver", "pycuda")]
        assert has_tensorrt()
        assert "tensorrt" not in sys.modules
        assert loaded


# The record


def test_a_record_is_read_as_it_was_written(built: Path) -> None:
    record = Fingerprint.read(built)
    assert record is not None
    assert (record.machine, record.precision, record.bank_rows) == (NANO, "f16", 1500)
    replace(record, bank_rows=None).write(built)
    assert Fingerprint.read(built) == replace(record, bank_rows=None)
    assert [path.name for path in built.glob(".*")] == []


def test_without_a_record_there_is_none(tmp_path: Path) -> None:
    assert Fingerprint.read(tmp_path) is None


@pytest.mark.parametrize(
    "change",
    [{"plan": "short"}, {"machine": None}, {"max_batch": 0}, {"max_batch": "4"}, {"extra": 1},
     {"device_bytes": -1}, {"precision": "f8"}, {"refittable": 1}],
    ids=str,
)  # fmt: skip
def test_a_damaged_record_is_refused(built: Path, change: dict[str, object]) -> None:
    path = built / PLAN_RECORD
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(BadBundle, match=r"model\.plan\.json is damaged .* Build it again"):
        Fingerprint.read(built)


@pytest.mark.parametrize(
    "change",
    [{"compute": ""}, {"compute": "SM86,,x"}, {"compute": "SM86\n"}, {"compute": "SM86," * 1000},
     {"tensorrt": ""}, {"device": "x" * 1000}, {"library": "other"}, {"extra": 1}, {"l4t": 36}],
    ids=lambda change: str(change)[:30],
)  # fmt: skip
def test_a_machine_that_is_none_is_refused(built: Path, change: dict[str, object]) -> None:
    path = built / PLAN_RECORD
    found = json.loads(path.read_text())
    found["machine"] |= change
    path.write_text(json.dumps(found))
    with pytest.raises(BadBundle, match=r"model\.plan\.json is damaged .* Build it again"):
        Fingerprint.read(built)


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b"{}", b'{"machine": '], ids=repr)
def test_what_is_no_record_is_refused(built: Path, content: bytes) -> None:
    (built / PLAN_RECORD).write_bytes(content)
    with pytest.raises(BadBundle, match="is damaged"):
        Fingerprint.read(built)


def test_a_plan_is_good_where_it_was_built(built: Path) -> None:
    record = Fingerprint.read(built)
    assert record is not None
    assert record.stale(built, NANO) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tensorrt": "10.16.1.11"}, "for TensorRT 10.3.0 (here 10.16.1.11). Build it again"),
        ({"compute": "8.9"}, "for compute capability 8.7 (here 8.9)"),
        ({"device": "Thor"}, "for GPU Orin (here Thor)"),
        ({"l4t": "36.5.0"}, "for L4T 36.4.0 (here 36.5.0)"),
        ({"l4t": None, "compute": "8.9"}, "compute capability 8.7 (here 8.9), L4T 36.4.0 (here no"),
    ],
    ids=str,
)
def test_a_plan_of_another_machine_is_stale(
    built: Path, change: dict[str, str | None], words: str
) -> None:
    record = Fingerprint.read(built)
    assert record is not None
    (built / PLAN).unlink()  # and not even looked at
    assert words in str(record.stale(built, replace(NANO, **change)))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (PLAN, b"other", "model.plan is not the file that was built"),
        (ONNX, b"other", "model.onnx has changed since"),
        (PLAN, None, "model.plan does not exist"),
        (ONNX, None, "model.onnx does not exist"),
    ],
)
def test_a_plan_whose_files_changed_is_stale(
    built: Path, name: str, content: bytes | None, words: str
) -> None:
    (built / name).unlink()
    if content is not None:
        (built / name).write_bytes(content)
    record = Fingerprint.read(built)
    assert record is not None
    assert words in str(record.stale(built, NANO))
