"""A picture that is not like those that were learned is named for what is wrong with it."""

from __future__ import annotations

import copy
import json
import math
import random
import re
import time
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
from scipy import stats

from app.settings import Settings
from engines.camera import CODES, FEW, LEAST, NAMES, Camera, Learned, Statistic, measure, student
from engines.image import resize
from support.camera import (
    NO_SCORES,
    Picture,
    blurred,
    bright,
    codes,
    dark,
    faults,
    learned,
    look,
    measured,
    part,
    shifted,
    turned,
    upended,
)
from workers.learning.camera import learn

TRAIN, OTHERS = range(24), range(100, 130)
TALL = slice(40, 216)  # rows that make a picture wider than high


@pytest.fixture(scope="module")
def known() -> Camera:
    return learned(map(part, TRAIN))


@pytest.fixture(scope="module")
def wide() -> Camera:
    return learned(part(seed)[TALL] for seed in TRAIN)


def test_parts_like_those_that_were_learned_are_usable(known: Camera) -> None:
    assert set(codes(known, map(part, OTHERS))) == {None}
    assert known.blind() == {}


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (dark, "camera_dark"),
        (lambda one: np.zeros_like(one), "camera_dark"),
        (bright, "camera_bright"),
        (blurred, "camera_blurred"),
        (lambda one: cv2.blur(one, (3, 3)), "camera_blurred"),
        (lambda one: cv2.blur(one, (1, 5)), "camera_blurred"),  # along the columns alone
        (shifted(right=24), "camera_shifted"),
        (shifted(right=-24), "camera_shifted"),
        (shifted(down=24), "camera_shifted"),
        (shifted(right=24, border=cv2.BORDER_CONSTANT), "camera_shifted"),
        (lambda one: np.roll(one, 24, axis=1), "camera_shifted"),
        (turned(90), "camera_turned"),
        (turned(-90), "camera_turned"),
        (turned(90, border=cv2.BORDER_CONSTANT), "camera_turned"),
        (turned(25), "camera_turned"),
        (lambda one: cv2.resize(one, (320, 256)), "camera_size"),
        (lambda one: cv2.resize(one, (128, 128)), "camera_size"),
    ],
)
def test_each_fault_is_named_in_each_picture(
    known: Camera, spoil: Callable[[Picture], Picture], code: str
) -> None:
    found = faults(known, (spoil(part(seed)) for seed in OTHERS[:6]))
    assert [fault and fault.code for fault in found] == [code] * 6
    reasons = [fault.reason for fault in found if fault]
    assert all(one.startswith("The picture ") and one.endswith(" is usual.") for one in reasons)


def test_another_size_is_said_in_whole_pixels(known: Camera) -> None:
    (found,) = faults(known, [cv2.resize(part(200), (320, 320))])
    assert found is not None
    assert found.reason.startswith("The picture has another size: it has a width of 320 pixels, ")
    assert re.search(r", and 2\d\d to 2\d\d pixels is usual\.$", found.reason)


def test_a_camera_that_was_turned_with_its_frame_is_turned_and_has_no_other_size(
    wide: Camera,
) -> None:
    found = faults(wide, [upended(part(200)[TALL])])[0]
    assert found is not None
    assert found.code == "camera_turned"
    assert "it is 176 x 256 pixels, and 256 x 176 is usual" in found.reason


def test_what_a_few_pictures_agree_on_is_named_sooner_than_what_a_single_one_says(
    known: Camera,
) -> None:
    spread = known.statistics["shift_x"].spread * 256
    push = shifted(right=3.4 * spread)  # pixels: a single part may lie so far off
    pushed = codes(known, (push(part(seed)) for seed in OTHERS[:10]))
    assert "camera_shifted" in pushed[:FEW]
    assert None in pushed[: FEW - 1]


def test_the_first_picture_after_the_camera_was_set_right_is_usable(known: Camera) -> None:
    pictures = [shifted(right=24)(part(seed)) for seed in OTHERS[:6]]
    pictures += [part(seed) for seed in OTHERS[6:12]]
    found = codes(known, pictures)
    assert found[:6] == ["camera_shifted"] * 6
    assert found[6:] == [None] * 6


def test_parts_that_lie_at_any_angle_are_never_turned_and_the_model_says_so() -> None:
    chance = random.Random(0)

    def anyhow(seed: int) -> Picture:
        return turned(chance.uniform(0, 360))(part(seed))

    known = learned(map(anyhow, range(60)))
    assert set(codes(known, map(anyhow, OTHERS))) <= {None}
    assert known.blind()["camera_turned"] == (
        "The parts lie at any angle, or look alike from several sides."
    )
    assert codes(known, [dark(anyhow(1))]) == ["camera_dark"]


def test_parts_that_lie_anywhere_are_never_shifted_and_the_model_says_so() -> None:
    chance = random.Random(0)

    def anywhere(seed: int) -> Picture:
        return np.roll(part(seed), (chance.randrange(256), chance.randrange(256)), (0, 1))

    known = learned(map(anywhere, range(40)))
    assert set(codes(known, map(anywhere, OTHERS))) <= {None}
    assert "varies too much" in known.blind()["camera_shifted"]


def test_pictures_that_are_all_alike_leave_room_for_a_little() -> None:
    known = learned([part(1)] * 20)
    noise = np.random.default_rng(0).normal(0, 2, part(1).shape)
    noisy = np.clip(part(1) + noise, 0, 255).astype(np.uint8)
    a_little = [part(1), noisy, dark(part(1), 0.97), shifted(right=3)(part(1)), turned(2)(part(1))]
    assert [codes(known, [one])[0] for one in a_little] == [None] * 5
    assert codes(known, [dark(part(1))]) == ["camera_dark"]


def test_what_can_hardly_be_brighter_has_no_limit_there() -> None:
    known = learned(np.maximum(part(seed), 245) for seed in range(20))
    assert "camera_bright" in known.blind()
    assert "camera_dark" not in known.blind()


def test_one_picture_that_is_far_off_among_many_moves_no_limit() -> None:
    values = np.random.default_rng(0).normal(0.5, 0.02, 300)
    clean, spoilt = Learned.of(values), Learned.of(np.append(values, 0.0))
    assert clean is not None
    assert spoilt is not None
    assert spoilt == clean
    kept = Learned.of(np.append(values[:20], 0.0))  # of so few, it may be another kind of part
    assert kept is not None
    assert kept.spread > 3 * clean.spread


def test_an_update_knows_what_it_would_know_of_all_at_once() -> None:
    values = np.random.default_rng(1).normal(3, 0.5, 60)
    parts = [Learned.of(values[:25]), Learned.of(values[25:])]
    whole = Learned.of(values)
    assert parts[0] is not None
    assert whole is not None
    merged = parts[0].merged(parts[1])
    assert (merged.count, merged.mean) == (60, pytest.approx(whole.mean))
    assert merged.spread == pytest.approx(whole.spread)
    assert parts[0].merged(None) == parts[0]


@pytest.mark.parametrize("degrees", [7, 10, 19, 39, 500])
def test_students_quantile_is_that_of_the_tables(degrees: int) -> None:
    for z in (1.96, 3.29, 3.89):
        exact = stats.t.ppf(stats.norm.cdf(z), degrees)
        assert student(degrees, z) == pytest.approx(exact, rel=0.02)


def test_a_limit_is_exceeded_as_seldom_as_it_says_however_few_were_learned() -> None:
    draw, statistic = np.random.default_rng(0), Statistic(0, None, None, 0, math.inf, "", "")
    for count in (LEAST, 20, 100):
        sets = draw.normal(0, 1, (20_000, count + 1))
        known = [Learned(count, one[:-1].mean(), one[:-1].std(ddof=1)) for one in sets]
        stray = known[0].stray(statistic, 2.5) / known[0].spread  # 1.24 % beyond
        away = [abs(one[-1] - of.mean) > stray * of.spread
                for one, of in zip(sets, known, strict=True)]  # fmt: skip
        assert np.mean(away) == pytest.approx(0.0124, rel=0.25)


def test_too_few_pictures_say_nothing() -> None:
    assert learn([look(part(seed)) for seed in range(LEAST - 1)], None, NO_SCORES) is None


def test_what_meta_json_holds_is_json_and_small(known: Camera) -> None:
    text = json.dumps(known.content())
    assert len(text) < 3000
    again = Camera.of(json.loads(text))
    assert again is not None
    assert again.content() == known.content()


@pytest.mark.parametrize(
    "damage",
    [
        lambda one: one.pop("mean"),
        lambda one: one.update(mean="AAAA"),
        lambda one: one.update(mean=7),
        lambda one: one.update(size=[0, 256]),
        lambda one: one.update(size="x"),
        lambda one: one.update(pictures=3),
        lambda one: one.update(pictures=None),
        lambda one: one.update(statistics=[1]),
        lambda one: one["statistics"]["turn"].update(spread=-1.0),
        lambda one: one["statistics"]["turn"].update(spread=None),
        lambda one: one["statistics"]["turn"].update(count=0),
    ],
)
def test_what_cannot_be_is_as_good_as_nothing(
    known: Camera, damage: Callable[[dict[str, Any]], object]
) -> None:
    content = copy.deepcopy(known.content())
    damage(content)
    assert Camera.of(content) is None


def test_a_picture_of_a_pixel_is_measured_like_any(known: Camera) -> None:
    dot = np.full((1, 1, 3), 90, np.uint8)
    assert codes(known, [dot]) == ["camera_size"]
    values, small = measure(dot, np.full((256, 256, 3), 90, np.uint8))
    assert small.shape == (32, 32)
    assert np.isfinite(values[0])


def test_the_place_of_a_part_is_told_to_a_hundredth_of_the_picture(known: Camera) -> None:
    middle = measured(known, part(150))
    for right, down in ((10, 0), (-7, 5), (0, -12)):
        found = measured(known, shifted(right, down)(part(150))) - middle
        place = [found[NAMES.index(name)] * 256 for name in ("shift_x", "shift_y")]
        assert place == pytest.approx([right, down], abs=2.6)


def test_every_code_has_a_setting() -> None:
    assert Settings(unusable="all").unusable_codes == {*CODES}


@pytest.mark.alone
def test_what_measuring_a_picture_costs_is_little(
    known: Camera, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = cv2.resize(part(1), (1024, 1024), interpolation=cv2.INTER_CUBIC)
    pixels, took = resize(picture, 256), []
    values = known.measure(picture, pixels)
    for work in (
        lambda: known.measure(picture, pixels),
        lambda: known.faults(values, [values] * (FEW - 1)),
    ):
        times = []
        for _ in range(50):
            began = time.perf_counter()
            work()
            times.append((time.perf_counter() - began) * 1000)
        took.append(min(times))
    with capsys.disabled():
        print(f"\nmeasuring {took[0]:.2f} ms, judging {took[1]:.2f} ms")
    assert sum(took) < 5  # of a part's 35 and more
