"""How many images a version saw, and where the time went: what GET /v2/models/stats says."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from engines.serving.resident import Resident


@dataclass(frozen=True)
class Timing:
    """Where the time of one inspection went, milliseconds."""

    queue_ms: float
    decode_ms: float
    infer_ms: float
    total_ms: float


@dataclass
class Duration:
    """So many times something was done, and the nanoseconds that it took in all."""

    count: int = 0
    ns: int = 0

    def add(self, ms: float) -> None:
        self.count += 1
        self.ns += max(0, round(ms * 1e6))


@dataclass
class Counted:
    """The images that a version saw since it was loaded. Failed ones are only in `fail`."""

    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    compute_input: Duration = field(default_factory=Duration)  # decoding, resizing
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)  # judging, drawing, and the rest
    last_inference: int = 0  # milliseconds since 1970

    def add(self, timing: Timing) -> None:
        """Count an image that got its verdict."""
        self.success.add(timing.total_ms)
        self.queue.add(timing.queue_ms)
        self.compute_input.add(timing.decode_ms)
        self.compute_infer.add(timing.infer_ms)
        rest = timing.total_ms - timing.queue_ms - timing.decode_ms - timing.infer_ms
        self.compute_output.add(rest)
        self.last_inference = int(time.time() * 1000)


class InferenceStatistics:
    """Counters for each version in memory; those of a version that is closed go with it."""

    def __init__(self) -> None:
        self._counted: WeakKeyDictionary[Resident, Counted] = WeakKeyDictionary()

    def of(self, model: Resident) -> Counted:
        return self._counted.setdefault(model, Counted())
