"""Claims about pictures that once went wrong: right, or refused in words, wherever they are given.

The files are not in this repository: a folder `cases` beside that of KENSA_ASSETS holds them.
"""

from __future__ import annotations

import base64
import csv
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.image import decode
from engines.inference_command import NOT_ALL_JUDGED
from support.project import ASSETS, ROOT, run
from support.server import Server, agreed, serving

CASES = ASSETS.parent / "cases" / "images"
# What is damaged, or says two things at once. Everything else is a whole picture.
REFUSED = {
    "bmp8_no_palette_at_all.bmp": "bad_image",
    "bmp8_clrused_1.bmp": "bad_image",
    "bmp8_offbits_zero.bmp": "bad_image",
    "bmp8_offbits_54_though_palette.bmp": "bad_image",
    "exif_duplicate_orientation_differs.jpg": "bad_image",
}
# Whose orientation cannot be read, so that the picture is as it is stored.
STORED = {
    "exif_empty_segment.jpg", "exif_empty_segment_zero.jpg", "exif_ifd_offset_beyond.jpg",
    "exif_ifd_offset_zero.jpg", "exif_no_magic.jpg", "exif_none.jpg", "exif_only_header.jpg",
}  # fmt: skip
VAE = {"latent_dim": 8, "image_size": 64, "learning_rate": 1e-3}

pytestmark = pytest.mark.skipif(
    not CASES.is_dir(), reason=f"no cases: beside KENSA_ASSETS there is no {CASES}"
)


def cases() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(CASES.iterdir())}


@pytest.fixture(scope="module")
def server(kensa_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = {"KENSA_MODEL_DIR": str(kensa_model), "KENSA_MODEL_NAME": "part"}
    with serving(tmp_path_factory.mktemp("server"), **settings) as running:
        yield running


def through_v2(server: Server, data: bytes) -> Any:
    given = {"name": "file", "datatype": "BYTES", "shape": [1]}
    body = {"inputs": [{**given, "data": [base64.b64encode(data).decode()]}]}
    return server.client.post("/v2/models/part/infer", json=body)


def test_pixels_are_those_of_the_file_that_is_right() -> None:
    found = {name: decode(data) for name, data in cases().items() if name not in REFUSED}
    palette = found["tiff_palette8_colormap_to_65535.tif"]
    assert np.array_equal(found["tiff_palette8_colormap_to_255.tif"], palette)
    assert np.ptp(found["bmp24_core_header.bmp"].astype(int), axis=2).max() > 50  # it has colours
    stored, upright = found["exif_none.jpg"], found["exif_plain6.jpg"]
    assert np.abs(np.rot90(stored, -1).astype(int) - upright).max() <= 2
    for name in found:
        if name.startswith("exif_"):
            assert np.array_equal(found[name], stored if name in STORED else upright), name


def test_infer_v2_and_datasets_agree_on_each(server: Server) -> None:
    for name, data in cases().items():
        infer, v2 = server.infer(data), through_v2(server, data)
        upload = server.client.post(f"/datasets/cases/train?name={name}", content=data)
        if name in REFUSED:
            assert (infer.status_code, agreed(infer)) == (400, REFUSED[name])
            assert (v2.status_code, infer.json()["error"] in v2.json()["error"]) == (400, True)
            assert upload.status_code == 400, name
            assert infer.json()["error"] in upload.text
        else:
            assert (infer.status_code, v2.status_code, upload.status_code) == (200, 200, 201), name
            scores = {one["name"]: one["data"] for one in v2.json()["outputs"]}
            assert scores["raw_score"] == [np.float32(infer.json()["raw_score"])]


def test_a_command_of_bin_judges_the_right_ones_and_names_the_others(
    server: Server, kensa_model: Path, tmp_path: Path
) -> None:
    flags = ["-e", kensa_model / "model.plan", "-m", kensa_model / "memory_bank.npz"]
    command = [ROOT / "bin" / "patchcore", *flags]
    done = run(*command, "-d", CASES, "-i", "256", "-t", "100", cwd=tmp_path, check=False)
    assert done.returncode == NOT_ALL_JUDGED, done.stderr
    with (tmp_path / "result_patchcore.csv").open() as file:
        judged = {row["filename"]: float(row["raw_score"]) for row in csv.DictReader(file)}
    for name, data in cases().items():
        infer = server.infer(data).json()
        if name in REFUSED:
            assert f"{name}: not judged: {infer['error']}" in done.stderr
        else:
            assert judged.pop(name) == pytest.approx(infer["raw_score"], rel=1e-3), name
    assert judged == {}
    assert "Traceback" not in done.stderr


def test_retrain_learns_from_the_right_ones_and_names_the_others(
    sample_data: Path, tmp_path: Path
) -> None:
    folder, meta, out = tmp_path / "train" / "cases", tmp_path / "meta.json", tmp_path / "out"
    shutil.copytree(CASES, folder)
    # So that no more than one in ten is refused.
    shutil.copytree(sample_data / "train" / "sample_bracket", folder / "good")
    shutil.copytree(sample_data / "test" / "sample_bracket" / "normal", folder / "ok")
    meta.write_text(json.dumps(VAE))
    done = run("retrain.py", "--model", "vae", "--meta_json", meta, "--category", "cases",
               "--data_root", tmp_path, "--epochs", "1", "--batch", "4",
               "--out_dir", out)  # fmt: skip
    said = done.stdout + done.stderr
    skipped = {Path(path).name for path in re.findall(r"skipped (\S+):", said)}
    assert skipped == {*REFUSED}
    assert "Traceback" not in said
