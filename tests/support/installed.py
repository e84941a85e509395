"""Kensa as the image `serve` has it: the packages that serving needs, a user without rights, and a
disk of which only the data folders can be written."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper
from packaging.requirements import Requirement

from engines.files import sha256
from engines.meta import Meta
from engines.store.bundle import ONNX, REPORT, write_report

NOBODY = 65534
# The interpreter, or the checkout, may lie in a folder that only root enters: reading, no more.
READ_ALL = "dac_read_search"


def needed(requirements: list[str], extras: frozenset[str] = frozenset()) -> Iterator[str]:
    """The names of what these requirements bring, themselves included."""
    waiting = [(Requirement(one), extras) for one in requirements]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        wanted, of = waiting.pop()
        marker = wanted.marker
        if marker and not any(marker.evaluate({"extra": extra}) for extra in ("", *of)):
            continue
        key = (wanted.name.lower().replace("_", "-"), frozenset(wanted.extras))
        if key in seen:
            continue
        seen.add(key)
        yield wanted.name
        more = metadata.distribution(wanted.name).requires or []
        waiting += [(Requirement(one), frozenset(wanted.extras)) for one in more]


def lay_out(requirements: list[str], folder: Path) -> Path:
    """A folder that Python can import just these packages and their own from."""
    folder.mkdir()
    for name in sorted(set(needed(requirements))):
        package = metadata.distribution(name)
        tops = {file.parts[0] for file in package.files or []} - {"..", "__pycache__"}
        for top in tops:
            if not (folder / top).is_symlink():
                (folder / top).symlink_to(str(package.locate_file(top)))
    return folder


def interpreter() -> str:
    """Python without the environment that the tests run in."""
    return str(getattr(sys, "_base_executable", sys.executable))


def shut_in(folder: Path, *command: str, **variables: str) -> list[str]:
    """A command by nobody that can write into `folder` alone. To be run by root.

    Nothing of the environment is passed on: no HOME, no PATH but the system's.
    """
    script = (
        'mount --bind "$1" "$1" && mount -o remount,bind,ro / && cd / && shift && exec setpriv'
        f" --reuid {NOBODY} --regid {NOBODY} --clear-groups --no-new-privs"
        f" --inh-caps=-all,+{READ_ALL} --ambient-caps=-all,+{READ_ALL}"
        f' --bounding-set=-all,+{READ_ALL} env -i "$@"'
    )
    settings = [f"{name}={value}" for name, value in variables.items()]
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh",
            str(folder), "PATH=/usr/bin:/bin", f"TMPDIR={folder}", *settings, *command]  # fmt: skip


def why_not() -> str | None:
    """Why nobody can be shut in here; None where it works."""
    if os.geteuid() != 0:
        return "only root can make the disk read-only"
    tried = subprocess.run(shut_in(Path("/tmp"), "true"), capture_output=True, text=True)
    return None if tried.returncode == 0 else f"no mount namespaces here: {tried.stderr.strip()}"


def tiny_model(folder: Path) -> Path:
    """A model that OpenVINO, TensorRT's double and every check of a bundle take, without training:
    its score is how bright the brightest pixel is."""
    side = 64
    weights = numpy_helper.from_array(np.full((3, 1), 1 / 765, np.float32), "weights")
    last = numpy_helper.from_array(np.array([3], np.int64), "last")
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], "cast", to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["pixels", "weights"], ["grey"], "grey"),
        helper.make_node("ReduceSum", ["grey", "last"], ["map"], "sum", keepdims=0),
        helper.make_node("ReduceMax", ["map"], ["score"], "max", axes=[1, 2], keepdims=0),
    ]
    tensor = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "tiny",
        [tensor("image", TensorProto.UINT8, ["n", side, side, 3])],
        [tensor("score", TensorProto.FLOAT, ["n"]),
         tensor("map", TensorProto.FLOAT, ["n", side, side])],
        [weights, last],
    )  # fmt: skip
    folder.mkdir(parents=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (folder / ONNX).write_bytes(model.SerializeToString())
    # As an export leaves it: the graph was compared with what it was made of.
    write_report(folder, {"parity": {"openvino_f32": {"ok": True}}})
    meta = Meta(
        model="vae", latent_dim=8, image_size=side,
        image_threshold_auto=0.5, raw_image_min=0.0, raw_image_max=1.0,
        files={name: sha256(folder / name) for name in (ONNX, REPORT)},
    )  # fmt: skip
    meta.write(folder / "meta.json")
    return folder
