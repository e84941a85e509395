"""--int8: a float32 ONNX graph -> one whose convolutions compute in int8, as TensorRT wants it.

Explicit quantisation: a QuantizeLinear and a DequantizeLinear around each input of a convolution.
Symmetric (zero point 0), weights per output channel, activations per tensor, with ranges that were
measured on pictures of normal parts. The distances and sums after the backbone stay in float32, and
so does a convolution that sees the picture itself: it costs little, and rounding hurts most there.

Written by hand and not by onnxruntime's quantize_static: that would be one more runtime on a
Jetson for these 60 lines, and it keeps all activations of all pictures in memory for its
histograms.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino as ov
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from engines.errors import BadBundle
from workers.converting.export import beside_the_image
from workers.progress import Tick

COLOURS = 3
KEPT = 99.99  # percent of an activation's values that lie inside its range; the others are cut
STEPS = 127


def quantise(
    path: Path, images: NDArray[np.uint8], bank: NDArray[np.float32] | None, tick: Tick
) -> int:
    """Rewrite a graph, and return how many convolutions compute in int8 now.

    Args:
        images: (n, S, S, 3) normal parts.
        bank: the memory bank, for a graph with that input.
    """
    model = onnx.load(path)
    weights = {one.name: one for one in model.graph.initializer}
    chosen = [node for node in model.graph.node if _is_quantised(node, weights)]
    if not chosen:
        raise BadBundle(f"{path} has no convolution that could be quantised: leave out --int8.")
    reach = _measure(path, sorted({node.input[0] for node in chosen}), images, bank, tick)
    added = _Pairs(model)
    for node in chosen:
        kernel = numpy_helper.to_array(weights[node.input[1]])
        largest = np.abs(kernel).reshape(len(kernel), -1).max(axis=1)  # (out channels,)
        node.input[1] = added.around(node.input[1], largest, axis=0)
        node.input[0] = added.around(node.input[0], np.float32(reach[node.input[0]]))
    added.insert()
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return len(chosen)


def _is_quantised(node: Any, weights: dict[str, Any]) -> bool:
    if node.op_type != "Conv" or node.input[1] not in weights:
        return False
    return bool(weights[node.input[1]].dims[1] > COLOURS)


def _measure(
    path: Path,
    names: list[str],
    images: NDArray[np.uint8],
    bank: NDArray[np.float32] | None,
    tick: Tick,
) -> dict[str, float]:
    """How far from zero each tensor reaches: the largest over the images."""
    core = ov.Core()
    model = core.read_model(path)
    model.add_outputs(names)
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    request = compiled.create_infer_request()
    reach = dict.fromkeys(names, 0.0)
    extra = beside_the_image(request.model_inputs, bank)
    for number, image in enumerate(images, 1):
        results = request.infer({"image": image[None], **extra})
        for name in names:
            found = float(np.percentile(np.abs(results[name]), KEPT))
            reach[name] = max(reach[name], found)
        tick(number, len(images))
    return reach


class _Pairs:
    """The nodes to be added: one pair for each tensor, just before who needs it first."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._made: dict[str, tuple[str, list[Any]]] = {}

    def around(self, name: str, largest: Any, axis: int | None = None) -> str:
        """The name of a tensor after its pair; `largest` is a number, or one per channel."""
        if name not in self._made:
            scale = np.where(largest > 0, np.asarray(largest) / STEPS, 1).astype(np.float32)
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
