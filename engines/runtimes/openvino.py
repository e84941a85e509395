"""OpenVINO on a CPU: the runtime of every machine without TensorRT.

A PatchCore graph is cut at its tensor `embedding`. What is before runs as exported. What is after,
the search in the memory bank, is built here for the bank at hand, because a CPU gains most from it:

- The bank stands on the left of the matrix product, where OpenVINO uses it in place. On the right
  it would be packed into a second and a third copy; as an input of the graph it would be packed
  again for each image.
- It is cut into tiles, so that distances are reduced while they are in the cache and the memory
  for them does not grow with the bank.
- The few patches that may decide the score are searched again in float32, whatever precision
  the first search had. So the first one may be in bf16, in half the time, and hardly move a score.
"""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import Any, Literal

import numpy as np
import openvino as ov
import openvino.opset13 as ops
from numpy.typing import NDArray

from engines.bundle import Bundle
from engines.errors import BadBundle, RuntimeFailed

# f32: all in float32. mixed: the first search in bf16. bf16: the backbone too.
Precision = Literal["f32", "mixed", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("bf16", "mixed", "f32")  # fastest first

TILE = 1000  # bank rows per matrix product; (1000, 1024) float32 distances are 4 MB
CANDIDATES = 16  # patches searched again in float32: the bank is read once, for one or for 16
NEIGHBOURS = 9  # anomalib's num_neighbors, fixed by the meaning of the score


class OpenVINORuntime:
    """A model on the CPU; see `engines.runtimes.Runtime`."""

    name = "openvino"

    def __init__(
        self,
        onnx: Path,
        memory_bank: NDArray[np.float32] | None = None,
        *,
        precision: Precision = "f32",
        threads: int = 0,
        cache_dir: Path | None = None,
    ) -> None:
        """Compile the graph.

        Args:
            onnx: the exported graph.
            memory_bank: (M, C) float32, for a graph that has the input `memory_bank`. Used in
                place: the caller must not change it.
            precision: of the backbone and of the first search; see `Precision`.
            threads: CPU threads, 0 for all cores.
            cache_dir: where compiled graphs are kept, so that the next start is faster.

        Raises:
            BadBundle: the graph cannot be read, or does not fit the bank.
        """
        self.precision: str = precision
        core = ov.Core()
        config: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": threads,
        }
        model = _read(core, onnx)
        self._image_size, (height, width) = _sizes(model, onnx)
        self._search: _Search | None = None
        if memory_bank is not None:
            model = _cut_at_embedding(model, onnx, memory_bank)
            self._search = _Search(
                core, memory_bank, (height, width), config, in_bf16=precision != "f32"
            )
        elif len(model.inputs) != 1:
            raise BadBundle(f"{onnx} needs a memory bank, and none was given.")
        # One image at a time: a fixed shape is 2 ms faster, and a CPU gains nothing from batches.
        model.reshape({"image": [1, self._image_size, self._image_size, 3]})
        if cache_dir is not None:
            config["CACHE_DIR"] = str(cache_dir)
        try:
            self._request = core.compile_model(model, "CPU", config).create_infer_request()
        except RuntimeError as error:
            raise BadBundle(f"OpenVINO cannot compile {onnx}: {error}.") from error

    @classmethod
    def open(
        cls,
        bundle: Bundle,
        *,
        precision: Precision | Literal["auto"] = "auto",
        threads: int = 0,
        cache_dir: Path | None = None,
    ) -> OpenVINORuntime:
        """Open a bundle; `auto` takes the fastest precision that `choose_precision` allows."""
        return cls(
            bundle.onnx,
            bundle.memory_bank(),
            precision=choose_precision(bundle.report()) if precision == "auto" else precision,
            threads=threads,
            cache_dir=cache_dir,
        )

    @property
    def image_size(self) -> int:
        return self._image_size

    def infer(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        try:
            found = [self._infer_one(image) for image in images]
        except RuntimeError as error:
            raise RuntimeFailed(f"OpenVINO failed: {error}.") from error
        scores, maps = zip(*found, strict=True)
        return np.array(scores, np.float32), np.stack(maps)

    def _infer_one(self, image: NDArray[np.uint8]) -> tuple[float, NDArray[np.float32]]:
        """One image (S, S, 3) -> raw score and raw map (h, w)."""
        # Never share_inputs: with it OpenVINO 2026.4 now and then scored the image before.
        outputs = self._request.infer({"image": image[None]}, share_outputs=True)
        if self._search is None:
            return float(outputs["score"][0]), outputs["map"][0].copy()
        return self._search.score(outputs["embedding"][0])

    def close(self) -> None:
        del self._request, self._search


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 natively (AVX512-BF16 or AMX)."""
    return "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def choose_precision(report: dict[str, Any]) -> Precision:
    """The fastest precision that this CPU has and the export's report.json found good."""
    parity = report.get("parity", {})
    fast = [name for name in PRECISIONS if parity.get(f"openvino_{name}", {}).get("ok") is True]
    return fast[0] if fast and cpu_has_bf16() else "f32"


def _read(core: ov.Core, onnx: Path) -> ov.Model:
    try:
        return core.read_model(onnx)
    except RuntimeError as error:
        raise BadBundle(f"{onnx} is not an ONNX model that OpenVINO can read: {error}.") from error


def _sizes(model: ov.Model, onnx: Path) -> tuple[int, tuple[int, int]]:
    """The side of the input and the size of the map (h, w); BadBundle if the graph is not ours."""
    try:
        _, side, other, channels = model.input("image").partial_shape
        _, height, width = model.output("map").partial_shape
        model.output("score")
        if side.is_static and side == other and channels.get_length() == 3:
            return side.get_length(), (height.get_length(), width.get_length())
    except (RuntimeError, ValueError):
        pass
    raise BadBundle(
        f"{onnx} was not exported by convtrt.py: it needs an input `image` (N, S, S, 3)"
        " and the outputs `score` and `map`."
    )


def _cut_at_embedding(model: ov.Model, onnx: Path, bank: NDArray[np.float32]) -> ov.Model:
    """The part of a PatchCore graph from `image` to `embedding` (N, patches, C)."""
    for node in model.get_ordered_ops():
        for output in node.outputs():
            if "embedding" in output.names:
                channels = output.partial_shape[2].get_length()
                if channels != bank.shape[1]:
                    raise BadBundle(
                        f"The memory bank has {bank.shape[1]} channels, but {onnx} makes"
                        f" {channels}: they are from different trainings."
                    )
                cut = ov.Model([ops.result(output)], [model.input("image").get_node()])
                cut.outputs[0].set_names({"embedding"})
                return cut
    raise BadBundle(f"{onnx} has no tensor `embedding`, so it takes no memory bank.")


class _Search:
    """Nearest neighbours in a memory bank, and PatchCore's image score from them."""

    def __init__(
        self,
        core: ov.Core,
        bank: NDArray[np.float32],
        map_size: tuple[int, int],
        config: dict[str, Any],
        *,
        in_bf16: bool,
    ) -> None:
        self._map_size = map_size
        # Distances do not change when both sides move by the mean; smaller numbers lose less
        # to rounding where a square is the difference of large products.
        self._mean = bank.mean(axis=0)
        self._bank = bank - self._mean  # (M, C)
        self._in_use: list[NDArray[np.uint16]] = []  # OpenVINO does not keep its constants alive
        self._half_norm = 0.5 * np.einsum("mc,mc->m", self._bank, self._bank)  # (M,)
        patches = map_size[0] * map_size[1]
        graph = self._nearest_in_bf16(patches) if in_bf16 else self._nearest_in_f32(patches)
        # "f32" leaves what is bf16 in the graph as it is, and makes nothing else bf16.
        config = {**config, "INFERENCE_PRECISION_HINT": "f32"}
        self._nearest = core.compile_model(graph, "CPU", config).create_infer_request()
        self._scan = core.compile_model(self._scan_graph(), "CPU", config).create_infer_request()

    def _nearest_in_f32(self, patches: int) -> ov.Model:
        """embedding (P, C) -> distance of each patch to the bank (P,)."""
        embedding, query = self._query(patches)
        # |e - b|^2 / 2 = |e|^2 / 2 + (|b|^2 / 2 - e.b): only the bracket differs between rows b
        brackets = []
        for start in range(0, len(self._bank), TILE):
            tile = ops.constant(self._bank[start : start + TILE], shared_memory=True)
            product = ops.matmul(tile, query, False, True)  # (tile, P)
            half_norm = ops.constant(self._half_norm[start : start + TILE, None])
            brackets.append(ops.reduce_min(ops.subtract(half_norm, product), 0))
        half = ops.add(_half_square(query, keep_axis=False), reduce(ops.minimum, brackets))
        return ov.Model([_distance(half)], [embedding])

    def _nearest_in_bf16(self, patches: int) -> ov.Model:
        """embedding (P, C) -> distance of each patch to the bank (P,), the search in bf16.

        Rows carry half their squared norm in columns of their own, so that the product of two is
        |e - b|^2 / 2, summed in float32 and then rounded to bf16. A plain product would be rounded
        before the norms are added, which loses four times as much where the two nearly cancel.
        A norm takes two columns, the second for what bf16 rounds off the first.
        """
        embedding, query = self._query(patches)
        half = _half_square(query, keep_axis=True)  # (P, 1)
        high = ops.convert(ops.convert(half, "bf16"), "f32")
        ones = ops.constant(np.ones((patches, 2), np.float32))
        augmented = ops.concat([query, ones, high, ops.subtract(half, high)], 1)  # (P, C + 4)
        in_bf16 = ops.convert(augmented, "bf16")
        halves = []
        for start in range(0, len(self._bank), TILE):
            rows = slice(start, start + TILE)
            bits = _augmented_bits(self._bank[rows], self._half_norm[rows])
            self._in_use.append(bits)
            tensor = ov.Tensor(bits, list(bits.shape), ov.Type.bf16)
            tile = ops.constant(tensor, shared_memory=True)
            halves.append(ops.reduce_min(ops.matmul(tile, in_bf16, False, True), 0))
        return ov.Model([_distance(ops.convert(reduce(ops.minimum, halves), "f32"))], [embedding])

    def _query(self, patches: int) -> tuple[Any, Any]:
        """The parameter embedding (P, C), and the same with the bank's mean taken off."""
        embedding = ops.parameter([patches, self._bank.shape[1]], np.float32, name="embedding")
        return embedding, ops.subtract(embedding, ops.constant(self._mean[None]))

    def _scan_graph(self) -> ov.Model:
        """queries (K, C) -> half the squared distance to every row, less |query|^2 / 2: (M, K)."""
        queries = ops.parameter([-1, self._bank.shape[1]], np.float32, name="queries")
        product = ops.matmul(ops.constant(self._bank, shared_memory=True), queries, False, True)
        half_norm = ops.constant(self._half_norm[:, None])
        return ov.Model([ops.result(ops.subtract(half_norm, product))], [queries])

    def score(self, embedding: NDArray[np.float32]) -> tuple[float, NDArray[np.float32]]:
        """The embedding (P, C) of one image -> raw score and raw map (h, w)."""
        distance = self._nearest.infer([embedding])[0]  # (P,)
        likely = np.argsort(distance)[-CANDIDATES:]
        score = self._image_score(embedding[likely] - self._mean)
        return score, distance.reshape(self._map_size)

    def _image_score(self, queries: NDArray[np.float32]) -> float:
        """PatchCore's weighted score (eq. 7 of arXiv:2106.08265, as anomalib computes it).

        Args:
            queries: (K, C) the patches that lie farthest from the bank, the mean taken off.
        """
        nearest = self._scan.infer([queries])[0].argmin(axis=0)  # (K,)
        distance = np.linalg.norm(queries - self._bank[nearest], axis=1)
        decides = distance.argmax()
        near = self._bank[nearest[decides]]
        from_near = self._scan.infer([near[None]])[0][:, 0]  # (M,)
        count = min(NEIGHBOURS, len(from_near))
        neighbours = np.argpartition(from_near, count - 1)[:count]
        reach = np.linalg.norm(queries[decides] - self._bank[neighbours], axis=1)
        own = np.linalg.norm(queries[decides] - near)
        weight = 1 - 1 / np.exp(reach - own).sum()
        return float(weight * distance[decides])


def _half_square(rows: Any, *, keep_axis: bool) -> Any:
    """Half the squared norm of each row of a node."""
    return ops.multiply(ops.reduce_sum(ops.multiply(rows, rows), 1, keep_axis), np.float32(0.5))


def _distance(half_squared: Any) -> Any:
    return ops.result(ops.sqrt(ops.relu(ops.multiply(half_squared, np.float32(2)))))


def _augmented_bits(
    bank: NDArray[np.float32], half_norm: NDArray[np.float32]
) -> NDArray[np.uint16]:
    """Rows b (n, C) as [-b, norm in two columns, 1, 1] in bf16: the bits of (n, C + 4)."""
    high = (_bf16_bits(half_norm).astype(np.uint32) << 16).view(np.float32)
    norm, ones = np.stack([high, half_norm - high], axis=1), np.ones((len(bank), 2), np.float32)
    return _bf16_bits(np.hstack([-bank, norm, ones]))


def _bf16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Rounded to the nearest bf16, as its 16 bits."""
    return ((values.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)
