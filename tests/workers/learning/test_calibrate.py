"""The threshold separates what can be separated, and keeps its promise where no defect is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.metrics.threshold.f1_adaptive_threshold import _F1AdaptiveThreshold
from numpy.typing import NDArray
from sklearn.metrics import f1_score, precision_recall_curve

from engines.errors import BadDataset
from engines.meta import Meta
from engines.verdict import Scale, decide
from support.project import write_meta
from workers.learning.calibrate import FALSE_REJECTS, Calibration, calibrate

Scores = NDArray[np.float32]
NONE: Scores = np.empty(0, np.float32)


def scores(*values: float) -> Scores:
    return np.array(values, np.float32)


def drawn(seed: int, gap: float, normals: int = 40, defects: int = 25) -> tuple[Scores, Scores]:
    random = np.random.default_rng(seed)
    normal = random.normal(8, 1, normals).astype(np.float32)
    return normal, random.normal(8 + gap, 1.5, defects).astype(np.float32)


def f1_above(threshold: float, normal: Scores, defective: Scores) -> float:
    """F1 of the rule that the product follows: above the threshold is an anomaly."""
    truth = np.r_[np.zeros(len(normal)), np.ones(len(defective))]
    found = np.r_[normal, defective].astype(np.float64) > threshold
    return float(f1_score(truth, found, zero_division=0))


def test_the_threshold_lies_half_way_between_groups_that_do_not_overlap() -> None:
    found = calibrate(scores(1, 2, 3), scores(5, 6))
    assert found.threshold == 4
    assert (found.raw_min, found.raw_max) == (1, 6)
    assert (found.auroc, found.f1, found.false_rejects, found.misses) == (1, 1, 0, 0)
    assert (found.method, found.normals, found.defects) == ("best_f1", 3, 2)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("gap", [2.5, 4.0, 6.0])
def test_no_other_threshold_has_a_better_f1(seed: int, gap: float) -> None:
    normal, defective = drawn(seed, gap)
    found = calibrate(normal, defective)
    assert found.method == "best_f1"
    everywhere = np.r_[normal, defective].astype(np.float64)
    best = max(f1_above(t, normal, defective) for t in [everywhere.min() - 1, *everywhere])
    assert f1_above(found.threshold, normal, defective) == pytest.approx(best)
    assert found.f1 == pytest.approx(best)


@pytest.mark.parametrize("seed", range(10))
def test_it_reaches_the_f1_of_scikit_learn_and_of_anomalib(seed: int) -> None:
    normal, defective = drawn(seed, 1.5)
    found = calibrate(normal, defective)
    everything = np.r_[normal, defective]
    truth = np.r_[np.zeros(len(normal)), np.ones(len(defective))].astype(np.int64)
    precision, recall, _ = precision_recall_curve(truth, everything)
    assert found.f1 == pytest.approx(
        float(np.nanmax(2 * precision * recall / (precision + recall)))
    )
    theirs = _F1AdaptiveThreshold()
    theirs.update(torch.from_numpy(everything), torch.from_numpy(truth))
    # Theirs is a defect's own score, which is an anomaly at `>=`: ours is the same split at `>`.
    at_or_above = everything >= theirs.compute().numpy()
    assert found.f1 == pytest.approx(float(f1_score(truth, at_or_above)))


def test_false_rejects_and_misses_are_counted_as_the_verdict_counts_them() -> None:
    normal, defective = drawn(3, 1.0)
    found = calibrate(normal, defective)
    assert found.false_rejects == sum(
        decide(float(s), found.threshold) == "Anomaly" for s in normal
    )
    assert found.misses == sum(decide(float(s), found.threshold) == "Normal" for s in defective)
    assert found.false_rejects
    assert found.misses


@pytest.mark.parametrize("n", [4, 8, 20])
def test_with_normals_only_about_one_in_a_hundred_new_normals_is_rejected(n: int) -> None:
    random = np.random.default_rng(n)
    draws = random.normal(20, 2, (2000, n)).astype(np.float32)
    limits = np.array([calibrate(draw, NONE).threshold for draw in draws])
    rejected = (random.normal(20, 2, (2000, 50)) > limits[:, None]).mean()
    # The limits differ from draw to draw; the mean over 2,000 of them does so by 0.0007 (n = 4).
    assert abs(rejected - FALSE_REJECTS) < 0.003


def test_with_normals_only_the_known_ones_pass_and_nothing_is_claimed_of_defects() -> None:
    normal = drawn(0, 0)[0]
    found = calibrate(normal, NONE)
    assert found.threshold > normal.max()
    assert found.raw_min == pytest.approx(float(normal.min()))
    assert found.raw_max - found.threshold == pytest.approx(found.threshold - found.raw_min)
    assert (found.method, found.defects) == ("prediction_limit", 0)
    assert not {"auroc", "f1", "misses", "false_rejects"} & set(found.record())


@pytest.mark.parametrize(
    ("normal", "defective", "says"),
    [
        (NONE, NONE, "at least 2 normal images"),
        (scores(1), NONE, "at least 2 normal images"),
        (NONE, scores(1, 2, 3), "at least 2 normal images"),
        (scores(2, 2, 2), scores(2, 2), "score alike"),
        (scores(2, 2, 2), NONE, "score alike"),
        (scores(0, 0), NONE, "score alike"),
        (scores(1, np.nan), scores(2), "not finite"),
        (scores(1, 2), scores(np.inf), "not finite"),
        (scores(1, -np.inf, 2), NONE, "not finite"),
    ],
)
def test_scores_that_tell_nothing_are_refused_in_words(
    normal: Scores, defective: Scores, says: str
) -> None:
    with pytest.raises(BadDataset, match=says):
        calibrate(normal, defective)


@pytest.mark.parametrize(
    ("normal", "defective"),
    [
        (scores(1, 2, 3), scores(5, 6)),
        (scores(1.0), scores(1.0000001)),
        (scores(9, 9, 9), scores(10)),
        (scores(0, 0), scores(1e-3)),
        (scores(-3, -2), scores(-1)),
    ],
)
def test_the_meta_json_it_writes_judges_normals_normal_and_defects_anomaly(
    tmp_path: Path, normal: Scores, defective: Scores
) -> None:
    meta = Meta.read(write_meta(tmp_path / "meta.json", image_threshold_auto=99, note="keep me"))
    calibrate(normal, defective).write_to(meta).write(tmp_path / "meta.json")
    written = Meta.read(tmp_path / "meta.json")
    threshold = Scale.of(written).raw_threshold
    assert {decide(float(score), threshold) for score in normal} == {"Normal"}
    assert {decide(float(score), threshold) for score in defective} == {"Anomaly"}
    assert (written.model_extra or {})["note"] == "keep me"
    assert written.calibration is not None
    assert Calibration(**written.calibration).threshold == written.image_threshold_auto


@pytest.mark.parametrize("seed", range(10))
def test_defects_that_cannot_be_told_from_normals_do_not_stop_the_line(seed: int) -> None:
    normal, defective = drawn(seed, gap=-1.0)
    found = calibrate(normal, defective)
    assert found.method == "prediction_limit"
    assert found.threshold == calibrate(normal, NONE).threshold
    assert found.auroc is not None
    assert found.auroc < 0.6
    assert found.false_rejects == int((normal > found.threshold).sum()) <= 1
    assert found.misses == int((defective <= found.threshold).sum())
    assert found.raw_min <= min(normal.min(), defective.min())
    assert found.raw_max >= max(normal.max(), defective.max())


def test_at_most_half_of_the_normals_may_pay_for_a_better_f1() -> None:
    half = calibrate(scores(1, 2, 5, 6), scores(4, 4.5, 7))
    assert (half.method, half.false_rejects) == ("best_f1", 2)
    more = calibrate(scores(1, 4.2, 5, 6), scores(4, 4.5, 7))
    assert more.method == "prediction_limit"
