"""How much memory there is, and how much a model needs of it."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path

from engines.bundle import ONNX
from engines.meta import Meta

MIB = 1024 * 1024
_M_ARENA_MAX = -8  # malloc.h
CGROUP = Path("/sys/fs/cgroup")  # version 2; inside a container, its own

# Above what the four kinds took at most while they were opened with OpenVINO at 256 pixels, MiB of
# memory for MiB of graph: VAE 84 for 4, PatchCore 158 for 10 and a bank of 15, EfficientAD 152 for
# 30, PaDiM 346 for 168. The weights are there twice for a moment, and batches are tried.
GRAPH_FACTOR = 2.0
BANK_FACTOR = 1.2
FIXED = 112 * MIB  # buffers of the network at 256 pixels


def bytes_needed(folder: Path) -> int:
    """About how many bytes a version takes once it is open."""
    meta = Meta.read(folder / "meta.json")
    graph = _size(folder / ONNX) * GRAPH_FACTOR
    bank = _size(folder / meta.memory_bank) * BANK_FACTOR if meta.memory_bank else 0
    return int(graph + bank + FIXED * (meta.image_size / 256) ** 2)


def free_bytes() -> int:
    """Memory that could be taken without swapping: of the machine, and of the container."""
    free = _of_the_machine()
    limit, used = _number(CGROUP / "memory.max"), _number(CGROUP / "memory.current")
    if limit is not None and used is not None:
        free = min(free, limit - used + _given_back())
    return max(0, free)


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
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 1 << 62  # nobody knows
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # no such group, or "max"
        return None


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
