"""The sample part: repeatable and varied pictures, exact masks, the layout that retrain reads."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from engines.errors import EXIT_CODE, BadRequest
from support.project import ROOT
from workers.sample_parts import drawing as sample_parts
from workers.sample_parts.drawing import DEFECTS, HARD_DEFECTS, draw_part, draw_sheet, write_dataset

SMALL = 128  # px


def difference(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The greatest difference of any channel, (size, size), grey levels."""
    return np.abs(one.astype(np.int16) - other.astype(np.int16)).max(axis=2)


def run_command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "workers.sample_parts", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def files_under(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


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
    scenes = [sample_parts._scene(seed, SMALL) for seed in range(8)]
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


def test_the_layout_is_the_one_retrain_reads(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "data", "line_2", train=3, normal=2, per_kind=1, size=64)
    assert root == tmp_path / "data"
    assert set(files_under(root)) == {
        *(f"train/line_2/{n:04d}.png" for n in range(3)),
        *(f"test/line_2/normal/{n:04d}.png" for n in range(2)),
        *(f"test/line_2/anomaly/{kind}_00.png" for kind in DEFECTS),
        *(f"masks/line_2/{kind}_00.png" for kind in DEFECTS),
    }


def test_files_hold_what_was_drawn(tmp_path: Path) -> None:
    write_dataset(tmp_path, train=0, normal=0, per_kind=1, size=64)
    planned = list(sample_parts._plan(tmp_path, sample_parts.CATEGORY, (0, 0, 1), 0))
    assert [picture.defect for picture in planned] == list(DEFECTS)
    for picture in planned:
        image, mask = draw_part(picture.seed, picture.defect, 64)
        assert np.array_equal(cv2.imread(str(picture.path))[..., ::-1], image)
        assert np.array_equal(cv2.imread(str(picture.mask_path), cv2.IMREAD_UNCHANGED), mask)


def test_no_picture_appears_twice_and_a_higher_count_changes_none(tmp_path: Path) -> None:
    few = files_under(write_dataset(tmp_path / "few", train=2, normal=2, per_kind=1, size=64))
    more = files_under(write_dataset(tmp_path / "more", train=3, normal=3, per_kind=2, size=64))
    pictures = [data for name, data in more.items() if not name.startswith("masks")]
    assert len(set(pictures)) == len(pictures)
    assert few.items() <= more.items()


def test_another_seed_writes_other_pictures(tmp_path: Path) -> None:
    counts = {"train": 2, "normal": 1, "per_kind": 1, "size": 64}
    one = files_under(write_dataset(tmp_path / "one", **counts, seed=0))
    other = files_under(write_dataset(tmp_path / "other", **counts, seed=1))
    names = [name for name in one if not name.startswith("masks")]
    assert all(one[name] != other[name] for name in names)


def test_writing_again_replaces_the_files_and_leaves_no_others(tmp_path: Path) -> None:
    first = files_under(write_dataset(tmp_path, train=1, normal=1, per_kind=1, size=64))
    damaged = tmp_path / "train" / sample_parts.CATEGORY / "0000.png"
    damaged.write_bytes(b"half a picture")
    again = files_under(write_dataset(tmp_path, train=1, normal=1, per_kind=1, size=64))
    assert again == first


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "part.png"
    path.write_bytes(b"old")

    def full_disk(descriptor: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        sample_parts._write_png(path, np.zeros((64, 64), np.uint8))
    assert files_under(tmp_path) == {"part.png": b"old"}


@pytest.mark.parametrize("category", ["", ".", "..", "a/b", "/tmp"])
def test_a_category_cannot_leave_its_folder(tmp_path: Path, category: str) -> None:
    with pytest.raises(BadRequest, match="one folder"):
        write_dataset(tmp_path, category, train=1, normal=0, per_kind=0, size=64)
    assert not files_under(tmp_path)


def test_a_count_below_zero_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="count"):
        write_dataset(tmp_path, train=-1, size=64)


def test_the_sheet_shows_normals_and_every_kind_of_defect() -> None:
    sheet = draw_sheet(size=64, columns=3)
    assert sheet.shape == ((1 + len(DEFECTS)) * (64 + 28), 3 * 64, 3)
    assert np.array_equal(sheet[28:92, :64], draw_part(0, size=64)[0])


def test_the_command_writes_a_dataset_and_a_sheet_and_says_so(tmp_path: Path) -> None:
    counts = ("--train", "2", "--normal", "1", "--per-kind", "1", "--size", "64", "--seed", "5")
    done = run_command("--out", tmp_path / "data", *counts, "--sheet", tmp_path / "sheet.png")
    assert done.returncode == 0, done.stderr
    assert "2 pictures to learn from, 1 normal and 5 defective" in done.stdout
    assert len(files_under(tmp_path / "data")) == 2 + 1 + 5 + 5
    assert cv2.imread(str(tmp_path / "sheet.png")) is not None
    told = write_dataset(tmp_path / "told", train=2, normal=1, per_kind=1, size=64, seed=5)
    assert files_under(told) == files_under(tmp_path / "data")


@pytest.mark.parametrize("size", ["8", "100000"])
def test_the_command_refuses_in_one_sentence(tmp_path: Path, size: str) -> None:
    done = run_command("--out", tmp_path, "--size", size)
    assert done.returncode == EXIT_CODE
    assert done.stderr == f"error: A size of {size} px is not between 64 and 4096 px.\n"


def test_the_command_says_where_it_cannot_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    status = sample_parts.main(["--out", str(tmp_path / "file"), "--size", "64"])
    assert status == EXIT_CODE
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_the_module_does_without_torch() -> None:
    check = "import sys, workers.sample_parts.drawing; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=False).returncode == 0
