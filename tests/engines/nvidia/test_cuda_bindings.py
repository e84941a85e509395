"""cuda-bindings behind pycuda's names: its double has the names and arguments of the real one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engines.errors import NoTensorRT
from engines.nvidia import driver
from support.double import DOUBLES, RTX, doubled
from support.project import ROOT

USED = (ROOT / "engines/nvidia/cuda_bindings.py").read_text()
FUNCTIONS = sorted(set(re.findall(r'"(cu[A-Z]\w+)"', USED)))
DOUBLE = (DOUBLES / "rtx/cuda/bindings/driver.py").read_text()


def test_every_function_that_is_used_is_doubled() -> None:
    assert len(FUNCTIONS) > 20
    doubled_ones = set(re.findall(r"^def (cu\w+)\(", DOUBLE, re.MULTILINE))
    assert {*FUNCTIONS} <= doubled_ones


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_real_package_has_the_function_with_as_many_arguments(name: str) -> None:
    real = pytest.importorskip("cuda.bindings.driver", reason="comes with the extra dev")
    function = getattr(real, name)
    theirs = _arguments(function.__doc__.splitlines()[0])
    ours = _arguments(re.search(rf"^def {name}\((.*)\) ->", DOUBLE, re.MULTILINE)[0])  # type: ignore[index]
    assert ours == theirs


def _arguments(line: str) -> list[str]:
    """The names in `cuMemAlloc(size_t bytesize)`, or in `def cuMemAlloc(bytesize: int)`."""
    inside = line[line.index("(") + 1 : line.rindex(")")]
    names = [one.split(":")[0].strip().split(" ")[-1] for one in inside.split(",")]
    return [name for name in names if name]


@pytest.mark.parametrize(
    "name",
    sorted(set(re.findall(r"driver\.(CU\w+(?:\.CU_\w+)?)", USED))),
)
def test_the_real_package_has_the_constant(name: str) -> None:
    found = pytest.importorskip("cuda.bindings.driver", reason="comes with the extra dev")
    for part in name.split("."):
        found = getattr(found, part)


def test_without_a_driver_the_real_package_is_told_apart_in_a_sentence() -> None:
    pytest.importorskip("cuda.bindings.driver", reason="comes with the extra dev")
    program = (
        "from engines.nvidia import cuda_bindings\n"
        "print(cuda_bindings.no_driver())\n"
        "try: cuda_bindings.init()\n"
        "except cuda_bindings.Error as error: print('Error', error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    if done.stdout.startswith("None"):
        pytest.skip("there is a driver here")
    assert done.stdout.startswith("there is no libcuda.so.1\nError ")


def test_memory_goes_to_the_device_and_back() -> None:
    with doubled(RTX, device="rtx") as double:
        cuda = driver.load()
        cuda.init()
        context = cuda.Device(0).retain_primary_context()
        context.push()
        free, total = cuda.mem_get_info()
        stream, event = cuda.Stream(1), cuda.Event(cuda.event_flags.BLOCKING_SYNC)
        host = cuda.pagelocked_empty((2, 3), np.float32)
        host[:] = [[1, 2, 3], [4, 5, 6]]
        device = cuda.mem_alloc(host.nbytes)
        cuda.memcpy_htod_async(device, host, stream)
        back = cuda.pagelocked_empty((2, 3), np.float32)
        cuda.memcpy_dtoh_async(back, device, stream)
        event.record(stream)
        event.synchronize()
        assert back.tolist() == [[1, 2, 3], [4, 5, 6]]
        alone = np.zeros(3, np.float32)
        cuda.memcpy_dtoh(alone, device)
        assert alone.tolist() == [1, 2, 3]
        cuda.memcpy_htod(device, np.float32([9, 9, 9]))
        cuda.memcpy_dtoh(alone, device)
        assert alone.tolist() == [9, 9, 9]
        with pytest.raises(ValueError, match="contiguous"):
            cuda.memcpy_htod(device, back[:, 0])
        with pytest.raises(cuda.MemoryError, match="cuMemAlloc failed: out of memory"):
            cuda.mem_alloc(total + 1)
        with pytest.raises(cuda.Error, match="invalid argument"):
            host.base.get_device_pointer()  # it was not mapped
        for memory in (device, host.base, back.base):
            memory.free()
            memory.free()  # does nothing
        del stream, event
        assert cuda.mem_get_info() == (free, total)
        context.pop()
        context.detach()
        double.assert_clean()


def test_mapped_memory_has_an_address_of_the_device() -> None:
    with doubled(RTX, device="agx-orin") as double:
        cuda = driver.load()
        cuda.init()
        context = cuda.Device(0).retain_primary_context()
        assert cuda.Device(0).get_attribute(cuda.device_attribute.INTEGRATED) == 1
        context.push()
        host = cuda.pagelocked_empty((4,), np.uint8, mem_flags=cuda.host_alloc_flags.DEVICEMAP)
        assert host.base.get_device_pointer() != 0
        host.base.free()
        context.pop()
        context.detach()
        double.assert_clean()


def test_where_neither_package_is_the_sentence_names_the_one_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(driver, "find_spec", lambda name: None)
    assert not driver.is_installed()
    assert not driver.has_driver()
    with doubled(), pytest.raises(NoTensorRT, match=r"pip install 'kensa\[jetson\]'"):
        driver.load()
    with doubled(RTX, device="rtx"), pytest.raises(NoTensorRT, match=r"kensa\[rtx\]"):
        driver.load()


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"cuda.py": ""}, "cuda-bindings is not in this environment"),
        (
            {"cuda/__init__.py": "", "cuda/bindings/__init__.py": "raise ImportError('no libx')"},
            "cuda-bindings is here, but does not load (no libx): install it anew",
        ),
    ],
    ids=["another package of that name", "one that does not load"],
)
def test_a_package_that_is_no_use_is_said_and_stops_nothing(
    files: dict[str, str], words: str, tmp_path: Path
) -> None:
    for name, text in {**files, "tensorrt_rtx.py": ""}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    program = (
        "from engines.store.plan_record import Machine, builds_plans, has_tensorrt\n"
        "print(has_tensorrt(), builds_plans())\n"
        "try: Machine.read()\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env={"PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    worked, said = done.stdout.splitlines()
    assert worked == "False True"
    assert said.startswith("NoTensorRT ")
    assert words in said
