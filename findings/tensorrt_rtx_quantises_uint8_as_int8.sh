#!/usr/bin/env bash
# TensorRT's ONNX parser takes QuantizeLinear for int8 where ONNX says uint8.
#
# Version: tensorrt-rtx-cu13 1.7.1.116 (onnx 1.23.2, numpy 2.4.6), x86-64, no GPU and no driver.
# Behaviour: without a zero point QuantizeLinear gives uint8, 0 to 255 (ONNX, and its reference
#   evaluator: 20.0 with a scale of 0.1 is 200). In TensorRT's network the same node is INT8, -128 to
#   127, so whatever is above 12.7 cannot be told apart; nothing is said, not even as a warning. A
#   zero point of 0 that is uint8 gives the same network, with a warning ("Defaulting to INT8"); one of
#   another value is refused. Both graphs are built.
# Why it matters: symmetric uint8 is what is common for activations behind a Relu. A graph that is
#   right in onnxruntime and OpenVINO loses the upper half of its range, and nobody says so.
# Not looked at: what a GPU computes. This machine has none; the types are those of the network.
# Seen: the lines that this script prints, and compares.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tensorrt-rtx-cu13==1.7.1.116 onnx==1.23.2 numpy==2.4.6
cat > "$folder/run.py" <<'PYTHON'
import numpy as np
import onnx
import tensorrt_rtx as trt
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

value = helper.make_tensor_value_info


def graph(zero):
    """x -> QuantizeLinear (`q`) -> DequantizeLinear (`y`), with a scale of 0.1."""
    names = ["scale"] if zero is None else ["scale", "zero"]
    constants = [numpy_helper.from_array(np.float32([0.1]), "scale")]
    if zero is not None:
        constants.append(numpy_helper.from_array(zero, "zero"))
    made = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", *names], ["q"], "quantise"),
            helper.make_node("DequantizeLinear", ["q", *names], ["y"], "back"),
        ],
        "quantised",
        [value("x", TensorProto.FLOAT, [1, 4])],
        [value("y", TensorProto.FLOAT, [1, 4])],
        constants,
    )
    model = helper.make_model(made, ir_version=10, opset_imports=[helper.make_opsetid("", 21)])
    onnx.checker.check_model(model, full_check=True)
    return model


class Log(trt.ILogger):
    def __init__(self):
        trt.ILogger.__init__(self)
        self.lines = []

    def log(self, severity, message):
        if severity <= trt.ILogger.WARNING and "cudaError 35" not in message:
            self.lines.append(message)


def tensorrt(model):
    """Whether it is taken, the type of `q`, whether it is built, and what is said."""
    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse(model.SerializeToString()):
        return False, None, False, log.lines
    layers = [network.get_layer(number) for number in range(network.num_layers)]
    (layer,) = [one for one in layers if one.type == trt.LayerType.QUANTIZE]
    kind = layer.get_output(0).dtype.name
    said = list(log.lines)
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    built = builder.build_serialized_network(network, config) is not None
    return True, kind, built, said


print("tensorrt_rtx", trt.__version__, "onnx", onnx.__version__)
given = np.float32([[-20, 5, 12.7, 20]])
(plain,) = ReferenceEvaluator(graph(None)).run(None, {"x": given})
print("ONNX:", given.tolist(), "->", plain.round(3).tolist())
assert plain.round(3).tolist() == np.float32([[0, 5, 12.7, 20]]).round(3).tolist()

taken, kind, built, said = tensorrt(graph(None))
print("no zero point: taken", taken, "type of q", kind, "built", built, "said", said)
assert (taken, kind, built, said) == (True, "INT8", True, [])

taken, kind, built, said = tensorrt(graph(np.uint8([0])))
print("uint8 zero point 0: taken", taken, "type of q", kind, "built", built, "said", len(said))
assert (taken, kind, built) == (True, "INT8", True)
assert said and all("Defaulting to INT8" in line for line in said), said

taken, *_ = tensorrt(graph(np.uint8([128])))
print("uint8 zero point 128: taken", taken)
assert not taken
print("as described")
PYTHON
"$folder/venv/bin/python" "$folder/run.py"
