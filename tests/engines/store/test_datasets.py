"""Training images on disk: names that look alike, and names that a disk does not take."""

from __future__ import annotations

import json
import os
from pathlib import Path
from unicodedata import normalize

import pytest

from engines.errors import BadRequest, Conflict, UnknownDataset
from engines.store.datasets import Datasets
from support.damage import picture, png

COMPOSED = "ガラス.png"
DECOMPOSED = normalize("NFD", COMPOSED)  # as macOS writes it
ONE, OTHER = png(picture()), png(picture()[::-1])


@pytest.fixture
def datasets(tmp_path: Path) -> Datasets:
    return Datasets(tmp_path / "datasets")


def copied(datasets: Datasets, name: str, data: bytes) -> Path:
    """A file that somebody put there by hand."""
    path = datasets.root / "train" / "bolt" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_of_two_files_whose_names_look_alike_the_one_is_meant_that_is_spelt_so(
    datasets: Datasets,
) -> None:
    composed = copied(datasets, COMPOSED, ONE)
    decomposed = copied(datasets, DECOMPOSED, OTHER)
    assert datasets.read("bolt", "train", COMPOSED) == ONE
    assert datasets.read("bolt", "train", DECOMPOSED) == OTHER
    datasets.delete_image("bolt", "train", DECOMPOSED)
    assert composed.exists()
    assert not decomposed.exists()


def test_no_upload_makes_a_second_file_whose_name_looks_alike(datasets: Datasets) -> None:
    there = copied(datasets, DECOMPOSED, ONE)
    assert datasets.read("bolt", "train", COMPOSED) == ONE
    assert datasets.add("bolt", "train", COMPOSED, ONE) == (DECOMPOSED, True)
    with pytest.raises(Conflict, match="another image of the name"):
        datasets.add("bolt", "train", COMPOSED, OTHER)
    assert datasets.add("bolt", "train", COMPOSED, OTHER, replace=True) == (DECOMPOSED, False)
    assert there.read_bytes() == OTHER
    assert datasets.count("bolt", "train") == 1


@pytest.mark.parametrize(
    "category",
    [
        "\U00020bb7" * 62,  # could be made, and never deleted
        "\U00020bb7" * 64,  # longer than a file system takes
        normalize("NFD", "한"),  # looks like another category, and no model is called so
        "\ufa19",  # the same
    ],
    ids=["long", "longest", "decomposed", "compatible"],
)
def test_a_category_that_no_model_can_be_called_is_refused_before_it_is_made(
    datasets: Datasets, category: str
) -> None:
    with pytest.raises(BadRequest, match="200 bytes"):
        datasets.add(category, "train", "1.png", ONE)
    with pytest.raises(BadRequest, match="composed"):
        datasets.images(category, "train")
    assert not datasets.root.exists()


def test_a_category_as_long_as_can_be_is_made_noted_and_deleted(datasets: Datasets) -> None:
    category = "\U00020bb7" * 50
    datasets.add(category, "train", "1.png", ONE)
    datasets.note_origins(category, {"1.png": {"decision": 1}})
    datasets.delete(category)
    assert datasets.categories() == {}


@pytest.mark.parametrize(
    "name", ["a" * 251 + ".png", "検" * 83 + "12.png", "a" + "検" * 83 + "1.png"]
)
def test_a_file_whose_name_is_as_long_as_a_disk_takes_is_read_and_deleted(
    datasets: Datasets, name: str
) -> None:
    there = copied(datasets, name, ONE)
    assert datasets.read("bolt", "train", name) == ONE
    datasets.delete_image("bolt", "train", name)
    assert list(there.parent.iterdir()) == []


def test_a_file_whose_name_is_not_utf_8_is_read_and_deleted_by_the_name_that_the_list_shows(
    datasets: Datasets,
) -> None:
    copied(datasets, os.fsdecode("検査.png".encode("cp932")), ONE)
    (listed,) = datasets.images("bolt", "train").images
    assert datasets.read("bolt", "train", listed.name) == ONE
    datasets.delete_image("bolt", "train", listed.name)
    assert datasets.count("bolt", "train") == 0
    with pytest.raises(UnknownDataset):
        datasets.read("bolt", "train", listed.name)


@pytest.mark.parametrize("content", ["{", "[" * 100_000, "[]", "\0"])
def test_a_damaged_list_of_origins_is_named_and_not_written_over(
    datasets: Datasets, content: str
) -> None:
    datasets.add("bolt", "train", "1.png", ONE)
    datasets.note_origins("bolt", {"1.png": {"decision": 1}})
    path = datasets.root / "origins" / "bolt.json"
    assert json.loads(path.read_bytes()) == {"1.png": {"decision": 1}}
    path.write_text(content)
    with pytest.raises(Conflict, match=r"bolt\.json is damaged"):
        datasets.note_origins("bolt", {"2.png": {"decision": 2}})
    assert path.read_text() == content
