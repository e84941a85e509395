#!/usr/bin/env bash
# TensorRT's ONNX parser: once a call has failed, the same parser refuses every graph, though its
# errors were cleared, and blames a node that is right.
#
# Version: tensorrt-rtx-cu13 1.7.1.116 (onnx 1.23.2, numpy 2.4.6), x86-64, no GPU and no driver.
# Behaviour: `parse_from_file` of a file that is not there is False, with one error. After
#   `clear_errors()` ("Clear errors from prior calls to parse") `num_errors` is 0. A graph that any
#   other parser takes is then refused: INVALID_NODE at its first node, whose description quotes the
#   error of the file that was not there. The network keeps the graph's input. The same after bytes
#   that are no ONNX. Without `clear_errors()` it is refused too, and `num_errors` stays 1: it is the
#   old error that is read as the reason.
# Where one meets it: a program that waits for a file, and tries again.
# What helps: a new network and a new parser for each try.
# Seen: the lines that this script prints, and compares.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tensorrt-rtx-cu13==1.7.1.116 onnx==1.23.2 numpy==2.4.6
cat > "$folder/run.py" <<'PYTHON'
import sys

import tensorrt_rtx as trt
from onnx import TensorProto, helper

path = sys.argv[1]
value = helper.make_tensor_value_info
graph = helper.make_graph(
    [helper.make_node("Relu", ["x"], ["y"], "innocent")],
    "right",
    [value("x", TensorProto.FLOAT, [1, 3])],
    [value("y", TensorProto.FLOAT, [1, 3])],
)
good = helper.make_model(
    graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]
).SerializeToString()


class Quiet(trt.ILogger):
    def __init__(self):
        trt.ILogger.__init__(self)

    def log(self, severity, message):
        pass


logger = Quiet()
builder = trt.Builder(logger)


def told(parser):
    return [(one.code().name, one.node_name(), one.desc()) for one in map(
        parser.get_error, range(parser.num_errors))]


def first(fail):
    """What a parser says of a good graph after it has failed at something else."""
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert not fail(parser)
    reason = parser.get_error(0).desc()
    parser.clear_errors()
    assert parser.num_errors == 0
    taken = parser.parse_from_file(path)
    (code, node, words) = told(parser)[0]
    print(f"after {reason[:72]!r}...")
    print(f"  the good graph: {taken}, {code} at {node!r}")
    assert not taken
    assert (code, node) == ("INVALID_NODE", "innocent")
    assert reason in words, "the old error is in the new one"
    assert (network.num_inputs, network.num_outputs) == (1, 0)


print("tensorrt_rtx", trt.__version__)
open(path, "wb").write(good)
first(lambda parser: parser.parse_from_file(path + ".absent"))
first(lambda parser: parser.parse(b"no ONNX" * 50))

network = builder.create_network(0)
parser = trt.OnnxParser(network, logger)
assert not parser.parse_from_file(path + ".absent")
before = told(parser)
assert not parser.parse_from_file(path)
assert told(parser) == before
print("without clear_errors(): refused, and only the old error is there")

network = builder.create_network(0)
assert trt.OnnxParser(network, logger).parse_from_file(path)
assert (network.num_inputs, network.num_outputs) == (1, 1)
print("another parser takes it")
print("as described")
PYTHON
"$folder/venv/bin/python" "$folder/run.py" "$folder/right.onnx"
