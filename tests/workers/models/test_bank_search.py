"""The search of learning finds the scores of the model that is exported."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from engines.meta import Meta
from workers.models.bank_search import BankSearch, scores_of
from workers.models.patchcore import PatchCore, build

CHANNELS, PATCHES = 64, 16 * 16


@pytest.fixture(scope="module")
def model() -> PatchCore:
    content = {"model": "patchcore", "backbone": "resnet18", "layers": ["layer1"], "image_size": 64}
    return build(Meta.model_validate({**content, "coreset_ratio": 0.1}), "untrained")


def rows(seed: int, count: int, spread: float = 1.0) -> torch.Tensor:
    """Rows (count, CHANNELS) in clusters, far from zero, as patches lie."""
    random = torch.Generator().manual_seed(seed)
    centres = 5 + 3 * torch.randn(40, CHANNELS, generator=random)
    of = torch.randint(40, (count,), generator=random)
    return centres[of] + spread * torch.randn(count, CHANNELS, generator=random)


def plain(model: PatchCore, embedding: torch.Tensor, bank: torch.Tensor) -> float:
    with torch.inference_mode():
        return float(model.judge(embedding[None], bank)[0])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [1, 2, 9, 15, 16, 17, 63, 500, 3000])
def test_it_finds_the_score_of_the_model(model: PatchCore, seed: int, count: int) -> None:
    bank, picture = rows(seed, count), rows(seed + 100, PATCHES)
    expected = plain(model, picture, bank)
    assert BankSearch(bank, model.keep).score(picture) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_it_finds_it_where_one_patch_is_far_from_all(model: PatchCore, seed: int) -> None:
    bank, picture = rows(seed, 2000), rows(seed + 100, PATCHES)
    for patch in (0, 100, PATCHES - 1):
        strange = picture.clone()
        strange[patch] += 20
        expected = plain(model, strange, bank)
        assert BankSearch(bank, model.keep).score(strange) == pytest.approx(expected, rel=1e-5)


def test_patches_that_never_count_decide_nothing(model: PatchCore) -> None:
    bank, picture = rows(0, 500), rows(100, PATCHES)
    picture[:10] += 50
    keep = torch.ones(PATCHES)
    keep[:10] = 0
    with torch.inference_mode():
        expected = float(model.judge(picture[None], bank, keep)[0])
    found = BankSearch(bank, keep).score(picture)
    assert found == pytest.approx(expected, rel=1e-5)
    assert found < BankSearch(bank, model.keep).score(picture) / 2


def test_a_picture_that_was_learned_scores_next_to_nothing(model: PatchCore) -> None:
    picture = rows(0, PATCHES)
    usual = BankSearch(rows(1, 500), model.keep).score(picture)
    assert BankSearch(picture, model.keep).score(picture) < 1e-3 * usual


def test_patches_that_are_all_alike_have_a_score(model: PatchCore) -> None:
    picture, bank = rows(0, 1).repeat(PATCHES, 1), rows(1, 100)
    found = BankSearch(bank, model.keep).score(picture)
    assert found == pytest.approx(plain(model, picture, bank), rel=1e-5)
    assert BankSearch(picture, model.keep).score(picture) == 0


@pytest.mark.parametrize("count", [1, 8, 9, 400])
@pytest.mark.parametrize("stand_in", [0, 1, 3])
def test_rows_that_others_stand_in_for_are_not_there_until_they_are_back(
    model: PatchCore, count: int, stand_in: int
) -> None:
    bank, others, picture = rows(0, count + 5), rows(7, stand_in), rows(100, PATCHES)
    picture[3] += 20
    search, out = BankSearch(bank, model.keep), torch.tensor([0, 1, count, count + 1, count + 4])
    left = [number for number in range(len(bank)) if number not in out.tolist()]
    search.exchange(out, others)
    expected = plain(model, picture, torch.cat([bank[left], others]))
    assert search.score(picture) == pytest.approx(expected, rel=1e-5)
    search.exchange(out[1:3], others[:0])
    there = torch.cat([bank[:1], bank[2:count], bank[count + 1 :]])
    assert search.score(picture) == pytest.approx(plain(model, picture, there), rel=1e-5)
    search.exchange(out[:0], others[:0])
    assert search.score(picture) == pytest.approx(plain(model, picture, bank), rel=1e-5)


@pytest.mark.parametrize("stand_in", [0, 2])
def test_distances_are_those_to_the_rows_that_are_there(model: PatchCore, stand_in: int) -> None:
    bank, others, patches = rows(0, 50), rows(7, stand_in), rows(100, 30)
    search, out = BankSearch(bank, model.keep), torch.tensor([4, 10, 49])
    search.exchange(out, others)
    now = bank.clone()
    now[out[:stand_in]] = others
    expected = torch.cdist(patches, now).square()
    expected[:, out[stand_in:]] = torch.inf
    torch.testing.assert_close(search.squared(patches), expected, rtol=1e-4, atol=1e-2)
    some = np.array([49, 0, 4])
    nearest = expected[:, some].amin(dim=1).sqrt()
    for away in nearest.tolist():
        for radius in (0.999 * away, 1.001 * away):
            covered = search.covers(patches.numpy(), some, radius)
            assert covered.tolist() == (nearest <= radius).tolist()
    assert not search.covers(patches.numpy(), some[:0], 1e6).any()


@pytest.mark.parametrize("farthest_is_covered", [False, True])
def test_patches_known_to_be_covered_change_nothing(
    model: PatchCore, farthest_is_covered: bool
) -> None:
    bank, picture = rows(0, 500), rows(100, PATCHES)
    search, expected = BankSearch(bank, model.keep), plain(model, picture, bank)
    distances = torch.cdist(picture, bank).amin(dim=1)
    radius = float(distances.max() if farthest_is_covered else distances.median())
    covered = distances <= radius
    covered[::7] = False  # of these nobody knows
    if farthest_is_covered:
        covered[distances.argmax()] = True
    assert search.score(picture, covered, radius) == pytest.approx(expected, rel=1e-5)
    nothing = torch.zeros(PATCHES, dtype=torch.bool)
    assert search.score(picture, nothing, radius) == pytest.approx(expected, rel=1e-5)
    everything = torch.ones(PATCHES, dtype=torch.bool)
    assert search.score(picture, everything, float(distances.max())) == pytest.approx(
        expected, rel=1e-5
    )


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_no_number_gets_no_score(model: PatchCore, wrong: float) -> None:
    pictures = torch.stack([rows(0, PATCHES), rows(1, PATCHES)])
    pictures[0, 7, 3] = wrong
    found = scores_of(BankSearch(rows(2, 100), model.keep), pictures)
    assert math.isnan(found[0])
    assert found[1] > 0
