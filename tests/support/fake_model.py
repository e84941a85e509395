"""A model whose score is given."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from engines.meta import Meta
from engines.runtimes import ALONE, Batches
from engines.serving.resident import Resident
from engines.verdict import Scale


class FakeRuntime:
    """A runtime that gives one score, and notes the threads that call it."""

    name = "fake"
    precision = "f32"
    image_size = 64
    bank_rows = None
    batches = ALONE
    batch_sizes = ()
    pads, worth = True, 0.9
    nbytes = 1

    def __init__(self, score: float) -> None:
        self.score = score
        self.threads: set[str] = set()

    def infer(self, images: Any, size: int | None = None) -> tuple[Any, Any]:
        self.threads.add(threading.current_thread().name)
        if self.score < 0:
            raise ZeroDivisionError("a secret")
        return np.full(len(images), self.score, np.float32), np.zeros((len(images), 8, 8), "f4")

    def prepare(self, size: int) -> None:
        raise AssertionError("nobody measures it")

    def take_together(self, batches: Batches) -> None:
        raise AssertionError("nobody measures it")

    def with_bank(self, bank: Any, precision: str) -> None:
        return None

    def close(self) -> None:
        pass


def fake_model(score: float) -> Resident:
    meta = Meta(model="vae", latent_dim=8, image_size=64)
    return Resident("fake", "0", meta, Scale(1.0, 0.0, 2.0, 0.5), FakeRuntime(score))
