"""Processes for test_spare.py: the real ones of a job, but what a job does is cheap.

sparing.py child DATA ID KIND, or DATA --spare   as workers.jobs.job_process
sparing.py worker DATA                           begins a spare process, and waits to be killed
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.extend(str(Path(__file__).resolve().parents[n]) for n in (2, 1))

COMMAND = [sys.executable, __file__, "child"]
SHORT = "short"  # in the data folder: memory is
GO_ON = "go on"  # in it: jobs that wait end


def child(data: Path, *job: str) -> int:
    from engines.machine import job_memory
    from workers.jobs import job_process, spare

    def do(
        data: Path, job_id: str, kind: str, request: dict[str, Any], _: object
    ) -> dict[str, Any]:
        seen = {
            "pid": os.getpid(), "kind": kind, "request": request, "environment": {**os.environ},
            "cwd": str(Path.cwd()), "policy": os.sched_getscheduler(0), "group": os.getpgid(0),
        }  # fmt: skip
        (data / f"{job_id}.json").write_text(json.dumps(seen))
        while request.get("waits") and not (data / GO_ON).exists():
            time.sleep(0.02)
        return {"state": "succeeded"}

    job_process.do = do  # type: ignore[assignment]
    job_memory.must_give_up_a_spare = (data / SHORT).exists
    spare._load = lambda _: None
    spare.LOOK_EVERY_S = 0.05
    return job_process.main(data, *job)


def worker(data: Path) -> int:
    from workers.jobs.spare import Spare

    one = Spare(COMMAND)
    one.look(data, lambda: True)
    assert one._waits is not None
    (data / "pid").write_text(str(one._waits[0].pid))
    threading.Event().wait()
    return 0


if __name__ == "__main__":
    what, folder, *rest = sys.argv[1:]
    sys.exit(child(Path(folder), *rest) if what == "child" else worker(Path(folder)))
