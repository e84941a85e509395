#!/usr/bin/env bash
# OpenVINO on a CPU: the maximum of NaN is a number.
#
# Version: openvino 2026.4.1 (numpy 2.4.6), CPU plugin, x86-64.
# Behaviour: ReduceMax, MaxPool, Relu and Clamp answer with finite numbers where their input is NaN,
#   and raise nothing. ReduceMax over NaN alone gives the lowest float32, -3.4028235e+38. numpy, torch
#   and the ONNX reference evaluator give NaN for ReduceMax.
# Why it matters: an anomaly score is the maximum of a map. A map that is NaN all over, of a model
#   with damaged weights, gets the lowest score there is: "normal".
# Seen: the lines that this script prints, and compares.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet openvino==2026.4.1 numpy==2.4.6
cat > "$folder/run.py" <<'PYTHON'
import numpy as np
import openvino as ov
import openvino.opset13 as ops

core = ov.Core()
core.set_property("CPU", {"INFERENCE_PRECISION_HINT": ov.Type.f32})
every = np.full((1, 1, 4, 4), np.nan, np.float32)


def answer(make):
    given = ops.parameter([1, 1, 4, 4], np.float32)
    compiled = core.compile_model(ov.Model([make(given)], [given]), "CPU")
    return float(compiled([every])[0].ravel()[0])


axes = np.array([2, 3])
found = {
    "ReduceMax": answer(lambda x: ops.reduce_max(x, axes)),
    "MaxPool": answer(
        lambda x: ops.max_pool(x, [2, 2], [1, 1], [0, 0], [0, 0], [2, 2]).output(0)
    ),
    "Relu": answer(ops.relu),
    "Clamp": answer(lambda x: ops.clamp(x, 0.0, 1.0)),
    "ReduceMean": answer(lambda x: ops.reduce_mean(x, axes)),
}
print("openvino", ov.__version__)
for name, value in found.items():
    print(f"{name} of NaN: {value}")
numbers = {name for name, value in found.items() if np.isfinite(value)}
assert numbers == {"ReduceMax", "MaxPool", "Relu", "Clamp"}, numbers
assert found["ReduceMax"] == np.finfo(np.float32).min
assert np.isnan(every.max()), "numpy"
print("as described")
PYTHON
"$folder/venv/bin/python" "$folder/run.py"
