"""Which TensorRT is here, why that one, and which GPUs it builds for."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from engines.errors import BadRequest, NoTensorRT
from engines.nvidia import library
from engines.nvidia.library import FULL, RTX, TARGET, capabilities_of, here, why
from engines.store.plan_record import Fingerprint, Machine, builds_plans, has_tensorrt
from support import double as doubles
from support.double import doubled
from support.project import ROOT
from support.real_library import in_a_process, needs_rtx

PC = Machine("1.7.1.116", "8.9", "NVIDIA GeForce RTX 4070", None, "tensorrt_rtx")


def test_a_pc_runs_tensorrt_for_rtx_without_pycuda() -> None:
    with doubled(doubles.RTX, device="rtx") as double:
        assert here() is RTX
        assert "TensorRT for RTX is taken, because TensorRT itself is not" in why()
        assert has_tensorrt()
        assert builds_plans()
        assert Machine.read() == PC
        double.assert_clean()


def test_a_jetson_runs_the_full_one() -> None:
    with doubled():
        assert here() is FULL
        assert why().startswith("TensorRT is taken, because it is in this environment")
        assert Machine.read().library == "tensorrt"


def test_where_both_are_the_full_one_is_taken_and_builds_for_no_other_machine() -> None:
    """In a process, whose environment has both."""
    both = os.pathsep.join([str(doubles.DOUBLES), str(doubles.DOUBLES / "rtx")])
    program = (
        "from engines.nvidia.library import here, why, capabilities_of\n"
        "print(here().module, why())\n"
        "try: capabilities_of('rtx')\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**doubles.environment(), "PYTHONPATH": both},
        capture_output=True,
        text=True,
        timeout=60,
    )
    first, second = done.stdout.splitlines()
    assert first.startswith("tensorrt TensorRT is taken")
    assert "TensorRT for RTX is here as well and is passed over" in first
    assert second.startswith("NoTensorRT This environment has TensorRT, which builds for its own")


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("libcuda", "NVIDIA's driver is not to be found (there is no libcuda.so.1): on a PC with an"
         " RTX card install it"),
        ("device", "CUDA finds no GPU to use (cuInit failed: no CUDA-capable device is detected):"
         " nvidia-smi must show it"),
    ],
)  # fmt: skip
def test_what_a_pc_lacks_is_said_with_what_to_do(
    missing: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with doubled(doubles.RTX, device="rtx"):
        monkeypatch.setenv("KENSA_DOUBLE_MISSING", missing)
        with pytest.raises(NoTensorRT) as caught:
            Machine.read()
        assert words in str(caught.value)
        assert builds_plans()  # for others
        assert has_tensorrt() is (missing != "libcuda")


# ---- targets ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "named"),
    [
        ("rtx", None),
        ("rtx:SM86", ("SM86",)),
        ("rtx:SM120,SM86,SM120", ("SM86", "SM120")),
    ],
)
def test_a_target_names_gpus(target: str, named: tuple[str, ...] | None) -> None:
    with doubled(doubles.RTX, device="rtx"):
        assert capabilities_of(target) == named


def test_a_gpu_that_the_library_does_not_know_is_refused_with_those_that_it_does() -> None:
    with doubled(doubles.RTX, device="rtx"), pytest.raises(BadRequest) as caught:
        capabilities_of("rtx:SM86,SM90,SM20")
    words = "no GPU of the compute capability SM90, SM20, only for SM75, SM80, SM86"
    assert words in str(caught.value)


@pytest.mark.parametrize("target", ["", "cuda", "rtx:", "rtx:86", "rtx:SM86,", "rtx SM86"])
def test_what_is_no_target_is_refused(target: str) -> None:
    import re

    assert re.fullmatch(TARGET, target) is None


def test_without_the_library_there_is_no_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "find_spec", lambda name: None)
    with pytest.raises(NoTensorRT, match=r"pip install 'kensa\[rtx\]'"):
        capabilities_of("rtx")


@needs_rtx
def test_the_real_library_has_what_is_used_of_it() -> None:
    program = (
        "from engines.nvidia.library import possible, RTX\n"
        "trt = RTX.load()\n"
        "print(*possible())\n"
        "print(trt.__version__, trt.nptype(trt.DataType.HALF).__name__)\n"
        "print(trt.DynamicShapesKernelSpecializationStrategy.EAGER)\n"
        "for name in ('create_runtime_cache', 'set_runtime_cache',"
        " 'dynamic_shapes_kernel_specialization_strategy'): getattr(trt.IRuntimeConfig, name)\n"
        "for name in ('serialize', 'deserialize'): getattr(trt.IRuntimeCache, name)\n"
        "for name in ('create_runtime_config', 'device_memory_size_v2', 'refittable'):"
        " getattr(trt.ICudaEngine, name)\n"
    )
    done = in_a_process(program)
    assert done.returncode == 0, done.stderr
    first, second, third = done.stdout.splitlines()
    assert {"SM75", "SM86", "SM120"} <= {*first.split()}
    assert second.endswith("float16")
    assert "EAGER" in third


# ---- the record ---------------------------------------------------------------------------------

OTHERS = Machine("1.7.1.116", "SM86,SM120", "", None, "tensorrt_rtx")


@pytest.mark.parametrize(
    ("built", "machine", "words"),
    [
        (replace(OTHERS, compute="SM86,SM89"), PC, []),
        (PC, replace(PC, device="NVIDIA RTX 4000 Ada"), []),  # the capability is what counts
        (OTHERS, PC, ["GPUs of SM86, SM120 (here NVIDIA GeForce RTX 4070, SM89)"]),
        (
            replace(OTHERS, tensorrt="1.6.0.1", compute="SM89"),
            PC,
            ["TensorRT for RTX 1.6.0.1 (here 1.7.1.116)"],
        ),
        (
            OTHERS,
            Machine("10.3.0", "8.7", "Orin", "36.4.0"),
            ["TensorRT for RTX 1.7.1.116 (here TensorRT 10.3.0)"],
        ),
        (
            Machine("10.3.0", "8.7", "Orin", "36.4.0"),
            PC,
            ["TensorRT 10.3.0 (here TensorRT for RTX 1.7.1.116)"],
        ),
    ],
)
def test_a_plan_is_for_the_library_and_the_gpus_that_it_names(
    built: Machine, machine: Machine, words: list[str]
) -> None:
    assert built.differences(machine) == words


def test_a_record_names_library_version_and_gpus_and_that_nobody_proved_it(tmp_path: Path) -> None:
    made = Fingerprint(OTHERS, "a" * 64, "b" * 64, "f16", 4, None, False, 1, proved=False)
    made.write(tmp_path)
    assert Fingerprint.read(tmp_path) == made
    text = (tmp_path / "model.plan.json").read_text()
    assert '"SM86,SM120"' in text
    assert '"tensorrt_rtx"' in text


def test_the_record_of_a_jetson_is_what_it_was(tmp_path: Path) -> None:
    """So that an older Kensa reads it."""
    machine = Machine("10.3.0", "8.7", "Orin", "36.4.0")
    Fingerprint(machine, "a" * 64, "b" * 64, "f16", 4, None, True, 1).write(tmp_path)
    text = (tmp_path / "model.plan.json").read_text()
    assert "proved" not in text
    assert "library" not in text
