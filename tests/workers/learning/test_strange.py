"""Strange pictures are named, as long as they are few; what is usual now is not strange."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from engines.store.known_scores import KnownScores
from workers.learning.strange import MOST, strange

Scores = NDArray[np.float64]


def normals(count: int, seed: int = 1, shift: float = 0.0) -> Scores:
    found: Scores = np.random.default_rng(seed).gumbel(10 + shift, 0.5, count)
    return found


def known(scores: Scores) -> KnownScores:
    return KnownScores(scores, np.arange(len(scores)))


NOTHING = KnownScores.none()


@pytest.mark.parametrize("before", [NOTHING, known(normals(30, 99))], ids=["new", "update"])
@pytest.mark.parametrize("far", [[30.0, 40.0], [30.0, 30.0], [20.0, 19.9]])
def test_two_far_ones_of_twenty_are_named_also_when_they_are_alike(
    before: KnownScores, far: list[float]
) -> None:
    scores = normals(20)
    scores[[7, 13]] = far
    assert strange(scores, before).tolist() == [7, 13]


@pytest.mark.parametrize("shift", [0, 2, 10, 100])
def test_new_light_that_raises_all_scores_names_nobody(shift: float) -> None:
    assert not len(strange(normals(20, shift=shift), known(normals(30, 99))))


def test_normal_pictures_are_hardly_ever_named() -> None:
    named = [len(strange(normals(20, seed), NOTHING)) for seed in range(60)]
    assert sum(named) <= 2  # of 1,200; at odds of 0.0005 it is 0.6


def test_what_is_known_to_score_as_high_is_not_strange() -> None:
    scores = normals(20)
    scores[3] = 18
    assert strange(scores, NOTHING).tolist() == [3]
    seen = np.concatenate([normals(40, 99), np.linspace(14, 20, 8)])
    assert not len(strange(scores, known(seen)))


@pytest.mark.parametrize("count", range(8))
def test_a_few_pictures_name_nobody(count: int) -> None:
    scores = normals(count)
    scores[:1] = 1000
    assert not len(strange(scores, NOTHING))


@pytest.mark.parametrize("count", [8, 13, 20, 40, 100])
@pytest.mark.parametrize("share", [0.05, 0.1, 0.15, 0.2, 0.5])
def test_never_more_than_so_many_are_named(count: int, share: float) -> None:
    scores = normals(count)
    far = int(np.ceil(share * count))
    for high in (60 + np.arange(far), np.full(far, 20.0)):
        scores[:far] = high
        found = strange(scores, NOTHING)
        assert len(found) <= MOST * count  # what is more frequent is how parts vary
        assert far > MOST * count or found.tolist() == list(range(far))


@pytest.mark.parametrize("scores", [[5.0] * 20, [0.0] * 20, [5.0] * 18 + [6.0] * 2])
def test_scores_that_are_all_alike_name_nobody(scores: list[float]) -> None:
    assert not len(strange(np.array(scores), NOTHING))
