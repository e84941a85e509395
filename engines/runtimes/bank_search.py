"""Nearest neighbours in a PatchCore memory bank on a CPU, and the image score from them.

Only the patch that is farthest from the bank decides a score. So each patch is searched where its
nearest row most likely is, which gives a distance that is never too small, and the few patches
whose distance may be the largest are then searched so that no nearer row can be missed:

- The rows lie in cells, by k-means over their principal axes, as in an inverted file (IVF,
  Jegou et al. 2011, doi:10.1109/TPAMI.2010.57). An image may compare so many patches with so many
  cells; those come first whose centre is hardly farther than the nearest one, over all patches.
- A row's first coordinates on the principal axes and the length of the rest give a bound that no
  distance is below: |q - b|^2 >= |q_d - b_d|^2 + (|q_r| - |b_r|)^2. Rows are measured in full
  only where the bound is below the distance that is known.

A row has half its squared norm in a channel of its own, which meets a 1 in the query: the product
of two, and half the query's squared norm, is |query - row|^2 / 2. A cell lies in memory as a matrix
(C + 1, rows), from the right of which numpy's OpenBLAS multiplies fastest.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Indexes = NDArray[np.intp]
Made = TypeVar("Made")

NEIGHBOURS = 9  # anomalib's num_neighbors, fixed by the meaning of the score
CELLS = 6  # that a patch is compared with on the average
MANY = 16  # patches that are searched in full one by one
ALIKE = 1e-6  # of a distance: what it may be larger and is not looked at
OF_A_CELL = 64  # rows that k-means sees for each cell
ROUNDS = 6  # of k-means
AXIS_PER = 6  # channels for one principal axis: what is kept of them is a seventh of the bank
SAMPLE = 8192  # rows that principal axes are found of
TILE = 32_768  # rows whose bounds are in memory at once
GATHER = 2_048  # rows in memory at once besides, in their order
MEASURED = 256  # rows that are measured at once, from wherever they are
SCATTERED = 16  # times as long as in order it takes to read rows one by one
NEAR = 262_144  # numbers that a thread has in memory at once: about what a core has near it
SAMPLED = 96  # patches, or a few more, say how much farther than the nearest centre is too far
LEAST_OF_A_BLOCK = 8  # patches
TRIALS, CLEARLY = 7, 0.95  # to find out whether small products are faster
SMALL = 1_000_000  # multiplications up to which OpenBLAS may take its kernel for small matrices
THREADS = 4  # at most for one image: each has its own share of small steps to take in Python
# Of squared norms: what a squared distance may be off by that was reckoned as products in float32.
ROUNDING = 2e-6


class Search:
    """One memory bank, ready to be searched, by several threads at once as well."""

    def __init__(self, bank: Floats) -> None:
        """Copy the bank (M, C) float32 into the form that is searched; it is left as it is."""
        self._mean = bank.mean(axis=0)
        self._axes = _principal_axes(bank, self._mean)  # (C, d)
        self._centres, cells = _cells(bank, lambda rows: (rows - self._mean) @ self._axes)
        self._centre_halves = _half_squares(self._centres)
        self._sizes = np.bincount(cells)
        self._ends = np.cumsum(self._sizes)
        order = np.argsort(cells, kind="stable")
        count, channels = bank.shape
        self._all = np.empty(count * (channels + 1), np.float32)  # cell after cell
        self._cells = [
            self._all[(end - size) * (channels + 1) : end * (channels + 1)].reshape(-1, size)
            for end, size in zip(self._ends, self._sizes, strict=True)
        ]
        self._bounds = np.empty((count, self._axes.shape[1] + 2), np.float32)
        for cell, begin in zip(self._cells, self._ends - self._sizes, strict=True):
            for start in range(0, cell.shape[1], GATHER):
                where = np.arange(start, min(start + GATHER, cell.shape[1]))
                rows = bank[order[begin + where]] - self._mean
                halves, near = _half_squares(rows), rows @ self._axes
                cell[:-1, where], cell[-1, where] = rows.T, halves
                encoded = np.column_stack([-near, -_rest(halves, near), halves])
                self._bounds[begin + where] = encoded
        self._largest = float(max(cell[-1].max() for cell in self._cells))
        self._counting: NDArray[np.bool_] | None = None  # of the patches (P,); None: all

    @property
    def rows(self) -> int:
        return len(self._bounds)

    def count_only(self, keep: Floats) -> None:
        """Let only the patches decide a score that are 1 of (h, w)."""
        self._counting = keep.reshape(-1) > 0

    def score(self, embedding: Floats, threads: int = 1) -> tuple[float, Floats]:
        """The embedding (P, C) of one image -> its raw score, and each patch's distance (P,).

        `threads`: how many look at it, never more than `THREADS`; what they find is the same.

        The score is eq. 7 of arXiv:2106.08265, as anomalib computes it. It is exact to float32, as
        are the distances of all patches that it might have come from. The others are to a row of
        the bank as well, which is the nearest one but for a few patches in a thousand. NaN, both,
        for an embedding that is not finite: a minimum over NaN may be a number.
        """
        patches = embedding - self._mean
        if not np.isfinite(_half_squares(patches)).all():
            return math.nan, np.full(len(patches), np.nan, np.float32)
        queries = _Queries.of(patches, self._axes)
        distances = self._search(queries, self._likely(queries), threads)
        patch, row = self._farthest(queries, distances, threads)
        nearest = _Queries.of(self._rows(np.array([row])), self._axes)
        _, neighbours = self._closest(nearest, 0, NEIGHBOURS)
        reach = self._measure(queries.rows[patch], neighbours)
        own = distances[patch]
        weight = 1 - 1 / np.exp(reach - own).sum()
        return float(weight * own), distances

    def _likely(self, queries: _Queries) -> NDArray[np.bool_]:
        """(k, P): which cells are looked into for which patch; the nearest one for all."""
        away = self._centres @ queries.near.T
        np.subtract(self._centre_halves[:, None], away, out=away)
        away = _distances(np.add(away, _half_squares(queries.near), out=away))
        away -= away.min(axis=0)
        some = away[:, :: away.shape[1] // SAMPLED | 1]  # odd, so that it meets each column
        pairs = min(CELLS * some.shape[1], some.size) - 1
        likely: NDArray[np.bool_] = away <= np.partition(some, pairs, axis=None)[pairs]
        return likely

    def _search(self, queries: _Queries, where: NDArray[np.bool_], threads: int) -> Floats:
        """(P,): the distance of each patch to the nearest row of its cells, `where` (k, P) says."""
        wide = np.empty((len(queries.rows), len(self._mean) + 1), np.float32)
        np.negative(queries.rows, out=wide[:, :-1])
        wide[:, -1] = 1
        counts = np.count_nonzero(where, axis=1)
        products = counts * self._sizes

        def search(cells: range) -> Floats:
            half = np.full(len(wide), np.inf, np.float32)
            for some in _in_parts(cells, counts * wide.shape[1] + products, NEAR):
                patches = np.flatnonzero(where[some.start : some.stop]) % len(wide)  # of each cell
                at_once = max(1, len(patches))
                if len(some) == 1:
                    at_once = max(1, NEAR // (wide.shape[1] + int(self._sizes[some.start])))
                for start in range(0, len(patches), at_once):
                    part = patches[start : start + at_once]
                    many = counts[some] if len(some) > 1 else np.array([len(part)])
                    np.minimum.at(half, part, self._nearest(wide.take(part, axis=0), some, many))
            return half

        shares = _shares(products, min(threads, THREADS))
        half = np.minimum.reduce(list(side_by_side(search, shares, of="bank-search")))
        return _distances(half + queries.halves)

    def _nearest(self, wide: Floats, cells: range, counts: Indexes) -> Floats:
        """(n,): the least product of each patch, `wide` (n, C + 1), with the rows of its cell.

        So many patches (k,) are for each of the cells, those of the first one first.
        """
        sizes = self._sizes[cells]
        flat = np.empty((counts * sizes).sum(), np.float32)
        first = at = 0
        for cell, count, size in zip(cells, counts, sizes, strict=True):
            last, to = first + count, at + count * size
            if count:
                _multiply(wide[first:last], self._cells[cell], flat[at:to].reshape(-1, size))
            first, at = last, to
        begins = np.repeat(sizes, counts)
        found: Floats = np.minimum.reduceat(flat, np.cumsum(begins) - begins)
        return found

    def _farthest(
        self, queries: _Queries, distances: Floats, threads: int
    ) -> tuple[np.intp, np.intp]:
        """The patch that decides the score, and the row nearest to it.

        `distances` (P,) are exact afterwards for each patch that might have been it.
        """
        left = np.argsort(-distances, kind="stable")
        if self._counting is not None:
            left = left[self._counting[left]]
        slack = self._slack(queries)
        largest, found = np.float32(-1), (left[0], np.intp(0))
        while left.size:
            patch, left = left[0], left[1:]
            exact, (row,) = self._closest(queries, patch, 1, distances[patch])
            distances[patch] = exact[0]
            if exact[0] > largest:
                largest, found = exact[0], (patch, row)
            left = left[distances[left] ** 2 + 2 * slack[left] > largest**2]
            # Where the picture is plain, many patches are alike: this row is as near to them.
            away = np.linalg.norm(queries.rows[left] - self._rows(found[1][None]), axis=1)
            distances[left] = np.minimum(distances[left], away)
            left = left[away > largest * (1 + ALIKE)]
            if len(left) > MANY:  # the cells tell little in this bank
                everywhere = np.zeros((len(self._centres), len(distances)), bool)
                everywhere[:, left] = True
                np.minimum(distances, self._search(queries, everywhere, threads), out=distances)
                left = left[np.argsort(-distances[left], kind="stable")][:MANY]
        return found

    def _closest(
        self, queries: _Queries, patch: np.intp | int, count: int, within: float = math.inf
    ) -> tuple[Floats, Indexes]:
        """The distances of a patch to the rows that are nearest, nearest first, and these rows.

        Fewer rows are measured where it is known `within` what distance so many are.
        """
        query, half = queries.rows[patch], queries.halves[patch]
        slack = 2 * self._slack(queries)[patch]
        count = min(count, self.rows)
        distances, rows = np.empty(0, np.float32), np.empty(0, np.intp)
        for cells in _in_parts(range(len(self._cells)), self._sizes, TILE):
            start, stop = self._ends[cells.start] - self._sizes[cells.start], self._ends[cells[-1]]
            bounds = self._bounds[start:stop] @ queries.encoded[patch]
            if within == math.inf:
                some = min(4 * count, len(bounds))
                likely = np.argpartition(bounds, some - 1)[:some] + start
                known = np.sort(self._measure(query, likely))
                if len(known) >= count:
                    within = known[count - 1]
            some = np.flatnonzero(bounds <= within**2 / 2 - half + slack) + start
            if len(some) > (stop - start) // SCATTERED:  # the bounds rule out little in this bank
                some = some[self._by_products(query, cells, count, slack)[some - start]]
            distances = np.concatenate([distances, self._measure(query, some)])
            rows = np.concatenate([rows, some])
            nearest = distances.argsort(kind="stable")[:count]
            distances, rows = distances[nearest], rows[nearest]
            if len(rows) == count:
                within = min(within, distances[-1])
        return distances, rows

    def _by_products(
        self, query: Floats, cells: range, count: int, slack: np.float32
    ) -> NDArray[np.bool_]:
        """Which rows of some cells may be among the nearest, reckoned as products."""
        wide = np.append(-query, np.float32(1))
        products = np.concatenate([wide @ self._cells[cell] for cell in cells])
        last = min(count, len(products)) - 1
        may: NDArray[np.bool_] = products <= np.partition(products, last)[last] + slack
        return may

    def _measure(self, query: Floats, rows: Indexes) -> Floats:
        """The distances of rows (n,) as differences, which are exact also where they are small."""
        some = (rows[start : start + MEASURED] for start in range(0, len(rows), MEASURED))
        each = [np.linalg.norm(self._rows(one) - query, axis=1) for one in some]
        return np.concatenate(each) if each else np.empty(0, np.float32)

    def _rows(self, rows: Indexes) -> Floats:
        """Some rows (n,), less the mean: (n, C)."""
        channels = len(self._mean)
        cells = np.searchsorted(self._ends, rows, side="right")
        sizes = self._sizes[cells]
        before = self._ends[cells] - sizes  # the first row of the same cell
        first = before * (channels + 1) + rows - before
        found: Floats = self._all.take(first[:, None] + sizes[:, None] * np.arange(channels))
        return found

    def _slack(self, queries: _Queries) -> Floats:
        """By how much half a squared distance may be off (P,)."""
        return ROUNDING * (queries.halves + self._largest)


@dataclass(frozen=True)
class _Queries:
    """Patches less the mean of the bank: (P, C)."""

    rows: Floats  # (P, C)
    halves: Floats  # (P,): half of the squared norm
    near: Floats  # (P, d): on the principal axes
    encoded: Floats  # (P, d + 2): the product with a row of the bounds, and `halves`, is a bound

    @classmethod
    def of(cls, rows: Floats, axes: Floats) -> _Queries:
        halves, near = _half_squares(rows), rows @ axes
        encoded = np.column_stack([near, _rest(halves, near), np.ones_like(halves)])
        return cls(rows, halves, near, encoded)


def _principal_axes(bank: Floats, mean: Floats) -> Floats:
    """The axes along which the rows (M, C) differ most: (C, d)."""
    some = bank[:: -(-len(bank) // SAMPLE)] - mean
    _, axes = np.linalg.eigh((some.T @ some).astype(np.float64))  # the largest last
    return np.ascontiguousarray(axes[:, -max(1, bank.shape[1] // AXIS_PER) :], dtype=np.float32)


def _cells(bank: Floats, project: Callable[[Floats], Floats]) -> tuple[Floats, Indexes]:
    """k-means of the rows (M, C) on their axes: the centres (k, d), and each row's cell (M,)."""
    count = math.isqrt(len(bank))
    random = np.random.default_rng(0)  # the same bank has the same cells
    some = project(bank[random.permutation(len(bank))[: OF_A_CELL * count]])
    centres = some[:count].copy()
    for _ in range(ROUNDS):
        cells = _nearest_centre(some, centres)
        sizes = np.bincount(cells, minlength=count)
        used = sizes > 0
        begins = (np.cumsum(sizes) - sizes)[used]
        sums = np.add.reduceat(some[np.argsort(cells, kind="stable")], begins, axis=0)
        centres[used] = sums / sizes[used, None]
    cells = _blocks(bank, lambda rows: _nearest_centre(project(rows), centres))
    used = np.bincount(cells, minlength=count) > 0
    return centres[used], (np.cumsum(used) - 1)[cells]


def _nearest_centre(points: Floats, centres: Floats) -> Indexes:
    """(n, d) and (k, d) -> (n,)."""
    halves = _half_squares(centres)
    return _blocks(points, lambda some: (halves - some @ centres.T).argmin(axis=1))


def _blocks(rows: Floats, work: Callable[[Floats], Indexes]) -> Indexes:
    """What is made of all rows, without much memory for what is between."""
    return np.concatenate([work(rows[at : at + GATHER]) for at in range(0, len(rows), GATHER)])


def _half_squares(rows: Floats) -> Floats:
    """Half the squared norm of each row: (n, C) -> (n,)."""
    half: Floats = np.einsum("nc,nc->n", rows, rows) / 2
    return half


def _rest(halves: Floats, near: Floats) -> Floats:
    """(n,): the length of what is not on the principal axes."""
    rest: Floats = np.sqrt(2 * np.maximum(halves - _half_squares(near), 0))
    return rest


def _distances(halves: Floats) -> Floats:
    """From half the squared distance, which may have been rounded to less than 0; in its place."""
    np.maximum(halves, 0, out=halves)
    halves *= 2
    return np.sqrt(halves, out=halves)


def _in_parts(cells: range, sizes: Indexes, most: int) -> Iterator[range]:
    """Cells that follow each other, in parts whose sizes (k,) together are at most so much.

    A larger cell is a part of its own.
    """
    start, size = cells.start, 0
    for cell in cells:
        size += sizes[cell]
        if size > most and cell > start:
            yield range(start, cell)
            start, size = cell, sizes[cell]
    if start < cells.stop:
        yield range(start, cells.stop)


def _shares(products: Indexes, threads: int) -> list[range]:
    """The cells for each thread, about as many of the products (k,) for each."""
    done = np.cumsum(products)
    cuts = np.searchsorted(done, done[-1] * np.arange(1, threads) / threads)
    borders = [0, *map(int, cuts), len(products)]
    return [range(first, last) for first, last in itertools.pairwise(borders)]


def _multiply(some: Floats, by: Floats, into: Floats) -> None:
    """(n, C) and (C, m) -> (n, m), in blocks that are small to OpenBLAS where that is faster."""
    at_once = SMALL // by.size
    if not (LEAST_OF_A_BLOCK <= at_once < len(some) and _small_is_fast()):
        np.matmul(some, by, out=into)
        return
    whole = len(some) // at_once * at_once
    blocks = some[:whole].reshape(-1, at_once, len(by))
    np.matmul(blocks, by, out=into[:whole].reshape(-1, at_once, by.shape[1]))
    if whole < len(some):
        np.matmul(some[whole:], by, out=into[whole:])


@cache
def _small_is_fast() -> bool:
    """Whether the small of two products takes less than its share: only some CPUs have a kernel.

    A core with AVX512 takes 0.8 of the time so, and one with AVX2 1.4 times as long.
    """
    random = np.random.default_rng(0)
    some, by = (random.normal(size=size).astype(np.float32) for size in ((72, 384), (384, 100)))
    blocks, least = some.reshape(3, 24, 384), {True: math.inf, False: math.inf}
    for _ in range(TRIALS):
        for small, what in ((True, blocks), (False, some)):
            began = time.perf_counter()
            what @ by
            least[small] = min(least[small], time.perf_counter() - began)
    return least[True] < CLEARLY * least[False]


def side_by_side(work: Callable[..., Made], *shares: Iterable[Any], of: str) -> Iterator[Made]:
    """What `work` makes of each share, as `map`: of the first in this thread, of others in others.

    `of`: whose threads. What waits for others must not have theirs, or all might wait.
    """
    first, *others = zip(*shares, strict=False)
    made = [_helpers(of).submit(work, *share) for share in others]
    yield work(*first)
    yield from (one.result() for one in made)


@cache
def _helpers(of: str) -> ThreadPoolExecutor:
    """Threads for all banks of this process; they wait for work, and cost nothing until then."""
    return ThreadPoolExecutor(cores(), of)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
