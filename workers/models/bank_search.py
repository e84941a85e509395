"""Scores by a memory bank, for learning and calibrating: those of the graph, at less cost.

Only the patch farthest from the bank decides a score. A bank begins with the rows that cover most,
so its first rows already show of most patches that they are nearer than that one.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from engines.runtimes.bank_search import NEIGHBOURS

SHARES = (16, 4, 1)  # of the rows: a sixteenth is looked at for all patches, then what is left
SURE = 16  # patches that are measured in full at once, to know how far the farthest is at least
ROUNDING = 1e-5  # of the largest squared length: by which squared distances may be off


class BankSearch:
    """A memory bank (M, C), ready to be searched."""

    def __init__(self, bank: torch.Tensor, keep: torch.Tensor) -> None:
        """`keep` (P,) is 1 for patches that count in a score, 0 for the others."""
        # Distances do not change when both sides move by the mean; rounding errors shrink.
        self._mean = bank.mean(dim=0)
        self._bank = bank - self._mean
        self._half_norm = 0.5 * self._bank.square().sum(dim=1)  # (M,); infinite: none is there
        self._largest = 2 * float(self._half_norm.max())
        self._counts = keep.reshape(-1).bool()
        self._out = torch.empty(0, dtype=torch.long)
        self._kept = self._bank[self._out], self._half_norm[self._out]

    def __len__(self) -> int:
        return len(self._bank)

    def exchange(self, out: torch.Tensor, others: torch.Tensor) -> None:
        """Let other rows (j, C) stand in for some (k,), j <= k, until this is called again."""
        self._bank[self._out], self._half_norm[self._out] = self._kept
        self._out, self._kept = out, (self._bank[out], self._half_norm[out])
        there = others - self._mean
        self._bank[out[: len(there)]] = there
        self._half_norm[out] = torch.inf
        self._half_norm[out[: len(there)]] = 0.5 * there.square().sum(dim=1)

    def squared(self, patches: torch.Tensor) -> torch.Tensor:
        """Squared distances of patches (n, C) to all rows: (n, M)."""
        query = patches - self._mean
        away = torch.addmm(self._half_norm, query, self._bank.T, alpha=-1)
        return away.mul_(2).add_(query.square().sum(dim=1, keepdim=True))

    def covers(
        self, patches: NDArray[np.float32], rows: NDArray[np.int64], radius: float
    ) -> NDArray[np.bool_]:
        """Which of patches (n, C) lie within `radius` of one of some rows (m,): (n,).

        For few of both, where torch alone takes twice as long; but its product, since the threads
        of numpy's stand in the way of its own.
        """
        query, bank = patches - self._mean.numpy(), self._bank.numpy().take(rows, axis=0)
        products = torch.mm(torch.from_numpy(query), torch.from_numpy(bank).T).numpy()
        nearest = (self._half_norm.numpy()[rows] - products).min(axis=1, initial=np.inf)
        within: NDArray[np.bool_] = 2 * nearest + np.square(query).sum(axis=1) <= radius**2
        return within

    def score(
        self, embedding: torch.Tensor, covered: torch.Tensor | None = None, radius: float = 0.0
    ) -> float:
        """The raw score of one picture (P, C) float32, as `PatchCore.forward` gives it.

        Args:
            covered: (P,) patches that are known to lie within `radius` of the bank. The farthest is
                hardly ever among them; where it may be, they are looked at.
        """
        if not torch.isfinite(embedding).all():
            return math.nan
        query = (embedding - self._mean)[self._counts]
        found = None
        if covered is not None and len(few := query[~covered[self._counts]]):
            found = self._farthest(few)
            largest = max(self._largest, float(query.square().sum(dim=1).max()))
            if found[2] <= radius**2 + ROUNDING * largest:
                found = None
        decisive, near, _ = found or self._farthest(query)
        count = min(NEIGHBOURS, int(self._half_norm.isfinite().count_nonzero()))
        around = self._half_norm - self._bank @ self._bank[near]
        neighbours = around.topk(count, largest=False).indices
        reach = (decisive - self._bank[neighbours]).square().sum(dim=1).sqrt()  # (count,)
        weight = 1 - torch.softmax(reach, dim=0)[0]
        distance = (decisive - self._bank[near]).square().sum().sqrt()
        return float(weight * distance)

    def _farthest(self, query: torch.Tensor) -> tuple[torch.Tensor, int, float]:
        """The patch (C,) of (n, C) farthest from the bank, its nearest row, and how far squared."""
        half_norm, square = self._half_norm, query.square().sum(dim=1)
        patches = torch.arange(len(query))  # that may still be the farthest
        nearest = torch.full((len(query),), torch.inf)  # half squared distances, but for |q|^2 / 2
        at_least, begin = -torch.inf, 0
        for share in SHARES:
            end = len(half_norm) // share
            some = torch.addmm(
                half_norm[begin:end], query[patches], self._bank[begin:end].T, alpha=-1
            )
            if some.shape[1]:
                nearest[patches] = torch.minimum(nearest[patches], some.amin(dim=1))
            begin = end
            squared = square[patches] + 2 * nearest[patches]
            if share == SHARES[0] and len(patches) > SURE:
                first = patches[squared.topk(SURE).indices]
                all_rows = (half_norm - query[first] @ self._bank.T).amin(dim=1)
                at_least = float((square[first] + 2 * all_rows).max() - ROUNDING * square.max())
            patches = patches[squared >= at_least]
        last = half_norm - query[patches] @ self._bank.T  # (few, M)
        distances = square[patches] + 2 * last.amin(dim=1)
        one = int(distances.argmax())
        return query[patches[one]], int(last[one].argmin()), float(distances[one])


def scores_of(search: BankSearch, embeddings: torch.Tensor) -> NDArray[np.float64]:
    """Raw scores (n,) of embeddings (n, P, C), one by one."""
    return np.array([search.score(one) for one in embeddings])
