"""Claims about much of something: many who watch, many keys, much meta, many jobs at once."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from sqlalchemy.event import listen

from app.jobs.job_queue import JobQueue
from app.routes.jobs import LOOK_EVERY_S, Looks, _follow
from engines.errors import UnknownJob
from engines.queue.job_folder import JobFolder
from engines.queue.job_requests import MAX_META, RetrainRequest
from engines.queue.protocol import DATABASE, enqueue_options
from engines.store.datasets import Datasets
from engines.store.versions import Store
from support.damage import seeds
from support.plans import tiny_bundle
from support.server import agreed, serving

VAE = {"kind": "vae", "meta": {"latent_dim": 8, "image_size": 64, "learning_rate": 1e-3}}
JSON = {"Content-Type": "application/json"}
ASKED = {"model": "bolt", "category": "bolt"}


class Counted:
    """A queue with one job, which counts how often it is looked at."""

    def __init__(self) -> None:
        self.looks, self.state = 0, "running"

    def get(self, job_id: str) -> dict[str, Any]:
        self.looks += 1
        if job_id != "train-1":
            raise UnknownJob("There is no such job.")
        empty = dict.fromkeys(
            ("created", "ended", "progress", "version", "outcome", "error", "code")
        )
        about = {"id": job_id, "kind": "retrain", "model": "bolt", "state": self.state}
        return {**about, **empty, "attempts": 1, "request": {}}

    def lines(self, job_id: str, after: int) -> tuple[list[str], int]:
        return (["begun"], 6) if after == 0 else ([], after)


def asking(queue: Counted, stopping: asyncio.Event | None = None) -> Any:
    """A request, as far as who watches a job looks at it."""
    worker = SimpleNamespace(held_back=0.0, state="running")
    state = SimpleNamespace(jobs=queue, worker=worker, looks=Looks(), stopping=stopping)
    return SimpleNamespace(app=SimpleNamespace(state=state))


def test_400_who_watch_a_job_look_once_together() -> None:
    queue = Counted()

    async def watch() -> None:
        looks, request = Looks(), asking(queue)
        found = await asyncio.gather(*(looks.ask(request, "train-1", 0) for _ in range(400)))
        assert queue.looks == 1
        assert {one.lines for one in found} == {b'event: log\ndata: "begun"\n\n'}
        assert b'"state":"running"' in found[0].job
        assert len({id(one.job) for one in found}) == 1  # written once for all
        queue.state = "succeeded"
        await asyncio.sleep(1.2 * LOOK_EVERY_S)
        later = await asyncio.gather(*(looks.ask(request, "train-1", 6) for _ in range(400)))
        assert queue.looks == 2
        assert all(one.has_ended and not one.lines for one in later)
        with pytest.raises(UnknownJob):
            await looks.ask(request, "train-2", 0)

    asyncio.run(watch())


def test_a_round_without_news_makes_no_task_for_any_of_400_who_watch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each made two, and a future, twice a second: parts waited 1.4 times as long."""
    queue = Counted()
    monkeypatch.setattr("app.routes.jobs.LOOK_EVERY_S", 0.05)

    async def watch() -> None:
        request = asking(queue, asyncio.Event())

        async def one() -> list[bytes]:
            return [event async for event in _follow(request, "train-1", lambda: True)]

        watching = [asyncio.create_task(one()) for _ in range(400)]
        await asyncio.sleep(0.3)
        made, loop = [], asyncio.get_running_loop()
        create_task = loop.create_task
        monkeypatch.setattr(
            loop, "create_task", lambda *a, **k: made.append(a) or create_task(*a, **k)
        )
        looks_before = queue.looks
        await asyncio.sleep(0.5)
        assert len(made) <= 2 * (queue.looks - looks_before) + 2
        queue.state = "succeeded"
        found = await asyncio.gather(*watching)
        assert {b"".join(events).count(b"event: job") for events in found} == {2}

    asyncio.run(watch())


def test_90000_unknown_keys_are_one_sentence_and_hold_nobody_up(tmp_path: Path) -> None:
    many = {f"k{number}": 1 for number in range(70_000)}
    with serving(tmp_path) as server:
        for method, path, body in (
            ("POST", "/retrain", {**ASKED, **many}),
            ("POST", "/convert", {"model": "bolt", **many}),
            ("POST", "/retrain", {**ASKED, "meta": many}),
            ("PUT", "/models/bolt/threshold", {"raw": 1, "reason": "x", **many}),
        ):
            content = json.dumps(body)
            assert len(content) < 1024 * 1024
            before = server.cpu_seconds()
            answer = server.client.request(method, path, content=content, headers=JSON)
            assert (answer.status_code, agreed(answer)) == (422, "bad_request")
            assert len(answer.json()["error"]) < 300
            assert server.cpu_seconds() - before < 0.4


def test_meta_is_bounded_because_every_list_of_jobs_holds_it() -> None:
    fits = RetrainRequest(**ASKED, meta={"backbone": "x" * (MAX_META - 100)})
    assert fits.meta
    with pytest.raises(ValueError, match="16,384 bytes"):
        RetrainRequest(**ASKED, meta={"backbone": "x" * MAX_META})
    with pytest.raises(ValueError, match="100 keys"):
        RetrainRequest(**ASKED, meta={str(number): 1 for number in range(101)})


def test_20000_pictures_are_listed_at_once_and_a_change_is_seen(tmp_path: Path) -> None:
    folder = tmp_path / "train" / "bolt"
    folder.mkdir(parents=True)
    for number in range(20_000):
        (folder / f"{number:05}.png").touch()
    os.utime(folder, (1e9, 1e9))  # it has not changed for long
    datasets = Datasets(tmp_path)
    assert datasets.images("bolt", "train", 0, 100).total == 20_000
    began = time.process_time()
    for _ in range(20):
        assert len(datasets.images("bolt", "train", 19_950, 100).images) == 50
        assert datasets.categories() == {"bolt": {"train": 20_000, "normal": 0, "anomaly": 0}}
    assert (time.process_time() - began) / 20 < 0.05  # reading the names takes 0.1 s
    for change, total in (
        (lambda: (folder / "new.png").touch(), 20_001),
        (lambda: (folder / "new.png").unlink(), 20_000),
        (lambda: datasets.add("bolt", "train", "a.png", seeds()["png_colour"]), 20_001),
        (lambda: datasets.delete_image("bolt", "train", "a.png"), 20_000),
        (lambda: (folder / "link.png").symlink_to(folder / "00000.png"), 20_001),
        (lambda: (folder / "00000.png").unlink(), 19_999),  # and with it the link
    ):
        change()
        assert datasets.count("bolt", "train") == total


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[JobQueue]:
    """A queue without jobs, beside a model with one version that is live."""
    store = Store(tmp_path / "models")
    store.activate("bolt", store.take_in("bolt", tiny_bundle(tmp_path / "a"), {}))
    queue = JobQueue(tmp_path, store)
    queue.open()
    yield queue
    queue.close()


def filled(jobs: JobQueue, data: Path, rows: list[tuple[str, str | None]]) -> list[str]:
    """Let there be a job for each status and output, as the queue's file has them; their ids."""
    ids = [f"retrain-{number:012x}" for number in range(len(rows))]
    for one in ids:
        options = enqueue_options(one, None, [])
        jobs._client.enqueue(options, "retrain", RetrainRequest(**ASKED).model_dump())
    with closing(sqlite3.connect(data / DATABASE)) as database:
        database.executemany(
            "UPDATE workflow_status SET status = ?, output = ? WHERE workflow_uuid = ?",
            [(*row, one) for row, one in zip(rows, ids, strict=True)],
        )
        database.commit()
    return ids


def calls(monkeypatch: pytest.MonkeyPatch, kind: type, *names: str) -> Counter[str]:
    """How often methods are called from now on."""
    counted: Counter[str] = Counter()
    for what in names:
        method: Callable[..., Any] = getattr(kind, what)

        def count(*of: Any, what: str = what, method: Callable[..., Any] = method) -> Any:
            counted[what] += 1
            return method(*of)

        monkeypatch.setattr(kind, what, count)
    return counted


def test_a_list_of_jobs_asks_each_model_once(
    jobs: JobQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of 500 jobs asked for all of it: 0.2 s of Python, in which parts waited."""
    ended = json.dumps({"state": "succeeded", "version": jobs._store.versions("bolt")[0]})
    filled(jobs, tmp_path, [("SUCCESS", ended)] * 40)
    looks = calls(monkeypatch, Store, "pointer", "refused", "versions")
    assert {job["outcome"] for job in jobs.newest(500)} == {"live"}
    assert max(looks.values(), default=0) == 1, looks


def test_the_files_of_jobs_that_have_ended_are_read_once_and_what_becomes_of_them_is_seen(
    jobs: JobQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each list opened three files for each job: half of its time."""
    store = jobs._store
    live = store.versions("bolt")[0]
    version = store.publish_again("bolt", live, {"activate": True})
    ended = json.dumps({"state": "succeeded", "version": version})
    rows = [("SUCCESS", ended), ("SUCCESS", json.dumps({"state": "failed"})), ("PENDING", None)]
    ids = filled(jobs, tmp_path, rows)
    for one in ids:
        JobFolder(tmp_path, one).begin()
        JobFolder(tmp_path, one).write_progress({"phase": "epochs", "pid": 1})
    first = jobs.newest(500)
    shown = {one["id"]: (one["state"], one["attempts"], one["progress"]) for one in first}
    assert shown == {
        ids[0]: ("running", 1, {"phase": "gate"}),
        ids[1]: ("failed", 1, {"phase": "epochs"}),
        ids[2]: ("running", 1, {"phase": "epochs"}),
    }
    read = calls(monkeypatch, Store, "gate", "manifest")
    read_files = calls(monkeypatch, JobFolder, "attempts", "progress")
    assert jobs.newest(500) == first
    assert read + read_files == {"attempts": 1, "progress": 1}  # of the one that runs
    JobFolder(tmp_path, ids[2]).write_progress({"phase": "verify"})
    store.record_gate("bolt", version, {"ok": False, "reasons": ["It flips."]})
    now = {one["id"]: one for one in jobs.newest(500)}
    assert now[ids[2]]["progress"] == {"phase": "verify"}
    assert (now[ids[0]]["outcome"], now[ids[0]]["error"]) == ("held", "It flips.")
    store.record_gate("bolt", version, {"ok": True, "reasons": []})
    assert {one["id"]: one for one in jobs.newest(500)}[ids[0]]["outcome"] == "replaced"


def test_jobs_are_counted_as_they_are_listed_in_one_statement_that_brings_no_row_of_each(
    jobs: JobQueue, tmp_path: Path
) -> None:
    """The count of 5,000 was a list of them: 0.1 s of Python, every 2 s that somebody looks."""
    rows: list[tuple[str, str | None]] = [
        *[("ENQUEUED", None)] * 30, ("DELAYED", None), ("PENDING", None), ("PENDING", None),
        ("CANCELLED", None), ("ERROR", None), ("MAX_RECOVERY_ATTEMPTS_EXCEEDED", None),
        *[("SUCCESS", json.dumps({"state": "succeeded", "attempts": n})) for n in range(4)],
        ("SUCCESS", '{"state": "interrupted"}'), ("SUCCESS", '{"state": "cancelled"}'),
        *[("SUCCESS", odd) for odd in ("{", "[" * 9999, "3", "{}", '{"state": "x"}', None)],
    ]  # fmt: skip
    filled(jobs, tmp_path, rows)
    found = jobs.count()
    assert found == {
        "queued": 31, "running": 2, "succeeded": 4, "failed": 7, "cancelled": 2, "interrupted": 2,
    }  # fmt: skip
    listed = [one["state"] for one in jobs.newest(500)]
    assert Counter(one if one in found else "failed" for one in listed) == found
    asked: list[str] = []
    listen(jobs._client._sys_db.engine, "before_cursor_execute", lambda *of: asked.append(of[2]))
    jobs.count()
    assert len([one for one in asked if "SELECT" in one]) == 1
    assert len(jobs._client.count_workflows()) == 6 + 4 + 8  # of a status, and outputs


def test_livez_answers_while_many_jobs_are_asked_for(tmp_path: Path) -> None:
    """They are asked for one by one, so Python's lock is not fought for by several threads."""
    waits: list[float] = []
    asked = threading.Event()
    with serving(tmp_path) as server:
        files = {"file": ("a.png", seeds()["png_colour"])}
        assert server.client.post("/datasets/bolt/train", files=files).status_code == 201

        def look() -> None:
            with httpx.Client(base_url=server.url) as client:
                while not asked.is_set():
                    began = time.monotonic()
                    assert client.get("/livez").status_code == 200
                    waits.append(time.monotonic() - began)
                    time.sleep(0.02)

        def ask(number: int) -> int:
            with httpx.Client(base_url=server.url, timeout=60) as client:
                body = {"model": f"m{number}", "category": "bolt", **VAE}
                return client.post("/retrain", json=body).status_code

        watching = threading.Thread(target=look)
        watching.start()
        with ThreadPoolExecutor(40) as threads:
            statuses = set(threads.map(ask, range(200)))
        asked.set()
        watching.join()
    assert statuses == {202}
    waits.sort()
    print(f"/livez meanwhile: median {waits[len(waits) // 2]:.3f} s, longest {waits[-1]:.3f} s")
    assert waits[len(waits) // 2] < 0.2
