"""Processes around a queue: its worker with a cheap child, who asks for jobs, who locks. A script:

    queued.py worker DATA [SETTING=VALUE ...]   workers.jobs, with constants of it set otherwise
    queued.py child DATA JOB KIND               what that worker starts instead of a job
    queued.py submit DATA WHO COUNT             submits until COUNT of its jobs are in accepted.txt
    queued.py race DATA                         submits a job for each model that stdin names
    queued.py lock DATA SEED LONGEST_S          locks the database again and again

What a job does stands in its `meta`: seconds (before it publishes), lingers (so many seconds after
that, in its first attempt), dies (by SIGKILL, in its first so many attempts), fills (the disk),
family (starts a process of its own).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import math
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.extend(str(Path(__file__).resolve().parents[n]) for n in (2, 1))

if TYPE_CHECKING:
    from app.jobs.job_queue import JobQueue
    from engines.queue.job_requests import RetrainRequest

LEDGER = "ledger.txt"  # what children did: begun, published or met, and the job
ACCEPTED = "accepted.txt"  # whose submit returned, and the job
HELD = "held"  # there while the database is locked
CLOCK = "clock"  # seconds that the worker's clock is ahead


def opened(data: Path) -> JobQueue:
    from app.jobs.job_queue import JobQueue
    from engines.store.versions import Store

    jobs = JobQueue(data, Store(data / "models"))
    jobs.open()
    assert jobs.problem is None, jobs.problem
    return jobs


def asked(model: str, *, queue: bool = False, **what: Any) -> RetrainRequest:
    """A request whose job does `what`."""
    from engines.queue.job_requests import RetrainRequest

    content = {"model": model, "category": "any", "meta": what, "queue": queue}
    return RetrainRequest.model_validate(content)


def note(path: Path, *words: str) -> None:
    """One line in one write: lines of several processes never mix."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(descriptor, (" ".join(words) + "\n").encode())
    os.close(descriptor)


def noted(path: Path) -> list[list[str]]:
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def work(data: Path, *settings: str) -> int:
    """The real worker; its children, the clock and what `settings` name are the test's."""
    from workers.jobs import attempts
    from workers.jobs import single_worker as worker
    from workers.jobs.__main__ import main as run_worker

    attempts.CHILD[:] = [sys.executable, __file__, "child"]
    worker.POLL_S = 0.1
    system, _, *rest = os.uname()
    here = os.uname_result((system, f"host{os.getpid()}", *rest))
    os.uname = lambda: here  # another name at each start, as a container has
    for setting in settings:
        name, value = setting.split("=")
        setattr(worker, name, float(value))
    true_time = time.time

    def shifted() -> float:
        ahead = data / CLOCK
        return true_time() + (float(ahead.read_text()) if ahead.exists() else 0.0)

    time.time = shifted
    return run_worker(["--data_dir", str(data)])


def child(data: Path, job_id: str) -> int:
    """As workers.jobs.job_process: publishes once, then says how it ended. Quick to import."""
    folder = data / "jobs" / job_id
    attempt = json.loads((folder / "attempts.json").read_text())["attempts"]
    wanted: dict[str, Any] = json.loads(sys.stdin.read()).get("meta", {})
    note(data / LEDGER, "begun", job_id, str(os.getpid()))
    with (data / "alone").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            note(data / LEDGER, "met", job_id)
            return 1
        if ["published", job_id] not in noted(data / LEDGER):
            (folder / "work").mkdir(parents=True)
            if wanted.get("family"):
                subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            if attempt <= wanted.get("dies", 0):
                os.kill(os.getpid(), signal.SIGKILL)
            if wanted.get("fills") and not fill(folder / "work" / "model"):
                return errno.ENOSPC
            time.sleep(wanted.get("seconds", 0.1))
            note(data / LEDGER, "published", job_id)
        time.sleep(wanted.get("lingers", 0.05) if attempt == 1 else 0.0)
        (folder / ".result").write_text(json.dumps({"state": "succeeded"}))
        (folder / ".result").replace(folder / "result.json")
    return 0


def fill(path: Path) -> bool:
    """Whether 1 GiB fits."""
    try:
        with path.open("wb") as file:
            for _ in range(1024):
                file.write(bytes(1 << 20))
    except OSError:
        return False
    return True


def submit(data: Path, who: str, count: int) -> int:
    jobs = opened(data)
    done = sum(line[0] == who for line in noted(data / ACCEPTED))
    for number in range(done, count):
        # The second of a killed pair is a model of its own: the first one's job may be there.
        name = f"{who}-{number}-{os.getpid()}"
        job = jobs.submit("retrain", asked(name, seconds=random.uniform(0.05, 0.4)))
        note(data / ACCEPTED, who, job["id"])
    jobs.close()
    return 0


def race(data: Path) -> int:
    from engines.errors import Conflict

    jobs = opened(data)
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            answer = f"accepted {jobs.submit('retrain', asked(line.strip()))['id']}"
        except Conflict as error:
            answer = f"refused {error}"
        print(answer, flush=True)
    jobs.close()
    return 0


def lock(data: Path, seed: int, longest_s: float) -> int:
    """BEGIN EXCLUSIVE for 0.05 s to `longest_s`, half of the time, with writes that never count."""
    chance = random.Random(seed)
    with closing(
        sqlite3.connect(data / "jobs.sqlite", timeout=600, isolation_level=None)
    ) as database:
        while True:
            database.execute("BEGIN EXCLUSIVE")
            database.execute("CREATE TABLE torn (what BLOB)")
            database.execute("INSERT INTO torn VALUES (randomblob(?))", [4 << 20])
            (data / HELD).touch()
            held = math.exp(chance.uniform(math.log(0.05), math.log(longest_s)))
            time.sleep(held)
            (data / HELD).unlink(missing_ok=True)
            database.execute("ROLLBACK")
            time.sleep(held * chance.uniform(0.5, 1.5))


def die_with_parent() -> None:
    """As workers.jobs does it."""
    parent = int(os.environ.get("KENSA_PARENT", os.getppid()))
    ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))
    if os.getppid() != parent:
        os._exit(2)


def main(what: str, data: str, *rest: str) -> int:
    folder = Path(data)
    die_with_parent()
    if what == "worker":
        return work(folder, *rest)
    if what == "child":
        return child(folder, rest[0])
    if what == "submit":
        return submit(folder, rest[0], int(rest[1]))
    if what == "race":
        return race(folder)
    return lock(folder, int(rest[0]), float(rest[1]))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
