"""Servers that are forked from a process which has imported what a server imports.

A start so takes a third of the CPU time. It runs the same code in a process of its own.

What a start does first is not seen there: tests of that begin `python -m app` themselves.

forking.py ANSWERS    a script: requests on stdin, a line each; answers on that descriptor
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
IMPORTED = (
    "uvicorn", "app.main", "app.http.connection", "app.jobs.queue_database",
    "engines.runtimes.cuda", "engines.runtimes.openvino",
)  # fmt: skip


class Forked(subprocess.Popen[bytes]):
    """A server, whose parent is not this process: the parent says how it ended."""

    def __init__(self, parent: Parent, pid: int) -> None:
        self._parent, self._child_created = parent, False  # nothing to wait for at the end
        self.args, self.pid, self.returncode = ("app",), pid, None
        self.stdin = self.stdout = self.stderr = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._parent.ended(self.pid, 0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.returncode = self._parent.ended(self.pid, timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.returncode


class Parent:
    """The process that is forked for each server of one environment. It ends with this one."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._answers, theirs = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(theirs)],
            cwd=ROOT, env=environment, stdin=subprocess.PIPE, pass_fds=[theirs],
        )  # fmt: skip
        os.close(theirs)
        self._read = b""
        self._begun: list[int] = []
        self._ended: dict[int, int] = {}
        self._lock = threading.RLock()

    def begin(self, environment: dict[str, str], log: Path) -> Forked:
        with self._lock:
            assert self._process.stdin is not None
            asked = {"environment": environment, "log": str(log)}
            self._process.stdin.write(json.dumps(asked).encode() + b"\n")
            self._process.stdin.flush()
            while not self._begun:
                self._hear(None)
            return Forked(self, self._begun.pop())

    def ended(self, pid: int, timeout: float | None) -> int | None:
        """Its exit code, as Popen has it; None where it still runs after so many seconds."""
        until = None if timeout is None else time.monotonic() + timeout
        while True:
            with self._lock:
                left = None if until is None else max(0.0, until - time.monotonic())
                self._hear(min(0.1, left if left is not None else 0.1))
                if pid in self._ended:
                    return self._ended[pid]
            if left == 0:
                return None

    def end(self) -> None:
        """Servers that still run go on."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        os.close(self._answers)

    def _hear(self, timeout: float | None) -> None:
        if not select.select([self._answers], [], [], timeout)[0]:
            return
        more = os.read(self._answers, 65536)
        assert more, "the process that is forked for servers has ended"
        *lines, self._read = (self._read + more).split(b"\n")
        for line in lines:
            what, pid, *code = line.split()
            if what == b"begun":
                self._begun.append(int(pid))
            else:
                self._ended[int(pid)] = int(code[0])


_parents: dict[frozenset[tuple[str, str]], Parent | None] = {}


def forked(variables: dict[str, str], log: Path) -> Forked | None:
    """A server; None where the environment is another one than the first's, and new.

    Such a one may never be asked for again. KENSA_ variables do not count: imports read none.
    """
    environment = {**os.environ, **variables}
    environment.pop("PYTEST_CURRENT_TEST", None)
    usual = {name: value for name, value in environment.items() if not name.startswith("KENSA_")}
    key = frozenset(usual.items())
    if key not in _parents and _parents:
        _parents[key] = None
        return None
    if (parent := _parents.get(key)) is None:
        parent = _parents[key] = Parent(usual)
    return parent.begin(environment, log)


def end_all() -> None:
    for parent in _parents.values():
        if parent is not None:
            parent.end()
    _parents.clear()


# ---- in the process that is forked --------------------------------------------------------------


def prepare() -> None:
    """What `app.__main__` does before a server has its settings."""
    from engines.machine.memory import keep_together

    keep_together()
    for name in IMPORTED:
        importlib.import_module(name)
    (only,) = Path("/proc/self/task").iterdir()  # other threads would not be there after a fork
    assert only.name == str(os.getpid())


def fork_as_asked(answers: int) -> None:
    """Returns in each child that is to be a server; the parent ends with whoever asks."""
    heard, wakeup = os.pipe()
    for end in (heard, wakeup):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    read = b""
    while True:
        ready = select.select([0, heard], [], [])[0]
        if heard in ready:
            os.read(heard, 65536)
            _tell_who_ended(answers)
        if 0 in ready:
            more = os.read(0, 1 << 20)
            if not more:
                os._exit(0)
            *lines, read = (read + more).split(b"\n")
            for line in lines:
                if (pid := os.fork()) == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    for end in (answers, heard, wakeup):
                        os.close(end)
                    _become_server(**json.loads(line))
                    return
                os.write(answers, f"begun {pid}\n".encode())


def _tell_who_ended(answers: int) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        code = os.waitstatus_to_exitcode(status)
        os.write(answers, f"ended {pid} {code}\n".encode())


def _become_server(environment: dict[str, str], log: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (2, log, os.O_WRONLY | os.O_APPEND | os.O_CREAT),
    ):
        opened = os.open(path, flags)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.argv = ["kensa"]


if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # as `python -m app` has it, begun there
    prepare()
    fork_as_asked(int(sys.argv[1]))
    from app.__main__ import main

    main()
