"""A Python without the packages is told so by every command, in one sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engines import missing_packages
from support.project import ROOT

COMMANDS = [
    *([f"{name}.py"] for name in ("retrain", "convtrt", "evaluate", "tune", "import_anomalib")),
    *([f"bin/{kind}"] for kind in ("patchcore", "padim", "efficientad", "vae")),
    ["-m", "app"],
    *(["-m", "app", name] for name in ("learn", "doctor", "threshold", "keys")),
    *(["-m", f"workers.{name}"] for name in ("learn", "distil", "sample_parts")),
]  # fmt: skip


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has the standard library only."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    return folder / "bin" / "python"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: " ".join(words))
def test_a_python_without_packages_is_told_what_to_do(command: list[str], bare: Path) -> None:
    without = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [bare, *command], cwd=ROOT, env=without, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {bare} has no package "), done.stderr
    assert done.stderr.count("\n") == 1
    assert "activate" in done.stderr or "pip install" in done.stderr


def test_the_sentence_names_the_environment_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(missing_packages, "ROOT", tmp_path)
    assert "pip install 'kensa[train]'" in missing_packages.sentence("cv2")
    (tmp_path / "pyproject.toml").touch()
    assert f"pip install '{tmp_path}[train]'" in missing_packages.sentence("cv2")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    assert f"source {tmp_path}/.venv/bin/activate" in missing_packages.sentence("cv2")
    monkeypatch.setattr("sys.prefix", str(tmp_path / ".venv"))
    assert "pip install" in missing_packages.sentence("cv2"), "it is active, and lacks them"
    (tmp_path / ".venv").rename(tmp_path / "elsewhere")
    (tmp_path / ".venv").symlink_to(tmp_path / "elsewhere")
    assert "pip install" in missing_packages.sentence("cv2"), "the same, behind a link"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: " ".join(words))
def test_ctrl_c_while_a_command_is_loaded_is_no_traceback(
    command: list[str], tmp_path: Path
) -> None:
    for package in ("cv2", "numpy", "pydantic", "starlette"):  # each loads one of them
        (tmp_path / f"{package}.py").write_text("raise KeyboardInterrupt")
    argument = [] if command == ["-m", "app"] else ["x"]
    done = subprocess.run(
        [sys.executable, *command, *argument], cwd=ROOT,
        capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (130, "error: Stopped.\n")
