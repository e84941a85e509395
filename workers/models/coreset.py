"""k-centre greedy: the few rows that cover all others (arXiv:1708.00489), exactly and fast."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

DIMENSIONS = 32  # of the projection that rules most rows out; more costs more than it rules out
ROUNDING = 1e-6  # of the largest squared length: equal rows may seem that far apart in float32

Report = Callable[[int, int], None]  # rows chosen, rows to choose at the most
F = TypeVar("F", bound=Callable[..., Any])


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
) -> tuple[torch.Tensor, float]:
    """Choose rows, each the one farthest from all chosen before it.

    The result is that of the plain greedy loop over all columns. Only its cost differs: rows are
    rotated onto their principal axes, where the distance over the first few axes and the length of
    the rest bound the true distance from below. For most rows that bound already shows that the
    newest centre is no nearer than an older one, and only the others are measured in full.

    Args:
        rows: (n, c) float32.
        count: how many rows to choose at the most.
        covered_to: (n,) distance of each row to what is known already; without it the row nearest
            to the mean comes first.
        stop_radius: stop as soon as no row is farther away than this.
        report: called now and then with (chosen, count).

    Returns:
        Indices of the chosen rows (k,) in the order of choice, and the coverage radius: the
        largest distance of any row to the chosen (and known) ones.
    """
    count = min(count, len(rows))
    rows = rows - rows.mean(dim=0)
    square = rows.square().sum(dim=1)  # (n,)
    sketch = _sketch(rows, square)  # (n, DIMENSIONS + 1), with the same lengths as rows
    if covered_to is None:
        nearest = torch.full_like(square, torch.inf)  # squared distance to the chosen rows
        centre = int(square.argmin())
    else:
        nearest = covered_to.square()
        centre = int(nearest.argmax())
    noise = ROUNDING * float(square.max())
    chosen: list[int] = []
    bound = torch.empty_like(square)
    while len(chosen) < count and nearest[centre] > max(stop_radius**2, noise):
        chosen.append(centre)
        torch.mv(sketch, sketch[centre], out=bound)
        bound.mul_(-2).add_(square).add_(square[centre])
        closer = (bound < nearest).nonzero().squeeze(1)
        exact = square[closer] + square[centre] - 2 * (rows[closer] @ rows[centre])
        nearest[closer] = torch.minimum(nearest[closer], exact.clamp_min(0))
        nearest[centre] = 0
        centre = int(nearest.argmax())
        if len(chosen) % 64 == 0 and len(chosen) < count:
            report(len(chosen), count)
    report(len(chosen), len(chosen))
    farthest = float(nearest.max())
    return torch.tensor(chosen, dtype=torch.long), math.sqrt(farthest) if farthest > noise else 0.0


def _sketch(rows: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
    """The first principal coordinates of centred rows, and the length of what they leave out."""
    axes = torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -DIMENSIONS:]  # (c, DIMENSIONS)
    head = rows @ axes
    rest = (square - head.square().sum(dim=1)).clamp_min(0).sqrt()
    return torch.cat([head, rest[:, None]], dim=1).contiguous()
