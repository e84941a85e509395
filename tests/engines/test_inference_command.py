"""Claims about the inference commands: what fails on one picture loses no other one."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engines import image
from engines.errors import EXIT_CODE
from engines.inference_command import NOT_ALL_JUDGED, main
from engines.runtimes.openvino import OpenVINORuntime
from support.plans import SIDE, tiny_bundle

WHITE = 255


def inspect(folder: Path, pictures: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> int:
    """Judge grey pictures with a model that gives no number for a white one; the exit code."""
    infer = OpenVINORuntime.infer

    def no_number_for_white(self: OpenVINORuntime, images: Any, size: int | None = None) -> Any:
        scores, maps = infer(self, images, size)
        return np.where(images.min(axis=(1, 2, 3)) == WHITE, np.nan, scores), maps

    monkeypatch.setattr(OpenVINORuntime, "infer", no_number_for_white)
    (folder / "pictures").mkdir()
    for name, grey in pictures.items():
        Image.new("L", (SIDE, SIDE), grey).save(folder / "pictures" / name)
    return run(folder, folder / "pictures", monkeypatch)


def run(folder: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Judge a folder of pictures; the exit code."""
    bundle = tiny_bundle(folder / "model")
    monkeypatch.chdir(folder)
    flags = {"e": bundle / "model.onnx", "d": pictures, "i": SIDE, "t": 30}
    return main("vae", [word for flag, value in flags.items() for word in (f"-{flag}", str(value))])


def test_a_picture_for_which_there_is_no_number_is_named_and_the_others_are_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = {"a.png": 0, "b.png": WHITE, "c.png": 100}
    assert inspect(tmp_path, pictures, monkeypatch) == NOT_ALL_JUDGED
    with (tmp_path / "result_vae.csv").open() as file:
        assert [row["filename"] for row in csv.DictReader(file)] == ["a.png", "c.png"]
    assert "b.png: not judged: " in capsys.readouterr().err


def test_whatever_a_picture_is_called_it_has_one_line_and_its_name_in_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["1\n2.png", "3\x1b[2J.png", "4\u202egnp.png", "検査\u3000５.png"]
    assert inspect(tmp_path, dict.fromkeys(names, 90), monkeypatch) == 0
    lines = capsys.readouterr().out.split("\n")
    assert [line.split("  ")[0] for line in lines] == [
        r"1\n2.png", r"3\x1b[2J.png", r"4\u202egnp.png", "検査\u3000５.png", ""
    ]  # fmt: skip
    with (tmp_path / "result_vae.csv").open(newline="", encoding="utf-8") as file:
        assert [row["filename"] for row in csv.DictReader(file)] == names


def test_a_picture_for_which_memory_is_short_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def decode(data: bytes, *arguments: Any) -> Any:
        found = whole(data, *arguments)
        if found.max() == WHITE - 1:
            raise MemoryError
        return found

    whole = image.decode
    monkeypatch.setattr(image, "decode", decode)
    assert inspect(tmp_path, {"a.png": 0, "b.png": WHITE - 1, "c.png": 100}, monkeypatch) == 1
    with (tmp_path / "result_vae.csv").open() as file:
        assert [row["filename"] for row in csv.DictReader(file)] == ["a.png", "c.png"]
    assert "b.png: not judged: memory was short" in capsys.readouterr().err


def test_a_model_that_has_no_number_for_any_picture_is_told_and_leaves_the_old_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "result_vae.csv").write_text("yesterday's")
    assert inspect(tmp_path, {"a.png": WHITE, "b.png": WHITE}, monkeypatch) == EXIT_CODE
    assert (tmp_path / "result_vae.csv").read_text() == "yesterday's"


def test_what_speaks_against_pictures_is_said_once_in_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "long").mkdir()
    for name, size in {"a": (SIDE, SIDE), "b": (5 * SIDE, SIDE), "c": (6 * SIDE, SIDE)}.items():
        Image.new("L", size, 90).save(tmp_path / "long" / f"{name}.png")
    assert run(tmp_path, tmp_path / "long", monkeypatch) == 0
    said = capsys.readouterr().err
    assert said.count("hint: ") == 1
    assert f"hint: 2 of 3 pictures, such as b.png: The picture is {5 * SIDE} x {SIDE}" in said
    assert "into tiles" in said
