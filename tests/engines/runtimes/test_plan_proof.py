"""A plan that was built without a GPU, opened by a machine that has one; on the double."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from engines.errors import BadBundle, StalePlan
from engines.files import sha256
from engines.meta import Meta
from engines.regions import REACH
from engines.runtimes import cuda
from engines.serving.opening import Opening, memory_needed, open_model
from engines.serving.resident import Resident
from engines.store.bundle import ONNX, PLAN, write_report
from engines.store.golden import Golden
from engines.store.plan_record import Fingerprint, Machine
from support.double import BUILDING, RTX, Double, doubled
from support.plans import SIDE, seal, tiny_bank, tiny_bundle, tiny_score, with_regions
from support.progress import Heard

BANK = tiny_bank(1)


@pytest.fixture
def pc() -> Iterator[Double]:
    """A PC with an RTX 4070."""
    with doubled(RTX, device="rtx", users=BUILDING) as double:
        yield double
        cuda.close()
        double.assert_clean()


def for_others(folder: Path, target: str, bank: NDArray[np.float32] | None = BANK) -> Path:
    """A model with a plan for the GPUs of a target, and with golden images."""
    source = tiny_bundle(folder / "bare", bank)
    images = parts()
    Golden(images).write(source)
    scores = [tiny_score(image, bank) for image in images]
    write_report(source, {"golden_scores": scores, "export": {"precision": "f32"}})
    seal_all(source)
    rebuild = importlib.import_module("workers.converting.plan.rebuild").rebuild
    how = {"workspace": 64, "use_dla": False, "cache": None, "target": target}
    rebuild(source, folder / "made", Heard(), **how)
    return folder / "made"


def seal_all(folder: Path) -> None:
    meta = Meta.read(folder / "meta.json")
    there = [path for path in folder.iterdir() if path.name != "meta.json"]
    meta.with_(files={path.name: sha256(path) for path in there}).write(folder / "meta.json")


def parts(count: int = 5) -> NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)


def opened(folder: Path, **how: object) -> Resident:
    return open_model(folder, "part", "1", Opening(batching=False, **how))  # type: ignore[arg-type]


@pytest.mark.parametrize("bank", [BANK, None], ids=["with a bank", "without"])
def test_it_is_compared_with_its_graph_and_then_judges(
    bank: NDArray[np.float32] | None, pc: Double, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = for_others(tmp_path, "rtx:SM86,SM89", bank)
    record = Fingerprint.read(folder)
    assert record is not None
    assert not record.proved
    caplog.set_level("INFO")
    model = opened(folder)
    assert (model.runtime.name, model.stale, model.unused) == ("tensorrt", None, None)
    assert "model.plan is proved: raw scores within" in caplog.text
    assert memory_needed(folder, Opening()).device > 0
    score, _ = model.runtime.infer(parts())
    assert score[0] == pytest.approx(tiny_score(parts()[0], bank), rel=1e-4)
    model.runtime.close()


def test_one_that_scores_otherwise_does_not_judge(pc: Double, tmp_path: Path) -> None:
    folder = for_others(tmp_path, "rtx:SM89")
    report = json.loads((folder / "report.json").read_text())
    report["golden_scores"][3] *= 1.01
    write_report(folder, report)
    seal(folder)
    model = opened(folder)
    assert model.runtime.name == "openvino"
    assert model.stale is not None
    assert "was built without a GPU, and scores otherwise on this one than its graph" in model.stale
    model.runtime.close()
    with pytest.raises(StalePlan, match="scores otherwise on this one"):
        opened(folder, fallback="none")


def test_without_golden_images_openvino_says_what_is_right(
    pc: Double, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = for_others(tmp_path, "rtx:SM89")
    (folder / "golden.npz").unlink()
    seal(folder)
    caplog.set_level("INFO")
    model = opened(folder)
    assert model.runtime.name == "tensorrt"
    assert "model.plan is proved" in caplog.text
    model.runtime.close()


@pytest.mark.parametrize("scores", [5, "12345", ["x"] * 5, [None] * 5, [[1.0]] * 5, {}, [1.0]])
def test_of_scores_that_are_none_openvino_says_what_is_right(
    scores: object, pc: Double, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = for_others(tmp_path, "rtx:SM89")
    write_report(folder, {**json.loads((folder / "report.json").read_text()),
                          "golden_scores": scores})  # fmt: skip
    seal(folder)
    caplog.set_level("INFO")
    model = opened(folder)
    assert model.runtime.name == "tensorrt"
    assert "model.plan is proved" in caplog.text
    model.runtime.close()
    rebuild = importlib.import_module("workers.converting.plan.rebuild").rebuild
    report = rebuild(folder, tmp_path / "own", Heard(), workspace=64, use_dla=False, cache=None)
    assert report["plan"]["parity"]["ok"] is True


def cut(plan: bytes) -> bytes:
    return plan[: len(plan) // 2]


@pytest.mark.parametrize(
    "change", [cut, lambda plan: b"ftrt" + plan, lambda plan: b"x"], ids=["cut", "foreign", "x"]
)
@pytest.mark.parametrize("hidden", [False, True], ids=["as it is", "with a record that fits"])
def test_a_damaged_plan_for_others_is_stale_and_openvino_judges(
    change: Callable[[bytes], bytes], hidden: bool, pc: Double, tmp_path: Path
) -> None:
    folder = for_others(tmp_path, "rtx:SM89")
    (folder / PLAN).write_bytes(change((folder / PLAN).read_bytes()))
    record = Fingerprint.read(folder)
    assert record is not None
    if hidden:
        replace(record, plan=sha256(folder / PLAN), proved=True).write(folder)
    seal_all(folder)
    model = opened(folder)
    assert model.runtime.name == "openvino"
    assert model.stale is not None
    words = "does not take" if hidden else "is not the file that was built"
    assert words in model.stale
    model.runtime.close()


def test_a_plan_for_others_looks_past_regions_once_it_was_proved(
    pc: Double,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(REACH, "patchcore", 0)
    mask = np.zeros((SIDE, SIDE), bool)
    mask[:, : SIDE // 2] = True
    folder = with_regions(for_others(tmp_path, "rtx:SM89"), tmp_path / "masked", mask)
    caplog.set_level("INFO")
    model = opened(folder)
    assert (model.runtime.name, model.stale) == ("tensorrt", None)
    assert "model.plan is proved" in caplog.text
    _, maps = model.runtime.infer(parts()[:1])
    hidden, shown = np.split(maps[0], 2, axis=1)
    assert (hidden == shown.min()).all()
    assert shown.max() > shown.min()
    model.runtime.close()


def test_where_nobody_knows_the_scores_it_is_said(
    pc: Double, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = for_others(tmp_path, "rtx:SM89")
    (folder / "golden.npz").unlink()
    seal(folder)
    monkeypatch.setattr("engines.runtimes.plan_proof.find_spec", lambda name: None)
    model = opened(folder)
    assert "Nobody knows the scores" in caplog.text
    model.runtime.close()


def test_a_gpu_that_is_not_among_them_is_named(pc: Double, tmp_path: Path) -> None:
    model = opened(for_others(tmp_path, "rtx:SM86,SM120"))
    assert model.runtime.name == "openvino"
    assert model.stale is not None
    said = "was built for GPUs of SM86, SM120 (here NVIDIA GeForce RTX 4070, SM89)"
    assert said in model.stale
    model.runtime.close()


def test_a_plan_for_this_machine_is_proved_where_it_is_built(pc: Double, tmp_path: Path) -> None:
    source = for_others(tmp_path, "rtx:SM86")
    rebuild = importlib.import_module("workers.converting.plan.rebuild").rebuild
    report = rebuild(source, tmp_path / "own", Heard(), workspace=64, use_dla=False, cache=None)
    assert report["plan"]["parity"]["ok"] is True
    record = Fingerprint.read(tmp_path / "own")
    assert record is not None
    assert (record.proved, record.machine.compute) == (True, "8.9")
    assert record.machine.device == "NVIDIA GeForce RTX 4070"
    model = opened(tmp_path / "own")
    assert model.runtime.name == "tensorrt"
    model.runtime.close()


@pytest.mark.parametrize("right", [True, False], ids=["right", "wrong"])
def test_a_conversion_keeps_a_plan_for_others_only_once_it_was_proved(
    right: bool, pc: Double, tmp_path: Path
) -> None:
    before, folder = for_others(tmp_path, "rtx:SM86,SM89"), tmp_path / "folder"
    folder.mkdir()
    shutil.copyfile(before / ONNX, folder / ONNX)
    build = importlib.import_module("workers.converting.plan.build")
    scores = np.float32([tiny_score(image, BANK) for image in parts()])
    meta = Meta.read(before / "meta.json")
    wanted = build.Wanted(meta, "f32", 64, False, BANK, parts(), scores if right else scores * 2)
    if not right:
        with pytest.raises(BadBundle, match="does not agree"):
            build.make_plan(folder, Machine.read(), wanted, before, Heard())
        assert pc.gpu.counts["builds"] == 2  # that for others, and another one for this card
        return
    report = build.make_plan(folder, Machine.read(), wanted, before, Heard())
    assert (report["how"], report["proved"], report["gpus"]) == ("kept", True, ["SM86", "SM89"])
    record = Fingerprint.read(folder)
    assert record is not None
    assert (record.proved, record.machine.elsewhere) == (True, True)


def test_kernels_are_made_when_it_is_opened_and_kept_for_the_next_time(
    pc: Double, tmp_path: Path
) -> None:
    folder, cache = for_others(tmp_path, "rtx:SM89"), tmp_path / "cache"
    cache.mkdir()
    model = opened(folder, cache_dir=cache)
    made = pc.gpu.counts["kernels"]
    assert made == 4  # one for each number of images
    for count in (1, 2, 3, 4):
        model.runtime.infer(parts(count), 4)
    assert pc.gpu.counts["kernels"] == made  # no part waited for one
    model.runtime.close()
    kept = cache / f"rtx-{sha256(folder / PLAN)}.blob"
    assert kept.with_suffix(".sha256").read_text() == sha256(kept)
    again = opened(folder, cache_dir=cache)
    assert pc.gpu.counts["kernels"] == made
    again.runtime.close()


@pytest.mark.parametrize("damage", ["cut", "a bit", "no seal", "a folder", "no kernels"])
def test_kernels_that_were_damaged_while_the_server_ran_are_made_anew(
    damage: str, pc: Double, tmp_path: Path
) -> None:
    folder, cache = for_others(tmp_path, "rtx:SM89"), tmp_path / "cache"
    cache.mkdir()
    opened(folder, cache_dir=cache).runtime.close()
    made = pc.gpu.counts["kernels"]
    kept = cache / f"rtx-{sha256(folder / PLAN)}.blob"
    data = kept.read_bytes()
    if damage == "cut":
        kept.write_bytes(data[:3])
    elif damage == "a bit":
        kept.write_bytes(bytes([data[0] ^ 0x80]) + data[1:])
    elif damage == "no seal":
        kept.with_suffix(".sha256").unlink()
    elif damage == "no kernels":
        kept.write_bytes(b"")
    else:
        kept.unlink()
        kept.mkdir()
    model = opened(folder, cache_dir=cache)
    assert (model.runtime.name, model.stale) == ("tensorrt", None)
    assert pc.gpu.counts["kernels"] == 2 * made
    model.runtime.close()


def test_a_folder_for_kernels_that_cannot_be_written_or_read_stops_nothing(
    pc: Double, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, cache = for_others(tmp_path, "rtx:SM89"), tmp_path / "cache"
    cache.write_bytes(b"no folder")
    model = opened(folder, cache_dir=cache)
    assert model.runtime.name == "tensorrt"
    assert "The next start will be slower" in caplog.text
    model.runtime.close()
