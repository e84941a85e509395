"""A folder of pictures becomes batches; what cannot be read is named and does not stop the rest."""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from engines import image
from engines.errors import BadDataset
from engines.meta import Meta
from support.mutations import flat_jpeg
from support.project import PATCHCORE
from workers.learning.dataset import Category, Images, bit_depth_of, notes_on, notes_on_passed_over
from workers.models import Training, patchcore
from workers.progress import Progress

QUIET = Progress(quiet=True)


def picture(path: Path, value: int = 100, side: int = 48) -> Path:
    """A picture that can be told from others by its first pixel."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((side, side, 3), value, np.uint8)
    coded, data = cv2.imencode(path.suffix.lower(), pixels)
    assert coded
    path.write_bytes(data.tobytes())
    return path


def deep(path: Path, bits: int) -> Path:
    """A grey 16-bit PNG of a camera that fills `bits` of the 16."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.linspace(0, 2**bits - 1, 48 * 48).reshape(48, 48).astype(np.uint16)
    assert cv2.imwrite(str(path), pixels)
    return path


def images(paths: list[Path], batch: int = 4, size: int = 32) -> Images:
    return Images(paths, meta(size), batch, QUIET)


def meta(size: int = 32, bit_depth: int | None = None) -> Meta:
    about = {**PATCHCORE, "image_size": size, "resize": "each_axis"}
    return Meta.model_validate(about).with_(bit_depth=bit_depth)


def firsts(batches: list[NDArray[np.uint8]]) -> list[int]:
    return [int(pixels[0, 0, 0]) for batch in batches for pixels in batch]


def test_endings_in_any_letter_case_are_found_and_sorted_by_name(tmp_path: Path) -> None:
    names = ["a.PNG", "b.Jpg", "c.jpeg", "d.BMP", "e.tif", "f.TIFF", "g.png"]
    for name in reversed(names):
        picture(tmp_path / "train" / "cat" / name)
    assert [path.name for path in Category.find(tmp_path, "cat").train] == names


def test_hidden_files_subfolders_and_other_files_are_not_images(tmp_path: Path) -> None:
    folder = tmp_path / "train" / "cat"
    picture(folder / "good.png")
    picture(folder / ".hidden.png")
    picture(folder / "._mac.jpg")
    picture(folder / "older" / "deep.png")
    (folder / "notes.txt").write_text("not an image")
    (folder / "Thumbs.db").write_bytes(b"\0")
    found = Category.find(tmp_path, "cat")
    assert [path.name for path in found.train] == ["good.png"]
    assert (found.test_normal, found.test_anomaly) == ([], [])


def test_good_folders_and_folders_of_defects_are_read(tmp_path: Path) -> None:
    train, test = tmp_path / "train" / "cat", tmp_path / "test" / "cat"
    good = [picture(train / "1.png"), picture(train / "good" / "2.png")]
    normal = [picture(test / "normal" / "3.png"), picture(test / "normal" / "OK" / "4.png")]
    defects = [picture(test / "anomaly" / kind / "5.png") for kind in ("dent", "scratch")]
    found = Category.find(tmp_path, "cat")
    assert (found.train, found.test_normal, found.test_anomaly) == (good, normal, defects)
    assert found.passed_over == {}


def test_jpegs_by_their_other_names_are_read(tmp_path: Path) -> None:
    paths = [picture(tmp_path / "train" / "cat" / name) for name in ("a.jpg", "b.jpg")]
    ends = (".jfif", ".JPE")
    renamed = [path.rename(path.with_suffix(end)) for path, end in zip(paths, ends, strict=True)]
    found = Category.find(tmp_path, "cat").train
    assert found == renamed
    assert len(next(iter(images(found)))) == 2


def test_what_is_passed_over_is_counted_and_named(tmp_path: Path) -> None:
    train, test = tmp_path / "train" / "cat", tmp_path / "test" / "cat"
    picture(train / "1.png")
    for name in ("b.webp", "a.WEBP", "c.heic", "notes.txt", ".hidden.webp"):
        (train / name).write_bytes(b"RIFF")
    (train / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (train / "good").mkdir()
    (train / "good" / "circle").symlink_to(train)
    picture(train / "defects" / "2.png")
    picture(test / "good" / "3.png")
    picture(test / "4.png")
    picture(test / "anomaly" / "good" / "5.png")
    found = Category.find(tmp_path, "cat")
    assert [path.name for path in found.train] == ["1.png"]
    assert (found.test_normal, found.test_anomaly) == ([], [])
    notes = notes_on_passed_over(found.passed_over)
    for said in (
        f"Passed over 2 in {train} that end in .webp (save them as PNG, JPEG, BMP or TIFF): a.WEBP",
        f"Passed over 1 in {train} that end in .heic",
        f"Passed over 1 in {train} that are links to nowhere: gone.png.",
        f"Passed over 1 in {train / 'defects'}, which is none of the folders that are read: 2.png.",
        f"Passed over 1 in {test / 'good'}, which is none",
        f"Passed over 1 in {test}: neither in normal nor in anomaly: 4.png.",
        f"Passed over 1 in {test / 'anomaly' / 'good'}, which is none",
    ):
        assert sum(note.startswith(said) for note in notes) == 1, said
    assert len(notes) == 7


def test_many_names_are_cut_short(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "cat" / "1.png")
    for number in range(40):
        (tmp_path / "train" / "cat" / f"{number:02}.webp").touch()
    (note,) = notes_on_passed_over(Category.find(tmp_path, "cat").passed_over)
    assert note.startswith("Passed over 40 in")
    assert note.endswith(": 00.webp, 01.webp, 02.webp, 03.webp, 04.webp and others.")


def test_a_folder_of_nothing_but_other_pictures_says_so(tmp_path: Path) -> None:
    (tmp_path / "train" / "cat").mkdir(parents=True)
    (tmp_path / "train" / "cat" / "a.heic").touch()
    with pytest.raises(BadDataset, match=r"holds no images.*Passed over 1 .*\.heic.*a\.heic"):
        Category.find(tmp_path, "cat")


def test_the_test_images_of_the_category_are_found(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "cat" / "1.png")
    normal = picture(tmp_path / "test" / "cat" / "normal" / "2.png")
    anomaly = picture(tmp_path / "test" / "cat" / "anomaly" / "3.png")
    picture(tmp_path / "test" / "other" / "normal" / "4.png")
    found = Category.find(tmp_path, "cat")
    assert (found.test_normal, found.test_anomaly) == ([normal], [anomaly])


def test_a_wrong_root_is_told(tmp_path: Path) -> None:
    with pytest.raises(BadDataset, match=r"nowhere does not exist: --data_root takes"):
        Category.find(tmp_path / "nowhere", "cat")


def test_a_root_without_train_says_where_images_belong(tmp_path: Path) -> None:
    with pytest.raises(BadDataset, match=r"train/cat does not exist: put the normal images there"):
        Category.find(tmp_path, "cat")


def test_a_wrong_category_lists_those_that_are_there(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "VisA_candle" / "1.png")
    picture(tmp_path / "train" / "MVTec_nut" / "1.png")
    with pytest.raises(BadDataset, match=r"must be one of MVTec_nut, VisA_candle"):
        Category.find(tmp_path, "VisA_candel")


def test_an_empty_category_says_which_endings_count(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "cat" / "in_a_subfolder" / "1.png")
    with pytest.raises(BadDataset, match=r"holds no images.*\.png"):
        Category.find(tmp_path, "cat")


def test_a_picture_that_a_library_stumbles_over_is_named_and_its_neighbours_are_learned(
    tmp_path: Path,
) -> None:
    paths = [picture(tmp_path / f"{number}.png", value=20 * number) for number in range(5)]
    for name, data in (("turned.jpg", flat_jpeg(1, 4)), ("third.jpg", flat_jpeg(3, 1))):
        (tmp_path / name).write_bytes(data)
        paths.append(tmp_path / name)
    source = images(paths)
    assert sum(map(len, source)) == 6
    assert [path.name for path in source.broken] == ["third.jpg"]
    assert "save it with 4:4:4" in source.broken[tmp_path / "third.jpg"]


@pytest.mark.parametrize(
    ("count", "batch", "sizes"), [(10, 4, [4, 4, 2]), (8, 4, [4, 4]), (3, 8, [3]), (3, 1, [1] * 3)]
)
def test_batches_hold_all_images_in_order(
    tmp_path: Path, count: int, batch: int, sizes: list[int]
) -> None:
    paths = [picture(tmp_path / f"{n:02}.png", value=20 * n) for n in range(count)]
    source = images(paths, batch)
    batches = list(source)
    assert [len(found) for found in batches] == sizes
    assert {found.shape[1:] for found in batches} == {(32, 32, 3)}
    assert {found.dtype for found in batches} == {np.dtype(np.uint8)}
    assert firsts(batches) == [20 * n for n in range(count)]
    assert source.used == paths


def test_a_batch_is_what_serving_sees_of_the_same_file(sample_data: Path) -> None:
    paths = Category.find(sample_data, "sample_bracket").train[:2]
    batch = next(iter(images(paths, size=256)))
    for pixels, path in zip(batch, paths, strict=True):
        assert np.array_equal(pixels, image.load(path.read_bytes(), 256))


@pytest.mark.parametrize("broken", [0, 3, 4, 9])
def test_a_broken_image_is_named_and_counted_and_the_rest_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], broken: int
) -> None:
    paths = [picture(tmp_path / f"{n:02}.png", value=20 * n) for n in range(10)]
    paths[broken].write_bytes(paths[broken].read_bytes()[:-30])
    source = Images(paths, meta(), 4, Progress())
    assert firsts(list(source)) == [20 * n for n in range(10) if n != broken]
    assert list(source.broken) == [paths[broken]]
    assert source.broken[paths[broken]] in capsys.readouterr().err
    assert len(source.used) == 9


def test_an_empty_file_is_a_broken_one(tmp_path: Path) -> None:
    good, empty = picture(tmp_path / "good.png"), tmp_path / "empty.png"
    empty.touch()
    source = images([empty, good])
    assert len(next(iter(source))) == 1
    assert list(source.broken) == [empty]


def test_a_file_that_the_disk_does_not_give_ends_the_reading(tmp_path: Path) -> None:
    good, gone = picture(tmp_path / "good.png"), tmp_path / "gone.png"
    with pytest.raises(BadDataset, match=r"gone\.png cannot be read: No such file"):
        list(images([good, gone]))
    with pytest.raises(BadDataset, match=r"gone\.png cannot be read: No such file"):
        bit_depth_of([good, gone])


def test_more_broken_ones_than_allowed_end_it(tmp_path: Path) -> None:
    paths = [picture(tmp_path / f"{n}.png") for n in range(6)]
    for path in paths[3:5]:
        path.write_bytes(b"no image")
    source = images(paths)
    source.most_broken = 2
    assert sum(map(len, source)) == 4
    source = images(paths)
    source.most_broken = 1
    with pytest.raises(BadDataset, match=r"2 of 6 pictures cannot be read.*3\.png"):
        list(source)


def test_progress_counts_broken_images_too(tmp_path: Path) -> None:
    paths = [picture(tmp_path / f"{n}.png") for n in range(5)]
    paths[4].write_bytes(b"no image")
    seen: list[tuple[int, int]] = []
    source = images(paths)
    source.tick = lambda done, total: seen.append((done, total))
    list(source)
    assert seen == [(done, 5) for done in range(1, 6)]


def test_where_all_images_are_broken_there_is_nothing_to_learn(tmp_path: Path) -> None:
    paths = [tmp_path / f"{n}.png" for n in range(3)]
    for path in paths:
        path.write_bytes(b"no image")
    source = images(paths)
    about = meta()
    with pytest.raises(BadDataset, match="no usable training image"):
        patchcore.train(patchcore.build(about, "untrained"), about, source, Training(), QUIET)
    assert len(source.broken) == 3


def test_8_bit_files_and_files_that_fill_16_say_their_bit_depth(tmp_path: Path) -> None:
    plain, full = picture(tmp_path / "0.png"), deep(tmp_path / "1.png", 16)
    assert bit_depth_of([plain]) == 8
    assert bit_depth_of([plain, full]) == 16


@pytest.mark.parametrize(
    ("bits", "may_be"), [(8, "10, 12, 14 or 16"), (12, "12, 14 or 16"), (14, "14 or 16")]
)
def test_darker_ones_do_not_and_are_asked_about(tmp_path: Path, bits: int, may_be: str) -> None:
    paths = [picture(tmp_path / "0.png"), deep(tmp_path / "1.png", bits)]
    with pytest.raises(BadDataset, match=f"no value above {2**bits - 1}.*gives, probably {may_be}"):
        bit_depth_of(paths)


def test_a_broken_image_does_not_count_for_the_bit_depth(tmp_path: Path) -> None:
    plain, torn = picture(tmp_path / "1.png"), deep(tmp_path / "2.png", 12)
    torn.write_bytes(torn.read_bytes()[:-40])
    assert bit_depth_of([torn, plain]) == 8
    assert bit_depth_of([torn]) == 8


def test_a_picture_deeper_than_the_known_bit_depth_ends_it_with_what_to_do(tmp_path: Path) -> None:
    paths = [deep(tmp_path / "1.png", 10), deep(tmp_path / "2.png", 12)]
    source = Images(paths, meta(bit_depth=10), 4, QUIET)
    with pytest.raises(BadDataset, match=r"2\.png has values up to 4095.*12, 14 or 16: bit_depth"):
        list(source)


def test_8_bit_pictures_for_a_model_of_16_bit_ones_are_told(tmp_path: Path) -> None:
    list(source := images([picture(tmp_path / "a.png")]))
    assert notes_on(source.files, meta(bit_depth=8)) == []
    (note,) = notes_on(source.files, meta(bit_depth=12))
    assert "have 8 bits, such as a.png, but bit_depth says 12" in note


def test_pictures_longer_than_4_to_1_are_told_with_what_to_do(tmp_path: Path) -> None:
    paths = [picture(tmp_path / "square.png"), tmp_path / "4.png", tmp_path / "web.png"]
    cv2.imwrite(str(paths[1]), np.zeros((32, 128), np.uint8))
    source = images(paths[:2])
    list(source)
    assert notes_on(source.files, meta()) == []
    cv2.imwrite(str(paths[2]), np.zeros((20, 320), np.uint8))
    list(source := images(paths))
    (note,) = notes_on(source.files, meta())
    assert "1 of 3 pictures" in note
    assert "web.png (320 x 20, 16:1): 10 pixels along the longer side become one" in note
    assert "tiles of at most 4:1" in note
    assert "image_size" in note


def test_pictures_that_are_enlarged_are_told_with_what_to_do(tmp_path: Path) -> None:
    half = meta().image_size // 2
    for name, side in {"large": half + 1, "small": half}.items():
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.zeros((side, side), np.uint8))
    list(source := images([tmp_path / "large.png"]))
    assert notes_on(source.files, meta()) == []
    list(source := images([tmp_path / "large.png", tmp_path / "small.png"]))
    (note,) = notes_on(source.files, meta())
    assert f"1 of 2 pictures are at most half as wide or high as the {2 * half} x" in note
    assert f"such as small.png ({half} x {half})" in note
    assert "a smaller image_size" in note


def test_a_reader_that_stops_early_leaves_no_thread_behind(tmp_path: Path) -> None:
    import threading

    paths = [picture(tmp_path / f"{n:02}.png") for n in range(20)]
    before = threading.active_count()
    reading = iter(images(paths))
    next(reading)
    reading.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
    shutil.rmtree(tmp_path)
