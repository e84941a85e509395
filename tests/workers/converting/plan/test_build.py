"""ONNX -> plan: built, refitted or kept, and always proved; on the double of TensorRT."""

from __future__ import annotations

import errno
import importlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from engines.errors import BadBundle, BadRequest, BuildFailed, OutOfMemory
from engines.files import sha256
from engines.meta import Meta
from engines.store.bundle import ONNX, PLAN, PLAN_RECORD, write_report
from engines.store.plan_record import Fingerprint, Machine
from support.double import BUILDING, Double, doubled
from support.graphs import WEIGHTS, expected, graph, some_images
from support.progress import Heard
from workers.converting.graphs import difference

META = Meta.parse({"model": "vae", "latent_dim": 8, "image_size": 32})
BOTH = ("10.3.0", "11.4.0.106")
OTHER = WEIGHTS[::-1] * 2
IMAGES = some_images(7)
BANK = np.ones((10, 2), np.float32)


def scores_of(weights: NDArray[Any] = WEIGHTS) -> NDArray[np.float32]:
    return expected(IMAGES, weights).max(axis=(1, 2)) + np.float32(0.125)


@dataclass
class Bench:
    """A machine, and folders with graphs to make plans of."""

    double: Double
    root: Path
    build: Any  # the module workers.converting.plan.build, on this double
    heard: Heard = field(default_factory=Heard)

    def folder(self, name: str, data: bytes) -> Path:
        made = self.root / name
        made.mkdir()
        (made / ONNX).write_bytes(data)
        return made

    def wanted(self, scores: Any = None, **changes: Any) -> Any:
        plain = {"workspace": 4096, "use_dla": False, "bank": None, "precision": "f32"}
        scores = scores_of() if scores is None else scores
        return self.build.Wanted(
            META, images=IMAGES, expected=scores, cache=self.root / "cache", **{**plain, **changes}
        )

    def make(
        self, folder: Path, before: Path | None = None, scores: Any = None, **changes: Any
    ) -> dict[str, Any]:
        """The plan; and report.json with it, as the callers write it."""
        report: dict[str, Any] = self.build.make_plan(
            folder, Machine.read(), self.wanted(scores, **changes), before, self.heard
        )
        write_report(folder, {"plan": report})
        return report


def bench(double: Double, root: Path) -> Bench:
    return Bench(double, root, importlib.import_module("workers.converting.plan.build"))


@pytest.fixture
def nano(tmp_path: Path) -> Iterator[Bench]:
    with doubled(users=BUILDING) as double:
        yield bench(double, tmp_path)
        double.assert_clean()


@pytest.fixture(params=BOTH)
def each(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    with doubled(request.param, users=BUILDING) as double:
        yield bench(double, tmp_path)
        double.assert_clean()


# ---- building ---------------------------------------------------------------------------------


def test_a_plan_is_built_proved_and_recorded(each: Bench) -> None:
    folder = each.folder("a", graph())
    report = each.make(folder)
    assert (report["how"], report["parity"]["ok"], report["parity"]["flips"]) == ("built", True, 0)
    assert "why" not in report
    found = Fingerprint.read(folder)
    assert found is not None
    assert found.stale(folder, Machine.read()) is None
    assert (found.max_batch, found.bank_rows, found.refittable) == (4, None, True)
    assert found.device_bytes > (folder / PLAN).stat().st_size
    assert each.double.gpu.counts["builds"] == 1


@pytest.mark.parametrize(("rows", "most", "least"), [(10, 15, 9), (2, 9, 2), (1000, 1500, 9)])
def test_a_memory_bank_has_room_to_grow_by_half(
    nano: Bench, rows: int, most: int, least: int
) -> None:
    folder, bank = nano.folder("a", graph(bank=True)), np.ones((rows, 2), np.float32)
    scores = expected(IMAGES).max(axis=(1, 2)) + 2 * rows
    assert nano.make(folder, scores=scores, bank=bank)["bank_rows"] == most
    found = Fingerprint.read(folder)
    assert found is not None
    assert found.bank_rows == most
    runtime = nano.double.trt.Runtime(nano.double.trt.Logger())
    engine = runtime.deserialize_cuda_engine((folder / PLAN).read_bytes())
    assert [shape[0] for shape in engine.get_tensor_profile_shape("memory_bank", 0)] == [
        least, rows, most,
    ]  # fmt: skip


def test_a_graph_with_a_bank_needs_one(nano: Bench) -> None:
    with pytest.raises(BadBundle, match="needs a memory bank; there is none"):
        nano.make(nano.folder("a", graph(bank=True)))


def test_half_precision_is_in_the_graph_and_no_flag(each: Bench) -> None:
    folder = each.folder("a", graph(half=True))
    assert each.make(folder, precision="f16")["precision"] == "f16"


def test_a_plan_that_scores_otherwise_is_not_kept(nano: Bench) -> None:
    """Neither the refittable one nor the second, which is built without that flag."""
    folder = nano.folder("a", graph())
    with pytest.raises(BadBundle, match=r"does not agree with the model .*nothing was written"):
        nano.make(folder, scores=scores_of(OTHER))
    assert nano.double.gpu.counts["builds"] == 2
    assert not (folder / PLAN_RECORD).exists()


def test_where_being_refittable_spoils_the_scores_the_plan_is_built_without(
    nano: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the release notes of TensorRT 11.3 warn."""
    score = nano.build.score_images

    def spoilt(engine: Any, *rest: Any) -> Any:
        return score(engine, *rest) * (2 if engine.refittable else 1)

    monkeypatch.setattr(nano.build, "score_images", spoilt)
    folder = nano.folder("a", graph())
    assert nano.make(folder)["refittable"] is False
    assert "a refittable plan scores otherwise than the graph" in nano.heard.text
    found = Fingerprint.read(folder)
    assert found is not None
    assert not found.refittable


def test_scores_that_nobody_knows_must_at_least_be_numbers(nano: Bench) -> None:
    wanted = replace(nano.wanted(), expected=None)
    folder = nano.folder("a", graph())
    report = nano.build.make_plan(folder, Machine.read(), wanted, None, nano.heard)
    assert report["parity"] == {"compared": False}
    broken = nano.folder("b", graph(WEIGHTS * np.float32(1e38)))
    with pytest.raises(BadBundle, match="does not agree"):
        nano.build.make_plan(broken, Machine.read(), wanted, None, nano.heard)


# ---- what goes wrong ---------------------------------------------------------------------------


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_graph_whose_weights_are_no_numbers_gets_no_plan(each: Bench, number: float) -> None:
    weights = WEIGHTS.copy()
    weights[1, 1] = number
    hides = graph(weights, extra=[helper.make_node("Relu", ["map"], ["unused"], "relu")])
    wanted = replace(each.wanted(), expected=None)  # of a model that came without golden images
    folder = each.folder("a", hides)
    with pytest.raises(BadBundle, match=r"model\.onnx holds weights that are not finite"):
        each.build.make_plan(folder, Machine.read(), wanted, None, each.heard)
    assert not (folder / PLAN).exists()
    assert each.double.gpu.counts["builds"] == 0


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (
            graph(extra=[helper.make_node("Unique", ["map"], ["unused"], "unique", sorted=1)]),
            r"does not take .*model\.onnx at node 6, Unique unique: it does not know this operator",
        ),
        (
            graph(extra=[helper.make_node("MatMul", ["map", "weights"], ["a"], "odd")]),
            r"does not take .*model\.onnx at node 6, MatMul odd: Invalid Node - odd",
        ),
        (graph(cast_first=False), "at node 0, Identity same: .*does not support UINT8"),
    ],
    ids=["operator", "shapes", "uint8"],
)
def test_what_the_parser_refuses_is_said_in_a_sentence(
    each: Bench, data: bytes, words: str
) -> None:
    with pytest.raises(BadBundle, match=words) as caught:
        each.make(each.folder("a", data))
    assert str(caught.value).startswith(f"TensorRT {each.double.trt.__version__} does not take")


def test_a_file_without_a_graph_is_refused_in_a_sentence(each: Bench) -> None:
    """TensorRT's parser takes it for an empty network, and says that all is well."""
    with pytest.raises(BadBundle, match=r"model\.onnx holds no graph: convert the model again"):
        each.make(each.folder("a", b"\x08\x08"))


def test_a_build_that_runs_out_of_memory_says_what_is_free_and_what_to_do(tmp_path: Path) -> None:
    with doubled(memory_mib=(7485, 600), users=BUILDING) as double:
        nano = bench(double, tmp_path)
        held = double.gpu.allocate(600 * 2**20 - 1024, "what the server has", backed=False)
        with pytest.raises(OutOfMemory) as caught:
            nano.make(nano.folder("a", graph()))
        double.gpu.release(held)
        said = str(caught.value)
        assert "ran out of memory: it found no kernel for" in said
        assert "Of 7,485 MiB 0 were free before. Unload models" in said
        assert "systemctl isolate multi-user.target" in said
        double.assert_clean()


def test_other_failures_keep_the_words_of_tensorrt(nano: Bench) -> None:
    failure = nano.build.failure
    assert isinstance(failure(["[network.cpp] no such thing"], 1, 2), BuildFailed)
    assert "made no plan: [network.cpp] no such" in str(failure(["[network.cpp] no such"], 1, 2))
    assert "it did not say why" in str(failure([], 1, 2))
    for line in ("Error Code 2: OutOfMemory (out of memory)", "Requested size: out of memory"):
        assert isinstance(failure([line], 1, 2), OutOfMemory)


def test_a_gpu_that_fails_is_named(tmp_path: Path) -> None:
    with doubled(users=BUILDING) as double:
        nano = bench(double, tmp_path)
        double.gpu.fail()
        with pytest.raises(BuildFailed, match=r"CUDA failed .*illegal memory access"):
            nano.make(nano.folder("a", graph()))
        assert not double.gpu.crashes


# ---- memory that a build may take -------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "free", "workspace", "tactics"),
    [
        (4096, 4300, 1075, 2048),
        (4096, 58_000, 4096, 16_384),
        (4096, 500, 256, 256),
        (64, 4300, 64, 2048),
        (300, 100, 256, 256),
        (300, 2400, 300, 1024),
        (300, 500, 256, 256),
        (1500, 6100, 1500, 2048),
    ],
)
def test_a_build_takes_no_more_than_a_quarter_of_what_is_free(
    nano: Bench, asked: int, free: int, workspace: int, tactics: int
) -> None:
    assert nano.build.memory_limits(asked, free) == (workspace, tactics)


@pytest.mark.parametrize(
    "reason",
    [
        "compilation error: no tactics to implement the operation within workspace limit",
        "Compiling this graph requires workspace memory greater than 0",
    ],
)
def test_too_small_a_workspace_is_said_and_not_what_a_missing_driver_adds(
    nano: Bench, reason: str
) -> None:
    log = importlib.import_module("workers.converting.plan.tensorrt_log")
    said = [reason, "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime"]
    assert log.last_line(said) == reason
    assert log.last_line(said[1:]) == said[1]
    assert "allow more with --workspace" in str(log.failure(said, 0, 0))


def test_a_workspace_that_is_too_small_is_not_taken_for_a_machine_that_is(nano: Bench) -> None:
    log = importlib.import_module("workers.converting.plan.tensorrt_log")
    said = ["Error Code 2: OutOfMemory (Requested size was 12170776 bytes.)"]
    small, free = 1 << 20, 1 << 34
    assert "allow more with --workspace" in str(log.failure(said, free, free, small))
    for full in (log.failure(said, small, free, small), log.failure(said, free, free, 1 << 26)):
        assert isinstance(full, OutOfMemory)


def test_the_workspace_is_said_where_it_is_less_than_was_asked_for(nano: Bench) -> None:
    nano.make(nano.folder("a", graph()))
    assert nano.heard.lines[0] == (
        "workspace: 1,075 MiB of the 4,096 that --workspace allows, because 4,300 MiB are free"
    )
    nano.heard.lines.clear()
    nano.make(nano.folder("b", graph()), workspace=1000)
    assert "workspace" not in nano.heard.text


# ---- DLA --------------------------------------------------------------------------------------


def test_dla_is_refused_where_there_is_none(nano: Bench) -> None:
    from workers.converting.plan.rebuild import builder_for

    with pytest.raises(BadRequest, match=r"has no DLA core \(an Orin Nano has none\): leave out"):
        builder_for("f16", use_dla=True)
    with pytest.raises(BadRequest, match="--use_dla needs --fp16 or --int8"):
        builder_for("f32", use_dla=True)
    assert builder_for("f16", use_dla=False) == Machine.read()


@pytest.mark.parametrize("version", BOTH)
def test_a_plan_for_dla_takes_one_image_and_just_that_bank(tmp_path: Path, version: str) -> None:
    with doubled(version, device="agx-orin", users=BUILDING) as double:
        agx = bench(double, tmp_path)
        agx.build.check_dla()
        folder = agx.folder("a", graph(half=True))
        report = agx.make(folder, precision="f16", use_dla=True)
        assert (report["dla"], report["max_batch"]) == (True, 1)
        assert "the GPU computes what DLA cannot" in agx.heard.text
        with_bank = agx.folder("b", graph(bank=True, half=True))
        scores = expected(IMAGES).max(axis=(1, 2)) + 20
        wanted = {"precision": "f16", "use_dla": True, "scores": scores, "bank": BANK}
        assert agx.make(with_bank, **wanted)["bank_rows"] == len(BANK)
        fewer = {**wanted, "bank": BANK[:-1], "scores": scores - 2}
        again = agx.make(agx.folder("c", graph(bank=True, half=True)), with_bank, **fewer)
        assert "has room for 10 rows, not for 9" in again["why"]
        double.assert_clean()


# ---- the old plan -----------------------------------------------------------------------------


def test_new_weights_are_put_into_the_old_plan(each: Bench) -> None:
    old, new = each.folder("old", graph()), each.folder("new", graph(OTHER))
    each.make(old)
    report = each.make(new, old, scores_of(OTHER))
    assert (report["how"], report["parity"]["ok"]) == ("refitted", True)
    assert (each.double.gpu.counts["refits"], each.double.gpu.counts["builds"]) == (1, 1)
    found = Fingerprint.read(new)
    assert found is not None
    assert found.refittable
    assert found.stale(new, Machine.read()) is None
    newest = each.folder("newest", graph(WEIGHTS))
    assert each.make(newest, new)["how"] == "refitted"
    assert sha256(old / PLAN) == json.loads((old / PLAN_RECORD).read_text())["plan"]


def test_a_plan_is_kept_where_only_the_bank_is_another_one(nano: Bench) -> None:
    def scores(bank: NDArray[np.float32]) -> Any:
        return expected(IMAGES).max(axis=(1, 2)) + bank.sum()

    old = nano.folder("old", graph(bank=True))
    nano.make(old, scores=scores(BANK), bank=BANK)
    grown = np.full((15, 2), 2, np.float32)
    new = nano.folder("new", graph(bank=True))
    report = nano.make(new, old, scores=scores(grown), bank=grown)
    assert (report["how"], report["bank_rows"]) == ("kept", 15)
    assert sha256(new / PLAN) == sha256(old / PLAN)
    assert nano.double.gpu.counts["builds"] == 1
    larger = np.full((16, 2), 2, np.float32)
    report = nano.make(
        nano.folder("large", graph(bank=True)), new, scores=scores(larger), bank=larger
    )
    assert (report["how"], report["bank_rows"]) == ("built", 24)
    assert report["why"] == "the one before has room for 15 rows, not for 16."
    assert "building the plan anew: the one before has room" in nano.heard.text


def record(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        found = json.loads((folder / PLAN_RECORD).read_text())
        (folder / PLAN_RECORD).write_text(json.dumps({**found, **changes}))

    return change


def foreign(folder: Path) -> None:
    found = json.loads((folder / PLAN_RECORD).read_text())
    record(machine={**found["machine"], "tensorrt": "10.16.1.11"})(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (foreign, "was built for TensorRT 10.16.1.11 (here 10.3.0)"),
        (lambda folder: (folder / PLAN).write_bytes(b"another"), "is not the file that was built"),
        (lambda folder: (folder / ONNX).write_bytes(b"another"), "has changed since"),
        (lambda folder: (folder / PLAN_RECORD).unlink(), "has no record of what it was built for"),
        (record(plan="?"), "model.plan.json is damaged"),
        (record(precision="f16"), "the one before is in f16, not f32"),
        (record(bank_rows=5), "only one of the two has a memory bank"),
        (
            lambda folder: write_report(folder, {"plan": {"dla": False, "workspace_mib": 1}}),
            "was built with another --use_dla or --workspace",
        ),
    ],
    ids=["machine", "plan", "onnx", "no record", "record", "precision", "bank", "workspace"],
)
def test_a_plan_that_is_none_of_this_machine_or_graph_is_not_even_read(
    nano: Bench, change: Callable[[Path], None], words: str
) -> None:
    old, new = nano.folder("old", graph()), nano.folder("new", graph(OTHER))
    nano.make(old)
    engines = nano.double.gpu.counts["engines"]
    change(old)
    report = nano.make(new, old, scores_of(OTHER))
    assert report["how"] == "built"
    assert words in report["why"]
    counts = nano.double.gpu.counts
    assert (counts["refits"], counts["engines"] - engines) == (0, 1)


def test_without_an_old_plan_there_is_nothing_to_explain(nano: Bench) -> None:
    report = nano.make(nano.folder("a", graph()), nano.root / "absent")
    assert report["how"] == "built"
    assert "why" not in report


def test_a_refit_that_scores_otherwise_becomes_a_build(
    nano: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = nano.folder("old", graph()), nano.folder("new", graph(OTHER))
    nano.make(old)
    trt = nano.double.trt
    monkeypatch.setattr(trt.Refitter, "refit_cuda_engine", lambda self: True)  # and does nothing
    report = nano.make(new, old, scores_of(OTHER))
    assert (report["how"], nano.double.gpu.counts["builds"]) == ("built", 2)
    assert "the refitted plan failed its test" in report["why"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("deserialize_cuda_engine", "the one before cannot be read"),
        ("refittable", "the one before cannot be refitted"),
        ("refit_from_bytes", "refitting failed"),
        ("get_missing_weights", "TensorRT also wants one, two, three"),
        ("refit_cuda_engine", "refitting failed: it did not say why"),
    ],
)
def test_a_refit_that_tensorrt_refuses_becomes_a_build(
    nano: Bench, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    old, new = nano.folder("old", graph()), nano.folder("new", graph(OTHER))
    nano.make(old)
    trt = nano.double.trt
    if name == "deserialize_cuda_engine":
        read, calls = trt.Runtime.deserialize_cuda_engine, []

        def none_at_first(self: Any, plan: bytes) -> Any:
            calls.append(plan)
            return read(self, plan) if len(calls) > 1 else None

        monkeypatch.setattr(trt.Runtime, name, none_at_first)
    elif name == "refittable":
        monkeypatch.setattr(trt.ICudaEngine, name, property(lambda self: False))
    elif name == "refit_from_bytes":
        monkeypatch.setattr(trt.OnnxParserRefitter, name, lambda self, model: False)
    elif name == "get_missing_weights":
        monkeypatch.setattr(trt.Refitter, name, lambda self: ["one", "two", "three", "four"])
    else:
        monkeypatch.setattr(trt.Refitter, name, lambda self: False)
    report = nano.make(new, old, scores_of(OTHER))
    assert (report["how"], nano.double.gpu.counts["builds"]) == ("built", 2)
    assert words in report["why"]


# ---- two graphs -------------------------------------------------------------------------------


def changed(change: Callable[[Any], None]) -> bytes:
    model = onnx.load_from_string(graph())
    change(model)
    return bytes(model.SerializeToString())


def with_initializer(array: NDArray[Any], name: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        weights = model.graph.initializer
        kept = [one for one in weights if one.name != name]
        place = [one.name for one in weights].index(name)
        kept.insert(place, numpy_helper.from_array(array, name))
        del weights[:]
        weights.extend(kept)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda model: model.graph.node[3].attribute[0].__setattr__("i", 1), "at the node sum"),
        (lambda model: model.graph.node[1].__setattr__("name", "x"), "at the node x"),
        (lambda model: model.graph.node.pop(), "have 6 and 5 nodes"),
        (lambda model: model.graph.initializer[0].__setattr__("name", "x"), "in the weights x"),
        (lambda model: model.graph.initializer.pop(), "have 3 and 2 weights"),
        (
            lambda model: model.graph.initializer.append(numpy_helper.from_array(WEIGHTS, "more")),
            "have 3 and 4 weights",
        ),
        (with_initializer(np.ones((3, 3), np.float32), "weights"), "weights, in name, type or"),
        (with_initializer(np.ones((3, 2), np.float16), "weights"), "weights, in name, type or"),
        (with_initializer(np.array([-2], np.int64), "last"), "last, which is no weight"),
        (lambda model: model.opset_import[0].__setattr__("version", 18), "other opsets"),
        (lambda model: model.graph.output.pop(), "other outputs"),
        (lambda model: model.graph.input[0].__setattr__("name", "x"), "other inputs"),
    ],
)
def test_graphs_that_differ_in_more_than_weights_are_told_apart(
    tmp_path: Path, change: Callable[[Any], None], words: str
) -> None:
    (tmp_path / "old").write_bytes(graph())
    (tmp_path / "new").write_bytes(changed(change))
    assert words in str(difference(tmp_path / "old", tmp_path / "new"))


def test_graphs_that_differ_in_weights_alone_are_the_same(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(graph())
    (tmp_path / "new").write_bytes(graph(OTHER))
    assert difference(tmp_path / "old", tmp_path / "new") is None


def test_weights_that_only_the_new_graph_has_lead_to_a_build(nano: Bench) -> None:
    """TensorRT itself would pass over them in silence."""
    old = nano.folder("old", graph())
    nano.make(old)
    more = changed(lambda m: m.graph.initializer.append(numpy_helper.from_array(WEIGHTS, "more")))
    report = nano.make(nano.folder("new", more), old)
    assert (report["how"], report["why"]) == ("built", "the graphs have 3 and 4 weights.")


def test_without_the_package_onnx_a_plan_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.converting.graphs.find_spec", lambda name: None)
    assert "the package onnx is not here" in str(difference(Path("a"), Path("b")))


# ---- progress, and stopping -------------------------------------------------------------------


def test_progress_goes_up_to_the_end(each: Bench) -> None:
    each.make(each.folder("a", graph()))
    percent = each.heard.percent
    assert percent == sorted(set(percent))
    assert len(percent) > 4
    assert percent[-1] == 100
    assert percent[-2] < 100


def test_phases_within_phases_are_one_share(nano: Bench) -> None:
    from workers.converting.plan.build_progress import Phases

    phases = Phases()
    assert phases.fraction() == 0
    phases.start("all", None, 2)
    phases.start("half", "all", 4)
    phases.step("half", 1)
    assert phases.fraction() == 0.25  # two of four quarters, of one of two halves
    phases.start("half of it again", "half", 2)
    phases.step("half of it again", 0)
    assert phases.fraction() == 0.3125
    phases.finish("half of it again")
    phases.finish("half")
    assert phases.fraction() == 0.3125  # and not less, before the step is reported
    phases.step("all", 0)
    phases.step("unheard of", 7)
    assert phases.fraction() == 0.5
    phases.step("all", 5)
    assert phases.fraction() == 1
    phases.start("another", None, 0)
    assert phases.fraction() == 1


def test_ctrl_c_stops_a_build(each: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    stops: list[threading.Event] = []
    inside = each.build._with_context

    def watched(work: Any, stop: threading.Event) -> Any:
        stops.append(stop)
        return inside(work, stop)

    monkeypatch.setattr(each.build, "_with_context", watched)

    def interrupt(done: int) -> None:
        if done >= 20 and not sent:
            sent.append(done)
            os.kill(os.getpid(), signal.SIGINT)
            assert stops[0].wait(30)  # the double builds in milliseconds

    each.heard = Heard(interrupt)
    folder = each.folder("a", graph())
    with pytest.raises(KeyboardInterrupt):
        each.make(folder)
    assert each.heard.percent[-1] == sent[0]
    assert each.double.gpu.counts["builds"] == 0
    assert [path.name for path in folder.iterdir()] == [ONNX]


def test_ctrl_c_while_the_thread_of_a_build_starts_begins_nothing(
    nano: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []
    began: list[threading.Event] = []

    class Interrupted(ThreadPoolExecutor):
        def submit(self, *work: Any) -> Any:
            super().submit(*work)
            threads.extend(self._threads)
            self._threads.clear()  # as where it comes before the pool has written it down
            raise KeyboardInterrupt

    monkeypatch.setattr(nano.build, "ThreadPoolExecutor", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        nano.build._in_a_thread(began.append)
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert not began


def test_what_fails_while_progress_is_shown_ends_the_build(nano: Bench) -> None:
    """TensorRT's bindings would swallow it."""

    def fail(done: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    nano.heard = Heard(fail)
    with pytest.raises(OSError, match="No space left"):
        nano.make(nano.folder("a", graph()))
    assert nano.double.gpu.counts["builds"] == 0


# ---- the timing cache -------------------------------------------------------------------------


def steps(it: Bench, name: str) -> int:
    """How many steps a build had."""
    from workers.converting.plan.build_progress import Phases

    count, step = [0], Phases.step

    def counted(self: Any, *rest: Any) -> None:
        count[0] += 1
        step(self, *rest)

    Phases.step = counted
    try:
        it.make(it.folder(name, graph()))
    finally:
        Phases.step = step
    return count[0]


def cache_of(it: Bench) -> Path:
    (path,) = (it.root / "cache").glob("timing-*.bin")
    return path


def test_what_was_measured_shortens_the_next_build(each: Bench) -> None:
    first = steps(each, "a")
    assert steps(each, "b") < first
    assert "timing" not in each.heard.text


@pytest.mark.parametrize("damage", [b"", b"short", b"x" * 100])
def test_a_damaged_timing_cache_is_made_anew(nano: Bench, damage: bytes) -> None:
    first = steps(nano, "a")
    good = cache_of(nano).read_bytes()
    cache_of(nano).write_bytes(damage)
    assert steps(nano, "b") == first
    assert f"timing cache {cache_of(nano)} is damaged: it is made anew" in nano.heard.text
    assert cache_of(nano).read_bytes() == good


def test_a_timing_cache_that_tensorrt_does_not_take_is_made_anew(nano: Bench) -> None:
    import hashlib

    first = steps(nano, "a")
    cache_of(nano).write_bytes(hashlib.sha256(b"other").digest() + b"other")
    assert steps(nano, "b") == first
    assert "is not for this TensorRT: it is made anew" in nano.heard.text


def test_each_machine_has_a_timing_cache_of_its_own(tmp_path: Path) -> None:
    for device in ("orin-nano", "rtx"):
        with doubled(device=device, users=BUILDING) as double:
            it = bench(double, tmp_path)
            it.make(it.folder(device, graph()))
    assert len(list((tmp_path / "cache").glob("timing-*.bin"))) == 2


def test_a_plan_is_not_lost_because_the_timing_cache_cannot_be_written(nano: Bench) -> None:
    (nano.root / "cache").write_text("a file in its place")
    assert nano.make(nano.folder("a", graph()))["how"] == "built"
    assert "the next build takes as long" in nano.heard.text
