"""Small graphs of ONNX, and what they must say of a picture."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

SIDE, COLOURS = 4, 3
WEIGHTS = np.array([[0.5, -1.0], [2.0, 0.25], [-0.75, 1.5]], np.float32)


def graph(
    weights: NDArray[Any] = WEIGHTS,
    *,
    bank: bool = False,
    half: bool = False,
    cast_first: bool = True,
    opset: int = 17,
    extra: list[Any] | None = None,
) -> bytes:
    """The square of a colour's mean by two weights; with a bank, also its least product with it."""
    if half:
        weights = weights.astype(np.float16)
    to = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], "cast", to=to),
        helper.make_node("MatMul", ["pixels", "weights"], ["features_"], "product"),
        helper.make_node("Cast", ["features_"], ["features"], "back", to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["features", "last"], ["map"], "sum", keepdims=0),
        helper.make_node("ReduceMax", ["map"], ["score_"], "max", axes=[1, 2], keepdims=0),
        helper.make_node("Add", ["score_", "offset"], ["score"], "add"),
    ]
    inputs = [value("image", TensorProto.UINT8, ["n", SIDE, SIDE, COLOURS])]
    if not cast_first:
        nodes[:1] = [
            helper.make_node("Identity", ["image"], ["same"], "same"),
            helper.make_node("Cast", ["same"], ["pixels"], "cast", to=to),
        ]
    if bank:
        nodes[-1:] = [
            helper.make_node("ReduceSum", ["memory_bank"], ["total"], "total", keepdims=0),
            helper.make_node("Add", ["score_", "total"], ["score"], "add"),
        ]
        inputs.append(value("memory_bank", TensorProto.FLOAT, ["m", 2]))
    made = helper.make_graph(
        [*nodes, *(extra or [])],
        "tiny",
        inputs,
        [
            value("score", TensorProto.FLOAT, ["n"]),
            value("map", TensorProto.FLOAT, ["n", SIDE, SIDE]),
        ],
        [
            numpy_helper.from_array(weights, "weights"),
            numpy_helper.from_array(np.array([-1], np.int64), "last"),
            numpy_helper.from_array(np.float32([0.125]), "offset"),
        ],
    )
    return helper.make_model(
        made, ir_version=8, opset_imports=[helper.make_opsetid("", opset)]
    ).SerializeToString()


def value(name: str, kind: int, shape: list[Any]) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def expected(images: NDArray[np.uint8], weights: NDArray[Any] = WEIGHTS) -> NDArray[np.float32]:
    """The map (n, 4, 4)."""
    return (images.astype(np.float32) @ weights.astype(np.float32)).sum(axis=-1)


def some_images(count: int) -> NDArray[np.uint8]:
    shape = (count, SIDE, SIDE, COLOURS)
    return np.random.default_rng(count).integers(0, 255, shape, np.uint8)
