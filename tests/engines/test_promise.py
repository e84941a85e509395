"""Claims about what training measured of a version, and what holds it, a first one too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engines.meta import Meta
from engines.promise import doubts, movement, promise

DRAWN = [1.0, 2.0, 3.0, 4.0]  # raw scores of drawn defects
GOOD: dict[str, Any] = {
    "threshold": 2.5, "raw_min": 0.5, "raw_max": 4.5, "method": "left_out", "normals": 25,
    "parts": 20, "defects": 10, "misses": 2, "false_rejects": 0.01, "cap": 0.05, "rejected": 1,
    "at_least": 0.003, "at_most": 0.21, "parts_needed": 299,
    "limits": [{"false_rejects": 0.01, "raw": 2.5, "at_most": 0.21},
               {"false_rejects": 0.1, "raw": 1.5, "at_most": 0.4}],
    "drawn": {"found": 2, "of": 4, "share": 0.5, "by": {}, "scores": DRAWN},
}  # fmt: skip


def meta(threshold: float = 0.5, **changed: Any) -> Meta:
    """Of a PatchCore; a calibration's keys that are None are left out."""
    known = {key: value for key, value in {**GOOD, **changed}.items() if value is not None}
    return Meta(
        model="patchcore", backbone="resnet18", layers=["layer1"], coreset_ratio=0.1,
        image_size=64, image_threshold=threshold, image_threshold_auto=2.5, raw_image_min=0.5,
        raw_image_max=4.5, calibration=known,
    )  # fmt: skip


def test_it_is_what_training_measured() -> None:
    known = promise(meta())
    assert known is not None
    assert (known.normals, known.parts, known.rejected, known.at_most) == (25, 20, 1, 0.21)
    assert (known.false_rejects, known.parts_needed) == (0.01, 299)
    assert (known.defects, known.misses, known.drawn, known.found) == (10, 2, 4, 2)
    assert not known.untrained


def test_of_another_threshold_only_that_is_said_which_its_scores_say() -> None:
    """Raw 1.5: the table has a bound, and 3 of the 4 drawn defects lie above."""
    known = promise(meta(threshold=0.25))
    assert known is not None
    assert (known.rejected, known.misses, known.at_least) == (None, None, None)
    assert (known.at_most, known.found) == (0.4, 3)


@pytest.mark.parametrize(
    "calibration",
    [None, {}, {"method": "best_f1", "normals": 3, "defects": 3, "false_rejects": 1, "misses": 0},
     {"parts": "many"}, {"parts": -1}, {"parts": True}],
)  # fmt: skip
def test_of_an_older_model_nothing_is_said_and_nothing_holds_it(calibration: Any) -> None:
    """Its `false_rejects` was a count, and `misses` belonged to another limit."""
    old = meta().with_(calibration=calibration)
    assert promise(old) is None
    assert doubts(old, 1.0) == movement(old, None) == []


def test_a_model_that_was_never_verified_promises_nothing() -> None:
    assert promise(meta().with_(image_threshold_auto=None)) is None


@pytest.mark.parametrize(
    "damaged",
    ["x", [], {"scores": ["a"]}, {"scores": []}, {"found": 1}, {"found": 17, "of": 16},
     {"found": 10**400, "of": 16}, {"found": 1, "of": 10**400}],
)  # fmt: skip
def test_damaged_drawn_defects_hold_nothing(damaged: Any) -> None:
    assert doubts(meta(drawn=damaged), 1.0) == []


def test_a_blind_model_is_held_and_told_what_to_do() -> None:
    (sentence,) = doubts(meta(drawn={"scores": [1.0] * 15 + [3.0]}), 0.2)
    assert sentence.startswith("It finds only 1 of 16 drawn defects: it may be blind. Train it")


def test_the_share_itself_is_enough() -> None:
    assert doubts(meta(), 0.5) == []
    assert len(doubts(meta(), 0.51)) == 1
    fifth = {"scores": [1.0] * 4 + [3.0]}
    assert doubts(meta(drawn=fifth), 0.2) == []


def test_sight_is_judged_at_the_threshold_in_force() -> None:
    assert len(doubts(meta(threshold=0.9), 0.3)) == 1  # raw 4.1: none lies above
    assert doubts(meta(threshold=0.25), 0.75) == []


def test_without_the_scores_sight_is_known_for_the_threshold_of_the_training_alone() -> None:
    counted = {"found": 0, "of": 16, "share": 0.0, "by": {}}
    assert len(doubts(meta(drawn=counted), 0.2)) == 1
    assert doubts(meta(threshold=0.25, drawn=counted), 0.2) == []


def test_untrained_weights_are_held() -> None:
    (sentence,) = doubts(meta(weights="untrained"), 0.2)
    assert "untrained" in sentence


def test_where_nobody_asks_whether_it_sees_neither_is_held() -> None:
    assert doubts(meta(weights="untrained", drawn={"scores": [0.0] * 16}), 0.0) == []


def test_a_model_that_rejects_surely_more_than_its_budget_is_held() -> None:
    (sentence,) = doubts(meta(rejected=6, at_least=0.14), 0.2)
    assert sentence.startswith("It rejects 6 of 20 good parts that it has not learned, at least 14")
    assert "5 % may be" in sentence


@pytest.mark.parametrize(
    "within", [{"at_least": 0.05}, {"at_least": 0.14, "false_rejects": 0.2}, {"at_least": None}]
)
def test_one_that_may_keep_its_budget_is_not(within: dict[str, Any]) -> None:
    assert doubts(meta(**within), 0.2) == []


def test_false_rejects_of_another_threshold_hold_nothing() -> None:
    assert doubts(meta(threshold=0.55, rejected=6, at_least=0.14), 0.2) == []


def test_a_threshold_that_an_update_moved_far_is_said() -> None:
    (sentence,) = movement(meta(before=1.0, moved=2.4), None)
    assert sentence.startswith("The threshold moved from 1 to 2.5, by 2.4 standard deviations")
    assert len(movement(meta(before=4.0, moved=-1.1), None)) == 1


@pytest.mark.parametrize("near", [{"before": 2.4, "moved": 1.0}, {"before": 2.4}, {"moved": 3.0}])
def test_one_that_moved_little_or_from_nowhere_is_not(near: dict[str, Any]) -> None:
    assert movement(meta(**near), None) == []


def test_what_was_let_through_with_this_threshold_is_not_asked_about_again() -> None:
    """Its threshold was set by hand since, or it was converted once more."""
    moved = meta(before=1.0, moved=2.4)
    assert movement(meta(threshold=0.6, before=1.0, moved=2.4), moved) == []
    assert len(movement(moved, moved.with_(image_threshold_auto=1.0))) == 1


def test_what_retrain_writes_is_understood(trained: Path) -> None:
    known = promise(Meta.read(trained / "meta.json"))
    assert known is not None
    assert known.untrained
    assert known.parts == 22
    assert known.drawn == len(json.loads((trained / "meta.json").read_text())["calibration"]
                              ["drawn"]["scores"])  # fmt: skip
