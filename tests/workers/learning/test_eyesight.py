"""What share of drawn defects a model finds: none if it is blind, all if it rejects everything."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from engines.image import resize
from workers.learning.drawn_defects import DEFECTS, Drawn
from workers.learning.eyesight import counted, drawn_scores, eyesight
from workers.sample_parts.drawing import draw_part

Pictures = NDArray[np.uint8]
Scores = NDArray[np.float64]


def all_three(drawn: Pictures, on: int) -> Scores:
    """Scores by a model to which everything looks alike."""
    return np.full(len(drawn), 3.0)


def silent(done: int, total: int) -> None:
    """No progress."""


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    return np.stack([resize(draw_part(seed, None, 256)[0], 128) for seed in range(3)])


@pytest.fixture(scope="module")
def by_change(pictures: Pictures) -> list[tuple[Drawn, float]]:
    """Scores by a model that sees the largest change of any pixel."""

    def judge(drawn: Pictures, on: int) -> Scores:
        return np.abs(drawn.astype(float) - pictures[on]).max(axis=(1, 2, 3))

    return drawn_scores(pictures, judge, silent)


def test_a_model_that_scores_everything_alike_finds_none_of_16(pictures: Pictures) -> None:
    found = eyesight(drawn_scores(pictures, all_three, silent), threshold=3.0)
    assert (found["found"], found["of"], found["share"]) == (0, 16, 0.0)


def test_with_a_threshold_of_nothing_all_are_found(pictures: Pictures) -> None:
    found = eyesight(drawn_scores(pictures, all_three, silent), threshold=0.0)
    assert (found["found"], found["of"], found["share"]) == (16, 16, 1.0)


def test_each_is_drawn_onto_the_picture_that_the_judge_is_told(
    by_change: list[tuple[Drawn, float]],
) -> None:
    assert all(score > 0 for _, score in by_change)
    assert {what for what, _ in by_change} == set(DEFECTS)


def test_strong_ones_are_told_from_faint_ones(by_change: list[tuple[Drawn, float]]) -> None:
    found = eyesight(by_change, threshold=30.0)
    assert found["share"] > 0.8
    assert max(score for of_side in found["by"]["faint"].values() for score in of_side) <= 30


def test_every_drawn_one_is_counted_by_strength_and_side(
    by_change: list[tuple[Drawn, float]],
) -> None:
    by = eyesight(by_change, threshold=0.0)["by"]
    assert {strength: list(sides) for strength, sides in by.items()} == {
        "faint": ["1%", "3%", "8%"],
        "strong": ["1%", "3%", "8%"],
    }
    assert all(len(of_side) == 4 for of_side in by["faint"].values())
    assert all(len(of_side) == 8 for of_side in by["strong"].values())
    assert all(of_side == sorted(of_side) for sides in by.values() for of_side in sides.values())


def test_at_another_threshold_the_same_ones_are_counted_again(
    by_change: list[tuple[Drawn, float]],
) -> None:
    assert counted(eyesight(by_change, 30.0), 0.0) == eyesight(by_change, 0.0)


def test_the_same_pictures_have_the_same_defects(pictures: Pictures) -> None:
    seen: list[list[Pictures]] = [[], []]
    for pile in seen:

        def look(drawn: Pictures, on: int, pile: list[Pictures] = pile) -> Scores:
            pile.append(drawn)
            return all_three(drawn, on)

        drawn_scores(pictures, look, silent)
    np.testing.assert_array_equal(np.concatenate(seen[0]), np.concatenate(seen[1]))


def test_each_gets_its_own_score_though_a_few_are_judged_at_once(
    by_change: list[tuple[Drawn, float]], pictures: Pictures
) -> None:
    sizes = []

    def one_by_one(drawn: Pictures, on: int) -> Scores:
        sizes.append(len(drawn))
        changes = [np.abs(one.astype(float) - pictures[on]).max() for one in drawn]
        return np.array(changes)

    assert drawn_scores(pictures, one_by_one, silent) == by_change
    assert sorted(set(sizes)) == [4]


def test_one_picture_is_enough_to_draw_on(pictures: Pictures) -> None:
    found = drawn_scores(pictures[:1], lambda drawn, on: np.full(len(drawn), on), silent)
    assert {score for _, score in found} == {0.0}


def test_none_is_drawn_in_the_middle_of_what_never_counts(pictures: Pictures) -> None:
    counting = np.zeros((128, 128), bool)
    counting[:, 70:] = True

    def middle_column(drawn: Pictures, on: int) -> Scores:
        changed = np.abs(drawn.astype(float) - pictures[on]).max(axis=(1, 3))
        return (changed * np.arange(128)).sum(axis=1) / changed.sum(axis=1)

    free = drawn_scores(pictures, middle_column, silent)
    found = drawn_scores(pictures, middle_column, silent, counting)
    assert min(score for _, score in free) < 60
    assert min(score for _, score in found) > 66
    nowhere = np.zeros((128, 128), bool)
    nowhere[:2, :2] = True  # no part lies there
    assert max(score for _, score in drawn_scores(pictures, middle_column, silent, nowhere)) < 10
