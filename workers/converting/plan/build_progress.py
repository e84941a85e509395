"""TensorRT's phases within phases as one bar, and the way to stop a build.

Only loaded where TensorRT is, by `workers.converting.plan.build`.
"""

from __future__ import annotations

import threading
from typing import Any

from engines.nvidia.library import here
from workers.progress import Tick

trt: Any = here().load()


class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
    """TensorRT's phases within phases as one bar, and the way to stop a build.

    Called from several threads. An error of ours would be swallowed by the bindings: it is kept.
    """

    def __init__(self, tick: Tick, stop: threading.Event) -> None:
        trt.IProgressMonitor.__init__(self)
        self.problem: Exception | None = None
        self._tick, self._stop = tick, stop
        self._phases = Phases()
        self._lock = threading.Lock()
        self._percent = 0

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        with self._lock:
            self._phases.start(phase_name, parent_phase, num_steps)

    def step_complete(self, phase_name: str, step: int) -> bool:
        with self._lock:
            self._phases.step(phase_name, step)
            self._show(min(99, int(100 * self._phases.fraction())))
        return self.problem is None and not self._stop.is_set()

    def phase_finish(self, phase_name: str) -> None:
        with self._lock:
            self._phases.finish(phase_name)

    def end(self) -> None:
        """The build has succeeded."""
        self._show(100)

    def _show(self, percent: int) -> None:
        if percent <= self._percent or self.problem is not None:
            return
        self._percent = percent
        try:
            self._tick(percent, 100)
        except Exception as error:  # noqa: BLE001 (raised again by who waits for the build)
            self.problem = error


class Phases:
    """What share of a build is done: a phase that runs is a part of one step of its parent."""

    def __init__(self) -> None:
        self._running: dict[str, tuple[str | None, int, int]] = {}  # name -> parent, done, steps
        self._most = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> None:
        self._running[name] = (parent, 0, max(1, steps))

    def step(self, name: str, step: int) -> None:
        if name in self._running:
            parent, done, steps = self._running[name]
            self._running[name] = (parent, min(max(done, step + 1), steps), steps)

    def finish(self, name: str) -> None:
        self._running.pop(name, None)

    def fraction(self) -> float:
        """Never less than before."""
        roots = [name for name, (parent, _, _) in self._running.items() if parent is None]
        self._most = max([self._most, *(self._of(name) for name in roots)])
        return self._most

    def _of(self, name: str) -> float:
        _, done, steps = self._running[name]
        inner = [one for one, (parent, _, _) in self._running.items() if parent == name]
        return min(1.0, (done + max(map(self._of, inner), default=0.0)) / steps)
