"""Claims about the search in a memory bank: exact where it decides, and never too near."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from numpy.typing import NDArray

from engines.runtimes import bank_search
from engines.runtimes.bank_search import NEIGHBOURS, Search
from support.project import ROOT

Floats = NDArray[np.float32]

CHANNELS, PATCHES = 96, 256


def like_parts(rows: int, seed: int = 0) -> Floats:
    """Rows as a backbone makes them: few directions hold most of what differs, in many groups."""
    random = np.random.default_rng(seed)
    strengths = np.exp(-np.arange(CHANNELS) / 8)
    groups = np.random.default_rng(9).normal(size=(40, CHANNELS)) * strengths * 3
    found = groups[random.integers(0, 40, rows)] + random.normal(size=(rows, CHANNELS)) * strengths
    return (found + 5).astype(np.float32)


def without_structure(rows: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).normal(size=(rows, CHANNELS)).astype(np.float32)


def in_float64(embedding: Floats, bank: Floats) -> tuple[float, NDArray[np.float64], int]:
    """By the formula: the score, each patch's distance to its nearest row, and who decides."""
    away = np.stack([np.linalg.norm(bank.astype(float) - one, axis=1) for one in embedding])
    nearest = away.min(axis=1)
    decides = int(nearest.argmax())
    near = bank[away[decides].argmin()].astype(float)
    neighbours = np.argsort(np.linalg.norm(bank - near, axis=1), kind="stable")[:NEIGHBOURS]
    reach = np.exp(away[decides, neighbours] - nearest[decides])
    return float((1 - 1 / reach.sum()) * nearest[decides]), nearest, decides


BANKS = {
    "like parts": like_parts(3000),
    "without structure": without_structure(3000),
    "one direction": np.outer(np.linspace(-9, 9, 800), np.ones(CHANNELS)).astype(np.float32),
    "one row": like_parts(1),
    "fewer than the neighbours": like_parts(5),
    "each row ten times": np.repeat(like_parts(200), 10, axis=0),
}
PICTURES = {
    "like parts": like_parts(PATCHES, 1),
    "without structure": without_structure(PATCHES, 1),
    "with one strange place": np.concatenate([like_parts(PATCHES - 1, 2), like_parts(1) - 4]),
    "plain": np.repeat(like_parts(1, 3), PATCHES, axis=0),
    "nearly plain": like_parts(1, 3) + without_structure(PATCHES) * np.float32(1e-4),
    "far off": like_parts(PATCHES, 4) * 50,
}


@pytest.mark.parametrize("bank", BANKS)
@pytest.mark.parametrize("picture", PICTURES)
def test_the_score_is_that_of_comparing_every_patch_with_every_row(picture: str, bank: str) -> None:
    expected, nearest, decides = in_float64(PICTURES[picture], BANKS[bank])
    score, distances = Search(BANKS[bank]).score(PICTURES[picture])
    assert score == pytest.approx(expected, rel=1e-5, abs=1e-4)
    assert distances[decides] == pytest.approx(nearest[decides], rel=1e-5, abs=1e-4)
    assert distances.max() == pytest.approx(nearest.max(), rel=1e-4, abs=1e-4)


def test_a_bank_far_from_zero_is_searched_as_exactly() -> None:
    bank, picture = like_parts(1500) + 100, like_parts(PATCHES, 1) + 100
    expected, _, _ = in_float64(picture, bank)
    assert Search(bank).score(picture)[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("bank", BANKS)
@pytest.mark.parametrize("picture", PICTURES)
def test_no_place_is_shown_nearer_than_it_is(picture: str, bank: str) -> None:
    _, nearest, _ = in_float64(PICTURES[picture], BANKS[bank])
    _, distances = Search(BANKS[bank]).score(PICTURES[picture])
    rows, patches = BANKS[bank] - BANKS[bank].mean(axis=0), PICTURES[picture]
    norms = ((patches - BANKS[bank].mean(axis=0)) ** 2).sum(axis=1) + (rows**2).sum(axis=1).max()
    assert (distances**2 >= nearest**2 - 1e-6 * norms).all()


def test_hardly_a_place_of_a_part_is_shown_farther_than_it_is() -> None:
    bank, away = like_parts(10_000), []
    search = Search(bank)
    for seed in range(1, 5):
        picture = like_parts(PATCHES, seed)
        _, nearest, _ = in_float64(picture, bank)
        _, distances = search.score(picture)
        away.append(distances / nearest - 1)
    assert (np.concatenate(away) > 1e-3).mean() < 0.02
    assert np.mean(away) < 1e-3


def test_another_part_of_the_bank_is_searched_where_the_cells_were_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Were each patch looked for in one wrong cell alone, the score would still be exact."""
    bank, picture = like_parts(3000), like_parts(PATCHES, 1)
    search = Search(bank)
    cells = len(search._centres)
    wrong = np.zeros((cells, PATCHES), bool)
    wrong[np.arange(PATCHES) % cells, np.arange(PATCHES)] = True
    monkeypatch.setattr(search, "_likely", lambda _: wrong)
    assert search.score(picture)[0] == pytest.approx(in_float64(picture, bank)[0], rel=1e-5)


@pytest.mark.parametrize("counting", [1, 3, PATCHES // 2])
def test_only_places_that_count_decide(counting: int) -> None:
    bank, picture = like_parts(3000), like_parts(PATCHES, 1)
    keep = np.zeros(PATCHES, np.float32)
    keep[np.random.default_rng(counting).permutation(PATCHES)[:counting]] = 1
    search = Search(bank)
    search.count_only(keep.reshape(16, 16))
    expected, _, _ = in_float64(picture[keep == 1], bank)
    assert search.score(picture)[0] == pytest.approx(expected, rel=1e-5)


def test_a_bank_of_several_tiles_is_searched_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, picture = like_parts(3000), PICTURES["with one strange place"]
    expected = Search(bank).score(picture)
    monkeypatch.setattr(bank_search, "TILE", 700)
    monkeypatch.setattr(bank_search, "GATHER", 64)
    score, distances = Search(bank).score(picture)
    assert score == pytest.approx(expected[0], rel=1e-6)
    np.testing.assert_allclose(distances, expected[1], rtol=1e-4)


@pytest.mark.parametrize("is_fast", [True, False])
@pytest.mark.parametrize("picture", PICTURES)
def test_small_products_and_whole_ones_give_the_same_score(
    picture: str, is_fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bank_search, "_small_is_fast", lambda: is_fast)
    monkeypatch.setattr(bank_search, "SMALL", 60_000)  # about ten patches with a cell
    expected, nearest, _ = in_float64(PICTURES[picture], BANKS["like parts"])
    score, distances = Search(BANKS["like parts"]).score(PICTURES[picture], threads=2)
    assert score == pytest.approx(expected, rel=1e-5, abs=1e-4)
    assert (distances >= nearest * (1 - 1e-3) - 1e-2).all()


@pytest.mark.parametrize("near", [1, 2_000, 20_000])
def test_little_memory_for_what_is_between_changes_nothing(
    near: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then each cell is a part of its own, those too that no patch asks for."""
    search = Search(like_parts(3000))
    for picture in PICTURES.values():
        score, distances = search.score(picture)
        with monkeypatch.context() as little:
            little.setattr(bank_search, "NEAR", near)
            again, also = search.score(picture, threads=3)
        assert again == pytest.approx(score, rel=1e-6)
        np.testing.assert_allclose(also, distances, rtol=1e-3, atol=1e-2)


def test_one_thread_and_several_find_the_same_to_the_bit() -> None:
    bank, picture = like_parts(3000), like_parts(PATCHES, 1)
    alone, together = (Search(bank).score(picture, threads=count) for count in (1, 3))
    assert alone[0] == together[0]
    np.testing.assert_array_equal(alone[1], together[1])


@pytest.mark.parametrize("first", ["app.__main__", "workers.jobs.job_process", "workers.learn"])
def test_numpy_takes_no_threads_of_its_own_where_a_bank_is_searched(first: str) -> None:
    asks = (
        f"import {first}, numpy, threadpoolctl\n"
        "print({one['num_threads'] for one in threadpoolctl.threadpool_info()"
        " if 'numpy' in one['filepath']})"
    )
    unset = {name: given for name, given in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    said = subprocess.run(
        [sys.executable, "-c", asks], cwd=ROOT, env=unset, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert said.stdout == "{1}\n"


def test_an_embedding_that_is_no_number_is_no_score() -> None:
    bank, picture = like_parts(3000), like_parts(PATCHES, 1)
    search = Search(bank)
    whole, _ = search.score(picture)
    for strange in (np.nan, np.inf, -np.inf, 3e38):
        broken = picture.copy()
        broken[7, 5] = strange
        score, distances = search.score(broken)
        assert np.isnan(score)
        assert not np.isfinite(distances).any()
    assert search.score(picture)[0] == whole


def test_what_is_searched_takes_a_fifth_more_than_the_bank_at_most() -> None:
    bank = np.random.default_rng(0).normal(size=(20_000, 384)).astype(np.float32)
    search = Search(bank)
    arrays = (one for one in vars(search).values() if isinstance(one, np.ndarray))
    assert sum(one.nbytes for one in arrays) < 1.2 * bank.nbytes
