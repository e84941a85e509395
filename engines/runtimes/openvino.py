"""OpenVINO on a CPU: the runtime of every machine without TensorRT.

A PatchCore graph is cut at its tensor `embedding`. What is before runs as exported; what is after,
the search in the memory bank, is `engines.runtimes.bank_search`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import openvino as ov
import openvino.opset13 as ops
from numpy.typing import NDArray

from engines.errors import BadBundle, OutOfMemory, RuntimeFailed
from engines.machine.memory import MIB, free_bytes
from engines.machine.memory_needs import BANK_FACTOR, FIXED, GRAPH_FACTOR
from engines.regions import hide, shown
from engines.runtimes import ALONE, WORTH, Batches, look_past_regions, only_whole
from engines.runtimes.bank_search import Floats, Search, cores, side_by_side
from engines.runtimes.compiled_cache import seal_cache
from engines.runtimes.openvino_int8 import cpu_adds_int8_up, round_in_float32
from engines.runtimes.openvino_lighter import lighten
from engines.store.bundle import Bundle
from engines.store.onnx_weights import check_weights

# bf16 is for graphs without a memory bank: in a backbone before one it moved the score of one of 78
# photos by more than 1 %. It is for the whole graph, or for as much of it as the export proved: see
# `float32_convolutions`.
Precision = Literal["f32", "bf16"]


# Side by side images share the cores with what decodes better, too, and no trial sees that: two
# cores of a server judge a tenth more parts with it where it takes as long in a trial.
SIDE_BY_SIDE = 1.1
TOGETHER = 4  # images: 8 gain a little more, and the first waits twice as long

# Operations that may give a number where they were given NaN, and some that never do.
_HIDE_NAN = {"ReduceMax", "ReduceMin", "MaxPool", "Relu", "Clamp", "Maximum", "Minimum"}
_KEEP_NAN = {
    "Squeeze", "Unsqueeze", "Reshape", "Gather", "Slice", "StridedSlice", "Transpose", "Convert",
    "Add", "Subtract", "Multiply", "Divide", "Sqrt", "Power", "Abs", "Negative",
}  # fmt: skip


@dataclass(frozen=True)
class _Ready:
    """What runs so many images at once; one object, to be exchanged while another thread runs.

    They are one batch, for one request; or side by side, with a request and a share of the cores
    for each. Of a graph before a memory bank a batch gains nothing, and the search sees one image
    at a time, which the more cores the less of each one makes quicker.
    """

    batches: Batches
    compiled: ov.CompiledModel
    requests: list[ov.InferRequest]

    @classmethod
    def of(
        cls,
        compiled: ov.CompiledModel,
        batches: Batches,
        keep: NDArray[np.float32] | None,
        side_by_side: bool = False,
    ) -> _Ready:
        """`keep` (h, w) is for a graph that has this input; it stays there for all images."""
        count = batches.size if side_by_side else 1
        requests = [compiled.create_infer_request() for _ in range(count)]
        if keep is not None:
            for request in requests:
                request.get_tensor("keep").data[:] = keep
        return cls(batches, compiled, requests)


class OpenVINORuntime:
    """A model on the CPU; see `engines.runtimes.Runtime`."""

    name = "openvino"
    pads = True

    def __init__(
        self,
        onnx: Path,
        memory_bank: NDArray[np.float32] | None = None,
        *,
        precision: Precision = "f32",
        float32_convolutions: int | None = None,
        threads: int = 0,
        cache_dir: Path | None = None,
    ) -> None:
        """Compile the graph.

        Args:
            onnx: the exported graph.
            memory_bank: (M, C) float32, for a graph that has the input `memory_bank`. Copied.
            precision: see `Precision`; with a memory bank it is float32, whatever is asked for.
            float32_convolutions: of a graph without a bank so many stay in float32 where it is
                bf16; None: none, nor anything else.
            threads: CPU threads, 0 for all cores.
            cache_dir: where compiled graphs are kept, so that the next start is faster.

        Raises:
            BadBundle: the graph cannot be read, or does not fit the bank.
        """
        self.precision: str = "f32" if memory_bank is not None else precision
        core = self._core = ov.Core()
        in_part = float32_convolutions is not None
        config: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": "f32" if in_part else self.precision,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
        }
        model = read_graph(core, onnx)
        self._image_size, self._map_size = _sizes(model, onnx)
        self._places = _places(model, onnx)
        self._shown: NDArray[np.bool_] | None = None  # of a map, where not all is
        check_weights(onnx)
        _show_what_hides(model)
        self._threads = threads
        self._search: Search | None = None
        self._rows: int | None = None
        self._float32_convolutions = float32_convolutions if precision == "bf16" else None
        if memory_bank is not None:
            if self._places not in (None, self._map_size):
                raise BadBundle(f"{onnx} was not exported by convtrt.py: `keep` is not of its map.")
            self._rows, self._channels = memory_bank.shape
            model = _cut_at_embedding(model, onnx, self._channels)
            self._search = Search(memory_bank)
        elif {name for one in model.inputs for name in one.names} - {"image", "keep"}:
            raise BadBundle(f"{onnx} needs a memory bank, and none was given.")
        else:
            self._lighten(model)
        self._keep = self._all_count()
        self._cache_dir = cache_dir
        if cache_dir is not None:
            config["CACHE_DIR"] = str(cache_dir)
        self._onnx, self._compiling = onnx, config
        self._graph_bytes = onnx.stat().st_size
        self._alone = self._together = self._ready(self._compile(model, 1), ALONE)
        self._prepared: _Ready | None = None

    def _lighten(self, model: ov.Model) -> None:
        """Rewrite a whole graph, but for one that OpenVINO itself is to bring to bf16."""
        if self.precision == "f32" or self._float32_convolutions is not None:
            lighten(model, self._float32_convolutions)

    def _compile(self, model: ov.Model, batch: int, side_by_side: int = 1) -> ov.CompiledModel:
        """For a fixed number of images: one that may change costs 2 ms for each image."""
        model.reshape({"image": [batch, self._image_size, self._image_size, 3]})
        _check_tensors(model, self._onnx)
        config = {**self._compiling, "NUM_STREAMS": side_by_side}
        try:
            compiled = self._core.compile_model(model, "CPU", config)
        except RuntimeError as error:
            raise BadBundle(f"OpenVINO cannot compile {self._onnx}: {error}.") from error
        seal_cache(self._cache_dir)
        return compiled

    @property
    def batches(self) -> Batches:
        return self._together.batches

    @property
    def worth(self) -> float:
        return WORTH if self._search is None else SIDE_BY_SIDE

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        if self._search is None:
            return (TOGETHER,)
        at_once = min(self._threads or cores(), TOGETHER)
        return (at_once,) if at_once > 1 else ()

    def prepare(self, size: int) -> None:
        if self._ready_for(size) is None:
            self._prepared = None  # before the next one takes memory
            model = read_graph(self._core, self._onnx)  # again: to keep it would take memory
            _show_what_hides(model)
            if self._search is not None:
                model = _cut_at_embedding(model, self._onnx, self._channels)
                compiled = self._compile(model, 1, side_by_side=size)
            else:
                self._lighten(model)
                compiled = self._compile(model, size)
            self._prepared = self._ready(compiled, Batches(size))

    def _ready(self, compiled: ov.CompiledModel, batches: Batches) -> _Ready:
        return _Ready.of(compiled, batches, self._keep, side_by_side=self._search is not None)

    def take_together(self, batches: Batches) -> None:
        self.prepare(batches.size)
        ready = self._ready_for(batches.size)
        assert ready is not None
        self._together, self._prepared = replace(ready, batches=batches), None

    def _ready_for(self, size: int) -> _Ready | None:
        known = (self._alone, self._together, self._prepared)
        return next((one for one in known if one is not None and one.batches.size == size), None)

    @classmethod
    def open(
        cls,
        bundle: Bundle,
        *,
        precision: Precision | Literal["auto"] = "auto",
        threads: int = 0,
        cache_dir: Path | None = None,
    ) -> OpenVINORuntime:
        """Open a bundle; `auto` takes what `choose_precision` says."""
        report = bundle.report()
        runtime = cls(
            bundle.onnx,
            bundle.memory_bank(),
            precision=choose_precision(report) if precision == "auto" else precision,
            float32_convolutions=float32_convolutions(report),
            threads=threads,
            cache_dir=cache_dir,
        )
        look_past_regions(runtime, bundle)
        return runtime

    @property
    def image_size(self) -> int:
        return self._image_size

    @property
    def bank_rows(self) -> int | None:
        return self._rows

    @property
    def places(self) -> tuple[int, int] | None:
        return self._places

    def count_only(self, keep: NDArray[np.float32]) -> None:
        self._shown = shown(keep, self._map_size)
        if self._search is not None:
            self._search.count_only(keep)
            return
        self._keep = keep
        for request in (*self._alone.requests, *self._together.requests):
            request.get_tensor("keep").data[:] = keep

    def _all_count(self) -> NDArray[np.float32] | None:
        """What the graph that is run takes as `keep`; None where it has no such input."""
        inside = self._search is None and self._places is not None
        return np.ones(self._places or (), np.float32) if inside else None

    @property
    def nbytes(self) -> int:
        bank = 0 if self._rows is None else self._rows * self._channels * 4
        fixed = FIXED * (self._image_size / 256) ** 2
        return int(self._graph_bytes * GRAPH_FACTOR + bank * BANK_FACTOR + fixed)

    def infer(
        self, images: NDArray[np.uint8], size: int | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        ready = self._together if size is None else self._ready_for(size)
        assert ready is not None, f"prepare({size}) comes first"
        size = ready.batches.size
        try:
            found = [
                one
                for start in range(0, len(images), size)
                for one in self._infer_some(images[start : start + size], ready)
            ]
        except RuntimeError as error:
            raise RuntimeFailed(f"OpenVINO failed: {error}.") from error
        scores, each = zip(*found, strict=True)
        maps = np.stack(each)
        whole = only_whole(np.array(scores, np.float32), maps)
        return whole, maps if self._shown is None else hide(maps, self._shown)

    def _infer_some(
        self, images: NDArray[np.uint8], ready: _Ready
    ) -> Iterator[tuple[float, NDArray[np.float32]]]:
        """As many images (n, S, S, 3) as are ready -> raw score and raw map (h, w) of each."""
        if self._search is not None:
            yield from self._search_some(images, ready, self._search)
            return
        (request,), count = self._alone.requests, len(images)
        if count > 1:
            (request,), padding = ready.requests, ready.batches.size - count
            images = np.concatenate([images, np.zeros((padding, *images.shape[1:]), np.uint8)])
        outputs = _run(request, images)
        for index in range(count):
            score, before = outputs["score"][index : index + 1], range(2, len(outputs))
            (whole,) = only_whole(score, *(outputs[at][index : index + 1] for at in before))
            yield float(whole), outputs["map"][index].copy()

    def _search_some(
        self, images: NDArray[np.uint8], ready: _Ready, search: Search
    ) -> Iterator[tuple[float, NDArray[np.float32]]]:
        """The same with a memory bank: several images side by side, one with all cores."""
        if len(images) == 1:
            ready = self._alone
        threads = max(1, (self._threads or cores()) // len(ready.requests))

        def look(request: ov.InferRequest, image: NDArray[np.uint8]) -> tuple[float, Floats]:
            return search.score(_run(request, image[None])["embedding"][0], threads)

        for score, distances in side_by_side(look, ready.requests, images, of="images"):
            yield score, distances.reshape(self._map_size)

    def with_bank(self, bank: NDArray[np.float32] | None, precision: str) -> OpenVINORuntime | None:
        if precision != self.precision or (bank is None) != (self._search is None):
            return None
        if bank is not None and bank.shape[1] != self._channels:
            return None
        other = copy.copy(self)  # the compiled graph is the same object, and kept by both
        keep, together = self._all_count(), self._together  # once: another thread may exchange it
        other._keep, other._shown = keep, None
        other._alone = other._ready(self._alone.compiled, ALONE)
        other._together = replace(other._alone, batches=together.batches)
        if together.batches.size > 1:
            other._together = other._ready(together.compiled, together.batches)
        other._prepared = None
        if bank is not None:
            other._search = Search(bank)
            other._rows = len(bank)
        return other

    def close(self) -> None:
        del self._alone, self._together, self._prepared, self._search


def _run(request: ov.InferRequest, images: NDArray[np.uint8]) -> Any:
    # Never share_inputs: with it OpenVINO 2026.4 now and then scored the image before.
    return request.infer({"image": images}, share_outputs=True)


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 natively (AVX512-BF16 or AMX)."""
    return "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def choose_precision(report: dict[str, Any]) -> Precision:
    """bf16 where this CPU has it and the export's report.json found it good, else float32."""
    good = _found_in_bf16(report).get("ok") is True
    return "bf16" if good and cpu_has_bf16() else "f32"


def float32_convolutions(report: dict[str, Any]) -> int | None:
    """How many convolutions stay in float32 where the rest is bf16; None: the export tried none."""
    count = _found_in_bf16(report).get("float32_convolutions")
    return count if type(count) is int and count >= 0 else None


def _found_in_bf16(report: dict[str, Any]) -> dict[str, Any]:
    parity = report.get("parity")
    found = parity.get("openvino_bf16") if isinstance(parity, dict) else None
    return found if isinstance(found, dict) else {}


def read_graph(core: ov.Core, onnx: Path) -> ov.Model:
    """An ONNX graph, such that this CPU computes it as it says; BadBundle if it cannot be read."""
    try:
        model = core.read_model(onnx)
    except RuntimeError as error:
        raise BadBundle(f"{onnx} is not an ONNX model that OpenVINO can read: {error}.") from error
    if not cpu_adds_int8_up():
        round_in_float32(model)
    return model


def _show_what_hides(model: ov.Model) -> None:
    """Add to a graph's outputs what score and map are the maximum of, or are cut off from.

    OpenVINO makes numbers of NaN there: of a VAE's map, for instance, which is the maximum of each
    2 x 2 pixels. Looked for only from the end of the graph on, as far as numbers are merely moved
    and reckoned with; so these tensors are about as small as a map.
    """
    ends = [model.output(name).get_node().input_value(0) for name in ("score", "map")]
    found: dict[tuple[str, int], ov.Output] = {}
    seen: set[str] = set()
    while ends:
        node = ends.pop().get_node()
        if node.get_friendly_name() in seen or node.get_type_name() not in _HIDE_NAN | _KEEP_NAN:
            continue
        seen.add(node.get_friendly_name())
        sources = [value for value in node.input_values() if _is_per_image(value)]
        ends += sources
        if node.get_type_name() in _HIDE_NAN:
            for value in sources:
                found[value.get_node().get_friendly_name(), value.get_index()] = value
    model.add_outputs(list(found.values()))


def _is_per_image(value: ov.Output) -> bool:
    """Whether a tensor is made of the images, (N, ...), and no constant."""
    shape = value.partial_shape
    is_real = bool(value.get_element_type().is_real())
    return is_real and shape.rank.get_length() > 0 and bool(shape[0].is_dynamic)


def _check_tensors(model: ov.Model, onnx: Path) -> None:
    """Raise OutOfMemory for a graph one of whose tensors is larger than the memory that is free.

    A few bytes of ONNX may make gigabytes, and the system may end the process for them.
    """
    outputs = (output for node in model.get_ordered_ops() for output in node.outputs())
    static = (one for one in outputs if one.get_partial_shape().is_static)
    sizes = (math.prod(one.get_shape()) * one.get_element_type().size for one in static)
    largest = max(sizes, default=0)
    if (free := free_bytes()) < largest:
        raise OutOfMemory(
            f"{onnx} makes a tensor of {largest // MIB:,} MiB, and {free // MIB:,} MiB are free: it"
            " is not opened."
        )


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


def _places(model: ov.Model, onnx: Path) -> tuple[int, int] | None:
    """The shape of the input `keep` (h, w), None for a graph of an older Kensa, which has none."""
    shape = next((one.partial_shape for one in model.inputs if "keep" in one.names), None)
    if shape is None:
        return None
    if shape.is_dynamic or len(shape) != 2:
        raise BadBundle(f"{onnx} was not exported by convtrt.py: its input `keep` is {shape}.")
    height, width = shape.to_shape()
    return height, width


def _cut_at_embedding(model: ov.Model, onnx: Path, expected: int) -> ov.Model:
    """The part of a PatchCore graph from `image` to `embedding` (N, patches, C = expected)."""
    for node in model.get_ordered_ops():
        for output in node.outputs():
            if "embedding" in output.names:
                channels = output.partial_shape[2].get_length()
                if channels != expected:
                    raise BadBundle(
                        f"The memory bank has {expected} channels, but {onnx} makes"
                        f" {channels}: they are from different trainings."
                    )
                cut = ov.Model([ops.result(output)], [model.input("image").get_node()])
                cut.outputs[0].set_names({"embedding"})
                return cut
    raise BadBundle(f"{onnx} has no tensor `embedding`, so it takes no memory bank.")
