"""Parts that a person has marked become images to learn from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from app.decisions.database import Filter
from app.decisions.recorder import Recorder, _Waiting
from app.decisions.teaching import teach
from app.settings import Settings
from engines.errors import Conflict, DiskFull
from engines.image import DEFAULT_LIMITS
from engines.store.datasets import Datasets
from support.damage import big_tiff, picture, png
from support.decisions import decision

GOOD = png(picture())
BIG = big_tiff(np.zeros((8, 8), np.uint8), "<")


def recorded(folder: Path, *parts: tuple[str, bytes | None]) -> Recorder:
    """A record of good parts: the format of each, and its picture where one is kept."""
    recorder = Recorder(Settings(data_dir=folder))
    recorder.start()
    for number, (kind, image) in enumerate(parts):
        one = decision(id=f"part-{number}", sha256=f"{number:064x}", format=kind)
        recorder._add(_Waiting(one, image))
    for number in range(len(parts)):
        recorder.read(lambda it, n=number: it.mark(it.one(f"part-{n}"), "good", "", "anna", ""))
    return recorder


def test_a_part_of_which_nothing_can_be_learned_keeps_no_other_from_it(tmp_path: Path) -> None:
    """Pixels of /v2 are no file; a file may be of a kind that is not read any more."""
    damaged = GOOD[:-20]
    parts = ("pixels", None), ("PNG", damaged), ("BigTIFF", BIG), ("JPEG", None), ("PNG", GOOD)
    recorder, datasets = recorded(tmp_path, *parts), Datasets(tmp_path / "datasets")
    found = teach(recorder, datasets, "bolt", Filter(), 0.0, DEFAULT_LIMITS)
    assert (found.added["train"], found.without_picture) == (2, 3)
    names = [image.name for image in datasets.images("bolt", "train").images]
    assert sorted(name[-4:] for name in names) == [".png", ".tif"]
    again = teach(recorder, datasets, "bolt", Filter(), 0.0, DEFAULT_LIMITS)
    assert (again.added["train"], again.already_there, again.without_picture) == (0, 2, 3)
    recorder.close()


def test_a_label_that_changes_moves_a_picture_also_when_the_record_keeps_it_no_more(
    tmp_path: Path,
) -> None:
    recorder, datasets = recorded(tmp_path, ("PNG", GOOD)), Datasets(tmp_path / "datasets")
    teach(recorder, datasets, "bolt", Filter(), 0.0, DEFAULT_LIMITS)
    recorder.pictures.delete(1)
    recorder.read(lambda it: it.mark(it.one("part-0"), "defect", "dent", "anna", ""))  # type: ignore[arg-type]
    found = teach(recorder, datasets, "bolt", Filter(), 0.0, DEFAULT_LIMITS)
    assert (found.added["anomaly"], found.moved, found.without_picture) == (1, 1, 0)
    assert datasets.categories()["bolt"] == {"train": 0, "normal": 0, "anomaly": 1}
    recorder.close()


def test_a_picture_that_cannot_be_stored_where_it_belongs_stays_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, datasets = recorded(tmp_path, ("PNG", GOOD)), Datasets(tmp_path / "datasets")
    teach(recorder, datasets, "bolt", Filter(), 0.0, DEFAULT_LIMITS)
    recorder.read(lambda it: it.mark(it.one("part-0"), "defect", "dent", "anna", ""))  # type: ignore[arg-type]

    def full(*_: object, **__: object) -> None:
        raise DiskFull("The disk of the data folder is full.")

    monkeypatch.setattr(Datasets, "add", full)
    with pytest.raises(DiskFull):
        teach(recorder, datasets, "bolt", Filter(), 0.0, DEFAULT_LIMITS)
    assert datasets.categories()["bolt"] == {"train": 1, "normal": 0, "anomaly": 0}
    recorder.close()


def test_nothing_is_stored_where_its_origin_could_not_be_noted(tmp_path: Path) -> None:
    recorder, datasets = recorded(tmp_path, ("PNG", GOOD)), Datasets(tmp_path / "datasets")
    (datasets.root / "origins").mkdir(parents=True)
    (datasets.root / "origins" / "bolt.json").write_text("{")
    with pytest.raises(Conflict, match="damaged"):
        teach(recorder, datasets, "bolt", Filter(), 0.0, DEFAULT_LIMITS)
    assert datasets.categories() == {}
    recorder.close()
