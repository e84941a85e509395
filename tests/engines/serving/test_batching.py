"""Parts that wait together run together, where that is faster."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engines.errors import RuntimeFailed
from engines.runtimes import Batches
from engines.serving.batching import Batcher
from support.timed_runtime import SIZE, Machine, Timed


def part(number: int) -> NDArray[np.uint8]:
    return np.full((SIZE, SIZE, 3), number, np.uint8)


@pytest.fixture
def batcher() -> Iterator[Batcher]:
    found = Batcher()
    yield found
    found.close()


async def while_one_runs(batcher: Batcher, engine: Timed, *work: Any) -> list[Any]:
    """Begin all of `work` while the engine has part 0 in hand; then let it go on."""
    engine.may_run.clear()
    first = asyncio.ensure_future(batcher.infer(engine, part(0)))
    await asyncio.to_thread(engine.running.wait, 10)
    others = [asyncio.ensure_future(one) for one in work]
    await asyncio.sleep(0)  # by now each of them waits
    engine.may_run.set()
    return await asyncio.gather(first, *others, return_exceptions=True)


def test_parts_that_wait_at_the_same_time_run_together(batcher: Batcher) -> None:
    engine = Timed()
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


def test_a_part_that_comes_alone_waits_for_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread waits for work, and never for a while."""
    limits: list[float | None] = []

    class Condition(threading.Condition):
        def wait(self, timeout: float | None = None) -> bool:
            limits.append(timeout)
            return super().wait(timeout)

    monkeypatch.setattr(threading, "Condition", Condition)
    monkeypatch.setattr(time, "sleep", lambda seconds: limits.append(seconds))
    batcher, engine = Batcher(), Timed()
    engine.take_together(Batches(4))

    async def one_by_one() -> None:
        for _ in range(50):
            await batcher.infer(engine, part(1))

    asyncio.run(one_by_one())
    batcher.close()
    assert engine.ran == [1] * 50
    assert limits
    assert set(limits) == {None}


def test_too_few_for_a_batch_that_pays_run_one_by_one(batcher: Batcher) -> None:
    engine = Timed()
    engine.take_together(Batches(4, least=3))
    waiting = [batcher.infer(engine, part(number)) for number in range(1, 7)]
    asyncio.run(while_one_runs(batcher, engine, *waiting))
    assert engine.ran == [1, 4, 1, 1]


def test_parts_of_several_models_never_run_in_one_batch(batcher: Batcher) -> None:
    one, other = Timed(), Timed()
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
    engine = Timed()
    engine.take_together(Batches(4))

    async def give_up_two() -> None:
        engine.may_run.clear()
        first = asyncio.ensure_future(batcher.infer(engine, part(0)))
        await asyncio.to_thread(engine.running.wait, 10)
        others = [asyncio.ensure_future(batcher.infer(engine, part(n))) for n in (1, 2, 3, 4)]
        await asyncio.sleep(0)
        others[0].cancel()
        others[2].cancel()
        await asyncio.sleep(0)
        engine.may_run.set()
        await asyncio.gather(first, *others, return_exceptions=True)

    asyncio.run(give_up_two())
    assert engine.scored == [0, 2, 4]


def test_a_failure_reaches_all_of_its_batch_and_the_next_one_runs(batcher: Batcher) -> None:
    engine = Timed()
    engine.take_together(Batches(2))
    waiting = [batcher.infer(engine, part(number)) for number in (1, 255, 3, 4)]
    done = asyncio.run(while_one_runs(batcher, engine, *waiting))
    assert [isinstance(one, RuntimeFailed) for one in done] == [False, True, True, False, False]


def test_other_work_runs_in_the_same_thread_in_its_turn(batcher: Batcher) -> None:
    engine = Timed()
    name = batcher.call(lambda: (threading.current_thread().name, list(engine.scored)))
    done = asyncio.run(while_one_runs(batcher, engine, name, batcher.infer(engine, part(1))))
    assert done[1].result == ("engine", [0])


def test_closing_drops_what_waits_and_lets_what_runs_end() -> None:
    batcher, engine = Batcher(), Timed()

    async def close() -> list[Any]:
        engine.may_run.clear()
        asked = [asyncio.ensure_future(batcher.infer(engine, part(n))) for n in range(3)]
        await asyncio.to_thread(engine.running.wait, 10)
        closing = asyncio.ensure_future(asyncio.to_thread(batcher.close))
        for _ in range(3000):
            if all(one.done() for one in asked[1:]):
                break
            await asyncio.sleep(0.01)
        engine.may_run.set()
        await closing
        return await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 30)

    done = asyncio.run(close())
    assert done[0].result[0] == 0
    assert all(isinstance(one, asyncio.CancelledError) for one in done[1:])
    assert engine.scored == [0]
    assert "engine" not in [thread.name for thread in threading.enumerate()]


def test_time_is_split_into_waiting_and_working() -> None:
    machine = Machine()
    batcher, engine = Batcher(lambda: machine.now), Timed(fixed_s=0.02, machine=machine)
    first, second = asyncio.run(while_one_runs(batcher, engine, batcher.infer(engine, part(1))))
    batcher.close()
    assert (first.waited_ms, first.worked_ms) == (0, pytest.approx(20))
    assert (second.waited_ms, second.worked_ms) == (pytest.approx(20), pytest.approx(20))
