"""Writes that are made to fail, one at a time: what is said to be undone must be undone."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# Python's own names of what it is about to do (audit events): all that changes a file system.
CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.truncate", "os.symlink"}
_fsync = os.fsync


@dataclass
class Step:
    """The write that fails, counted from 0."""

    root: str
    left: int
    error: int
    spared: str
    failed: str | None = None  # what it was

    def meets(self, what: str, path: str) -> None:
        if not path.startswith(self.root) or self.failed is not None:
            return
        if self.spared and path.endswith(self.spared):
            return
        if self.left == 0:
            self.failed = f"{what} {path.removeprefix(self.root)}"
            raise OSError(self.error, os.strerror(self.error), path)
        self.left -= 1


_now: Step | None = None
_is_hooked = False


@contextmanager
def failing(root: Path, step: int, error: int = errno.ENOSPC, spared: str = "") -> Iterator[Step]:
    """Let write number `step` below a folder fail, in whatever thread; all others work.

    Args:
        spared: writes to paths that end so are not counted, and work.
    """
    global _now, _is_hooked
    if not _is_hooked:
        sys.addaudithook(_audit)  # which stays for good
        _is_hooked = True
    _now = Step(str(root), step, error, spared)
    os.fsync = _flush
    try:
        yield _now
    finally:
        _now, os.fsync = None, _fsync


def _audit(event: str, arguments: tuple[object, ...]) -> None:
    if _now is None:
        return
    if event == "open":
        path, _, flags = arguments
        if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            _now.meets(event, os.fsdecode(path) if isinstance(path, (str, bytes)) else "")
    elif event in CHANGES:
        path = arguments[0]
        if event == "os.mkdir" and Path(str(path)).is_dir():  # nothing is written
            return
        _now.meets(event, os.fspath(path) if isinstance(path, (str, os.PathLike)) else "")


def _flush(descriptor: int) -> None:
    if _now is not None:
        _now.meets("fsync", str(Path(f"/proc/self/fd/{descriptor}").readlink()))
    _fsync(descriptor)
