"""What the Open Inference Protocol calls statistics: how many images, and where the time went."""

from __future__ import annotations

import time
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from engines.serving.resident import Resident

if TYPE_CHECKING:
    from app.serving.inspection import Inspection


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


class Statistics:
    """Counters for each version in memory; those of a version that is closed go with it."""

    def __init__(self) -> None:
        self._counted: WeakKeyDictionary[Resident, Counted] = WeakKeyDictionary()

    def of(self, model: Resident) -> Counted:
        return self._counted.setdefault(model, Counted())

    async def count(self, model: Resident, inspecting: Awaitable[Inspection]) -> Inspection:
        """Wait for an inspection, and count it whether it succeeds or not."""
        counted, began = self.of(model), time.perf_counter()
        try:
            inspection = await inspecting
        except Exception:
            counted.fail.add((time.perf_counter() - began) * 1000)
            raise
        timing = inspection.timing
        counted.success.add(timing.total_ms)
        counted.queue.add(timing.queue_ms)
        counted.compute_input.add(timing.decode_ms)
        counted.compute_infer.add(timing.infer_ms)
        rest = timing.total_ms - timing.queue_ms - timing.decode_ms - timing.infer_ms
        counted.compute_output.add(rest)
        counted.last_inference = int(time.time() * 1000)
        return inspection
