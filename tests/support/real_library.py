"""NVIDIA's TensorRT for RTX, which is a wheel and parses and builds without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from support.double import environment
from support.project import ROOT

LIBRARY = "tensorrt_rtx"
VERSION = "1.7"  # that the names and sentences were taken from
TESTS = Path(__file__).parents[1]

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec(LIBRARY) is None,
    reason="tensorrt-rtx-cu13 is not installed: the extra dev brings it on x86-64 Linux",
)


def in_a_process(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a program in the repository."""
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@cache
def observed(module: str, area: str, version: str = "") -> dict[str, Any]:
    """What came of using the library, or a version of the double, in a process of its own.

    See `support.observed`.
    """
    variables = {**os.environ, "PYTHONPATH": "", "CUDA_VISIBLE_DEVICES": ""}
    variables |= environment(version, "rtx") if version else {}
    variables["PYTHONPATH"] = f"{TESTS}{os.pathsep}{variables['PYTHONPATH']}"
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "support.observed", module, area, folder],
            env=variables, cwd=folder, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    assert done.returncode == 0, f"{module} {area}: {done.returncode}\n{done.stderr[-3000:]}"
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def only_numbers(members: Any) -> bool:
    """Whether `observed(..., "names")` says this of an enum."""
    return isinstance(members, dict) and all(isinstance(one, int) for one in members.values())
