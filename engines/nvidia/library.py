"""Which TensorRT is here: the full one, of a Jetson, or TensorRT for RTX, of a PC.

Both have the same API. Whatever the code does differently for one of them is a field of `Library`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

from engines.errors import BadRequest, NoTensorRT

ANY_RTX = "rtx"  # the target that names no GPU
TARGET = r"rtx(:SM\d{2,3}(,SM\d{2,3})*)?"  # what --target and POST /convert take
TARGETS = "write rtx, rtx:SM86 or rtx:SM86,SM120"  # what is said where one is none
Module = Literal["tensorrt", "tensorrt_rtx"]
TURING = "SM75"  # multiplies no float32 matrices with TensorRT for RTX


@dataclass(frozen=True)
class Library:
    """One of the two."""

    module: Module  # what Python imports
    spoken: str
    names_gpus: bool  # a plan is for the compute capabilities that it was built for, and is built
    # for those of other machines, too, without a GPU. Else: for the one GPU that built it.
    refits: bool  # a plan takes other weights. RTX builds in seconds, and with REFIT only on a GPU
    times_kernels: bool  # while it builds; what it measured is kept for the next build
    compiles_when_opened: bool  # kernels are made by the machine that serves, and kept in a cache

    @property
    def installed(self) -> bool:
        return find_spec(self.module) is not None

    def must_be_installed(self) -> None:
        """Raise NoTensorRT where it is not; loads nothing."""
        if not self.installed:
            raise NoTensorRT(_NOT_INSTALLED[self.module])

    def load(self) -> Any:
        """The module.

        Raises:
            NoTensorRT: it is not here, or does not load.
        """
        self.must_be_installed()
        try:
            return importlib.import_module(self.module)
        except ModuleNotFoundError:
            raise NoTensorRT(_NOT_INSTALLED[self.module]) from None
        except (ImportError, OSError) as error:
            raise NoTensorRT(_DOES_NOT_LOAD[self.module].format(error)) from None


FULL = Library(
    "tensorrt", "TensorRT", False, refits=True, times_kernels=True, compiles_when_opened=False
)
RTX = Library(
    "tensorrt_rtx",
    "TensorRT for RTX",
    True,
    refits=False,
    times_kernels=False,
    compiles_when_opened=True,
)
LIBRARIES: dict[Module, Library] = {one.module: one for one in (FULL, RTX)}

_NOT_INSTALLED = {
    FULL.module: "TensorRT's Python bindings are not in this environment: on a Jetson, sudo apt"
    " install python3-libnvinfer, and make the environment with python3 -m venv"
    " --system-site-packages, so that it sees them. On a PC with an RTX card:"
    " pip install 'kensa[rtx]'.",
    RTX.module: "TensorRT for RTX is not in this environment: pip install 'kensa[rtx]' (on x86-64"
    " Linux; there is none for a Jetson).",
}
_DOES_NOT_LOAD = {
    FULL.module: "TensorRT's Python bindings are here, but not a library that they need ({}): a"
    " container must be started with --runtime nvidia, from an image that has TensorRT inside;"
    " outside of one, sudo apt install tensorrt.",
    RTX.module: "TensorRT for RTX is here, but does not load ({}): install it anew,"
    " pip install --force-reinstall tensorrt-rtx-cu13.",
}


def here() -> Library:
    """The one that this environment has: the full one, where it has both. FULL where it has none.

    A Jetson has only the full one. On a PC whoever has installed the full one wants it.
    """
    return RTX if RTX.installed and not FULL.installed else FULL


def builds_for_others() -> bool:
    """Whether plans for GPUs of other machines can be built in this environment."""
    return here() is RTX


def why() -> str:
    """Which of the two is taken, and why, as a sentence; none where neither is installed."""
    if not FULL.installed and not RTX.installed:
        return ""
    if FULL.installed and RTX.installed:
        return (
            "TensorRT is taken, because it is in this environment; TensorRT for RTX is here as well"
            " and is passed over."
        )
    if FULL.installed:
        return "TensorRT is taken, because it is in this environment."
    return "TensorRT for RTX is taken, because TensorRT itself is not in this environment."


def capability(compute: str) -> str:
    """How the library calls the compute capability "8.6": SM86."""
    return "SM" + compute.replace(".", "")


def possible() -> tuple[str, ...]:
    """The capabilities that TensorRT for RTX can build for, rising.

    Raises:
        NoTensorRT: it is not here, or does not load.
    """
    members = RTX.load().ComputeCapability.__members__
    return tuple(name for name in members if name.startswith("SM"))


def target_of(gpus: object) -> str | None:
    """The target that names those capabilities, of a report.json, that can be built for here.

    None where there is none: what nobody here needs must not stop what asks.
    """
    try:
        known = possible()
    except NoTensorRT:
        return None
    named = [one for one in known if isinstance(gpus, list) and one in gpus]
    return f"{ANY_RTX}:{','.join(named)}" if named else None


def capabilities_of(target: str) -> tuple[str, ...] | None:
    """Those that a target names, rising and each once; None where it names none.

    Raises:
        NoTensorRT: TensorRT for RTX is not what this environment builds with.
        BadRequest: the target is none, or the library does not know one of them.
    """
    kind, _, named = target.partition(":")
    if kind != ANY_RTX or (not named and ":" in target):
        raise BadRequest(f"{target} is no target: {TARGETS}.")
    if FULL.installed:
        raise NoTensorRT(
            "This environment has TensorRT, which builds for its own machine only. For other"
            " machines make an environment without it, with pip install 'kensa[rtx]'."
        )
    known = possible()
    if not named:
        return None
    wanted = named.split(",")
    if unknown := [one for one in wanted if one not in known]:
        raise BadRequest(
            f"{RTX.spoken} {RTX.load().__version__} builds for no GPU of the compute capability"
            f" {', '.join(unknown)}, only for {', '.join(known)}."
        )
    return tuple(one for one in known if one in wanted)
