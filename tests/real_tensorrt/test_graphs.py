"""The real TensorRT for RTX, without a GPU: it parses and builds what the exporter makes.

Each build is a process of its own, because native code may end one, and goes through the project's
own workers/converting/plan/build.py. Whether an engine says what it should takes a GPU.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from benchmarks.builds import EVERY, KINDS, LAYERS, OPSETS, PRECISIONS, Graph, build, write
from benchmarks.one_build import WORKSPACE
from engines.files import sha256
from engines.store.bundle import ONNX, PLAN, PLAN_RECORD
from engines.store.plan_record import Fingerprint, Precision
from support.real_library import needs_rtx
from workers import models

pytestmark = needs_rtx

SMALL = 64  # pixels: operators are the same, and exporting takes a tenth of the time
SHORT = [
    Graph("patchcore", "resnet18", "int8", 17, SMALL),
    Graph("patchcore", "tf_efficientnet_lite0", "f16", 18, SMALL),
    Graph("patchcore", "wide_resnet50_2", "f32", 17, SMALL),
    Graph("padim", "resnet18", "f16", 17, SMALL),
    Graph("padim", "tf_efficientnet_lite0", "int8", 18, SMALL),
    Graph("efficientad", None, "f32", 18),
    Graph("vae", None, "f16", 17, SMALL),
    Graph("vae", None, "int8", 18, SMALL),
]
ONE = SHORT[0]

Written = Callable[[Graph], Path]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """A graph -> its folder. The last one is kept."""
    last: dict[Graph, Path] = {}

    def get(graph: Graph) -> Path:
        if graph not in last:
            last.clear()
            folder = tmp_path_factory.mktemp("graph") / str(graph)
            write(graph, folder)
            last[graph] = folder
        for made in (PLAN, PLAN_RECORD):
            (last[graph] / made).unlink(missing_ok=True)
        return last[graph]

    return get


def assert_built(graph: Graph, folder: Path, gpus: str) -> None:
    found = build(graph, folder, gpus)
    assert found.get("how") == "built", found
    assert found["gpus"] == gpus.split(",")
    assert (found["precision"], found["workspace_mib"]) == (graph.precision, WORKSPACE)
    assert found["max_batch"] == 4
    assert found.get("bank_rows") == rows_at_most(folder)
    assert found["percent"] == sorted(set(found["percent"])), "the bar goes forwards"
    assert found["percent"][-1] == 100
    assert len(found["percent"]) > 2
    record = Fingerprint.read(folder)
    assert record is not None
    assert record.machine.capabilities == tuple(gpus.split(","))
    assert record.stale(folder, record.machine) is None
    weights = (folder / ONNX).stat().st_size
    # What is computed in int8 takes a quarter, unless the weights of a Gaussian are most of it.
    assert weights / 5 < (folder / PLAN).stat().st_size < weights + 8e6


def rows_at_most(folder: Path) -> int | None:
    """Of a memory bank that may grow by half; None where there is none."""
    bank = folder / "bank.npy"
    return len(np.load(bank)) * 3 // 2 if bank.is_file() else None


def test_the_matrix_is_whole() -> None:
    """Also here, where a kind or a backbone more would be forgotten most easily."""
    assert {graph.kind for graph in EVERY} == set(KINDS) == set(models.KINDS)
    for kind in KINDS:
        backbones = set(LAYERS) if kind in ("patchcore", "padim") else {None}
        of_kind = {(one.backbone, one.precision, one.opset) for one in EVERY if one.kind == kind}
        assert of_kind == {(b, p, o) for b in backbones for p in PRECISIONS for o in OPSETS}
    short = {value for one in SHORT for value in (one.kind, one.backbone, one.precision, one.opset)}
    assert short >= {*KINDS, *LAYERS, *PRECISIONS, *OPSETS}


@pytest.mark.parametrize("graph", SHORT, ids=str)
def test_the_real_parser_and_builder_take_the_graph(graph: Graph, written: Written) -> None:
    assert_built(graph, written(graph), "SM86")


def test_one_plan_is_for_gpus_of_several_generations(written: Written) -> None:
    assert_built(ONE, written(ONE), "SM80,SM86,SM89,SM120")


def test_a_turing_card_takes_a_graph_that_multiplies_no_matrices(written: Written) -> None:
    graph = Graph("efficientad", None, "f32", 18)
    assert_built(graph, written(graph), "SM75")


@pytest.mark.parametrize("precision", ["f16", "int8"])
def test_a_turing_card_takes_a_graph_that_multiplies_no_float32_matrices(
    precision: Precision, written: Written
) -> None:
    graph = Graph("vae", None, precision, 17, SMALL)  # in int8 its matrices stay in float32
    folder = written(graph)
    if precision == "f16":
        assert_built(graph, folder, "SM75")
        return
    found = build(graph, folder, "SM75")
    assert "cannot run this graph on a Turing card (SM75)" in found["error"]
    assert not (folder / PLAN).exists()


def test_a_build_that_is_interrupted_ends_at_once_and_leaves_no_plan(written: Written) -> None:
    folder = written(ONE)
    before = sha256(folder / ONNX)
    found = build(ONE, folder, "SM86", cancel_at=10)
    assert found.get("cancelled"), found
    assert found["percent"][-1] < 100
    assert sorted(path.name for path in folder.iterdir()) == ["bank.npy", "meta.json", ONNX]
    assert sha256(folder / ONNX) == before
    assert_built(ONE, folder, "SM86")  # and the next one is whole


def test_what_the_real_parser_does_not_take_is_refused_in_its_words(
    written: Written, tmp_path: Path
) -> None:
    """So the tests above can fail."""
    folder = shutil.copytree(written(ONE), tmp_path / "graph")
    model = onnx.load(folder / ONNX)
    node = next(node for node in model.graph.node if node.op_type == "Relu")
    node.op_type, node.domain = "Relu7", "nobody"
    model.opset_import.append(onnx.helper.make_opsetid("nobody", 1))
    onnx.save(model, folder / ONNX)
    found = build(ONE, folder, "SM86")
    assert "Relu7" in found["error"]
    assert found["error"].startswith("BadBundle: TensorRT for RTX")
    assert not (folder / PLAN).exists()


def test_a_graph_whose_types_do_not_fit_is_refused(written: Written, tmp_path: Path) -> None:
    """A strongly typed network: half precision that meets float32 unasked is no graph."""
    folder = shutil.copytree(written(ONE), tmp_path / "graph")
    model = onnx.load(folder / ONNX)
    weight = next(one for one in model.graph.initializer if len(one.dims) == 4)
    array = onnx.numpy_helper.to_array(weight).astype("float16")
    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    onnx.save(model, folder / ONNX)
    found = build(ONE, folder, "SM86")
    assert found["error"].startswith(("BadBundle", "BuildFailed")), found
    assert not (folder / PLAN).exists()


@pytest.mark.soak
@pytest.mark.parametrize("graph", EVERY, ids=str)
def test_every_graph_is_built_for_each_of_two_generations(graph: Graph, written: Written) -> None:
    folder = written(graph)
    assert_built(graph, folder, "SM86")
    (folder / PLAN).unlink()
    assert_built(graph, folder, "SM120")
