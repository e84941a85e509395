"""The trial of a GPU, on the double: each step works, and one that fails is said in words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.gpu import PICTURES
from support.double import environment
from support.plans import SIDE, tiny_bank, tiny_bundle
from support.project import ROOT

STEPS = {"machine", "models", "load", "banks", "too_large", "swaps"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `prepare` leaves it, but for the size of the models."""
    folder = tmp_path_factory.mktemp("models") / "models"
    tiny_bundle(folder / "patchcore-f32", tiny_bank(1))
    tiny_bundle(folder / "vae-f32")
    images = np.random.default_rng(3).integers(0, 255, (PICTURES, SIDE, SIDE, 3), np.uint8)
    np.save(folder / "pictures.npy", images)
    return folder


def tried(
    folder: Path, out: Path, **variables: str
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    command = [sys.executable, "-m", "benchmarks.gpu", "run", str(folder), "--calls", "64",
               "--swaps", "4", "--out", str(out)]  # fmt: skip
    env = {**os.environ, **environment("10.16.1.11", "rtx", **variables)}
    said = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    return said, json.loads(out.read_text())


def test_all_steps_hold_on_the_double(folder: Path, tmp_path: Path) -> None:
    said, found = tried(folder, tmp_path / "gpu.json")
    assert said.returncode == 0, said.stdout + said.stderr
    assert set(found) == STEPS
    for about in found["models"].values():
        assert about["flips"] == 0
        assert about["batch"] > 1
    assert found["load"]["calls"] == 64
    assert found["load"]["bytes_lost"] == found["swaps"]["bytes_lost"] == 0
    assert "MiB of the GPU's memory are free" in found["too_large"]
    assert said.stdout.endswith("All of it held.\n")


def test_a_gpu_that_fails_is_named_and_the_other_steps_are_tried(
    folder: Path, tmp_path: Path
) -> None:
    said, found = tried(folder, tmp_path / "gpu.json", KENSA_DOUBLE_FAIL_EXECUTION="200")
    assert said.returncode == 1
    assert "only a new process mends" in said.stdout
    assert found["models"]["patchcore-f32"]["flips"] == 0


def test_without_a_gpu_it_says_what_is_missing_and_tries_nothing(
    folder: Path, tmp_path: Path
) -> None:
    said, found = tried(folder, tmp_path / "gpu.json", KENSA_DOUBLE_MISSING="device")
    assert said.returncode == 1
    assert "FAILED the machine: " in said.stdout
    assert found == {}
