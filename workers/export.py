"""Torch model -> ONNX graph, and the proof that the graph says what the model says."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import openvino as ov
import torch
from numpy.typing import NDArray

from engines.errors import BadBundle
from engines.meta import Meta
from engines.runtimes.openvino import OpenVINORuntime, Precision, cpu_has_bf16
from engines.verdict import Scale, decide

# Largest relative difference of raw scores from the float32 torch model that is accepted.
FLOAT32_LIMIT = 1e-3
HALF_LIMIT = 1e-2  # of a graph or a runtime with half precision in its backbone
# A few images do not prove a limit for all: bf16 must keep half of it on these.
MARGIN = 0.5

Opset = Literal[17, 18]


def export_onnx(
    graph: torch.nn.Module, inputs: dict[str, torch.Tensor], path: Path, opset: Opset
) -> None:
    """Export a model as one graph, the first dimension of its inputs and outputs dynamic.

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
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        # The older exporter: the newer one writes opset 18 and cannot convert this graph to 17.
        torch.onnx.export(
            graph,
            tuple(inputs.values()),
            str(path),
            dynamo=False,
            opset_version=opset,
            input_names=list(inputs),
            output_names=names,
            dynamic_axes={name: dynamic[name] for name in (*inputs, *names)},
        )
    model = onnx.load(path)
    for output in [output for output in model.graph.output if output.name == "embedding"]:
        model.graph.output.remove(output)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def parity(
    path: Path,
    expected: NDArray[np.float32],
    images: NDArray[np.uint8],
    memory_bank: NDArray[np.float32] | None,
    meta: Meta,
    *,
    half: bool,
) -> dict[str, dict[str, Any]]:
    """Compare the exported graph with the torch model, in every way it can run here.

    Args:
        expected: raw scores (n,) of the float32 torch model.
        images: (n, S, S, 3) uint8 RGB.
        half: whether the graph itself holds half precision.

    Returns:
        For `onnx` (the graph as TensorRT gets it), `openvino_f32` and, where the CPU has bf16,
        `openvino_bf16`: max_relative, mean_relative, flips (verdicts that change) and ok.

    Raises:
        BadBundle: the graph, or OpenVINO in float32, does not agree.
    """
    limit = HALF_LIMIT if half else FLOAT32_LIMIT
    report = {
        "onnx": _compare(expected, _plain_scores(path, images, memory_bank), meta, limit),
        "openvino_f32": _compare(
            expected, _served_scores(path, images, memory_bank, "f32"), meta, limit
        ),
    }
    for name, result in report.items():
        if not result["ok"]:
            raise BadBundle(
                f"The exported graph does not agree with the torch model ({name}: raw scores differ"
                f" by up to {result['max_relative']:.2e}, {result['flips']} of {len(images)}"
                " verdicts flip); nothing was written. Try without --fp16, or another --opset."
            )
    if cpu_has_bf16():
        served = _served_scores(path, images, memory_bank, "bf16")
        report["openvino_bf16"] = _compare(expected, served, meta, MARGIN * HALF_LIMIT)
    return report


def _compare(
    expected: NDArray[np.float32], found: NDArray[np.float32], meta: Meta, limit: float
) -> dict[str, Any]:
    relative = np.abs(found - expected) / np.maximum(np.abs(expected), 1e-12)
    if not np.isfinite(found).all():
        return {"max_relative": 1e9, "mean_relative": 1e9, "flips": len(found), "ok": False}
    flips = 0
    if meta.image_threshold_auto is not None and meta.raw_image_max is not None:
        threshold = Scale.of(meta).raw_threshold
        pairs = zip(expected, found, strict=True)
        flips = sum(decide(float(a), threshold) != decide(float(b), threshold) for a, b in pairs)
    return {
        "max_relative": float(relative.max()),
        "mean_relative": float(relative.mean()),
        "flips": flips,
        "ok": bool(relative.max() <= limit and flips == 0),
    }


def _plain_scores(
    path: Path, images: NDArray[np.uint8], bank: NDArray[np.float32] | None
) -> NDArray[np.float32]:
    """Scores of the whole graph as exported, the bank as its input."""
    config = {"INFERENCE_PRECISION_HINT": "f32"}
    request = ov.Core().compile_model(str(path), "CPU", config).create_infer_request()
    extra = {} if bank is None else {"memory_bank": bank}
    scores = [request.infer({"image": image[None], **extra})["score"] for image in images]
    return np.concatenate(scores)


def _served_scores(
    path: Path,
    images: NDArray[np.uint8],
    bank: NDArray[np.float32] | None,
    precision: Precision,
) -> NDArray[np.float32]:
    """Scores as the server computes them."""
    runtime = OpenVINORuntime(path, bank, precision=precision)
    scores = [runtime.infer(image[None])[0] for image in images]
    runtime.close()
    return np.concatenate(scores)
