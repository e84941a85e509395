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
        self._half_norm = 0.5 * self._bank.square().sum(dim=1)  # (M,)
        self._counts = keep.reshape(-1).bool()

    def score(self, embedding: torch.Tensor) -> float:
        """The raw score of one picture (P, C) float32, as `PatchCore.forward` gives it."""
        if not torch.isfinite(embedding).all():
            return math.nan
        query = (embedding - self._mean)[self._counts]
        decisive, near = self._farthest(query)
        count = min(NEIGHBOURS, len(self._bank))
        around = self._half_norm - self._bank @ self._bank[near]
        neighbours = around.topk(count, largest=False).indices
        reach = (query[decisive] - self._bank[neighbours]).square().sum(dim=1).sqrt()  # (count,)
        weight = 1 - torch.softmax(reach, dim=0)[0]
        distance = (query[decisive] - self._bank[near]).square().sum().sqrt()
        return float(weight * distance)

    def _farthest(self, query: torch.Tensor) -> tuple[int, int]:
        """Which patch of (n, C) lies farthest from the bank, and the row that is nearest to it."""
        half_norm, square = self._half_norm, query.square().sum(dim=1)
        patches = torch.arange(len(query))  # that may still be the farthest
        nearest = torch.full((len(query),), torch.inf)  # half squared distances, but for |q|^2 / 2
        at_least, begin = -torch.inf, 0
        for share in SHARES:
            end = len(half_norm) // share
            some = half_norm[begin:end] - query[patches] @ self._bank[begin:end].T
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
        return int(patches[one]), int(last[one].argmin())


def scores_of(search: BankSearch, embeddings: torch.Tensor) -> NDArray[np.float64]:
    """Raw scores (n,) of embeddings (n, P, C), one by one."""
    return np.array([search.score(one) for one in embeddings])
