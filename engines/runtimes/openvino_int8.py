"""int8 on a CPU that cuts its sums off: the same rounding, computed in float32.

x86 multiplies int8 in pairs. Only with VNNI or AMX are the products added up in 32 bits; before,
each two of them were added up in 16, and what is larger than 32,767 was cut off (vpmaddubsw).
OpenVINO computes with it all the same, and raw scores were up to 2.4 times those in float32. On
such a CPU the numbers are rounded as the graph says, and multiplied in float32, which takes about
as long as a graph in float32.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops

ADDED_IN_32_BITS = {"avx512_vnni", "avx_vnni", "amx_int8"}  # as Linux names them
CPUINFO = Path("/proc/cpuinfo")


@cache
def cpu_adds_int8_up() -> bool:
    """Whether this CPU adds products of int8 up without cutting anything off."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.startswith("flags")), "")
    return not ADDED_IN_32_BITS.isdisjoint(flags.split())


def round_in_float32(model: ov.Model) -> None:
    """Rewrite a graph, in place, so that what it quantises is rounded and stays float32.

    OpenVINO's own switch for this (LP_TRANSFORMS_MODE) is not part of the key of its cache: a graph
    that was compiled without it would be loaded with it as well.
    """
    for node in [one for one in model.get_ordered_ops() if one.get_type_name() == "FakeQuantize"]:
        rounded = _rounded(node)
        for asks in list(node.output(0).get_target_inputs()):
            after = asks.get_node()
            if after.get_type_name() == "Convert":  # to int8, from which it comes back
                after.output(0).replace(rounded)
            else:
                asks.replace_source_output(rounded)
    model.validate_nodes_and_infer_types()


def _rounded(node: Any) -> ov.Output:
    """What a FakeQuantize gives, in steps: see OpenVINO's definition of it."""
    value, low, high, out_low, out_high = node.input_values()
    steps = ops.constant(np.float32(node.get_attributes()["levels"] - 1))
    inside = ops.minimum(ops.maximum(value, low), high)
    step = ops.divide(ops.subtract(high, low), steps)
    number = ops.round(ops.divide(ops.subtract(inside, low), step), "half_to_even")
    out_step = ops.divide(ops.subtract(out_high, out_low), steps)
    found: ov.Output = ops.add(ops.multiply(number, out_step), out_low).output(0)
    return found
