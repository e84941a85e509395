"""How much memory there is, and how much it takes to load a model, to learn or to convert.

A Jetson's GPU shares the memory of the machine, so what both take must fit in it together. A PC's
GPU has memory of its own: then there are two numbers, and each must fit. In a container its limit
counts as well.

Every prediction lies above what was measured; docs/benchmarks.md has the measurements, and says
which of these numbers were not measured but estimated.
"""

from __future__ import annotations

import contextlib
import ctypes
from dataclasses import dataclass
from pathlib import Path

from engines.meta import Meta
from engines.store.bundle import ONNX, PLAN
from engines.store.plan import Fingerprint

MIB = 1024 * 1024
_M_ARENA_MAX = -8  # malloc.h
CGROUP = Path("/sys/fs/cgroup")  # version 2; inside a container, its own

# Above what the four kinds took at most while they were opened with OpenVINO at 256 pixels, MiB of
# memory for MiB of graph: VAE 84 for 4, PatchCore 158 for 10 and a bank of 15, EfficientAD 152 for
# 30, PaDiM 346 for 168. The weights are there twice for a moment, and batches are tried.
GRAPH_FACTOR = 2.0
BANK_FACTOR = 1.2
FIXED = 112 * MIB  # buffers of the network at 256 pixels

# With TensorRT: the plan is read into memory before it is on the device, the bank as well.
# Estimated, not measured: what the library takes for one more engine.
PLAN_FIXED = 64 * MIB

# Learning and converting, on a CPU: Python, torch, anomalib and OpenVINO, before any picture.
TORCH = 1100 * MIB
SMOOTHING = 400 * MIB  # of PaDiM's map of 256 pixels: a kernel of 33 x 33 is laid out for each


@dataclass(frozen=True)
class Gpu:
    """The memory of a GPU, bytes."""

    free: int
    total: int
    shared: bool  # a Jetson's: it is the memory of the machine


@dataclass(frozen=True)
class Free:
    """Bytes that may be taken."""

    host: int
    device: int | None = None  # None where there is no GPU, or one without memory of its own

    @classmethod
    def now(cls, gpu: Gpu | None = None) -> Free:
        """Of this machine. One allocation on a Jetson must fit what both of its sides call free."""
        host = free_bytes()
        if gpu is None:
            return cls(host)
        return cls(min(host, gpu.free)) if gpu.shared else cls(host, gpu.free)

    def without(self, *needs: Need) -> Free:
        """What is left when others have taken theirs."""
        host = self.host - sum(need.host if self.device is not None else need.all for need in needs)
        device = self.device
        if device is not None:
            device = max(0, device - sum(need.device for need in needs))
        return Free(max(0, host), device)

    def at_most(self, limit: int) -> Free:
        """No more than a setting allows."""
        limit = max(0, limit)
        return Free(min(self.host, limit), self.device and min(self.device, limit))


@dataclass(frozen=True)
class Need:
    """Bytes that something takes at its peak."""

    host: int
    device: int = 0

    @property
    def all(self) -> int:
        return self.host + self.device

    def short_of(self, free: Free) -> Short | None:
        """What is missing, None when it fits."""
        if free.device is None:
            return Short(self.all, free.host) if self.all > free.host else None
        if self.device > free.device:
            return Short(self.device, free.device, " of the GPU")
        return Short(self.host, free.host) if self.host > free.host else None


@dataclass(frozen=True)
class Short:
    """Something does not fit, and what to say of it."""

    wanted: int
    there: int
    where: str = ""

    @property
    def missing(self) -> int:
        return self.wanted - self.there

    @property
    def needed(self) -> str:
        return f"about {self.wanted // MIB} MiB{self.where}"

    @property
    def free(self) -> str:
        return f"{self.there // MIB} MiB are free"


# ---- loading ----------------------------------------------------------------------------------


def bytes_needed(folder: Path) -> int:
    """About how many bytes a version takes once it is open with OpenVINO."""
    meta = Meta.read(folder / "meta.json")
    graph = size(folder / ONNX) * GRAPH_FACTOR
    bank = size(folder / meta.memory_bank) * BANK_FACTOR if meta.memory_bank else 0
    return int(graph + bank + FIXED * (meta.image_size / 256) ** 2)


def plan_needs(folder: Path) -> Need:
    """What a version takes with TensorRT, from model.plan.json.

    Raises:
        BadBundle: the record is damaged.
        BadMeta: meta.json is.
    """
    meta, record = Meta.read(folder / "meta.json"), Fingerprint.read(folder)
    bank = size(folder / meta.memory_bank) if meta.memory_bank else 0
    read = size(folder / PLAN) + int(bank * BANK_FACTOR) + PLAN_FIXED
    # Another bank is on the device before the old one goes: the bank of the new version.
    return Need(read, (record.device_bytes if record else 0) + bank)


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
_BACKBONES = {
    "resnet18": _Backbone(45, _RESNET, 5),
    "resnet34": _Backbone(84, _RESNET, 5),
}
_OTHER = _Backbone(270, _WIDE, 10)  # taken for a wide_resnet50_2, the largest that is usual
_STRIDES = {"layer1": 4, "layer2": 8, "layer3": 16, "layer4": 32}


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
        kind += 3.6 * _stats_bytes(meta) + SMOOTHING * side
        kind += block * _positions(meta) * (meta.n_features or 0) * 4
    elif meta.model == "efficientad":
        each, fixed = (175, 270) if meta.model_size == "small" else (260, 450)
        kind = fixed * MIB + what.batch * each * MIB * side
        kind += 2 * what.train * 3 * meta.image_size**2
    else:
        kind = 60 * MIB + what.batch * 4 * MIB * side + what.train * 4 * meta.image_size**2
    return int(TORCH + kind + pictures)


def to_convert(meta: Meta, bank: int = 0) -> int:
    """Bytes that a process takes at most which exports a model and compares the two."""
    side = (meta.image_size / 256) ** 2
    graph = {"small": 80, "medium": 180, None: 20}[meta.model_size] * MIB
    if meta.model in ("patchcore", "padim"):
        graph = _backbone(meta).weights * MIB
    return int(TORCH + 2 * graph + 6.5 * _stats_bytes(meta) + 6 * bank + 100 * MIB * side)


def warning(needed: int) -> str | None:
    """What a command says before work that may not fit. What it has taken already is its own."""
    found = Need(needed).short_of(Free(free_bytes() + _own()))
    if found is None:
        return None
    return (
        f"memory may be short: this takes {found.needed}, and {found.free}; a smaller batch, image"
        " or memory bank takes less"
    )


def to_build(onnx: int, workspace_mib: int, free: int) -> int:
    """Bytes that TensorRT takes at most while it builds a plan of a graph; estimated.

    The weights are in the parser, in the builder and in the plan; the workspace is clamped to what
    `workers.converting.plan.build` allows it.
    """
    return 3 * onnx + min(workspace_mib * MIB, max(LEAST_WORKSPACE, free // 4))


LEAST_WORKSPACE = 256 * MIB


def _backbone(meta: Meta) -> _Backbone:
    return _BACKBONES.get(meta.backbone or "", _OTHER)


def _positions(meta: Meta) -> int:
    """Patches of one image: as many as the first layer has places."""
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


# ---- what there is ----------------------------------------------------------------------------


def free_bytes() -> int:
    """Memory that could be taken without swapping: of the machine, and of the container."""
    free = _of_the_machine()
    limit, used = _number(CGROUP / "memory.max"), _number(CGROUP / "memory.current")
    if limit is not None and used is not None:
        free = min(free, limit - used + _given_back())
    return max(0, free)


def total_bytes() -> int:
    """All memory that there is: of the machine, or what the container may have."""
    total = meminfo("MemTotal")
    limit = _number(CGROUP / "memory.max")
    return total if limit is None else min(total, limit)


def _own() -> int:
    """Memory that this process has, bytes."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS")), 0)


def _given_back() -> int:
    """Copies of files that count as used, and go when somebody needs the memory."""
    try:
        lines = (CGROUP / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)


def keep_together() -> None:
    """Let all threads share two heaps of the C library; to be called before there are threads.

    Each thread would get one of its own, and what one frees is of no use to the others: after 1,000
    swaps the server had 3 % more memory than after the first 100.
    """
    with contextlib.suppress(AttributeError, OSError):  # not glibc
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 2)


def give_back() -> None:
    """Let the C library return freed memory to the system: it would keep it for a next time."""
    with contextlib.suppress(AttributeError, OSError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _of_the_machine() -> int:
    return meminfo("MemAvailable")


def meminfo(name: str) -> int:
    """A line of /proc/meminfo, bytes; more than there can be where there is no such file."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 1 << 62  # nobody knows
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # no such group, or "max"
        return None


def size(path: Path) -> int:
    """Bytes of a file; 0 where there is none."""
    return path.stat().st_size if path.is_file() else 0
