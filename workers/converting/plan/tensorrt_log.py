"""What TensorRT says while a plan is made, and the errors with sentences that come of it.

Only loaded where TensorRT is, by `workers.converting.plan.build`.
"""

from __future__ import annotations

import functools
import re
from typing import Any

from engines.errors import BuildFailed, KensaError, OutOfMemory
from engines.machine.memory import MIB
from engines.nvidia.library import TURING, here

LIBRARY = here()
trt: Any = LIBRARY.load()

LINES = 200  # of TensorRT's log that are kept


class Log(trt.ILogger):  # type: ignore[misc]  # a class of bindings without types
    """Keeps the warnings and errors of TensorRT, which has no other way to say why it failed."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.lines: list[str] = []

    def log(self, severity: Any, msg: str) -> None:
        if severity <= trt.ILogger.WARNING and len(self.lines) < LINES:
            self.lines.append(msg)


@functools.cache
def logger() -> Log:
    """The only one: TensorRT listens to one logger at a time, the first that is alive."""
    return Log()


def failure(lines: list[str], free: int, total: int, workspace: int | None = None) -> KensaError:
    """Why there is no plan, or no engine, as an error with a sentence.

    Args:
        workspace: bytes that a build was allowed.
    """
    text = "\n".join(lines)
    if "Could not find any implementation for node" in text:
        node = text.split("Could not find any implementation for node ")[1].split(".)")[0]
        return OutOfMemory(memory_sentence(f"it found no kernel for {node[:200]}", free, total))
    if "within workspace limit" in text or "requires workspace memory" in text:
        return _small_workspace(lines)
    asked = re.search(r"Requested size was (\d+) bytes", text)
    if asked is not None and workspace is not None and workspace < int(asked[1]) < free:
        return _small_workspace(lines)  # which it calls out of memory, too
    if "OutOfMemory" in text or "out of memory" in text or "memory is insufficient" in text:
        return OutOfMemory(memory_sentence(last_line(lines), free, total))
    return BuildFailed(f"{LIBRARY.spoken} {trt.__version__} made no plan: {last_line(lines)}")


def _small_workspace(lines: list[str]) -> BuildFailed:
    return BuildFailed(
        f"{LIBRARY.spoken} {trt.__version__} made no plan, because the workspace is too small:"
        f" allow more with --workspace ({last_line(lines)})"
    )


def no_turing(lines: list[str]) -> bool:
    """Whether there is no plan because it was to be for a Turing card, too."""
    return any(TURING in line or "Turing" in line for line in lines)


def memory_sentence(what: str, free: int, total: int) -> str:
    return (
        f"TensorRT ran out of memory: {what}. Of {total // MIB:,} MiB {free // MIB:,} were free"
        " before. Unload models that are not needed, stop other programs that use the GPU (on a"
        " Jetson also the desktop: sudo systemctl isolate multi-user.target), and try again; --fp16"
        " needs about half."
    )


def last_line(lines: list[str]) -> str:
    """The last reason. Without a driver each is followed by a complaint that there is none."""
    reasons = [line for line in lines if "catchCudaError" not in line] or lines
    return reasons[-1][:500] if reasons else "it did not say why."
