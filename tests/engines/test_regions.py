"""Which places of a model regions take out, and what a map shows of them."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from engines.errors import BadBundle
from engines.regions import Regions, hide, shown


def a_mask(*where: tuple[int, int], shape: tuple[int, int] = (64, 64)) -> Regions:
    mask = np.zeros(shape, bool)
    for row, column in where:
        mask[row, column] = True
    return Regions(mask)


def out(keep: NDArray[np.float32]) -> set[tuple[int, int]]:
    return {(int(row), int(column)) for row, column in np.argwhere(keep == 0)}


def test_an_empty_mask_takes_nothing_out() -> None:
    keep = a_mask().cells(64, (8, 8), 30)
    assert keep.dtype == np.float32
    assert (keep == 1).all()


@pytest.mark.parametrize("shape", [(64, 64), (1000, 64), (7, 300), (4000, 3000)])
def test_one_white_pixel_takes_out_each_place_that_it_touches(shape: tuple[int, int]) -> None:
    row, column = shape[0] - 1, shape[1] // 2
    keep = a_mask((row, column), shape=shape).cells(64, (8, 8), 0)
    assert (7, 4) in out(keep)
    height, width = (-(-64 // side) for side in shape)  # pixels of the model that it covers
    assert len(out(keep)) <= (height // 8 + 1) * (width // 8 + 1)


@pytest.mark.parametrize("reach", [0, 1, 7, 12])
def test_a_place_is_taken_out_just_where_the_reach_of_a_white_pixel_touches_it(reach: int) -> None:
    keep = a_mask((20, 33)).cells(64, (64, 64), reach)
    rows, columns = np.mgrid[:64, :64]
    away = np.hypot(rows - 20, columns - 33)
    assert (keep[away <= reach - 1] == 0).all()
    assert (keep[away > reach + 1] == 1).all()
    assert keep[20, 33] == 0


def test_the_reach_is_of_the_models_pixels_whatever_size_the_mask_has() -> None:
    small, large = np.zeros((64, 64), bool), np.zeros((640, 640), bool)
    small[20:30, 40:44], large[200:300, 400:440] = True, True
    one, other = (Regions(mask).cells(64, (16, 16), 5) for mask in (small, large))
    np.testing.assert_array_equal(one, other)


def test_regions_that_leave_no_place_are_refused_in_words() -> None:
    mask = np.ones((64, 64), bool)
    mask[30:34, 30:34] = False
    Regions(mask).cells(64, (64, 64), 1)
    with pytest.raises(BadBundle, match=r"no place that counts.* 8 pixels"):
        Regions(mask).cells(64, (64, 64), 8)


def test_a_map_shows_nothing_where_nothing_counts_and_is_itself_elsewhere() -> None:
    keep = np.ones((8, 8), np.float32)
    keep[:4, :4] = 0
    keep[7, 7] = 0  # its place of the map holds others that count
    maps = np.arange(32, dtype=np.float32).reshape(2, 4, 4)[:, ::-1] - 5
    places = shown(keep, (4, 4))
    found = hide(maps, places)
    assert set(zip(*np.nonzero(~places), strict=True)) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    np.testing.assert_array_equal(found[:, places], maps[:, places])
    for one, before in zip(found, maps, strict=True):
        assert (one[:2, :2] == before[places].min()).all()
