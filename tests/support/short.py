"""Processes that see the memory of a container: its CGROUP is a folder of a test.

short.py CGROUP app                    the server
short.py CGROUP worker DATA            the worker, whose jobs see the same
short.py CGROUP job DATA ID KIND       a job of it
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.extend(str(Path(__file__).resolve().parents[n]) for n in (2, 1))


def main(cgroup: str, what: str, *rest: str) -> int:
    from engines.machine import memory

    memory.CGROUP = Path(cgroup)
    if what == "app":
        from app.__main__ import main as serve

        sys.argv = ["kensa"]
        serve()
        return 0
    if what == "worker":
        from workers.jobs import attempts
        from workers.jobs import single_worker as worker
        from workers.jobs.__main__ import main as work

        attempts.CHILD[:] = [sys.executable, __file__, cgroup, "job"]
        worker.POLL_S = 0.1
        return work(["--data_dir", rest[0]])
    from workers.jobs import job_process as job

    return job.main(Path(rest[0]), *rest[1:])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
