"""Claims about several machines: a real PostgreSQL, real workers and servers, real HTTP.

Where a claim is about the queue alone, only what a job does is cheap; that stands in fleet.py.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fleet import Machine, Network, Postgres, bin_folder, noted, running_postgres
from test_jobs import ENDED

from app.jobs import Jobs
from engines.errors import Conflict, NoWorker, UnknownJob
from engines.fleet import Fleet
from engines.jobs import RetrainRequest
from engines.store import Store

pytestmark = pytest.mark.skipif(
    bin_folder() is None, reason="needs PostgreSQL: Debian's package postgresql"
)


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with running_postgres() as database:
        yield database


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
        self.jobs = Jobs(self.data, Store(self.data / "models"), fleet)
        self.jobs.open()
        assert self.jobs.problem is None

    def submit(self, model: str = "bracket", *, queue: bool = False, **what: Any) -> str:
        content = {"model": model, "category": "any", "meta": what, "queue": queue}
        request = RetrainRequest.model_validate({**content, "kind": "patchcore"})
        return str(self.jobs.submit("retrain", request)["id"])

    def state(self, job: str) -> str:
        return str(self.jobs.get(job)["state"])

    def ended(self, job: str, within_s: float = 30) -> dict[str, Any]:
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
        machine.start_cheap(self.ledger, KENSA_WORKER="convert")
        return machine

    def learner(self, name: str, port: int | None = None) -> Machine:
        machine = Machine(self.folder / name, name, self.postgres.url(port), self.shared)
        self.machines[name] = machine
        machine.start_cheap(self.ledger)
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


def until(
    true: Callable[[], object], otherwise: str | Callable[[], str], within_s: float = 30.0
) -> None:
    end = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < end, otherwise if isinstance(otherwise, str) else otherwise()
        time.sleep(0.02)


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# A machine dies, or is cut off


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


def test_a_machine_that_is_cut_off_stops_before_another_takes_over(fleet: Fleets) -> None:
    """Nobody tells it: no connection is closed, nothing arrives any more."""
    network = Network(fleet.postgres.port)
    line, one = fleet.line(), fleet.learner("one", network.port)
    job = line.submit(seconds=6)
    until(lambda: fleet.begun(job), "it was not begun")
    fleet.learner("two")
    network.cut()
    assert one.worker is not None
    assert one.worker.wait(10) == 2
    assert "is lost for too long" in one.says()
    assert fleet.begun(job) == ["one"], "another took over before"
    assert line.ended(job)["machine"] == "two"
    assert (fleet.begun(job), fleet.published(job), fleet.met()) == (["one", "two"], 1, [])
    network.mend()
    one.start_cheap(fleet.ledger)
    after = line.submit("bolt")
    assert line.ended(after)["state"] == "succeeded"
    network.close()


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
    assert one.worker.wait(10) == 2
    ended = line.ended(job)
    assert (ended["state"], ended["machine"], fleet.published(job)) == ("succeeded", "two", 1)


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


def test_a_machine_finds_its_jobs_again_when_it_comes_back(fleet: Fleets) -> None:
    line, _ = fleet.line(), fleet.learner("one")
    job = line.submit(finishing=2)
    until(lambda: fleet.begun(job, "finish"), "it was not begun")
    line.kill()
    time.sleep(4)
    assert line.state(job) in ("queued", "running")
    assert not fleet.published(job), "it is converted at the machine that it belongs to"
    line.start_cheap(fleet.ledger, KENSA_WORKER="convert")
    assert line.ended(job)["state"] == "succeeded"
    assert fleet.begun(job) == ["one"], "it was learned twice"
    assert fleet.begun(job, "finish") == ["line", "line"]
    assert fleet.published(job) == 1


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


def test_a_cancel_kills_the_job_on_another_machine(fleet: Fleets) -> None:
    line, _ = fleet.line(), fleet.learner("one")
    job = line.submit(seconds=60)
    until(lambda: fleet.begun(job), "it was not begun")
    child = int(noted(fleet.ledger)[-1][4])
    assert line.jobs.cancel(job)["state"] == "cancelled"
    until(lambda: not alive(child), "its process goes on", 5)
    after = line.ended(line.submit())
    assert (after["state"], line.state(job), fleet.published(job)) == ("succeeded", "cancelled", 0)


def test_machines_neither_see_nor_stop_each_others_jobs(fleet: Fleets) -> None:
    one, other = fleet.line("one"), fleet.line("other")
    job = one.submit("bracket")
    with pytest.raises(Conflict, match=job):
        one.submit("bracket")
    same = other.submit("bracket")
    assert [found["id"] for found in other.jobs.newest()] == [same]
    for ask in (other.jobs.get, other.jobs.cancel):
        with pytest.raises(UnknownJob):
            ask(job)
    fleet.learner("learner")
    for line, its in ((one, job), (other, same)):
        assert line.ended(its)["state"] == "succeeded"
        assert fleet.begun(its, "finish") == [line.name]


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
    order = [line[2] for line in noted(fleet.ledger) if line[0] in ("published", "begun")]
    assert order.index(f"{second}.train") > order.index(first)
    assert {*fleet.begun(first), *fleet.begun(third)} == {"one", "two"}


def test_only_one_worker_has_a_name(fleet: Fleets) -> None:
    fleet.learner("one")
    until(lambda: "Waiting for jobs, as one" in fleet.machines["one"].says(), "it does not start")
    double = Machine(fleet.folder / "double", "one", fleet.postgres.url(), fleet.shared)
    double.start_cheap(fleet.ledger)
    until(lambda: "Another worker calls itself one" in double.says(), double.says)
    fleet.machines["one"].kill()
    until(lambda: "Waiting for jobs, as one" in double.says(), double.says)
    double.kill()


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
