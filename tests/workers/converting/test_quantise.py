"""--int8: explicit quantisation as TensorRT takes it, with ranges from normal parts, and limits."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino as ov
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from engines.errors import BadBundle
from engines.meta import Meta
from engines.runtimes.parity import INT8_LIMIT, INT8_MEAN_LIMIT, compare_in
from engines.store.plan_record import Machine
from support.double import BUILDING, doubled
from support.progress import Heard
from workers.converting import quantise as module
from workers.converting.quantise import STEPS, quantise

META = Meta.parse({"model": "vae", "latent_dim": 8, "image_size": 32})
SIDE = 8
RANDOM = np.random.default_rng(7)
FIRST = RANDOM.normal(size=(4, 3, 3, 3)).astype(np.float32)  # sees the picture: stays as it is
SECOND = RANDOM.normal(size=(6, 4, 3, 3)).astype(np.float32)
SECOND[2] *= 10
SECOND[3] = 0
THIRD = RANDOM.normal(size=(5, 4, 1, 1)).astype(np.float32)
IMAGES = RANDOM.integers(0, 255, (6, SIDE, SIDE, 3), np.uint8)


def nothing(done: int, total: int) -> None:
    assert done <= total


def write(path: Path) -> Path:
    """image -> three convolutions, two of which read the same tensor -> score, map."""
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["pixels"], "transpose", perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["pixels", "first"], ["one_"], "c1", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["one_"], ["one"], "relu"),
        helper.make_node("Conv", ["one", "second"], ["two"], "c2", pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["one", "third"], ["three"], "c3"),
        helper.make_node("ReduceMean", ["two"], ["a"], "mean", axes=[1], keepdims=0),
        helper.make_node("ReduceMax", ["three"], ["b"], "max", axes=[1], keepdims=0),
        helper.make_node("Add", ["a", "b"], ["map"], "add"),
        helper.make_node("ReduceMax", ["map"], ["score"], "top", axes=[1, 2], keepdims=0),
    ]
    made = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["n", SIDE, SIDE, 3])],
        [
            helper.make_tensor_value_info("score", TensorProto.FLOAT, ["n"]),
            helper.make_tensor_value_info("map", TensorProto.FLOAT, ["n", SIDE, SIDE]),
        ],
        [
            numpy_helper.from_array(array, name)
            for name, array in (("first", FIRST), ("second", SECOND), ("third", THIRD))
        ],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(made, ir_version=8, opset_imports=opset), path)
    return path


def scores(path: Path, images: NDArray[np.uint8] = IMAGES) -> NDArray[np.float32]:
    hint = {"INFERENCE_PRECISION_HINT": "f32"}
    found = ov.Core().compile_model(str(path), "CPU", hint)({"image": images})
    return np.asarray(found["score"])


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return write(tmp_path / "plain.onnx")


@pytest.fixture
def quantised(tmp_path: Path) -> Path:
    path = write(tmp_path / "model.onnx")
    assert quantise(path, IMAGES, None, nothing) == 2
    return path


def arrays(path: Path) -> dict[str, Any]:
    return {one.name: numpy_helper.to_array(one) for one in onnx.load(path).graph.initializer}


def test_convolutions_read_int8_but_for_the_one_that_sees_the_picture(quantised: Path) -> None:
    model = onnx.load(quantised)
    convolutions = {node.name: list(node.input) for node in model.graph.node if node.name[0] == "c"
                    and node.op_type == "Conv"}  # fmt: skip
    assert convolutions == {
        "c1": ["pixels", "first"],
        "c2": ["one_dequantised", "second_dequantised"],
        "c3": ["one_dequantised", "third_dequantised"],
    }
    pairs = [node.op_type for node in model.graph.node if "Linear" in node.op_type]
    assert pairs.count("QuantizeLinear") == pairs.count("DequantizeLinear") == 3


def test_ranges_are_symmetric_with_one_for_each_channel_of_the_weights(quantised: Path) -> None:
    found = arrays(quantised)
    scales = found["second_scale"]
    largest = np.abs(SECOND).reshape(6, -1).max(axis=1)
    np.testing.assert_allclose(scales * STEPS, np.where(largest > 0, largest, STEPS), rtol=1e-6)
    assert found["one_scale"].shape == ()
    for name in ("one_zero", "second_zero", "third_zero"):
        assert found[name].dtype == np.int8
        assert not found[name].any()
    axes = {
        node.name: [attribute.i for attribute in node.attribute]
        for node in onnx.load(quantised).graph.node
        if "Linear" in node.op_type
    }
    assert (axes["second_int8_q"], axes["second_int8_dq"], axes["one_int8_q"]) == ([0], [0], [])


def test_the_range_of_a_tensor_is_what_normal_parts_reach(quantised: Path, plain: Path) -> None:
    model = ov.Core().read_model(plain)
    model.add_outputs(["one"])
    seen = ov.Core().compile_model(model, "CPU")({"image": IMAGES})["one"]
    assert arrays(quantised)["one_scale"] * STEPS == pytest.approx(np.abs(seen).max(), rel=0.05)


def test_scores_differ_a_little_and_stay_within_the_limits(quantised: Path, plain: Path) -> None:
    before, after = scores(plain), scores(quantised)
    difference = np.abs(after / before - 1)
    assert 1e-5 < difference.max() <= INT8_LIMIT
    assert difference.mean() <= INT8_MEAN_LIMIT


@pytest.mark.parametrize("version", ["10.3.0", "11.4.0.106"])
def test_tensorrt_builds_a_plan_of_it_that_scores_the_same(
    quantised: Path, plain: Path, tmp_path: Path, version: str
) -> None:
    with doubled(version, users=BUILDING) as double:
        build = importlib.import_module("workers.converting.plan.build")
        wanted = build.Wanted(META, "int8", 512, False, None, IMAGES, scores(plain))
        report = build.make_plan(quantised.parent, Machine.read(), wanted, None, Heard())
        assert report["parity"]["ok"]
        assert report["refittable"] is False  # ranges belong to the weights that they came from
        double.assert_clean()


def test_ranges_of_pictures_that_show_nothing_are_found_out(plain: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "model.onnx")
    quantise(path, IMAGES // 64, None, nothing)
    assert not compare_in("int8", scores(plain), scores(path), META)["ok"]


def test_a_graph_without_a_convolution_is_refused(plain: Path) -> None:
    model = onnx.load(plain)
    del model.graph.node[4:6]
    model.graph.node[4].input[0] = model.graph.node[5].input[0] = "one"
    model.graph.node[5].op_type, model.graph.node[5].output[0] = "ReduceMax", "b"
    onnx.save(model, plain)
    with pytest.raises(BadBundle, match="no convolution that could be quantised: leave out --int8"):
        quantise(plain, IMAGES, None, nothing)


def test_single_values_that_lie_far_out_do_not_stretch_a_range(
    plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KEPT", 50.0)
    before = module._measure(plain, ["one"], IMAGES, None, nothing)["one"]
    monkeypatch.setattr(module, "KEPT", 100.0)
    assert before < module._measure(plain, ["one"], IMAGES, None, nothing)["one"]
