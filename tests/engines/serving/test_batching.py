"""Parts that wait together run together, where that is faster. Engines here are clocks."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engines.errors import RuntimeFailed
from engines.runtimes import ALONE, Batches
from engines.serving.batching import Batcher, choose_batches
from engines.serving.opening import Opening, open_model

SIZE = 8  # side of an image


class Clock:
    """A runtime that takes `fixed_s` for each batch and `each_s` for each image in it.

    An image's score is its first pixel.
    """

    name, precision, image_size, bank_rows = "clock", "f32", SIZE, None
    pads, nbytes = True, 1

    def __init__(
        self,
        fixed_s: float = 0.0,
        each_s: float = 0.0,
        sizes: tuple[int, ...] = (4,),
        together_off: float = 0.0,
    ) -> None:
        self.batches, self.batch_sizes = ALONE, sizes
        self.ran: list[int] = []  # how many images at once
        self.scored: list[int] = []
        self.threads: set[str] = set()
        self.may_run = threading.Event()
        self.may_run.set()
        self.running = threading.Event()
        self._fixed, self._each, self._off = fixed_s, each_s, together_off

    def infer(self, images: NDArray[np.uint8]) -> tuple[Any, Any]:
        self.running.set()
        self.may_run.wait(10)
        self.threads.add(threading.current_thread().name)
        self.ran.append(len(images))
        time.sleep(self._fixed + self._each * len(images))
        scores = images[:, 0, 0, 0].astype(np.float32)
        self.scored += [int(score) for score in scores]
        if 255 in scores:
            raise RuntimeFailed("The clock stopped.")
        off = self._off if len(images) > 1 else 0.0
        return scores * (1 + off), np.repeat(scores, 4).reshape(-1, 2, 2)

    def take_together(self, batches: Batches) -> None:
        self.batches = batches

    def with_bank(self, bank: Any, precision: str) -> None:
        return None

    def close(self) -> None:
        pass


def part(number: int) -> NDArray[np.uint8]:
    return np.full((SIZE, SIZE, 3), number, np.uint8)


@pytest.fixture
def batcher() -> Iterator[Batcher]:
    found = Batcher()
    yield found
    found.close()


async def while_one_runs(batcher: Batcher, engine: Clock, *work: Any) -> list[Any]:
    """Begin all of `work` while the engine has part 0 in hand; then let it go on."""
    engine.may_run.clear()
    first = asyncio.ensure_future(batcher.infer(engine, part(0)))
    await asyncio.to_thread(engine.running.wait, 10)
    others = [asyncio.ensure_future(one) for one in work]
    await asyncio.sleep(0.05)
    engine.may_run.set()
    return await asyncio.gather(first, *others, return_exceptions=True)


def test_parts_that_wait_at_the_same_time_run_together(batcher: Batcher) -> None:
    engine = Clock()
    engine.take_together(Batches(4))
    sizes: list[int] = []
    batcher.on_batch = lambda model, size: sizes.append(size)
    waiting = [batcher.infer(engine, part(number)) for number in range(1, 8)]
    done = asyncio.run(while_one_runs(batcher, engine, *waiting))
    assert [one.result[0] for one in done] == list(range(8))  # each has its own score ...
    assert [one.result[1].tolist() for one in done] == [[[n, n], [n, n]] for n in range(8)]
    assert engine.ran == sizes == [1, 4, 3]
    assert engine.scored == list(range(8))  # ... in the order in which they came
    assert engine.threads == {"engine"}


def test_a_part_that_comes_alone_waits_for_no_other(batcher: Batcher) -> None:
    engine = Clock()
    engine.take_together(Batches(4))

    async def one_by_one() -> list[float]:
        return [(await batcher.infer(engine, part(1))).waited_ms for _ in range(50)]

    assert sorted(asyncio.run(one_by_one()))[25] < 5
    assert engine.ran == [1] * 50


def test_too_few_for_a_batch_that_pays_run_one_by_one(batcher: Batcher) -> None:
    engine = Clock()
    engine.take_together(Batches(4, least=3))
    waiting = [batcher.infer(engine, part(number)) for number in range(1, 7)]
    asyncio.run(while_one_runs(batcher, engine, *waiting))
    assert engine.ran == [1, 4, 1, 1]


def test_parts_of_several_models_never_run_in_one_batch(batcher: Batcher) -> None:
    one, other = Clock(), Clock()
    one.take_together(Batches(4))
    other.take_together(Batches(4))
    waiting = [
        batcher.infer(engine, part(10 * number + index))
        for number in (1, 2, 3)
        for index, engine in enumerate((one, other))
    ]
    done = asyncio.run(while_one_runs(batcher, one, *waiting))
    assert [ran.result[0] for ran in done] == [0, 10, 11, 20, 21, 30, 31]
    assert (one.ran, other.ran) == ([1, 3], [3])


def test_what_was_given_up_while_it_waited_is_not_computed(batcher: Batcher) -> None:
    engine = Clock()
    engine.take_together(Batches(4))

    async def give_up_two() -> None:
        engine.may_run.clear()
        first = asyncio.ensure_future(batcher.infer(engine, part(0)))
        await asyncio.to_thread(engine.running.wait, 10)
        others = [asyncio.ensure_future(batcher.infer(engine, part(n))) for n in (1, 2, 3, 4)]
        await asyncio.sleep(0.05)
        others[0].cancel()
        others[2].cancel()
        await asyncio.sleep(0.05)
        engine.may_run.set()
        await asyncio.gather(first, *others, return_exceptions=True)

    asyncio.run(give_up_two())
    assert engine.scored == [0, 2, 4]


def test_a_failure_reaches_all_of_its_batch_and_the_next_one_runs(batcher: Batcher) -> None:
    engine = Clock()
    engine.take_together(Batches(2))
    waiting = [batcher.infer(engine, part(number)) for number in (1, 255, 3, 4)]
    done = asyncio.run(while_one_runs(batcher, engine, *waiting))
    assert [isinstance(one, RuntimeFailed) for one in done] == [False, True, True, False, False]


def test_other_work_runs_in_the_same_thread_in_its_turn(batcher: Batcher) -> None:
    engine = Clock()
    name = batcher.call(lambda: (threading.current_thread().name, list(engine.scored)))
    done = asyncio.run(while_one_runs(batcher, engine, name, batcher.infer(engine, part(1))))
    assert done[1].result == ("engine", [0])


def test_closing_drops_what_waits_and_lets_what_runs_end() -> None:
    batcher, engine = Batcher(), Clock()

    async def close() -> list[Any]:
        engine.may_run.clear()
        asked = [asyncio.ensure_future(batcher.infer(engine, part(n))) for n in range(3)]
        await asyncio.to_thread(engine.running.wait, 10)
        closing = asyncio.ensure_future(asyncio.to_thread(batcher.close))
        await asyncio.sleep(0.05)
        engine.may_run.set()
        await closing
        return await asyncio.gather(*asked, return_exceptions=True)

    done = asyncio.run(close())
    assert done[0].result[0] == 0
    assert all(isinstance(one, asyncio.CancelledError) for one in done[1:])
    assert engine.scored == [0]
    assert "engine" not in [thread.name for thread in threading.enumerate()]


def test_time_is_split_into_waiting_and_working(batcher: Batcher) -> None:
    engine = Clock(fixed_s=0.02)
    done = asyncio.run(while_one_runs(batcher, engine, batcher.infer(engine, part(1))))[1]
    assert done.waited_ms > 40
    assert 19 < done.worked_ms < done.waited_ms + 40


# Is a batch faster?


def test_a_batch_is_kept_where_it_is_faster_and_from_how_many_on() -> None:
    engine = Clock(fixed_s=0.004, each_s=0.001)  # alone 5 ms, four together 8 ms
    choose_batches(engine)
    assert engine.batches == Batches(4, least=2)
    engine = Clock(fixed_s=0.002, each_s=0.004)  # alone 6 ms, four together 18 ms
    choose_batches(engine)
    assert engine.batches.size == 4
    assert engine.batches.least in (3, 4)


def test_the_size_that_is_fastest_for_each_image_is_kept() -> None:
    engine = Clock(fixed_s=0.01, each_s=0.0005, sizes=(2, 8, 4))
    choose_batches(engine)
    assert engine.batches.size == 8


def test_no_batch_is_kept_where_it_is_no_faster() -> None:
    engine = Clock(each_s=0.005)
    choose_batches(engine)
    assert engine.batches == ALONE


def test_no_batch_is_kept_where_it_scores_otherwise() -> None:
    engine = Clock(fixed_s=0.005, together_off=0.01)
    choose_batches(engine)
    assert engine.batches == ALONE


def test_an_image_that_takes_long_by_itself_is_not_tried_in_batches() -> None:
    engine = Clock(fixed_s=0.12)
    choose_batches(engine)
    assert (engine.batches, set(engine.ran)) == (ALONE, {1})


def test_a_runtime_that_offers_no_batches_is_left_alone() -> None:
    engine = Clock(sizes=())
    choose_batches(engine)
    assert engine.batches == ALONE


def test_what_was_measured_of_a_model_holds_for_its_next_version(
    kensa_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[Any] = []

    def choose(runtime: Any) -> None:
        chosen.append(runtime)
        runtime.take_together(Batches(2))

    monkeypatch.setattr("engines.serving.opening.choose_batches", choose)
    how = Opening("f32")
    first = open_model(kensa_model, "bracket", "0001", how)
    bank_alone = open_model(kensa_model, "bracket", "0002", how, beside=first)
    assert bank_alone.bank_alone
    other = kensa_model / "model.onnx"
    monkeypatch.setattr("engines.serving.opening.sha256", lambda path: f"another {path == other}")
    whole = open_model(kensa_model, "bracket", "0003", how, beside=first)
    assert not whole.bank_alone
    assert [one.runtime.batches for one in (first, bank_alone, whole)] == [Batches(2)] * 3
    assert chosen == [first.runtime]
    images = np.random.default_rng(0).integers(0, 255, (2, 256, 256, 3), np.uint8)
    for one in (first, bank_alone, whole):
        together = one.runtime.infer(images)[0]
        alone = np.concatenate([one.runtime.infer(image[None])[0] for image in images])
        np.testing.assert_allclose(together, alone, rtol=1e-3)
        one.runtime.close()


def test_batches_are_not_measured_where_they_are_switched_off(
    kensa_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.serving.opening.choose_batches", lambda _: pytest.fail("measured"))
    model = open_model(kensa_model, "bracket", "0001", Opening("f32", batching=False))
    assert model.runtime.batches == ALONE
