#!/usr/bin/env bash
# OpenVINO on an x86 CPU without VNNI: sums of a convolution in int8 are cut off, also where float32
# is asked for.
#
# Version: openvino 2026.4.1 (numpy 2.4.6), CPU plugin, x86-64 with AVX2 or AVX512 and without VNNI.
# Behaviour: a graph that rounds what a convolution reads and its weights to 8 bits (FakeQuantize, as a
#   pair of QuantizeLinear and DequantizeLinear of ONNX becomes) is computed with int8 kernels. Without
#   VNNI these add each two products up in 16 bits, and a sum beyond 32,767 becomes 32,767. The hint
#   INFERENCE_PRECISION_HINT = f32 changes nothing, no log says so, and OPTIMIZATION_CAPABILITIES names
#   INT8 as on other CPUs. Weights below half of their range are safe, so small trials look well.
# Why it matters: a model that was converted and proved on a PC with VNNI judges otherwise on an older one.
#   Results here are too small by up to a sixth; of a PatchCore model with a backbone in int8, scores of
#   good parts were 2.4 times those in float32, and 1.03 times with the rounding alone.
# Seen: the lines that this script prints, and compares. On a CPU with VNNI it ends with 3: nothing can
#   be seen there.
set -euo pipefail
if grep -m1 '^flags' /proc/cpuinfo | grep -qwE 'avx512_vnni|avx_vnni|amx_int8'; then
  echo "This CPU has VNNI: nothing to be seen here."
  exit 3
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet openvino==2026.4.1 numpy==2.4.6
cat > "$folder/run.py" <<'PYTHON'
import numpy as np
import openvino as ov
import openvino.opset13 as ops

core = ov.Core()
random = np.random.default_rng(0)
image = random.uniform(0.5, 1, (1, 64, 16, 16)).astype(np.float32)


def of(weights):
    """Computed by OpenVINO, and with the same rounding by numpy: largest and mean ratio."""
    given = ops.parameter(list(image.shape), np.float32)
    low, high = np.float32(0), np.float32(1)
    rounded = ops.fake_quantize(given, low, high, low, high, 256)
    most = np.float32(1)
    kernel = ops.fake_quantize(ops.constant(weights[:, :, None, None]), -most, most, -most, most, 255)
    result = ops.convolution(rounded, kernel, [1, 1], [0, 0], [0, 0], [1, 1])
    model = ov.Model([ops.result(result)], [given])
    found = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([image])[0]
    read, by = np.round(image * 255) / 255, np.round(weights * 127) / 127
    return found / np.einsum("oc,ncyx->noyx", by, read)


print("openvino", ov.__version__, core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
small = of(random.uniform(0.1, 0.45, (32, 64)).astype(np.float32))
full = of(random.uniform(0.1, 1, (32, 64)).astype(np.float32))
print(f"weights below half of their range: {small.min():.4f} to {small.max():.4f} of what it should be")
print(f"weights in all of their range: {full.min():.4f} to {full.max():.4f} of what it should be")
assert abs(small - 1).max() < 1e-3, (small.min(), small.max())
assert full.min() < 0.9, full.min()
print("as described")
PYTHON
"$folder/venv/bin/python" "$folder/run.py"
