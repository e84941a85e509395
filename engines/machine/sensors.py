"""What the machine says of itself: memory, processors and, on a Jetson, GPU, heat and power mode.

Read from the kernel's files below a root folder, so that a test can lay down those of a Jetson.
"""

from __future__ import annotations

import os
import re
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
POWER_MODE = "var/lib/nvpmodel/status"  # "pmode:0002", what nvpmodel set last
POWER_MODES = "etc/nvpmodel.conf"  # a line "< POWER_MODEL ID=2 NAME=MAXN_SUPER >" for each
THROTTLES = "-throttle-alert"  # the end of a cooling device's name: cpu-throttle-alert
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
    power_mode: str | None = None  # of a Jetson: "15W", "MAXN_SUPER"
    throttled: dict[str, bool] = field(default_factory=dict)  # part of a Jetson -> too hot now
    over_currents: int | None = None  # how often a Jetson's power ran short since its start

    @classmethod
    def read(cls, root: Path = Path("/")) -> Device:
        """As it is now; never raises."""
        memory = meminfo(root)
        cpus, busy = _processors(root)
        return cls(
            memory_total=memory.get("MemTotal"),
            memory_available=memory.get("MemAvailable"),
            gpu_memory=memory.get("NvMapMemUsed"),
            gpu_load=_gpu_load(root),
            cpus=cpus,
            cpu_busy_s=busy,
            temperatures=_temperatures(root),
            power_mode=power_mode(root)[1],
            throttled=_throttled(root),
            over_currents=_over_currents(root),
        )


def meminfo(root: Path) -> dict[str, int]:
    """The lines of /proc/meminfo that have a size, bytes."""
    return dict(_memory(root))


def power_modes(root: Path) -> dict[int, str]:
    """The modes that a Jetson has, by their numbers; empty elsewhere."""
    found = re.findall(
        r"^\s*<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)", read_text(root / POWER_MODES) or "", re.M
    )
    return {int(number): name for number, name in found}


def power_mode(root: Path) -> tuple[int | None, str | None]:
    """Number and name of the mode that a Jetson is in."""
    found = re.search(r"pmode:(\d+)", read_text(root / POWER_MODE) or "")
    if found is None:
        return None, None
    number = int(found[1])
    return number, power_modes(root).get(number, str(number))


def _throttled(root: Path) -> dict[str, bool]:
    """The parts that a Jetson slows down when they are too hot, and whether it does."""
    found = {}
    for folder in sorted((root / "sys/class/thermal").glob("cooling_device*")):
        name, state = read_text(folder / "type") or "", _number(folder / "cur_state")
        if name.endswith(THROTTLES) and state is not None:
            found[name.removesuffix(THROTTLES)] = state > 0
    return found


def _over_currents(root: Path) -> int | None:
    """Events of under-voltage and over-current (oc1 to oc3), for which a Jetson slows down."""
    counts = [_number(path) for path in (root / "sys/class/hwmon").glob("hwmon*/oc*_event_cnt")]
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def _memory(root: Path) -> Iterator[tuple[str, int]]:
    for line in (read_text(root / "proc/meminfo") or "").splitlines():
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
    lines = (read_text(root / "proc/stat") or "").splitlines()
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
        name, thousandths = read_text(zone / "type"), _number(zone / "temp")
        if name and thousandths is not None:  # a zone that is switched off cannot be read
            found[name] = max(thousandths / 1000, found.get(name, -273.15))
    return found


def _number(path: Path) -> int | None:
    try:
        return int(read_text(path) or "")
    except ValueError:
        return None


def read_text(path: Path) -> str | None:
    """What stands in a file; None where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
