"""Claims about jobs that ended long ago: they are forgotten, whoever began them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.jobs import job_queue
from app.jobs.job_queue import JobQueue
from engines.queue.job_folder import JobFolder
from engines.queue.job_requests import RetrainRequest
from engines.queue.protocol import enqueue_options, scheduled_id
from engines.store.versions import Store
from support.waiting import until

REQUEST = RetrainRequest(model="bolt", category="bolt")


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[JobQueue]:
    monkeypatch.setattr(job_queue, "KEPT", 5)
    monkeypatch.setattr(job_queue, "AT_ONCE", 7)
    queue = JobQueue(tmp_path, Store(tmp_path / "models"))
    yield queue
    queue.close()


def test_jobs_that_schedules_begin_are_forgotten_though_nobody_asks_for_one(
    jobs: JobQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_queue, "TIDY_EVERY_S", 0.2)
    jobs.open()
    content = REQUEST.model_dump(exclude_none=True)
    ids = [f"{scheduled_id('nightly')}20260101T{number:04d}" for number in range(25)]
    for job_id in ids:  # as a schedule begins them; they end when somebody cancels them
        jobs._client.enqueue(enqueue_options(job_id, None, []), "retrain", content)
        JobFolder(tmp_path, job_id).root.mkdir(parents=True)
        jobs._client.cancel_workflow(job_id)
    until(lambda: len(jobs.newest(100)) == 5)
    kept = {one["id"] for one in jobs.newest(100)}
    assert kept <= {*ids}
    until(lambda: {path.name for path in (tmp_path / "jobs").iterdir()} == kept)


def test_who_asks_for_a_job_does_not_wait_for_old_ones_to_go(
    jobs: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, go_on = threading.Event(), threading.Event()

    def prune(_: JobQueue) -> None:
        began.set()
        go_on.wait(60)

    monkeypatch.setattr(JobQueue, "prune", prune)
    jobs.open()
    assert began.wait(20)
    since = time.monotonic()
    assert jobs.submit("retrain", REQUEST)["state"] == "queued"
    assert time.monotonic() - since < 10
    go_on.set()
