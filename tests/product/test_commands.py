"""retrain.py, convtrt.py and bin/patchcore do what SPEC writes, and fail without leaving damage."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import pty
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

import convtrt
import retrain
from engines.errors import BadBundle
from engines.meta import Meta
from engines.store.bundle import Bundle, check_hash, read_bank, write_bank
from support.mutations import flat_jpeg
from support.project import ROOT, run, write_meta
from workers.sample_parts.drawing import draw_part
from workers.sample_parts.write_dataset import write_dataset

CATEGORY = "VisA_pipe_fryum"
# As SPEC.md writes them, word for word.
RETRAIN = r"""
python3 retrain.py --model patchcore --pretrained_pth models/PatchCore/model.pth --meta_json models/PatchCore/meta.json \
  --category VisA_pipe_fryum --data_root data --epochs 1 --batch 4 --out_dir models/PatchCore/retrained --load_bank models/PatchCore/memory_bank.npz
"""  # noqa: E501
CONVERT = r"""
python3 convtrt.py --model patchcore --weights_pth models/PatchCore/retrained/model.pth --meta_json models/PatchCore/meta.json \
  --memory_bank models/PatchCore/retrained/memory_bank.npz --opset 17 --fp16 --workspace 4096 --out_dir models/PatchCore/engine
"""  # noqa: E501
INSPECT = "cd bin && ./patchcore -e ../models/PatchCore/engine/model.plan -m ../models/PatchCore/engine/memory_bank.npz -d ../data/test/VisA_pipe_fryum/anomaly -i 256 -t 100"  # noqa: E501

Done = subprocess.CompletedProcess[str]


@pytest.fixture(scope="session")
def pipe_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn parts under the name that SPEC's commands use; other parts than the model knows."""
    root = tmp_path_factory.mktemp("spec_data")
    return write_dataset(root, CATEGORY, train=6, normal=4, per_kind=1, size=256, seed=5)


@pytest.fixture(scope="session")
def seed(trained: Path, pipe_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that SPEC's commands run in; meta.json as older tools wrote it. Do not change."""
    root = tmp_path_factory.mktemp("seed")
    model = root / "models" / "PatchCore"
    model.mkdir(parents=True)
    shutil.copy(trained / "model.pth", model)
    shutil.copy(trained / "memory_bank.npz", model)
    write_meta(model / "meta.json", image_threshold_auto=8.257, raw_image_min=6.725,
               raw_image_max=20.643, image_threshold=0.55, line="press 4")  # fmt: skip
    write_meta(model / "small.json", image_size=128)  # a quarter of the work
    (root / "data").symlink_to(pipe_data)
    (root / "bin").mkdir()
    for name in ("retrain.py", "convtrt.py", "bin/patchcore"):
        (root / name).symlink_to(ROOT / name)
    return root


@pytest.fixture(scope="session")
def spec(seed: Path) -> dict[str, Done]:
    """What SPEC's three commands said, run in their order."""
    return {
        "retrain": run("bash", "-c", RETRAIN, cwd=seed),
        "convert": run("bash", "-c", CONVERT, cwd=seed),
        "inspect": run("bash", "-c", INSPECT, cwd=seed),
    }


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def content(folder: Path) -> dict[str, str]:
    """File name -> hash of everything in a folder but the log, which may grow."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name != "retrain.log"
    }


def staging(out_dir: Path) -> list[Path]:
    return list(out_dir.parent.glob(f".{out_dir.name}.*"))


def as_json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


# ---- the commands of SPEC, in their order -----------------------------------------------------


def test_retraining_keeps_the_loaded_bank_and_adds_to_it(seed: Path, spec: dict[str, Done]) -> None:
    model = seed / "models" / "PatchCore"
    before = read_bank(model / "memory_bank.npz")
    after = read_bank(model / "retrained" / "memory_bank.npz")
    assert len(after) > len(before)
    np.testing.assert_array_equal(after[: len(before)], before)
    report = as_json(model / "retrained" / "report.json")
    assert report["before"]["memory_bank"]["rows"] == len(before)
    assert report["memory_bank"]["rows"] == len(after)


def test_retraining_leaves_everything_to_retrain_from(seed: Path, spec: dict[str, Done]) -> None:
    names = {path.name for path in (seed / "models" / "PatchCore" / "retrained").iterdir()}
    assert names == {
        "model.pth", "memory_bank.npz", "meta.json", "report.json", "golden.npz", "scores.json",
        "retrain.log",
    }  # fmt: skip


def test_retraining_updates_meta_json_and_keeps_what_it_does_not_know(
    seed: Path, spec: dict[str, Done]
) -> None:
    model = seed / "models" / "PatchCore"
    old, new = as_json(model / "meta.json"), as_json(model / "retrained" / "meta.json")
    for stale in ("image_threshold_auto", "raw_image_min", "raw_image_max"):
        assert new[stale] != old[stale]
    assert new["raw_image_min"] < new["image_threshold_auto"] < new["raw_image_max"]
    for kept in ("line", "image_threshold", "backbone", "layers", "coreset_ratio", "image_size"):
        assert new[kept] == old[kept]
    for name, expected in new["files"].items():
        check_hash(model / "retrained" / name, expected)
    assert {"model.pth", "memory_bank.npz"} <= set(new["files"])
    assert old["image_threshold_auto"] == 8.257  # the file it was trained from is as it was


def test_the_report_says_what_was_learned_and_measured(seed: Path, spec: dict[str, Done]) -> None:
    report = as_json(seed / "models" / "PatchCore" / "retrained" / "report.json")
    assert report["category"] == CATEGORY
    assert report["images"] == {"learned": 6, "known": 0, "strange": [], "skipped": {}}
    assert report["calibration"]["method"] == "test"  # the bank says nothing of its normals
    assert report["calibration"]["normals"] == 4
    assert report["calibration"]["defects"] == 5
    assert 0 <= report["calibration"]["auroc"] <= 1
    assert all(seconds >= 0 for seconds in report["seconds"].values())
    summary = spec["retrain"].stdout
    assert f"AUROC {report['calibration']['auroc']:.4f}" in summary
    assert f"threshold    {report['calibration']['threshold']:.4f}" in summary
    assert f"{report['memory_bank']['rows']:,} x 384" in summary
    assert "learned      6 images in" in summary


def test_the_log_holds_the_phases_with_their_times(seed: Path, spec: dict[str, Done]) -> None:
    lines = (seed / "models" / "PatchCore" / "retrained" / "retrain.log").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in lines)
    assert any("images: 6 in" in line for line in lines)
    assert any("coreset: " in line for line in lines)


def test_the_engine_has_the_thresholds_of_the_retraining_not_of_the_old_meta_json(
    seed: Path, spec: dict[str, Done]
) -> None:
    model = seed / "models" / "PatchCore"
    bundle = Bundle.open(model / "engine")
    retrained = as_json(model / "retrained" / "meta.json")
    assert bundle.meta.image_threshold_auto == retrained["image_threshold_auto"]
    assert bundle.meta.raw_image_max == retrained["raw_image_max"]
    assert bundle.meta.image_threshold == 0.55  # set by hand in the file that was named
    assert "thresholds and score range come from" in spec["convert"].stderr
    assert (model / "engine" / "memory_bank.npz").read_bytes() == (
        model / "retrained" / "memory_bank.npz"
    ).read_bytes()


def test_the_engine_carries_the_proof_that_it_agrees(seed: Path, spec: dict[str, Done]) -> None:
    report = as_json(seed / "models" / "PatchCore" / "engine" / "report.json")
    assert report["export"]["opset"] == 17
    assert report["export"]["precision"] == "f16"
    for way in ("onnx", "openvino_f32"):
        assert report["parity"][way]["ok"] is True
        assert 0 < report["parity"][way]["max_relative"] <= 1e-2
        assert report["parity"][way]["flips"] == 0
    assert report["memory_bank"]["rows"] > 0  # what retrain.py found stays in it


def test_inspecting_writes_a_line_and_a_row_per_image(seed: Path, spec: dict[str, Done]) -> None:
    rows = table(seed / "bin" / "result_patchcore.csv")
    names = sorted(path.name for path in (seed / "data/test" / CATEGORY / "anomaly").iterdir())
    assert list(rows[0]) == ["filename", "raw_score", "decision"]
    assert [row["filename"] for row in rows] == names
    assert [line.split()[0] for line in spec["inspect"].stdout.splitlines()] == names
    assert all(0 < float(row["raw_score"]) < 100 for row in rows)
    assert {row["decision"] for row in rows} == {"Normal"}  # -t 100 is far above
    assert spec["inspect"].returncode == 0
    assert "OpenVINO" in spec["inspect"].stderr  # no TensorRT here: it says what runs instead


def test_the_threshold_of_the_command_is_on_the_raw_score(
    seed: Path, spec: dict[str, Done], tmp_path: Path
) -> None:
    scores = sorted(float(row["raw_score"]) for row in table(seed / "bin/result_patchcore.csv"))
    middle = (scores[1] + scores[2]) / 2
    engine = seed / "models" / "PatchCore" / "engine"
    run(ROOT / "bin/patchcore", "--engine", engine / "model.onnx", "--memory_bank",
        engine / "memory_bank.npz", "--data", seed / "data/test" / CATEGORY / "anomaly",
        "--image_size", "256", "--threshold", str(middle), cwd=tmp_path)  # fmt: skip
    rows = table(tmp_path / "result_patchcore.csv")
    for row in rows:
        assert (row["decision"] == "Anomaly") == (float(row["raw_score"]) > middle)
    assert sum(row["decision"] == "Anomaly" for row in rows) == len(scores) - 2


def test_no_name_and_no_terminal_loses_the_verdicts_of_a_folder(
    seed: Path, spec: dict[str, Done], tmp_path: Path
) -> None:
    """Names as Japanese Windows writes them into a zip, and a stdout that knows ASCII only."""
    engine, parts = seed / "models" / "PatchCore" / "engine", tmp_path / "parts"
    parts.mkdir()
    picture = sorted((seed / "data/test" / CATEGORY / "anomaly").iterdir())[0].read_bytes()
    for name in ("1.png", "2検査.png", "3" + os.fsdecode("検査.png".encode("cp932"))):
        (parts / name).write_bytes(picture)
    command: list[str | Path] = [ROOT / "bin/patchcore", "-e", engine / "model.onnx"]
    command += ["-m", engine / "memory_bank.npz", "-d", parts, "-i", "256", "-t", "100"]
    done = run(*command, cwd=tmp_path, PYTHONIOENCODING="ascii")
    names = ["1.png", "2検査.png", r"3\x8c\x9f\x8d\xb8.png"]
    rows = table(tmp_path / "result_patchcore.csv")
    assert [row["filename"] for row in rows] == names
    assert len(done.stdout.splitlines()) == 3
    (parts / "4.webp").write_bytes(b"RIFF0000WEBPVP8 ")
    (parts / "5.png").symlink_to(tmp_path / "nowhere.png")
    done = run(*command, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert "4.webp: not judged: " in done.stderr
    assert "5.png: not judged: it cannot be read: No such file" in done.stderr
    assert [row["filename"] for row in table(tmp_path / "result_patchcore.csv")] == names


# ---- variations -------------------------------------------------------------------------------


def flags_of(seed: Path, out_dir: Path, **changes: str | Path | None) -> list[str]:
    """retrain.py's flags; a change to None leaves a flag out."""
    model = seed / "models" / "PatchCore"
    flags: dict[str, str | Path | None] = {
        "model": "patchcore",
        "pretrained_pth": model / "model.pth",
        "meta_json": model / "small.json",
        "category": CATEGORY,
        "data_root": seed / "data",
        "out_dir": out_dir,
        **changes,
    }
    return [str(w) for k, v in flags.items() if v is not None for w in (f"--{k}", v)]


def test_without_a_bank_the_bank_is_made_anew_and_log_off_writes_no_log(
    seed: Path, tmp_path: Path
) -> None:
    assert retrain.main(flags_of(seed, tmp_path / "out", log="off")) == 0
    assert (tmp_path / "out" / "model.pth").is_file()
    assert not (tmp_path / "out" / "retrain.log").exists()
    rows = len(read_bank(tmp_path / "out" / "memory_bank.npz"))
    assert rows == int(6 * 16 * 16 * 0.1)
    assert "before" not in as_json(tmp_path / "out" / "report.json")


def test_a_broken_training_image_is_named_and_skipped_and_counted(
    seed: Path, pipe_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Path(shutil.copytree(pipe_data, tmp_path / "data"))
    torn = data / "train" / CATEGORY / "0002.png"
    for number in range(6):
        picture = draw_part(100 + number, None, 256)[0]
        cv2.imwrite(str(torn.with_name(f"more_{number}.png")), picture)
    torn.write_bytes(torn.read_bytes()[:5000])
    assert retrain.main(flags_of(seed, tmp_path / "out", data_root=data)) == 0
    report = as_json(tmp_path / "out" / "report.json")
    assert report["images"]["learned"] == 11
    assert list(report["images"]["skipped"]) == [str(torn)]
    said = capsys.readouterr()
    assert f"skipped {torn}" in said.err
    assert "learned      11 images, 1 broken ones skipped" in said.out
    assert str(torn) in (tmp_path / "out" / "retrain.log").read_text()


@pytest.mark.parametrize("tested", [0, 1])
def test_without_test_images_the_training_images_find_the_threshold(
    seed: Path, pipe_data: Path, tmp_path: Path, tested: int
) -> None:
    shutil.copytree(pipe_data / "train", tmp_path / "data" / "train")
    if tested:
        (tmp_path / "data/test" / CATEGORY).mkdir(parents=True)
        shutil.copytree(
            pipe_data / "test" / CATEGORY / "normal",
            tmp_path / "data/test" / CATEGORY / "normal",
            ignore=lambda _, names: sorted(names)[tested:],
        )
    assert retrain.main(flags_of(seed, tmp_path / "out", data_root=tmp_path / "data")) == 0
    report = as_json(tmp_path / "out" / "report.json")
    assert report["images"]["learned"] == 6  # all of them, in the end, and each once
    assert report["calibration"]["method"] == "left_out"
    assert report["calibration"]["normals"] == 6 + tested
    assert "auroc" not in report["calibration"]


@pytest.mark.parametrize("command", ["retrain.py", "convtrt.py", ROOT / "bin" / "patchcore"])
def test_help_tells_every_flag_of_spec(command: str | Path) -> None:
    flags = {
        "retrain.py": "--model --pretrained_pth --meta_json --category --data_root --epochs --batch"
        " --out_dir --load_bank --log",
        "convtrt.py": "--model --weights_pth --meta_json --memory_bank --stats --opset --fp16"
        " --workspace --out_dir --use_dla",
        "patchcore": "-e --engine -m --memory_bank -d --data -i --image_size -t --threshold",
    }[Path(command).name]
    told = run(command, "--help").stdout
    assert [flag for flag in flags.split() if not re.search(rf"(?<!\S){flag}\b", told)] == []


# ---- errors -----------------------------------------------------------------------------------


def bad_file(text: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / "bad_file"
        path.write_bytes(text)
        return path

    return make


def empty_category(folder: Path) -> Path:
    (folder / "data" / "train" / CATEGORY).mkdir(parents=True)
    return folder / "data"


def narrow_bank(folder: Path) -> Path:
    write_bank(folder / "bank.npz", np.ones((9, 128), np.float32), 1.0)
    return folder / "bank.npz"


def padim_meta(folder: Path) -> Path:
    path = folder / "padim.json"
    path.write_text('{"backbone":"resnet18","layers":["layer1"],"n_features":9,"image_size":256}')
    return path


def small_meta(**changes: Any) -> Callable[[Path], Path]:
    return lambda folder: write_meta(folder / "changed.json", **changes)


def code_in_weights(folder: Path) -> Path:
    torch.save({"state_dict": {"a": torch.ones(1)}, "hook": os.system}, folder / "code.pth")
    return folder / "code.pth"


def nowhere(folder: Path) -> Path:
    return folder / "nowhere"


ERRORS: dict[str, tuple[str, Callable[[Path], str | Path], str]] = {
    "wrong data root": ("data_root", nowhere, "nowhere does not exist"),
    "wrong category": ("category", lambda _: "VisA_candle", f"must be one of {CATEGORY}"),
    "empty category": ("data_root", empty_category, "holds no images"),
    "no meta.json": ("meta_json", nowhere, "nowhere does not exist"),
    "meta.json of padim": ("meta_json", padim_meta, "describes a padim model"),
    "meta.json is not JSON": ("meta_json", bad_file(b"{'a': 1"), "is not JSON"),
    "meta.json without layers": ("meta_json", small_meta(layers=None), "also needs layers"),
    "ratio above 1": ("meta_json", small_meta(coreset_ratio=2), "coreset_ratio"),
    "unknown backbone": ("meta_json", small_meta(backbone="resnet81"), "no backbone named"),
    "unknown layer": ("meta_json", small_meta(layers=["layer9"]), "it has"),
    "another backbone": ("meta_json", small_meta(backbone="resnet50"), "does not fit resnet50"),
    "bank of another backbone": ("load_bank", narrow_bank, "128 channels"),
    "no bank": ("load_bank", nowhere, "nowhere does not exist"),
    "damaged bank": ("load_bank", bad_file(b"PK\3\4 torn"), "bad_file is not a readable .npz"),
    "no weights": ("pretrained_pth", nowhere, "nowhere does not exist"),
    "damaged weights": ("pretrained_pth", bad_file(b"PK\3\4 torn"), "bad_file is damaged"),
    "code in the weights": ("pretrained_pth", code_in_weights, "could run code"),
}


def only_sentence(said: str) -> str:
    """The error of a command: one line, and nothing that looks like a crash."""
    assert "Traceback" not in said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, said
    assert said.rstrip().endswith(errors[0]), said  # the last thing that it says
    return errors[0]


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_is_one_sentence_and_out_dir_is_as_it_was(
    case: str, seed: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flag, make, says = ERRORS[case]
    out_dir = Path(shutil.copytree(trained, tmp_path / "out"))
    before = content(out_dir)
    code = retrain.main(flags_of(seed, out_dir, **{flag: make(tmp_path)}))
    assert code == 2
    assert says in only_sentence(capsys.readouterr().err)
    assert content(out_dir) == before
    assert staging(out_dir) == []


def test_without_weights_and_without_a_hub_it_says_what_to_pass(
    seed: Path, trained: Path, tmp_path: Path
) -> None:
    out_dir = Path(shutil.copytree(trained, tmp_path / "out"))
    before = content(out_dir)
    done = run("retrain.py", *flags_of(seed, out_dir, pretrained_pth=None), check=False,
               HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hub"))  # fmt: skip
    assert done.returncode == 2
    sentence = only_sentence(done.stderr)
    assert "No pretrained weights for resnet18" in sentence
    assert "--pretrained_pth" in sentence
    assert done.stdout == ""
    assert content(out_dir) == before


@pytest.mark.parametrize("log", ["on", "off"])
def test_an_out_dir_that_is_a_file_is_named_and_left(
    seed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], log: str
) -> None:
    (tmp_path / "out").write_text("somebody's notes")
    assert retrain.main(flags_of(seed, tmp_path / "out", log=log)) == 2
    assert "out" in only_sentence(capsys.readouterr().err)
    assert (tmp_path / "out").read_text() == "somebody's notes"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_out_dir_below_a_file_is_named(
    seed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert retrain.main(flags_of(seed, tmp_path / "file" / "out")) == 2
    assert str(tmp_path / "file") in only_sentence(capsys.readouterr().err)


def limit_files() -> None:
    """In the child: no file may grow above 1 MB, as if the disk were full from there on."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB: a model does not fit."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mounting, capture_output=True).returncode:
        pytest.skip("only root may mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_told_and_leaves_nothing_half_written(
    seed: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out_dir = small_disk / "out"
    out_dir.mkdir()
    (out_dir / "meta.json").write_text("the old one")
    assert retrain.main(flags_of(seed, out_dir)) == 2
    sentence = only_sentence(capsys.readouterr().err)
    assert "disk is full; nothing was changed" in sentence
    assert list(content(out_dir)) == ["meta.json"]
    assert (out_dir / "meta.json").read_text() == "the old one"
    assert staging(out_dir) == []


def test_a_file_that_cannot_be_written_to_its_end_leaves_the_old_model(
    seed: Path, trained: Path, tmp_path: Path
) -> None:
    out_dir = Path(shutil.copytree(trained, tmp_path / "out"))
    before = content(out_dir)
    done = subprocess.run(
        [sys.executable, ROOT / "retrain.py", *flags_of(seed, out_dir)],
        capture_output=True,
        text=True,
        preexec_fn=limit_files,
    )
    assert done.returncode == 2
    assert "File too large" in only_sentence(done.stderr)
    assert content(out_dir) == before
    assert staging(out_dir) == []


CONVERT_ERRORS: dict[str, tuple[str, Callable[[Path], str | Path], str]] = {
    "no weights": ("weights_pth", nowhere, "nowhere does not exist"),
    "damaged weights": ("weights_pth", bad_file(b"torn"), "bad_file is damaged"),
    "meta.json of padim": ("meta_json", padim_meta, "describes a padim model"),
    "another backbone": ("meta_json", small_meta(backbone="resnet50"), "does not fit resnet50"),
    "other layers": ("meta_json", small_meta(layers=["layer2"]), "its embeddings have 384"),
    "no bank": ("memory_bank", nowhere, "nowhere does not exist"),
    "bank of another backbone": ("memory_bank", narrow_bank, "128 channels"),
}


@pytest.mark.parametrize("case", CONVERT_ERRORS)
def test_an_error_in_converting_leaves_the_old_engine(
    case: str, kensa_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flag, make, says = CONVERT_ERRORS[case]
    model = Path(shutil.copytree(kensa_model.parent / "retrained", tmp_path / "retrained"))
    (model / "meta.json").unlink()  # else it, not the one that is named, would be taken
    out_dir = Path(shutil.copytree(kensa_model, tmp_path / "engine"))
    before = content(out_dir)
    flags: dict[str, str | Path] = {
        "model": "patchcore",
        "weights_pth": model / "model.pth",
        "meta_json": kensa_model / "meta.json",
        "memory_bank": model / "memory_bank.npz",
        "out_dir": out_dir,
        flag: make(tmp_path),
    }
    assert convtrt.main([str(w) for k, v in flags.items() for w in (f"--{k}", v)]) == 2
    assert says in only_sentence(capsys.readouterr().err)
    assert content(out_dir) == before
    assert staging(out_dir) == []


@pytest.mark.parametrize("target", ["rtx:", "rtx:86", "cuda", "SM86", "rtx:SM86, SM120"])
def test_a_target_that_is_none_is_refused_before_anything_is_read(
    target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--model vae --weights_pth a.pth --meta_json b.json --out_dir c --target"
    with pytest.raises(SystemExit) as caught:
        convtrt.main([*words.split(), target])
    assert caught.value.code == 2
    said = f"--target {target!r} is no target: write rtx, rtx:SM86 or rtx:SM86,SM120\n"
    assert capsys.readouterr().err.endswith(said)


def test_a_target_with_dla_is_refused_also_in_float32(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--model vae --weights_pth a.pth --meta_json b.json --out_dir c --use_dla --target rtx"
    with pytest.raises(SystemExit):
        convtrt.main(words.split())
    said = "a PC's GPU has no DLA: either --target or --use_dla\n"
    assert capsys.readouterr().err.endswith(said)


def test_statistics_for_a_model_that_has_none_are_refused(tmp_path: Path) -> None:
    words = "--model patchcore --weights_pth a.pth --meta_json b.json --stats c.npz --out_dir"
    done = run("convtrt.py", *words.split(), tmp_path / "out", check=False)
    assert done.returncode == 2
    assert "--stats is for padim" in done.stderr
    assert not (tmp_path / "out").exists()


def inspect(model: Path, cwd: Path, **changes: str | Path) -> Done:
    flags: dict[str, str | Path] = {
        "e": model / "model.plan",
        "m": model / "memory_bank.npz",
        "d": cwd,
        "i": "256",
        "t": "1",
        **changes,
    }
    words = [str(word) for flag, value in flags.items() for word in (f"-{flag}", value)]
    return run(ROOT / "bin" / "patchcore", *words, cwd=cwd, check=False)


@pytest.mark.parametrize(
    ("flag", "make", "says"),
    [
        ("i", lambda _: "224", "pass -i 256"),
        ("d", nowhere, "nowhere does not exist"),
        ("d", lambda folder: folder, "holds no images"),
        ("e", nowhere, "make it with convtrt.py"),
        ("m", nowhere, "nowhere does not exist"),
        ("m", narrow_bank, "128 channels"),
        ("e", lambda folder: bad_file(b"torn")(folder).rename(folder / "bad.onnx"), "bad.onnx"),
    ],
)
def test_an_inspection_that_cannot_be_made_says_why_and_leaves_the_old_table(
    kensa_model: Path,
    sample_data: Path,
    tmp_path: Path,
    flag: str,
    make: Callable[[Path], str | Path],
    says: str,
) -> None:
    (tmp_path / "result_patchcore.csv").write_text("yesterday's")
    changes = {"d": sample_data / "test/sample_bracket/normal/0000.png", flag: make(tmp_path)}
    done = inspect(kensa_model, tmp_path, **changes)
    assert done.returncode == 2
    assert says in only_sentence(done.stderr)
    assert done.stdout == ""
    assert (tmp_path / "result_patchcore.csv").read_text() == "yesterday's"


def test_a_broken_image_is_named_and_left_out_and_the_others_are_judged(
    kensa_model: Path, sample_data: Path, tmp_path: Path
) -> None:
    shutil.copytree(sample_data / "test/sample_bracket/normal", tmp_path, dirs_exist_ok=True)
    torn = tmp_path / "0002.png"
    torn.write_bytes(torn.read_bytes()[:-100])
    (tmp_path / "third.jpg").write_bytes(flat_jpeg(3, 1))  # a sampling that no library here reads
    (tmp_path / "turned.jpg").write_bytes(flat_jpeg(1, 4))
    done = inspect(kensa_model, tmp_path)
    assert done.returncode == 1
    assert "0002.png: not judged: " in done.stderr
    assert "third.jpg: not judged: " in done.stderr
    assert "6 judged" in done.stderr
    assert "2 not judged" in done.stderr
    names = [row["filename"] for row in table(tmp_path / "result_patchcore.csv")]
    assert names == ["0000.png", "0001.png", "0003.png", "0004.png", "0005.png", "turned.jpg"]


# ---- interruptions ----------------------------------------------------------------------------


class Running:
    """retrain.py in a process of its own, read line by line."""

    def __init__(self, flags: list[str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "retrain.py", *flags],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []

    def wait_for(self, beginning: str, times: int = 1) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            times -= line.startswith(beginning)
            if not times:
                return
        pytest.fail(f"{beginning} never came: {self.lines}")

    def end(self, how: signal.Signals) -> int:
        self.process.send_signal(how)
        _, rest = self.process.communicate(timeout=60)
        self.lines.append(rest)
        return self.process.returncode


def slow_meta(folder: Path) -> Path:
    """A coreset that takes seconds."""
    return write_meta(folder / "slow.json", coreset_ratio=1.0)


def test_ctrl_c_ends_training_at_once_and_leaves_the_old_model(
    seed: Path, trained: Path, tmp_path: Path
) -> None:
    out_dir = Path(shutil.copytree(trained, tmp_path / "out"))
    before = content(out_dir)
    running = Running(flags_of(seed, out_dir, meta_json=slow_meta(tmp_path)))
    running.wait_for("images: 6")  # the coreset comes next
    assert running.end(signal.SIGINT) == 130
    assert only_sentence("".join(running.lines)) == "error: Stopped. Nothing was changed."
    assert content(out_dir) == before
    assert staging(out_dir) == []


def kill_while_writing(seed: Path, trained: Path, tmp_path: Path, delay_s: float) -> str:
    """Kill retrain.py a moment after its last line, and say what is left in out_dir."""
    out_dir = Path(shutil.copytree(trained, tmp_path / f"out_{delay_s:.6f}"))
    old = content(out_dir)
    running = Running(flags_of(seed, out_dir, meta_json=slow_small(tmp_path)))
    running.wait_for("verify: ", times=4)  # what is left is to write
    time.sleep(delay_s)
    code = running.end(signal.SIGKILL)
    new = content(out_dir)
    torch.load(out_dir / "model.pth", weights_only=True)  # each file is whole, whoever wrote it
    read_bank(out_dir / "memory_bank.npz")
    meta = Meta.read(out_dir / "meta.json")
    try:
        for name, expected in (meta.files or {}).items():
            check_hash(out_dir / name, expected)
    except BadBundle:
        return "refused"
    hashed = set(meta.files or {}) | {"meta.json"}
    if {name: new[name] for name in hashed} == {name: old[name] for name in hashed}:
        return "old"
    assert all(new[name] != old[name] for name in hashed - {"model.pth"})
    return "new" if code == -signal.SIGKILL else "new, in time"


def slow_small(folder: Path) -> Path:
    return write_meta(folder / "other.json", coreset_ratio=0.3)


def test_a_kill_leaves_the_old_model_or_the_new_one_or_what_is_refused(
    seed: Path, trained: Path, tmp_path: Path
) -> None:
    draw = random.Random(0)
    left = [kill_while_writing(seed, trained, tmp_path, draw.uniform(0, 0.3)) for _ in range(2)]
    assert set(left) <= {"old", "new", "new, in time", "refused"}
    assert "old" in left or "new" in left or "refused" in left  # at least one kill came in time


@pytest.mark.soak
def test_a_hundred_kills_leave_the_old_model_or_the_new_one_or_what_is_refused(
    seed: Path, trained: Path, tmp_path: Path
) -> None:
    draw, usual = random.Random(1), 0.2
    left = []
    for _ in range(100):
        delay_s = usual * draw.uniform(0.5, 1.5)
        left.append(kill_while_writing(seed, trained, tmp_path, delay_s))
        usual *= 1.15 if left[-1] == "old" else 0.85  # most kills near the moment of the change
        for folder in tmp_path.glob("*out_*"):
            shutil.rmtree(folder)
    print({how: left.count(how) for how in set(left)})
    assert {"old", "new"} <= set(left)


# ---- progress ---------------------------------------------------------------------------------


def test_without_a_terminal_progress_is_plain_lines(spec: dict[str, Done]) -> None:
    said = spec["retrain"].stderr
    assert "\r" not in said
    assert "\x1b" not in said
    assert "%|" not in said
    assert re.search(r"^images: 6 in \d+\.\d s$", said, re.MULTILINE)
    assert re.search(r"^coreset: \d+ in \d+\.\d s$", said, re.MULTILINE)


def test_on_a_terminal_progress_is_a_bar_and_the_log_stays_plain(
    seed: Path, tmp_path: Path
) -> None:
    """Even on a terminal that tells no width: a serial console, as this one is."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, ROOT / "retrain.py", *flags_of(seed, tmp_path / "out")],
        stdout=subprocess.DEVNULL,
        stderr=theirs,
    )
    os.close(theirs)
    said = b""
    try:
        while block := os.read(ours, 65536):
            said += block
    except OSError:  # Linux says EIO when the other side is closed
        pass
    os.close(ours)
    assert process.wait() == 0
    assert re.search(rb"\rimages .*6/6", said)
    assert re.search(rb"\rcoreset .*153/153", said)
    log = (tmp_path / "out" / "retrain.log").read_text()
    assert "\r" not in log
    assert "images: 6 in" in log
