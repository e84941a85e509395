"""Claims about the queue: real jobs, worker and database; only what a job does is cheap.

How the processes around it behave stands in queued.py.
"""

from __future__ import annotations

import fcntl
import math
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from app.jobs import job_queue as app_jobs
from app.routes.jobs import ScheduleRequest
from engines.errors import BadRequest, Conflict, DiskFull, NoWorker, UnknownJob
from engines.queue.job_folder import JobFolder
from engines.queue.protocol import DATABASE, PARENT
from engines.queue.schedules import last_due
from engines.store.versions import Store
from support.project import ROOT
from support.queued import ACCEPTED, CLOCK, HELD, LEDGER, asked, fill, noted, opened
from support.waiting import alive, until
from workers.jobs.attempts import ATTEMPTS

TEN_YEARS_S = 315_576_000
ENDED = {"succeeded", "failed", "cancelled", "interrupted"}


class Line:
    """A data folder with its queue, and the worker that is killed and started again."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.jobs = opened(data)
        self.worker: subprocess.Popen[bytes] | None = None
        self._from = 0  # what was said before, in characters

    def submit(self, model: str = "bracket", *, queue: bool = False, **what: Any) -> str:
        return str(self.jobs.submit("retrain", asked(model, queue=queue, **what))["id"])

    def start(self, *settings: str) -> subprocess.Popen[bytes]:
        self._from = len(self.log())
        self.worker = script("worker", self.data, *settings)
        return self.worker

    def log(self) -> str:
        path = Path(f"{self.data}.log")
        return path.read_text() if path.exists() else ""

    def says(self, what: str) -> None:
        """Wait until the worker, or another script, says something."""
        until(lambda: what in self.log()[self._from :], f"it does not say {what!r}")

    def kill(self) -> None:
        if self.worker is not None:
            self.worker.kill()
            self.worker.wait()

    def state(self, job_id: str) -> str:
        return str(self.jobs.get(job_id)["state"])

    def ended(self, job_id: str) -> dict[str, Any]:
        until(lambda: self.state(job_id) in ENDED, f"{job_id} has not ended")
        return self.jobs.get(job_id)

    def begun(self, job_id: str) -> list[int]:
        """The process of each attempt."""
        lines = noted(self.data / LEDGER)
        return [int(line[2]) for line in lines if line[:2] == ["begun", job_id]]

    def published(self, job_id: str) -> int:
        return noted(self.data / LEDGER).count(["published", job_id])

    def sql(self, statement: str, *values: object) -> None:
        with closing(sqlite3.connect(self.data / DATABASE, timeout=30)) as database, database:
            database.execute(statement, values)

    @contextmanager
    def locked(self) -> Iterator[None]:
        with closing(sqlite3.connect(self.data / DATABASE, isolation_level=None)) as database:
            database.execute("BEGIN EXCLUSIVE")
            yield
            database.execute("ROLLBACK")


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line]:
    line = Line(tmp_path)
    yield line
    line.kill()
    line.jobs.close()


def script(*words: object, **pipes: Any) -> subprocess.Popen[bytes]:
    """A process of queued.py; what it says stands in a file beside the data."""
    command = [sys.executable, ROOT / "tests" / "support" / "queued.py", *words]
    with Path(f"{words[1]}.log").open("ab") as log:
        return subprocess.Popen(list(map(str, command)), stderr=log, **pipes)


def family(leader: int) -> list[int]:
    """The processes of a process group."""

    def belongs(process: int) -> bool:
        try:
            return os.getpgid(process) == leader and alive(process)
        except ProcessLookupError:
            return False

    return [int(path.name) for path in Path("/proc").glob("[0-9]*") if belongs(int(path.name))]


# The torture


@pytest.mark.parametrize(
    ("count", "longest_lock_s"),
    [
        pytest.param(16, 1.5, id="16 jobs"),
        pytest.param(200, 6.0, id="200 jobs", marks=pytest.mark.soak),
    ],
)
def test_locks_and_kills_lose_no_job_and_let_none_run_twice_to_the_end(
    tmp_path: Path, count: int, longest_lock_s: float
) -> None:
    figures = torture(tmp_path / "data", count, longest_lock_s)
    print(figures)
    assert figures["accepted"] == count
    assert figures["lost"] == figures["stuck"] == figures["in error"] == 0
    assert figures["published twice"] == figures["children that met"] == 0
    assert figures["interrupted before 3 attempts"] == 0
    assert figures["succeeded"] + figures["interrupted"] == figures["jobs"] >= count
    assert figures["left behind"] == 0
    assert figures["kills of the worker"] >= count // 12
    assert figures["kills of a lock's holder"] >= count // 12


def torture(data: Path, count: int, longest_lock_s: float) -> dict[str, int]:
    """4 processes submit, one locks, one works; all are killed at random and started again."""
    chance, kills = random.Random(0), Counter[str]()
    line, began = Line(data), time.monotonic()
    who = [f"press{number}" for number in range(4)]
    makers: dict[str, Callable[[], subprocess.Popen[bytes]]] = {
        name: lambda name=name: script("submit", data, name, count // 4) for name in who
    } | {
        "lock": lambda: script("lock", data, chance.randrange(1 << 30), longest_lock_s),
        "worker": lambda: script("worker", data),
    }
    running = {name: make() for name, make in makers.items()}
    due = {name: began + patience(name, chance) for name in running}
    known = 0  # lines of the ledger when the worker was last killed
    while (busy := busy_with(line, who, running)) and time.monotonic() < began + 60 + 10 * count:
        time.sleep(0.05)
        if due["worker"] == math.inf and len(noted(data / LEDGER)) > known:
            due["worker"] = time.monotonic() + chance.uniform(0, 4)
        for name, process in running.items():
            if name in who and process.poll() == 0:
                continue
            if process.poll() is None and time.monotonic() > due[name]:
                if name == "lock" and not (line.data / HELD).exists():
                    continue  # it is to die while it holds the lock
                kill(line, name, process, kills, chance)
                known = len(noted(data / LEDGER))
                due[name] = time.monotonic() + patience(name, chance)
            if process.poll() is not None:
                if process.returncode != -signal.SIGKILL:
                    kills[f"{name} ended by itself"] += 1
                running[name] = makers[name]()
    for process in running.values():
        process.kill()
        process.wait()
    took = time.monotonic() - began
    figures = counted(line, who, kills) | {"stuck": busy, "seconds": round(took)}
    line.jobs.close()
    return figures


def patience(name: str, chance: random.Random) -> float:
    """Seconds from a process's start to its kill; infinite for a worker until it has a job."""
    if name == "worker":
        return chance.uniform(0, 2) if chance.random() < 0.2 else math.inf
    # A submitter that always had the same few seconds would never get started on a busy machine.
    return 0.3 + chance.uniform(0, 4) if name == "lock" else 2.0 + chance.expovariate(1 / 3)


def busy_with(line: Line, who: list[str], running: dict[str, subprocess.Popen[bytes]]) -> int:
    """How many processes still submit, and when none does, how many jobs have not ended."""
    submitting = sum(running[name].poll() != 0 for name in who)
    return submitting or len(line.jobs.active())


def kill(
    line: Line,
    name: str,
    process: subprocess.Popen[bytes],
    kills: Counter[str],
    chance: random.Random,
) -> None:
    """Kill a process; worker and child in turns, and neither in a job's last attempt."""
    if name == "worker":
        active = [JobFolder(line.data, job["id"]) for job in line.jobs.active()]
        if any(folder.attempts() >= ATTEMPTS for folder in active):
            return
        last = (noted(line.data / LEDGER) or [[""]])[-1]
        in_turn = kills["kills of a child"] < kills["kills of the worker"]
        if last[0] == "begun" and alive(int(last[2])) and in_turn:
            os.kill(int(last[2]), signal.SIGKILL)
            kills["kills of a child"] += 1
            return
        kills["kills of the worker"] += 1
    elif name == "lock":
        kills["kills of a lock's holder"] += 1
    else:
        kills["kills of a submitter"] += 1
    process.kill()
    process.wait()
    if name == "lock":
        (line.data / HELD).unlink(missing_ok=True)


def counted(line: Line, who: list[str], kills: Counter[str]) -> dict[str, int]:
    found = {job["id"]: job for job in line.jobs.newest(10_000)}
    accepted = [job for _, job in noted(line.data / ACCEPTED)]
    ledger = noted(line.data / LEDGER)
    published = Counter(words[1] for words in ledger if words[0] == "published")
    begun = Counter(words[1] for words in ledger if words[0] == "begun")
    states = Counter(job["state"] for job in found.values())
    interrupted = [job for job in found if found[job]["state"] == "interrupted"]
    with closing(sqlite3.connect(line.data / DATABASE)) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        errors = "SELECT count(*) FROM workflow_status WHERE status NOT IN ('SUCCESS', 'CANCELLED')"
        in_error = database.execute(errors).fetchone()[0]
    succeeded = [job for job in found if found[job]["state"] == "succeeded"]
    return dict(kills) | {
        "jobs": len(found),
        "accepted": len(set(accepted)),
        "kills of the worker": kills["kills of the worker"],
        "kills of a lock's holder": kills["kills of a lock's holder"],
        "lost": len(set(accepted) - set(found)) + sum(not published[job] for job in succeeded),
        "in error": in_error + states["failed"],
        "succeeded": states["succeeded"],
        "interrupted": states["interrupted"],
        "interrupted before 3 attempts": sum(
            found[job]["attempts"] != ATTEMPTS for job in interrupted
        ),
        "published twice": sum(times > 1 for times in published.values()),
        "begun more than once": sum(times > 1 for times in begun.values()),
        "children that met": sum(words[0] == "met" for words in ledger),
        "left behind": len(list(line.data.glob("jobs/*/work")))
        + sum(alive(int(words[2])) for words in ledger if words[0] == "begun"),
    }


# Deaths


def test_a_job_whose_process_dies_three_times_is_interrupted_and_says_why(line: Line) -> None:
    job = line.submit(dies=9)
    line.start()
    ended = line.ended(job)
    assert ended["state"] == ended["code"] == "interrupted"
    assert ended["error"] == (
        "It was begun 3 times, and each time its process ended with SIGKILL (was memory short?)."
    )
    assert ended["attempts"] == len(line.begun(job)) == 3
    assert not JobFolder(line.data, job).work.exists()


def test_a_job_whose_process_dies_twice_ends_well(line: Line) -> None:
    job = line.submit(dies=2)
    line.start()
    assert line.ended(job)["state"] == "succeeded"
    assert line.jobs.get(job)["attempts"] == len(line.begun(job)) == 3


def test_a_job_whose_worker_dies_is_run_again_and_its_process_dies_with_the_worker(
    line: Line,
) -> None:
    job = line.submit(seconds=2)
    line.start()
    until(lambda: line.begun(job), "it was not begun")
    line.kill()
    until(lambda: not alive(line.begun(job)[0]), "the job's process outlives its worker")
    assert line.state(job) == "running"
    line.start()
    ended = line.ended(job)
    assert (ended["state"], ended["attempts"], line.published(job)) == ("succeeded", 2, 1)


def test_a_job_whose_worker_dies_three_times_is_interrupted(line: Line) -> None:
    job = line.submit(seconds=60)
    for attempt in range(3):
        line.start()
        until(lambda: len(line.begun(job)) > attempt, "it was not begun")  # noqa: B023
        line.kill()
    line.start()
    ended = line.ended(job)
    assert (ended["state"], ended["attempts"], len(line.begun(job))) == ("interrupted", 3, 3)
    assert ended["error"] == (
        "It was begun 3 times, and each time its worker or the machine stopped."
    )


def test_a_job_that_is_killed_after_publishing_does_not_publish_again(line: Line) -> None:
    job = line.submit(lingers=60)
    line.start()
    until(lambda: line.published(job), "it did not publish")
    line.kill()
    line.start()
    assert line.ended(job)["state"] == "succeeded"
    assert (len(line.begun(job)), line.published(job)) == (2, 1)


def test_a_job_that_is_killed_after_publishing_in_its_last_attempt_has_succeeded(
    line: Line,
) -> None:
    job = line.submit(dies=3)
    made = line.data / "made"
    made.mkdir()
    (made / "model.onnx").write_bytes(b"any")
    version = Store(line.data / "models").publish("bracket", made, {"job": job})
    line.start()
    ended = line.ended(job)
    assert (ended["state"], ended["version"], ended["attempts"]) == ("succeeded", version, 3)


def test_a_worker_killed_between_a_jobs_end_and_its_record_does_not_run_it_again(
    line: Line,
) -> None:
    job = line.submit(seconds=1)
    line.start()
    until(lambda: line.begun(job), "it was not begun")
    with line.locked():
        until(lambda: JobFolder(line.data, job).result(), "it did not end")
        time.sleep(1)  # the worker tries to record it
        line.kill()
    assert line.state(job) == "running"
    line.start()
    assert line.ended(job)["state"] == "succeeded"
    assert len(line.begun(job)) == 1


def test_waiting_through_many_restarts_costs_no_attempt(line: Line) -> None:
    """DBOS counts how often it handed a job out, and by itself gives up after 100 times."""
    job = line.submit()
    line.sql("UPDATE workflow_status SET recovery_attempts = 150")
    for _ in range(3):
        line.start("POLL_S=1000")
        line.says("Waiting for jobs")
        line.kill()
    line.sql("UPDATE queues SET polling_interval_sec = 0.1")
    line.start()
    ended = line.ended(job)
    assert (ended["state"], ended["attempts"]) == ("succeeded", 1)


def test_a_job_that_the_queue_calls_running_and_nobody_attends_is_taken_up(line: Line) -> None:
    """As after a full disk, when the end of a job could not be written."""
    job = line.submit()
    line.start("POLL_S=1000", "WATCH_EVERY_S=0.1", "LOST_S=0.5")
    line.says("Waiting for jobs")
    line.sql("UPDATE workflow_status SET status = 'PENDING', executor_id = 'worker'")
    assert line.worker is not None
    assert line.worker.wait(60) != 0
    line.sql("UPDATE queues SET polling_interval_sec = 0.1")
    line.start()
    assert line.ended(job)["state"] == "succeeded"


def test_a_process_whose_parent_died_before_it_looked_ends_itself() -> None:
    program = (
        "from workers.jobs.parent_and_child import die_with_parent\n"
        "die_with_parent(); print('lives')"
    )
    for parent, lives in ((os.getpid(), True), (2**22 + 1, False)):
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={**os.environ, PARENT: str(parent)},
            capture_output=True,
        )
        assert (b"lives" in done.stdout) is lives


def test_a_job_waits_for_the_process_that_a_dead_worker_left(line: Line) -> None:
    """One that the system cannot end yet, such as in the middle of a write to a broken disk."""
    first, second = line.submit("bracket"), line.submit("bolt")
    with (line.data / "job.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        line.start()
        until(lambda: line.state(first) == "running", "it was not taken")
        line.jobs.cancel(first)
        until(lambda: line.state(second) == "running", "the first one holds it up")
        time.sleep(1)
        assert not noted(line.data / LEDGER)
    assert line.ended(second)["state"] == "succeeded"
    assert not line.begun(first)


# One worker


def test_a_second_worker_on_the_same_folder_ends_and_the_first_goes_on(line: Line) -> None:
    line.start()
    line.says("Waiting for jobs")
    assert script("worker", line.data).wait(60) == 2
    line.says("Another worker has")
    assert line.ended(line.submit())["state"] == "succeeded"


def test_jobs_from_before_the_first_worker_are_run_in_the_order_in_which_they_came(
    line: Line,
) -> None:
    """Also where the clock was set back by ten years in between."""
    jobs = [line.submit(queue=True) for _ in range(2)]
    line.sql("UPDATE workflow_status SET created_at = created_at + ?", TEN_YEARS_S * 1000)
    jobs += [line.submit(queue=True) for _ in range(2)]
    line.start()
    for job in jobs:
        assert line.ended(job)["state"] == "succeeded"
    ledger = noted(line.data / LEDGER)
    assert [words[1] for words in ledger if words[0] == "begun"] == jobs
    assert not [words for words in ledger if words[0] == "met"]


def test_a_worker_whose_queue_was_put_aside_ends(line: Line) -> None:
    worker = line.start("WATCH_EVERY_S=0.1")
    line.says("Waiting for jobs")
    line.jobs.close()
    (line.data / DATABASE).rename(line.data / "aside")
    assert worker.wait(60) != 0
    line.says("The queue was put aside")


# Cancelling


def test_a_job_is_cancelled_while_it_waits(line: Line) -> None:
    running, waiting = line.submit(seconds=1), line.submit(queue=True)
    line.start()
    until(lambda: line.begun(running), "it was not begun")
    assert line.jobs.cancel(waiting)["state"] == "cancelled"
    assert line.ended(running)["state"] == "succeeded"
    assert line.ended(line.submit("bolt"))["state"] == "succeeded"
    assert not line.begun(waiting)


def test_a_job_is_cancelled_while_it_runs_and_leaves_nothing_behind(line: Line) -> None:
    job = line.submit(seconds=60, family=True)
    line.start()
    until(lambda: line.begun(job) and len(family(line.begun(job)[0])) == 2, "it has no child")
    assert line.jobs.cancel(job)["state"] == "cancelled"
    until(lambda: not family(line.begun(job)[0]), "a process is left")
    until(lambda: not JobFolder(line.data, job).work.exists(), "its work is left")
    after = line.ended(line.submit())
    assert after["state"] == "succeeded"
    assert (line.state(job), line.published(job)) == ("cancelled", 0)


def test_a_job_is_cancelled_while_no_worker_is_there(line: Line) -> None:
    job = line.submit(seconds=60)
    line.start()
    until(lambda: JobFolder(line.data, job).work.exists(), "it was not begun")
    line.kill()
    line.jobs.cancel(job)
    line.start()
    until(lambda: not JobFolder(line.data, job).work.exists(), "its work is left")
    assert line.ended(line.submit())["state"] == "succeeded"
    assert (line.state(job), len(line.begun(job))) == ("cancelled", 1)


def test_the_child_of_a_jobs_process_ends_with_it(line: Line) -> None:
    job = line.submit(dies=3, family=True)
    line.start()
    line.ended(job)
    assert not [process for leader in line.begun(job) for process in family(leader)]


def test_a_job_that_has_ended_cannot_be_cancelled(line: Line) -> None:
    cancelled = line.submit()
    line.jobs.cancel(cancelled)
    with pytest.raises(Conflict, match=r"has ended \(cancelled\)"):
        line.jobs.cancel(cancelled)
    done = line.submit()
    line.start()
    line.ended(done)
    with pytest.raises(Conflict, match=r"has ended \(succeeded\)"):
        line.jobs.cancel(done)
    with pytest.raises(UnknownJob):
        line.jobs.cancel("retrain-000000000000")


# A second job


def test_a_second_job_for_a_model_is_refused_and_names_the_first(line: Line) -> None:
    first = line.submit()
    with pytest.raises(Conflict, match=f"{first} \\(queued\\)"):
        line.submit()
    line.submit("bolt")
    line.jobs.cancel(first)
    second = line.submit()
    with pytest.raises(Conflict, match=second):
        line.submit()
    line.start()
    line.ended(second)
    assert line.ended(line.submit())["state"] == "succeeded"


def test_of_two_that_ask_at_once_for_a_model_one_is_accepted(line: Line) -> None:
    askers = [
        script("race", line.data, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)
    ]
    for asker in askers:
        assert asker.stdout is not None
        assert asker.stdout.readline() == b"ready\n"
    for number in range(20):
        for asker in askers:
            assert asker.stdin is not None
            asker.stdin.write(f"model{number}\n".encode())
            asker.stdin.flush()
    answers = [asker.communicate(timeout=30)[0].decode().splitlines() for asker in askers]
    for one, other in zip(*answers, strict=True):
        accepted, refused = sorted([one, other])
        assert accepted.startswith("accepted")
        assert f"a job already, {accepted.split()[1]}" in refused
    assert len(line.jobs.active()) == 20


# The database


def test_a_locked_database_delays_a_job_and_hides_none(line: Line) -> None:
    before = line.submit("bolt")
    locker = script("lock", line.data, 0, 600)
    until((line.data / HELD).exists, "it was not locked")
    with ThreadPoolExecutor() as threads:
        asked, submitted = threads.submit(line.state, before), threads.submit(line.submit)
        assert asked.result(20) == "queued", "who only reads waits for the lock"  # SQLite for 30
        assert (line.data / HELD).exists()
        locker.kill()
        locker.wait()
        job = submitted.result(60)
    line.start()
    assert line.ended(job)["state"] == line.ended(before)["state"] == "succeeded"


@pytest.mark.soak
def test_a_database_locked_for_longer_than_anybody_waits_delays_a_job(line: Line) -> None:
    """SQLite is told to wait for 30 s."""
    job = line.submit(seconds=1)
    line.start()
    until(lambda: line.begun(job), "it was not begun")
    late = app_jobs.JobQueue(line.data, Store(line.data / "models"))
    with ThreadPoolExecutor() as threads, line.locked():
        submitted = threads.submit(line.submit, "bolt")
        opening = threads.submit(late.open)
        time.sleep(40)
        assert not submitted.done()
        assert line.state(job) == "running"
        line_free = time.monotonic()
    submitted.result(60)
    opening.result(60)
    assert late.problem is None
    assert line.ended(job)["state"] == "succeeded"
    assert line.ended(submitted.result())["state"] == "succeeded"
    print(f"submit returned {time.monotonic() - line_free:.1f} s after the lock")
    late.close()


def garbage(database: Path) -> None:
    database.write_bytes(b"The quick brown fox jumps over the lazy dog." * 200)


def truncated(database: Path) -> None:
    os.truncate(database, database.stat().st_size * 2 // 3)


def nothing(database: Path) -> None:
    os.truncate(database, 0)


def torn_page(database: Path) -> None:
    with database.open("r+b") as file:
        file.seek(4096 * 3)
        file.write(os.urandom(4096 * 8))


def garbage_in_the_log(database: Path) -> None:
    with closing(sqlite3.connect(database)) as whole:  # what was closed may not yet be
        whole.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    Path(f"{database}-wal").write_bytes(os.urandom(100_000))


@pytest.mark.parametrize(
    ("damage", "is_put_aside"),
    [
        (garbage, True),
        (truncated, True),
        (torn_page, True),
        (nothing, False),
        (garbage_in_the_log, False),
    ],
)
def test_a_damaged_queue_is_put_aside_and_a_new_one_works(
    line: Line, damage: Callable[[Path], None], is_put_aside: bool
) -> None:
    job = line.submit()
    line.jobs.close()
    damage(line.data / DATABASE)
    line.jobs = opened(line.data)
    assert bool(list(line.data.glob(f"{DATABASE}.damaged-*"))) is is_put_aside
    if damage is garbage_in_the_log:
        assert line.state(job) == "queued"
        line.jobs.cancel(job)
    line.start()
    assert line.ended(line.submit())["state"] == "succeeded"


def test_a_queue_that_cannot_be_read_now_is_not_put_aside(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(*_: object, **__: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    job = line.submit()
    monkeypatch.setattr(sqlite3, "connect", unreadable)
    jobs = app_jobs.JobQueue(line.data, Store(line.data / "models"))
    jobs.open()
    assert "disk I/O error" in str(jobs.problem)
    with pytest.raises(NoWorker, match="disk I/O error"):
        jobs.get(job)
    assert not list(line.data.glob(f"{DATABASE}.damaged-*"))


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Line]:
    """A queue on a disk of 8 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to make a small disk")
    line = Line(disk)
    yield line
    line.kill()
    line.jobs.close()
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_job_that_fills_the_disk_fails_and_the_next_one_does_not(small: Line) -> None:
    job = small.submit(fills=True)
    small.start()
    ended = small.ended(job)
    assert (ended["state"], ended["code"], ended["attempts"]) == ("failed", "disk_full", 1)
    assert ended["error"].startswith("The disk is full; nothing was changed.")
    assert small.ended(small.submit())["state"] == "succeeded"


def test_a_disk_that_others_fill_costs_a_job_nothing_but_time(small: Line) -> None:
    """Its end cannot be written then, so it stays a running one until it can."""
    job = small.submit(seconds=1)
    worker = small.start("WATCH_EVERY_S=0.1", "LOST_S=2")
    until(lambda: small.begun(job), "it was not begun")
    assert not fill(small.data / "others")
    with pytest.raises(DiskFull, match="Nothing was queued"):
        small.submit("bolt")
    small.says("database or disk is full")
    assert small.state(job) == "running"
    (small.data / "others").unlink()
    assert worker.wait(60) != 0
    small.start()
    assert small.ended(job)["state"] == "succeeded"
    assert small.ended(small.submit("bolt"))["state"] == "succeeded"


# The clock


def set_clock(line: Line, moment: str) -> None:
    """Set the worker's clock, in UTC."""
    ahead = datetime.fromisoformat(moment + "+00:00").timestamp() - time.time()
    (line.data / ".clock").write_text(str(ahead))
    (line.data / ".clock").replace(line.data / CLOCK)


def test_a_clock_that_jumps_changes_nothing(line: Line) -> None:
    jobs = [line.submit(seconds=2), line.submit("bolt", seconds=2), line.submit("nut")]
    line.start("WATCH_EVERY_S=0.1")
    for job, moment in zip(jobs, ("2046-01-01T00:00:00", "1970-01-01T00:00:00"), strict=False):
        until(lambda: line.begun(job), "it was not begun")  # noqa: B023
        set_clock(line, moment)
    for job in jobs:
        ended = line.ended(job)
        assert (ended["state"], ended["attempts"]) == ("succeeded", 1)


# Again and again


NIGHTLY = {"cron": "0 2 * * *", "timezone": "UTC"}


def schedule(line: Line, name: str = "nightly", **changes: Any) -> dict[str, Any]:
    retrain = asked("bracket", **changes.pop("meta", {}))
    return line.jobs.schedule(name, ScheduleRequest(**{**NIGHTLY, **changes}, retrain=retrain))


def begun_by_schedules(line: Line) -> list[str]:
    return sorted(job["id"] for job in line.jobs.newest(500) if job["id"].startswith("scheduled-"))


def test_schedules_are_put_listed_replaced_and_deleted(line: Line) -> None:
    assert schedule(line)["last"] is None
    schedule(line, "weekly", cron="0 3 * * MON", timezone="Asia/Tokyo")
    assert schedule(line, cron="30 1 * * *")["cron"] == "30 1 * * *"
    assert [(one["name"], one["cron"], one["timezone"]) for one in line.jobs.schedules()] == [
        ("nightly", "30 1 * * *", "UTC"),
        ("weekly", "0 3 * * MON", "Asia/Tokyo"),
    ]
    assert line.jobs.schedules()[0]["retrain"]["model"] == "bracket"
    line.jobs.unschedule("nightly")
    assert [one["name"] for one in line.jobs.schedules()] == ["weekly"]
    with pytest.raises(UnknownJob, match="There is no schedule 'nightly'"):
        line.jobs.unschedule("nightly")


@pytest.mark.parametrize(
    "cron",
    ["25 * * *", "0 2 * * * *", "61 * * * *", "0 0 30 2 *", "@daily", "R 2 * * *", "H 2 * * *", ""],
)
def test_an_expression_that_names_no_time_is_refused_in_words(line: Line, cron: str) -> None:
    with pytest.raises(BadRequest, match="is no cron expression: it takes minute, hour"):
        schedule(line, cron=cron)
    assert line.jobs.schedules() == []


@pytest.mark.parametrize("zone", ["Mars/Olympus", "", "Asia", "../etc/passwd", "\0", "a" * 100])
def test_a_time_zone_that_does_not_exist_is_refused_in_words(line: Line, zone: str) -> None:
    with pytest.raises(BadRequest, match="There is no time zone"):
        schedule(line, timezone=zone)


@pytest.mark.parametrize("name", ["", "a/b", "..", "a" * 65, "night ly"])
def test_a_schedule_has_a_name_that_is_a_files_name(line: Line, name: str) -> None:
    with pytest.raises(BadRequest, match="A schedule's name has"):
        schedule(line, name)


def test_a_schedule_outlives_a_damaged_queue(line: Line) -> None:
    schedule(line)
    line.jobs.close()
    garbage(line.data / DATABASE)
    line.jobs = opened(line.data)
    assert [one["name"] for one in line.jobs.schedules()] == ["nightly"]


def test_a_schedule_begins_one_job_at_its_time(line: Line) -> None:
    """Though its worker is killed in that minute; and 2 at night in Tokyo is 17 o'clock UTC."""
    schedule(line, timezone="Asia/Tokyo")
    set_clock(line, "2040-05-01T16:59:57")
    line.start("WATCH_EVERY_S=0.1")
    line.says("Waiting for jobs")
    until(lambda: begun_by_schedules(line), "it was not begun")
    line.kill()
    line.start("WATCH_EVERY_S=0.1")
    line.says("Waiting for jobs")
    job = "scheduled-nightly-20400501T1700"
    assert line.ended(job)["state"] == "succeeded"
    time.sleep(1)
    assert begun_by_schedules(line) == [job]
    assert line.jobs.get(job)["request"]["category"] == "any"
    assert line.jobs.schedules()[0]["last"] is not None


def test_a_clock_that_jumps_begins_no_schedule_that_is_not_due(line: Line) -> None:
    """As on a board without a battery, which wakes up in 1970."""
    schedule(line)
    set_clock(line, "1970-01-01T00:00:10")
    line.start("WATCH_EVERY_S=0.1")
    line.says("Waiting for jobs")
    for moment in ("2040-06-01T12:00:00", "2030-06-01T12:00:00", "2050-06-01T12:00:00"):
        set_clock(line, moment)
        time.sleep(0.5)
    assert begun_by_schedules(line) == []
    set_clock(line, "2040-06-02T02:00:01")
    until(lambda: begun_by_schedules(line), "it was not begun")
    for moment in ("2040-06-01T12:00:00", "2040-06-02T02:00:10"):
        set_clock(line, moment)
        time.sleep(1)
    assert begun_by_schedules(line) == ["scheduled-nightly-20400602T0200"]


def test_a_schedule_does_not_pile_up_behind_its_last_job(line: Line) -> None:
    schedule(line, cron="* * * * *", meta={"seconds": 2})
    line.start("WATCH_EVERY_S=0.1")
    line.says("Waiting for jobs")
    for moment in ("2040-06-02T02:00:01", "2040-06-02T02:01:01"):
        set_clock(line, moment)
        until(lambda: begun_by_schedules(line), "it was not begun")
    line.says("its last job has not ended")
    first, *rest = begun_by_schedules(line)
    assert not rest
    line.ended(first)
    set_clock(line, "2040-06-02T02:02:01")
    until(lambda: len(begun_by_schedules(line)) > 1, "it was not begun again")


def test_a_scheduled_job_and_one_that_is_asked_for_know_of_each_other(line: Line) -> None:
    schedule(line, cron="* * * * *", meta={"seconds": 2})
    line.start("WATCH_EVERY_S=0.1")
    until(lambda: begun_by_schedules(line), "it was not begun")
    with pytest.raises(Conflict, match="scheduled-nightly-"):
        line.submit()


def test_a_day_with_two_hours_at_two_and_one_with_none_have_their_moments() -> None:
    def moments(day: str) -> list[str]:
        begin = datetime.fromisoformat(f"{day}T00:00:00+00:00").timestamp()
        every_minute = (begin + 60 * minute + 5 for minute in range(24 * 60))
        due = {last_due("30 2 * * *", "Europe/Berlin", now) for now in every_minute}
        return [f"{one:%H:%M}" for one in sorted(due) if one.timestamp() >= begin]

    assert moments("2026-06-01") == ["00:30"]
    assert moments("2026-03-29") == ["01:00"]
    assert moments("2026-10-25") == ["00:30", "01:30"]


# Keeping it small


def test_the_oldest_ended_jobs_are_forgotten(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_jobs, "KEPT", 2)
    jobs = [line.submit(queue=True) for _ in range(4)]
    waiting = line.submit("bolt")
    for job in jobs:
        line.jobs.cancel(job)
        JobFolder(line.data, job).root.mkdir(parents=True)
    line.sql("UPDATE workflow_status SET created_at = created_at + 1000 * rowid")
    line.jobs.prune()
    assert [job["id"] for job in line.jobs.newest()] == [waiting, *reversed(jobs[2:])]
    assert {path.name for path in (line.data / "jobs").iterdir()} == {*jobs[2:]}
    with pytest.raises(UnknownJob):
        line.jobs.get(jobs[0])
