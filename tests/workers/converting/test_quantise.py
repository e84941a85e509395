"""--int8: explicit quantisation as TensorRT takes it, ranges from normal parts, and its proof."""

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
from engines.runtimes.openvino import OpenVINORuntime, read_graph
from engines.runtimes.openvino_int8 import round_in_float32
from engines.runtimes.parity import INT8_LIMIT, INT8_MEAN_LIMIT, compare_in
from engines.store.plan_record import Machine
from support.double import BUILDING, doubled
from support.progress import Heard, Said
from workers.converting import int8
from workers.converting.int8 import Proof, to_int8
from workers.converting.quantise import STEPS, convolutions, measure, quantise

META = Meta.parse({"model": "vae", "latent_dim": 8, "image_size": 32})
SIDE = 8
RANDOM = np.random.default_rng(7)
FIRST = RANDOM.normal(size=(4, 3, 3, 3)).astype(np.float32)  # sees the picture: stays as it is
SECOND = RANDOM.normal(size=(6, 4, 3, 3)).astype(np.float32)
SECOND[2] *= 10
SECOND[3] = 0
THIRD = RANDOM.normal(size=(5, 4, 1, 1)).astype(np.float32)
IN_FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}
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
    core = ov.Core()
    found = core.compile_model(read_graph(core, path), "CPU", IN_FLOAT32)({"image": images})
    return np.asarray(found["score"])


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return write(tmp_path / "plain.onnx")


@pytest.fixture
def quantised(tmp_path: Path) -> Path:
    path = write(tmp_path / "model.onnx")
    in_int8(path, IMAGES)
    return path


def in_int8(path: Path, images: NDArray[np.uint8]) -> None:
    """All that can be."""
    quantise(path, measure(path, images, nothing), convolutions(path))


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
    seen = ov.Core().compile_model(model, "CPU", IN_FLOAT32)({"image": IMAGES})["one"]
    assert arrays(quantised)["one_scale"] * STEPS == pytest.approx(np.abs(seen).max(), rel=1e-5)


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
    in_int8(path, IMAGES // 64)
    assert not compare_in("int8", scores(plain), scores(path), META)["ok"]


def test_a_graph_without_a_convolution_is_refused(plain: Path) -> None:
    model = onnx.load(plain)
    del model.graph.node[4:6]
    model.graph.node[4].input[0] = model.graph.node[5].input[0] = "one"
    model.graph.node[5].op_type, model.graph.node[5].output[0] = "ReduceMax", "b"
    onnx.save(model, plain)
    with pytest.raises(BadBundle, match="no convolution that could be quantised: leave out --int8"):
        convolutions(plain)


def test_the_largest_value_is_not_cut_off_however_rare_it_is(plain: Path) -> None:
    """It is what a strange part is known by."""
    single = np.zeros((1, SIDE, SIDE, 3), np.uint8)
    single[0, 3, 3] = 255
    assert measure(plain, single, nothing) == pytest.approx(
        {"one": float(np.maximum(0, FIRST.sum(axis=1) * 255).max())}
    )


@pytest.mark.parametrize("factor", [0, 1e-38, 1e-43])
def test_a_channel_that_is_as_good_as_dead_has_a_scale_that_can_be_divided_by(
    plain: Path, factor: float
) -> None:
    model = onnx.load(plain)
    second = next(one for one in model.graph.initializer if one.name == "second")
    dead = (SECOND * np.float32(factor)).astype(np.float32)
    second.CopyFrom(numpy_helper.from_array(dead, "second"))
    onnx.save(model, plain)
    expected = scores(plain)
    quantise(plain, measure(plain, IMAGES, nothing), list(convolutions(plain)))
    scale = arrays(plain)["second_scale"]
    assert (scale >= np.finfo(np.float32).tiny).all()
    assert scores(plain) == pytest.approx(expected, rel=0.05)


def test_a_cpu_that_would_cut_sums_off_computes_what_the_graph_says(quantised: Path) -> None:
    exactly = IN_FLOAT32 | {"LP_TRANSFORMS_MODE": "NO"}  # rounded as it says, multiplied in float32
    expected = ov.Core().compile_model(str(quantised), "CPU", exactly)({"image": IMAGES})["score"]
    served, _ = OpenVINORuntime(quantised).infer(IMAGES)
    assert served == pytest.approx(np.asarray(expected), rel=0.02)
    rewritten = ov.Core().read_model(str(quantised))
    round_in_float32(rewritten)
    found = ov.Core().compile_model(rewritten, "CPU", IN_FLOAT32)({"image": IMAGES})["score"]
    assert np.asarray(found) == pytest.approx(np.asarray(expected), rel=1e-5)


def test_multiplications_are_counted(plain: Path) -> None:
    assert convolutions(plain) == {"c2": 6 * 4 * 9 * SIDE**2, "c3": 5 * 4 * SIDE**2}


# ---- the proof --------------------------------------------------------------------------------


def harmful(path: Path, *names: str) -> Path:
    """Int8 takes all away from these: they read channels that the first one outshines by far."""
    model = onnx.load(write(path))
    for weight in model.graph.initializer:
        array = numpy_helper.to_array(weight)
        if weight.name == "first":
            array = np.abs(array) * np.float32([1e3, 1, 1, 1])[:, None, None, None]
        else:
            reads = [0, 1, 1, 1] if weight.name in names else [1e-3, 0, 0, 0]
            array = array * np.float32(reads)[:, None, None]
        weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    onnx.save(model, path)
    return path


def proof_of(path: Path) -> Proof:
    return Proof(IMAGES, scores(path), None, META, None)


def test_what_passes_computes_all_of_it_in_int8(plain: Path) -> None:
    said = Said()
    report = to_int8(plain, IMAGES, proof_of(plain), said)
    assert report == {"convolutions": 2, "of": 2, "share": 1.0, "float32": []}
    assert "int8 in 2 of 2 convolutions: raw scores within" in said.text


def test_a_convolution_that_does_harm_stays_in_float32_and_the_rest_keeps_the_limits(
    tmp_path: Path,
) -> None:
    before, path = harmful(tmp_path / "plain.onnx", "third"), harmful(tmp_path / "a.onnx", "third")
    in_int8(path, IMAGES)
    refused = compare_in("int8", scores(before), scores(path), META)
    assert not refused["ok"]

    path, said = harmful(tmp_path / "b.onnx", "third"), Said()
    report = to_int8(path, IMAGES, proof_of(before), said)
    assert report == {
        "convolutions": 1,
        "of": 2,
        "share": pytest.approx(6 * 9 / (6 * 9 + 5), abs=1e-3),
        "float32": ["c3"],
    }
    found = compare_in("int8", scores(before), scores(path), META)
    assert found["ok"]
    assert 1e-6 < found["max_relative"] <= INT8_LIMIT
    read = {node.name: list(node.input) for node in onnx.load(path).graph.node}
    assert (read["c2"], read["c3"]) == (["one_dequantised", "second_dequantised"],
                                        ["one", "third"])  # fmt: skip
    assert "1 of 2 convolutions stay in float32: c3" in said.text


def test_where_little_is_left_in_int8_half_precision_is_advised(tmp_path: Path) -> None:
    path, said = harmful(tmp_path / "model.onnx", "second"), Said()
    assert to_int8(path, IMAGES, proof_of(path), said)["float32"] == ["c2"]
    assert "only 8 % of what could be multiplied in int8 is: --fp16 may be faster" in said.text


def test_a_model_that_bears_no_int8_at_all_is_refused_with_the_figures(tmp_path: Path) -> None:
    path = harmful(tmp_path / "model.onnx", "second", "third")
    words = (
        r"No convolution .* may compute in int8: with c\d alone, the least harmful of 2, raw scores"
        r" within [\d.]+ % \([\d.]+ % on average\), 0 of 6 verdicts flip; nothing was written. Try"
    )
    with pytest.raises(BadBundle, match=words):
        to_int8(path, IMAGES, proof_of(path), Said())


def test_an_only_convolution_that_does_harm_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = harmful(tmp_path / "model.onnx", "third")
    monkeypatch.setattr(int8, "convolutions", lambda path: {"c3": 1})
    with pytest.raises(BadBundle, match="with c3 alone, the least harmful of 1, raw scores within"):
        to_int8(path, IMAGES, proof_of(path), Said())


def test_the_fewest_stay_in_float32_and_the_rounds_are_bounded(
    plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a hundred, found by halving: as many as before would be refused."""
    harm = {f"c{number}": float(number * 37 % 100) for number in range(100)}
    tried: list[set[str]] = []
    written: set[str] = set()

    class Counted(Proof):
        def judge(self, path: Path) -> int8._Judged:
            tried.append(set(written))
            return int8._Judged(sum(harm[name] for name in written) < 1000, "far", {})

        def harm(self, path: Path) -> float:
            (only,) = written
            return harm[only]

    def quantised(path: Path, reach: Any, chosen: Any) -> None:
        written.clear()
        written.update(chosen)

    monkeypatch.setattr(int8, "convolutions", lambda path: dict.fromkeys(harm, 1))
    monkeypatch.setattr(int8, "quantise", quantised)
    report = to_int8(plain, IMAGES, Counted(IMAGES, scores(plain), None, META, None), Said())
    best_first = sorted(harm.values())
    most = next(n for n in range(101) if sum(best_first[: n + 1]) >= 1000)
    assert report["convolutions"] == most == len(written)
    assert report["float32"][0] == max(harm, key=lambda name: harm[name])
    assert len(tried) <= 1 + 7
