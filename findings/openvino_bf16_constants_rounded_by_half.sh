#!/usr/bin/env bash
# OpenVINO on a CPU: of constants that are converted to bf16 only every second is rounded.
#
# Version: openvino 2026.4.1 (numpy 2.4.6), CPU plugin, x86-64.
# Behaviour: Convert from f32 to bf16 rounds to the nearest where its input comes at run time. The same
#   Convert of a constant, which is folded when the graph is compiled, and ops.constant(values, bf16)
#   round to the nearest where the last bit that is kept is 1, and cut off where it is 0, however much
#   is lost. So one graph gives two results, by whether a tensor is a constant.
# Why it matters: weights brought to bf16 by hand are too small on the average, and in a sum such errors
#   do not cancel: the scores of an anomaly model sank by 0.10 to 0.15 %.
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
values = np.random.default_rng(0).uniform(0.5, 2, (1, 10_000)).astype(np.float32)
bits = values.view(np.uint32)
last_kept = bits >> 16 & 1
nearest = (bits + 0x7FFF + last_kept & 0xFFFF0000).view(np.float32)
by_half = (bits + 0x8000 * last_kept & 0xFFFF0000).view(np.float32)


def answer(result, given=(), feed=()):
    model = ov.Model([ops.result(result)], list(given))
    return core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(list(feed))[0]


def there_and_back(value):
    return ops.convert(ops.convert(value, "bf16"), "f32")


given = ops.parameter(list(values.shape), np.float32)
found = {
    "Convert at run time": answer(there_and_back(given), [given], [values]),
    "Convert of a constant": answer(there_and_back(ops.constant(values))),
    "ops.constant(values, bf16)": answer(ops.convert(ops.constant(values, ov.Type.bf16), "f32")),
}
print("openvino", ov.__version__)
how = {}
for name, value in found.items():
    same = {"nearest": (value == nearest).all(), "every second": (value == by_half).all()}
    how[name] = next((word for word, holds in same.items() if holds), "neither")
    print(f"{name}: {how[name]}, {(value / values - 1).mean():+.6f} on the average")
assert how == {
    "Convert at run time": "nearest",
    "Convert of a constant": "every second",
    "ops.constant(values, bf16)": "every second",
}, how
print("as described")
PYTHON
"$folder/venv/bin/python" "$folder/run.py"
