"""A fleet on one machine: a real PostgreSQL, workers with a data folder each, a network to cut.

As a script:

    fleet.py worker DATA [MODULE.SETTING=VALUE ...]   workers.jobs, with constants set otherwise
    fleet.py cheap DATA [MODULE.SETTING=VALUE ...]    the same, with children that only pretend
    fleet.py child DATA JOB KIND                      such a child

What a cheap job does stands in its `meta`: seconds (that learning takes), finishing (seconds that
converting takes), dies (by SIGKILL, so often). What children did stands in $LEDGER, in lines.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

sys.path.extend(str(Path(__file__).resolve().parents[n]) for n in (2, 1))

from support.project import ROOT

PASSWORD = "s3cr3t-pa55w0rd"
# Everything ten times as fast; that GIVE_UP_S < DEAD_S stays.
QUICK = ["single_worker.POLL_S=0.1", "single_worker.WATCH_EVERY_S=0.3",
         "parent_and_child.LOOK_EVERY_S=0.1", "exchange.RELAY_EVERY_S=0.2",
         "lease.BEAT_S=0.2", "lease.SILENT_S=1", "lease.GIVE_UP_S=2", "lease.DEAD_S=3"]  # fmt: skip


class Postgres:
    """A PostgreSQL of Debian's package `postgresql`, in a folder of its own."""

    def __init__(self, folder: Path, bin_folder: Path) -> None:
        self.folder, self._bin = folder, bin_folder
        self._as: dict[str, Any] = {}
        if os.geteuid() == 0:  # as which it refuses to run
            nobody = pwd.getpwnam("nobody")
            os.chown(folder, nobody.pw_uid, nobody.pw_gid)
            self._as = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        words = folder / "password"
        words.write_text(PASSWORD)
        words.chmod(0o644)
        self._run("initdb", "-D", folder / "data", "-U", "kensa", "--auth=scram-sha-256",
                  f"--pwfile={words}", "--no-sync", "--locale=C", "-E", "UTF8")  # fmt: skip
        self.start()
        with psycopg.connect(self.url(database="postgres"), autocommit=True) as admin:
            admin.execute("CREATE DATABASE kensa")

    def url(self, port: int | None = None, database: str = "kensa") -> str:
        return f"postgresql://kensa:{PASSWORD}@127.0.0.1:{port or self.port}/{database}"

    def start(self) -> None:
        options = (
            f"-p {self.port} -k '' -c listen_addresses=127.0.0.1 -c fsync=off"
            " -c full_page_writes=off -c synchronous_commit=off"
        )
        self._run("pg_ctl", "-D", self.folder / "data", "-l", self.folder / "log", "-w",
                  "-o", options, "start")  # fmt: skip

    def stop(self, how: str = "fast") -> None:
        self._run("pg_ctl", "-D", self.folder / "data", "-m", how, "-w", "stop")

    def ask(self, statement: str, *values: Any) -> list[Any]:
        with psycopg.connect(self.url(), autocommit=True) as connection:
            found = connection.execute(statement, values)  # type: ignore[arg-type]
            return found.fetchall() if found.description else []

    def _run(self, command: str, *words: str | Path) -> None:
        done = subprocess.run(
            [self._bin / command, *words], **self._as,
            cwd="/", stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr.decode()


def bin_folder() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    where = shutil.which("initdb") or (str(found[-1]) if found else None)
    return Path(where).parent if where else None


@contextlib.contextmanager
def running_postgres() -> Iterator[Postgres]:
    """Skips where it is not installed."""
    where = bin_folder()
    if where is None:
        pytest.skip("needs PostgreSQL: Debian's package postgresql")
    # Not in pytest's folder, which only this user may enter.
    with tempfile.TemporaryDirectory(prefix="kensa-postgres-") as folder:
        Path(folder).chmod(0o755)
        inner = Path(folder) / "postgres"
        inner.mkdir()
        database = Postgres(inner, where)
        try:
            yield database
        finally:
            with contextlib.suppress(AssertionError):
                database.stop("immediate")


class Network:
    """A TCP proxy before PostgreSQL: a cable that can be pulled out, and put in again."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._is_cut = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Nothing arrives any more, and no connection is closed: nobody is told."""
        self._is_cut.set()

    def mend(self) -> None:
        self._is_cut.clear()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(("127.0.0.1", self._to))
                except OSError:
                    client.close()
                    continue
                for one, other in ((client, server), (server, client)):
                    threading.Thread(target=self._pass, args=[one, other], daemon=True).start()

    def _pass(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                while self._is_cut.is_set():
                    time.sleep(0.05)
                other.sendall(data)
        for end in (one, other):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class Machine:
    """A machine of a fleet: its data folder, its variables, its worker."""

    def __init__(self, folder: Path, name: str, queue_url: str, shared: Path | str) -> None:
        self.folder, self.name = folder, name
        self.data = folder / "data"
        self.data.mkdir(parents=True, exist_ok=True)
        self.variables = {
            "KENSA_QUEUE_URL": queue_url,
            "KENSA_SHARED_URL": str(shared),
            "KENSA_DEVICE": name,
        }
        self.worker: subprocess.Popen[bytes] | None = None
        self.log = folder / "worker.log"

    def start(self, *command: object, **variables: str) -> None:
        """The worker, as `python -m workers.jobs`, or another command."""
        words = [*command] or ["-m", "workers.jobs", "--data_dir", self.data]
        plain = {name: value for name, value in os.environ.items() if name[:6] != "KENSA_"}
        with self.log.open("ab") as log:
            self.worker = subprocess.Popen(
                [sys.executable, *map(str, words)], cwd=ROOT, stderr=log,
                env={**plain, **self.variables, **variables},
            )  # fmt: skip

    def start_quick(self, ledger: Path | None = None, **variables: str) -> None:
        """The same worker, in a hurry; with a ledger, its jobs only pretend."""
        what = "worker" if ledger is None else "cheap"
        variables |= {} if ledger is None else {"LEDGER": str(ledger)}
        self.start(__file__, what, self.data, *QUICK, **variables)

    def kill(self) -> None:
        if self.worker is not None:
            self.worker.kill()
            self.worker.wait()

    def says(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


def note(*words: str) -> None:
    """One line in one write: lines of several processes never mix."""
    descriptor = os.open(os.environ["LEDGER"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(descriptor, (" ".join(words) + "\n").encode())
    os.close(descriptor)


def noted(ledger: Path) -> list[list[str]]:
    return [line.split() for line in ledger.read_text().splitlines()] if ledger.exists() else []


def work(is_cheap: bool, data: Path, *settings: str) -> int:
    from workers.jobs import attempts
    from workers.jobs.__main__ import main as run_worker

    if is_cheap:
        attempts.CHILD[:] = [sys.executable, __file__, "child"]
    for setting in settings:
        name, value = setting.split("=")
        module, constant = name.split(".")
        setattr(importlib.import_module(f"workers.jobs.{module}"), constant, float(value))
    return run_worker(["--data_dir", str(data)])


def child(data: Path, job_id: str, kind: str) -> int:
    """As workers.jobs.job_process, but quick to import. A job may be at work at one place only."""
    from support.queued import die_with_parent

    die_with_parent()
    asked = json.loads(sys.stdin.read())
    what = (asked.get("retrain") or asked)["meta"]
    folder, ledger = data / "jobs" / job_id, Path(os.environ["LEDGER"])
    folder.mkdir(parents=True, exist_ok=True)
    begun = sum(line[:3] == ["begun", kind, job_id] for line in noted(ledger))
    note("begun", kind, job_id, os.environ["KENSA_DEVICE"], str(os.getpid()))
    ended = {"state": "succeeded", "trained": None}
    with (ledger.parent / f"{job_id}.alone").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            note("met", kind, job_id)
        if kind == "train":
            (folder / "log.txt").write_text(f"attempt {begun + 1}\n")
            if begun < what.get("dies", 0):
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(what.get("seconds", 0.1))
            note("learned", kind, job_id, os.environ["KENSA_DEVICE"])
        else:
            if ["published", job_id] not in noted(ledger):
                time.sleep(what.get("finishing", 0.1))
                note("published", job_id)
            ended = {"state": "succeeded"}
        (folder / ".result").write_text(json.dumps(ended))
        (folder / ".result").replace(folder / "result.json")
    return 0


if __name__ == "__main__":
    if sys.argv[1] != "child":
        sys.exit(work(sys.argv[1] == "cheap", Path(sys.argv[2]), *sys.argv[3:]))
    sys.exit(child(Path(sys.argv[2]), sys.argv[3], sys.argv[4]))
