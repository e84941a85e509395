"""The drawn parts that thresholds are measured with: repeatable, varied, and visibly defective."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.drawn_parts import DEFECTIVE_FROM, KINDS, defective, normal

SMALL = 128  # px


def difference(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The greatest difference of any channel, (size, size), grey levels."""
    return np.abs(one.astype(np.int16) - other.astype(np.int16)).max(axis=2)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_draws_the_same_part_and_the_same_defect(kind: str) -> None:
    assert np.array_equal(normal(kind, 7, SMALL), normal(kind, 7, SMALL))
    (one, what), (again, what_again) = defective(kind, 7, SMALL), defective(kind, 7, SMALL)
    assert np.array_equal(one, again)
    assert what == what_again


@pytest.mark.parametrize("size", [96, 131, 256])
@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_is_rgb_and_as_large_as_asked(kind: str, size: int) -> None:
    for picture in (normal(kind, 3, size), defective(kind, 3, size)[0]):
        assert picture.shape == (size, size, 3)
        assert picture.dtype == np.uint8
        assert 20.0 < picture.mean() < 200.0


@pytest.mark.parametrize("kind", KINDS)
def test_no_two_good_parts_are_nearly_the_same_picture(kind: str) -> None:
    pictures = [normal(kind, seed, SMALL) for seed in range(6)]
    for number, picture in enumerate(pictures):
        for other in pictures[:number]:
            # The noise of the sensor alone makes 2 to 3 grey levels.
            assert difference(picture, other).mean() > 4.0


def test_biscuits_differ_far_more_than_gaskets() -> None:
    def spread(kind: str) -> float:
        return float(np.std([normal(kind, seed, SMALL) for seed in range(8)], axis=0).mean())

    assert spread("biscuit") > 3.0 * spread("gasket")


@pytest.mark.parametrize("kind", KINDS)
def test_every_defect_changes_a_small_part_of_the_picture_and_nothing_else(kind: str) -> None:
    seen = set()
    for seed in range(18):
        picture, what = defective(kind, seed, SMALL)
        changed = difference(picture, normal(kind, DEFECTIVE_FROM + seed, SMALL))
        assert (changed > 12).sum() >= 4, (seed, what)
        assert (changed > 3).mean() < 0.12, (seed, what)
        seen.add(what)
    assert len(seen) >= 5


@pytest.mark.parametrize("kind", KINDS)
def test_a_defect_is_not_on_a_part_that_was_learned(kind: str) -> None:
    for seed in range(4):
        part = defective(kind, seed, SMALL)[0]
        assert difference(part, normal(kind, seed, SMALL)).mean() > 4.0
