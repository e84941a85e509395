"""Torch model -> ONNX graph, and the proof that the graph says what the model says."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import openvino as ov
import torch
from numpy.typing import NDArray

from engines.errors import BadBundle
from engines.files import sha256
from engines.meta import Meta
from engines.runtimes import openvino
from engines.runtimes.bank_search import NEIGHBOURS
from engines.runtimes.openvino import OpenVINORuntime, cpu_has_bf16, read_graph
from engines.runtimes.openvino_lighter import convolutions, triangles
from engines.runtimes.parity import HALF_LIMIT, compare, compare_in
from engines.store.plan_record import Precision
from workers import models
from workers.converting.graphs import FLOATS

# A few images do not prove a limit for all: bf16 must keep half of it on these.
MARGIN = 0.5
MARGIN_OF_PARTS = 0.25  # of a graph that may be in bf16 in part: other photos were off twice as far

# Keys of meta.json that no graph depends on: what was learned, and what is set by hand.
_BESIDE_THE_GRAPH = {"image_threshold", "image_threshold_auto", "raw_image_min", "raw_image_max",
                     "calibration", "camera", "regions", "files"}  # fmt: skip
_EXPORTED_WITH = ("torch", "anomalib", "timm", "onnx", "openvino")

Opset = Literal[17, 18]
_TRY: dict[Precision, str] = {
    "f32": "Try another --opset.",
    "f16": "Try without --fp16, or another --opset.",
    "int8": "Try --fp16 in the place of --int8.",
}


def export_onnx(
    graph: torch.nn.Module, inputs: dict[str, torch.Tensor], path: Path, opset: Opset
) -> None:
    """Export a model as one graph, the first dimension of its inputs and outputs dynamic but for
    that of `keep`, which is of all images.

    Args:
        graph: gives `score`, `map` and, if it has a bank, `embedding`.
        inputs: name -> an example.

    `embedding` stays in the graph as the name of a tensor, not as an output: there a runtime may
    cut it.
    """
    # eval() on the outermost module: exporting has been seen to put a wrapped one into training.
    graph = graph.eval()
    names = ["score", "map", "embedding"] if "memory_bank" in inputs else ["score", "map"]
    dynamic = {name: {0: "n"} for name in ("image", *names)}
    dynamic["memory_bank"] = {0: "m"}
    written = io.BytesIO()  # torch opens no file whose name is not UTF-8
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        # The older exporter: the newer one writes opset 18 and cannot convert this graph to 17.
        torch.onnx.export(
            graph,
            tuple(inputs.values()),
            written,  # type: ignore[arg-type]  # the older exporter takes one
            dynamo=False,
            opset_version=opset,
            input_names=list(inputs),
            output_names=names,
            dynamic_axes={name: dynamic[name] for name in (*inputs, *names) if name in dynamic},
        )
    path.write_bytes(written.getvalue())
    model = onnx.load(path)
    for output in [output for output in model.graph.output if output.name == "embedding"]:
        model.graph.output.remove(output)
    _separate(model)
    _declare_sizes(model, path)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def made_of(
    meta: Meta, weights: Path, bank: NDArray[np.float32], opset: Opset, *, half: bool
) -> str:
    """All that the graph of a model with a memory bank follows from, as one SHA-256.

    Where it is that of the version before, so is the graph: a new bank is no part of it, but for
    one with fewer rows than a patch is compared with.
    """
    ours = [*sorted(Path(models.__file__).parent.glob("*.py")), Path(__file__)]
    parts = {
        "meta": meta.model_dump(mode="json", exclude=_BESIDE_THE_GRAPH),
        "weights": sha256(weights),
        "neighbours": min(len(bank), NEIGHBOURS),
        "opset": opset,
        "half": half,
        "packages": {name: version(name) for name in _EXPORTED_WITH},
        "code": [sha256(path) for path in ours],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _separate(model: onnx.ModelProto) -> None:
    """Give each layer weights of its own, with a name, apart from the nodes.

    The exporter lets layers share weights that happen to be equal, and writes tensors that are no
    parameters (PaDiM's) into nodes. So the graph would depend on what was learned, and a plan could
    not be refitted with what is learned next.
    """
    weights = {one.name: one for one in model.graph.initializer}
    for node in list(model.graph.node):
        found = None
        if node.op_type == "Identity":
            found = weights.get(node.input[0])
        elif node.op_type == "Constant" and node.attribute[0].t.data_type in FLOATS:
            found = node.attribute[0].t
        if found is not None:
            own = model.graph.initializer.add()
            own.CopyFrom(found)
            own.name = node.output[0]
            model.graph.node.remove(node)
    model.graph.initializer.sort(key=lambda one: str(one.name))


def _declare_sizes(model: onnx.ModelProto, path: Path) -> None:
    """Write down the sizes of outputs that the exporter left open, though they follow from others.

    Who runs the graph takes memory by them, before it has run.
    """
    found = {output.any_name: output.partial_shape for output in ov.Core().read_model(path).outputs}
    for output in model.graph.output:
        dimensions = output.type.tensor_type.shape.dim
        for dimension, side in zip(dimensions, found.get(output.name, []), strict=False):
            if side.is_static:
                dimension.dim_value = side.get_length()


def parity(
    path: Path,
    expected: NDArray[np.float32],
    images: NDArray[np.uint8],
    memory_bank: NDArray[np.float32] | None,
    meta: Meta,
    *,
    precision: Precision,
) -> dict[str, dict[str, Any]]:
    """Compare the exported graph with the torch model, in every way it can run here.

    Args:
        expected: raw scores (n,) of the float32 torch model.
        images: (n, S, S, 3) uint8 RGB.
        precision: of the graph itself.

    Returns:
        For `onnx` (the graph as TensorRT gets it), `openvino_f32` and, where the CPU has bf16 and
        there is no memory bank, `openvino_bf16`: max_relative, mean_relative, flips (verdicts that
        change) and ok; of one that is in bf16 in part float32_convolutions, too.

    Raises:
        BadBundle: the graph, or OpenVINO in float32, does not agree.
    """
    report = agreement(path, images, expected, memory_bank, meta, precision)
    for name, result in report.items():
        if not result["ok"]:
            raise BadBundle(
                f"The exported graph does not agree with the torch model ({name}: raw scores differ"
                f" by up to {result['max_relative']:.2e}, {result['flips']} of {len(images)}"
                f" verdicts flip); nothing was written. {_TRY[precision]}"
            )
    if memory_bank is None and cpu_has_bf16():
        parts = _parts_in_float32(path) if precision == "f32" else []
        if parts:
            report["openvino_bf16"] = _as_much_in_bf16(path, expected, images, meta, parts)
        else:
            served = served_scores(path, images, memory_bank, "bf16")
            report["openvino_bf16"] = compare(expected, served, meta, MARGIN * HALF_LIMIT)
    return report


def _parts_in_float32(path: Path) -> list[int]:
    """How many convolutions may stay in float32, rising; none where a graph is lowered as a whole.

    Only matrices that OpenVINO itself leaves in float32 make parts worth while.
    """
    model = ov.Core().read_model(path)
    if not triangles(model):
        return []
    every = len(convolutions(model))
    return sorted({0, min(1, every), every // 5, every // 2, every})


def _as_much_in_bf16(
    path: Path,
    expected: NDArray[np.float32],
    images: NDArray[np.uint8],
    meta: Meta,
    parts: list[int],
) -> dict[str, Any]:
    """How the graph agrees with as few convolutions in float32 as keep to the limit."""
    found: dict[str, Any] = {}
    for count in parts:
        served = served_scores(path, images, None, "bf16", count)
        found = compare(expected, served, meta, MARGIN_OF_PARTS * HALF_LIMIT)
        found["float32_convolutions"] = count
        if found["ok"]:
            break
    return found


def agreement(
    path: Path,
    images: NDArray[np.uint8],
    expected: NDArray[np.float32],
    memory_bank: NDArray[np.float32] | None,
    meta: Meta,
    precision: Precision,
) -> dict[str, dict[str, Any]]:
    """How the graph as it is, and as OpenVINO serves it in float32, agree: see `parity`."""
    plain = plain_scores(path, images, memory_bank)
    served = served_scores(path, images, memory_bank, "f32")
    return {
        "onnx": compare_in(precision, expected, plain, meta),
        "openvino_f32": compare_in(precision, expected, served, meta),
    }


def plain_scores(
    path: Path, images: NDArray[np.uint8], bank: NDArray[np.float32] | None
) -> NDArray[np.float32]:
    """Scores of the whole graph as exported, the bank as its input."""
    core, config = ov.Core(), {"INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(read_graph(core, path), "CPU", config).create_infer_request()
    extra = beside_the_image(request.model_inputs, bank)
    scores = [request.infer({"image": image[None], **extra})["score"] for image in images]
    return np.concatenate(scores)


def beside_the_image(
    inputs: list[ov.ConstOutput], bank: NDArray[np.float32] | None
) -> dict[str, NDArray[np.float32]]:
    """What a whole graph takes beside images: the bank, where there is one, and that all counts."""
    whole = {} if bank is None else {"memory_bank": bank}
    keep = next((one.get_shape() for one in inputs if one.any_name == "keep"), None)
    return whole if keep is None else {**whole, "keep": np.ones(keep, np.float32)}


def served_scores(
    path: Path,
    images: NDArray[np.uint8],
    bank: NDArray[np.float32] | None,
    precision: openvino.Precision,
    float32_convolutions: int | None = None,
) -> NDArray[np.float32]:
    """Scores as the server computes them."""
    runtime = OpenVINORuntime(
        path, bank, precision=precision, float32_convolutions=float32_convolutions
    )
    scores = [runtime.infer(image[None])[0] for image in images]
    runtime.close()
    return np.concatenate(scores)
