"""Plans for tests, made with the doubles in a second: without the proofs of `workers.build`."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from double import Double, doubled

from engines.bundle import ONNX, PLAN
from engines.errors import BadBundle
from engines.files import sha256
from engines.meta import Meta
from engines.plan import PLAN_RECORD, Fingerprint, Machine

MAX_BATCH, MAX_ROWS = 8, 5_000
MIN_ROWS = 9  # the graph of a PatchCore looks at so many neighbours


def build(
    double: Double, onnx: Path, plan: Path, *, max_batch: int = MAX_BATCH, max_rows: int = MAX_ROWS
) -> None:
    """As `workers.build` does it. Raises BadBundle where TensorRT does not take the graph."""
    trt = double.trt
    builder = trt.Builder(trt.Logger(trt.Logger.INTERNAL_ERROR))
    typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(typed)
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.INTERNAL_ERROR))
    if not onnx.is_file() or not parser.parse(onnx.read_bytes()):
        raise BadBundle(f"TensorRT cannot read {onnx}.")
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    for number in range(network.num_inputs):
        tensor = network.get_input(number)
        _, *each = tuple(tensor.shape)
        if -1 in each:
            raise BadBundle(f"{onnx} is none of ours: {tensor.name} may have any side.")
        low, high = (MIN_ROWS, max_rows) if tensor.name == "memory_bank" else (1, max_batch)
        profile.set_shape(tensor.name, (low, *each), (high, *each), (high, *each))
    config.add_optimization_profile(profile)
    made = builder.build_serialized_network(network, config)
    if made is None:
        raise BadBundle(f"TensorRT builds no plan of {onnx}.")
    plan.write_bytes(made)


def with_plan(
    bundle: Path, target: Path, version: str = "10.3.0", device: str = "orin-nano", **changes: Any
) -> Path:
    """A copy of a model that has a plan, as `convtrt.py` leaves it on a machine of that kind.

    Args:
        changes: of the fingerprint.
    """
    shutil.copytree(bundle, target)
    with doubled(version, device) as double:
        build(double, target / ONNX, target / PLAN)
        machine = Machine.read()
    record = Fingerprint(
        machine=machine,
        onnx=sha256(target / ONNX),
        plan=sha256(target / PLAN),
        precision="f32",
        max_batch=MAX_BATCH,
        bank_rows=MAX_ROWS,
        refittable=False,
        device_bytes=0,
    )
    replace(record, **changes).write(target)
    seal(target)
    return target


def seal(bundle: Path) -> None:
    """Let meta.json have the hashes of the files as they are now."""
    meta = Meta.read(bundle / "meta.json")
    names = {*(meta.files or {}), PLAN, PLAN_RECORD}
    hashes = {name: sha256(bundle / name) for name in names if (bundle / name).is_file()}
    meta.with_(files=hashes).write(bundle / "meta.json")
