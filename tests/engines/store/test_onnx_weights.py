"""Weights that are no numbers are found however a graph holds them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines.errors import BadBundle
from engines.runtimes.openvino import OpenVINORuntime
from engines.serving.opening import Opening, open_model
from engines.store import onnx_weights
from engines.store.bundle import ONNX
from engines.store.onnx_weights import check_weights
from support.double import doubled
from support.plans import seal, tiny_bank, tiny_bundle, with_plan

NO_NUMBERS = [math.nan, math.inf, -math.inf]
Holder = Callable[[list[float]], Any]  # how a graph holds some numbers


def tensor(kind: int, raw: bool) -> Holder:
    def make(numbers: list[float]) -> Any:
        if not raw:
            return helper.make_tensor("weights", kind, [len(numbers)], numbers)
        if kind == TensorProto.BFLOAT16:  # the upper half of a float32
            bits = (np.asarray(numbers, "<f4").view("<u4") >> 16).astype("<u2").tobytes()
            return helper.make_tensor("weights", kind, [len(numbers)], bits, raw=True)
        dtype = helper.tensor_dtype_to_np_dtype(kind)
        return numpy_helper.from_array(np.asarray(numbers, dtype), "weights")

    return make


def saved(path: Path, nodes: list[Any], weights: list[Any], sparse: list[Any] = []) -> Path:  # noqa: B006
    value = helper.make_tensor_value_info("image", TensorProto.UINT8, ["n"])
    graph = helper.make_graph(nodes, "g", [value], [value], weights)
    graph.sparse_initializer.extend(sparse)
    path.write_bytes(helper.make_model(graph).SerializeToString())
    return path


def constant(**how: Any) -> Any:
    return helper.make_node("Constant", [], ["weights"], **how)


def in_a_branch(numbers: list[float]) -> Any:
    inner = helper.make_graph([], "then", [], [], [tensor(TensorProto.FLOAT, True)(numbers)])
    return helper.make_node("If", ["image"], ["image_"], then_branch=inner, else_branch=inner)


def unpacked(numbers: list[float]) -> Any:
    """Each number a field of its own, which protobuf allows as well: field 4, four bytes."""
    whole = onnx.TensorProto(dims=[len(numbers)], data_type=TensorProto.FLOAT, name="weights")
    each = b"".join(b"\x25" + np.float32(one).tobytes() for one in numbers)
    return onnx.TensorProto.FromString(whole.SerializeToString() + each)


KINDS = [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE]
AS_WEIGHTS = {
    f"{TensorProto.DataType.Name(kind)} {'as bytes' if raw else 'as fields'}": tensor(kind, raw)
    for kind in KINDS
    for raw in (True, False)
} | {"one by one": unpacked}
AS_NODES: dict[str, Holder] = {
    "a constant": lambda some: constant(value=tensor(TensorProto.FLOAT, True)(some)),
    "numbers of a node": lambda some: constant(value_floats=some),
    "a number of a node": lambda some: constant(value_float=some[1]),
    "in a branch": in_a_branch,
}


@pytest.mark.parametrize("number", NO_NUMBERS)
@pytest.mark.parametrize("how", AS_WEIGHTS)
def test_a_weight_that_is_no_number_is_found(how: str, number: float, tmp_path: Path) -> None:
    held = AS_WEIGHTS[how]
    # The largest float32, so that nothing but the exponent of infinity is taken for it.
    large = 65504.0 if "16" in how else 3.4028234663852886e38
    check_weights(saved(tmp_path / "good.onnx", [], [held([0.5, -2.0, large, 0.0])]))
    with pytest.raises(BadBundle, match=r"bad\.onnx holds weights that are not finite"):
        check_weights(saved(tmp_path / "bad.onnx", [], [held([0.5, number, large])]))


@pytest.mark.parametrize("number", NO_NUMBERS)
@pytest.mark.parametrize("how", AS_NODES)
def test_a_constant_that_is_no_number_is_found(how: str, number: float, tmp_path: Path) -> None:
    held = AS_NODES[how]
    check_weights(saved(tmp_path / "good.onnx", [held([0.5, -2.0])], []))
    with pytest.raises(BadBundle, match="not finite"):
        check_weights(saved(tmp_path / "bad.onnx", [held([0.5, number])], []))


def test_a_sparse_weight_that_is_no_number_is_found(tmp_path: Path) -> None:
    at = helper.make_tensor("at", TensorProto.INT64, [1], [3])
    sparse = helper.make_sparse_tensor(tensor(TensorProto.FLOAT, True)([math.nan]), at, [9])
    with pytest.raises(BadBundle, match="not finite"):
        check_weights(saved(tmp_path / "bad.onnx", [], [], [sparse]))


def test_integers_are_numbers_whatever_their_bits(tmp_path: Path) -> None:
    bits = np.float32([math.nan, math.inf]).view(np.int32)
    check_weights(saved(tmp_path / "good.onnx", [], [numpy_helper.from_array(bits, "shape")]))


def test_the_last_of_many_weights_is_looked_at(tmp_path: Path) -> None:
    many = np.zeros(onnx_weights._CHUNK // 4 * 2 + 1, np.float32)
    many[-1] = math.nan
    with pytest.raises(BadBundle, match="not finite"):
        check_weights(saved(tmp_path / "bad.onnx", [], [numpy_helper.from_array(many, "weights")]))


@pytest.mark.parametrize("data", [b"", b"no ONNX", b"\x3a\xff\xff\xff\x7f", b"\xff" * 40])
def test_what_is_no_graph_is_refused_by_name(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    with pytest.raises(BadBundle, match=r"model\.onnx is not a readable ONNX model"):
        check_weights(path)


def test_graphs_in_graphs_in_graphs_end_no_process(tmp_path: Path) -> None:
    inner = b""
    for _ in range(3_000):  # a node's attribute's graph
        for key in (b"\x32", b"\x2a", b"\x0a"):
            inner = key + helper_varint(len(inner)) + inner
    path = tmp_path / "deep.onnx"
    path.write_bytes(b"\x3a" + helper_varint(len(inner)) + inner)
    check_weights(path)


def helper_varint(number: int) -> bytes:
    found = bytearray()
    while number >= 0x80:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])


def test_ten_megabytes_take_a_few_milliseconds(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((64, 10_000_000 // 64 // 4)).astype(np.float32)
    weights = [numpy_helper.from_array(row, f"w{at}") for at, row in enumerate(rows)]
    path = saved(tmp_path / "model.onnx", [], weights)

    def took() -> float:
        began = time.process_time()
        check_weights(path)
        return time.process_time() - began

    assert min(took() for _ in range(5)) < 0.03  # 4 ms where it was measured


# Whatever runs it


def broken(folder: Path, what: str) -> Path:
    """A whole model, with its hashes, which holds a NaN that its Relu makes a number of."""
    bundle = tiny_bundle(folder, tiny_bank(0) if what == "a bank" else None)
    if what == "a bank":
        rows = tiny_bank(0)
        rows[7, 3] = math.nan
        np.savez(bundle / "memory_bank.npz", embeddings=rows, coverage_radius=np.float32(1))
    else:
        model = onnx.load(bundle / ONNX)
        weights = numpy_helper.to_array(model.graph.initializer[0]).copy()
        weights[5, 2] = math.nan
        model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weights, "weights"))
        embed = next(node for node in model.graph.node if node.name == "embed")
        embed.output[0] = "before_relu"
        at = list(model.graph.node).index(embed) + 1
        model.graph.node.insert(at, helper.make_node("Relu", ["before_relu"], ["embedding"]))
        onnx.save(model, bundle / ONNX)
    seal(bundle)
    return bundle


SAID = {"weights": r"model\.onnx holds weights", "a bank": r"memory_bank\.npz: embeddings holds"}


@pytest.mark.parametrize("what", SAID)
def test_openvino_opens_no_model_that_holds_what_is_no_number(what: str, tmp_path: Path) -> None:
    with pytest.raises(BadBundle, match=f"{SAID[what]}.* not finite"):
        open_model(broken(tmp_path / "part", what), "part", "1", Opening())


@pytest.mark.parametrize("what", SAID)
def test_nor_does_tensorrt_though_there_is_a_plan_of_it(what: str, tmp_path: Path) -> None:
    folder = with_plan(broken(tmp_path / "part", what), tmp_path / "planned")
    with doubled(), pytest.raises(BadBundle, match=f"{SAID[what]}.* not finite"):
        open_model(folder, "part", "1", Opening(runtime="tensorrt"))


def test_without_the_check_a_relu_would_make_a_verdict_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it has to be looked for in the weights."""
    monkeypatch.setattr("engines.runtimes.openvino.check_weights", lambda _: None)
    runtime = OpenVINORuntime(broken(tmp_path / "part", "weights") / ONNX)
    score, map_ = runtime.infer(np.full((1, 32, 32, 3), 128, np.uint8))
    assert np.isfinite(np.append(score, map_)).all()
