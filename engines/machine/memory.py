"""How much memory there is, and whether what somebody needs fits into it.

A Jetson's GPU shares the memory of the machine, so what both take must fit in it together. A PC's
GPU has memory of its own: then there are two numbers, and each must fit. In a container its limit
counts as well.
"""

from __future__ import annotations

import contextlib
import ctypes
from dataclasses import dataclass
from pathlib import Path

MIB = 1024 * 1024
_M_ARENA_MAX = -8  # malloc.h
_M_MMAP_THRESHOLD = -3
LARGE = 8 << 20  # bytes: more than a picture of 2 megapixels has
CGROUP = Path("/sys/fs/cgroup")  # version 2; inside a container, its own


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


def warning(needed: int) -> str | None:
    """What a command says before work that may not fit. What it has taken already is its own."""
    found = Need(needed).short_of(Free(free_bytes() + _own()))
    if found is None:
        return None
    return (
        f"memory may be short: this takes {found.needed}, and {found.free}; a smaller batch, image"
        " or memory bank takes less"
    )


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


def anonymous(process: int) -> int:
    """Bytes that a process has to itself: those of files go when somebody needs the memory."""
    return _of_process(str(process), "RssAnon")


def _own() -> int:
    """Memory that this process has, bytes."""
    return _of_process("self", "VmRSS")


def _of_process(process: str, name: str) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)


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
    swaps the server had 3 % more memory than after the first 100. What is large goes back to the
    system as soon as it is free: once a block of 27 MB has come and gone, the C library would keep
    all up to that size, and after some pictures of 9 megapixels the server had 140 to 250 MB more.
    """
    with contextlib.suppress(AttributeError, OSError):  # not glibc
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 2)
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, LARGE)


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
