"""What two ONNX graphs differ in: a plan is refitted only where it is the weights alone."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import Any

FLOATS = (1, 10, 11)  # float32, float16, double: what TensorRT calls weights


def difference(before: Path, after: Path) -> str | None:
    """What two graphs differ in beside the values of their weights; None where it is nothing.

    TensorRT's own refit goes by the names of the weights alone: it passes over what only the new
    file has, and does not look at the graph.
    """
    if find_spec("onnx") is None:
        return "the package onnx is not here, which compares the two graphs."
    import onnx

    old, new = (onnx.load(path, load_external_data=False) for path in (before, after))
    for what, a, b in (
        ("opsets", old.opset_import, new.opset_import),
        ("inputs", old.graph.input, new.graph.input),
        ("outputs", old.graph.output, new.graph.output),
    ):
        if [one.SerializeToString() for one in a] != [one.SerializeToString() for one in b]:
            return f"the two graphs have other {what}."
    for one, other in zip_longest(old.graph.node, new.graph.node):
        if one is None or other is None:
            return f"the graphs have {len(old.graph.node)} and {len(new.graph.node)} nodes."
        if one.SerializeToString() != other.SerializeToString():
            return f"the graphs differ at the node {other.name or other.op_type}."
    return _of_weights(old.graph.initializer, new.graph.initializer)


def _of_weights(old: Any, new: Any) -> str | None:
    for one, other in zip_longest(old, new):
        if one is None or other is None:
            return f"the graphs have {len(old)} and {len(new)} weights."
        if (one.name, one.data_type, one.dims) != (other.name, other.data_type, other.dims):
            return f"the graphs differ in the weights {other.name}, in name, type or shape."
        if one.data_type not in FLOATS and one.SerializeToString() != other.SerializeToString():
            return f"the graphs differ in {other.name}, which is no weight but a part of the graph."
    return None
