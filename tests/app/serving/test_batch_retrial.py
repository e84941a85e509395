"""A batch size that was chosen while the machine was busy is looked at again, behind the line.

Clocks are moved by the tests.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import weakref
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from app.main import create_app
from app.serving import batch_retrial
from app.serving.batch_retrial import PAUSES_S, BatchRetrial
from app.serving.inspection import Inspector
from app.settings import Settings
from engines.errors import RuntimeFailed
from engines.meta import Meta
from engines.runtimes import ALONE, Batches
from engines.serving.batch_trial import Stopwatch
from engines.serving.resident import Resident
from engines.verdict import Scale
from support.timed_runtime import Machine, Timed

PAYS = {"fixed_s": 1 / 256, "each_s": 1 / 1024}  # four at once take 8, and not 20
FOUND = Batches(4, least=2)
STEPS = 2 + 1 + 6 * 5  # two images, to prepare, and six times a batch and its four images
FOR_NOW = replace(ALONE, provisional=True)


class Place:
    """An inspector with models whose engines take time by a clock, and the loader's thread."""

    def __init__(self, folder: Path) -> None:
        self.machine = Machine()
        self.inspector = Inspector(Settings(data_dir=folder))
        self.residents = self.inspector.residents
        self.loader = ThreadPoolExecutor(1, "loader")
        self.promised = False
        self.before_a_step: Callable[[], None] = lambda: None
        self.gaps: list[int] = []  # how many images each of them took
        self.in_a_gap = self.inspector.in_a_gap
        self.inspector.in_a_gap = self._in_a_gap  # type: ignore[method-assign]
        self.looks = BatchRetrial(
            self.inspector,
            self.load,
            lambda: not self.promised,
            lambda: self.machine.now,
            self.machine.watch,
        )

    async def _in_a_gap(self, work: Callable[[], Any]) -> Any:
        ran = [one.runtime.ran for one in self.residents.all()]
        before = sum(map(len, ran))
        self.before_a_step()
        done = await self.in_a_gap(work)
        self.gaps.append(sum(map(len, ran)) - before)
        return done

    async def load(self, work: Callable[[], Any]) -> Any:
        self.before_a_step()
        return await asyncio.get_running_loop().run_in_executor(self.loader, work)

    def model(self, name: str = "part", batches: Batches = FOR_NOW, **how: Any) -> Timed:
        """A resident version; returns its engine."""
        engine = Timed(machine=self.machine, **{**PAYS, **how})
        engine.batches = batches
        meta = Meta(model="vae", latent_dim=8, image_size=32)
        scale = Scale(1.0, 0.0, 2.0, 0.5)
        self.residents.put(Resident(name, "0001", meta, scale, engine))
        return engine

    async def close(self, name: str = "part") -> None:
        """Take a model away as the model manager does."""
        model = self.residents.take(name, "It has gone.")
        assert model is not None
        await self.residents.until_unused(model)
        await self.inspector.batcher.call(lambda: None)
        await asyncio.get_running_loop().run_in_executor(self.loader, model.runtime.close)

    async def look_when_due(self) -> None:
        """See what is there, let the longest pause pass, and look."""
        await self.looks.look()
        self.machine.now += max(PAUSES_S)
        await self.looks.look()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@asynccontextmanager
async def closed(place: Place) -> AsyncIterator[None]:
    try:
        yield
    finally:
        await place.inspector.close()
        place.loader.shutdown()


def look_when_due(place: Place) -> None:
    async def look() -> None:
        async with closed(place):
            await place.look_when_due()

    asyncio.run(look())


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_on_a_quiet_machine_it_is_decided_and_one_line_says_what_changed(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    engine = place.model()
    with caplog.at_level(logging.INFO, "kensa"):
        look_when_due(place)
    assert engine.batches == FOUND
    (line,) = lines(caplog)
    assert "part 0001: up to 4 at once from now on" in line
    assert "it was one at a time until batches could be tried in peace" in line


def test_what_was_right_stays_without_a_line(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    engine = place.model(batches=replace(FOUND, provisional=True))
    with caplog.at_level(logging.INFO, "kensa"):
        look_when_due(place)
    assert engine.batches == FOUND
    assert not lines(caplog)


def test_what_was_timed_on_a_quiet_machine_is_not_looked_at_again(place: Place) -> None:
    """Nor what was never tried, because KENSA_BATCHING is off."""
    engine, other = place.model(batches=ALONE), place.model("other", batches=FOUND)
    look_when_due(place)
    assert engine.ran == other.ran == []


def test_each_gap_of_the_line_takes_one_image_or_one_batch(place: Place) -> None:
    engine = place.model()
    look_when_due(place)
    assert set(place.gaps) == {1}
    assert len(place.gaps) == len(engine.ran) == STEPS - 1
    assert engine.threads == {"engine"}


def test_a_batch_is_made_ready_outside_of_the_engines_thread(place: Place) -> None:
    engine = place.model()
    look_when_due(place)
    assert {name.split("_")[0] for name in engine.prepared_by} == {"loader"}
    assert engine.prepared is None  # and what is not kept is given back


def test_a_part_that_comes_meanwhile_waits_for_one_step_at_most(place: Place) -> None:
    engine = place.model()
    order: list[str] = []

    async def part() -> None:
        await place.inspector.batcher.call(lambda: order.append("part"))

    async def look() -> None:
        async with closed(place):
            parts: list[asyncio.Task[None]] = []

            def step() -> None:
                order.append("step")
                if order.count("step") % 10 == 5:
                    order.append("asks")
                    parts.append(asyncio.ensure_future(part()))

            place.before_a_step = step
            await place.look_when_due()
            await asyncio.gather(*parts)

    asyncio.run(look())
    asked = [at for at, one in enumerate(order) if one == "asks"]
    assert len(asked) == 3
    for at in asked:  # the step before it, or at most one more
        assert "part" in order[at + 1 : at + 3]
    assert engine.batches == FOUND


def test_while_the_machine_stays_busy_what_the_first_look_found_stays_and_the_pauses_grow(
    place: Place,
) -> None:
    engine = place.model()
    place.machine.others = 1.0
    looked: list[float] = []

    async def look() -> None:
        async with closed(place):
            while place.machine.now < 2 * sum(PAUSES_S):
                before, now = len(engine.ran), place.machine.now
                await place.looks.look()
                if len(engine.ran) > before:
                    looked.append(now)
                place.machine.now += 5

    asyncio.run(look())
    assert engine.batches == replace(FOUND, provisional=True)
    assert engine.prepared is None
    assert len(looked) == len(PAUSES_S)  # and no more
    pauses = [later - one for one, later in zip([0.0, *looked], looked, strict=False)]
    for pause, expected in zip(pauses, PAUSES_S, strict=True):
        assert expected <= pause <= expected + 10
    assert list(PAUSES_S) == sorted(PAUSES_S)


def test_it_ends_with_the_first_quiet_trial(place: Place) -> None:
    engine = place.model()
    place.machine.others = 1.0

    async def look() -> None:
        async with closed(place):
            await place.look_when_due()
            place.machine.others, place.machine.now = 0.0, place.machine.now + 1e6
            await place.looks.look()
            assert engine.batches == FOUND
            before = len(engine.ran)
            await place.look_when_due()
            assert len(engine.ran) == before

    asyncio.run(look())


def test_the_next_version_has_looks_of_its_own(place: Place) -> None:
    """It takes over what is provisional, also where the one before was looked at often enough."""
    place.machine.others = 1.0
    place.model()

    async def look() -> None:
        async with closed(place):
            for _ in range(2 * len(PAUSES_S)):
                await place.look_when_due()
            place.machine.others = 0.0
            await place.look_when_due()
            (model,) = place.residents.all()
            assert model.runtime.batches == replace(FOUND, provisional=True)
            engine = place.model()
            await place.look_when_due()
            assert engine.batches == FOUND

    asyncio.run(look())


@pytest.mark.parametrize("at", range(STEPS + 2))
def test_a_version_that_goes_at_whatever_step_is_never_touched_again(place: Place, at: int) -> None:
    """An engine here fails the test where it is called after it was closed."""
    engine = place.model()
    gone = weakref.ref(place.residents.get("part"))
    steps = 0

    async def look() -> None:
        async with closed(place):
            closing: list[asyncio.Task[None]] = []

            def step() -> None:
                nonlocal steps
                if steps == at:
                    closing.append(asyncio.ensure_future(place.close()))
                steps += 1

            place.before_a_step = step
            await place.look_when_due()
            await asyncio.gather(*closing)
            assert engine.closed == (at < STEPS + 1)

    asyncio.run(look())
    assert steps <= at + 2
    place.inspector.residents.problems.clear()
    if at < STEPS + 1:
        gc.collect()
        assert gone() is None  # nor is it remembered


def test_no_batch_is_prepared_where_memory_was_promised_since_the_look_began(place: Place) -> None:
    engine = place.model()

    def promise() -> None:
        place.promised = len(engine.ran) == 2  # to prepare a batch comes next

    async def look() -> None:
        async with closed(place):
            place.before_a_step = promise
            in_a_gap = place.inspector.in_a_gap

            async def gap(work: Callable[[], Any]) -> Any:
                done = await in_a_gap(work)
                promise()
                return done

            place.inspector.in_a_gap = gap  # type: ignore[method-assign]
            await place.look_when_due()
            assert (len(engine.ran), engine.prepared_by) == (2, set())
            assert engine.batches == FOR_NOW

    asyncio.run(look())


def test_nothing_is_tried_while_memory_is_promised_or_short(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = place.model()

    async def look() -> None:
        async with closed(place):
            place.promised = True
            await place.look_when_due()
            place.promised = False
            with monkeypatch.context() as patched:
                patched.setattr(batch_retrial, "free_bytes", lambda: 2 * engine.nbytes)
                await place.look_when_due()
            assert (engine.ran, engine.prepared_by) == ([], set())
            for _ in PAUSES_S:  # nor does that count as a look
                place.promised = True
                await place.look_when_due()
            place.promised = False
            await place.look_when_due()
            assert engine.batches == FOUND

    asyncio.run(look())


def test_a_runtime_that_fails_keeps_what_it_has_and_others_are_looked_at(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    known, unknown, fine = place.model("a"), place.model("b"), place.model("c")

    def broken(error: Exception, infer: Any, *what: Any) -> Any:
        if len(what) > 1:
            raise error
        return infer(*what)

    for engine, error in ((known, RuntimeFailed("It gave up.")), (unknown, ValueError("a bug"))):
        engine.infer = partial(broken, error, engine.infer)  # type: ignore[method-assign]
    look_when_due(place)
    assert [one.batches for one in (known, unknown, fine)] == [FOR_NOW, FOR_NOW, FOUND]
    assert known.prepared is unknown.prepared is None  # it is given back
    warning, bug = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "a 0001: batches cannot be tried: It gave up." in warning.getMessage()
    assert (bug.getMessage(), bug.exc_info is not None) == ("b 0001: batches cannot be tried", True)


def test_a_server_that_was_started_on_a_busy_machine_looks_again_by_itself(
    kensa_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the real runtime. Whatever is timed takes as long, so several at once are faster."""
    calls = iter(range(10**6))
    even = Stopwatch(lambda: float(next(calls)) / 1024, dict)
    monkeypatch.setattr(
        "engines.serving.opening.choose_batches", lambda one: one.take_together(FOR_NOW)
    )
    monkeypatch.setattr("app.serving.rollout.BatchRetrial", partial(BatchRetrial, watch=even))
    monkeypatch.setattr(batch_retrial, "EVERY_S", 0.01)
    monkeypatch.setattr(batch_retrial, "PAUSES_S", (0.0,))
    app = create_app(Settings(data_dir=tmp_path, worker="off", model_dir=kensa_model))
    sizes: list[int] = []

    async def serve() -> Batches:
        async with app.router.lifespan_context(app):
            (model,) = app.state.inspector.residents.all()
            sizes.extend(model.runtime.batch_sizes)
            for _ in range(3000):
                if not model.runtime.batches.provisional:
                    break
                await asyncio.sleep(0.02)
            found: Batches = model.runtime.batches
            return found

    found = asyncio.run(serve())
    assert found == (Batches(sizes[-1], least=2) if sizes else ALONE)  # ALONE on one core
    assert not [one for one in threading.enumerate() if one.name == "engine"]
