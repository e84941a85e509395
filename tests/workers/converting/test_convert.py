"""From weights to a plan, as the command and the jobs do it; on the double of TensorRT.

How a plan is made is in test_build.py; here are real models, real commands and real jobs.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
import torch
from pydantic import ValidationError

from engines.errors import BadBundle, BadRequest, NoTensorRT, NoWorker
from engines.files import sha256
from engines.meta import Meta
from engines.queue.job_folder import JobFolder
from engines.queue.job_requests import ConvertRequest
from engines.queue.protocol import PACE
from engines.runtimes import parity
from engines.runtimes.openvino import OpenVINORuntime
from engines.store import plan_record as plans
from engines.store.bundle import ONNX, PLAN, PLAN_RECORD, Bundle
from engines.store.golden import GOLDEN, Golden
from engines.store.known_scores import SCORES, KnownScores
from engines.store.plan_record import Fingerprint
from engines.store.regions import REGIONS
from engines.store.versions import Store
from support import double as doubles
from support.double import BUILDING, DOUBLES, RTX, doubled, environment, reports
from support.progress import Said
from support.project import ROOT, run
from support.waiting import until
from workers import models
from workers.commands import summarise_conversion
from workers.converting import convert as converting
from workers.converting import export, int8
from workers.converting.convert import Convert, convert
from workers.converting.export import export_onnx
from workers.converting.graphs import difference
from workers.evaluation.evaluate import Evaluate, evaluate
from workers.jobs import job_process as jobs
from workers.learning.retrain import Retrain, retrain
from workers.progress import Progress
from workers.sample_parts.write_dataset import write_dataset

QUIET = Progress(quiet=True)
USERS = (*BUILDING, "engines.runtimes.tensorrt", "engines.runtimes.cuda")
CATEGORY = "sample_bracket"
SIDE = 64  # pixels
KINDS: dict[str, dict[str, Any]] = {
    "patchcore": {"backbone": "resnet18", "layers": ["layer1"], "coreset_ratio": 0.02},
    "padim": {"backbone": "resnet18", "layers": ["layer1"], "n_features": 8},
    "vae": {"latent_dim": 8, "learning_rate": 1e-3},
}


def train(kind: str, data: Path, out: Path, before: Path | None = None, **asked: Any) -> Path:
    """What retrain.py leaves: a first training, or one on top of the one before."""
    out.parent.mkdir(parents=True, exist_ok=True)
    meta = out.with_name(f"{out.name}.json")
    if before is None:
        meta.write_text(json.dumps({"model": kind, "image_size": SIDE, **KINDS[kind]}))
        weights: str | Path = "untrained" if "backbone" in KINDS[kind] else ""
    else:
        shutil.copyfile(before / "meta.json", meta)
        weights = before / "model.pth"
    learned = {"patchcore": "load_bank", "padim": "load_stats"}.get(kind)
    file = {"patchcore": "memory_bank.npz", "padim": "stats.npz"}.get(kind)
    more = asked | ({learned: before / file} if before and learned and file else {})
    retrain(Retrain(kind, CATEGORY, data, out, meta, str(weights) or None, **more), QUIET)  # type: ignore[arg-type]
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Few drawn parts, and small, because every picture costs time here."""
    return write_dataset(tmp_path_factory.mktemp("few"), train=8, normal=3, per_kind=1, size=96)


@pytest.fixture(scope="module")
def few(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Kind -> what retrain.py leaves. Tests do not change it."""
    root, made = tmp_path_factory.mktemp("trained"), {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = train(kind, data, root / kind)
        return Path(made[kind])

    return get


def request(trained: Path, out: Path, **changes: Any) -> Convert:
    meta = Meta.read(trained / "meta.json")
    return Convert(meta.model, trained / meta.weights_pth, trained / "meta.json", out, **changes)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_update_of_what_was_converted_goes_on_from_the_scores_of_its_training(
    few: Callable[[str], Path], tmp_path: Path
) -> None:
    """So the limit comes from the normal parts of both."""
    trained, engine = few("patchcore"), tmp_path / "engine"
    convert(request(trained, engine), QUIET)
    meta = Meta.read(engine / "meta.json")
    known = KnownScores.read(trained)
    assert len(known) == 8
    assert (meta.files or {})[SCORES] == sha256(engine / SCORES)
    more = write_dataset(tmp_path / "more", train=8, normal=3, per_kind=1, size=96, seed=900)
    updated = train("patchcore", more, tmp_path / "updated", before=engine)
    pooled = Meta.read(updated / "meta.json").calibration or {}
    assert (meta.calibration or {})["normals"] == 8 + 3  # and those of the test images
    assert pooled["normals"] == 8 + 8 + 3
    assert pooled["weights"] == "untrained"
    assert KnownScores.read(updated).scores[:8] == pytest.approx(known.scores)


def test_a_budget_that_was_asked_for_once_is_kept_by_updates(
    few: Callable[[str], Path], tmp_path: Path
) -> None:
    trained = few("patchcore")
    meta = Meta.read(trained / "meta.json")
    budget = {**(meta.calibration or {}), "false_rejects": 0.02, "cap": 0.1}
    before = Path(shutil.copytree(trained, tmp_path / "before"))
    meta.with_(calibration=budget).write(before / "meta.json")
    more = write_dataset(tmp_path / "more", train=4, normal=3, per_kind=1, size=96, seed=900)
    updated = train("patchcore", more, tmp_path / "updated", before=before)
    found = Meta.read(updated / "meta.json").calibration or {}
    assert (found["false_rejects"], found["cap"]) == (0.02, 0.1)


def test_the_regions_that_were_learned_with_are_served_and_measured(
    data: Path, tmp_path: Path
) -> None:
    white = np.zeros((96, 96), np.uint8)
    white[:, :30] = 255
    cv2.imwrite(str(tmp_path / "mask.png"), white)
    trained = train("vae", data, tmp_path / "trained", regions=tmp_path / "mask.png")
    engine = tmp_path / "engine"
    convert(request(trained, engine), QUIET)
    bundle = Bundle.open(engine)
    regions = bundle.regions()
    assert regions is not None
    assert (bundle.meta.files or {})[REGIONS] == sha256(engine / REGIONS)
    model = models.module("vae").build(bundle.meta, engine / "model.pth")
    golden = Golden.read(engine, SIDE)
    assert golden is not None
    whole = models.module("vae").scores(model, [golden.images])
    models.count_only(model, regions, bundle.meta)
    expected = models.module("vae").scores(model, [golden.images])
    assert (expected < whole).any()
    runtime = OpenVINORuntime.open(bundle)
    np.testing.assert_allclose(runtime.infer(golden.images)[0], expected, rtol=1e-3)
    runtime.close()
    report = evaluate(Evaluate(engine, CATEGORY, data, tmp_path / "page"), QUIET)
    assert report["model"]["never_counts"] == 0.3125
    assert "31.2% of a picture" in (tmp_path / "page/evaluation.html").read_text()


# ---- the command ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def commanded(
    few: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str, dict[str, Any]]:
    """The folder that convtrt.py leaves, what it says, and what the double saw."""
    trained, root = few("patchcore"), tmp_path_factory.mktemp("command")
    (root / "seen").mkdir()
    done = run(
        "convtrt.py", "--model", "patchcore", "--weights_pth", trained / "model.pth",
        "--meta_json", trained / "meta.json", "--fp16", "--out_dir", root / "engine",
        XDG_CACHE_HOME=str(root / "cache"), **environment(KENSA_DOUBLE_REPORT=str(root / "seen")),
    )  # fmt: skip
    (seen,) = reports(root / "seen")
    assert [path.suffix for path in (root / "cache" / "kensa").iterdir()] == [".bin"]
    return root / "engine", done.stdout + done.stderr, seen


def test_the_command_leaves_a_plan_and_says_how_well_it_agrees(
    commanded: tuple[Path, str, dict[str, Any]],
) -> None:
    folder, said, seen = commanded
    meta = Meta.read(folder / "meta.json")
    assert {ONNX, PLAN, PLAN_RECORD, "report.json"} <= {*(meta.files or {})}
    assert "plan         model.plan, f16, built in" in said
    assert "for up to 4 images at once, a bank of up to" in said
    assert "parity       model.plan: raw scores within" in said
    assert "workspace: 1,075 MiB of the 4,096 that --workspace allows" in said
    assert (seen["builds"], seen["crashes"], seen["alive"]) == (1, [], {})


def test_the_plan_scores_as_torch_does_in_the_runtime_that_serves(
    commanded: tuple[Path, str, dict[str, Any]],
) -> None:
    folder = commanded[0]
    bundle = Bundle.open(folder)
    golden = Golden.read(folder, SIDE)
    assert golden is not None
    expected = bundle.report()["golden_scores"]
    assert len(expected) == len(golden.images)
    with doubled(users=USERS):
        runtimes = importlib.import_module("engines.runtimes.tensorrt")
        runtime = runtimes.TensorRTRuntime(folder / PLAN, bundle.memory_bank(), precision="f16")
        scores, _ = runtime.infer(golden.images)
        runtime.close()
        sys.modules["engines.runtimes.cuda"].gpu().close()  # type: ignore[attr-defined]
    np.testing.assert_allclose(scores, expected, rtol=parity.HALF_LIMIT)


def test_a_build_that_is_stopped_or_killed_leaves_the_old_files(
    commanded: tuple[Path, str, dict[str, Any]], few: Callable[[str], Path], tmp_path: Path
) -> None:
    trained, before = few("patchcore"), files_of(commanded[0])
    slow = environment(KENSA_DOUBLE_BUILD_SECONDS="120", XDG_CACHE_HOME=str(tmp_path))
    running = {}
    for how in (signal.SIGKILL, signal.SIGINT):
        engine = shutil.copytree(commanded[0], tmp_path / how.name / "engine")
        running[how] = subprocess.Popen(
            [sys.executable, ROOT / "convtrt.py", "--model", "patchcore", "--weights_pth",
             trained / "model.pth", "--meta_json", trained / "meta.json", "--out_dir", engine],
            env={**os.environ, **slow}, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    for how, process in running.items():
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("workspace:"):  # which is said just before the build
                break
        process.send_signal(how)
        rest = process.stderr.read()
        assert process.wait(30) == (130 if how == signal.SIGINT else -how), rest
        if how == signal.SIGINT:
            assert rest == "error: Stopped. Nothing was changed.\n"
        assert files_of(tmp_path / how.name / "engine") == before
        Bundle.open(tmp_path / how.name / "engine")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--int8", "--fp16"], "either --fp16 or --int8"),
        (["--data_root", "data"], "--data_root and --category go together"),
        (["--data_root", "data", "--category", "c"], "--category is for --int8"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import convtrt

    plain = ["--model", "vae", "--weights_pth", "w", "--meta_json", "m", "--out_dir", "o"]
    with pytest.raises(SystemExit):
        convtrt.parse([*plain, *flags])
    assert words in capsys.readouterr().err


# ---- where there is no TensorRT ---------------------------------------------------------------


def test_on_a_pc_the_graph_is_what_is_made(
    few: Callable[[str], Path], tmp_path: Path, no_rtx: None
) -> None:
    said = Said()
    report = convert(request(few("vae"), tmp_path / "engine"), said)
    assert said.lines[-1] == (
        "no model.plan: TensorRT is not on this machine. OpenVINO runs model.onnx as it is;"
        " the same command on the Jetson makes the plan."
    )
    assert "plan" not in report
    assert not (tmp_path / "engine" / PLAN).exists()


def test_on_a_pc_that_builds_for_others_alone_it_is_said_how(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with doubled(RTX, device="rtx"):
        monkeypatch.setenv("KENSA_DOUBLE_MISSING", "libcuda")
        assert converting._about_no_plan() == (
            "no model.plan. NVIDIA's driver is not to be found (there is no libcuda.so.1): on a PC"
            " with an RTX card install it, and start a container with --gpus all. OpenVINO runs"
            " model.onnx as it is; --target rtx makes a plan for PCs with an RTX card."
        )


def test_on_a_jetson_whose_environment_hides_tensorrt_it_is_said_how_to_see_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_rtx: None
) -> None:
    (tmp_path / "release").write_text("# R36 (release), REVISION: 4.0\n")
    monkeypatch.setattr(converting, "L4T_RELEASE", tmp_path / "release")
    said = converting._about_no_plan()
    assert said.startswith("no model.plan. TensorRT's Python bindings are not in this environment")
    assert "python3 -m venv --system-site-packages" in said
    assert said.endswith("OpenVINO runs model.onnx as it is.")


@pytest.mark.parametrize(
    ("missing", "words"),
    [("libcuda", "--runtime nvidia"), ("device", "CUDA finds no GPU"), ("libnvinfer", "library")],
)
def test_a_tensorrt_that_does_not_work_is_said_before_anything_is_done(
    few: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    missing: str,
    words: str,
) -> None:
    said = Said()
    with doubled(users=USERS):
        monkeypatch.setenv("KENSA_DOUBLE_MISSING", missing)
        doubles._forget(())
        with pytest.raises(NoTensorRT, match=words):
            convert(request(few("vae"), tmp_path / "engine"), said)
    assert said.lines == []
    assert list(tmp_path.iterdir()) == []


# ---- trained again ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "how", "version"),
    [("patchcore", "kept", "10.3.0"), ("padim", "refitted", "11.4.0.106"),
     ("vae", "refitted", "10.3.0")],
)  # fmt: skip
def test_what_is_learned_next_needs_no_other_plan(
    few: Callable[[str], Path], data: Path, tmp_path: Path, kind: str, how: str, version: str
) -> None:
    """The exporter names the weights alike; a memory bank that grew by a little has room."""
    more = write_dataset(tmp_path / "more", train=2, normal=3, per_kind=1, size=96, seed=7)
    again = train(kind, more, tmp_path / "again", few(kind))
    with doubled(version, users=USERS) as double:
        first = convert(request(few(kind), tmp_path / "engine"), QUIET)
        second = convert(request(again, tmp_path / "engine"), QUIET)
        assert (first["plan"]["how"], second["plan"]["how"]) == ("built", how), second["plan"]
        assert double.gpu.counts["builds"] == 1
        double.assert_clean()
    assert first["golden_scores"] != second["golden_scores"] or kind == "patchcore"
    bundle = Bundle.open(tmp_path / "engine")
    assert {PLAN, PLAN_RECORD} <= {*(bundle.meta.files or {})}


def test_a_new_bank_is_served_with_the_graph_of_the_version_before(
    few: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is what exporting once more would give, to the byte; the proof is made anew."""
    engine, exports = tmp_path / "engine", list[Path]()

    def noted(graph: Any, inputs: Any, path: Path, opset: Any) -> None:
        exports.append(path)
        export_onnx(graph, inputs, path, opset)

    monkeypatch.setattr(converting, "export_onnx", noted)
    convert(request(few("patchcore"), engine), QUIET)
    more = write_dataset(tmp_path / "more", train=2, normal=3, per_kind=1, size=96, seed=7)
    again = train("patchcore", more, tmp_path / "again", engine)
    assert len(exports) == 1
    said = Said()
    report = convert(request(again, tmp_path / "next", before=engine), said)
    assert len(exports) == 1
    assert "the graph is that of the version before" in said.lines
    assert report["parity"]["onnx"]["ok"]
    anew = convert(request(again, tmp_path / "anew"), QUIET)
    assert len(exports) == 2
    assert anew["golden_scores"] == report["golden_scores"]
    graphs = [tmp_path / name / ONNX for name in ("engine", "next", "anew")]
    assert len({path.read_bytes() for path in graphs}) == 1
    Bundle.open(tmp_path / "next")

    # What is asked for otherwise is exported, and so is what was damaged.
    assert onnx.load(graphs[0]).opset_import[0].version == 17
    convert(request(again, tmp_path / "newer", before=engine, opset=18), QUIET)
    assert onnx.load(tmp_path / "newer" / ONNX).opset_import[0].version == 18
    graphs[0].write_bytes(b"not what was written")
    convert(request(again, engine), QUIET)
    assert graphs[0].read_bytes() == graphs[1].read_bytes()
    assert len(exports) == 4


def test_whatever_changes_a_graph_makes_it_another(
    few: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = few("patchcore")
    meta, weights = Meta.read(trained / "meta.json"), trained / "model.pth"
    bank = np.zeros((20, 4), np.float32)

    def key(meta: Meta = meta, weights: Path = weights, rows: int = 20, opset: Any = 17,
            half: bool = False) -> str:  # fmt: skip
        return export.made_of(meta, weights, bank[:rows], opset, half=half)

    other = tmp_path / "other.pth"
    other.write_bytes(weights.read_bytes() + b"x")
    same = key()
    learned = meta.with_(image_threshold=0.7, image_threshold_auto=3.0, files={"a": "b"})
    assert {key(learned), key(rows=21), key(rows=9)} == {same}
    others = [key(meta.with_(centre_weight=0.5)), key(meta.with_(image_size=96)),
              key(meta.with_(unheard_of=1)), key(weights=other), key(rows=8), key(opset=18),
              key(half=True)]  # fmt: skip
    monkeypatch.setattr(export, "version", lambda name: "another")
    others.append(key())
    monkeypatch.undo()
    monkeypatch.setattr(export, "__file__", str(other))  # our own code is another one
    others.append(key())
    assert len({same, *others}) == len(others) + 1


def test_efficientad_names_its_weights_alike_whatever_it_learned(tmp_path: Path) -> None:
    meta = Meta.parse({"model": "efficientad", "model_size": "small", "image_size": 256})
    kind = models.module("efficientad")
    paths = []
    for name in ("zeros", "random"):
        model = kind.build(meta, "untrained")
        model.learned = True
        with torch.no_grad():
            for weight in model.networks.student.parameters():
                weight.zero_() if name == "zeros" else weight.normal_()
        graph, inputs = kind.graph(model, half=False)
        export_onnx(graph, inputs, tmp_path / name, 17)
        paths.append(tmp_path / name)
    assert difference(*paths) is None
    files = [onnx.load(path).graph for path in paths]
    assert [one.op_type for graph in files for one in graph.node].count("Identity") == 0


def test_half_precision_ends_before_the_distances(commanded: tuple[Path, str, Any]) -> None:
    """A strongly typed network computes each layer in the type that the graph says."""
    model = onnx.shape_inference.infer_shapes(
        onnx.load(commanded[0] / ONNX), strict_mode=True, data_prop=True
    )
    types = {one.name: one.type.tensor_type.elem_type for one in model.graph.value_info}
    types |= {one.name: one.data_type for one in model.graph.initializer}
    for node in model.graph.node:
        kinds = {types[name] for name in node.input if name in types}
        if node.op_type == "Conv":
            assert kinds == {onnx.TensorProto.FLOAT16}, node.name
        if node.op_type in ("MatMul", "ReduceMin", "ReduceSum", "ReduceSumSquare", "Softmax"):
            assert onnx.TensorProto.FLOAT16 not in kinds, node.name


# ---- int8 -------------------------------------------------------------------------------------


def test_int8_says_where_its_ranges_come_from_and_what_it_costs(
    few: Callable[[str], Path], data: Path, tmp_path: Path
) -> None:
    wanted = request(few("vae"), tmp_path / "engine", int8=True, data_root=data, category=CATEGORY)
    report = convert(wanted, QUIET)
    assert report["export"]["precision"] == "int8"
    found = report["int8"]
    assert found["convolutions"] == found["of"] > 3
    assert (found["share"], found["float32"]) == (1.0, [])
    assert found["ranges"] == "8 golden images and 8 training images of sample_bracket"
    assert found["auroc"]["images"] == 8
    assert found["auroc"]["int8"] >= found["auroc"]["float32"] - int8.AUROC_DROP
    assert found["auroc"]["flips"] == 0
    assert 1e-6 < report["parity"]["openvino_f32"]["max_relative"] <= parity.INT8_LIMIT


def test_an_int8_that_would_be_refused_leaves_some_in_float32_and_keeps_the_bound(
    few: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = convert(request(few("vae"), tmp_path / "whole", int8=True), QUIET)
    bound = 0.6 * whole["parity"]["onnx"]["max_relative"]
    monkeypatch.setitem(parity.LIMITS, "int8", bound)
    said = Said()
    report = convert(request(few("vae"), tmp_path / "engine", int8=True), said)
    found = report["int8"]
    left = found["float32"]
    assert 0 < len(left) == found["of"] - found["convolutions"] < found["of"] == whole["int8"]["of"]
    assert 0 < found["share"] < 1
    for name in ("onnx", "openvino_f32"):
        assert 0 < report["parity"][name]["max_relative"] <= bound
    pairs = [node.name for node in onnx.load(tmp_path / "engine" / ONNX).graph.node
             if node.op_type == "Conv" and node.input[1].endswith("_dequantised")]  # fmt: skip
    assert len(pairs) == found["convolutions"]
    assert not set(pairs) & set(left)
    assert "too far off" in said.text
    assert f"{len(left)} of {found['of']} convolutions stay in float32: {left[0]}" in said.text
    summary = "\n".join(summarise_conversion(report, tmp_path))
    assert f"int8         {found['convolutions']} of {found['of']} convolutions" in summary
    assert f"float32      {left[0]}" in summary


@pytest.mark.soak
@pytest.mark.parametrize(("kind", "photos"), [("patchcore", "alien"), ("padim", "hazelnut_toy")])
def test_photos_score_within_4_percent_in_int8_and_no_verdict_changes(
    assets: Path, tmp_path: Path, kind: str, photos: str
) -> None:
    """What docs/commands.md says of its figures."""
    meta = tmp_path / "meta.json"
    known = {
        "patchcore": {"layers": ["layer2", "layer3"], "coreset_ratio": 0.25},
        "padim": {"layers": ["layer1", "layer2", "layer3"], "n_features": 100},
    }
    size = {"image_size": 256, "backbone": "resnet18"}
    meta.write_text(json.dumps({"model": kind, **size, **known[kind]}))
    weights, trained = assets / "weights" / "resnet18.safetensors", tmp_path / "trained"
    retrain(Retrain(kind, photos, assets / "data", trained, meta, str(weights)), QUIET)
    wanted = request(trained, tmp_path / "engine", int8=True, data_root=assets / "data")
    report = convert(replace(wanted, category=photos), QUIET)
    for name in ("onnx", "openvino_f32"):
        assert report["parity"][name]["max_relative"] < 0.04
        assert report["parity"][name]["flips"] == 0
    assert report["int8"]["share"] > 0.5


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        (
            "parity",
            r"No convolution .* may compute in int8: .*raw scores within .*nothing was written. Try"
            " --fp16",
        ),
        (
            "auroc",
            r"No convolution .*, AUROC [\d.]+ in int8, [\d.]+ in float32; nothing was written",
        ),
        ("images", "--int8 needs pictures of normal parts: golden.npz beside the weights"),
    ],
)
def test_int8_is_refused_with_the_figures_and_nothing_is_written(
    few: Callable[[str], Path],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    limit: str,
    words: str,
) -> None:
    trained = Path(shutil.copytree(few("vae"), tmp_path / "trained"))
    wanted = request(trained, tmp_path / "engine", int8=True, data_root=data, category=CATEGORY)
    if limit == "parity":
        monkeypatch.setitem(parity.LIMITS, "int8", 1e-9)
    elif limit == "auroc":
        monkeypatch.setattr(int8, "AUROC_DROP", -1.0)
    else:
        (trained / GOLDEN).unlink()
        wanted = replace(wanted, data_root=None, category=None)
    with pytest.raises((BadBundle, BadRequest), match=words):
        convert(wanted, QUIET)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trained"]


# ---- a full disk ------------------------------------------------------------------------------


def test_a_disk_that_fills_up_leaves_the_old_engine(
    few: Callable[[str], Path], tmp_path: Path
) -> None:
    engine = tmp_path / "engine"
    with doubled(users=USERS) as double:
        convert(request(few("vae"), engine), QUIET)
        before = files_of(engine)
        build = importlib.import_module("workers.converting.plan.build")

        def full(path: Path, plan: Any) -> None:
            path.write_bytes(bytes(plan)[:100])
            raise OSError(errno.ENOSPC, "No space left on device")

        build._write = full
        with pytest.raises(OSError, match="No space left"):
            convert(request(few("vae"), engine, workspace=300), QUIET)
        double.assert_clean()
    assert files_of(engine) == before
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


# ---- jobs -------------------------------------------------------------------------------------


@pytest.fixture
def place(data: Path, tmp_path: Path) -> Path:
    """The data folder of a server, with images."""
    shutil.copytree(data, tmp_path / "kensa" / "datasets")
    return tmp_path / "kensa"


def do(place: Path, job: str, do_what: str, **wanted: Any) -> tuple[dict[str, Any], Path]:
    """A job in this process; how it ended, and the folder of what it published."""
    folder = JobFolder(place, job)
    folder.root.mkdir(parents=True, exist_ok=True)
    progress = jobs.JobProgress(folder, jobs.SPANS)
    ended = jobs.do(place, job, do_what, {"model": "part", **wanted}, progress)
    return ended, Store(place / "models").folder("part", ended["version"])


def test_a_retraining_is_converted_as_the_version_before_was_and_refits_its_plan(
    place: Path,
) -> None:
    first = {"kind": "vae", "meta": {"image_size": SIDE, **KINDS["vae"]}, "category": CATEGORY}
    with doubled(users=USERS) as double:
        do(place, "a", "retrain", convert=False, **first)
        ended, converted = do(place, "b", "convert", fp16=True, workspace=300)
        assert Fingerprint.read(converted)
        ended, again = do(place, "c", "retrain", category=CATEGORY, version=ended["version"])
        report = Bundle.open(again).report()
        assert (report["plan"]["how"], report["export"]["precision"]) == ("refitted", "f16")
        assert report["plan"]["workspace_mib"] == 300
        counts = double.gpu.counts
        assert (counts["builds"], counts["refits"]) == (1, 1)
        double.assert_clean()
    assert [path.suffix for path in (place / jobs.TIMING).iterdir()] == [".bin"]
    log = JobFolder(place, "c").log.read_text()
    assert "plan         model.plan, f16, refitted in" in log
    found = JobFolder(place, "b").progress()
    assert found["phase"] == "publish"


@pytest.fixture
def without_training(tmp_path: Path) -> dict[str, str]:
    """The environment of a process in which an import of a training package fails."""
    folder = tmp_path / "absent"
    for name in ("torch", "torchvision", "anomalib", "timm", "lightning", "sklearn", "optuna"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(f"raise ImportError('{name} was imported')")
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(DOUBLES)])}


def start(place: Path, job: str, wanted: dict[str, Any], **more: str) -> subprocess.Popen[str]:
    """The process of a job, as the worker starts it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "workers.jobs.job_process", str(place), job, "convert"], cwd=ROOT,
        env={**os.environ, PACE: "full", **environment("11.4.0.106", **more), **more},
        stdin=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None
    process.stdin.write(json.dumps(wanted))
    process.stdin.close()
    return process


def test_a_plan_is_built_again_from_the_graph_without_torch(
    place: Path, few: Callable[[str], Path], tmp_path: Path, without_training: dict[str, str]
) -> None:
    """A new JetPack came with another TensorRT; the machine only serves. Killed once on the way."""
    with doubled(users=USERS):
        convert(request(few("padim"), tmp_path / "engine"), QUIET)
    store = Store(place / "models")
    staging = place / "models" / "made"
    shutil.copytree(tmp_path / "engine", staging)
    old = store.publish("part", staging, {"job": "first"})
    wanted = {"model": "part", "from_onnx": True}
    killed = start(place, "a", wanted, **without_training, KENSA_DOUBLE_BUILD_SECONDS="60")
    log = JobFolder(place, "a").log
    until(lambda: log.exists() and "workspace:" in log.read_text())  # said just before the build
    killed.kill()
    killed.wait()
    assert store.versions("part") == [old]
    assert start(place, "b", wanted, **without_training).wait(60) == 0
    ended = JobFolder(place, "b").result()
    assert ended is not None
    assert ended["state"] == "succeeded", ended
    folder = store.check("part", ended["version"])
    bundle, record = Bundle.open(folder), Fingerprint.read(folder)
    assert record is not None
    assert record.machine.tensorrt == "11.4.0.106"
    assert record.stale(folder, record.machine) is None
    report = bundle.report()
    assert (report["plan"]["how"], report["plan"]["parity"]["ok"]) == ("built", True)
    assert store.manifest("part", ended["version"]).origin["parent"] == old
    before, after = (
        store.manifest("part", old).files,
        store.manifest("part", ended["version"]).files,
    )
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {PLAN, PLAN_RECORD, "report.json", "meta.json"}


def test_what_needs_training_packages_says_so_where_there_are_none(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "find_spec", lambda name: None)
    for kind, wanted in (("convert", {}), ("retrain", {"category": CATEGORY})):
        with pytest.raises(NoWorker, match=r"pip install 'kensa\[train\]'.*with from_onnx"):
            do(place, "a", kind, **wanted)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"fp16": True, "int8": True}, "either fp16 or int8"),
        ({"category": "c"}, "category is for int8"),
        ({"from_onnx": True, "int8": True}, "from_onnx takes the graph as it is"),
        ({"target": "rtx:"}, "it is no target: write rtx, rtx:SM86 or rtx:SM86,SM120"),
        ({"target": "SM86"}, "it is no target: write rtx"),
    ],
)
def test_requests_that_contradict_themselves_are_refused(
    wanted: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValidationError, match=words):
        ConvertRequest(model="part", **wanted)


def test_a_machine_that_cannot_learn_has_a_worker_where_it_can_build(
    monkeypatch: pytest.MonkeyPatch, no_rtx: None
) -> None:
    from app.jobs import worker_process as worker

    monkeypatch.setattr(worker, "find_spec", lambda name: None)
    assert not worker._can_work()
    with doubled():
        assert plans.has_tensorrt()
        assert worker._can_work()
