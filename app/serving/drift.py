"""`Drift`: how far the last parts of each model are from those that it learned from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from engines.camera import (
    LEAST,
    NAMES,
    SCORE,
    SIZES,
    STATISTICS,
    SURE,
    Learned,
    Statistic,
    Values,
)
from engines.serving.resident import Resident

SIZE = 1.0  # spreads of the training: what differs by less is left alone, however sure it is
OF_MEDIAN = 1.58  # variance of the median of many numbers, in that of their mean
WATCHED = tuple(name for name in (*NAMES, "score") if name not in SIZES)


@dataclass(frozen=True)
class Change:
    """A number of the last parts beside what it was in the training."""

    statistic: str
    now: float  # the median of the last parts
    learned: float  # the mean of the training
    spread: float  # its standard deviation
    parts: int
    matters: bool  # it is off by more than chance, and by enough

    @property
    def spreads(self) -> float:
        """How many standard deviations of the training it is off."""
        return (self.now - self.learned) / self.spread

    @property
    def sentence(self) -> str:
        """Such as: brightness 0.41 instead of 0.52 ± 0.02 over the last 200 parts."""
        of = _statistic(self.statistic, self.learned)
        now, was, spread = (of.form.format(one) for one in (self.now, self.learned, self.spread))
        usual = f"{was} ± {spread.lstrip('+')}"
        return f"{of.words} {now} instead of {usual} over the last {self.parts} parts"


class _Window:
    """The last parts of a version."""

    def __init__(self, version: str, parts: int) -> None:
        self.version = version
        self.values = np.full((parts, len(WATCHED)), np.nan)  # a ring
        self.came = 0

    def add(self, values: Values) -> None:
        self.values[self.came % len(self.values)] = values
        self.came += 1


class Drift:
    """Keeps the last parts of each model, as many as are asked for. In the event loop's thread."""

    def __init__(self, parts: int) -> None:
        """`parts`: 0 is never."""
        self.parts = parts
        self._windows: dict[str, _Window] = {}  # by model

    def count(self, model: Resident, values: Values | None, raw_score: float) -> None:
        """A part was inspected; `values` as `engines.camera` measures them."""
        if not self.parts or values is None:
            return
        window = self._windows.get(model.name)
        if window is None or window.version != model.version:
            window = self._windows[model.name] = _Window(model.version, self.parts)
        window.add(np.append(values, raw_score)[_PLACES])

    def forget(self, name: str) -> None:
        """Give back what is known of a model's last parts."""
        self._windows.pop(name, None)

    def changes(self, model: Resident) -> list[Change]:
        """What differs by more than chance, and by enough to matter."""
        return [one for one in self.look(model) if one.matters]

    def look(self, model: Resident) -> list[Change]:
        """Each number of which something can be said; none until enough parts came."""
        return [
            Change(
                name, now, known.mean, spread := max(known.spread, statistic.floor), self.parts,
                abs(now - known.mean)
                > max(known.stray(statistic, SURE, OF_MEDIAN / self.parts), SIZE * spread),
            )
            for name, now, known, statistic in self._compared(model)
        ]  # fmt: skip

    def _compared(self, model: Resident) -> Iterator[tuple[str, float, Learned, Statistic]]:
        """Each number that is known: its name, what it is now, what it was, and its like."""
        window, camera = self._windows.get(model.name), model.camera
        if camera is None or window is None or window.version != model.version:
            return
        if window.came < self.parts:
            return
        for name, values in zip(WATCHED, window.values.T, strict=True):
            known, told = camera.statistics.get(name), values[np.isfinite(values)]
            if known is None or known.count < LEAST or len(told) < self.parts / 2:
                continue
            if name in STATISTICS and name not in camera.limits:  # of which nobody can tell
                continue
            yield name, float(np.median(told)), known, _statistic(name, known.mean)


_PLACES = [(*NAMES, "score").index(name) for name in WATCHED]


def _statistic(name: str, mean: float) -> Statistic:
    if name == "score":  # in units of the model's own
        return SCORE._replace(floor=0.02 * abs(mean))
    return STATISTICS[name]
