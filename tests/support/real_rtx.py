"""TensorRT for RTX itself, where it is installed: native code, so in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from support.project import ROOT

VERSION = "1.7"  # that the names and sentences were taken from

needs_rtx = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None,
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
