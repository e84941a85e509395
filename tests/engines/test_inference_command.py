"""Claims about the inference commands: what fails on one picture loses no other one."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

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
    bundle = tiny_bundle(folder / "model")
    (folder / "pictures").mkdir()
    for name, grey in pictures.items():
        Image.new("L", (SIDE, SIDE), grey).save(folder / "pictures" / name)
    monkeypatch.chdir(folder)
    flags = {"e": bundle / "model.onnx", "d": folder / "pictures", "i": SIDE, "t": 30}
    return main("vae", [word for flag, value in flags.items() for word in (f"-{flag}", str(value))])


def test_a_picture_for_which_there_is_no_number_is_named_and_the_others_are_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = {"a.png": 0, "b.png": WHITE, "c.png": 100}
    assert inspect(tmp_path, pictures, monkeypatch) == NOT_ALL_JUDGED
    with (tmp_path / "result_vae.csv").open() as file:
        assert [row["filename"] for row in csv.DictReader(file)] == ["a.png", "c.png"]
    assert "b.png: not judged: " in capsys.readouterr().err


def test_a_model_that_has_no_number_for_any_picture_is_told_and_leaves_the_old_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "result_vae.csv").write_text("yesterday's")
    assert inspect(tmp_path, {"a.png": WHITE, "b.png": WHITE}, monkeypatch) == EXIT_CODE
    assert (tmp_path / "result_vae.csv").read_text() == "yesterday's"
