"""Plans for GPUs of other machines, by TensorRT for RTX itself, on a machine without a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engines.serving.opening import Opening, open_model
from engines.store.bundle import ONNX, PLAN, PLAN_RECORD
from engines.store.plan_record import Fingerprint
from support.plans import tiny_bank, tiny_bundle
from support.real_library import in_a_process, needs_rtx

REBUILD = """
import json, sys
from pathlib import Path
from engines.errors import KensaError
from support.progress import Said
from workers.converting.plan.rebuild import rebuild
said = Said()
said.phase = lambda name: lambda done, total: said.lines.append(f"{name} {done}")
try:
    report = rebuild(Path(sys.argv[1]), Path(sys.argv[2]), said, workspace=64, use_dla=False,
                     cache=None, target=sys.argv[3])
except KensaError as error:
    print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
else:
    print(json.dumps({"plan": report["plan"], "said": said.lines,
                      "torch": "torch" in sys.modules}))
"""
CONVERT = """
import os, signal, sys
import convtrt
from workers.progress import Progress

class Interrupted(Progress):
    def phase(self, name):
        if name == "build":
            return lambda done, total: os.kill(os.getpid(), signal.SIGINT)
        return super().phase(name)

convtrt.Progress = Interrupted
sys.exit(convtrt.main(sys.argv[1:]))
"""


def built(source: Path, target: Path, gpus: str) -> dict[str, Any]:
    """What `rebuild` says, in a process of its own."""
    done = in_a_process(REBUILD, source, target, gpus)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def flags(trained: Path, out: Path, *more: str) -> list[object]:
    names = ("--weights_pth", "--meta_json", "--memory_bank")
    files = ("model.pth", "meta.json", "memory_bank.npz")
    paths = [one for name, file in zip(names, files, strict=True) for one in (name, trained / file)]
    return ["--model", "patchcore", *paths, "--out_dir", out, *more]


@needs_rtx
def test_the_command_makes_a_plan_and_the_server_without_a_gpu_says_that_it_is_for_one(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    program = "import sys, convtrt; sys.exit(convtrt.main(sys.argv[1:]))"
    done = in_a_process(program, *flags(trained, out, "--target", "rtx:SM86"))
    assert done.returncode == 0, done.stderr
    assert "for GPUs of SM86" in done.stdout
    assert "not proved: the machine that serves compares it" in done.stdout
    record = Fingerprint.read(out)
    assert record is not None
    assert (record.machine.library, record.machine.capabilities) == ("tensorrt_rtx", ("SM86",))
    assert (record.proved, record.refittable, record.max_batch) == (False, False, 4)
    assert (out / PLAN).stat().st_size > (out / ONNX).stat().st_size / 2
    caplog.set_level("INFO")
    model = open_model(out, "part", "1", Opening(batching=False))
    try:
        assert model.runtime.name == "openvino"
        assert model.stale is None  # so no job is begun that could build nothing here
        assert model.unused is not None
        assert "model.plan is for TensorRT for RTX 1." in model.unused
        assert "and GPUs of SM86, and not used here: " in model.unused
        assert model.unused.endswith("OpenVINO runs model.onnx.")
        assert model.unused in caplog.text
    finally:
        model.runtime.close()


@needs_rtx
def test_one_plan_is_for_several_gpus_and_needs_no_torch(tmp_path: Path) -> None:
    source = tiny_bundle(tmp_path / "a", tiny_bank(1))
    found = built(source, tmp_path / "b", "rtx:SM120,SM86")
    assert found["plan"]["gpus"] == ["SM86", "SM120"]
    assert found["plan"]["proved"] is False
    assert found["plan"]["bank_rows"] == 150
    assert found["torch"] is False
    assert "build 100" in found["said"]
    again = built(tmp_path / "b", tmp_path / "c", "rtx:SM86")
    assert again["plan"]["gpus"] == ["SM86"]


@needs_rtx
def test_where_no_gpu_is_named_those_are_left_out_that_cannot_run_the_graph(tmp_path: Path) -> None:
    found = built(tiny_bundle(tmp_path / "a", tiny_bank(1)), tmp_path / "b", "rtx")
    assert "SM75" not in found["plan"]["gpus"]
    assert {"SM80", "SM86", "SM89", "SM120"} <= {*found["plan"]["gpus"]}
    assert "not for SM75 (Turing): such a card needs OpenVINO for this graph" in found["said"]


@needs_rtx
@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("rtx:SM75", "BuildFailed: TensorRT for RTX 1."),
        ("rtx:SM75,SM86", "cannot run this graph on a Turing card (SM75)"),
        ("rtx:SM90", "BadRequest: TensorRT for RTX 1."),
        ("rtx:SM86,SM20", "no GPU of the compute capability SM20, only for SM75, SM80, SM86"),
    ],
)
def test_a_gpu_for_which_there_is_no_plan_is_refused(
    target: str, words: str, tmp_path: Path
) -> None:
    found = built(tiny_bundle(tmp_path / "a", tiny_bank(1)), tmp_path / "b", target)
    assert words in found["error"]
    assert not (tmp_path / "b" / PLAN).exists()


@needs_rtx
def test_a_build_that_is_interrupted_leaves_nothing(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "there" / "out"
    done = in_a_process(CONVERT, *flags(trained, out, "--target", "rtx:SM86"))
    assert done.returncode == 130, done.stderr
    assert "Stopped. Nothing was changed." in done.stderr
    left = [path.name for path in (tmp_path / "there").rglob("*")] if out.parent.exists() else []
    assert left == []


@needs_rtx
def test_the_same_graph_keeps_its_plan(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    program = "import sys, convtrt; sys.exit(convtrt.main(sys.argv[1:]))"
    for how in ("built in", "kept in"):
        done = in_a_process(program, *flags(trained, out, "--target", "rtx:SM86,SM89"))
        assert done.returncode == 0, done.stderr
        assert how in done.stdout
    record = json.loads((out / PLAN_RECORD).read_text())
    assert record["proved"] is False
    assert record["machine"]["compute"] == "SM86,SM89"


@needs_rtx
def test_a_workspace_in_which_nothing_fits_is_named(trained: Path, tmp_path: Path) -> None:
    program = "import sys, convtrt; sys.exit(convtrt.main(sys.argv[1:]))"
    for workspace, words in (
        ("1", "made no plan, because the workspace is too small: allow more with --workspace"),
        ("0", "--workspace 0: at least 1 MiB"),
    ):
        more = ("--target", "rtx:SM86", "--workspace", workspace)
        done = in_a_process(program, *flags(trained, tmp_path / "out", *more))
        assert done.returncode == 2
        assert words in done.stderr
        assert not (tmp_path / "out").exists()
