"""Claims about much of something: many who watch, many keys, much meta, many jobs at once."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.jobs.job_queue import JobQueue
from app.routes.jobs import LOOK_EVERY_S, Looks, _follow
from engines.errors import UnknownJob
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


def test_400_who_watch_a_job_look_once_together() -> None:
    queue: Any = Counted()

    async def watch() -> None:
        looks = Looks()
        found = await asyncio.gather(*(looks.ask(queue, "train-1", 0) for _ in range(400)))
        assert queue.looks == 1
        assert {one.lines for one in found} == {b'event: log\ndata: "begun"\n\n'}
        assert b'"state":"running"' in found[0].job
        assert len({id(one.job) for one in found}) == 1  # written once for all
        queue.state = "succeeded"
        await asyncio.sleep(1.2 * LOOK_EVERY_S)
        later = await asyncio.gather(*(looks.ask(queue, "train-1", 6) for _ in range(400)))
        assert queue.looks == 2
        assert all(one.has_ended and not one.lines for one in later)
        with pytest.raises(UnknownJob):
            await looks.ask(queue, "train-2", 0)

    asyncio.run(watch())


def test_a_round_without_news_makes_no_task_for_any_of_400_who_watch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each made two, and a future, twice a second: parts waited 1.4 times as long."""
    queue: Any = Counted()
    monkeypatch.setattr("app.routes.jobs.LOOK_EVERY_S", 0.05)

    async def watch() -> None:
        looks, stopping = Looks(), asyncio.Event()

        async def one() -> list[bytes]:
            return [event async for event in _follow(looks, queue, "train-1", stopping)]

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


def test_a_list_of_jobs_asks_each_model_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of 500 jobs asked for all of it: 0.2 s of Python, in which parts waited."""
    store = Store(tmp_path / "models")
    versions = [store.take_in("bolt", tiny_bundle(tmp_path / "a"), {})]
    store.activate("bolt", versions[0])
    jobs = JobQueue(tmp_path, store)
    jobs.open()
    for number in range(40):
        options = enqueue_options(f"retrain-{number:012x}", None, [])
        jobs._client.enqueue(options, "retrain", RetrainRequest(**ASKED).model_dump())
    ended = json.dumps({"state": "succeeded", "version": versions[0]})
    with closing(sqlite3.connect(tmp_path / DATABASE)) as database:
        database.execute("UPDATE workflow_status SET status = 'SUCCESS', output = ?", [ended])
        database.commit()
    looks: Counter[str] = Counter()
    for what in ("pointer", "refused", "versions"):
        look: Callable[..., Any] = getattr(Store, what)

        def count(*of: Any, what: str = what, look: Callable[..., Any] = look) -> Any:
            looks[what] += 1
            return look(*of)

        monkeypatch.setattr(Store, what, count)
    assert {job["outcome"] for job in jobs.newest(500)} == {"live"}
    assert max(looks.values(), default=0) == 1, looks
    jobs.close()


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
