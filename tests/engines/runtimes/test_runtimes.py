"""What every inference runtime must do. A new one is added to OPENERS, and runs all of it.

The judges are the formula of PatchCore written out in numpy, and anomalib's own PatchcoreModel.
"""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from engines.errors import BadBundle, RuntimeFailed
from engines.files import sha256
from engines.image import resize
from engines.meta import Meta
from engines.runtimes import ALONE, Batches, Runtime, cuda
from engines.runtimes.compiled_cache import usable_cache
from engines.runtimes.cuda import gpu
from engines.runtimes.openvino import OpenVINORuntime, choose_precision, cpu_has_bf16
from engines.runtimes.tensorrt import TensorRTRuntime
from engines.store.bundle import Bundle
from engines.verdict import decide
from support.double import RTX, doubled
from support.graphs import value
from support.plans import SIDE, build, tiny_bank, tiny_onnx
from support.project import ROOT

Bank = NDArray[np.float32]
Images = NDArray[np.uint8]
Opener = Callable[[Path, Bank | None], Runtime]

NEIGHBOURS = 9  # anomalib's num_neighbors
SIZE, CHANNELS, PATCHES = 128, 384, (16, 16)  # of resnet18, layer2 and layer3


Node = tuple[str, list[str], str, dict[str, Any]]  # what it does, to what, its name, how


def as_channels(name: str, what: str) -> list[Node]:
    """A map (N, h, w) through an operation that wants (N, C, h, w)."""
    return [
        ("Unsqueeze", [name, "first"], "wide", {}),
        (what, ["wide"], "most_of_each", {"kernel_shape": [1, 1]}),
        ("Squeeze", ["most_of_each", "first"], "map", {}),
    ]


def ending_in(nodes: list[Node]) -> bytes:
    """A graph whose map is made from `features_`: green less red; its score is the largest."""
    constants = {
        "weights": np.float32([-1, 2, 0]), "zero": np.float32(0), "most": np.float32(1e6),
        "one": np.float32(1), "first": np.array([1], np.int64),
    }  # fmt: skip
    made = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["pixels", "weights"], ["features_"]),
        *(helper.make_node(what, of, [name], **how) for what, of, name, how in nodes),
        helper.make_node("ReduceMax", ["map"], ["score"], axes=[1, 2], keepdims=0),
    ]
    whole = helper.make_graph(
        made,
        "tiny",
        [value("image", TensorProto.UINT8, ["n", 4, 4, 3])],
        [value("score", TensorProto.FLOAT, ["n"]), value("map", TensorProto.FLOAT, ["n", 4, 4])],
        [numpy_helper.from_array(np.asarray(one), name) for name, one in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    graph: bytes = helper.make_model(whole, ir_version=8, opset_imports=opsets).SerializeToString()
    return graph


@dataclass(frozen=True)
class Kind:
    """One way to run a model, and how near it comes to the float32 scores."""

    open: Opener
    relative: float  # of a score
    map_error: float  # of a squared distance, as a share of the largest squared norm
    bankless: float = 1e-3  # relative, of a graph with its score inside
    available: Callable[[], bool] = lambda: True
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    least_rows: int = 1  # of a memory bank
    shown_farther: float = 0.0  # the share of places whose nearest row may be missed in a map


class OnTensorRT:
    """The double of a TensorRT; each graph is built once for all tests."""

    def __init__(self, version: str, device: str) -> None:
        self._version, self._device = version, device

    @contextmanager
    def around(self) -> Iterator[None]:
        """In the end nothing may be left on the device, and nothing may have been done wrong."""
        with (
            doubled(self._version, self._device) as self._double,
            tempfile.TemporaryDirectory() as folder,
        ):
            self._folder = Path(folder)
            yield
            gc.collect()  # a runtime that nobody closed goes with its last reference
            gpu().call(lambda: None)
            left = self._double.gpu.alive()
            cuda.close()
            assert left == {"contexts": 1}
            self._double.assert_clean()

    def open(self, onnx: Path, bank: Bank | None) -> Runtime:
        name = sha256(onnx) if onnx.is_file() else "none"
        plan = self._folder / name / "model.onnx.plan"
        if not plan.is_file():
            plan.parent.mkdir(exist_ok=True)
            build(self._double, onnx, plan)
        return TensorRTRuntime(plan, bank)


JETSON = OnTensorRT("10.3.0", "orin-nano")  # the GPU works in the memory of the machine
PC = OnTensorRT("11.4.0.106", "rtx")  # it has memory of its own, so images are copied
RTX_PC = OnTensorRT(RTX, "rtx")  # the same, on cuda-bindings; kernels are made when it is opened
OPENERS = {
    "openvino-f32": Kind(
        lambda onnx, bank: OpenVINORuntime(onnx, bank, precision="f32"),
        1e-3,
        1e-5,
        shown_farther=0.02,
    ),
    "openvino-bf16": Kind(
        lambda onnx, bank: OpenVINORuntime(onnx, bank, precision="bf16"),
        1e-3,
        1e-5,
        1e-2,
        cpu_has_bf16,
        shown_farther=0.02,
    ),
    "openvino-f32-in-batches": Kind(
        lambda onnx, bank: in_batches(onnx, bank), 1e-3, 1e-5, shown_farther=0.02
    ),
    "tensorrt-10.3": Kind(JETSON.open, 1e-3, 1e-5, around=JETSON.around, least_rows=9),
    "tensorrt-11.4": Kind(PC.open, 1e-3, 1e-5, around=PC.around, least_rows=9),
    "tensorrt-rtx": Kind(RTX_PC.open, 1e-3, 1e-5, around=RTX_PC.around, least_rows=9),
}


def in_batches(onnx: Path, bank: Bank | None) -> Runtime:
    runtime = OpenVINORuntime(onnx, bank, precision="f32")
    runtime.take_together(Batches(3))
    return runtime


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Which kinds a test runs: each beside those whose code it shares would prove nothing more.

    A bank is searched in float32 whatever is asked for, and what takes no parts takes no batches.
    """
    if "kind" not in metafunc.fixturenames:
        return
    needless = {"openvino-bf16"} if "bank" in metafunc.fixturenames else set()
    if "runtime" not in metafunc.fixturenames:
        needless.add("openvino-f32-in-batches")
    names = [name for name in OPENERS if name not in needless]
    metafunc.parametrize("kind", names, indirect=True, scope="module")


@pytest.fixture(scope="module")
def kind(request: pytest.FixtureRequest) -> Iterator[Kind]:
    found = OPENERS[request.param]
    if not found.available():
        pytest.skip(f"this machine has no {request.param}")
    with found.around():
        yield found


@pytest.fixture(scope="module")
def model(trained: Path) -> Any:
    """The torch model; its pictures are smaller than it learned, for the sake of time."""
    from workers.models import patchcore

    meta = Meta.read(trained / "meta.json").with_(image_size=SIZE)
    built = patchcore.build(meta, trained / "model.pth")
    patchcore.load(built, trained / "memory_bank.npz")
    return built


@pytest.fixture(scope="module")
def graph(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from workers.converting.export import export_onnx
    from workers.models import patchcore

    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    export_onnx(*patchcore.graph(model, half=False), path, 17)
    return path


@pytest.fixture(scope="module")
def bank(kensa_model: Path) -> Bank:
    found = Bundle.open(kensa_model).memory_bank()
    assert found is not None
    return found


@pytest.fixture(scope="module")
def images(kensa_model: Path) -> Images:
    """Good and bad parts (N, S, S, 3), and a picture of noise."""
    with np.load(kensa_model / "golden.npz") as file:
        parts = np.stack([resize(image, SIZE) for image in file["images"][::4]])
    noise = np.random.default_rng(0).integers(0, 256, parts[:1].shape, dtype=np.uint8)
    return np.concatenate([parts, noise])


@pytest.fixture(scope="module")
def embeddings(model: Any, images: Images) -> NDArray[np.float32]:
    """(N, patches, C) of `images`, from the torch model in float32."""
    import torch

    with torch.inference_mode():
        return np.asarray(model.embed(torch.from_numpy(images))[0].numpy())


@pytest.fixture(scope="module")
def of_anomalib(trained: Path, images: Images, bank: Bank) -> NDArray[np.float32]:
    """Scores (N,) of `images` by anomalib's model with the same weights and bank."""
    import torch
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel

    model = PatchcoreModel(["layer2", "layer3"], backbone="resnet18", pre_trained=False)
    state = torch.load(trained / "model.pth", weights_only=True)["state_dict"]
    model.feature_extractor.feature_extractor.load_state_dict(state)
    model.memory_bank = torch.from_numpy(bank)
    model.eval()
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    with torch.inference_mode():
        scores = [model(picture[None]).pred_score for picture in (pixels - mean) / std]
    return np.asarray(torch.cat(scores).numpy())


@pytest.fixture(scope="module")
def runtime(kind: Kind, graph: Path, bank: Bank) -> Iterator[Runtime]:
    opened = kind.open(graph, bank)
    yield opened
    opened.close()


def plain_patchcore(
    embedding: NDArray[np.float32], bank: Bank
) -> tuple[float, NDArray[np.float64]]:
    """Eq. 6 and 7 of arXiv:2106.08265, as anomalib's PatchcoreModel.compute_anomaly_score.

    Args:
        embedding: (P, C) of one image.

    Returns:
        The image's score, and the distance of each patch to the bank (P,).
    """
    patches, rows = embedding.astype(np.float64), bank.astype(np.float64)
    squared = (patches**2).sum(1)[:, None] + (rows**2).sum(1) - 2 * patches @ rows.T
    distance = np.sqrt(np.maximum(squared, 0))  # (P, M)
    nearest = distance.min(axis=1)
    decides = nearest.argmax()
    near = rows[distance[decides].argmin()]
    neighbours = np.argsort(np.linalg.norm(rows - near, axis=1), kind="stable")[:NEIGHBOURS]
    reach = np.exp(distance[decides, neighbours] - distance[decides, neighbours].max())
    weight = 1 - reach[0] / reach.sum()  # softmax; the first neighbour is `near` itself
    return weight * nearest[decides], nearest


# Scores


def test_scores_and_maps_are_finite_float32_of_the_promised_shapes(
    runtime: Runtime, images: Images
) -> None:
    assert runtime.image_size == SIZE
    for n in (1, 2, len(images)):
        scores, maps = runtime.infer(images[:n])
        assert (scores.shape, maps.shape) == ((n,), (n, *PATCHES))
        assert scores.dtype == maps.dtype == np.float32
        assert np.isfinite(scores).all()
        assert np.isfinite(maps).all()
        assert (maps >= 0).all()


def test_different_images_have_different_scores(runtime: Runtime, images: Images) -> None:
    assert len(set(runtime.infer(images)[0])) == len(images)


def test_scores_are_those_of_patchcores_formula(
    kind: Kind, runtime: Runtime, images: Images, embeddings: NDArray[np.float32], bank: Bank
) -> None:
    scores, maps = runtime.infer(images)
    for embedding, score, found in zip(embeddings, scores, maps, strict=True):
        expected, nearest = plain_patchcore(embedding, bank)
        assert score == pytest.approx(expected, rel=kind.relative)
        # The square of a small distance is the difference of large products.
        limit = kind.map_error * ((embedding - bank.mean(axis=0)) ** 2).sum(axis=1).max()
        above = found.ravel() ** 2 - nearest**2
        assert above.min() >= -limit
        assert (above > limit).mean() <= kind.shown_farther


def test_scores_are_those_of_anomalibs_own_model(
    kind: Kind, runtime: Runtime, images: Images, of_anomalib: NDArray[np.float32]
) -> None:
    np.testing.assert_allclose(runtime.infer(images)[0], of_anomalib, rtol=kind.relative)


@pytest.mark.parametrize("rows", [1, 2, NEIGHBOURS - 1, NEIGHBOURS, NEIGHBOURS + 1, 999])
def test_a_bank_of_any_number_of_rows_scores_by_the_same_formula(
    kind: Kind, graph: Path, images: Images, embeddings: NDArray[np.float32], bank: Bank, rows: int
) -> None:
    small = bank[:rows].copy()
    if rows < kind.least_rows:
        with pytest.raises(BadBundle, match=f"{rows} rows, and TensorRT needs at least 9"):
            kind.open(graph, small)
        return
    runtime = kind.open(graph, small)
    score = runtime.infer(images[:1])[0][0]
    runtime.close()
    expected, _ = plain_patchcore(embeddings[0], small)
    assert score == pytest.approx(expected, rel=kind.relative, abs=1e-6)


def test_an_image_whose_patches_are_all_in_the_bank_is_at_distance_zero(
    kind: Kind, graph: Path, images: Images, embeddings: NDArray[np.float32], bank: Bank
) -> None:
    runtime = kind.open(graph, np.concatenate([bank, embeddings[0]]))
    (known, other), maps = runtime.infer(images[:2])
    runtime.close()
    assert maps[0].max() < maps[1].max() / 4
    assert known < other / 4


# The same image, the same score


def test_a_batch_scores_like_its_images_one_by_one(
    kind: Kind, runtime: Runtime, images: Images
) -> None:
    scores, maps = runtime.infer(images)
    for i, image in enumerate(images):
        score, one = runtime.infer(image[None])
        assert score[0] == pytest.approx(scores[i], rel=kind.relative)
        np.testing.assert_allclose(one[0], maps[i], atol=10 * kind.relative * maps[i].max())


@pytest.mark.parametrize("count", [1, 4, 5])
def test_a_batch_of_any_size_is_scored_whatever_size_the_runtime_is_ready_for(
    runtime: Runtime, images: Images, count: int
) -> None:
    before, some = runtime.batches, images[np.arange(count) % len(images)]
    runtime.take_together(ALONE)
    alone = runtime.infer(some)
    try:
        for size in (2, 4):
            runtime.take_together(Batches(size))
            for found, expected in zip(runtime.infer(some), alone, strict=True):
                np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    finally:
        runtime.take_together(before)


def test_what_is_prepared_runs_beside_what_is_in_use_and_changes_nothing_there(
    kind: Kind, graph: Path, images: Images, bank: Bank
) -> None:
    runtime = kind.open(graph, bank)
    before, some = runtime.batches, images[:4]
    expected = runtime.infer(some)
    for size in (2, 4):
        runtime.prepare(size)
        for at_once in (size, 1, None):
            for found, known in zip(runtime.infer(some, at_once), expected, strict=True):
                np.testing.assert_allclose(found, known, rtol=1e-3, atol=1e-3)
        assert runtime.batches == before
    other = runtime.with_bank(bank, runtime.precision)  # and is not handed on
    assert other is not None
    assert other.batches == before
    runtime.take_together(Batches(4, provisional=True))
    assert (runtime.batches, other.batches) == (Batches(4, provisional=True), before)
    for one in (runtime, other):
        np.testing.assert_allclose(one.infer(some)[0], expected[0], rtol=1e-3)
        one.close()


def test_sizes_may_be_exchanged_while_another_thread_infers(
    kind: Kind, graph: Path, images: Images, bank: Bank
) -> None:
    runtime = kind.open(graph, bank)
    expected, done = runtime.infer(images)[0], threading.Event()

    def infer() -> int:
        turns = 0
        while not done.is_set() or turns < 3:
            np.testing.assert_allclose(runtime.infer(images)[0], expected, rtol=1e-3)
            turns += 1
        return turns

    with ThreadPoolExecutor(1) as pool:
        inferring = pool.submit(infer)
        try:
            for size in (2, 1, 3, 2, 1):
                runtime.prepare(size)
                runtime.take_together(Batches(size))
        finally:
            done.set()
        assert inferring.result() >= 3
    assert runtime.batches == ALONE
    runtime.close()


def test_an_image_always_scores_the_same_whatever_came_before(
    runtime: Runtime, images: Images
) -> None:
    """OpenVINO with share_inputs now and then scored the image before."""
    expected = [runtime.infer(image[None])[0][0] for image in images]
    order = np.random.default_rng(1).permutation(np.repeat(np.arange(len(images)), 6))
    # All are kept: memory that is in use moves where the next buffers lie.
    kept = [(i, *runtime.infer(images[i : i + 1].copy())) for i in order]
    first = {i: maps for i, _, maps in reversed(kept)}
    for i, scores, maps in kept:
        assert scores[0] == expected[i]
        np.testing.assert_array_equal(maps, first[i])


def test_runtimes_opened_and_dropped_one_after_another_score_the_same(
    kind: Kind, graph: Path, images: Images, bank: Bank
) -> None:
    kept = []
    for turn in range(3):
        runtime = kind.open(graph, bank.copy())
        order = np.roll(np.arange(len(images)), turn)
        found = {i: runtime.infer(images[i][None]) for i in order}
        kept.append([found[i] for i in range(len(images))])
        if turn % 2:  # the others go without being closed
            runtime.close()
        del runtime
    for later in kept[1:]:
        for (score, map_), (again, map_again) in zip(kept[0], later, strict=True):
            np.testing.assert_array_equal(score, again)
            np.testing.assert_array_equal(map_, map_again)


def test_two_open_runtimes_do_not_disturb_each_other(
    kind: Kind, graph: Path, images: Images, bank: Bank, runtime: Runtime
) -> None:
    alone = runtime.infer(images[:1])[0][0]
    other = kind.open(graph, bank[:50].copy())
    others = other.infer(images[:1])[0][0]
    assert others != alone
    for _ in range(5):
        assert runtime.infer(images[:1])[0][0] == alone
        assert other.infer(images[:1])[0][0] == others
    other.close()
    assert runtime.infer(images[:1])[0][0] == alone


def test_an_image_that_lies_oddly_in_memory_scores_as_its_copy(
    runtime: Runtime, images: Images
) -> None:
    for view in (images[:1, ::-1], images[:1, :, ::-1], images[:1].transpose(0, 2, 1, 3)):
        assert not view.flags.c_contiguous
        score = runtime.infer(view)[0][0]
        assert score == runtime.infer(np.ascontiguousarray(view))[0][0]


def test_results_belong_to_the_caller(runtime: Runtime, images: Images) -> None:
    scores, maps = runtime.infer(images[:1])
    scores_then, maps_then = scores.copy(), maps.copy()
    for image in images[1:]:
        runtime.infer(image[None])
    np.testing.assert_array_equal(scores, scores_then)
    np.testing.assert_array_equal(maps, maps_then)
    scores[:], maps[:] = -1, -1  # and the caller may write into them
    again = runtime.infer(images[:1])
    np.testing.assert_array_equal(again[0], scores_then)
    np.testing.assert_array_equal(again[1], maps_then)


def test_the_image_and_the_bank_are_not_written_to(
    kind: Kind, graph: Path, images: Images, bank: Bank
) -> None:
    image, rows = images[:1].copy(), bank.copy()
    image.flags.writeable = rows.flags.writeable = False
    runtime = kind.open(graph, rows)
    runtime.infer(image)
    runtime.close()
    np.testing.assert_array_equal(image, images[:1])
    np.testing.assert_array_equal(rows, bank)


def test_a_runtime_outlives_the_bank_and_the_graph_it_was_opened_with(
    kind: Kind, graph: Path, images: Images, bank: Bank, runtime: Runtime, tmp_path: Path
) -> None:
    copy = tmp_path / "model.onnx"
    copy.write_bytes(graph.read_bytes())
    mine = bank.copy()
    opened = kind.open(copy, mine)
    del mine
    copy.unlink()
    filler = [np.full_like(bank, np.nan) for _ in range(8)]  # takes the memory that was freed
    scores = [opened.infer(image[None])[0][0] for image in images]
    opened.close()
    del filler
    assert scores == [runtime.infer(image[None])[0][0] for image in images]


# What is no number


ROOTS = {  # red pixels are below zero, where there is no root
    "the map is the root": [("Sqrt", ["features_"], "map", {})],
    "a maximum of each 1 x 1": [("Sqrt", ["features_"], "r", {}), *as_channels("r", "MaxPool")],
    "cut off at zero": [("Sqrt", ["features_"], "r", {}), ("Relu", ["r"], "map", {})],
    "kept within limits": [
        ("Sqrt", ["features_"], "r", {}), ("Clip", ["r", "zero", "most"], "c", {}),
        ("Mul", ["c", "one"], "map", {}),
    ],
    "the larger of two": [("Sqrt", ["features_"], "r", {}), ("Max", ["r", "zero"], "map", {})],
}  # fmt: skip


SEEN_IN_A_PLAN = {"the map is the root", "a maximum of each 1 x 1"}


@pytest.mark.parametrize("ends", ROOTS)
def test_a_map_that_is_no_number_is_no_score_and_its_neighbours_keep_theirs(
    kind: Kind, ends: str, tmp_path: Path
) -> None:
    if kind.around is not nullcontext and ends not in SEEN_IN_A_PLAN:
        pytest.skip("a plan gives score and map alone: our graphs hide nothing before these")
    path = tmp_path / "model.onnx"
    path.write_bytes(ending_in(ROOTS[ends]))
    runtime = kind.open(path, None)
    red, white = (np.full((4, 4, 3), colour, np.uint8) for colour in ([255, 0, 0], [9, 9, 9]))
    spot = white.copy()
    spot[2, 1] = red[0, 0]  # one pixel is enough
    alone, _ = runtime.infer(white[None])
    assert np.isfinite(alone).all()
    for together, broken in product((ALONE, Batches(3)), (red, spot)):
        runtime.take_together(together)
        scores, _ = runtime.infer(np.stack([white, broken, white]))
        assert [np.isfinite(score) for score in scores] == [True, False, True]
        assert scores[0] == scores[2] == pytest.approx(alone[0], rel=kind.bankless)
        with pytest.raises(RuntimeFailed, match="no verdict"):
            decide(float(scores[1]), 0.5)
    runtime.close()


# What is refused


@pytest.mark.parametrize("shape", [(1, 127, 128, 3), (1, 64, 64, 3), (1, 128, 128, 1),
                                   (128, 128, 3), (1, 3, 128, 128)])  # fmt: skip
def test_an_image_of_another_shape_fails_and_the_next_one_does_not(
    runtime: Runtime, images: Images, shape: tuple[int, ...]
) -> None:
    before = runtime.infer(images[:1])[0][0]
    with pytest.raises(RuntimeFailed):
        runtime.infer(np.zeros(shape, np.uint8))
    assert runtime.infer(images[:1])[0][0] == before


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_graph_that_is_cut_off_is_refused_by_name(
    kind: Kind, graph: Path, bank: Bank, tmp_path: Path, share: float
) -> None:
    data = graph.read_bytes()
    path = tmp_path / "model.onnx"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(BadBundle, match=r"model\.onnx"):
        kind.open(path, bank)


@pytest.mark.parametrize("content", [b"hello", b"\0" * 5000, b"\x08\x07" * 100])
def test_a_file_that_is_no_graph_is_refused_by_name(
    kind: Kind, bank: Bank, tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(BadBundle, match=r"model\.onnx"):
        kind.open(path, bank)


def test_a_graph_that_does_not_exist_is_refused_by_name(
    kind: Kind, bank: Bank, tmp_path: Path
) -> None:
    with pytest.raises(BadBundle, match=r"model\.onnx"):
        kind.open(tmp_path / "model.onnx", bank)


@pytest.mark.parametrize("channels", [1, CHANNELS - 1, 512])
def test_a_bank_of_other_channels_is_refused_and_both_numbers_are_named(
    kind: Kind, graph: Path, channels: int
) -> None:
    with pytest.raises(BadBundle) as caught:
        kind.open(graph, np.ones((20, channels), np.float32))
    assert f"{channels} channels" in str(caught.value)
    assert str(CHANNELS) in str(caught.value)


def test_a_graph_that_needs_a_bank_is_not_opened_without_one(kind: Kind, graph: Path) -> None:
    with pytest.raises(BadBundle, match="needs a memory bank"):
        kind.open(graph, None)


def foreign(path: Path, name: str, shape: list[int | str], outputs: list[str]) -> Path:
    """A graph of another tool, which gives its input back."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [helper.make_node("Identity", [name], [output]) for output in outputs]
    values = [helper.make_tensor_value_info(output, kind, shape) for output in outputs]
    entry = helper.make_tensor_value_info(name, kind, shape)
    model = helper.make_model(
        helper.make_graph(nodes, "foreign", [entry], values),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    ("name", "shape", "outputs"),
    [
        ("input", ["n", 3, 224, 224], ["output"]),
        ("input", ["n", 256, 256, 3], ["score", "map"]),
        ("image", ["n", 256, 256, 3], ["logits"]),
        ("image", ["n", 256, 256, 3], ["score", "map"]),
        ("image", ["n", 3, 256, 256], ["score", "map"]),
        ("image", ["n", "h", "w", 3], ["score", "map"]),
        ("image", ["n", 256, 128, 3], ["score", "map"]),
        ("image", ["n", 10], ["score", "map"]),
    ],
)
@pytest.mark.parametrize("with_bank", [True, False])
def test_a_graph_of_another_tool_is_refused_by_name(
    kind: Kind, bank: Bank, tmp_path: Path,
    name: str, shape: list[int | str], outputs: list[str], with_bank: bool,
) -> None:  # fmt: skip
    path = foreign(tmp_path / "model.onnx", name, shape, outputs)
    with pytest.raises(BadBundle, match=r"model\.onnx"):
        kind.open(path, bank if with_bank else None)


# Which places count


@pytest.fixture(params=[True, False], ids=["with a bank", "without"])
def asking(request: pytest.FixtureRequest, kind: Kind, tmp_path: Path) -> Iterator[Runtime]:
    """A model of 8 x 8 places that asks which of them count."""
    onnx = tiny_onnx(tmp_path / "model.onnx", bank=request.param)
    runtime = kind.open(onnx, tiny_bank(0) if request.param else None)
    yield runtime
    runtime.close()


def some_parts(count: int = 7) -> Images:
    return np.random.default_rng(3).integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)


def beside(runtime: Runtime) -> Runtime:
    bank = None if runtime.bank_rows is None else tiny_bank(0)
    other = runtime.with_bank(bank, runtime.precision)
    assert other is not None
    return other


def test_that_all_places_count_changes_nothing_to_the_bit(asking: Runtime) -> None:
    other, parts = beside(asking), some_parts()
    assert other.places == asking.places == (8, 8)
    other.count_only(np.ones((8, 8), np.float32))
    for found, expected in zip(other.infer(parts), asking.infer(parts), strict=True):
        np.testing.assert_array_equal(found, expected)
    other.close()


def test_only_what_counts_decides_a_score_and_is_shown(asking: Runtime) -> None:
    parts, keep = some_parts(), np.ones((8, 8), np.float32)
    scores, maps = asking.infer(parts)
    worst = np.array([np.unravel_index(one.argmax(), one.shape) for one in maps])
    keep[tuple(worst[:3].T)] = 0
    other = beside(asking)
    other.count_only(keep)
    found, shown = other.infer(parts)
    hit = keep[tuple(worst.T)] == 0
    assert hit[:3].all()
    assert not hit.all()
    np.testing.assert_array_equal(found[~hit], scores[~hit])
    assert (found[hit] < scores[hit]).all()
    # To rounding: what is measured as differences and not as products is what may decide.
    same = partial(np.testing.assert_allclose, rtol=1e-6)
    same(shown[:, keep == 1], maps[:, keep == 1])
    same(shown[:, keep == 0], maps[:, keep == 1].min(axis=1)[:, None].repeat((keep == 0).sum(), 1))
    # Whoever shares the engine is as before, and so is who takes it from here.
    np.testing.assert_array_equal(asking.infer(parts)[0], scores)
    np.testing.assert_array_equal(beside(other).infer(parts)[0], scores)


@pytest.mark.parametrize("counting", [1, 3, 40])
def test_a_part_is_as_strange_as_the_strangest_of_a_few_places_that_count(
    asking: Runtime, counting: int
) -> None:
    """Also where fewer count than are looked at twice."""
    keep = np.zeros(64, np.float32)
    keep[np.random.default_rng(counting).permutation(64)[:counting]] = 1
    asking.count_only(keep.reshape(8, 8))
    scores, maps = asking.infer(some_parts())
    assert np.isfinite(scores).all()
    most = maps.reshape(len(maps), -1)[:, keep == 1].max(axis=1)
    assert (scores <= most * 1.01).all()
    if asking.bank_rows is None:
        np.testing.assert_allclose(scores, most, rtol=1e-2)  # in bf16


def test_what_counts_is_the_same_for_parts_alone_and_together(asking: Runtime) -> None:
    keep = np.ones((8, 8), np.float32)
    keep[2:6, :4] = 0
    asking.count_only(keep)
    parts = some_parts()
    alone = np.concatenate([asking.infer(part[None])[0] for part in parts])
    asking.prepare(4)
    np.testing.assert_allclose(asking.infer(parts, 4)[0], alone, rtol=1e-3)
    asking.take_together(Batches(4))
    np.testing.assert_allclose(asking.infer(parts)[0], alone, rtol=1e-3)


def test_a_graph_of_an_older_kensa_judges_as_ever_and_asks_for_no_places(
    kind: Kind, tmp_path: Path
) -> None:
    parts = some_parts()
    for bank in (None, tiny_bank(0)):
        found = []
        for keep in (True, False):
            folder = tmp_path / f"{bank is None}{keep}"
            folder.mkdir()
            onnx = tiny_onnx(folder / "model.onnx", bank=bank is not None, keep=keep)
            runtime = kind.open(onnx, bank)
            assert runtime.places == ((8, 8) if keep else None)
            found.append(runtime.infer(parts))
        for new, old in zip(*found, strict=True):
            np.testing.assert_array_equal(new, old)


# Models without a bank


def bankless(path: Path) -> Path:
    """A graph with its score and map inside: the mean of the pixels, and of their channels."""
    helper, kinds = onnx.helper, onnx.TensorProto
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=kinds.FLOAT),
        helper.make_node("ReduceMean", ["pixels"], ["map"], axes=[3], keepdims=0),
        helper.make_node("ReduceMean", ["map"], ["score"], axes=[1, 2], keepdims=0),
    ]
    entry = helper.make_tensor_value_info("image", kinds.UINT8, ["n", 64, 64, 3])
    values = [
        helper.make_tensor_value_info("score", kinds.FLOAT, ["n"]),
        helper.make_tensor_value_info("map", kinds.FLOAT, ["n", 64, 64]),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "bankless", [entry], values),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    onnx.save(model, path)
    return path


def test_a_model_without_a_bank_gives_its_own_score_and_map(kind: Kind, tmp_path: Path) -> None:
    runtime = kind.open(bankless(tmp_path / "model.onnx"), None)
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    found = [runtime.infer(image[None]) for image in images]  # kept: the caller owns them
    runtime.close()
    for image, (scores, maps) in zip(images, found, strict=True):
        assert scores.dtype == maps.dtype == np.float32
        np.testing.assert_allclose(scores, [image.mean()], rtol=kind.bankless)
        np.testing.assert_allclose(maps[0], image.mean(axis=2), rtol=kind.bankless, atol=1)


def test_a_bank_for_a_model_that_takes_none_is_refused(
    kind: Kind, bank: Bank, tmp_path: Path
) -> None:
    with pytest.raises(BadBundle, match="takes no memory bank"):
        kind.open(bankless(tmp_path / "model.onnx"), bank)


# OpenVINO's own


def test_the_second_start_reads_what_the_first_one_compiled(
    kensa_model: Path, images: Images, tmp_path: Path
) -> None:
    bundle = Bundle.open(kensa_model)
    images = np.stack([resize(image, bundle.meta.image_size) for image in images])
    scores = []
    for turn in range(2):
        runtime = OpenVINORuntime.open(bundle, precision="f32", cache_dir=tmp_path)
        files = sorted((path.name, path.stat().st_mtime_ns) for path in tmp_path.iterdir())
        compiled = runtime._alone.compiled
        assert compiled.get_property("LOADED_FROM_CACHE") == bool(turn)
        scores.append([runtime.infer(image[None])[0][0] for image in images])
        runtime.close()
        if turn == 0:
            first = files
            assert first
    assert files == first
    assert scores[0] == scores[1]


@pytest.mark.parametrize(("threads", "sizes"), [(1, ()), (2, (2,)), (3, (3,)), (16, (4,))])
def test_with_a_bank_as_many_images_run_side_by_side_as_there_are_threads_but_four_at_most(
    threads: int, sizes: tuple[int, ...], tmp_path: Path
) -> None:
    onnx, parts = tiny_onnx(tmp_path / "model.onnx", bank=True), some_parts()
    runtime = OpenVINORuntime(onnx, tiny_bank(0), threads=threads)
    assert runtime.batch_sizes == sizes
    alone = runtime.infer(parts)
    for size in sizes:
        runtime.take_together(Batches(size))
        for found, expected in zip(runtime.infer(parts), alone, strict=True):
            np.testing.assert_array_equal(found, expected)  # to the bit
    runtime.close()


def test_many_callers_at_once_never_wait_for_each_others_threads(tmp_path: Path) -> None:
    """Images wait for the threads of their search: both in one pool, all of it might wait."""
    onnx, parts = tiny_onnx(tmp_path / "model.onnx", bank=True), some_parts()
    runtimes = [OpenVINORuntime(onnx, tiny_bank(0), threads=16) for _ in range(6)]
    for runtime in runtimes:
        runtime.take_together(Batches(4))
    expected = runtimes[0].infer(parts)[0]
    with ThreadPoolExecutor(len(runtimes)) as pool:
        for _ in range(5):  # each runtime by one thread at a time
            asked = [pool.submit(one.infer, parts) for one in runtimes]
            for one in asked:
                np.testing.assert_array_equal(one.result(timeout=60)[0], expected)


@pytest.mark.parametrize("has_bank", [True, False])
def test_networks_for_several_images_are_in_the_cache_of_the_next_start_too(
    has_bank: bool, tmp_path: Path
) -> None:
    """With a bank the network for one image serves several as well: not at once, but twice."""
    cache, onnx = tmp_path / "cache", tiny_onnx(tmp_path / "model.onnx", bank=has_bank)
    bank = tiny_bank(0) if has_bank else None
    for start in range(2):
        runtime = OpenVINORuntime(onnx, bank, threads=2, cache_dir=usable_cache(cache))
        runtime.prepare(2)
        assert runtime._prepared is not None
        streams = runtime._prepared.compiled.get_property("NUM_STREAMS")
        assert streams == len(runtime._prepared.requests) == (2 if has_bank else 1)
        made = sorted(path.name for path in cache.glob("*.blob"))
        assert len(made) == (1 if has_bank else 2)
        if start == 0:
            first = made
    assert made == first


def test_the_cache_of_one_training_is_not_taken_for_another(
    graph: Path, images: Images, bank: Bank, tmp_path: Path
) -> None:
    """The graphs have the same path, size and shape, and differ in one weight."""
    graph, cache = Path(shutil.copy(graph, tmp_path)), tmp_path / "cache"
    first = OpenVINORuntime(graph, bank, cache_dir=cache).infer(images[:1])[0][0]
    model = onnx.load(graph)
    weight = next(w for w in model.graph.initializer if len(w.dims) == 4)
    values = onnx.numpy_helper.to_array(weight).copy()
    values[0] *= -3
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    size = graph.stat().st_size
    onnx.save(model, graph)
    assert graph.stat().st_size == size
    second = OpenVINORuntime(graph, bank, cache_dir=cache).infer(images[:1])[0][0]
    assert second == OpenVINORuntime(graph, bank).infer(images[:1])[0][0]
    assert second != first


def test_a_bank_is_searched_in_float32_whatever_is_asked_for(graph: Path, bank: Bank) -> None:
    assert OpenVINORuntime(graph, bank, precision="bf16").precision == "f32"


@pytest.mark.parametrize(
    "report", [{}, {"parity": {}}, {"parity": {"openvino_bf16": {"ok": False}}}]
)
def test_bf16_is_not_taken_unless_the_export_found_it_good(report: dict[str, object]) -> None:
    assert choose_precision(report) == "f32"


def test_bf16_is_taken_where_the_cpu_has_it_and_the_export_found_it_good() -> None:
    parity = {"openvino_bf16": {"ok": True}}
    assert choose_precision({"parity": parity}) == ("bf16" if cpu_has_bf16() else "f32")


# Memory

INFER_AND_MEASURE = """
import ctypes, re, sys
from pathlib import Path
import numpy as np
from engines.runtimes.openvino import OpenVINORuntime
bank = np.random.default_rng(0).standard_normal((int(sys.argv[2]), 384), dtype=np.float32)
runtime = OpenVINORuntime(Path(sys.argv[1]), bank)
del bank
ctypes.CDLL(None).malloc_trim(0)  # what opening left free would hide what is taken now
Path("/proc/self/clear_refs").write_text("5")  # forget the peak of opening
image = np.zeros((1, 256, 256, 3), np.uint8)
for _ in range(3):
    runtime.infer(image)
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


def peak_while_inferring(graph: Path, rows: int) -> float:
    """Peak resident memory in MiB of a process that infers with a bank of so many rows."""
    done = subprocess.run(
        [sys.executable, "-c", INFER_AND_MEASURE, graph, str(rows)],
        cwd=ROOT, capture_output=True, text=True, timeout=600, check=True,
    )  # fmt: skip
    return int(done.stdout) / 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_memory_while_inferring_grows_by_a_fifth_more_than_the_bank_at_most(
    kensa_model: Path,
) -> None:
    """With the bank as a constant of a graph it is 1.4 to 3.3 times."""
    rows = 2_000, 22_000
    graph = kensa_model / "model.onnx"
    small, large = (peak_while_inferring(graph, n) for n in rows)
    of_bank = (rows[1] - rows[0]) * CHANNELS * 4 / 2**20
    assert large - small > 0.9 * of_bank  # or what is measured is not the bank
    assert large - small < 1.2 * of_bank
