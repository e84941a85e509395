"""A machine whose clock is moved by what runs on it, and a runtime for it: nothing takes time."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.errors import RuntimeFailed
from engines.runtimes import ALONE, Batches
from engines.serving.batch_trial import Stopwatch

SIZE = 8  # side of an image


class Machine:
    """Work moves its clock; where others have a share of the CPU, by more."""

    def __init__(self) -> None:
        self.now = 0.0
        self.others = 0.0  # of each second
        self.hidden = 0.0  # the same, by what no counter of the CPU shows, such as on a GPU
        self._waited_ns = 0
        self.watch = Stopwatch(lambda: self.now, lambda: {"1": self._waited_ns})

    def works(self, seconds: float) -> None:
        waits = seconds * self.others
        self._waited_ns += round(waits * 1e9)
        self.now += seconds + waits + seconds * self.hidden


class Timed:
    """A runtime that takes `fixed_s` for each batch and `each_s` for each image in it.

    An image's score is its first pixel.
    """

    name, precision, image_size, bank_rows = "timed", "f32", SIZE, None
    pads, worth, nbytes = True, 0.9, 1

    def __init__(
        self,
        fixed_s: float = 0.0,
        each_s: float = 0.0,
        sizes: tuple[int, ...] = (4,),
        together_off: float = 0.0,
        machine: Machine | None = None,
    ) -> None:
        self.machine = machine or Machine()
        self.batches, self.batch_sizes = ALONE, sizes
        self.prepared: int | None = None
        self.ran: list[int] = []  # how many images at once
        self.scored: list[int] = []
        self.threads: set[str] = set()
        self.prepared_by: set[str] = set()
        self.may_run = threading.Event()
        self.may_run.set()
        self.running = threading.Event()
        self.closed = False
        self._fixed, self._each, self._off = fixed_s, each_s, together_off

    def infer(self, images: NDArray[np.uint8], size: int | None = None) -> tuple[Any, Any]:
        assert not self.closed
        assert size in (None, 1, self.batches.size, self.prepared)
        self.running.set()
        self.may_run.wait(10)
        self.threads.add(threading.current_thread().name)
        self.ran.append(len(images))
        self.machine.works(self._fixed + self._each * len(images))
        scores = images[:, 0, 0, 0].astype(np.float32)
        self.scored += [int(score) for score in scores]
        if 255 in scores:
            raise RuntimeFailed("The clock stopped.")
        off = self._off if len(images) > 1 else 0.0
        return scores * (1 + off), np.repeat(scores, 4).reshape(-1, 2, 2)

    def prepare(self, size: int) -> None:
        assert not self.closed
        self.prepared_by.add(threading.current_thread().name)
        self.prepared = size

    def take_together(self, batches: Batches) -> None:
        self.batches, self.prepared = batches, None

    def with_bank(self, bank: Any, precision: str) -> None:
        return None

    def close(self) -> None:
        self.closed = True
