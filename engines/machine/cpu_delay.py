"""How long threads of this process had work and no CPU: whether somebody else was at work, too.

Linux counts that for each thread, in nanoseconds: the second number of
/proc/PID/task/TID/schedstat (Documentation/scheduler/sched-stats.rst), which is the same in a
container. What all processes used together (/proc/stat) would not do: it is counted in hundredths
of a second, as long as an image takes, and says nothing of who was in whose way.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

TASKS = Path("/proc/self/task")


def cpu_delays() -> dict[str, int]:
    """For each thread of this process how long it has waited for a CPU until now, nanoseconds.

    Empty where the system does not count it.
    """
    delays: dict[str, int] = {}
    for task in TASKS.iterdir() if TASKS.is_dir() else ():
        with suppress(OSError, ValueError):  # the thread has ended; a kernel that does not count
            _, waited, _ = (task / "schedstat").read_text(encoding="ascii").split()
            delays[task.name] = int(waited)
    return delays


def longest_s(before: Mapping[str, int], after: Mapping[str, int]) -> float:
    """How long the thread waited that waited for longest in between, seconds.

    Not all of them added up: work is done when its slowest thread is, and many that are woken take
    a moment each.
    """
    return max((waited - before.get(one, 0) for one, waited in after.items()), default=0) / 1e9
