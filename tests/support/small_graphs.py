"""Small graphs of ONNX, an operator or two each: those that our exporter writes, and neighbours.

`image` is uint8 (n, 8, 8, 3), or `x` is float32 (n, 3, 8, 8); the first dimension is dynamic.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

F32, F16, U8, I8, I32, I64 = (
    TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.UINT8, TensorProto.INT8,
    TensorProto.INT32, TensorProto.INT64,
)  # fmt: skip
X = (3, 8, 8)
KERNEL = np.linspace(-1, 1, 4 * 3 * 3 * 3, dtype=np.float32).reshape(4, 3, 3, 3)

# A node is (operator, inputs, outputs, attributes); the last one gives `y`. An input `_` is none.
Nodes = list[tuple[str, str, str, dict[str, Any]]]


def ints(*values: int) -> np.ndarray[Any, Any]:
    return np.array(values, np.int64)


def f32(*values: float) -> np.ndarray[Any, Any]:
    return np.array(values, np.float32)


def one(operator: str, inputs: str = "x", **attributes: Any) -> Nodes:
    return [(operator, inputs, "y", attributes)]


_POOL = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "ceil_mode": 0}
_NEAREST = {"coordinate_transformation_mode": "asymmetric", "mode": "nearest",
            "nearest_mode": "floor", "cubic_coeff_a": -0.75}  # fmt: skip
_LINEAR = {**_NEAREST, "coordinate_transformation_mode": "half_pixel", "mode": "linear"}
_QUANTISE = {"s": f32(0.1), "z": np.int8([0])}
_EACH = {"k": KERNEL, "s": np.full(4, 0.1, np.float32), "z": np.zeros(4, np.int8)}

# What convtrt.py writes for the four kinds in f32, f16 and int8; test_against_the_real_library.py
# looks that none is missing.
WRITTEN: dict[str, tuple[Nodes, dict[str, Any]]] = {
    "Abs": (one("Abs"), {}),
    "Add": (one("Add", "x c"), {"c": f32(0.5)}),
    "ArgMax": (one("ArgMax", axis=1, keepdims=0, select_last_index=0), {}),
    "ArgMin": (one("ArgMin", axis=1, keepdims=0, select_last_index=0), {}),
    "AveragePool": (one("AveragePool", **_POOL, count_include_pad=1), {}),
    "AveragePool without its margin": (one("AveragePool", **_POOL, count_include_pad=0), {}),
    "Cast": (
        [("Cast", "x", "h", {"to": F16}), ("Relu", "h", "r", {}), ("Cast", "r", "y", {"to": F32})],
        {},
    ),
    "Cast of an image": (one("Cast", "image", to=F32), {}),
    "Clip": (one("Clip", "x low high"), {"low": np.float32(0), "high": np.float32(6)}),
    "Concat": (one("Concat", "x x", axis=1), {}),
    "Constant": (
        [
            ("Constant", "", "c", {"value": numpy_helper.from_array(f32(2))}),
            ("Mul", "x c", "y", {}),
        ],
        {},
    ),
    "ConstantOfShape": (
        [
            ("Shape", "x", "s", {}),
            ("ConstantOfShape", "s", "c", {"value": numpy_helper.from_array(f32(1))}),
            ("Add", "x c", "y", {}),
        ],
        {},
    ),
    "Conv": (
        one("Conv", "x k b", kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[1, 1],
            dilations=[1, 1], group=1),
        {"k": KERNEL, "b": f32(0, 1, 2, 3)},
    ),
    "DepthToSpace": (
        [("Concat", "x x x x", "c", {"axis": 1}),
         ("DepthToSpace", "c", "y", {"blocksize": 2, "mode": "CRD"})],
        {},
    ),
    "Div": (one("Div", "x c"), {"c": f32(0.5)}),
    "Flatten": (one("Flatten", axis=1), {}),
    "Gather": (one("Gather", "x i", axis=1), {"i": ints(0, 2)}),
    "Gemm": (
        [("Flatten", "x", "f", {"axis": 1}),
         ("Gemm", "f w b", "y", {"alpha": 1.0, "beta": 1.0, "transB": 1})],
        {"w": np.ones((5, 192), np.float32), "b": np.zeros(5, np.float32)},
    ),
    "LeakyRelu": (one("LeakyRelu", alpha=0.1), {}),
    "MatMul": (one("MatMul", "x w"), {"w": np.ones((8, 2), np.float32)}),
    "MaxPool": (one("MaxPool", **_POOL, dilations=[1, 1]), {}),
    "Mul": (one("Mul", "x x"), {}),
    "Pad": (one("Pad", "x p c", mode="constant"), {"p": ints(0, 0, 1, 1, 0, 0, 1, 1),
                                                  "c": np.float32(0)}),
    "Range": (
        [("Range", "start limit step", "r", {}), ("Cast", "r", "f", {"to": F32}),
         ("Add", "x f", "y", {})],
        {"start": np.int64(0), "limit": np.int64(8), "step": np.int64(1)},
    ),
    "ReduceMax": (one("ReduceMax", axes=[1, 2], keepdims=0), {}),
    "ReduceMean": (one("ReduceMean", axes=[1], keepdims=1), {}),
    "ReduceMin": (one("ReduceMin", axes=[1], keepdims=0), {}),
    "ReduceSum": (one("ReduceSum", "x a", keepdims=0), {"a": ints(1)}),
    "Relu": (one("Relu"), {}),
    "Reshape": (one("Reshape", "x s", allowzero=0), {"s": ints(-1, 3, 64)}),
    "Resize by a factor": (one("Resize", "x _ f", **_NEAREST), {"f": f32(1, 1, 2, 2)}),
    "Resize to a size": (
        [("Shape", "x", "s", {}), ("Slice", "s a b c", "n", {}),
         ("Concat", "n d", "t", {"axis": 0}), ("Resize", "x _ _ t", "y", _LINEAR)],
        {"a": ints(0), "b": ints(2), "c": ints(0), "d": ints(16, 16)},
    ),
    "Shape": (
        [("Shape", "x", "s", {}), ("Gather", "s i", "g", {"axis": 0}),
         ("Concat", "g d", "t", {"axis": 0}), ("Reshape", "x t", "y", {"allowzero": 0})],
        {"i": ints(0), "d": ints(-1)},
    ),
    "Sigmoid": (one("Sigmoid"), {}),
    "Slice": (one("Slice", "x a b c d"), {"a": ints(0), "b": ints(6), "c": ints(2), "d": ints(1)}),
    "Softmax": (one("Softmax", axis=1), {}),
    "Sqrt": (one("Sqrt"), {}),
    "Sub": (one("Sub", "x c"), {"c": f32(0.5)}),
    "TopK": (
        [("TopK", "x k", "y i", {"axis": 1, "largest": 0, "sorted": 1})], {"k": ints(2)},
    ),
    "Transpose": (one("Transpose", perm=[0, 2, 3, 1]), {}),
    "Unsqueeze": (one("Unsqueeze", "x a"), {"a": ints(1)}),
    "QuantizeLinear, DequantizeLinear": (
        [("QuantizeLinear", "x s z", "q", {}), ("DequantizeLinear", "q s z", "y", {})], _QUANTISE,
    ),
    "a quantised Conv": (
        [("QuantizeLinear", "x s1 z1", "q", {}), ("DequantizeLinear", "q s1 z1", "d", {}),
         ("QuantizeLinear", "k s z", "kq", {"axis": 0}),
         ("DequantizeLinear", "kq s z", "kd", {"axis": 0}),
         ("Conv", "d kd", "y", {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]})],
        {**_EACH, "s1": np.float32(0.1), "z1": np.int8(0)},
    ),
}  # fmt: skip

# What it must not write, or what stands beside it and may be tempting.
NEIGHBOURS: dict[str, tuple[Nodes, dict[str, Any]]] = {
    "an image that is only passed on": (
        [("Identity", "image", "i", {}), ("Cast", "i", "y", {"to": F32})], {}),
    "an image transposed before its cast": (
        [("Transpose", "image", "t", {"perm": [0, 3, 1, 2]}), ("Cast", "t", "y", {"to": F32})], {}),
    "a cast to uint8 amid the graph": (
        [("Cast", "x", "u", {"to": U8}), ("Cast", "u", "y", {"to": F32})], {}),
    "a cast to uint8 at the end": (one("Cast", to=U8), {}),
    "a cast to int8": ([("Cast", "x", "u", {"to": I8}), ("Cast", "u", "y", {"to": F32})], {}),
    "a cast to double": (
        [("Cast", "x", "u", {"to": TensorProto.DOUBLE}), ("Cast", "u", "y", {"to": F32})], {}),
    "a cast to int16": (
        [("Cast", "x", "u", {"to": TensorProto.INT16}), ("Cast", "u", "y", {"to": F32})], {}),
    "a cast to bool": (
        [("Cast", "x", "u", {"to": TensorProto.BOOL}), ("Cast", "u", "y", {"to": F32})], {}),
    "a cast to bfloat16": (
        [("Cast", "x", "u", {"to": TensorProto.BFLOAT16}), ("Cast", "u", "y", {"to": F32})], {}),
    "TopK unsorted": ([("TopK", "x k", "y i", {"axis": 1, "sorted": 0})], {"k": ints(2)}),
    "TopK of more than there are": ([("TopK", "x k", "y i", {"axis": 1})], {"k": ints(9)}),
    "TopK of 3840": (
        [("Concat", " ".join(["x"] * 21), "c", {"axis": 1}), ("Flatten", "c", "f", {"axis": 1}),
         ("TopK", "f k", "y i", {"axis": 1})], {"k": ints(3840)}),
    "TopK of 3841": (
        [("Concat", " ".join(["x"] * 21), "c", {"axis": 1}), ("Flatten", "c", "f", {"axis": 1}),
         ("TopK", "f k", "y i", {"axis": 1})], {"k": ints(3841)}),
    "QuantizeLinear to uint8": (
        [("QuantizeLinear", "x s z", "q", {}), ("DequantizeLinear", "q s z", "y", {})],
        {"s": f32(0.1), "z": np.uint8([0])}),
    "QuantizeLinear without a zero point": (
        [("QuantizeLinear", "x s", "q", {}), ("DequantizeLinear", "q s", "y", {})],
        {"s": f32(0.1)}),
    "QuantizeLinear with a zero point of 3": (
        [("QuantizeLinear", "x s z", "q", {}), ("DequantizeLinear", "q s z", "y", {})],
        {"s": f32(0.1), "z": np.int8([3])}),
    "Unique": ([("Unique", "x", "y", {"sorted": 1})], {}),
    "DynamicQuantizeLinear": ([("DynamicQuantizeLinear", "x", "y s z", {})], {}),
    "BitShift": (
        [("Cast", "x", "u", {"to": TensorProto.UINT32}),
         ("BitShift", "u u", "b", {"direction": "LEFT"}), ("Cast", "b", "y", {"to": F32})], {}),
    "Det": ([("Det", "x", "y", {})], {}),
    "Compress": ([("Compress", "x c", "y", {"axis": 1})], {"c": np.array([True, False, True])}),
    "a domain of its own": ([("Relu", "x", "y", {"domain": "com.example"})], {}),
    "an operator that nobody knows": ([("Sharpen", "x", "y", {})], {}),
    "a tensor that nobody makes": ([("Add", "x nobody", "y", {})], {}),
    "shapes that do not fit": ([("Add", "x c", "y", {})], {"c": np.ones((1, 3, 8, 7), np.float32)}),
    "a product whose sides do not fit": (one("MatMul", "x w"), {"w": np.ones((7, 2), np.float32)}),
    "Add of two types": ([("Add", "x c", "y", {})], {"c": np.ones(1, np.float16)}),
    "Identity": (one("Identity"), {}),
    "Squeeze": (one("Squeeze", "x1 a"), {"a": ints(1)}),
    "Where": (
        [("Greater", "x c", "g", {}), ("Where", "g x c", "y", {})], {"c": f32(0.5)}),
    "Expand": (one("Expand", "x1 s"), {"s": ints(1, 3, 8, 8)}),
    "Pow": (one("Pow", "x c"), {"c": f32(2)}),
    "Exp": (one("Exp"), {}),
    "Erf": (one("Erf"), {}),
    "HardSwish": (one("HardSwish"), {}),
    "GlobalAveragePool": (one("GlobalAveragePool"), {}),
    "BatchNormalization": (
        one("BatchNormalization", "x a b c d"),
        {name: np.ones(3, np.float32) for name in "abcd"}),
    "InstanceNormalization": (
        one("InstanceNormalization", "x a b"), {name: np.ones(3, np.float32) for name in "ab"}),
    "ConvTranspose": (
        one("ConvTranspose", "x k", kernel_shape=[2, 2], strides=[2, 2]),
        {"k": np.ones((3, 4, 2, 2), np.float32)}),
    "Einsum": (one("Einsum", "x x", equation="nchw,nchw->nc"), {}),
    "GatherElements": (
        [("TopK", "x k", "v i", {"axis": 1}), ("GatherElements", "x i", "y", {"axis": 1})],
        {"k": ints(2)}),
    "NonZero": ([("NonZero", "x", "i", {}), ("Cast", "i", "y", {"to": F32})], {}),
    "CumSum": (one("CumSum", "x a"), {"a": np.int32(1)}),
    "Mod": (one("Mod", "x c", fmod=1), {"c": f32(2)}),
    "Resize cubic": (one("Resize", "x _ f", mode="cubic"), {"f": f32(1, 1, 2, 2)}),
    "ReduceL2": (one("ReduceL2", axes=[1], keepdims=0), {}),
    "ScatterND": (
        [("ScatterND", "x i u", "y", {})],
        {"i": ints(0).reshape(1, 1), "u": np.ones((1, *X), np.float32)}),
}  # fmt: skip


def small_graph(nodes: Nodes, constants: dict[str, Any], opset: int = 17) -> bytes:
    """Inputs are `image`, `x` and `x1` (n, 1, 8, 8), where a node takes them; the output is `y`."""
    axes = [axis for node in nodes for axis in node[3].get("axes", [])]
    sides = {"image": (U8, ["n", 8, 8, 3]), "x": (F32, ["n", *X]), "x1": (F32, ["n", 1, 8, 8])}
    if opset >= 18:  # there the axes of a reduction are an input
        nodes = [
            (operator, f"{inputs} axes", outputs, {k: v for k, v in more.items() if k != "axes"})
            if "axes" in more
            else (operator, inputs, outputs, more)
            for operator, inputs, outputs, more in nodes
        ]
        constants = {**constants, "axes": ints(*axes)} if axes else constants
    taken = {name for node in nodes for name in node[1].split()}
    made = [
        helper.make_node(
            operator,
            [name if name != "_" else "" for name in inputs.split()],
            outputs.split(),
            f"{operator}_{number}".lower(),
            **attributes,
        )
        for number, (operator, inputs, outputs, attributes) in enumerate(nodes)
    ]
    graph = helper.make_graph(
        made,
        "small",
        [
            helper.make_tensor_value_info(name, kind, shape)
            for name, (kind, shape) in sides.items()
            if name in taken
        ],
        [helper.make_tensor_value_info("y", _kind_of(nodes), None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", opset)])
    data: bytes = model.SerializeToString()
    return data


def _kind_of(nodes: Nodes) -> int:
    """Of `y`."""
    operator, _, _, attributes = nodes[-1]
    if operator in ("ArgMax", "ArgMin"):
        return I64
    return int(attributes["to"]) if operator == "Cast" else F32
