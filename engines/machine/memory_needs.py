"""How much memory it takes to load a model, to learn, to convert and to build a plan.

Every prediction lies above what was measured; docs/benchmarks.md has the measurements, and says
which of these numbers were not measured but estimated.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engines.machine.memory import MIB, Need
from engines.meta import Meta
from engines.store.bundle import ONNX, PLAN
from engines.store.plan_record import Fingerprint

# Above what the four kinds took at most while they were opened with OpenVINO at 256 pixels, MiB of
# memory for MiB of graph: VAE 92 for 4, PatchCore 158 for 10 and a bank of 15, EfficientAD 152 for
# 30, PaDiM 346 for 168. The weights are there twice for a moment, and batches are tried. Larger
# pictures: PatchCore without a bank took 140, 270 and 788 at 256, 512 and 1024 pixels, a batch of
# four included; VAE 582 at 1024; EfficientAD, whose images are never tried together, 836.
GRAPH_FACTOR = 2.0
BANK_FACTOR = 1.2
FIXED = 124 * MIB  # buffers of the network at 256 pixels; they grow with the area

# With TensorRT: the plan is read into memory before it is on the device, the bank as well.
# Estimated, not measured: what the library takes for one more engine.
PLAN_FIXED = 64 * MIB

# What a context takes of the device at 256 pixels for a batch of four, where the plan was built
# without a GPU that says so. Estimated: the activations of a wide_resnet50_2, and to spare.
CONTEXT = 256 * MIB

RTX_FIXED = 160 * MIB  # the library of TensorRT for RTX, while it builds

# Learning and converting, on a CPU: Python, torch, anomalib and OpenVINO, before any picture.
TORCH = 1100 * MIB
PADIM_KEPT = 256  # images whose embeddings stay until all are left out
# Making a teacher of EfficientAD: cuts of pictures, and then whole ones of 256 pixels, MiB.
DISTILLING = {"small": (200, 60), "medium": (300, 100)}
MOST_PICTURES = 1000  # that a teacher learns from; they are kept in memory
SMOOTHING = 400 * MIB  # of PaDiM's map of 256 pixels: a kernel of 33 x 33 is laid out for each


# ---- loading ----------------------------------------------------------------------------------


def bytes_needed(folder: Path) -> int:
    """About how many bytes a version takes once it is open with OpenVINO."""
    meta = Meta.read(folder / "meta.json")
    graph = size(folder / ONNX) * GRAPH_FACTOR
    bank = unpacked(folder / meta.memory_bank) * BANK_FACTOR if meta.memory_bank else 0
    return int(graph + bank + FIXED * (meta.image_size / 256) ** 2)


def plan_needs(folder: Path) -> Need:
    """What a version takes with TensorRT, from model.plan.json.

    Raises:
        BadBundle: the record is damaged.
        BadMeta: meta.json is.
    """
    meta, record = Meta.read(folder / "meta.json"), Fingerprint.read(folder)
    bank = unpacked(folder / meta.memory_bank) if meta.memory_bank else 0
    read = size(folder / PLAN) + int(bank * BANK_FACTOR) + PLAN_FIXED
    # Another bank is on the device before the old one goes: the bank of the new version.
    return Need(read, (record.device_bytes if record else 0) + bank)


def to_run(image_size: int) -> int:
    """Bytes of the device that a context takes at most, beside the plan and the bank; estimated."""
    return int(CONTEXT * (image_size / 256) ** 2)


# ---- learning and converting ------------------------------------------------------------------


@dataclass(frozen=True)
class Learning:
    """What retrain.py is to do."""

    meta: Meta
    train: int  # images to learn from
    test: int = 0  # images that find the threshold
    batch: int = 4
    known: int = 0  # bytes of the bank or the statistics that are added to

    @property
    def bank(self) -> int:
        """Bytes of the memory bank that comes of it; 0 for a kind without one."""
        if self.meta.model != "patchcore":
            return 0
        ratio = self.meta.coreset_ratio or 0
        return int(self.train * _patch_bytes(self.meta) * ratio) + self.known


@dataclass(frozen=True)
class _Backbone:
    """What is known of a timm backbone."""

    weights: int  # MiB
    channels: dict[str, int]  # of each layer
    image: int  # MiB that one more image of 256 pixels in a batch takes


_RESNET = {"layer1": 64, "layer2": 128, "layer3": 256, "layer4": 512}
_WIDE = {layer: 4 * channels for layer, channels in _RESNET.items()}
_LITE = {f"blocks.{n}": width for n, width in enumerate((16, 24, 40, 80, 112, 192, 320))}
_LITE2 = {f"blocks.{n}": width for n, width in enumerate((16, 24, 48, 88, 120, 208, 352))}
_BACKBONES = {
    "resnet18": _Backbone(45, _RESNET, 5),
    "resnet34": _Backbone(84, _RESNET, 5),
    "tf_efficientnet_lite0": _Backbone(18, _LITE, 5),
    "tf_efficientnet_lite1": _Backbone(21, _LITE, 5),
    "tf_efficientnet_lite2": _Backbone(23, _LITE2, 5),
}
_OTHER = _Backbone(270, _WIDE, 10)  # taken for a wide_resnet50_2, the largest that is usual
_STRIDES = {
    "layer1": 4, "layer2": 8, "layer3": 16, "layer4": 32,
    "blocks.0": 2, "blocks.1": 4, "blocks.2": 8, "blocks.3": 16, "blocks.4": 16, "blocks.5": 32,
    "blocks.6": 32,
}  # fmt: skip


def to_learn(what: Learning) -> int:
    """Bytes that a process takes at most which learns."""
    meta, side = what.meta, (what.meta.image_size / 256) ** 2
    pictures = 2 * (what.test + what.train / 5) * 3 * meta.image_size**2  # those of the threshold
    if meta.model == "patchcore":
        backbone, patches = _backbone(meta), what.train * _patch_bytes(meta)
        kind = 1.3 * backbone.weights * MIB + what.batch * backbone.image * MIB * side
        kind += 3.2 * patches + 3 * what.bank
    elif meta.model == "padim":
        backbone, block = _backbone(meta), max(what.batch, min(what.train, 32))
        kind = 1.3 * backbone.weights * MIB + what.batch * backbone.image * MIB * side
        # Once more for what is left out, and once for what is learned without strange pictures.
        kind += 4.6 * _stats_bytes(meta) + SMOOTHING * side
        kept = min(what.train, PADIM_KEPT)
        kind += (block + kept) * _positions(meta) * (meta.n_features or 0) * 4
    elif meta.model == "efficientad":
        each, fixed = (175, 270) if meta.model_size == "small" else (260, 450)
        kind = fixed * MIB + what.batch * each * MIB * side
        kind += 2 * what.train * 3 * meta.image_size**2
    else:
        kind = 60 * MIB + what.batch * 4 * MIB * side + what.train * 4 * meta.image_size**2
    return int(TORCH + kind + pictures)


def to_distil(pictures: int, image_size: int, model_size: str) -> int:
    """Bytes that a process takes at most which makes a teacher of EfficientAD."""
    cuts, whole = DISTILLING[model_size]
    kept = min(pictures, MOST_PICTURES) * 3 * (4 * image_size) ** 2
    return TORCH + int((cuts + whole * (image_size / 256) ** 2) * MIB) + kept


def to_convert(meta: Meta, bank: int = 0) -> int:
    """Bytes that a process takes at most which exports a model and compares the two."""
    side = (meta.image_size / 256) ** 2
    graph = {"small": 80, "medium": 180, None: 20}[meta.model_size] * MIB
    if meta.model in ("patchcore", "padim"):
        graph = _backbone(meta).weights * MIB
    return int(TORCH + 2 * graph + 6.5 * _stats_bytes(meta) + 6 * bank + 100 * MIB * side)


LEAST_WORKSPACE = 256 * MIB


def to_build(onnx: int, workspace_mib: int, free: int) -> int:
    """Bytes that TensorRT takes at most while it builds a plan of a graph; estimated.

    The weights are in the parser, in the builder and in the plan.
    """
    return 3 * onnx + workspace(workspace_mib * MIB, free)


def to_build_for_others(onnx: int) -> int:
    """Bytes that TensorRT for RTX takes at most, of the machine, while it builds without a GPU.

    Above what was measured, MiB for MiB of graph: PatchCore 139 for 10, VAE 122 for 7, EfficientAD
    222 for 30, PaDiM 598 for 168.
    """
    return 3 * onnx + RTX_FIXED


def workspace(asked: int, free: int) -> int:
    """Bytes that TensorRT may take for trying kernels, of those that are free.

    A quarter, but never under 256 MiB, unless less was asked for.
    """
    return min(asked, max(free // 4, LEAST_WORKSPACE))


def _backbone(meta: Meta) -> _Backbone:
    return _BACKBONES.get(meta.backbone or "", _OTHER)


def _positions(meta: Meta) -> int:
    """Patches of one image: as many as its finest layer has places."""
    stride = min(_STRIDES.get(layer, 4) for layer in meta.layers or [""])
    return (meta.image_size // stride) ** 2


def _patch_bytes(meta: Meta) -> int:
    """Bytes of the embeddings of one image."""
    known = _backbone(meta).channels
    channels = sum(known.get(layer, max(known.values())) for layer in meta.layers or [])
    return _positions(meta) * channels * 4


def _stats_bytes(meta: Meta) -> int:
    """Bytes of PaDiM's covariances."""
    return _positions(meta) * (meta.n_features or 0) ** 2 * 4 if meta.model == "padim" else 0


def unpacked(npz: Path) -> int:
    """Bytes of the arrays in an .npz; of the file itself where it is none, and 0 where none is.

    Zeros take a thousandth of their size in a zip. What the arrays' own headers say counts as well:
    their memory is taken before the first byte is read.
    """
    try:
        with zipfile.ZipFile(npz) as archive:
            arrays = sum(_array_bytes(archive, one) for one in archive.infolist())
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):  # opening says it
        arrays = 0
    return max(arrays, size(npz))


def _array_bytes(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> int:
    header = np.lib.format
    with archive.open(member) as file:
        try:
            major, _ = header.read_magic(file)
            read = header.read_array_header_1_0 if major == 1 else header.read_array_header_2_0
            shape, _, dtype = read(file)
        except (ValueError, EOFError, zlib.error, zipfile.BadZipFile):  # no array, or a damaged one
            return member.file_size
    return max(member.file_size, math.prod(shape) * dtype.itemsize)


def size(path: Path) -> int:
    """Bytes of a file; 0 where there is none."""
    return path.stat().st_size if path.is_file() else 0
