"""Whether images together are faster than one by one, timed where a model runs.

On two cores of an EPYC four images at once take 0.65 of the time with PaDiM, and two of PatchCore
side by side 0.92 to 0.98.

A trial is a row of steps, each no longer than one call of `infer`. When a model is opened they
follow each other (`choose_batches`). Where other work had the CPU meanwhile, the outcome is
provisional, and `app.serving.batch_retrial` takes the same steps again in gaps of the line.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.machine.cpu_delay import cpu_delays, longest_s
from engines.runtimes import ALONE, Batches, Runtime

ROUNDS = 5  # of the measurement, fewer where images take long
PATIENCE_S = 0.5  # of work, after which no further round begins
LONG_S = 0.1  # an image that takes this long has work enough for all cores by itself
AGREE = 1e-3  # by how much scores in a batch may differ from scores alone, relative
QUIET = 0.1  # of its time a thread may have waited for a CPU: alone at most 0.03, beside others 0.4
STEADY = 1.25  # the middle one of several times by the least: a GPU that others use, stolen time


@dataclass(frozen=True)
class Took:
    """How long work took, and the longest that one of its threads had no CPU meanwhile, seconds."""

    seconds: float
    delayed_s: float

    def __add__(self, other: Took) -> Took:
        return Took(self.seconds + other.seconds, self.delayed_s + other.delayed_s)

    @property
    def quiet(self) -> bool:
        """Whether nobody else was at work."""
        return self.delayed_s <= QUIET * self.seconds


@dataclass(frozen=True)
class Stopwatch:
    """Times work."""

    clock: Callable[[], float] = time.perf_counter
    delays: Callable[[], Mapping[str, int]] = cpu_delays

    def time(self, work: Callable[[], Any]) -> Took:
        before, began = self.delays(), self.clock()
        work()
        took = self.clock() - began
        return Took(took, longest_s(before, self.delays()))


STOPWATCH = Stopwatch()


@dataclass(frozen=True)
class Step:
    """A piece of a trial, for the thread that calls `infer`."""

    work: Callable[[], object]
    beside: bool = False  # takes seconds, and may be done by another thread meanwhile


def choose_batches(runtime: Runtime, watch: Stopwatch = STOPWATCH) -> None:
    """Run images together and one by one, and let the runtime keep what is faster.

    Raises:
        RuntimeFailed: the device gave up.
    """
    trial = Trial(runtime, watch)
    for step in trial.steps():
        step.work()
    runtime.take_together(trial.found)


class Trial:
    """Finds out how many images a runtime had best be given at once."""

    def __init__(self, runtime: Runtime, watch: Stopwatch = STOPWATCH) -> None:
        self._runtime, self._watch = runtime, watch
        self.found = replace(ALONE, provisional=True)  # until the last step has been done

    def steps(self) -> Iterator[Step]:
        """What is to be done, each before the next one is asked for.

        Where the runtime pads, a batch costs the same with any number of images in it, and pays
        from `least` on. Scores must be the same to `AGREE`: in bf16 another batch size may be
        another order of sums.
        """
        runtime, watch, took = self._runtime, self._watch, list[Took]()
        image = _noise(1, runtime.image_size)
        for _ in range(2):
            yield Step(lambda: took.append(watch.time(lambda: runtime.infer(image))))
        fastest = min(took, key=lambda one: one.seconds)
        if fastest.seconds > LONG_S:
            self.found = replace(ALONE, provisional=not fastest.quiet)
            return
        best, share, certain = ALONE, runtime.worth, True
        for size in runtime.batch_sizes:
            yield Step(partial(runtime.prepare, size), beside=True)
            taken, sure = yield from _share(runtime, size, watch)
            certain = certain and sure
            if taken < share:
                # From here on one more image alone takes longer than the whole batch.
                least = min(size, max(2, math.ceil(taken * size))) if runtime.pads else 2
                best, share = Batches(size, least), taken
        self.found = replace(best, provisional=not certain)


def _share(
    runtime: Runtime, size: int, watch: Stopwatch
) -> Generator[Step, None, tuple[float, bool]]:
    """The time of a batch by that of its images one by one, and whether that is certain.

    The share is infinity where scores differ.
    """
    images = _noise(size, runtime.image_size)
    together, alone = list[float](), list[float]()
    yield Step(lambda: together.extend(runtime.infer(images, size)[0]))
    for image in images:
        one = partial(runtime.infer, image[None])
        yield Step(lambda: alone.extend(one()[0]))  # noqa: B023 (done before the next one)
    if not np.allclose(together, alone, AGREE, 0):
        return math.inf, True
    rounds: list[tuple[Took, Took]] = []
    while len(rounds) < ROUNDS and sum(a.seconds + b.seconds for a, b in rounds) < PATIENCE_S:
        rounds.append((yield from _round(runtime, images, watch)))
    return weigh(rounds)


def _round(
    runtime: Runtime, images: NDArray[np.uint8], watch: Stopwatch
) -> Generator[Step, None, tuple[Took, Took]]:
    """What the images take together, and what they take one by one."""
    took: list[Took] = []
    together = partial(runtime.infer, images, len(images))
    for work in (together, *(partial(runtime.infer, image[None]) for image in images)):
        yield Step(lambda: took.append(watch.time(work)))  # noqa: B023 (done before the next one)
    first, *others = took
    return first, sum(others, Took(0.0, 0.0))


def weigh(rounds: Sequence[tuple[Took, Took]]) -> tuple[float, bool]:
    """The share of the time of a batch, and whether it is certain.

    It is where most rounds were quiet and about as long as each other; only those are counted then.
    """
    quiet = [(together, alone) for together, alone in rounds if (together + alone).quiet]
    most = 2 * len(quiet) > len(rounds)
    together, alone = zip(*(quiet if most else rounds), strict=True)
    return _least(together) / _least(alone), most and _steady(together) and _steady(alone)


def _least(times: Sequence[Took]) -> float:
    return min(took.seconds for took in times)


def _steady(times: Sequence[Took]) -> bool:
    return statistics.median(took.seconds for took in times) <= STEADY * _least(times)


def _noise(count: int, side: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)
