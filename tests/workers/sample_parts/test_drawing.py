"""The sample part: repeatable and varied pictures, exact masks."""

from __future__ import annotations

import subprocess
import sys
import time

import cv2
import numpy as np
import pytest

from engines.errors import BadRequest
from support.project import ROOT
from workers.sample_parts.bracket import new_scene
from workers.sample_parts.defects import DEFECTS, HARD_DEFECTS
from workers.sample_parts.drawing import draw_part

SMALL = 128  # px


def difference(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The greatest difference of any channel, (size, size), grey levels."""
    return np.abs(one.astype(np.int16) - other.astype(np.int16)).max(axis=2)


@pytest.mark.parametrize("kind", [None, *DEFECTS])
def test_the_same_seed_draws_the_same_picture(kind: str | None) -> None:
    image, mask = draw_part(7, kind, SMALL)
    again, mask_again = draw_part(7, kind, SMALL)
    assert np.array_equal(image, again)
    assert np.array_equal(mask, mask_again)


@pytest.mark.parametrize("kind", [None, *DEFECTS])
def test_another_seed_draws_another_picture(kind: str | None) -> None:
    assert difference(draw_part(7, kind, SMALL)[0], draw_part(8, kind, SMALL)[0]).mean() > 3.0


@pytest.mark.parametrize("size", [64, 100, 257])
@pytest.mark.parametrize("kind", [None, *DEFECTS])
def test_a_picture_is_rgb_and_a_mask_is_black_and_white(kind: str | None, size: int) -> None:
    image, mask = draw_part(3, kind, size)
    assert image.shape == (size, size, 3)
    assert image.dtype == np.uint8
    assert mask.shape == (size, size)
    assert mask.dtype == np.uint8
    assert set(np.unique(mask)) == ({0} if kind is None else {0, 255})


def test_a_picture_is_512_px_wide_unless_asked_otherwise() -> None:
    image, mask = draw_part(0)
    assert image.shape == (512, 512, 3)
    assert not mask.any()


def test_a_defective_picture_is_drawn_within_a_second() -> None:
    draw_part(0, "dent")
    took_s = []
    for seed in range(3):
        began = time.process_time()
        draw_part(seed, "dent")
        took_s.append(time.process_time() - began)
    assert min(took_s) < 1.0  # 0.12 s on two cores of an AMD EPYC


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", DEFECTS)
def test_every_defect_changes_only_what_its_mask_covers(kind: str, seed: int) -> None:
    good, _ = draw_part(seed, size=256)
    bad, mask = draw_part(seed, kind, 256)
    changed = difference(good, bad)
    assert not changed[mask == 0].any()
    assert (changed[mask > 0] >= 2).mean() > 0.7  # the rest are gaps within the defect


@pytest.mark.parametrize("kind", DEFECTS)
def test_a_defect_is_a_small_part_of_the_picture_at_every_seed(kind: str) -> None:
    for seed in range(25):
        _, mask = draw_part(seed, kind, 96)
        assert 0.0003 < (mask > 0).mean() < 0.05, seed


@pytest.mark.parametrize("kind", DEFECTS)
def test_a_defect_moves_from_seed_to_seed(kind: str) -> None:
    middles = {tuple(np.argwhere(draw_part(s, kind, SMALL)[1]).mean(axis=0)) for s in range(6)}
    rows, columns = zip(*middles, strict=True)
    assert np.ptp(rows) + np.ptp(columns) > 0.25 * SMALL


def test_two_normals_differ_in_light_position_and_texture() -> None:
    scenes = [new_scene(seed, SMALL) for seed in range(8)]
    for name in ("lamp", "exposure", "warmth", "angle", "shift", "brush", "turning", "pitch"):
        assert len({getattr(scene, name) for scene in scenes}) == len(scenes), name
    one, other = (draw_part(seed, size=SMALL)[0].astype(np.float64) for seed in (0, 1))
    belts, plates = np.s_[:12, :12], np.s_[36:44, 52:76]  # no edge of the part comes here
    for place in (belts, plates):
        match = np.corrcoef(one[place].mean(axis=2).ravel(), other[place].mean(axis=2).ravel())
        assert match[0, 1] < 0.5


def test_hard_defects_have_less_contrast_than_easy_ones() -> None:
    contrast = {}
    for kind in DEFECTS:
        pairs = [(draw_part(s, size=256)[0], *draw_part(s, kind, 256)) for s in range(6)]
        contrast[kind] = np.mean([difference(good, bad)[m > 0].mean() for good, bad, m in pairs])
    easy = [contrast[kind] for kind in DEFECTS if kind not in HARD_DEFECTS]
    hard = [contrast[kind] for kind in HARD_DEFECTS]
    assert len(hard) >= 2
    assert max(hard) < 0.6 * min(easy), contrast


def test_a_missing_hole_looks_like_undrilled_metal() -> None:
    good, _ = draw_part(2)
    bad, mask = draw_part(2, "missing_hole")
    plate = good[205:225, 115:125]  # between a slot and the boss
    inside = cv2.erode(mask, np.ones((15, 15), np.uint8)) > 0
    assert good[inside].mean() < 0.7 * plate.mean()
    assert abs(bad[inside].mean() - plate.mean()) < 0.3 * plate.mean()
    assert bad[inside].std() < 2.0 * plate.std()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, "rust"), "choose from scratch, dent"),
        ((0, None, 63), "63 px"),
        ((0, None, 5000), "5000 px"),
        ((-1,), "not -1"),
    ],
)
def test_what_cannot_be_drawn_is_refused(arguments: tuple[int], words: str) -> None:
    with pytest.raises(BadRequest, match=words):
        draw_part(*arguments)


def test_the_module_does_without_torch() -> None:
    check = "import sys, workers.sample_parts.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=False).returncode == 0
