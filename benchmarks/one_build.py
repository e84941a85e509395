"""Build one graph for other machines' GPUs, in this process alone: native code may end it.

    python -m benchmarks.one_build FOLDER CAPABILITIES PRECISION [CANCEL_AT]

FOLDER has model.onnx, meta.json and, where the graph has a bank, bank.npy. CAPABILITIES as in
SM86,SM120. CANCEL_AT: the percent of the build at which it is interrupted, as by Ctrl-C. Prints
as JSON what happened.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import memory_mib
from engines.errors import KensaError
from engines.meta import Meta
from engines.store.plan_record import Machine
from workers.progress import Progress, Tick

WORKSPACE = 512  # MiB


class Heard(Progress):
    """Keeps how far the build was, and interrupts it."""

    def __init__(self, cancel_at: int | None) -> None:
        super().__init__(quiet=True)
        self.percent: list[int] = []
        self.lines: list[str] = []
        self._cancel_at = cancel_at

    def say(self, line: str) -> None:
        self.lines.append(line)

    def phase(self, name: str) -> Tick:
        def tick(done: int, total: int) -> None:
            self.percent.append(done)
            if self._cancel_at is not None and done >= self._cancel_at:
                self._cancel_at = None
                os.kill(os.getpid(), signal.SIGINT)

        return tick


def main(folder: Path, capabilities: str, precision: Any, cancel_at: int | None) -> dict[str, Any]:
    from workers.converting.plan.build import Wanted, make_plan

    meta, bank = Meta.read(folder / "meta.json"), None
    if (folder / "bank.npy").is_file():
        bank = np.load(folder / "bank.npy")
    none = np.zeros((0, meta.image_size, meta.image_size, 3), np.uint8)
    wanted = Wanted(meta, precision, WORKSPACE, False, bank, none, None)
    progress, found = Heard(cancel_at), {}
    began = time.perf_counter()
    try:
        machine = Machine.of_others(tuple(capabilities.split(",")))
        found = make_plan(folder, machine, wanted, None, progress)
    except KeyboardInterrupt:
        found["cancelled"] = True
    except KensaError as error:
        found["error"] = f"{type(error).__name__}: {error}"
    return {
        **found,
        "wall": time.perf_counter() - began,
        "percent": progress.percent,
        "said": progress.lines,
        "peak_mib": memory_mib("VmHWM"),
    }


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    where, gpus, kind, *cancel = sys.argv[1:]
    print(json.dumps(main(Path(where), gpus, kind, int(cancel[0]) if cancel else None)))
