"""What is rewritten in a graph without a bank: the same scores from less."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest
from numpy.typing import NDArray

from engines.image import resize
from engines.meta import Meta
from engines.runtimes import Batches
from engines.runtimes.openvino import OpenVINORuntime, cpu_has_bf16, float32_convolutions
from engines.runtimes.openvino_lighter import convolutions, lighten, triangles
from workers.converting import export
from workers.converting.export import export_onnx, parity, plain_scores
from workers.models import Training, padim
from workers.progress import Progress
from workers.sample_parts.drawing import draw_part

SIZE, FEATURES = 64, 30
META = Meta(
    model="padim", backbone="resnet18", layers=["layer1", "layer2"], n_features=FEATURES,
    image_size=SIZE,
)  # fmt: skip
BF16, EVERY = ov.Type.bf16, 10  # convolutions of resnet18 up to layer2

needs_bf16 = pytest.mark.skipif(not cpu_has_bf16(), reason="this CPU has no bf16")

Pictures = NDArray[np.uint8]


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    return np.stack([resize(draw_part(seed)[0], SIZE) for seed in range(9)])


@pytest.fixture(scope="module")
def graph(pictures: Pictures, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("padim") / "model.onnx"
    model = padim.build(META, "untrained")
    padim.train(model, META, [pictures], Training(), Progress(quiet=True))
    export_onnx(*padim.graph(model, half=False), path, 17)
    return path


@pytest.fixture(scope="module")
def expected(graph: Path, pictures: Pictures) -> NDArray[np.float32]:
    """Scores (n,) of the graph as it was exported."""
    return plain_scores(graph, pictures, None)


def read(graph: Path) -> ov.Model:
    return ov.Core().read_model(graph)


def matrices(model: ov.Model) -> list[ov.Node]:
    """The constants (P, rows, columns), of which the largest are PaDiM's."""
    constants = [one for one in model.get_ordered_ops() if one.get_type_name() == "Constant"]
    return [one for one in constants if len(one.get_output_shape(0)) == 3 and _is_large(one)]


def _is_large(constant: ov.Node) -> bool:
    return bool(constant.get_output_shape(0)[1] > 1)


def taken(model: ov.Model) -> int:
    """Bytes of these."""
    sizes = (one.get_byte_size() for one in map(_tensor, matrices(model)))
    return sum(sizes)


def _tensor(constant: ov.Node) -> Any:
    return constant.get_tensor_view()


def test_in_blocks_two_thirds_of_the_matrices_are_read_and_scores_are_the_same(
    graph: Path, pictures: Pictures, expected: NDArray[np.float32]
) -> None:
    model = read(graph)
    before = taken(model)
    lighten(model, None)
    assert taken(model) == pytest.approx(before * 2 / 3)
    scores, _ = OpenVINORuntime(graph).infer(pictures)
    np.testing.assert_allclose(scores, expected, rtol=1e-5)


def test_a_batch_scores_like_its_images_one_by_one(graph: Path, pictures: Pictures) -> None:
    runtime = OpenVINORuntime(graph)
    alone, maps = runtime.infer(pictures)
    runtime.take_together(Batches(4))
    together, also = runtime.infer(pictures)
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    np.testing.assert_allclose(also, maps, rtol=1e-4, atol=1e-5)


@needs_bf16
@pytest.mark.parametrize("count", [0, 3, EVERY])
def test_in_bf16_the_matrices_take_a_third_and_scores_stay_within_1_percent(
    graph: Path, pictures: Pictures, expected: NDArray[np.float32], count: int
) -> None:
    model = read(graph)
    before = taken(model)
    lighten(model, count)
    assert taken(model) == pytest.approx(before / 3)
    runtime = OpenVINORuntime(graph, precision="bf16", float32_convolutions=count)
    scores, _ = runtime.infer(pictures)
    assert (scores != expected).any()  # bf16 is really in use
    np.testing.assert_allclose(scores, expected, rtol=1e-2)


@pytest.mark.parametrize("count", [0, 3, EVERY])
def test_so_many_convolutions_stay_in_float32_and_the_outputs_always_do(
    graph: Path, count: int
) -> None:
    model = read(graph)
    assert len(convolutions(model)) == EVERY
    lighten(model, count)
    made = {one.get_friendly_name(): one for one in model.get_ordered_ops()}
    in_bf16 = [made[name].get_output_element_type(0) == BF16 for name in convolutions(model)]
    assert in_bf16 == [index >= count for index in range(EVERY)]
    assert {output.get_element_type() for output in model.outputs} == {ov.Type.f32}


def test_matrices_that_are_not_triangular_are_left_as_they_are() -> None:
    whole = np.random.default_rng(0).standard_normal((5, 6, 6)).astype(np.float32)
    model = product(whole)
    assert not triangles(model)
    lighten(model, None)
    asked = np.ones((5, 6, 1), np.float32)
    found = ov.Core().compile_model(model, "CPU")(asked)[0]
    np.testing.assert_allclose(found, whole @ asked, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [None, pytest.param(0, marks=needs_bf16)])
def test_nan_stays_nan_at_its_position_and_no_other(count: int | None) -> None:
    lower = np.tril(np.random.default_rng(0).standard_normal((5, 6, 6)).astype(np.float32))
    model = product(lower)
    lighten(model, count)
    asked = np.ones((5, 6, 1), np.float32)
    asked[2, 0] = np.nan  # which all rows see
    config = {"INFERENCE_PRECISION_HINT": "f32"}
    found = ov.Core().compile_model(model, "CPU", config)(asked)[0]
    assert np.isnan(found[2]).all()
    assert np.isfinite(np.delete(found, 2, axis=0)).all()


def test_bf16_is_rounded_to_the_nearest_on_both_sides_of_zero() -> None:
    up, down = np.float32(1 + 3 / 512), np.float32(1 + 1 / 512 + 1 / 1024)
    lower = np.tril(np.full((2, 6, 6), up, np.float32))
    lower[:, :, 0] = -up
    lower[:, 1:, 1] = down
    model = product(lower)
    lighten(model, 0)
    rounded = np.unique(np.concatenate([values_of(one).ravel() for one in matrices(model)]))
    step = 1 / 128  # of bf16 above 1
    assert set(rounded) == {0, 1, np.float32(-1 - step), np.float32(1 + step)}


def values_of(constant: ov.Node) -> NDArray[np.float32]:
    bits = np.array(constant.data).view(np.uint16).astype(np.uint32) << 16
    return bits.view(np.float32)


def product(weights: NDArray[np.float32]) -> ov.Model:
    positions, n, _ = weights.shape
    asked = ops.parameter([positions, n, 1], ov.Type.f32)
    return ov.Model([ops.result(ops.matmul(ops.constant(weights), asked, False, False))], [asked])


def test_the_cache_of_the_last_start_is_good_for_the_next(
    graph: Path, pictures: Pictures, tmp_path: Path
) -> None:
    scores = []
    for _ in range(2):
        runtime = OpenVINORuntime(graph, cache_dir=tmp_path)
        scores.append(runtime.infer(pictures)[0])
        assert len(list(tmp_path.glob("*.blob"))) == 1
    assert (scores[0] == scores[1]).all()


# ---- the proof --------------------------------------------------------------------------------


@needs_bf16
def test_the_export_leaves_as_few_convolutions_in_float32_as_the_limit_allows(
    graph: Path,
    pictures: Pictures,
    expected: NDArray[np.float32],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int | None] = []

    def scores(
        path: Path, images: Pictures, bank: None, precision: str, count: int | None = None
    ) -> NDArray[np.float32]:
        if precision == "f32":
            return expected
        asked.append(count)
        return expected * np.float32(1.003 if count == 0 else 1.002)

    monkeypatch.setattr(export, "served_scores", scores)
    report = parity(graph, expected, pictures, None, META, precision="f32")
    assert asked == [0, 1]
    found = report["openvino_bf16"]
    assert (found["ok"], found["float32_convolutions"]) == (True, 1)
    assert float32_convolutions({"parity": report}) == 1


@needs_bf16
def test_where_nothing_keeps_to_the_limit_it_stays_in_float32(
    graph: Path,
    pictures: Pictures,
    expected: NDArray[np.float32],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(export, "MARGIN_OF_PARTS", 0.0)
    report = parity(graph, expected, pictures, None, META, precision="f32")
    found = report["openvino_bf16"]
    assert (found["ok"], found["float32_convolutions"]) == (False, EVERY)


@needs_bf16
def test_a_report_of_the_build_before_lets_openvino_lower_the_whole_graph(
    graph: Path, pictures: Pictures, expected: NDArray[np.float32]
) -> None:
    report = {"parity": {"openvino_bf16": {"ok": True, "max_relative": 0.001}}}
    assert float32_convolutions(report) is None
    runtime = OpenVINORuntime(graph, precision="bf16", float32_convolutions=None)
    np.testing.assert_allclose(runtime.infer(pictures)[0], expected, rtol=2e-2)


@pytest.mark.parametrize("said", [None, "3", True, -1, 2.5])
def test_a_number_that_is_none_counts_as_not_said(said: object) -> None:
    report = {"parity": {"openvino_bf16": {"ok": True, "float32_convolutions": said}}}
    assert float32_convolutions(report) is None
