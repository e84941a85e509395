"""Drawn parts as files: the layout that retrain reads, the sheet, and the command for both."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from engines.errors import EXIT_CODE, BadRequest
from support.project import ROOT
from workers.sample_parts import write_dataset as dataset
from workers.sample_parts.__main__ import main
from workers.sample_parts.defects import DEFECTS
from workers.sample_parts.drawing import draw_part
from workers.sample_parts.write_dataset import CATEGORY, draw_sheet, write_dataset, write_png


def run_command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "workers.sample_parts", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def files_under(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


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
    planned = list(dataset._plan(tmp_path, CATEGORY, (0, 0, 1), 0))
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
    damaged = tmp_path / "train" / CATEGORY / "0000.png"
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
        write_png(path, np.zeros((64, 64), np.uint8))
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


def test_the_command_says_how_far_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.progress.PLAIN_EVERY_S", 0.0)
    counts = ("--train", "2", "--normal", "1", "--per-kind", "0")
    assert main(["--out", str(tmp_path), "--size", "64", *counts]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["draw: 1 of 3", "draw: 2 of 3"]
    assert lines[2].startswith("draw: 3 in ")


def test_the_command_says_where_it_cannot_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    status = main(["--out", str(tmp_path / "file"), "--size", "64"])
    assert status == EXIT_CODE
    assert str(tmp_path / "file") in capsys.readouterr().err
