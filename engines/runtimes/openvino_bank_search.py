"""Nearest neighbours in a PatchCore memory bank on a CPU, and the image score from them.

- The bank is in memory once. A search in bf16 reads the upper half of each number; where it must
  be exact, the lower half is put to it.
- It is an input of two small graphs, a tile of rows at a time: distances are reduced while they
  are in the cache, memory for them does not grow with the bank, and another bank needs no other
  graph. A tile stands on the left of the matrix product, where OpenVINO uses it in place; on the
  right it would first be packed into a copy.
- A row has half its squared norm in a column of its own, which meets a 1 in the query, and a 1
  that meets the query's. So the product of two is |query - row|^2 / 2, with nothing left to add.
- The few patches that may decide the score are searched again, and measured in float32 against
  the rows that come nearest. So the searches may be in bf16, in half the time, and hardly move it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops
from numpy.typing import NDArray

TILE = 1000  # bank rows per matrix product; (1000, 1024) float32 distances are 4 MB
CANDIDATES = 16  # patches searched again: the bank is read once, for one or for 16
NEIGHBOURS = 9  # anomalib's num_neighbors, fixed by the meaning of the score
SHORTLIST = 12  # rows measured in float32 to find these: bf16 may put close ones in another order


class Search:
    """One memory bank, ready to be searched by one thread at a time."""

    def __init__(
        self,
        core: ov.Core,
        bank: NDArray[np.float32],
        patches: int,
        config: dict[str, Any],
        *,
        in_bf16: bool,
    ) -> None:
        """Copy the bank (M, C) into the form that is searched, and compile.

        Args:
            core: compiles.
            bank: (M, C) float32; not needed any more afterwards.
            patches: P, the number of patches of an image.
            config: OpenVINO's settings; INFERENCE_PRECISION_HINT must be "f32", which leaves what
                is bf16 in a graph as it is, and makes nothing else bf16.
            in_bf16: whether searches may be in bf16. Scores are in float32 either way.
        """
        self._rows = (_Bf16Rows if in_bf16 else _F32Rows)(bank, patches)
        # All of one size, or one less: a short last one could have fewer rows than the shortlist.
        tiles = np.array_split(self._rows.searched, -(-len(bank) // TILE))
        self._tiles = [self._rows.tensor(tile) for tile in tiles]
        self._counting: NDArray[np.bool_] | None = None  # of the patches (P,); None: all
        self._starts = np.cumsum([0, *map(len, tiles[:-1])])
        shortlist = min(SHORTLIST, len(tiles[-1]))
        nearest, shortest = self._nearest_graph(patches), self._shortest_graph(shortlist)
        self._nearest = core.compile_model(nearest, "CPU", config).create_infer_request()
        self._shortest = core.compile_model(shortest, "CPU", config).create_infer_request()

    @property
    def rows(self) -> int:
        return len(self._rows.searched)

    def count_only(self, keep: NDArray[np.float32]) -> None:
        """Let only the patches decide a score that are 1 of (h, w)."""
        self._counting = keep.reshape(-1) > 0

    def score(self, embedding: NDArray[np.float32]) -> tuple[float, NDArray[np.float32]]:
        """The embedding (P, C) of one image -> its raw score, and each patch's distance (P,).

        The score is eq. 7 of arXiv:2106.08265, as anomalib computes it. NaN, both, for an
        embedding that is not finite: a minimum over NaN is a number in OpenVINO.
        """
        queries = embedding - self._rows.mean
        if not np.isfinite(_half_squares(queries)).all():
            return math.nan, np.full(len(queries), np.nan, np.float32)
        distances = self._distances(queries)
        likely = queries[self._order(distances)[-CANDIDATES:]]
        nearest, distance = self._closest(likely, 1)
        decides = distance[:, 0].argmax()
        near = self._rows.exact(nearest[decides])  # (1, C)
        neighbours, _ = self._closest(near, NEIGHBOURS)
        reach = np.linalg.norm(likely[decides] - self._rows.exact(neighbours[0]), axis=1)
        own = distance[decides, 0]
        weight = 1 - 1 / np.exp(reach - own).sum()
        return float(weight * own), distances

    def _order(self, distances: NDArray[np.float32]) -> NDArray[np.intp]:
        """The patches that count, the farthest last."""
        order = np.argsort(distances)
        return order if self._counting is None else order[self._counting[order]]

    def _distances(self, queries: NDArray[np.float32]) -> NDArray[np.float32]:
        """(P, C) -> distance of each to the bank (P,), in the precision of the search."""
        half = np.full(len(queries), np.inf, np.float32)
        for _, (nearest,) in self._over_tiles(self._nearest, queries):
            np.minimum(half, nearest, out=half)
        distances: NDArray[np.float32] = np.sqrt(2 * np.maximum(half, 0))
        return distances

    def _closest(
        self, queries: NDArray[np.float32], count: int
    ) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
        """(K, C) -> the closest rows of each, closest first, and their distances: (K, count)."""
        found = [
            (half.T.copy(), indexes.T + start)
            for start, (half, indexes) in self._over_tiles(self._shortest, queries)
        ]
        half, indexes = (np.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
        short = half.argsort(axis=1)[:, :SHORTLIST]
        indexes = np.take_along_axis(indexes, short, axis=1)
        exact = np.linalg.norm(queries[:, None] - self._rows.exact(indexes), axis=2)
        order = exact.argsort(axis=1)[:, :count]
        return np.take_along_axis(indexes, order, axis=1), np.take_along_axis(exact, order, axis=1)

    def _over_tiles(
        self, request: ov.InferRequest, queries: NDArray[np.float32]
    ) -> Iterator[tuple[int, list[NDArray[Any]]]]:
        """Run a graph on each tile: the index of its first row, and what the graph found.

        What it found is overwritten by the next tile.
        """
        request.set_input_tensor(0, self._rows.tensor(self._rows.encode_queries(queries)))
        for start, tile in zip(self._starts, self._tiles, strict=True):
            request.set_input_tensor(1, tile)
            request.infer()
            yield start, [output.data for output in request.output_tensors]

    def _nearest_graph(self, patches: int) -> ov.Model:
        """queries (P, W), tile (T, W) -> half the squared distance to the nearest row (P,)."""
        inputs, half = self._halves(patches)
        return ov.Model([ops.result(ops.convert(ops.reduce_min(half, 0), "f32"))], inputs)

    def _shortest_graph(self, count: int) -> ov.Model:
        """queries (K, W), tile (T, W) -> the smallest halves and their rows, each (count, K)."""
        inputs, half = self._halves(-1)
        top = ops.topk(ops.convert(half, "f32"), count, 0, "min", "none")
        return ov.Model([ops.result(top.output(0)), ops.result(top.output(1))], inputs)

    def _halves(self, queries: int) -> tuple[list[Any], Any]:
        """The inputs queries and tile, and half the squared distances between them (T, queries)."""
        width = self._rows.searched.shape[1]
        query = ops.parameter([queries, width], self._rows.kind, name="queries")
        tile = ops.parameter([-1, width], self._rows.kind, name="tile")
        return [query, tile], ops.matmul(tile, query, False, True)


class _F32Rows:
    """The rows of a bank less their mean: as they are searched, and as they are.

    Distances do not change when both sides move by the mean; smaller numbers lose less to rounding
    where a square is the difference of large products.
    """

    kind = ov.Type.f32
    _dtype: type[np.generic] = np.float32
    _norms = 1  # columns that hold half the squared norm

    def __init__(self, bank: NDArray[np.float32], queries: int) -> None:
        count, self._channels = bank.shape
        width = self._channels + 2 * self._norms
        self.mean = bank.mean(axis=0)
        self.searched = np.empty((count, width), self._dtype)  # (M, W)
        # Made once: new pages for each image would cost more than the work that is done in them.
        self._wide = np.empty((queries, width), np.float32)
        self._encoded = np.empty((queries, width), self._dtype)
        for start in range(0, count, TILE):
            self._put(slice(start, start + TILE), bank[start : start + TILE] - self.mean)

    def _put(self, where: slice, rows: NDArray[np.float32]) -> None:
        norms = self._split(_half_squares(rows))
        self._encode(np.hstack([rows, norms, np.ones_like(norms)]), self.searched[where])

    def encode_queries(self, queries: NDArray[np.float32]) -> NDArray[Any]:
        """(P, C) -> (P, W): the product with a row of `searched` is half the squared distance.

        Good until the next call.
        """
        wide, encoded = self._wide[: len(queries)], self._encoded[: len(queries)]
        np.negative(queries, out=wide[:, : self._channels])
        wide[:, self._channels : -self._norms] = 1
        wide[:, -self._norms :] = self._split(_half_squares(queries))
        self._encode(wide, encoded)
        return encoded

    def exact(self, indexes: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
        """The rows of these indexes (...) in float32: (..., C)."""
        rows: NDArray[np.float32] = self.searched[indexes, : self._channels]
        return rows

    def tensor(self, encoded: NDArray[Any]) -> ov.Tensor:
        """For OpenVINO, in place: the array must live as long."""
        return ov.Tensor(encoded, shared_memory=True)

    def _encode(self, values: NDArray[np.float32], out: NDArray[Any]) -> None:
        """Write float32 in the form of a search; `values` may be changed."""
        out[:] = values

    def _split(self, half: NDArray[np.float32]) -> NDArray[np.float32]:
        """Half the squared norms (n,) in the columns of a row: (n, _norms)."""
        return half[:, None]


class _Bf16Rows(_F32Rows):
    """The same in bf16, and what it lacks beside it: together they take what float32 takes."""

    kind = ov.Type.bf16
    _dtype = np.uint16
    _norms = 2  # the second for what bf16 rounds off the first

    def __init__(self, bank: NDArray[np.float32], queries: int) -> None:
        self._lower = np.empty(bank.shape, np.uint16)
        super().__init__(bank, queries)

    def _put(self, where: slice, rows: NDArray[np.float32]) -> None:
        super()._put(where, rows)
        self._lower[where] = rows.view(np.uint32) & 0xFFFF

    def exact(self, indexes: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
        upper, lower = super().exact(indexes).astype(np.uint32), self._lower[indexes]
        rounded_up = lower >> 15
        bits: NDArray[np.uint32] = (upper - rounded_up << 16) | lower
        return bits.view(np.float32)

    def tensor(self, encoded: NDArray[Any]) -> ov.Tensor:
        return ov.Tensor(encoded, list(encoded.shape), ov.Type.bf16)

    def _encode(self, values: NDArray[np.float32], out: NDArray[Any]) -> None:
        bits = values.view(np.uint32)
        bits += 0x8000  # so that cutting off the lower half rounds to the nearest
        np.right_shift(bits, 16, out=out, casting="unsafe")

    def _split(self, half: NDArray[np.float32]) -> NDArray[np.float32]:
        high = (half.view(np.uint32) + 0x8000 & 0xFFFF0000).view(np.float32)
        return np.stack([high, half - high], axis=1)


def _half_squares(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Half the squared norm of each row: (n, C) -> (n,)."""
    half: NDArray[np.float32] = np.einsum("nc,nc->n", rows, rows) / 2
    return half
