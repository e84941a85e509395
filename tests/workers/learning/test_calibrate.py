"""The threshold keeps its budget of false rejects, finds what that allows, and never jumps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.metrics.threshold.f1_adaptive_threshold import _F1AdaptiveThreshold
from numpy.typing import NDArray
from sklearn.metrics import f1_score, precision_recall_curve, roc_auc_score

from engines.errors import BadDataset
from engines.limits import Limits, asked_for
from engines.meta import Meta
from engines.store.known_scores import KnownScores
from engines.verdict import Scale, decide
from support.project import write_meta
from workers.learning.calibrate import (
    CAP,
    FALSE_REJECTS,
    Budget,
    Calibration,
    _threshold,
    calibrate,
)
from workers.learning.normal_scores import ENOUGH, NormalScores, at_most

Scores = NDArray[np.float32]
NONE: Scores = np.empty(0, np.float32)
BUDGET = Budget()


def scores(*values: float) -> Scores:
    return np.array(values, np.float32)


def known(normal: Scores, parts: list[int] | None = None) -> KnownScores:
    """Each of a part of its own, unless it is said."""
    own = np.arange(len(normal)) if parts is None else np.array(parts)
    return KnownScores(normal.astype(np.float64), own)


def found_in(normal: Scores, defective: Scores = NONE, budget: Budget = BUDGET) -> Calibration:
    return calibrate(known(normal), defective, budget, "left_out")


def drawn(seed: int, gap: float, normals: int = 40, defects: int = 25) -> tuple[Scores, Scores]:
    random = np.random.default_rng(seed)
    normal = random.gumbel(10, 0.5, normals).astype(np.float32)
    return normal, random.normal(10 + gap, 0.8, defects).astype(np.float32)


# ---- normals only -----------------------------------------------------------------------------


def test_with_normals_only_the_limit_is_that_of_the_budget() -> None:
    normal = drawn(0, 0)[0]
    found = found_in(normal)
    assert found.threshold == NormalScores.of(normal.astype(np.float64)).limit(FALSE_REJECTS)
    assert found.raw_min == pytest.approx(float(normal.min()))
    assert found.raw_max - found.threshold == pytest.approx(found.threshold - found.raw_min)
    assert (found.method, found.normals, found.defects) == ("left_out", 40, 0)


def test_with_normals_only_nothing_is_claimed_of_defects() -> None:
    assert not {"auroc", "best_f1", "misses"} & set(found_in(drawn(0, 0)[0]).record())


def test_a_smaller_budget_has_a_higher_limit_and_needs_more_parts() -> None:
    normal = drawn(1, 0)[0]
    strict, lax = (found_in(normal, budget=Budget(share)) for share in (0.001, 0.05))
    assert strict.threshold > lax.threshold
    assert (strict.parts_needed, lax.parts_needed) == (2995, 59)
    assert (strict.false_rejects, lax.false_rejects) == (0.001, 0.05)


def test_a_part_counts_once_whatever_number_of_pictures_there_are_of_it() -> None:
    normal = drawn(2, 0, normals=12)[0]
    normal[[2, 3]] = 40, 41  # two pictures of one part, far above
    found = calibrate(known(normal, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]), NONE, BUDGET, "left_out")
    assert (found.normals, found.parts, found.rejected) == (12, 6, 1)
    assert found.at_most == pytest.approx(at_most(1, 6), abs=1e-4)


def test_a_model_that_is_unlike_before_says_how_far_its_threshold_moved() -> None:
    normal = drawn(3, 0)[0]
    found = found_in(normal)
    moved = found.moved_from(found.threshold - 2 * float(normal.std()), known(normal))
    assert moved.moved == pytest.approx(2, abs=0.01)
    assert moved.before == pytest.approx(found.threshold - 2 * float(normal.std()))


# ---- with defects -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("gap", [1.0, 2.5, 4.0])
def test_all_defects_are_found_that_the_cap_allows_to_find(seed: int, gap: float) -> None:
    normal, defective = drawn(seed, gap)
    usual = NormalScores.of(normal.astype(np.float64))
    lowest_allowed, limit = usual.limit(CAP), usual.limit(FALSE_REJECTS)
    found = found_in(normal, defective)
    assert found.misses == (defective <= lowest_allowed).sum()
    assert lowest_allowed <= found.threshold <= limit


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("gap", [-1.0, 0.5, 2.0])
@pytest.mark.parametrize("cap", [0.02, 0.05, 0.2])
def test_known_normals_are_never_rejected_above_the_cap(seed: int, gap: float, cap: float) -> None:
    normal, defective = drawn(seed, gap)
    found = found_in(normal, defective, Budget(cap=cap))
    assert found.rejected is not None
    # Of few parts a share says little: up to so many above the limit may be chance.
    assert found.rejected <= max(ENOUGH, cap * len(normal))


def test_defects_that_lie_far_above_leave_the_limit_of_the_budget() -> None:
    normal = drawn(4, 0)[0]
    assert found_in(normal, scores(50, 60)).threshold == found_in(normal).threshold


def test_defects_that_cannot_be_told_from_normals_do_not_stop_the_line() -> None:
    normal = drawn(5, 0)[0]
    found = found_in(normal, scores(8.0, 8.1, 8.2))
    assert found.threshold == found_in(normal).threshold
    assert found.misses == 3
    assert found.auroc is not None
    assert found.auroc < 0.5


def test_a_budget_above_the_cap_is_the_cap() -> None:
    normal, defective = drawn(6, 1.0)
    found = found_in(normal, defective, Budget(false_rejects=0.1, cap=0.05))
    assert found.threshold == NormalScores.of(normal.astype(np.float64)).limit(0.1)


def test_false_rejects_and_misses_are_counted_as_the_verdict_counts_them() -> None:
    normal, defective = drawn(7, 1.0)
    found = found_in(normal, defective, Budget(cap=0.2))
    assert found.rejected == sum(decide(float(s), found.threshold) == "Anomaly" for s in normal)
    assert found.misses == sum(decide(float(s), found.threshold) == "Normal" for s in defective)
    assert found.rejected
    assert found.misses


@pytest.mark.parametrize("seed", range(5))
def test_the_best_f1_is_that_of_scikit_learn_and_of_anomalib(seed: int) -> None:
    normal, defective = drawn(seed, 0.7)
    found = found_in(normal, defective)
    everything = np.r_[normal, defective]
    truth = np.r_[np.zeros(len(normal)), np.ones(len(defective))].astype(np.int64)
    precision, recall, _ = precision_recall_curve(truth, everything)
    best = float((2 * precision * recall / np.maximum(precision + recall, 1e-12)).max())
    assert found.best_f1 == pytest.approx(best)
    assert found.auroc == pytest.approx(float(roc_auc_score(truth, everything)))
    theirs = _F1AdaptiveThreshold()
    theirs.update(torch.from_numpy(everything), torch.from_numpy(truth))
    # Theirs is a defect's own score, which is an anomaly at `>=`.
    at_or_above = everything >= theirs.compute().numpy()
    assert found.best_f1 == pytest.approx(float(f1_score(truth, at_or_above)))


# ---- no jumps ---------------------------------------------------------------------------------


@pytest.mark.parametrize("others", [[], [10.5], [11.0, 11.6, 14.0]])
def test_a_defect_that_moves_a_little_moves_the_threshold_no_farther(others: list[float]) -> None:
    usual = NormalScores.of(drawn(8, 0)[0].astype(np.float64))
    places = np.linspace(8, 16, 150)
    found = [_threshold(usual, np.array([place, *others]), BUDGET) for place in places]
    assert np.abs(np.diff(found)).max() <= places[1] - places[0]
    assert np.ptp(found) > 0.05  # it does move


@pytest.mark.parametrize("count", [10, 18, 19, 20, 60, 98, 99, 100])
@pytest.mark.parametrize("defective", [[], [11.0, 11.6, 14.0]])
def test_one_normal_more_moves_the_threshold_by_less_than_normals_differ(
    count: int, defective: list[float]
) -> None:
    """Also where its number makes the scores themselves say the limit."""
    normal = drawn(9, 0, normals=count)[0]
    before = found_in(normal, scores(*defective)).threshold
    for one in np.quantile(normal, [0, 0.25, 0.5, 0.75, 1]):
        after = found_in(np.append(normal, np.float32(one + 1e-3)), scores(*defective)).threshold
        assert abs(after - before) < normal.std()


def test_one_defect_more_keeps_the_threshold_between_the_budget_and_the_cap() -> None:
    normal = drawn(10, 0)[0]
    usual = NormalScores.of(normal.astype(np.float64))
    for place in np.linspace(5, 20, 30):
        found = found_in(normal, scores(place))
        assert usual.limit(CAP) <= found.threshold <= usual.limit(FALSE_REJECTS)


# ---- what is written --------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("count", [2, 5, 20, 400])
def test_the_table_of_limits_is_one_that_can_be_relied_on(
    seed: int, count: int, tmp_path: Path
) -> None:
    meta = Meta.read(write_meta(tmp_path / "meta.json"))
    found = found_in(drawn(seed, 0, normals=count)[0])
    limits = Limits.of(found.write_to(meta))
    assert limits is not None
    assert len(limits.rows) == 9
    for row in limits.rows:
        assert row.at_most is not None
        assert row.at_most == pytest.approx(limits.at_most(row.raw))
    assert limits.raw_for(FALSE_REJECTS) == pytest.approx(found.threshold)


def test_another_budget_can_be_asked_for_without_learning_again(tmp_path: Path) -> None:
    meta = Meta.read(write_meta(tmp_path / "meta.json"))
    normal = drawn(11, 0)[0]
    written = found_in(normal).write_to(meta)
    for budget in (0.005, 0.02, 0.05):
        asked = Scale.of(asked_for(written, {"false_rejects": budget})).raw_threshold
        assert asked == pytest.approx(found_in(normal, budget=Budget(budget)).threshold)


def test_the_meta_json_it_writes_judges_as_was_found(tmp_path: Path) -> None:
    meta = Meta.read(write_meta(tmp_path / "meta.json", image_threshold_auto=99, note="keep me"))
    normal, defective = drawn(12, 4.0)
    found_in(normal, defective).write_to(meta).write(tmp_path / "meta.json")
    written = Meta.read(tmp_path / "meta.json")
    threshold = Scale.of(written).raw_threshold
    assert {decide(float(score), threshold) for score in defective} == {"Anomaly"}
    assert sum(decide(float(score), threshold) == "Anomaly" for score in normal) <= 2
    assert (written.model_extra or {})["note"] == "keep me"
    assert written.calibration is not None
    assert Calibration(**written.calibration).threshold == written.image_threshold_auto
    assert Calibration.kept(written) == Calibration(
        written.image_threshold_auto,  # type: ignore[arg-type]
        written.raw_image_min,  # type: ignore[arg-type]
        written.raw_image_max,  # type: ignore[arg-type]
        "kept", normals=0, defects=0,
    )  # fmt: skip


def test_the_range_holds_every_score_and_the_threshold() -> None:
    for gap in (-5.0, 0.0, 30.0):
        normal, defective = drawn(13, gap)
        found = found_in(normal, defective)
        assert found.raw_min <= min(normal.min(), defective.min())
        assert found.raw_max >= max(normal.max(), defective.max())
        assert found.raw_min < found.threshold < found.raw_max


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
        found_in(normal, defective)
