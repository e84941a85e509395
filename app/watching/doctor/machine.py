"""The machine as its files describe it: board, memory, clocks, heat, and what of it is wrong."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from app.watching.doctor.findings import Finding, free_of_total, note, wrong
from engines.machine import sensors
from engines.machine.memory import MIB
from engines.machine.sensors import Device, read_text

LOW_MEMORY = 256 * MIB
MUCH_SWAP = 256 * MIB
RELEASES = {  # of Jetson Linux -> JetPack
    "39.2.1": "7.2.1", "39.2.0": "7.2", "38.4.0": "7.1", "38.2.1": "7.0", "38.2.0": "7.0",
    "36.5.2": "6.2.3", "36.5.0": "6.2.2", "36.4.4": "6.2.1", "36.4.3": "6.2", "36.4.0": "6.1",
    "36.3.0": "6.0", "35.6.1": "5.1.5", "35.6.0": "5.1.4", "35.5.0": "5.1.3", "35.4.1": "5.1.2",
    "35.3.1": "5.1.1", "35.2.1": "5.1", "35.1.0": "5.0.2",
}  # fmt: skip
OLDEST = 36  # the first release of Jetson Linux whose TensorRT (8.6, 10) Kensa was written for
GPUS = ("gpu", "ga10b", "gv11b")  # the end of their names below /sys/class/devfreq


def is_jetson(root: Path) -> bool:
    return (root / "etc/nv_tegra_release").exists() or "Jetson" in _board(root)


def _board(root: Path) -> str:
    return (read_text(root / "proc/device-tree/model") or "").strip("\0")


def machine_facts(root: Path, found: Device) -> Iterator[tuple[str, Any]]:
    if board := _board(root):
        yield "board", board
    release = _release(root)
    if release is not None:
        yield "L4T", release
        yield "JetPack", RELEASES.get(release, "of a release that Kensa does not know")
    yield "system", f"{platform.system()} {platform.release()}, {platform.machine()}"
    yield "processors", found.cpus
    yield "memory", free_of_total(found.memory_available, found.memory_total)
    info = sensors.meminfo(root)
    if info.get("SwapTotal"):
        kind = "zram" if "zram" in (read_text(root / "proc/swaps") or "") else "disk"
        yield "swap", f"{free_of_total(info.get('SwapFree'), info['SwapTotal'])}, on {kind}"
    number, name = sensors.power_mode(root)
    if name is not None:
        yield "power mode", f"{name} ({number}), of {', '.join(sensors.power_modes(root).values())}"
    yield from _clocks(root)
    if found.temperatures:
        hottest = max(found.temperatures, key=lambda zone: found.temperatures[zone])
        yield "hottest", f"{hottest}, {found.temperatures[hottest]:.0f} °C"
    if is_jetson(root):
        yield "DLA cores", len([*(root / "dev").glob("nvhost-nvdla[0-9]")])


def _release(root: Path) -> str | None:
    """As in /etc/nv_tegra_release: "# R36 (release), REVISION: 4.3, GCID: ..."."""
    text = read_text(root / "etc/nv_tegra_release") or ""
    found = re.match(r"# R(\d+) \(release\), REVISION: ([\d.]+)", text)
    return f"{found[1]}.{found[2]}" if found else None


def _clocks(root: Path) -> Iterator[tuple[str, str]]:
    cpu = root / "sys/devices/system/cpu/cpu0/cpufreq"
    scaled = root / "sys/class/devfreq"
    gpu = next((one for end in GPUS for one in sorted(scaled.glob(f"*.{end}"))), scaled / "none")
    for name, folder, files, unit in (
        ("CPU clock", cpu, ("scaling_cur_freq", "scaling_min_freq", "scaling_max_freq"), 1000),
        ("GPU clock", gpu, ("cur_freq", "min_freq", "max_freq"), 10**6),
    ):
        values = [read_text(folder / file) or "" for file in files]
        if all(value.isdecimal() for value in values):
            now, low, high = (int(value) // unit for value in values)
            yield name, f"{now} MHz, of {low} to {high}"


def machine_findings(root: Path, found: Device) -> Iterator[Finding]:
    release = _release(root)
    if release is not None and int(release.split(".")[0]) < OLDEST:
        yield wrong(
            f"L4T {release} is older than JetPack 6, whose TensorRT 10.3 Kensa needs.",
            "Install JetPack 6.2 or later.",
        )
    free = found.memory_available
    if free is not None and free < LOW_MEMORY:
        yield wrong(
            f"Memory is short: {free // MIB} MiB are free.",
            "End what is not needed; on a Jetson the desktop:"
            " sudo systemctl set-default multi-user.target && sudo reboot",
        )
    info = sensors.meminfo(root)
    used = info.get("SwapTotal", 0) - info.get("SwapFree", 0)
    if used > MUCH_SWAP:
        yield note(
            f"{used // MIB} MiB of memory are swapped out, and a GPU cannot use"
            " what is: parts may have to wait.",
            "free -m; swapon --show",
        )
    if hot := [part for part, slowed in found.throttled.items() if slowed]:
        yield wrong(
            f"Too hot, and slowed down for it: {', '.join(hot)}.",
            "See to the fan and the air around it, or take a lower power mode.",
        )
    modes, (number, name) = sensors.power_modes(root), sensors.power_mode(root)
    best = max(modes, key=lambda one: _watts(modes[one]), default=None)
    if best is not None and name is not None and _watts(name) < _watts(modes[best]):
        yield note(
            f"The power mode is {name}; {modes[best]} is the fastest.",
            f"sudo nvpmodel -m {best} && sudo jetson_clocks   # -m {number} goes back",
        )


def _watts(name: str) -> float:
    """For comparing: MAXN_SUPER is above MAXN, and that above all with a number."""
    if name.startswith("MAXN"):
        return 1000.0 + len(name)
    found = re.search(r"(\d+)W", name)
    return float(found[1]) if found else 0.0
