"""What pictures of a training look like is noted with the model, and goes on in an update."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from engines.camera import FEW, LEAST, Camera
from engines.image import decode, files_in
from support.camera import (
    Picture,
    blurred,
    codes,
    dark,
    learned,
    part,
    shifted,
    turned,
    upended,
)
from workers.learning.retrain import Retrain, retrain
from workers.progress import Progress
from workers.sample_parts.drawing import draw_part

CATEGORY = "bracket"
QUIET = Progress(quiet=True)
REAL = ("alien", "cookie", "hazelnut_toy")


# ---- a training ---------------------------------------------------------------------------------


class Place:
    """A folder of pictures, and what PaDiM or PatchCore learns from them."""

    def __init__(self, folder: Path) -> None:
        self.train = folder / "data" / "train" / CATEGORY
        self.train.mkdir(parents=True)
        self.out, self.meta = folder / "out", folder / "meta.json"
        about = {"model": "patchcore", "backbone": "resnet18", "layers": ["layer2", "layer3"],
                 "coreset_ratio": 0.1, "image_size": 64, "memory_bank": "bank.npz"}  # fmt: skip
        self.meta.write_text(json.dumps(about))
        self.data = folder / "data"

    def put(self, *seeds: int) -> None:
        for seed in seeds:
            cv2.imwrite(str(self.train / f"{seed:04}.png"), draw_part(seed, None, 128)[0])

    def learn(self, *, update: bool = False, **changes: Any) -> Camera | None:
        request = Retrain("patchcore", CATEGORY, self.data, self.out, self.meta, "untrained")
        if update:
            changes |= {"meta_json": self.out / "meta.json", "load_bank": self.out / "bank.npz",
                        "pretrained_pth": str(self.out / "model.pth")}  # fmt: skip
        retrain(Retrain(**{**vars(request), **changes}), QUIET)
        return self.known()

    def known(self) -> Camera | None:
        return Camera.of(json.loads((self.out / "meta.json").read_text()).get("camera"))


def test_a_training_notes_what_its_pictures_look_like_and_an_update_goes_on(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.put(*range(12))
    first = place.learn()
    assert first is not None
    assert (first.pictures, first.size) == (12, (128, 128))
    assert {"brightness", "shift_x", "sideways", "score"} <= {*first.statistics}
    assert first.statistics["score"].count == 12
    place.put(*range(12, 18))
    again = place.learn(update=True)
    assert again is not None
    assert (again.pictures, again.statistics["brightness"].count) == (18, 18)
    whole = Place(tmp_path / "whole")
    whole.put(*range(18))
    anew = whole.learn()
    assert anew is not None
    for name in ("brightness", "contrast", "sharpness", "red", "blue"):
        for value in ("mean", "spread"):
            told, expected = (getattr(one.statistics[name], value) for one in (again, anew))
            assert told == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert np.abs(again.mean - anew.mean).max() < 0.01
    unchanged = place.learn(update=True)  # nothing is new
    assert unchanged is not None
    assert unchanged.pictures == 18


def test_a_model_of_an_older_kensa_learns_it_of_all_pictures_that_are_there(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.put(*range(10))
    place.learn()
    path = place.out / "meta.json"
    meta = json.loads(path.read_text())
    del meta["camera"]
    path.write_text(json.dumps(meta))
    assert place.known() is None
    place.put(10, 11)
    found = place.learn(update=True)
    assert found is not None
    assert found.pictures == 12


def test_a_training_from_nothing_forgets_what_a_meta_json_knew(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.put(*range(10))
    place.learn()
    shutil.copy(place.out / "meta.json", place.meta)
    found = place.learn()
    assert found is not None
    assert found.pictures == 10


def test_strange_pictures_do_not_count_and_too_few_say_nothing(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.put(*range(12))
    inverse = 255 - draw_part(99, None, 128)[0]
    cv2.imwrite(str(place.train / "strange.png"), inverse)
    found = place.learn()
    assert found is not None
    assert found.pictures == 12
    assert found.statistics["brightness"].spread < 0.05
    few = Place(tmp_path / "few")
    few.put(*range(LEAST - 1))
    assert few.learn() is None


# ---- real photos, and many ----------------------------------------------------------------------


def photos(folder: Path) -> Iterator[Picture]:
    return (decode(path.read_bytes()) for path in files_in(folder))


@pytest.fixture(scope="module")
def alien(assets: Path) -> Camera:
    return learned(photos(assets / "data" / "train" / "alien"))


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (dark, "camera_dark"),
        (blurred, "camera_blurred"),
        (shifted(right=40), "camera_shifted"),
        (shifted(right=-40), "camera_shifted"),
        (shifted(down=40), "camera_shifted"),
        (shifted(right=40, border=cv2.BORDER_CONSTANT), "camera_shifted"),
        (turned(90), "camera_turned"),
        (turned(-90, border=cv2.BORDER_CONSTANT), "camera_turned"),
        (upended, "camera_turned"),
    ],
)
def test_spoilt_photos_are_named_within_five_parts(
    alien: Camera, assets: Path, spoil: Callable[[Picture], Picture], code: str
) -> None:
    found = codes(alien, map(spoil, photos(assets / "data" / "test" / "alien" / "normal")))
    assert code in found[:FEW]
    named = [one for one in found if one is not None]
    assert max({*named}, key=named.count) == code


@pytest.mark.parametrize("drawn", [151, pytest.param(951, marks=pytest.mark.soak)])
def test_of_a_thousand_untouched_pictures_hardly_any_is_named(assets: Path, drawn: int) -> None:
    """Drawn parts by what 20 of them show, real photos by their own training."""
    named: list[str | None] = []
    for category in REAL:
        known = learned(photos(assets / "data" / "train" / category))
        named += codes(known, photos(assets / "data" / "test" / category / "normal"))
    assert len(named) == 49
    assert named.count(None) == 49
    known = learned(part(seed) for seed in range(20))
    named += codes(known, (draw_part(seed, None, 256)[0] for seed in range(1000, 1000 + drawn)))
    assert len(named) - named.count(None) <= 0.01 * len(named)


@pytest.mark.soak
def test_nor_is_it_whichever_twenty_are_learned() -> None:
    chance = np.random.default_rng(0)
    named = []
    for _ in range(20):
        seeds = chance.choice(400, 220, replace=False)
        known = learned(part(int(seed)) for seed in seeds[:20])
        found = codes(known, (part(int(seed)) for seed in seeds[20:]))
        named.append(len(found) - found.count(None))
    assert sum(named) <= 0.01 * 200 * len(named)
