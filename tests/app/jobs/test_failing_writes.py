"""Each write of the queue's database made to fail once: what was said of a job is what is."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from app.jobs import job_queue
from app.jobs.job_queue import JobQueue
from engines.errors import DiskFull
from engines.queue.job_folder import JobFolder
from engines.queue.job_requests import ConvertRequest, RetrainRequest
from engines.store.versions import Store
from support.failing import databases_may_fail, failing

Change = Callable[[JobQueue], object]


@pytest.fixture(autouse=True)
def may_fail() -> Iterator[None]:
    with databases_may_fail():
        yield


@contextmanager
def queue_of(data: Path) -> Iterator[JobQueue]:
    queue = JobQueue(data, Store(data / "models"))
    queue._try_to_open()  # without the thread that forgets old jobs: here they go when asked to
    assert queue.problem is None
    with closing(queue):
        yield queue


def jobs(queue: JobQueue) -> dict[str, tuple[str, ...]]:
    """What is said of each job, by its model; ids are drawn by lot."""
    return {one["model"]: (one["kind"], one["state"]) for one in queue.newest()}


def retrain(queue: JobQueue) -> object:
    return queue.submit("retrain", RetrainRequest(model="new", category="bolt"))


def convert(queue: JobQueue) -> object:
    return queue.submit("convert", ConvertRequest(model="new"))


def cancel(queue: JobQueue) -> object:
    return queue.cancel(next(one["id"] for one in queue.newest() if one["model"] == "second"))


CHANGES: dict[str, Change] = {"retrain": retrain, "convert": convert, "cancel": cancel}


@pytest.fixture
def seed(tmp_path: Path) -> Path:
    """A queue with two jobs that wait."""
    with queue_of(tmp_path / "seed") as queue:
        for name in ("first", "second"):
            queue.submit("retrain", RetrainRequest(model=name, category="bolt"))
    return tmp_path / "seed"


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("change", CHANGES)
def test_what_was_said_of_a_job_is_what_the_queue_holds(
    seed: Path, tmp_path: Path, change: str, error: int
) -> None:
    with queue_of(seed) as queue:
        before = jobs(queue)
    failures = 0
    for step in range(50):
        data = tmp_path / f"step{step}"
        shutil.copytree(seed, data)
        with queue_of(data) as queue:
            with failing(data, step, error) as write:
                try:
                    CHANGES[change](queue)
                    said: Any = "done"
                except (DiskFull, OperationalError) as refused:
                    said = refused
            found = jobs(queue)
        with queue_of(data) as queue:  # and after a restart
            assert jobs(queue) == found, write.failed
            if said == "done":
                assert found != before, write.failed
                break
            assert found == before, write.failed
            assert isinstance(said, DiskFull) == (error == errno.ENOSPC)
            CHANGES[change](queue)  # nothing is in the way of another try
            assert jobs(queue) != before
        failures += 1
    assert said == "done"
    assert failures >= 2  # a statement, and a commit


def test_forgetting_old_jobs_takes_none_that_is_new_and_is_ended_by_the_next_one(
    seed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_queue, "KEPT", 1)
    with queue_of(seed) as queue:
        for one in queue.active():
            queue.cancel(one["id"])
            JobFolder(seed, one["id"]).say("It begins.")
        newest = queue.newest()[0]["id"]
        queue.submit("retrain", RetrainRequest(model="waits", category="bolt"))
    for step in range(50):
        data = tmp_path / f"step{step}"
        shutil.copytree(seed, data)
        with queue_of(data) as queue:
            with failing(data / "jobs.sqlite", step) as write:
                try:
                    queue.prune()
                except OperationalError:
                    assert len(queue.newest()) in (2, 3)
            assert JobFolder(data, newest).lines()[0], write.failed
            assert "waits" in jobs(queue)
            queue.prune()
            assert {one["id"] for one in queue.newest()} >= {newest}
            assert set(jobs(queue)) == {"second", "waits"}
        if write.failed is None:
            break
    assert step >= 2
