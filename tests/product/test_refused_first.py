"""Claims about commands that cannot do what they are asked for: they say so before torch comes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.project import ROOT, write_meta


@pytest.fixture
def without_torch(tmp_path: Path) -> dict[str, str]:
    """An environment in which loading torch is an error of its own."""
    folder = tmp_path / "shadow"
    folder.mkdir()
    (folder / "torch.py").write_text("raise SystemExit('torch was loaded')")
    return {**os.environ, "PYTHONPATH": str(folder)}


GONE = "gone does not exist"
CATEGORY = "train/nut does not exist: --category must be one of sample_bracket"
# script -> flags that are good, and what is wrong -> what is said
TRAINS = {
    "--model": "patchcore", "--meta_json": "META", "--category": "sample_bracket",
    "--data_root": "DATA", "--out_dir": "OUT",
}  # fmt: skip
CONVERTS = {
    "--model": "patchcore", "--meta_json": "META", "--weights_pth": "META", "--out_dir": "OUT",
}  # fmt: skip
WITH_INT8 = {**CONVERTS, "--data_root": "DATA", "--category": "nut", "--int8": None}
EVALUATES = {
    "--model_dir": "OUT", "--category": "sample_bracket", "--data_root": "DATA", "--out_dir": "OUT",
}  # fmt: skip
WRONG = {
    "retrain: category": ("retrain.py", {**TRAINS, "--category": "nut"}, CATEGORY),
    "retrain: data": ("retrain.py", {**TRAINS, "--data_root": "gone"}, GONE),
    "retrain: meta": ("retrain.py", {**TRAINS, "--meta_json": "gone"}, GONE),
    "retrain: kind": ("retrain.py", {**TRAINS, "--model": "vae"}, "describes a patchcore model"),
    "retrain: weights": ("retrain.py", {**TRAINS, "--pretrained_pth": "gone"}, GONE),
    "retrain: bank": ("retrain.py", {**TRAINS, "--load_bank": "gone"}, GONE),
    "tune: category": ("tune.py", {**TRAINS, "--category": "nut"}, CATEGORY),
    "tune: data": ("tune.py", {**TRAINS, "--data_root": "gone"}, GONE),
    "tune: weights": ("tune.py", {**TRAINS, "--pretrained_pth": "gone"}, GONE),
    "convtrt: weights": ("convtrt.py", {**CONVERTS, "--weights_pth": "gone"}, GONE),
    "convtrt: meta": ("convtrt.py", {**CONVERTS, "--meta_json": "gone"}, GONE),
    "convtrt: bank": ("convtrt.py", {**CONVERTS, "--memory_bank": "gone"}, GONE),
    "convtrt: category": ("convtrt.py", WITH_INT8, CATEGORY),
    "evaluate: category": ("evaluate.py", {**EVALUATES, "--category": "nut"}, "hold no images"),
    "evaluate: data": ("evaluate.py", {**EVALUATES, "--data_root": "gone"}, GONE),
    "evaluate: model": ("evaluate.py", {**EVALUATES, "--model_dir": "gone"}, GONE),
    "import: checkpoint": (
        "import_anomalib.py", {"--checkpoint": "gone", "--out_dir": "OUT"}, GONE
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said_before_torch_is_loaded(
    what: str, without_torch: dict[str, str], sample_data: Path, tmp_path: Path
) -> None:
    script, flags, says = WRONG[what]
    places = {
        "META": str(write_meta(tmp_path / "meta.json")), "DATA": str(sample_data),
        "OUT": str(tmp_path / "out"), "gone": str(tmp_path / "gone"),
    }  # fmt: skip
    words = [places.get(word, word) for pair in flags.items() for word in pair if word is not None]
    done = subprocess.run(
        [sys.executable, script, *words],
        cwd=ROOT, env=without_torch, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert "torch was loaded" not in done.stderr
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
