"""Plans for tests, made with the doubles in a second: without the proofs of a build."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from engines.errors import BadBundle
from engines.files import sha256
from engines.meta import Meta
from engines.regions import Regions
from engines.store.bundle import ONNX, PLAN, write_bank, write_report
from engines.store.plan_record import PLAN_RECORD, Fingerprint, Machine
from engines.store.regions import write_regions
from support.double import Double, doubled

MAX_BATCH, MAX_ROWS = 8, 5_000
MIN_ROWS = 9  # the graph of a PatchCore looks at so many neighbours


def build(
    double: Double, onnx: Path, plan: Path, *, max_batch: int = MAX_BATCH, max_rows: int = MAX_ROWS
) -> None:
    """As `build` does it. Raises BadBundle where TensorRT does not take the graph."""
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
        first, *each = tuple(tensor.shape)
        if -1 in each:
            raise BadBundle(f"{onnx} is none of ours: {tensor.name} may have any side.")
        if first != -1:
            continue
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


# Models of a few kilobytes, which anybody can compute by hand.

SIDE = 32  # pixels
PATCH = 4  # pixels
CHANNELS = 8


def tiny_onnx(
    path: Path,
    *,
    bank: bool,
    offset: float = 0.0,
    sides: tuple[Any, Any] = (8, 8),
    keep: bool = True,
) -> Path:
    """image (n, 32, 32, 3) -> map (n, 8, 8), score (n,).

    With a bank: the distance of each patch's features (64, 8) to the nearest row. Without: the
    length of these features.

    Args:
        sides: of the map, as the graph declares them.
        keep: whether it asks which places of the map count; older graphs do not.
    """
    count = SIDE // PATCH
    weights = np.random.default_rng(0).standard_normal((PATCH * PATCH * 3, CHANNELS)) / 100
    numbers = {
        "weights": weights.astype(np.float32),
        "offset": np.float32([offset]),
        "two": np.float32([2]),
        "one": np.float32([1]),
        "far": np.float32([1e30]),
        "zero": np.float32([0]),
        "cut": np.array([0, count, PATCH, count, PATCH, 3], np.int64),
        "flat": np.array([0, count * count, PATCH * PATCH * 3], np.int64),
        "square": np.array([0, count, count], np.int64),
        "last": np.array([-1], np.int64),
        "first": np.array([0], np.int64),
    }
    node = helper.make_node
    nodes = [
        node("Cast", ["image"], ["pixels"], "cast", to=TensorProto.FLOAT),
        node("Reshape", ["pixels", "cut"], ["cut_"], "cut"),
        node("Transpose", ["cut_"], ["turned"], "turn", perm=[0, 1, 3, 2, 4, 5]),
        node("Reshape", ["turned", "flat"], ["patches"], "patches"),
        node("MatMul", ["patches", "weights"], ["embedding"], "embed"),
        node("Mul", ["embedding", "embedding"], ["squared"], "square"),
        node("ReduceSum", ["squared", "last"], ["lengths"], "lengths", keepdims=1),
    ]
    if bank:
        nodes += [
            node("Transpose", ["memory_bank"], ["columns"], "columns", perm=[1, 0]),
            node("MatMul", ["embedding", "columns"], ["products"], "products"),
            node("Mul", ["products", "two"], ["doubled"], "double"),
            node("Mul", ["columns", "columns"], ["of_columns"], "squares"),
            node("ReduceSum", ["of_columns", "first"], ["of_rows"], "rows", keepdims=0),
            node("Sub", ["of_rows", "doubled"], ["less"], "less"),
            node("ReduceMin", ["less"], ["least"], "least", axes=[2], keepdims=1),
            node("Add", ["lengths", "least"], ["distances"], "distances"),
        ]
    nodes += [
        node("Max", ["distances" if bank else "lengths", "zero"], ["positive"], "positive"),
        node("Sqrt", ["positive"], ["root"], "root"),
        node("Reshape", ["root", "square"], ["map"], "map"),
    ]
    if keep:
        nodes += [
            node("Sub", ["keep", "one"], ["never"], "never"),
            node("Mul", ["never", "far"], ["below"], "below"),
            node("Add", ["map", "below"], ["counting"], "counting"),
        ]
    nodes.append(
        node("ReduceMax", ["counting" if keep else "map"], ["highest" if offset else "score"],
             "highest", axes=[1, 2], keepdims=0)
    )  # fmt: skip
    if offset:
        nodes.append(node("Add", ["highest", "offset"], ["score"], "add"))
    value = helper.make_tensor_value_info
    inputs = [value("image", TensorProto.UINT8, ["n", SIDE, SIDE, 3])]
    if bank:
        inputs.append(value("memory_bank", TensorProto.FLOAT, ["m", CHANNELS]))
    if keep:
        inputs.append(value("keep", TensorProto.FLOAT, [count, count]))
    outputs = [
        value("score", TensorProto.FLOAT, ["n"]),
        value("map", TensorProto.FLOAT, ["n", *sides]),
    ]
    tensors = [numpy_helper.from_array(array, name) for name, array in numbers.items()]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, tensors)
    opset = [helper.make_opsetid("", 17)]
    path.write_bytes(
        helper.make_model(graph, ir_version=8, opset_imports=opset).SerializeToString()
    )
    return path


def tiny_bank(seed: int, rows: int = 100) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((rows, CHANNELS)).astype(np.float32) * 8


def tiny_score(
    image: NDArray[np.uint8], bank: NDArray[np.float32] | None = None, offset: float = 0.0
) -> float:
    """What the graph gives for an image (32, 32, 3)."""
    count = SIDE // PATCH
    weights = np.random.default_rng(0).standard_normal((PATCH * PATCH * 3, CHANNELS)) / 100
    cut = image.astype(np.float64).reshape(count, PATCH, count, PATCH, 3).transpose(0, 2, 1, 3, 4)
    features = cut.reshape(count * count, -1) @ weights.astype(np.float32)
    rows = np.zeros((1, CHANNELS)) if bank is None else bank.astype(np.float64)
    distances = np.linalg.norm(features[:, None] - rows, axis=2).min(axis=1)
    return float(distances.max()) + offset


def tiny_bundle(folder: Path, bank: NDArray[np.float32] | None = None, offset: float = 0.0) -> Path:
    """A model as convtrt.py leaves it where TensorRT is not."""
    folder.mkdir(parents=True)
    tiny_onnx(folder / ONNX, bank=bank is not None, offset=offset)
    meta: dict[str, Any] = {"model": "vae", "latent_dim": CHANNELS}
    if bank is not None:
        write_bank(folder / "memory_bank.npz", bank, 1.0)
        meta = {"model": "patchcore", "backbone": "tiny", "layers": ["one"], "coreset_ratio": 0.1}
    write_report(folder, {"parity": {"openvino_f32": {"ok": True}}})
    names = (ONNX, "report.json", "memory_bank.npz")
    found = [name for name in names if (folder / name).is_file()]
    scale = {"image_threshold_auto": 30.0, "raw_image_min": 0.0, "raw_image_max": 100.0}
    hashes = {name: sha256(folder / name) for name in found}
    Meta.parse({**meta, **scale, "image_size": SIDE, "files": hashes}).write(folder / "meta.json")
    return folder


def with_bank(bundle: Path, target: Path, bank: NDArray[np.float32]) -> Path:
    """A copy of a model, plan and all, with another memory bank: as after an update."""
    shutil.copytree(bundle, target)
    write_bank(target / "memory_bank.npz", bank, 1.0)
    seal(target)
    return target


def with_regions(bundle: Path, target: Path, mask: NDArray[np.bool_]) -> Path:
    """A copy of a model, plan and all, for which a part of pictures never counts."""
    shutil.copytree(bundle, target, ignore=shutil.ignore_patterns("*.pth", "stats.npz"))
    meta = Meta.read(target / "meta.json")
    write_regions(target, Regions(mask), meta).write(target / "meta.json")
    return target
