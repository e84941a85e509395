"""Drawn defects lie where they should, as large and as strong as they say, on any picture."""

from __future__ import annotations

from itertools import product

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from workers.learning.drawn_defects import (
    CONTRAST,
    DEFECTS,
    KINDS,
    SIDES,
    Drawn,
    Picture,
    draw,
    on_the_part,
)
from workers.sample_parts.drawing import draw_part

Moved = NDArray[np.float64]

SIZE = 256
GREY = np.full((SIZE, SIZE, 3), 128, np.uint8)
BLACK, WHITE = np.zeros_like(GREY), np.full_like(GREY, 255)
NAMES = [f"{one.strength} {one.kind} of {one.side:.0%}" for one in DEFECTS]

every_defect = pytest.mark.parametrize("what", DEFECTS, ids=NAMES)


def at(y: int, x: int) -> NDArray[np.bool_]:
    """One place."""
    where = np.zeros((SIZE, SIZE), bool)
    where[y, x] = True
    return where


def change(picture: Picture, what: Drawn, seed: int = 0, y: int = 128, x: int = 128) -> Moved:
    """How many grey levels each pixel moves when a defect is drawn at a place (S, S)."""
    drawn = draw(picture, what, seed, at(y, x)).astype(float)
    moved: Moved = np.abs(drawn - picture).mean(axis=2)
    return moved


def length(moved: Moved) -> float:
    """The longer side of what moved by half of the most, pixels."""
    points = np.argwhere(moved >= moved.max() / 2).astype(np.float32)
    return float(max(cv2.minAreaRect(points)[1])) + 1


def plate(colour: tuple[int, int, int], on: tuple[int, int, int]) -> Picture:
    """A plain part, 80 to 180 both ways, on a plain background."""
    picture = np.full((SIZE, SIZE, 3), on, np.uint8)
    picture[80:180, 80:180] = colour
    return picture


def test_there_is_one_defect_of_each_kind_size_and_strength() -> None:
    assert len(set(DEFECTS)) == len(DEFECTS) == len(KINDS) * len(SIDES) * len(CONTRAST) == 24


# What is drawn


@every_defect
def test_a_seed_draws_the_same_and_another_seed_something_else(what: Drawn) -> None:
    first = draw(GREY, what, 3)
    assert np.array_equal(first, draw(GREY, what, 3))
    assert not np.array_equal(first, draw(GREY, what, 4))
    assert not np.array_equal(draw(GREY, what, 3, at(128, 128)), draw(GREY, what, 4, at(128, 128)))


@every_defect
def test_the_picture_itself_stays_as_it_was(what: Drawn) -> None:
    picture = GREY.copy()
    picture.flags.writeable = False
    drawn = draw(picture, what, 0)
    assert drawn.dtype == np.uint8
    assert drawn.shape == picture.shape


@every_defect
@pytest.mark.parametrize("picture", [GREY, BLACK, WHITE], ids=["grey", "black", "white"])
def test_every_defect_is_where_it_should_be_and_nowhere_else(what: Drawn, picture: Picture) -> None:
    size = what.side * SIZE * (3 if what.kind == "scratch" else 1)
    for seed in range(5):
        y, x = np.nonzero(change(picture, what, seed, 100, 150))
        assert np.hypot(y - 100, x - 150).min() <= 2
        assert np.hypot(y - 100, x - 150).max() <= 0.85 * size + 3


@every_defect
def test_a_defect_may_reach_over_the_edge(what: Drawn) -> None:
    for y, x in product((0, SIZE - 1), repeat=2):
        assert change(GREY, what, 0, y, x).any()


@every_defect
def test_a_defect_is_as_large_as_it_says(what: Drawn) -> None:
    lengths = [length(change(GREY, what, seed)) for seed in range(10)]
    size = what.side * SIZE * (3 if what.kind == "scratch" else 1)
    assert np.median(lengths) == pytest.approx(size, rel=0.35, abs=2)


@pytest.mark.parametrize("side", SIDES)
def test_a_scratch_is_long_and_thin(side: float) -> None:
    moved = change(GREY, Drawn("scratch", side, "strong"))
    assert 1 <= (moved >= moved.max() / 2).sum() / length(moved) <= max(1.8, length(moved) / 8)


@every_defect
@pytest.mark.parametrize("level", [0, 20, 128, 240, 255])
def test_the_contrast_is_what_was_asked_for(what: Drawn, level: int) -> None:
    picture = np.full_like(GREY, level)
    for seed in range(5):
        most = change(picture, what, seed).max()
        if what.strength == "faint":
            assert most == pytest.approx(CONTRAST["faint"], abs=7 if what.kind == "stain" else 5)
        else:
            assert most >= 0.8 * CONTRAST["strong"]


@every_defect
@pytest.mark.parametrize("part", range(3))
def test_faint_is_weaker_than_strong_at_the_same_place(what: Drawn, part: int) -> None:
    picture = draw_part(part, None, SIZE)[0]
    strong = change(picture, Drawn(what.kind, what.side, "strong"), part)
    faint = change(picture, Drawn(what.kind, what.side, "faint"), part)
    assert 0 < faint.sum() < 0.6 * strong.sum()


@every_defect
def test_a_picture_without_colours_gets_none(what: Drawn) -> None:
    for seed in range(5):
        drawn = draw(GREY, what, seed)
        assert (drawn == drawn[..., :1]).all()


@every_defect
def test_pictures_of_any_size_are_changed(what: Drawn) -> None:
    for size in (32, 64, 640):
        picture = np.full((size, size, 3), 128, np.uint8)
        assert (draw(picture, what, 0) != picture).any()


def test_through_a_missing_piece_one_sees_the_background() -> None:
    hole = Drawn("missing piece", 0.08, "strong")
    drawn = draw(plate((150, 150, 160), on=(20, 40, 200)), hole, 0, at(130, 130))
    assert drawn[127:134, 127:134].mean(axis=(0, 1)) == pytest.approx([20, 40, 200], abs=3)


def test_where_there_is_no_plain_background_a_missing_piece_is_dark() -> None:
    noise = np.random.default_rng(0).integers(90, 250, (SIZE, SIZE, 3), np.uint8)
    drawn = draw(noise, Drawn("missing piece", 0.08, "strong"), 0, at(130, 130))
    assert drawn[127:134, 127:134].mean() < 60


@pytest.mark.parametrize("dot", [0, 50, 100, 255])
def test_a_piece_may_be_missing_where_its_surroundings_look_otherwise(dot: int) -> None:
    picture = np.full_like(GREY, 200)
    picture[110:146, 110:146] = dot
    for strength, most in CONTRAST.items():
        moved = change(picture, Drawn("missing piece", 0.03, strength))
        assert moved.max() >= 0.6 * most


def test_a_dent_has_a_light_and_a_dark_side() -> None:
    drawn = draw(GREY, Drawn("dent", 0.08, "strong"), 0, at(128, 128)).astype(int) - 128
    assert drawn.max() > 40
    assert drawn.min() < -40
    assert drawn.mean() == pytest.approx(0, abs=0.02)


# Where it is drawn


@every_defect
def test_a_defect_lies_where_it_may(what: Drawn) -> None:
    where = np.zeros((SIZE, SIZE), bool)
    where[60:70, 180:200] = True
    for seed in range(10):
        drawn = draw(GREY, what, seed, where)
        y, x = np.nonzero((drawn != GREY).any(axis=2))
        assert 58 <= y.mean() <= 72
        assert 178 <= x.mean() <= 202


def test_a_part_on_a_plain_background_is_found() -> None:
    found = on_the_part(np.stack([plate((150, 150, 160), on=(20, 40, 200))] * 3))
    truth = np.zeros_like(found)
    truth[80:180, 80:180] = True
    assert not (found & ~truth).any()
    assert (found & truth).sum() > 0.8 * truth.sum()


def test_a_part_of_its_backgrounds_colour_is_found_by_its_structure() -> None:
    picture = GREY.copy()
    picture[80:180, 80:180] = np.random.default_rng(0).integers(88, 168, (100, 100, 1), np.uint8)
    found = on_the_part(picture[None])
    assert found[90:170, 90:170].mean() > 0.95
    assert found[:70].sum() == 0


def test_drawn_parts_are_found() -> None:
    found = on_the_part(np.stack([draw_part(seed, None, SIZE)[0] for seed in range(4)]))
    assert found[64:192, 40:100].mean() > 0.8  # the plate, left of its bore
    assert found[:20].mean() < 0.05


@pytest.mark.parametrize("count", [0, 1, 4])
@pytest.mark.parametrize("picture", [GREY, BLACK, WHITE], ids=["grey", "black", "white"])
def test_where_nothing_tells_where_the_part_lies_it_is_the_middle(
    picture: Picture, count: int
) -> None:
    found = on_the_part(np.stack([picture] * 4)[:count])
    assert found.mean() == pytest.approx(0.8**2, abs=0.01)
    assert found[128, 128]
    assert not found[10].any()


@pytest.mark.parametrize("size", [32, 64, 640])
def test_the_mask_is_never_empty(size: int) -> None:
    random = np.random.default_rng(0)
    for high in (2, 60, 256):
        noise = random.integers(0, high, (3, size, size, 3), np.uint8)
        assert on_the_part(noise).any()
        assert on_the_part(cv2.GaussianBlur(noise[0], (0, 0), size / 8)[None]).any()
