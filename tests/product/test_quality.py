"""What must hold on real photos: it finds the defects, and every form of a model says the same."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.models.components.sampling import KCenterGreedy
from anomalib.models.image.patchcore.torch_model import PatchcoreModel
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

import retrain
from engines.image import files_in
from engines.meta import FIRST, Meta
from engines.runtimes.openvino import choose_precision
from engines.verdict import Scale, decide
from support.project import ROOT, run, write_meta
from workers.learning.dataset import Images
from workers.models import patchcore
from workers.models.backbone import IMAGENET_MEAN, IMAGENET_STD
from workers.models.coreset import k_centre_greedy
from workers.models.patchcore import PatchCore
from workers.progress import Progress
from workers.sample_parts.write_dataset import CATEGORY, write_dataset

Scores = NDArray[np.float32]

KNOWN = 30  # alien images of the first training; the other 10 come with an update


@dataclass(frozen=True)
class Alien:
    """The toy alien, learned from `KNOWN` images and converted by the commands."""

    data: Path
    retrained: Path
    engine: Path

    def torch_model(self) -> PatchCore:
        model = patchcore.build(self.meta(), self.retrained / "model.pth")
        patchcore.load(model, self.retrained / "memory_bank.npz")
        return model

    def meta(self) -> Meta:
        return Meta.read(self.retrained / "meta.json")

    def test_images(self, group: str) -> list[Path]:
        return files_in(self.data / "test" / "alien" / group)


def report_of(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


def pictures(paths: list[Path], meta: Meta) -> NDArray[np.uint8]:
    """(n, 256, 256, 3) uint8 RGB, as the model sees them."""
    return np.concatenate(list(Images(paths, meta, 8, Progress(quiet=True))))


def learn(
    out_dir: Path, data: Path, category: str, weights: Path | None, meta: Path, *more: str
) -> Path:
    flags = ["--model", "patchcore", "--meta_json", meta, "--category", category, "--data_root",
             data, "--out_dir", out_dir, *more]  # fmt: skip
    if weights is not None:
        flags += ["--pretrained_pth", weights]
    assert retrain.main([str(word) for word in flags]) == 0
    return out_dir


def share(root: Path, data: Path, images: list[Path]) -> Path:
    """A data root with some of the training images and all test images."""
    (root / "train" / "alien").mkdir(parents=True)
    for path in images:
        (root / "train" / "alien" / path.name).symlink_to(path)
    (root / "test").symlink_to(data / "test")
    return root


@pytest.fixture(scope="module")
def resnet18(assets: Path) -> Path:
    return assets / "weights" / "resnet18.safetensors"


@pytest.fixture(scope="module")
def alien(assets: Path, resnet18: Path, tmp_path_factory: pytest.TempPathFactory) -> Alien:
    root = tmp_path_factory.mktemp("alien")
    data, retrained, engine = assets / "data", root / "retrained", root / "engine"
    some = share(root / "some", data, files_in(data / "train" / "alien")[:KNOWN])
    learn(retrained, some, "alien", resnet18, write_meta(root / "meta.json"))
    run("convtrt.py", "--model", "patchcore", "--weights_pth", retrained / "model.pth",
        "--meta_json", retrained / "meta.json", "--out_dir", engine)  # fmt: skip
    return Alien(data, retrained, engine)


@pytest.fixture(scope="module")
def tables(alien: Alien, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """Group -> file name -> raw score, as bin/patchcore's CSV has it."""
    found = {}
    threshold = Scale.of(alien.meta()).raw_threshold
    for group in ("normal", "anomaly"):
        folder = tmp_path_factory.mktemp(group)
        run(ROOT / "bin/patchcore", "-e", alien.engine / "model.plan", "-m",
            alien.engine / "memory_bank.npz", "-d", alien.data / "test/alien" / group,
            "-i", "256", "-t", str(threshold), cwd=folder)  # fmt: skip
        with (folder / "result_patchcore.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        found[group] = {row["filename"]: float(row["raw_score"]) for row in rows}
        for row in rows:
            assert row["decision"] == decide(float(row["raw_score"]), threshold)
    return found


def auroc(normal: list[float], defective: list[float]) -> float:
    truth = [0] * len(normal) + [1] * len(defective)
    return float(roc_auc_score(truth, [*normal, *defective]))


# ---- accuracy ---------------------------------------------------------------------------------


def test_alien_is_told_apart_by_the_torch_model(alien: Alien) -> None:
    found = report_of(alien.retrained)["calibration"]
    assert (found["normals"], found["defects"]) == (KNOWN + 18, 60)
    assert found["auroc"] >= 0.98  # normals that were left out score as those of the test do


def test_alien_is_told_apart_by_the_inspection_command(tables: dict[str, dict[str, float]]) -> None:
    normal, defective = list(tables["normal"].values()), list(tables["anomaly"].values())
    assert (len(normal), len(defective)) == (18, 60)
    assert auroc(normal, defective) >= 0.99


def test_hazelnuts_are_told_apart_without_a_fault(
    assets: Path, resnet18: Path, tmp_path: Path
) -> None:
    meta = write_meta(tmp_path / "meta.json")
    out_dir = learn(tmp_path / "out", assets / "data", "hazelnut_toy", resnet18, meta)
    assert report_of(out_dir)["calibration"]["auroc"] == 1.0


def ranks(out_dir: Path, data: Path, category: str, weights: Path | None, **meta: Any) -> float:
    """The AUROC of a model that learns a category."""
    written = write_meta(out_dir.with_suffix(".json"), **meta)
    report = report_of(learn(out_dir, data, category, weights, written))
    return float(report["calibration"]["auroc"])


def test_the_first_model_tells_alien_apart(assets: Path, tmp_path: Path) -> None:
    assert ranks(tmp_path / "first", assets / "data", "alien", None, **FIRST) >= 0.99


@pytest.mark.soak
@pytest.mark.parametrize("category", ["alien", "hazelnut_toy", CATEGORY])
def test_the_first_model_ranks_as_resnet18_does(
    assets: Path, resnet18: Path, tmp_path: Path, category: str
) -> None:
    roots = [assets / "data"]
    if category == CATEGORY:
        roots = [
            write_dataset(tmp_path / f"data_{seed}", train=24, normal=40, per_kind=10, seed=seed)
            for seed in range(5)
        ]
    first, other = [], []
    for number, root in enumerate(roots):
        first.append(ranks(tmp_path / f"first_{number}", root, category, None, **FIRST))
        other.append(ranks(tmp_path / f"other_{number}", root, category, resnet18))
    print(f"{category}: {np.mean(first):.4f}, resnet18 {np.mean(other):.4f}")
    assert np.mean(first) >= np.mean(other) - 0.01


@pytest.mark.soak
def test_a_backbone_that_is_no_resnet_tells_alien_apart(assets: Path, tmp_path: Path) -> None:
    weights = assets / "weights" / "mobilenetv2_100.safetensors"
    changes: dict[str, Any] = {"backbone": "mobilenetv2_100", "layers": ["blocks.2", "blocks.4"]}
    meta = write_meta(tmp_path / "meta.json", **changes)
    out_dir = learn(tmp_path / "out", assets / "data", "alien", weights, meta)
    assert report_of(out_dir)["calibration"]["auroc"] >= 0.99


# ---- agreement --------------------------------------------------------------------------------


def test_the_exported_graph_scores_as_the_torch_model(alien: Alien) -> None:
    parity = report_of(alien.engine)["parity"]
    for way in ("onnx", "openvino_f32"):
        assert parity[way]["max_relative"] <= 1e-3
        assert parity[way]["flips"] == 0
    assert choose_precision(report_of(alien.engine)) == "f32"  # the bank is searched in float32
    assert report_of(alien.engine)["parity_images"].startswith("16 of its own")


@pytest.fixture(scope="module")
def both(alien: Alien, tables: dict[str, dict[str, float]]) -> tuple[Scores, Scores]:
    """Raw scores of all test images: of the torch model, and of bin/patchcore."""
    paths = {group: alien.test_images(group) for group in ("normal", "anomaly")}
    everything = [*paths["normal"], *paths["anomaly"]]
    found = [tables[group][path.name] for group, found in paths.items() for path in found]
    expected = patchcore.scores(alien.torch_model(), [pictures(everything, alien.meta())])
    return expected, np.array(found, np.float32)


def test_no_verdict_flips_between_torch_and_the_inspection_command(
    alien: Alien, both: tuple[Scores, Scores]
) -> None:
    threshold = Scale.of(alien.meta()).raw_threshold
    expected, found = both
    assert len(found) == 78
    assert ((found > threshold) == (expected > threshold)).all()


def test_every_photo_scores_within_the_limit_of_the_torch_model(
    alien: Alien, both: tuple[Scores, Scores]
) -> None:
    expected, found = both
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_scores_are_those_of_anomalibs_model_with_the_same_bank(alien: Alien) -> None:
    model = alien.torch_model()
    assert model.bank is not None
    theirs = PatchcoreModel(layers=model.layers, backbone="resnet18", pre_trained=False)
    theirs.feature_extractor.load_state_dict(model.features.state_dict())
    theirs.memory_bank = model.bank.embeddings
    images = pictures(
        [*alien.test_images("normal")[:6], *alien.test_images("anomaly")[:12]], alien.meta()
    )
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.inference_mode():
        expected = theirs.eval()((pixels - mean) / std).pred_score.numpy()
    np.testing.assert_allclose(patchcore.scores(model, [images]), expected, rtol=1e-3)


def test_the_coreset_covers_as_well_as_anomalibs(alien: Alien) -> None:
    model = alien.torch_model()
    images = pictures(files_in(alien.data / "train" / "alien")[:8], alien.meta())
    with torch.inference_mode():
        patches = model.embed(torch.from_numpy(images))[0].flatten(0, 1)
    torch.manual_seed(0)  # theirs begins at a random patch
    bank = KCenterGreedy(patches, 0.1).sample_coreset()
    chosen, radius, _ = k_centre_greedy(patches, int(len(patches) * 0.1))
    assert len(chosen) == len(bank)
    assert radius == pytest.approx(reach(patches, patches[chosen]), rel=1e-3)
    assert radius <= 1.02 * reach(patches, bank)


def reach(patches: torch.Tensor, bank: torch.Tensor) -> float:
    """The largest distance of any patch to the bank, feature units."""
    return max(
        float(torch.cdist(some.double(), bank.double()).amin(1).max())
        for some in patches.split(999)
    )


# ---- learning more ----------------------------------------------------------------------------


def test_an_update_keeps_all_normals_it_knew_and_finds_the_defects(
    alien: Alien, tmp_path: Path
) -> None:
    images, old = files_in(alien.data / "train" / "alien"), alien.retrained
    second = share(tmp_path / "second", alien.data, images[KNOWN:])
    assert len(images) == KNOWN + 10
    new = learn(tmp_path / "new", second, "alien", old / "model.pth", old / "meta.json",
                "--load_bank", str(old / "memory_bank.npz"))  # fmt: skip
    report = report_of(new)
    assert report["images"]["learned"] == 10
    assert report["memory_bank"]["rows"] > report["before"]["memory_bank"]["rows"]
    assert report["calibration"]["auroc"] >= 0.99
    updated = Alien(alien.data, new, new)
    scores = patchcore.scores(updated.torch_model(), [pictures(images[:KNOWN], updated.meta())])
    assert (scores <= Scale.of(updated.meta()).raw_threshold).all()
