"""Claims about the process that waits for the next job; what jobs do is cheap (sparing.py)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engines.machine import job_memory
from engines.queue.job_folder import JobFolder
from support import sparing
from support.waiting import alive, until
from workers.jobs import attempts
from workers.jobs.parent_and_child import has_lock
from workers.jobs.spare import Spare, end

JOB = "retrain-0123456789ab"


class Place:
    """A data folder, and a worker without a queue."""

    def __init__(self, data: Path) -> None:
        self.data = data

    @property
    def spare(self) -> Spare:
        return attempts.spare

    def begin(self) -> int:
        """A spare process, which waits."""
        self.spare.look(self.data, lambda: True)
        assert self.spare._waits is not None
        return self.spare._waits[0].pid

    def do(self, job_id: str = JOB, **request: Any) -> dict[str, Any]:
        """What a job's process saw, which ended well."""
        with (self.data / "job.lock").open("w") as lock:
            assert has_lock(lock)
            assert attempts.run_child(self.data, job_id, "retrain", request, lock) == 0
        ended = JobFolder(self.data, job_id).result()
        assert ended is not None
        assert ended["state"] == "succeeded"
        return self.seen(job_id)

    def seen(self, job_id: str = JOB) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.data / f"{job_id}.json").read_text())
        return content


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setattr(attempts, "CHILD", sparing.COMMAND)
    monkeypatch.setattr(attempts, "spare", Spare(sparing.COMMAND))
    monkeypatch.setattr(attempts, "was_cancelled", lambda _: False)
    monkeypatch.setattr(job_memory, "room_for_a_spare", lambda: True)
    place = Place(tmp_path)
    yield place
    if place.spare._waits is not None:
        place.spare._waits[1].close()
        end(place.spare._waits[0])


def test_the_process_that_waits_does_the_next_job_and_no_other(place: Place) -> None:
    waiting = place.begin()
    assert place.do()["pid"] == waiting
    assert not alive(waiting)
    assert place.do("retrain-2")["pid"] != waiting


def test_a_job_finds_all_as_in_a_process_of_its_own(place: Place) -> None:
    request = {"model": "検査", "meta": {"image_size": 256}}
    alone = place.do("retrain-1", **request)
    waiting = place.begin()
    spared = place.do("retrain-2", **request)
    assert spared["pid"] == waiting == spared["group"]
    assert alone["pid"] == alone["group"]
    own = ("pid", "group")
    assert {key: spared[key] for key in spared if key not in own} == {
        key: alone[key] for key in alone if key not in own
    }


def test_a_request_may_be_of_any_length(place: Place) -> None:
    """That of a training for another machine names each picture."""
    waiting = place.begin()
    inputs = {f"datasets/train/bolt/{number:06d}.png": "0" * 64 for number in range(20_000)}
    found = place.do(inputs=inputs)
    assert (found["pid"], found["request"]) == (waiting, {"inputs": inputs})


def test_a_process_that_was_killed_while_it_waited_costs_no_attempt(place: Place) -> None:
    waiting = place.begin()
    os.kill(waiting, signal.SIGKILL)
    assert place.do()["pid"] != waiting
    assert JobFolder(place.data, JOB).attempts() == 0  # `run_child` is one, whoever does it


def test_one_that_does_not_answer_is_ended_before_another_begins(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.jobs.spare.TAKES_S", 0.2)
    waiting = place.begin()
    os.kill(waiting, signal.SIGSTOP)
    assert place.do()["pid"] != waiting
    assert not alive(waiting)


def test_it_holds_the_lock_of_jobs_until_it_ends_also_when_its_worker_is_gone(
    place: Place,
) -> None:
    waiting = place.begin()
    with (place.data / "job.lock").open("w") as lock:
        assert has_lock(lock)
        taken = place.spare.take(lock)
    assert taken is not None  # and this worker has closed the file
    with (place.data / "job.lock").open("w") as successor:
        assert not has_lock(successor)
        os.kill(waiting, signal.SIGKILL)
        taken[0].wait()
        assert has_lock(successor)
    taken[1].close()


def test_it_is_cancelled_as_any_other(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = place.begin()
    begun = place.data / f"{JOB}.json"
    monkeypatch.setattr(attempts, "was_cancelled", lambda _: begun.exists())
    with (place.data / "job.lock").open("w") as lock:
        code = attempts.run_child(place.data, JOB, "retrain", {"waits": True}, lock)
    assert code is None
    assert place.seen()["pid"] == waiting
    assert not alive(waiting)


def test_it_goes_when_memory_is_short_and_comes_back_when_there_is_room(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = place.begin()
    (place.data / sparing.SHORT).touch()
    assert place.spare._waits is not None
    assert place.spare._waits[0].wait(timeout=20) == 0
    monkeypatch.setattr(job_memory, "room_for_a_spare", lambda: False)
    place.spare.look(place.data, lambda: True)
    assert place.spare._waits is None
    (place.data / sparing.SHORT).unlink()
    monkeypatch.setattr(job_memory, "room_for_a_spare", lambda: True)
    assert place.begin() != waiting


def test_there_is_none_beside_a_job(place: Place) -> None:
    place.spare.look(place.data, lambda: False)
    assert place.spare._waits is None


def test_one_that_cannot_load_what_it_should_is_not_begun_for_ever(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Spare([sys.executable, "-c", "raise SystemExit(1)"])
    monkeypatch.setattr(attempts, "spare", broken)
    place.begin()
    assert broken._waits is not None
    broken._waits[0].wait()
    broken.look(place.data, lambda: True)
    assert broken._waits is None
    keeping = threading.Thread(target=broken.keep, args=[place.data, lambda: True], daemon=True)
    monkeypatch.setattr("workers.jobs.spare.SETTLE_S", 0.01)
    keeping.start()
    keeping.join(0.2)
    assert broken._waits is None
    assert "pid" in place.do(), "its job has a process of its own"


def test_it_ends_with_its_worker_however_that_ends(tmp_path: Path) -> None:
    worker = subprocess.Popen([sys.executable, sparing.__file__, "worker", str(tmp_path)])
    try:
        until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "", "none")
        waiting = int((tmp_path / "pid").read_text())
        assert alive(waiting)
    finally:
        worker.kill()
        worker.wait()
    until(lambda: not alive(waiting), "it goes on")


def test_its_memory_counts_as_free_for_the_job_that_it_becomes(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    hoard = "import sys; held = bytearray(300 << 20); print(flush=True); sys.stdin.read()"
    words = [sys.executable, "-c", f"'workers.jobs'; {hoard}"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        without = job_memory._of_the_spare(tmp_path)
        (tmp_path / "jobs" / "waiting").write_text(str(process.pid))
        found = job_memory._of_the_spare(tmp_path)
        process.kill()
    assert without == 0
    assert 300 << 20 <= found < 400 << 20
    assert job_memory._of_the_spare(tmp_path) == 0, "it has ended"
