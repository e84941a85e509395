"""Claims about several machines: a real PostgreSQL, real workers and servers, real HTTP.

Where a claim is about the queue alone, only what a job does is cheap; that stands in fleet.py.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.jobs.job_queue import JobQueue
from engines.errors import Conflict, NoWorker, UnknownJob
from engines.files import sha256
from engines.queue.fleet import Fleet
from engines.queue.job_requests import RetrainRequest
from engines.store.versions import Store
from support.fleet import PASSWORD, Machine, Network, Postgres, bin_folder, noted
from support.jobs import AGAIN, CATEGORY, ENDED, FIRST
from support.server import agreed, serving
from support.waiting import alive, until

pytestmark = pytest.mark.skipif(
    bin_folder() is None, reason="needs PostgreSQL: Debian's package postgresql"
)


class Line(Machine):
    """A serving machine without HTTP: its queue as the server sees it."""

    def __init__(self, folder: Path, name: str, queue_url: str, shared: Path) -> None:
        super().__init__(folder, name, queue_url, shared)
        images = self.data / "datasets" / "train" / "any"
        if not images.exists():
            images.mkdir(parents=True)
            for number in range(3):
                (images / f"{number}.png").write_bytes(os.urandom(1000))
        fleet = Fleet.read(self.variables)
        self.jobs = JobQueue(self.data, Store(self.data / "models"), fleet)
        self.jobs.open()
        assert self.jobs.problem is None

    def submit(self, model: str = "bracket", *, queue: bool = False, **what: Any) -> str:
        content = {"model": model, "category": "any", "meta": what, "queue": queue}
        request = RetrainRequest.model_validate({**content, "kind": "patchcore"})
        return str(self.jobs.submit("retrain", request)["id"])

    def state(self, job: str) -> str:
        return str(self.jobs.get(job)["state"])

    def ended(self, job: str, within_s: float = 60) -> dict[str, Any]:
        until(lambda: self.state(job) in ENDED, lambda: self.says()[-3000:], within_s)
        return self.jobs.get(job)


class Fleets:
    """A serving machine `line`, machines that learn, and what their jobs did."""

    def __init__(self, folder: Path, postgres: Postgres) -> None:
        self.folder, self.postgres = folder, postgres
        self.shared, self.ledger = folder / "shared", folder / "ledger.txt"
        self.machines: dict[str, Machine] = {}

    def line(self, name: str = "line") -> Line:
        machine = Line(self.folder / name, name, self.postgres.url(), self.shared)
        self.machines[name] = machine
        machine.start_quick(self.ledger, KENSA_WORKER="convert")
        return machine

    def learner(self, name: str, port: int | None = None) -> Machine:
        machine = Machine(self.folder / name, name, self.postgres.url(port), self.shared)
        self.machines[name] = machine
        machine.start_quick(self.ledger)
        return machine

    def begun(self, job: str, kind: str = "train") -> list[str]:
        """The machines at which a part of a job began."""
        whole = f"{job}.train" if kind == "train" else job
        return [line[3] for line in noted(self.ledger) if line[:3] == ["begun", kind, whole]]

    def published(self, job: str) -> int:
        return noted(self.ledger).count(["published", job])

    def met(self) -> list[list[str]]:
        return [line for line in noted(self.ledger) if line[0] == "met"]

    def close(self) -> None:
        for machine in self.machines.values():
            if machine.worker is not None:
                machine.worker.send_signal(signal.SIGCONT)
            machine.kill()
            if isinstance(machine, Line):
                machine.jobs.close()


@pytest.fixture
def fleet(tmp_path: Path, postgres: Postgres) -> Iterator[Fleets]:
    fleet = Fleets(tmp_path, postgres)
    yield fleet
    fleet.close()
    postgres.ask("DELETE FROM dbos.workflow_status")


# Over HTTP, with real jobs


def story(folder: Path, postgres: Postgres, sample_data: Path, rounds: int) -> None:
    """Retrain over HTTP, again and again; the machine that learns is killed each time."""
    learners = {
        name: Machine(folder / name, name, postgres.url(), folder / "shared")
        for name in ("one", "two")
    }
    line = Machine(folder, "line", postgres.url(), folder / "shared")
    shutil.copytree(sample_data, line.data / "datasets")
    photo = next((sample_data / "test" / CATEGORY / "normal").iterdir()).read_bytes()
    for learner in learners.values():
        learner.start_quick()
    try:
        with serving(folder, **line.variables, KENSA_WORKER="convert") as server:
            ask = server.client

            def job(which: str = "") -> dict[str, Any]:
                return dict(ask.get(f"/jobs/{which or begun}").json())

            until(lambda: ask.get("/jobs").status_code == 200, "the queue is not reached")
            versions = []
            for body in [FIRST, *[{**AGAIN, "update": False}] * (rounds - 1)]:
                answer = ask.post("/retrain", json=body)
                assert answer.status_code == 202, answer.text
                begun = answer.json()["id"]
                until(lambda: job()["attempts"] == 1, lambda: str(job()))
                victim = learners[job()["machine"]]
                victim.kill()
                until(lambda: job()["state"] in ENDED, lambda: str(job()), 90)
                found, log = job(), ask.get(f"/jobs/{begun}/log").text
                assert found["outcome"] == "live", (found, log)
                assert found["machine"] != victim.name
                assert found["attempts"] == 2
                assert found["progress"]["fraction"] == 1.0
                assert "AUROC" in log, "the log of the machine that learned is not here"
                assert "published as" in log
                versions.append(found["version"])
                verdict = server.infer(photo)
                assert verdict.status_code == 200
                assert verdict.json()["model_version"] == versions[-1]
                victim.start_quick()
            assert len(set(versions)) == rounds, "it published something twice"
            store = Store(line.data / "models")
            assert store.versions("part") == versions
            origins = [store.manifest("part", one).origin for one in versions]
            assert len({origin["job"] for origin in origins}) == rounds
            assert [origin["parent"] for origin in origins] == [None, *versions[:-1]]
            said = server.log.read_text() + "".join(one.says() for one in learners.values())
            said += ask.get("/healthz").text + ask.get("/jobs").text
            assert PASSWORD not in said
    finally:
        for learner in learners.values():
            learner.kill()
        postgres.ask("DELETE FROM dbos.workflow_status")


@pytest.fixture(scope="module")
def learned(
    postgres: Postgres, sample_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("learned")
    story(folder, postgres, sample_data, 1)
    return folder


def test_a_machine_dies_while_it_learns_another_goes_on_and_the_line_swaps(learned: Path) -> None:
    """As `story` tells it."""
    store = Store(learned / "data" / "models")
    (version,) = store.versions("part")
    store.check("part", version)
    assert (pointer := store.pointer("part")) is not None
    assert pointer.live == version


@pytest.mark.soak
def test_machines_die_again_and_again_while_they_learn(
    tmp_path: Path, postgres: Postgres, sample_data: Path
) -> None:
    story(tmp_path, postgres, sample_data, 5)


def test_a_server_without_its_queue_inspects_all_the_same_and_finds_it_later(
    learned: Path, postgres: Postgres, sample_data: Path
) -> None:
    line = Machine(learned, "line", postgres.url(), learned / "shared")
    photo = next((sample_data / "test" / CATEGORY / "normal").iterdir()).read_bytes()
    postgres.stop()
    try:
        with serving(learned, **line.variables) as server:
            until(lambda: server.client.get("/healthz").json()["queue"] != "ok", "it says ok")
            problem = server.client.get("/healthz").json()["queue"]
            assert problem.startswith("The queue's database cannot be reached: connection")
            assert server.infer(photo).status_code == 200
            answer = server.client.post("/retrain", json=AGAIN)
            assert (answer.status_code, agreed(answer)) == (503, "no_worker")
            assert answer.json()["error"] == problem
            postgres.start()
            until(lambda: server.client.get("/healthz").json()["queue"] == "ok", "it stays away")
            assert server.client.get("/jobs").json()["jobs"] == []
            postgres.stop("immediate")
            until(lambda: server.client.get("/healthz").json()["queue"] != "ok", "it says ok")
            answer = server.client.get("/jobs")
            assert (answer.status_code, agreed(answer)) == (503, "no_worker")
            assert server.infer(photo).status_code == 200
            assert PASSWORD not in server.log.read_text() + problem + answer.text
    finally:
        postgres.start()


# A machine dies, or is cut off


@pytest.mark.soak
def test_what_a_dead_machine_learned_for_another_is_learned_by_a_third(fleet: Fleets) -> None:
    line, one = fleet.line(), fleet.learner("one")
    job = line.submit(seconds=2)
    until(lambda: fleet.begun(job), "it was not begun")
    assert line.jobs.get(job)["machine"] == "one"
    until(lambda: line.jobs.lines(job)[0] == ["attempt 1"], "nobody tells how it goes")
    fleet.learner("two")
    one.kill()
    ended = line.ended(job)
    assert (ended["state"], ended["machine"]) == ("succeeded", "two")
    assert fleet.begun(job) == ["one", "two"]
    assert fleet.published(job) == 1
    assert line.jobs.lines(job)[0] == ["attempt 1", "attempt 2"]


@pytest.mark.soak
def test_a_machine_that_is_cut_off_stops_before_another_takes_over(fleet: Fleets) -> None:
    """Nobody tells it: no connection is closed, nothing arrives any more."""
    network = Network(fleet.postgres.port)
    line, one = fleet.line(), fleet.learner("one", network.port)
    job = line.submit(seconds=6)
    until(lambda: fleet.begun(job), "it was not begun")
    fleet.learner("two")
    network.cut()
    assert one.worker is not None
    assert one.worker.wait(60) == 2
    assert "is lost for too long" in one.says()
    assert fleet.begun(job) == ["one"], "another took over before"
    assert line.ended(job)["machine"] == "two"
    assert (fleet.begun(job), fleet.published(job), fleet.met()) == (["one", "two"], 1, [])
    network.mend()
    one.start_quick(fleet.ledger)
    after = line.submit("bolt")
    assert line.ended(after)["state"] == "succeeded"
    network.close()


@pytest.mark.soak
def test_a_worker_that_was_frozen_cannot_end_what_another_took_over(fleet: Fleets) -> None:
    """Its job goes on meanwhile: what it learned counts for nothing."""
    line, one = fleet.line(), fleet.learner("one")
    job = line.submit(seconds=7)
    until(lambda: fleet.begun(job), "it was not begun")
    assert one.worker is not None
    one.worker.send_signal(signal.SIGSTOP)
    fleet.learner("two")
    until(lambda: len(fleet.begun(job)) == 2, "nobody took over")
    one.worker.send_signal(signal.SIGCONT)
    assert one.worker.wait(60) == 2
    ended = line.ended(job)
    assert (ended["state"], ended["machine"], fleet.published(job)) == ("succeeded", "two", 1)


@pytest.mark.soak
def test_a_restart_of_the_database_costs_a_job_nothing(fleet: Fleets) -> None:
    line, _ = fleet.line(), fleet.learner("one")
    job = line.submit(seconds=4)
    until(lambda: fleet.begun(job), "it was not begun")
    fleet.postgres.stop()
    with pytest.raises(NoWorker, match="The queue's database"):
        line.submit("bolt")
    until(lambda: line.jobs.problem, "it does not know")
    fleet.postgres.start()
    until(lambda: not line.jobs.problem, "it does not come back")
    assert line.ended(job)["state"] == "succeeded"
    assert (fleet.begun(job), fleet.published(job)) == (["one"], 1)


@pytest.mark.soak
def test_a_machine_finds_its_jobs_again_when_it_comes_back(fleet: Fleets) -> None:
    line, _ = fleet.line(), fleet.learner("one")
    job = line.submit(finishing=2)
    until(lambda: fleet.begun(job, "finish"), "it was not begun")
    line.kill()
    time.sleep(4)
    assert line.state(job) in ("queued", "running")
    assert not fleet.published(job), "it is converted at the machine that it belongs to"
    line.start_quick(fleet.ledger, KENSA_WORKER="convert")
    assert line.ended(job)["state"] == "succeeded"
    assert fleet.begun(job) == ["one"], "it was learned twice"
    assert fleet.begun(job, "finish") == ["line", "line"]
    assert fleet.published(job) == 1


@pytest.mark.soak
def test_a_job_whose_process_dies_three_times_on_whatever_machine_is_interrupted(
    fleet: Fleets,
) -> None:
    line, one = fleet.line(), fleet.learner("one")
    job = line.submit(dies=1, seconds=60)
    until(lambda: len(fleet.begun(job)) == 2, "it was not begun again")
    one.kill()
    fleet.learner("two")
    until(lambda: len(fleet.begun(job)) == 3, "nobody took over")
    fleet.machines["two"].kill()
    fleet.learner("three")
    ended = line.ended(job)
    assert (ended["state"], ended["attempts"]) == ("interrupted", 3)
    assert fleet.begun(job) == ["one", "one", "two"]


# Cancelling, and what belongs to whom


@pytest.mark.soak
def test_a_cancel_kills_the_job_on_another_machine(fleet: Fleets) -> None:
    line, _ = fleet.line(), fleet.learner("one")
    job = line.submit(seconds=60)
    until(lambda: fleet.begun(job), "it was not begun")
    child = int(noted(fleet.ledger)[-1][4])
    assert line.jobs.cancel(job)["state"] == "cancelled"
    until(lambda: not alive(child), "its process goes on")
    after = line.ended(line.submit())
    assert (after["state"], line.state(job), fleet.published(job)) == ("succeeded", "cancelled", 0)


@pytest.mark.soak
def test_machines_neither_see_nor_stop_each_others_jobs(fleet: Fleets) -> None:
    one, other = fleet.line("one"), fleet.line("other")
    job = one.submit("bracket")
    with pytest.raises(Conflict, match=job):
        one.submit("bracket")
    same = other.submit("bracket")
    assert [found["id"] for found in other.jobs.newest()] == [same]
    assert sum(other.jobs.count().values()) == 1
    for ask in (other.jobs.get, other.jobs.cancel):
        with pytest.raises(UnknownJob):
            ask(job)
    fleet.learner("learner")
    for line, its in ((one, job), (other, same)):
        assert line.ended(its)["state"] == "succeeded"
        assert fleet.begun(its, "finish") == [line.name]
        assert line.jobs.count()["succeeded"] == sum(line.jobs.count().values()) == 1


@pytest.mark.soak
def test_jobs_of_a_model_begin_one_after_the_other_and_those_of_two_models_at_once(
    fleet: Fleets,
) -> None:
    line, _, _ = fleet.line(), fleet.learner("one"), fleet.learner("two")
    first = line.submit(seconds=2)
    second = line.submit(queue=True)
    third = line.submit("bolt", seconds=1)
    until(lambda: fleet.begun(first) and fleet.begun(third), "they do not run side by side")
    assert line.state(second) == "queued"
    for job in (first, second, third):
        assert line.ended(job)["state"] == "succeeded"
    ledger = noted(fleet.ledger)
    order = [words[:3] for words in ledger]
    assert order.index(["begun", "train", f"{second}.train"]) > ledger.index(["published", first])
    assert {*fleet.begun(first), *fleet.begun(third)} == {"one", "two"}


def test_a_worker_that_waits_for_its_database_ends_when_it_is_told_to(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "line", "postgresql://kensa@127.0.0.1:9/kensa", tmp_path)
    machine.start()
    until(lambda: "cannot be reached: connection" in machine.says(), machine.says)
    assert machine.worker is not None
    machine.worker.terminate()
    assert machine.worker.wait(60) == 0


@pytest.mark.soak
def test_only_one_worker_has_a_name(fleet: Fleets) -> None:
    fleet.learner("one")
    until(lambda: "Waiting for jobs, as one" in fleet.machines["one"].says(), "it does not start")
    double = Machine(fleet.folder / "double", "one", fleet.postgres.url(), fleet.shared)
    double.start_quick(fleet.ledger)
    until(lambda: "Another worker calls itself one" in double.says(), double.says)
    fleet.machines["one"].kill()
    until(lambda: "Waiting for jobs, as one" in double.says(), double.says)
    double.kill()


@pytest.mark.soak
def test_what_is_sent_once_is_not_sent_again_and_what_ended_jobs_left_is_removed(
    fleet: Fleets,
) -> None:
    line, _ = fleet.line(), fleet.learner("one")
    assert line.ended(line.submit())["state"] == "succeeded"
    sent = fleet.shared / "line" / "inputs"
    before = {path.name: path.stat().st_ino for path in sent.iterdir()}
    assert len(before) == 4, "three images and a list"
    new = line.data / "datasets" / "train" / "any" / "new.png"
    new.write_bytes(b"new")
    (line.data / "datasets" / "train" / "any" / "0.png").unlink()
    assert line.ended(line.submit())["state"] == "succeeded"
    after = {path.name: path.stat().st_ino for path in sent.iterdir()}
    assert len(after) == 4
    assert len(before.items() & after.items()) == 2, "images were sent again"
    assert line.ended(line.submit())["state"] == "succeeded"
    assert len(list((fleet.shared / "line" / "progress").iterdir())) <= 1
    assert len(list((line.data / "jobs").glob("*.train"))) == 0


@pytest.mark.soak
def test_a_damaged_image_fails_the_job_by_its_name_and_the_next_job_sends_it_again(
    fleet: Fleets,
) -> None:
    line = fleet.line()
    job = line.submit()
    sent = fleet.shared / "line" / "inputs"
    until(lambda: sent.is_dir() and len(list(sent.glob("[0-9a-f]*"))) == 4, "nothing was sent")
    image = line.data / "datasets" / "train" / "any" / "1.png"
    damaged = sent / sha256(image)
    damaged.write_bytes(bytes(1000))
    real = Machine(fleet.folder / "real", "real", fleet.postgres.url(), fleet.shared)
    fleet.machines["real"] = real
    real.start_quick()
    ended = line.ended(job)
    assert (ended["state"], ended["code"]) == ("failed", "bad_shared"), ended
    assert ended["error"].startswith("datasets/train/any/1.png in the shared store is damaged")
    assert ended["error"] in "".join(line.jobs.lines(job)[0])
    assert not damaged.exists()
    again = line.ended(line.submit())
    assert again["code"] != "bad_shared", again
    assert damaged.read_bytes() == image.read_bytes()


# The torture


@pytest.mark.soak
def test_kills_of_machines_and_of_the_database_lose_no_job_and_publish_none_twice(
    fleet: Fleets,
) -> None:
    figures = torture(fleet, 100, random.Random(0))
    print(figures)
    assert figures["accepted"] == 100
    assert figures["lost"] == figures["stuck"] == figures["failed"] == 0
    assert figures["published twice"] == figures["at two places at once"] == 0
    assert figures["succeeded, not published"] == figures["interrupted, published"] == 0
    assert figures["succeeded"] + figures["interrupted"] == 100
    assert figures["kills of a worker"] >= 20
    assert figures["kills of the database"] >= 5


def torture(fleet: Fleets, count: int, chance: random.Random) -> dict[str, int]:
    """3 machines learn for 2 lines; workers and database are killed and started again."""
    began, done = time.monotonic(), Counter[str]()
    lines = [fleet.line("one"), fleet.line("other")]
    workers = [*lines, *(fleet.learner(f"learner{number}") for number in range(3))]
    jobs: dict[str, Line] = {}
    due = {"worker": 5.0, "database": 15.0}
    while time.monotonic() - began < 60 + 6 * count:
        time.sleep(0.1)
        now = time.monotonic() - began
        if len(jobs) < count and chance.random() < 0.3:
            line = chance.choice(lines)
            with contextlib.suppress(NoWorker):  # it may be there all the same
                job = line.submit(f"m{len(jobs)}", seconds=chance.uniform(0.05, 3))
                jobs[job] = line
        if now > due["worker"]:
            victim, due["worker"] = chance.choice(workers), now + chance.expovariate(1 / 5)
            victim.kill()
            done["kills of a worker"] += 1
        if now > due["database"]:
            due["database"] = now + 10 + chance.expovariate(1 / 15)
            fleet.postgres.stop(chance.choice(["fast", "immediate"]))
            time.sleep(chance.choice([0.1, 1.0, 4.0]))
            fleet.postgres.start()
            done["kills of the database"] += 1
        for machine in workers:  # as a server or systemd does
            if machine.worker is not None and (code := machine.worker.poll()) is not None:
                if code != -signal.SIGKILL:
                    done["ends by itself"] += 1
                role = {"KENSA_WORKER": "convert"} if isinstance(machine, Line) else {}
                machine.start_quick(fleet.ledger, **role)
        with contextlib.suppress(NoWorker):
            if len(jobs) == count and not any(line.jobs.active() for line in lines):
                break
    until(lambda: not any(line.jobs.problem for line in lines), "the database stays away")
    ledger = noted(fleet.ledger)
    published = Counter(words[1] for words in ledger if words[0] == "published")
    begun = Counter(words[2] for words in ledger if words[:2] == ["begun", "train"])
    found = {one["id"]: one for line in lines for one in line.jobs.newest(500)}
    states = Counter(found[job]["state"] for job in jobs if job in found)
    ended = {job: found[job]["state"] for job in jobs if job in found}
    return dict(done) | {
        "seconds": round(time.monotonic() - began),
        "accepted": len(jobs),
        "lost": len(jobs.keys() - found.keys()),
        "stuck": sum(state not in ENDED for state in ended.values()),
        "succeeded": states["succeeded"],
        "interrupted": states["interrupted"],
        "failed": states["failed"],
        "learned more than once": sum(times > 1 for times in begun.values()),
        "published twice": sum(times > 1 for times in published.values()),
        "at two places at once": len(fleet.met()),
        "succeeded, not published": sum(
            ended[job] == "succeeded" and not published[job] for job in ended
        ),
        "interrupted, published": sum(
            ended[job] == "interrupted" and bool(published[job]) for job in ended
        ),
    }
