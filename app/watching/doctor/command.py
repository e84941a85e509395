"""`kensa doctor`: what this machine has, which models fit, what is wrong, and what to type for it.

It only looks, and needs no server. Files are read below a root folder, so that a test can lay down
those of a Jetson.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from app.settings import Settings
from engines.errors import BadSettings, KensaError, NoTensorRT
from engines.machine import device, memory
from engines.machine.device import Device
from engines.machine.memory import MIB, Free, Need
from engines.meta import Meta
from engines.serving.opening import Opening, gpu_memory, memory_needed
from engines.store.bundle import ONNX
from engines.store.plan import Fingerprint, Machine
from engines.store.versions import META, Store

LOW_DISK = 1024 * MIB
LOW_MEMORY = 256 * MIB
MUCH_SWAP = 256 * MIB
RELEASES = {  # of Jetson Linux -> JetPack
    "39.2.1": "7.2.1", "39.2.0": "7.2", "38.4.0": "7.1", "38.2.1": "7.0", "38.2.0": "7.0",
    "36.5.2": "6.2.3", "36.5.0": "6.2.2", "36.4.4": "6.2.1", "36.4.3": "6.2", "36.4.0": "6.1",
    "36.3.0": "6.0", "35.6.1": "5.1.5", "35.6.0": "5.1.4", "35.5.0": "5.1.3", "35.4.1": "5.1.2",
    "35.3.1": "5.1.1", "35.2.1": "5.1", "35.1.0": "5.0.2",
}  # fmt: skip
OLDEST = 36  # the first release of Jetson Linux whose TensorRT (8.6, 10) Kensa was written for
NODES = ("nvmap", "nvhost-gpu", "nvgpu/igpu0/ctrl", "nvidia0")  # of a GPU, below /dev
GPUS = ("gpu", "ga10b", "gv11b")  # the end of their names below /sys/class/devfreq
BINDINGS = "usr/lib/python3*/dist-packages/tensorrt"  # where apt puts them

Facts = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Finding:
    """What is wrong and must be mended, or is only worth knowing."""

    level: Literal["wrong", "note"]
    what: str
    do: str = ""  # what to type, or else to do


def _wrong(what: str, do: str = "") -> Finding:
    return Finding("wrong", what, do)


def _note(what: str, do: str = "") -> Finding:
    return Finding("note", what, do)


@dataclass(frozen=True)
class Fit:
    """A model of the store, and whether this machine can serve it."""

    name: str
    version: str
    kind: str
    plan: str  # good, stale, none, or why it does not matter
    needs_mib: int
    fits: bool | None  # None where a server runs, whose models are in memory already


@dataclass
class Report:
    """All that was found."""

    facts: Facts = field(default_factory=dict)  # section -> name -> value
    models: list[Fit] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not any(one.level == "wrong" for one in self.findings)


def examine(settings: Settings | None, root: Path = Path("/")) -> Report:
    """Look at everything."""
    report, found = Report(), Device.read(root)
    jetson = _is_jetson(root)
    report.facts["machine"] = dict(_machine(root, found))
    report.findings += _about_the_machine(root, found)
    tensorrt, problem = _tensorrt()
    opening = Opening(runtime=settings.runtime if settings else "auto")
    gpu = gpu_memory(opening) if tensorrt else None
    report.facts["software"] = dict(_software(root, tensorrt, problem, gpu))
    report.findings += _about_tensorrt(root, jetson, settings, problem)
    if settings is not None:
        report.facts["storage"] = dict(_storage(settings))
        report.findings += _about_storage(settings)
        _look_at_models(report, settings, opening, tensorrt, Free.now(gpu))
    return report


# ---- the machine ------------------------------------------------------------------------------


def _is_jetson(root: Path) -> bool:
    return (root / "etc/nv_tegra_release").exists() or "Jetson" in _board(root)


def _board(root: Path) -> str:
    return (_text(root / "proc/device-tree/model") or "").strip("\0")


def _machine(root: Path, found: Device) -> Iterator[tuple[str, Any]]:
    if board := _board(root):
        yield "board", board
    release = _release(root)
    if release is not None:
        yield "L4T", release
        yield "JetPack", RELEASES.get(release, "of a release that Kensa does not know")
    yield "system", f"{platform.system()} {platform.release()}, {platform.machine()}"
    yield "processors", found.cpus
    yield "memory", _of(found.memory_available, found.memory_total)
    info = device.meminfo(root)
    if info.get("SwapTotal"):
        kind = "zram" if "zram" in (_text(root / "proc/swaps") or "") else "disk"
        yield "swap", f"{_of(info.get('SwapFree'), info['SwapTotal'])}, on {kind}"
    number, name = device.power_mode(root)
    if name is not None:
        yield "power mode", f"{name} ({number}), of {', '.join(device.power_modes(root).values())}"
    yield from _clocks(root)
    if found.temperatures:
        hottest = max(found.temperatures, key=lambda zone: found.temperatures[zone])
        yield "hottest", f"{hottest}, {found.temperatures[hottest]:.0f} °C"
    if _is_jetson(root):
        yield "DLA cores", len([*(root / "dev").glob("nvhost-nvdla[0-9]")])


def _release(root: Path) -> str | None:
    """As in /etc/nv_tegra_release: "# R36 (release), REVISION: 4.3, GCID: ..."."""
    text = _text(root / "etc/nv_tegra_release") or ""
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
        values = [_text(folder / file) or "" for file in files]
        if all(value.isdecimal() for value in values):
            now, low, high = (int(value) // unit for value in values)
            yield name, f"{now} MHz, of {low} to {high}"


def _about_the_machine(root: Path, found: Device) -> Iterator[Finding]:
    release = _release(root)
    if release is not None and int(release.split(".")[0]) < OLDEST:
        yield _wrong(
            f"L4T {release} is older than JetPack 6, whose TensorRT 10.3 Kensa needs.",
            "Install JetPack 6.2 or later.",
        )
    free = found.memory_available
    if free is not None and free < LOW_MEMORY:
        yield _wrong(
            f"Memory is short: {free // MIB} MiB are free.",
            "End what is not needed; on a Jetson the desktop:"
            " sudo systemctl set-default multi-user.target && sudo reboot",
        )
    info = device.meminfo(root)
    used = info.get("SwapTotal", 0) - info.get("SwapFree", 0)
    if used > MUCH_SWAP:
        yield _note(
            f"{used // MIB} MiB of memory are swapped out, and a GPU cannot use"
            " what is: parts may have to wait.",
            "free -m; swapon --show",
        )
    if hot := [part for part, slowed in found.throttled.items() if slowed]:
        yield _wrong(
            f"Too hot, and slowed down for it: {', '.join(hot)}.",
            "See to the fan and the air around it, or take a lower power mode.",
        )
    modes, (number, name) = device.power_modes(root), device.power_mode(root)
    best = max(modes, key=lambda one: _watts(modes[one]), default=None)
    if best is not None and name is not None and _watts(name) < _watts(modes[best]):
        yield _note(
            f"The power mode is {name}; {modes[best]} is the fastest.",
            f"sudo nvpmodel -m {best} && sudo jetson_clocks   # -m {number} goes back",
        )


def _watts(name: str) -> float:
    """For comparing: MAXN_SUPER is above MAXN, and that above all with a number."""
    if name.startswith("MAXN"):
        return 1000.0 + len(name)
    found = re.search(r"(\d+)W", name)
    return float(found[1]) if found else 0.0


# ---- software ---------------------------------------------------------------------------------


def _tensorrt() -> tuple[Machine | None, str | None]:
    """What TensorRT runs on here, or why it does not run."""
    try:
        return Machine.read(), None
    except NoTensorRT as error:
        return None, str(error)


def _software(
    root: Path, tensorrt: Machine | None, problem: str | None, gpu: memory.Gpu | None
) -> Iterator[tuple[str, Any]]:
    yield "Python", f"{platform.python_version()} in {sys.prefix}"
    if find_spec("openvino") is None:
        yield "OpenVINO", "not installed"
    else:
        from engines.runtimes.openvino import cpu_has_bf16

        bf16 = "with" if cpu_has_bf16() else "without"
        yield "OpenVINO", f"{metadata.version('openvino')}, a CPU {bf16} bf16"
    yield "TensorRT", tensorrt.tensorrt if tensorrt else "does not run here"
    cuda = re.search(
        r'"cuda"\s*:\s*\{[^}]*"version"\s*:\s*"([\d.]+)"',
        _text(root / "usr/local/cuda/version.json") or "",
    )
    if cuda:
        yield "CUDA", cuda[1]
    if tensorrt is not None:
        yield "GPU", f"{tensorrt.device}, compute capability {tensorrt.compute}"
    if gpu is not None:
        shared = ", shared with the machine" if gpu.shared else ""
        yield "GPU memory", f"{_of(gpu.free, gpu.total)}{shared}"
    missing = [one for one in ("torch", "anomalib", "onnx") if find_spec(one) is None]
    yield (
        "learning",
        f"not installed: {', '.join(missing)}"
        if missing
        else (f"torch {metadata.version('torch')}, anomalib {metadata.version('anomalib')}"),
    )


def _about_tensorrt(
    root: Path, jetson: bool, settings: Settings | None, problem: str | None
) -> Iterator[Finding]:
    wanted = settings is not None and settings.runtime == "tensorrt"
    if problem is None:
        return
    if not jetson and not wanted:
        if (root / "dev/nvidia0").exists():
            yield _note(
                "This machine has an NVIDIA GPU, and TensorRT does not run here:"
                f" OpenVINO inspects, on the CPU. {problem}"
            )
        return
    yield _wrong(problem, _what_to_do(root))
    closed = [node for node in NODES if _is_closed(root / "dev" / node)]
    if closed:
        yield _wrong(
            f"This user may not open /dev/{closed[0]}, which the GPU needs.",
            "sudo usermod -aG video,render $USER, and log in anew; in a container:"
            " --group-add video --group-add render",
        )
    elif jetson and not any((root / "dev" / node).exists() for node in NODES):
        yield _wrong(
            "There is no /dev/nvmap, so no GPU can be reached from here.",
            "docker run --runtime nvidia ..., or in a compose file: runtime: nvidia",
        )
    if find_spec("openvino") is None:
        yield _wrong(
            "Nothing can inspect here: neither TensorRT nor OpenVINO runs.", "pip install openvino"
        )


def _what_to_do(root: Path) -> str:
    """What to type where the bindings are on the machine, but not in this environment."""
    places = sorted(root.glob(BINDINGS))
    if find_spec("tensorrt") is not None or not places:
        return ""
    theirs, ours = places[-1].parts[-3], f"python{sys.version_info[0]}.{sys.version_info[1]}"
    if theirs not in (ours, "python3"):
        return f"They are for {theirs}: {theirs} -m venv --system-site-packages NEW_FOLDER"
    return f"{theirs} -m venv --system-site-packages {sys.prefix}   # they are on this machine"


def _is_closed(node: Path) -> bool:
    return node.exists() and not os.access(node, os.R_OK | os.W_OK)


# ---- disks ------------------------------------------------------------------------------------


def _storage(settings: Settings) -> Iterator[tuple[str, Any]]:
    for name, folder in (("data", settings.data), ("cache", settings.compiled_dir)):
        if folder is not None:
            usage = shutil.disk_usage(_nearest(folder))
            yield name, f"{folder}, {_of(usage.free, usage.total)}"


def _about_storage(settings: Settings) -> Iterator[Finding]:
    data, cache = settings.data, settings.compiled_dir
    free = shutil.disk_usage(_nearest(data)).free
    if free < LOW_DISK:
        yield _wrong(
            f"The disk of {data} has {free // MIB:,} MiB left.",
            f"Delete images or models that are not needed: du -sh {data}/*/*",
        )
    if not os.access(_nearest(data), os.W_OK | os.X_OK):
        yield _wrong(
            f"{data} cannot be written by this user ({_user()}).",
            f"sudo chown -R {_user()} {data}, or set KENSA_DATA_DIR to another folder",
        )
    if cache is None or not os.access(_nearest(cache), os.W_OK | os.X_OK):
        yield _note(
            f"{cache or 'The cache'} cannot be written: each start compiles the models anew.",
            "Set KENSA_CACHE_DIR to a folder of this user.",
        )


def _nearest(folder: Path) -> Path:
    """The folder, or the one above it that there is, and that may be looked at."""
    return next(place for place in (folder, *folder.parents) if os.access(place, os.F_OK))


def _user() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


# ---- models -----------------------------------------------------------------------------------


def _look_at_models(
    report: Report, settings: Settings, opening: Opening, tensorrt: Machine | None, free: Free
) -> None:
    serving = _is_served(settings)
    if serving:
        report.facts["storage"]["server"] = (
            f"answers on port {settings.port}: what its models take is not free any more"
        )
    if limit := settings.model_memory_mib * MIB:
        free = free.at_most(limit)
    store = Store(settings.data / "models")
    needs: list[Need] = []
    try:
        names = store.names()
    except OSError as error:
        report.findings.append(_wrong(f"The models cannot be read: {error}."))
        return
    for name in names:
        try:
            found = _look_at(store, name, opening, tensorrt, report)
        except KensaError as error:
            report.findings.append(_wrong(f"{name}: {error}"))
            continue
        if found is None:
            continue
        version, meta, plan, need = found
        needs.append(need)
        short = need.short_of(free)
        fits = None if serving else short is None
        report.models.append(Fit(name, version, meta.model, plan, need.all // MIB, fits))
        if short is not None and not serving:
            report.findings.append(
                _wrong(
                    f"{name} needs {short.needed}, and {short.free}.",
                    "End other programs, or give the model a smaller memory bank.",
                )
            )
    together = Need(sum(need.host for need in needs), sum(need.device for need in needs))
    short = together.short_of(free)
    if short is not None and not serving and all(one.fits for one in report.models):
        report.findings.append(
            _note(
                f"Each model fits, but all together need {short.needed}, and {short.free}.",
                "KENSA_REST=on lets them take turns; KENSA_PINNED=NAME keeps one in memory.",
            )
        )


def _look_at(
    store: Store, name: str, opening: Opening, tensorrt: Machine | None, report: Report
) -> tuple[str, Meta, str, Need] | None:
    """The version that would serve, and what it takes; None where none can.

    Raises:
        KensaError: its files are damaged.
    """
    versions = [*store.candidates(name), *reversed(store.versions(name))]
    if not versions:
        return None
    folder = store.folder(name, versions[0])
    meta = Meta.read(folder / META)
    if not (folder / ONNX).is_file():
        report.findings.append(
            _note(
                f"{name} {versions[0]} is trained, but not converted.",
                f"curl -X POST localhost:8000/convert -H 'Content-Type: application/json' -d"
                f' \'{{"model": "{name}"}}\'',
            )
        )
        return None
    record = Fingerprint.read(folder)
    plan = "none"
    if record is not None:
        plan = f"for TensorRT {record.machine.tensorrt}, which does not run here"
    if tensorrt is not None:
        why = record.stale(folder, tensorrt) if record else "it has no plan for TensorRT."
        plan = ("stale" if record else "none") if why else "good"
        if why:
            do = "Start the server: it builds one, and says so in GET /jobs."
            report.findings.append(_note(f"{name}: {why}", do))
    return versions[0], meta, plan, memory_needed(folder, opening)


def _is_served(settings: Settings) -> bool:
    """Whether something listens where the server would."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    try:
        with socket.create_connection((host, settings.port), timeout=0.5):
            return settings.port != 0
    except OSError:
        return False


# ---- the command ------------------------------------------------------------------------------


def command(arguments: list[str]) -> int:
    """`kensa doctor`: print what was found. 0 when all is well, 1 when something must be mended."""
    parser = argparse.ArgumentParser(
        prog="kensa doctor",
        description="What this machine has, which models fit into its memory, what is wrong, and"
        " what to type for it. Reads the server's settings; exit code 1 when something is wrong.",
    )
    parser.add_argument("--json", action="store_true", help="for a program, rather than a person")
    as_json = parser.parse_args(arguments).json
    settings: Settings | None = None
    problem = None
    try:
        settings = Settings.read()
        settings.data  # noqa: B018 (raises where there is no place for it)
    except BadSettings as error:
        settings, problem = None, str(error)
    report = examine(settings)
    if problem is not None:
        report.findings.insert(0, _wrong(problem, "See docs/settings.md."))
    print(_as_json(report) if as_json else as_text(report))  # noqa: T201
    _give_back()
    return 0 if report.ok else 1


def _give_back() -> None:
    """The context that a look at the GPU's memory took."""
    cuda = sys.modules.get("engines.runtimes.cuda")
    if cuda is not None:
        cuda.close()


def _as_json(report: Report) -> str:
    return json.dumps({"ok": report.ok, **asdict(report)}, indent=2, ensure_ascii=False)


def as_text(report: Report) -> str:
    """For a person."""
    lines: list[str] = []
    for section, facts in report.facts.items():
        lines += [
            section.capitalize(),
            *(f"  {name:<11} {value}" for name, value in facts.items()),
            "",
        ]
    lines.append("Models")
    for one in report.models:
        fits = {True: "fits", False: "does not fit", None: "served"}[one.fits]
        lines.append(
            f"  {one.name:<11} {one.version}, {one.kind}, about {one.needs_mib} MiB, {fits}"
        )
        lines.append(f"  {'':<11} plan: {one.plan}")
    lines += [] if report.models else ["  none"]
    for level, title in (("wrong", "What is wrong"), ("note", "Worth knowing")):
        found = [finding for finding in report.findings if finding.level == level]
        lines += ["", title] if found else []
        for finding in found:
            lines.append(f"  - {finding.what}")
            lines += [f"      {finding.do}"] if finding.do else []
    return "\n".join([*lines, "", "All is well." if report.ok else "Something must be mended."])


def _of(free: int | None, total: int | None) -> str:
    if free is None or total is None:
        return "unknown"
    return f"{free // MIB:,} of {total // MIB:,} MiB free"


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
