"""k-centre greedy: the few rows that cover all others (arXiv:1708.00489), exactly and fast."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

DIMENSIONS = 31  # of the projection that rules most rows out; more costs more than it rules out
CANDIDATES = 512  # of which the next rows are chosen
TOGETHER = 128  # rows at the most that all others are compared with at once
CHUNK = 4096  # rows that are compared at once, so that products stay in a CPU's cache
MANY = 1 / 32  # of all pairs: more are measured in full in less time without choosing among them
ROUNDING = 1e-6  # of the largest squared length: equal rows may seem that far apart in float32

Report = Callable[[int, int], None]  # rows chosen, rows to choose at the most
F = TypeVar("F", bound=Callable[..., Any])


class Coreset(NamedTuple):
    """What was chosen of n rows."""

    chosen: torch.Tensor  # (k,) indices, in the order of choice
    radius: float  # the largest distance of any row to the chosen (and known) ones
    owners: torch.Tensor  # (n,) which of the k is nearest; -1: what is known already


def on_one_thread(function: F) -> F:
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


@on_one_thread
def k_centre_greedy(
    rows: torch.Tensor,
    count: int,
    *,
    covered_to: torch.Tensor | None = None,
    stop_radius: float = 0.0,
    report: Report = lambda done, total: None,
) -> Coreset:
    """Choose rows, each the one farthest from all chosen before it.

    The result is that of the plain greedy loop over all columns. Only its cost differs. Some of the
    farthest rows are looked at together: what they choose among themselves is what all rows would,
    as long as the farthest of them is no nearer than any other row. Then all rows are compared with
    the new ones, first by a sketch: rows are rotated onto their principal axes, where the distance
    over the first few axes and the length of the rest bound the true distance from below. Only what
    may be nearer than before is measured in full.

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
    cover = _Cover(rows, square, covered_to)
    noise = ROUNDING * float(square.max())
    enough = max(stop_radius**2, noise)
    while len(cover.chosen) < count and cover.farthest() > enough:
        cover.add_the_farthest(count - len(cover.chosen), enough)
        if len(cover.chosen) < count:
            report(len(cover.chosen), count)
    report(len(cover.chosen), len(cover.chosen))
    farthest = cover.farthest()
    chosen = torch.tensor(cover.chosen, dtype=torch.long)
    radius = math.sqrt(farthest) if farthest > noise else 0.0
    return Coreset(chosen, radius, torch.from_numpy(cover.owners))


class _Cover:
    """The chosen rows, and how far every row lies from them."""

    def __init__(
        self, rows: torch.Tensor, square: torch.Tensor, covered_to: torch.Tensor | None
    ) -> None:
        self.chosen: list[int] = []
        self._rows, self._square = rows.numpy(), square.numpy()  # centred
        self._sketch = _sketch(rows, square)  # (DIMENSIONS + 2, n)
        self._products = torch.empty(TOGETHER * CHUNK)
        # Of each row: the squared distance to the chosen rows, and which of them is nearest; -1 for
        # what was known before, of which nothing but the distance is here.
        self.owners = np.full(len(rows), -1)
        self._nearest = np.full(len(rows), np.inf, np.float32)
        if covered_to is not None:
            self._nearest = covered_to.square().numpy()

    def farthest(self) -> float:
        """The largest squared distance of any row."""
        return float(self._nearest.max())

    def add_the_farthest(self, most: int, enough: float) -> None:
        """Choose at least one row, and no more than `most`; none that is `enough` near, squared."""
        new = self._farthest(min(most, TOGETHER), enough)
        sketches = self._sketch[:, new].T.contiguous()  # (m, DIMENSIONS + 2)
        sketches[:, -1] = torch.from_numpy(-0.5 * self._square[new])
        for begin in range(0, len(self._rows), CHUNK):
            self._bring_nearer(slice(begin, begin + CHUNK), new, sketches)
        self._nearest[new] = 0
        self.chosen += new.tolist()

    def _farthest(self, most: int, enough: float) -> NDArray[np.int64]:
        """The rows (m,) to be chosen next, 1 <= m <= most, in this order."""
        if np.isinf(self._nearest.min()):  # nothing is known
            return np.array([self._square.argmin()])
        some = np.arange(len(self._rows))
        if len(some) > CANDIDATES:
            some = np.sort(np.argpartition(self._nearest, -CANDIDATES)[-CANDIDATES:])
            enough = max(enough, float(self._nearest[some].min()))  # no other is farther
        away, its, square = self._nearest[some], self._rows[some], self._square[some]
        apart = square[:, None] + square - 2 * _products(its, its)
        found: list[int] = []
        while len(found) < most:
            one = int(away.argmax())
            if found and not away[one] > enough:
                break
            found.append(one)
            np.minimum(away, apart[one], out=away)
            away[one] = 0
        return some[found]

    def _bring_nearer(self, own: slice, new: NDArray[np.int64], sketches: torch.Tensor) -> None:
        """Compare some rows with m new ones, and keep what is nearer than before.

        Squared, |q - b|^2 < d is the same as  q.b - |b|^2 / 2 > (|q|^2 - d) / 2.
        """
        square, nearest = self._square[own], self._nearest[own]
        products = self._products[: len(new) * len(square)].view(len(new), len(square))
        torch.mm(sketches, self._sketch[:, own], out=products)
        may = np.flatnonzero(products.numpy() > 0.5 * (square - nearest))
        if len(may) > products.numel() * MANY:
            away = -2 * _products(self._rows[new], self._rows[own])
            away += square
            away += self._square[new][:, None]
            row, which = np.arange(len(square)), away.argmin(axis=0)
            exact = away[which, row]
        else:
            which, row = np.divmod(may, len(square))
            pairs = self._rows[own].take(row, axis=0), self._rows[new].take(which, axis=0)
            exact = square[row] + self._square[new[which]] - 2 * np.einsum("ij,ij->i", *pairs)
        nearer = np.flatnonzero(exact < nearest[row])
        best = nearer[np.lexsort((exact[nearer], row[nearer]))]  # of each row the nearest first
        won, first = np.unique(row[best], return_index=True)
        best = best[first]
        nearest[won] = np.maximum(exact[best], 0)
        self.owners[own][won] = len(self.chosen) + which[best]


def _products(some: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of each of (n, c) with each of (m, c), (n, m); numpy would bring threads of its own."""
    both = torch.from_numpy(some), torch.from_numpy(others).T
    found: NDArray[np.float32] = torch.mm(*both).numpy()
    return found


def _sketch(rows: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
    """The first principal coordinates of centred rows, the length of what they leave out, and 1."""
    axes = torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -DIMENSIONS:]  # (c, DIMENSIONS)
    head = axes.T @ rows.T
    rest = (square - head.square().sum(dim=0)).clamp_min(0).sqrt()
    return torch.cat([head, rest[None], torch.ones(1, len(rows))])
