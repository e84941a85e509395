"""k-centre greedy: the few rows that cover all others (arXiv:1708.00489), exactly and fast."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

# Of the projection that rules most rows out; more costs more than it rules out. With the length of
# the rest it is two cache lines, of which thousands are read at each step.
DIMENSIONS = 31
ROUNDING = 1e-6  # of the largest squared length: equal rows may seem that far apart in float32

Report = Callable[[int, int], None]  # rows chosen, rows to choose at the most
F = TypeVar("F", bound=Callable[..., Any])


class Coreset(NamedTuple):
    """What was chosen of n rows."""

    chosen: torch.Tensor  # (k,) indices, in the order of choice
    radius: float  # the largest distance of any row to the chosen (and known) ones
    owners: torch.Tensor  # (n,) which of the k is nearest; -1: what is known already


def _one_thread(function: F) -> F:
    """Run on one thread: thousands of small steps, each shorter than it takes to share it.

    On an idle machine a second thread wins nothing. Beside an inference server it made the loop
    seven times slower, by waiting at each step for a core that was busy.
    """

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return function(*args, **kwargs)
        finally:
            torch.set_num_threads(threads)

    return wrapper  # type: ignore[return-value]


@_one_thread
def k_centre_greedy(
    rows: torch.Tensor,
    count: int,
    *,
    covered_to: torch.Tensor | None = None,
    stop_radius: float = 0.0,
    report: Report = lambda done, total: None,
) -> Coreset:
    """Choose rows, each the one farthest from all chosen before it.

    The result is that of the plain greedy loop over all columns. Only its cost differs: most rows
    are seen to be no nearer to the newest centre than to an older one, and only the others are
    measured in full. First by the triangle: a row cannot come nearer than it is to its own centre,
    when that one lies twice as far from the newest. Then by a sketch: rows are rotated onto their
    principal axes, where the distance over the first few axes and the length of the rest bound the
    true distance from below.

    Args:
        rows: (n, c) float32.
        count: how many rows to choose at the most.
        covered_to: (n,) distance of each row to what is known already; without it the row nearest
            to the mean comes first.
        stop_radius: stop as soon as no row is farther away than this.
        report: called now and then with (chosen, count).
    """
    count = min(count, len(rows))
    rows = rows - rows.mean(dim=0)
    square = rows.square().sum(dim=1)  # (n,)
    cover = _Cover(rows, square, count, covered_to)
    noise = ROUNDING * float(square.max())
    while len(cover.chosen) < count and cover.farthest() > max(stop_radius**2, noise):
        cover.add_the_farthest()
        if len(cover.chosen) % 64 == 0 and len(cover.chosen) < count:
            report(len(cover.chosen), count)
    report(len(cover.chosen), len(cover.chosen))
    farthest = cover.farthest()
    chosen = torch.tensor(cover.chosen, dtype=torch.long)
    radius = math.sqrt(farthest) if farthest > noise else 0.0
    return Coreset(chosen, radius, torch.from_numpy(cover.owners))


class _Cover:
    """The chosen rows, and how far every row lies from them.

    Steps over all rows are numpy's: torch takes several times as long for such short ones.
    """

    def __init__(
        self,
        rows: torch.Tensor,
        square: torch.Tensor,
        count: int,
        covered_to: torch.Tensor | None,
    ) -> None:
        self.chosen: list[int] = []
        self._rows, self._square = rows, square.numpy()  # centred
        sketch = _sketch(rows, square)  # (n, DIMENSIONS + 1), with the same lengths as rows
        self._sketch = sketch
        self._centres = torch.empty(count, sketch.shape[1])  # sketches of the chosen
        self._lengths = np.empty(count, np.float32)  # of them, squared
        # Of each row: the squared distance to the chosen rows, and which of them is nearest; -1 for
        # what was known before, of which nothing but the distance is here.
        self.owners = np.full(len(rows), -1)
        if covered_to is None:
            self._nearest = np.full(len(rows), np.inf, np.float32)
            self._next = int(self._square.argmin())
        else:
            self._nearest = covered_to.square().numpy()
            self._next = int(self._nearest.argmax())

    def farthest(self) -> float:
        """The largest squared distance of any row."""
        return float(self._nearest[self._next])

    def add_the_farthest(self) -> None:
        """Choose it."""
        number, centre = len(self.chosen), self._next
        among = self._that_may_be_nearer(centre)
        self.chosen.append(centre)
        self._centres[number] = self._sketch[centre]
        self._lengths[number] = self._square[centre]
        closer = among[self._from_below(centre, among) < self._nearest[among]]
        products = torch.from_numpy(self._rows.numpy().take(closer, axis=0)) @ self._rows[centre]
        exact = self._square[closer] + self._square[centre] - 2 * products.numpy()
        nearer = exact < self._nearest[closer]
        won = closer[nearer]
        self._nearest[won] = np.maximum(exact[nearer], 0)
        self.owners[won] = number
        self._nearest[centre] = 0
        self._next = int(self._nearest.argmax())

    def _that_may_be_nearer(self, centre: int) -> NDArray[np.int64]:
        """The rows whose own centre is not twice as far from the newest one as they are from it."""
        count = len(self.chosen)
        if count == 0:
            return np.arange(len(self._rows))
        # A quarter of the squared distance of each centre; nothing is known of the last, owner -1.
        quarter = np.zeros(count + 1, np.float32)
        quarter[:count] = torch.mv(self._centres[:count], self._sketch[centre]).numpy()
        quarter[:count] *= -2
        quarter[:count] += self._lengths[:count] + self._square[centre]
        quarter *= 0.25
        return np.flatnonzero(quarter.take(self.owners, mode="wrap") < self._nearest)

    def _from_below(self, centre: int, among: NDArray[np.int64]) -> NDArray[np.float32]:
        """No more than the squared distances of some rows (k,) to another one."""
        sketch = self._sketch
        if len(among) < len(sketch):  # numpy takes rows in less time than torch
            sketch = torch.from_numpy(sketch.numpy().take(among, axis=0))
        bound: NDArray[np.float32] = torch.mv(sketch, self._sketch[centre]).numpy()
        bound *= -2
        bound += self._square[among]
        bound += self._square[centre]
        return bound


def _sketch(rows: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
    """The first principal coordinates of centred rows, and the length of what they leave out."""
    axes = torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -DIMENSIONS:]  # (c, DIMENSIONS)
    head = rows @ axes
    rest = (square - head.square().sum(dim=1)).clamp_min(0).sqrt()
    return torch.cat([head, rest[:, None]], dim=1).contiguous()
