"""A graph without a memory bank, rewritten so that a CPU reads and multiplies less for the same.

- PaDiM's matrices, one for each position, are triangular: a product with one is made in blocks of
  rows, each without the columns that are zero below it. That is exact, and reads two thirds.
- In bf16 these matrices take half of that. A product of two bf16 numbers is added up in float32,
  and of thousands of such errors little is left in a score.
- Convolutions in bf16 take half the time. The first of them harm most (they see the picture itself,
  and all later ones see their errors), so they may stay in float32: how many is found by proof, see
  `workers.converting.export`.

OpenVINO's own way (INFERENCE_PRECISION_HINT) lowers all or nothing, and leaves the matrices.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops
from numpy.typing import NDArray

BLOCKS = 3  # of rows: with more, less is read, but each product takes its start as well

_CONVOLUTIONS = {"Convolution", "GroupConvolution"}
_GO_ALONG = {"Relu", "Clamp", "Add", "Multiply", "MaxPool", "AvgPool"}  # with those before them
_FLOAT, _BF16 = ov.Type.f32, ov.Type.bf16


def triangles(model: ov.Model) -> list[ov.Node]:
    """The products of a graph with triangular matrices, one for each position: PaDiM's has one."""
    return [
        node
        for node in model.get_ordered_ops()
        if node.get_type_name() == "MatMul" and _is_triangular(node)
    ]


def convolutions(model: ov.Model) -> list[str]:
    """The names of a graph's convolutions, in the order in which they are computed."""
    ordered = model.get_ordered_ops()
    return [one.get_friendly_name() for one in ordered if one.get_type_name() in _CONVOLUTIONS]


def lighten(model: ov.Model, float32_convolutions: int | None) -> None:
    """Rewrite a graph, in place.

    Args:
        float32_convolutions: so many stay in float32, and all else that may is in bf16; None: all
            stays in float32.
    """
    for product in triangles(model):
        _in_blocks(product, in_bf16=float32_convolutions is not None)
    if float32_convolutions is not None:
        _Lowering(convolutions(model)[float32_convolutions:]).of(model)
    model.validate_nodes_and_infer_types()


def _is_triangular(product: ov.Node) -> bool:
    """Whether it is of constants (P, n, n) with numbers (P, n, N), zero where blocks leave out."""
    left = product.input_value(0)
    at = product.get_attributes()
    if left.get_node().get_type_name() != "Constant" or at["transpose_a"] or at["transpose_b"]:
        return False
    shape = list(left.get_shape())
    if len(shape) != 3 or shape[1] != shape[2] or shape[1] < BLOCKS:
        return False
    if left.get_element_type() != _FLOAT:
        return False
    matrices = left.get_node().data
    return not any(matrices[:, rows, rows.stop :].any() for rows in _blocks(shape[1]))


def _blocks(n: int) -> list[slice]:
    """Rows, in pieces of about the same length."""
    edges = [n * index // BLOCKS for index in range(BLOCKS + 1)]
    return [slice(start, stop) for start, stop in pairwise(edges)]


def _in_blocks(product: ov.Node, *, in_bf16: bool) -> None:
    """Compute W x, (P, n, n) and (P, n, N), as some rows of W with as many of x as they see.

    W stays on the left, where OpenVINO uses it in place; on the right it would be packed, and be
    in memory twice.
    """
    matrices, numbers = product.input_value(0).get_node().data, product.input_value(1)
    if in_bf16:
        numbers = ops.convert(numbers, _BF16).output(0)
    parts = []
    for rows in _blocks(matrices.shape[1]):
        block = np.ascontiguousarray(matrices[:, rows, : rows.stop])
        seen = ops.slice(numbers, *(np.array([one]) for one in (0, rows.stop, 1, 1)))
        weights = _rounded(block) if in_bf16 else ops.constant(block)
        parts.append(ops.matmul(weights, seen, False, False))
    whole = ops.concat(parts, 1)
    if in_bf16:
        whole = ops.convert(whole, _FLOAT)
    _replace(product.output(0), whole.output(0))


def _replace(before: ov.Output, after: ov.Output) -> None:
    for asks in list(before.get_target_inputs()):
        asks.replace_source_output(after)


def _rounded(values: NDArray[np.float32]) -> ov.Node:
    """A constant in bf16, rounded to the nearest.

    OpenVINO cuts off where the last bit that is kept is 0, and all scores become less.
    """
    rounded = ov.Tensor(_BF16, ov.Shape(values.shape))
    bits = np.ascontiguousarray(values).view(np.uint32) + 0x8000
    np.right_shift(bits, 16, out=rounded.data.view(np.uint16), casting="unsafe")
    return ops.constant(rounded)


def _constant(value: ov.Output) -> NDArray[np.float32] | None:
    """The numbers of a float32 constant, also of a reshaped one, as biases are."""
    node = value.get_node()
    if node.get_type_name() == "Reshape":
        node = node.input_value(0).get_node()
    if node.get_type_name() != "Constant" or node.get_element_type() != _FLOAT:
        return None
    numbers: NDArray[np.float32] = node.data.reshape(value.get_shape())
    return numbers


class _Lowering:
    """Some convolutions in bf16, and what follows them; all else is given float32 as before."""

    def __init__(self, chosen: list[str]) -> None:
        self._chosen = set(chosen)
        self._lowered: set[str] = set()
        self._converted: dict[tuple[str, int, Any], ov.Output] = {}

    def of(self, model: ov.Model) -> None:
        for node in model.get_ordered_ops():
            after = [self._is_lowered(value) for value in node.input_values()]
            name, kind = node.get_friendly_name(), node.get_type_name()
            if name in self._chosen or (kind in _GO_ALONG and any(after)):
                self._lower(node)
                self._lowered.add(name)
            elif any(after):
                for index, value in enumerate(node.input_values()):
                    if after[index]:
                        self._give(node, index, self._as(value, _FLOAT))

    def _is_lowered(self, value: ov.Output) -> bool:
        return value.get_node().get_friendly_name() in self._lowered

    def _lower(self, node: ov.Node) -> None:
        for index, value in enumerate(node.input_values()):
            if (numbers := _constant(value)) is not None:
                self._give(node, index, _rounded(numbers).output(0))
            elif not self._is_lowered(value):
                self._give(node, index, self._as(value, _BF16))

    def _as(self, value: ov.Output, kind: ov.Type) -> ov.Output:
        key = (value.get_node().get_friendly_name(), value.get_index(), kind)
        if key not in self._converted:
            self._converted[key] = ops.convert(value, kind).output(0)
        return self._converted[key]

    @staticmethod
    def _give(node: ov.Node, index: int, value: ov.Output) -> None:
        node.input(index).replace_source_output(value)
