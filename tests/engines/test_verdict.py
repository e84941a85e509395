"""Claims about engines.verdict. anomalib's own functions are the judges of what a score means."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from engines.errors import BadMeta, RuntimeFailed
from engines.meta import Meta
from engines.verdict import (
    OVERLAY_SIDE,
    Scale,
    decide,
    heatmap,
    judge,
    overlay,
    overlay_png,
    png,
)

# The numbers of a real PatchCore file (SPEC.md), and scales that lie differently.
SCALES = [
    Scale(8.257, 6.725, 20.643, 0.5),
    Scale(0.614, 0.421, 0.889, 0.62),
    Scale(-3.0, -7.5, -1.0, 0.3),  # a score may be a log-likelihood
    Scale(120.0, 5.0, 90.0, 0.5),  # a threshold above all that was seen
    Scale(1e-6, 1e-7, 3e-6, 0.5),
]
SIZE = 256


def grid(scale: Scale) -> NDArray[np.float64]:
    """Raw scores from far below the range to far above it, with its marks in it."""
    span = scale.raw_max - scale.raw_min
    marks = [scale.raw_min, scale.raw_max, scale.threshold_auto, scale.raw_threshold]
    return np.append(np.linspace(scale.raw_min - 2 * span, scale.raw_max + 2 * span, 401), marks)


# Scores


@pytest.mark.parametrize("scale", SCALES)
def test_normalised_scores_are_those_of_anomalib(scale: Scale) -> None:
    import torch
    from anomalib.post_processing import PostProcessor

    raw = grid(scale)
    theirs = PostProcessor._normalize(
        torch.from_numpy(raw),
        *(torch.tensor(x, dtype=torch.float64)
          for x in (scale.raw_min, scale.raw_max, scale.threshold_auto)),
    )  # fmt: skip
    ours = [scale.normalise(float(score)) for score in raw]
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-12)
    assert {0.0, 1.0} <= set(ours)  # the grid reaches both ends


@pytest.mark.parametrize("scale", SCALES)
def test_labels_are_those_of_anomalib(scale: Scale) -> None:
    import torch
    from anomalib.post_processing import PostProcessor

    raw = grid(scale)
    theirs = PostProcessor._apply_threshold(
        torch.from_numpy(raw), torch.tensor(scale.raw_threshold, dtype=torch.float64)
    )
    assert [judge(float(score), scale).is_anomalous for score in raw] == theirs.tolist()


@pytest.mark.parametrize("scale", SCALES)
def test_the_automatic_threshold_is_at_one_half(scale: Scale) -> None:
    assert scale.normalise(scale.threshold_auto) == 0.5


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.5, 0.62, 0.9, 1.0])
def test_a_hand_set_threshold_means_the_same_on_both_scales(threshold: float) -> None:
    scale = Scale(8.257, 6.725, 20.643, threshold)
    free = (scale.raw_threshold - 8.257) / (20.643 - 6.725) + 0.5  # before the ends are cut off
    assert free == pytest.approx(threshold, abs=1e-12)
    assert scale.normalise(scale.raw_threshold) == pytest.approx(threshold, abs=1e-12)


def test_a_hand_set_half_is_the_automatic_threshold() -> None:
    assert SCALES[0].raw_threshold == 8.257


@pytest.mark.parametrize("scale", SCALES)
def test_a_verdict_shows_a_score_above_its_threshold_if_and_only_if_it_rejects(
    scale: Scale,
) -> None:
    for raw in grid(scale)[:-1]:  # all but the threshold itself, where rounding decides
        verdict = judge(float(raw), scale)
        assert verdict.raw_score == raw
        assert verdict.threshold == scale.threshold
        assert verdict.is_anomalous == (verdict.score > verdict.threshold)


@pytest.mark.parametrize("scale", SCALES)
def test_at_the_threshold_a_part_is_normal_and_just_above_it_is_not(scale: Scale) -> None:
    at = scale.raw_threshold
    assert judge(at, scale).label == "Normal"
    assert judge(math.nextafter(at, math.inf), scale).label == "Anomaly"
    assert judge(math.nextafter(at, -math.inf), scale).label == "Normal"


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_gets_no_verdict(score: float) -> None:
    with pytest.raises(RuntimeFailed, match="no verdict"):
        judge(score, SCALES[0])
    with pytest.raises(RuntimeFailed, match="no verdict"):
        decide(score, 100.0)


def test_a_model_that_was_never_verified_judges_nothing() -> None:
    fresh = Meta.model_validate({"model": "vae", "latent_dim": 8, "image_size": 256})
    with pytest.raises(BadMeta, match=r"retrain\.py"):
        Scale.of(fresh)
    whole = {"image_threshold_auto": 0.0, "raw_image_min": 0.0, "raw_image_max": 1.0}
    assert Scale.of(fresh.with_(**whole)) == Scale(0.0, 0.0, 1.0, 0.5)  # zeros are numbers
    for missing in whole:
        rest = {key: value for key, value in whole.items() if key != missing}
        with pytest.raises(BadMeta, match=missing):
            Scale.of(fresh.with_(**rest))


# Heatmaps


def raw_map(row: int = 12, column: int = 20, side: int = 32) -> NDArray[np.float32]:
    """Raw distances of a good part with one strange patch."""
    rows = np.random.default_rng(0).uniform(6.8, 7.2, (side, side)).astype(np.float32)
    rows[row, column] = 40
    return rows


@pytest.mark.parametrize("side", [8, 28, 32, 64])
def test_a_heatmap_has_the_size_of_the_input_and_lies_in_0_to_1(side: int) -> None:
    heat = heatmap(raw_map(3, 5, side), SCALES[0], SIZE)
    assert heat.shape == (SIZE, SIZE)
    assert heat.dtype == np.float32
    assert heat.min() >= 0
    assert heat.max() <= 1
    assert heat.max() > heat.min()


@pytest.mark.parametrize("cell", [(0, 0), (0, 31), (31, 0), (31, 31), (12, 20), (5, 6)])
def test_the_peak_of_a_heatmap_is_in_the_patch_where_the_maps_peak_is(
    cell: tuple[int, int],
) -> None:
    wide = Scale(8.0, 0.0, 100.0, 0.5)  # so that nothing is cut off at 1
    heat = heatmap(raw_map(*cell), wide, SIZE)
    peak = np.unravel_index(heat.argmax(), heat.shape)
    assert (peak[0] * 32 // SIZE, peak[1] * 32 // SIZE) == cell


def test_a_heatmap_is_one_half_where_the_map_is_at_the_automatic_threshold() -> None:
    level = np.full((32, 32), 8.257, np.float32)
    np.testing.assert_allclose(heatmap(level, SCALES[0], SIZE), 0.5, atol=1e-6)


@pytest.mark.parametrize("side", [16, 32, 64])
def test_a_heatmap_is_the_map_of_anomalib(side: int) -> None:
    import torch
    from anomalib.models.image.patchcore.anomaly_map import AnomalyMapGenerator

    scale = Scale(20.0, 0.0, 100.0, 0.5)  # nothing is cut off
    patches = np.random.default_rng(1).uniform(5, 40, (side, side)).astype(np.float32)
    theirs = AnomalyMapGenerator()(torch.from_numpy(patches)[None, None], (SIZE, SIZE))[0, 0]
    expected = (theirs.numpy() - 20.0) / 100.0 + 0.5
    np.testing.assert_allclose(heatmap(patches, scale, SIZE), expected, atol=1e-5)


# Overlays


def part(height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(2).integers(60, 200, (height, width, 3), dtype=np.uint8)


def hot_spot(size: int = SIZE) -> NDArray[np.float32]:
    """Cold everywhere, and hot in one square."""
    heat = np.full((size, size), 0.1, np.float32)
    heat[100:140, 60:100] = 0.95
    return heat


def decoded(data: bytes) -> NDArray[np.uint8]:
    """As any viewer reads it: (H, W, 3) RGB."""
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert picture is not None
    return np.asarray(picture[..., ::-1], np.uint8)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((480, 640), (480, 640)), ((1024, 1024), (1024, 1024)), ((2048, 1024), (1024, 512)),
     ((1500, 3000), (512, 1024)), ((3, 3000), (1, 1024)), ((1, 1), (1, 1))],
)  # fmt: skip
def test_an_overlay_has_the_shape_of_the_part_and_at_most_1024_pixels_a_side(
    shape: tuple[int, int], expected: tuple[int, int]
) -> None:
    picture = decoded(overlay_png(part(*shape), hot_spot(), 0.5))
    assert picture.shape == (*expected, 3)
    assert max(picture.shape) <= OVERLAY_SIDE


def test_an_overlay_paints_what_is_hot_and_leaves_what_is_cold() -> None:
    image = part(512, 512)  # two pixels for each of the heatmap
    picture = decoded(overlay_png(image, hot_spot(), 0.5))
    changed = (picture != image).any(axis=2)
    assert changed[204:276, 124:196].all()  # the square, its edge left out
    far = np.ones((512, 512), bool)
    far[192:288, 112:208] = False  # the square with a margin for the outline
    assert not changed[far].any()


def test_what_is_hot_is_painted_red_on_a_grey_part() -> None:
    grey = np.full((SIZE, SIZE, 3), 128, np.uint8)
    red, _, blue = decoded(overlay_png(grey, hot_spot(), 0.5))[120, 80].astype(int)
    assert red > blue + 30  # were the channels swapped it would be blue


def test_the_outline_stands_where_the_heat_crosses_the_threshold() -> None:
    black = np.zeros((SIZE, SIZE, 3), np.uint8)
    outlined = decoded(overlay_png(black, hot_spot(), 0.5))
    plain = decoded(overlay_png(black, hot_spot(), 0.99))  # nothing is that hot
    edge = (outlined != plain).any(axis=2)
    assert edge[100, 70:90].all()
    assert (outlined[100, 70:90] == 255).all()
    assert not edge[105:135, 65:95].any()
    assert not edge[:95].any()


def test_a_cold_part_is_shown_as_it_is() -> None:
    image = part(300, 400)
    cold = np.zeros((SIZE, SIZE), np.float32)
    np.testing.assert_array_equal(decoded(overlay_png(image, cold, 0.5)), image)


@pytest.mark.parametrize("shade", [0, 255])
def test_a_reject_whose_hot_place_is_too_small_to_be_outlined_has_a_ring_there(shade: int) -> None:
    plain = np.full((512, 512, 3), shade, np.uint8)
    scale = Scale(20.0, 0.0, 100.0, 0.5)
    places = np.full((64, 64), 5.0, np.float32)
    places[48, 16] = 60.0  # one of 4 pixels, which smoothing levels
    assert heatmap(places, scale, SIZE).max() < 0.5 < scale.normalise(60.0)
    picture = decoded(overlay(plain, places, scale, SIZE))
    rows, columns = np.nonzero((picture != plain).any(axis=2))
    assert (rows.min() + rows.max()) / 2 == pytest.approx(48.5 * 8, abs=2)
    assert (columns.min() + columns.max()) / 2 == pytest.approx(16.5 * 8, abs=2)
    assert 30 < rows.max() - rows.min() < 60
    without = np.nonzero((decoded(overlay(plain, places, scale, SIZE, 0.95)) != plain).any(axis=2))
    assert max(np.ptp(where) for where in without) < 30  # a trace of colour, below the limit


def test_what_is_outlined_has_no_ring() -> None:
    image = part(512, 512)
    outlined = decoded(overlay_png(image, hot_spot(), 0.5))
    np.testing.assert_array_equal(
        decoded(overlay_png(image, hot_spot(), 0.5, is_hot=True)), outlined
    )


def test_an_overlay_does_not_change_what_it_is_given() -> None:
    image, heat = part(300, 400), hot_spot()
    image_before, heat_before = image.copy(), heat.copy()
    overlay_png(image, heat, 0.5)
    np.testing.assert_array_equal(image, image_before)
    np.testing.assert_array_equal(heat, heat_before)


def test_a_grey_picture_is_encoded_without_loss() -> None:
    grey = part(40, 30)[..., 0].copy()
    back = cv2.imdecode(np.frombuffer(png(grey), np.uint8), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(back, grey)
