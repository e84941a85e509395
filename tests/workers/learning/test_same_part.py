"""Pictures of one part are kept together, and those of different parts are not."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from engines.image import resize
from engines.meta import Meta
from support.project import PATCHCORE
from workers.learning.same_part import same_part
from workers.models import patchcore
from workers.models.backbone import describe
from workers.sample_parts.drawing import draw_part

Pictures = NDArray[np.uint8]
Rows = NDArray[np.float32]


def rows_of(parts: list[int], differ: float = 0.2, seed: int = 0) -> Rows:
    """Descriptors of pictures of these parts; their shots differ by so much of a part's spread."""
    random = np.random.default_rng(seed)
    each = random.normal(0, 1, (max(parts, default=0) + 1, 400))
    found = each[parts] + differ * random.normal(0, 1, (len(parts), 400))
    return np.asarray(found, np.float32)


def grouped(parts: list[int], **more: float) -> list[int]:
    return same_part(rows_of(parts, **more)).tolist()  # type: ignore[arg-type]


def shots(part: int, count: int) -> list[Pictures]:
    """One part, moved by a pixel or two, under a little noise."""
    random = np.random.default_rng(part)
    picture = draw_part(part, None, 256)[0]
    found = []
    for _ in range(count):
        shift = np.float32([[1, 0, random.uniform(-2, 2)], [0, 1, random.uniform(-2, 2)]])
        moved = cv2.warpAffine(picture, shift, (256, 256), borderMode=cv2.BORDER_REPLICATE)
        noisy = moved + random.normal(0, 2, moved.shape)
        found.append(resize(np.clip(noisy, 0, 255).astype(np.uint8), 128))
    return found


def described(pictures: list[Pictures]) -> Rows:
    meta = Meta.model_validate({**PATCHCORE, "image_size": 128})
    torch.manual_seed(0)
    model = patchcore.build(meta, "untrained")
    with torch.inference_mode():
        return describe(model.embed(torch.from_numpy(np.stack(pictures)))[0])


def test_shots_of_one_drawn_part_are_kept_together_and_most_parts_apart() -> None:
    counts = [3, 1, 2, 4, 1, 1, 2]
    pictures = [shot for part, count in enumerate(counts) for shot in shots(part, count)]
    found, true = same_part(described(pictures)), np.repeat(np.arange(len(counts)), counts)
    assert all(len(np.unique(found[true == part])) == 1 for part in range(len(counts)))
    # Two that happen to lie alike may be taken for one: then a little more is left out.
    assert len(np.unique(found)) >= len(counts) - 1


def test_different_drawn_parts_are_apart_unless_they_happen_to_lie_alike() -> None:
    pictures = [resize(draw_part(seed, None, 256)[0], 128) for seed in range(20)]
    assert len(np.unique(same_part(described(pictures)))) >= 18


def test_nearly_equal_pictures_are_kept_together_wherever_they_stand() -> None:
    assert grouped([0, 1, 2, 3, 0, 4, 1, 5, 0]) == [0, 1, 2, 3, 0, 4, 1, 5, 0]


def test_pictures_taken_one_after_the_other_may_differ_more() -> None:
    """By half of what lies between parts; where they do not follow each other they stay apart."""
    differ = 0.5 / np.sqrt(1 - 0.5**2)
    assert grouped([0, 0, 1, 2, 2, 3, 4, 5], differ=differ) == [0, 0, 1, 2, 2, 3, 4, 5]
    assert grouped([0, 1, 0, 2, 3, 2, 4, 5], differ=differ) == list(range(8))


@pytest.mark.parametrize("count", [0, 1, 2])
def test_too_few_pictures_to_compare_are_of_a_part_each(count: int) -> None:
    assert same_part(np.zeros((count, 4), np.float32)).tolist() == list(range(count))


def test_two_of_three_are_kept_together() -> None:
    assert grouped([0, 1, 0]) == [0, 1, 0]
    assert grouped([0, 1, 2]) == [0, 1, 2]


def test_equal_pictures_are_all_of_one_part() -> None:
    assert same_part(np.ones((5, 40), np.float32)).tolist() == [0] * 5


def test_shots_of_one_part_alone_vary_as_parts_do_for_all_that_is_known() -> None:
    assert len(set(grouped([0] * 10))) == 10


def test_many_pictures_of_few_parts_are_found() -> None:
    parts = np.random.default_rng(1).integers(0, 4, 300)
    found = same_part(rows_of(parts.tolist()))
    assert len(np.unique(found)) == 4
    for part in range(4):
        assert len(np.unique(found[parts == part])) == 1


@pytest.mark.parametrize(("count", "far"), [(8, 1), (14, 2), (20, 3), (34, 5)])
@pytest.mark.parametrize("alike", [True, False])
def test_strange_pictures_do_not_make_one_part_of_the_others(
    count: int, far: int, alike: bool
) -> None:
    rows = rows_of(list(range(count)), differ=0)
    random = np.random.default_rng(2)
    rows[:far] += 8 * random.normal(0, 1, (1 if alike else far, 400)).astype(np.float32)
    assert len(np.unique(same_part(rows)[far:])) == count - far


def test_numbers_follow_the_order_of_the_first_pictures() -> None:
    found = same_part(rows_of([5, 5, 3, 3, 1, 1, 0, 0]))
    assert found.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
