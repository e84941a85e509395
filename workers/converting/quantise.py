"""A float32 ONNX graph -> one whose convolutions compute in int8, as TensorRT wants it.

Explicit quantisation: a QuantizeLinear and a DequantizeLinear around each input of a convolution.
Symmetric (zero point 0), weights per output channel, activations per tensor, with ranges that were
measured on pictures of normal parts. The distances and sums after the backbone stay in float32,
and so does a convolution that sees the picture itself, or each channel alone: it costs little, and
rounding hurts most there.

A range reaches to the largest value that was seen. To cut the rarest values off, as is usual where
objects are named, does harm here: they are what makes a part a strange one.

Written by hand and not by onnxruntime's quantize_static: that would be one more runtime on a
Jetson for these 60 lines, and it keeps all activations of all pictures in memory for its
histograms.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino as ov
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from engines.errors import BadBundle
from workers.progress import Tick

COLOURS = 3
STEPS = 127


def convolutions(path: Path) -> dict[str, int]:
    """Those that could compute in int8, by name, and how many multiplications one picture takes.

    Raises:
        BadBundle: there is none.
    """
    graph = onnx.load(path).graph
    weights = {one.name: one for one in graph.initializer}
    chosen = [node for node in graph.node if _can_be_quantised(node, weights)]
    outputs = _tensors(ov.Core().read_model(path), [node.output[0] for node in chosen])
    found = {
        node.name: math.prod(weights[node.input[1]].dims) * _places(output)
        for node, output in zip(chosen, outputs, strict=True)
    }
    if not found:
        raise BadBundle(f"{path} has no convolution that could be quantised: leave out --int8.")
    return found


def _can_be_quantised(node: Any, weights: dict[str, Any]) -> bool:
    if node.op_type != "Conv" or node.input[1] not in weights:
        return False
    return bool(weights[node.input[1]].dims[1] > COLOURS)


def _places(output: ov.Output) -> int:
    """How many places (y, x) a convolution gives numbers for."""
    _, _, height, width = output.partial_shape
    return int(height.get_max_length() * width.get_max_length())


def measure(path: Path, images: NDArray[np.uint8], tick: Tick) -> dict[str, float]:
    """How far from zero the input of each convolution reaches: the largest over the images.

    Args:
        images: (n, S, S, 3) normal parts.
    """
    chosen = convolutions(path)
    names = sorted({node.input[0] for node in onnx.load(path).graph.node if node.name in chosen})
    core = ov.Core()
    model = core.read_model(path)
    results = [ov.opset8.result(output) for output in _tensors(model, names)]
    backbone = ov.Model(results, [model.input("image").get_node()])  # no distances: they take time
    request = core.compile_model(
        backbone, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    ).create_infer_request()
    reach = dict.fromkeys(names, 0.0)
    for number, image in enumerate(images, 1):
        found = request.infer({"image": image[None]}).values()
        for name, values in zip(names, found, strict=True):
            reach[name] = max(reach[name], float(np.abs(values).max()))
        tick(number, len(images))
    return reach


def _tensors(model: ov.Model, names: list[str]) -> list[ov.Output]:
    by_name = {
        name: output
        for node in model.get_ops()
        for output in node.outputs()
        for name in output.get_names()
    }
    return [by_name[name] for name in names]


def quantise(path: Path, reach: dict[str, float], chosen: Iterable[str]) -> None:
    """Rewrite a graph so that these of its convolutions compute in int8.

    Args:
        reach: as measured, of the same graph.
    """
    model, chosen = onnx.load(path), set(chosen)
    weights = {one.name: one for one in model.graph.initializer}
    added = _Pairs(model)
    for node in [node for node in model.graph.node if node.name in chosen]:
        kernel = numpy_helper.to_array(weights[node.input[1]])
        largest = np.abs(kernel).reshape(len(kernel), -1).max(axis=1)  # (out channels,)
        node.input[1] = added.around(node.input[1], largest, axis=0)
        node.input[0] = added.around(node.input[0], np.float32(reach[node.input[0]]))
    added.insert()
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


class _Pairs:
    """The nodes to be added: one pair for each tensor, just before who needs it first."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._made: dict[str, tuple[str, list[Any]]] = {}

    def around(self, name: str, largest: Any, axis: int | None = None) -> str:
        """The name of a tensor after its pair; `largest` is a number, or one per channel."""
        if name not in self._made:
            scale = np.asarray(largest, np.float32) / np.float32(STEPS)
            scale = np.where(scale >= np.finfo(np.float32).tiny, scale, np.float32(1))
            rest = [f"{name}_scale", f"{name}_zero"]
            self._model.graph.initializer.extend(
                [
                    numpy_helper.from_array(scale, rest[0]),
                    numpy_helper.from_array(np.zeros(scale.shape, np.int8), rest[1]),
                ]
            )
            low, back = f"{name}_int8", f"{name}_dequantised"
            more: dict[str, Any] = {} if axis is None else {"axis": axis}
            pair = [
                helper.make_node("QuantizeLinear", [name, *rest], [low], f"{low}_q", **more),
                helper.make_node("DequantizeLinear", [low, *rest], [back], f"{low}_dq", **more),
            ]
            self._made[name] = (back, pair)
        return self._made[name][0]

    def insert(self) -> None:
        waiting = dict(self._made.values())
        nodes = []
        for node in self._model.graph.node:
            for name in node.input:
                nodes += waiting.pop(name, [])
            nodes.append(node)
        del self._model.graph.node[:]
        self._model.graph.node.extend(nodes)
