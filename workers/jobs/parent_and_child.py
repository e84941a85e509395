"""What worker and job know of each other as processes: whose death ends whom, who gives way."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import subprocess
from pathlib import Path
from typing import IO

from engines.errors import EXIT_CODE
from engines.queue.protocol import PACE, PARENT

DISK_FULL = errno.ENOSPC  # exit code of a job that could not even write why it failed
FULL = "The disk is full; nothing was changed. Free some space, and send the job again."
LOOK_EVERY_S = 0.3  # whether a job was cancelled
PR_SET_PDEATHSIG = 1


def begin(command: list[str], stdin: int, *inherits: int) -> subprocess.Popen[bytes]:
    """Start a job's process: it leads a group of its own, and ends with the thread that starts it.

    Args:
        inherits: open files that it has, too.
    """
    return subprocess.Popen(
        command,
        stdin=stdin,
        start_new_session=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, PARENT: str(os.getpid())},
        pass_fds=inherits,
    )


def die_with_parent() -> None:
    """Let the system kill this process when the one that started it ends, however it ends.

    That one says who it is: it may have ended before this line.
    """
    parent = int(os.environ.get(PARENT, os.getppid()))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:
        os._exit(EXIT_CODE)


def give_way() -> None:
    """Run when nothing else wants to: the line comes first."""
    if os.environ.get(PACE) != "full":
        os.nice(19)
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def has_lock(file: IO[str]) -> bool:
    """Whether this process has a file's lock now; it has it until it closes the file or dies."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
