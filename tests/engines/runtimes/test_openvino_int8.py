"""Whether int8 may be left to a CPU is read off what Linux says of it."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from engines.runtimes import openvino_int8


@pytest.mark.parametrize(
    ("machine", "flags", "adds_up"),
    [
        ("x86_64", "fpu avx2 avx512f avx512bw", False),
        ("x86_64", "fpu avx2 avx512f avx512_vnni", True),
        ("x86_64", "fpu avx2 avx_vnni", True),
        ("x86_64", "fpu amx_int8", True),
        ("x86_64", "fpu avx512_vnni_of_another_kind", False),
        ("x86_64", None, False),  # nothing is known
        ("aarch64", None, True),
    ],
)
def test_x86_needs_vnni(
    machine: str, flags: str | None, adds_up: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = tmp_path / "cpuinfo"
    if flags is not None:
        said.write_text(f"processor\t: 0\nmodel name\t: A CPU\nflags\t\t: {flags}\n")
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(openvino_int8, "CPUINFO", said)
    assert openvino_int8.cpu_adds_int8_up.__wrapped__() is adds_up
