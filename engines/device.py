"""What the machine says of itself: memory, processors and, on a Jetson, its GPU and temperatures.

Read from the kernel's files below a root folder, so that a test can lay down those of a Jetson.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# The load of a Jetson's GPU in thousandths. The first is a link that JetPack 6 makes on an Orin;
# those after it are where it leads to on different boards; the last is where JetPack 5 had it.
GPU_LOADS = (
    "sys/devices/platform/gpu.0/load",
    "sys/devices/platform/bus@0/17000000.gpu/load",
    "sys/devices/platform/17000000.gpu/load",
    "sys/devices/gpu.0/load",
)
IDLE = (3, 4)  # the columns idle and iowait of a line of /proc/stat
GUEST = 8  # and the columns from here on are counted twice: they are in user and nice as well


@dataclass(frozen=True)
class Device:
    """A moment of a machine. What it does not tell is None, or missing."""

    memory_total: int | None = None  # bytes; on a Jetson CPU and GPU share them
    memory_available: int | None = None  # bytes that could be taken without swapping
    gpu_memory: int | None = None  # bytes that programs have taken for the GPU of a Jetson
    gpu_load: float | None = None  # 0 to 1
    cpus: int | None = None
    cpu_busy_s: float | None = None  # of all processors together, since the machine started
    temperatures: dict[str, float] = field(default_factory=dict)  # degrees Celsius

    @classmethod
    def read(cls, root: Path = Path("/")) -> Device:
        """As it is now; never raises."""
        memory = dict(_memory(root))
        cpus, busy = _processors(root)
        return cls(
            memory_total=memory.get("MemTotal"),
            memory_available=memory.get("MemAvailable"),
            gpu_memory=memory.get("NvMapMemUsed"),
            gpu_load=_gpu_load(root),
            cpus=cpus,
            cpu_busy_s=busy,
            temperatures=_temperatures(root),
        )


def _memory(root: Path) -> Iterator[tuple[str, int]]:
    for line in (_text(root / "proc/meminfo") or "").splitlines():
        name, _, size = line.partition(":")
        number, _, unit = size.strip().partition(" ")
        if unit == "kB" and number.isdecimal():
            yield name, int(number) * 1024


def _gpu_load(root: Path) -> float | None:
    for path in GPU_LOADS:
        load = _number(root / path)
        if load is not None:
            return load / 1000
    return None


def _processors(root: Path) -> tuple[int | None, float | None]:
    """How many there are, and the seconds that they worked, all together."""
    lines = (_text(root / "proc/stat") or "").splitlines()
    cpus = sum(line.startswith("cpu") and line[3:4].isdecimal() for line in lines)
    if not cpus or not lines[0].startswith("cpu "):
        return None, None
    ticks = [int(ticks) for ticks in lines[0].split()[1:]][:GUEST]
    busy = sum(count for column, count in enumerate(ticks) if column not in IDLE)
    return cpus, busy / os.sysconf("SC_CLK_TCK")


def _temperatures(root: Path) -> dict[str, float]:
    """By the names of the zones; of two with the same name the hotter one."""
    found: dict[str, float] = {}
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        name, thousandths = _text(zone / "type"), _number(zone / "temp")
        if name and thousandths is not None:  # a zone that is switched off cannot be read
            found[name] = max(thousandths / 1000, found.get(name, -273.15))
    return found


def _number(path: Path) -> int | None:
    try:
        return int(_text(path) or "")
    except ValueError:
        return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
