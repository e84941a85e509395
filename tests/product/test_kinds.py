"""Every kind of model through every command, as SPEC.md writes them, and served over HTTP.

PatchCore's are in tests/product/test_commands.py.
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

import convtrt
from engines.image import load
from engines.meta import Meta
from engines.store.bundle import Bundle
from support.project import ROOT, run
from support.server import serving
from workers import models
from workers.learning.retrain import Retrain, retrain
from workers.progress import Progress
from workers.sample_parts.write_dataset import write_dataset

CATEGORY = "VisA_pipe_fryum"
DIRECTORIES = {"padim": "PaDiM", "efficientad": "EfficientAD", "vae": "VAE"}
SETTINGS: dict[str, dict[str, Any]] = {
    "padim": {"backbone": "resnet18", "layers": ["layer2", "layer3"], "n_features": 50},
    "efficientad": {"model_size": "small", "learning_rate": 3e-4},
    "vae": {"latent_dim": 64, "learning_rate": 1e-3},
}
LOAD = {"padim": " --load_stats models/PaDiM/stats.npz"}
STATS = {"padim": " --stats models/PaDiM/retrained/stats.npz"}
BATCH = {"efficientad": 1}


def retrain_command(kind: str) -> str:
    """As SPEC.md writes it."""
    at = f"models/{DIRECTORIES[kind]}"
    return (
        f"python3 retrain.py --model {kind} --pretrained_pth {at}/model.pth --meta_json"
        f" {at}/meta.json --category {CATEGORY} --data_root data --epochs 1"
        f" --batch {BATCH.get(kind, 4)} --out_dir {at}/retrained{LOAD.get(kind, '')}"
    )


def convert_command(kind: str) -> str:
    at = f"models/{DIRECTORIES[kind]}"
    return (
        f"python3 convtrt.py --model {kind} --weights_pth {at}/retrained/model.pth --meta_json"
        f" {at}/meta.json{STATS.get(kind, '')} --opset 17 --fp16 --workspace 4096"
        f" --out_dir {at}/engine"
    )


def inspect_command(kind: str) -> str:
    return (
        f"cd bin && ./{kind} -e ../models/{DIRECTORIES[kind]}/engine/model.plan"
        f" -d ../data/test/{CATEGORY}/anomaly -i 256 -t 100"
    )


@dataclass(frozen=True)
class Line:
    """A folder where the commands of one kind were run, and what they said."""

    kind: str
    root: Path
    said: dict[str, subprocess.CompletedProcess[str]]

    @property
    def seed(self) -> Path:
        return self.root / "models" / DIRECTORIES[self.kind]


def seed_layout(root: Path, data: Path) -> None:
    (root / "data").symlink_to(data)
    (root / "bin").mkdir()
    for name in ("retrain.py", "convtrt.py", *(f"bin/{kind}" for kind in DIRECTORIES)):
        (root / name).symlink_to(ROOT / name)


def seed_meta(kind: str, root: Path) -> Path:
    """The meta.json of a kind, as an engineer writes it before the first training."""
    path = root / "models" / DIRECTORIES[kind] / "meta.json"
    path.parent.mkdir(parents=True)
    about = {"image_size": 256, "weights_pth": "model.pth", "image_threshold": 0.5, "line": "A"}
    path.write_text(json.dumps({**SETTINGS[kind], **about}))
    return path


def first_training(kind: str, root: Path, weights: str = "untrained") -> None:
    """The seed of a kind: what a first training, with no model before, leaves."""
    meta = seed_meta(kind, root)
    first = Retrain(kind, CATEGORY, root / "data", meta.parent, meta, weights, batch=2)
    retrain(first, Progress())


def efficientad_that_knows(root: Path) -> None:
    """A seed that learned one step, and was not judged: that takes a minute of computing."""
    meta = Meta.read(seed_meta("efficientad", root))
    module = models.module("efficientad")
    model = module.build(meta, "untrained")
    train = sorted((root / "data" / "train" / CATEGORY).iterdir())
    pictures = np.stack([load_picture(path) for path in train])
    module.train(model, meta, [pictures], models.Training(1, 2), Progress())
    module.save(model, meta, root / "models" / DIRECTORIES["efficientad"])


@pytest.fixture(scope="module", params=DIRECTORIES)
def line(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Line:
    """SPEC's commands of one kind, in their order, on drawn parts."""
    root = tmp_path_factory.mktemp(request.param)
    is_slow = request.param == "efficientad"
    train, normal = (2, 1) if is_slow else (4, 3)
    parts = {"train": train, "normal": normal, "per_kind": 1}
    data = write_dataset(root / "parts", CATEGORY, size=256, seed=5, **parts)
    seed_layout(root, data)
    if is_slow:
        for defective in sorted((data / "test" / CATEGORY / "anomaly").iterdir())[2:]:
            defective.unlink()
        efficientad_that_knows(root)
    else:
        first_training(request.param, root)
    said = {
        name: run("bash", "-c", command(request.param), cwd=root)
        for name, command in (
            ("retrain", retrain_command),
            ("convert", convert_command),
            ("inspect", inspect_command),
        )
    }
    return Line(request.param, root, said)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_retraining_goes_on_from_the_model_and_writes_all_to_retrain_from(line: Line) -> None:
    meta = Meta.read(line.seed / "retrained" / "meta.json")
    report = json.loads((line.seed / "retrained" / "report.json").read_text())
    assert "before" in report
    assert meta.model == line.kind
    assert meta.score_kind is not None
    assert meta.score_kind.startswith(f"{line.kind}/")
    assert (meta.model_extra or {})["line"] == "A"  # unknown keys are kept
    assert {"model.pth", "golden.npz", "report.json"} <= set(meta.files or {})
    assert ("stats.npz" in (meta.files or {})) == (line.kind == "padim")
    first = Meta.read(line.seed / "meta.json")
    # The images are those of the first training: PaDiM knows them, the others go on learning.
    if first.image_threshold_auto is not None:
        is_known = meta.image_threshold_auto == pytest.approx(first.image_threshold_auto, rel=1e-4)
        assert is_known == (line.kind == "padim")
    assert report["images"]["known"] == (4 if line.kind == "padim" else 0)


def test_the_engine_serves_by_itself_with_no_weights_and_no_statistics_beside_it(
    line: Line, tmp_path: Path
) -> None:
    engine = tmp_path / "engine"
    shutil.copytree(line.seed / "engine", engine)
    for name in ("model.pth", "stats.npz"):
        (engine / name).unlink(missing_ok=True)
    bundle = Bundle.open(engine)
    assert bundle.memory_bank() is None
    agreement = bundle.report()["parity"]
    for way in ("onnx", "openvino_f32"):
        assert agreement[way]["max_relative"] <= 5e-3  # --fp16
        assert agreement[way]["flips"] == 0
    expected = rows(line.root / "bin" / f"result_{line.kind}.csv")
    folder = line.root / "data" / "test" / CATEGORY / "anomaly"
    patient = {"KENSA_DEADLINE_MS": "60000"}  # an EfficientAD takes its time
    with serving(tmp_path, KENSA_MODEL_DIR=str(engine), **patient) as server:
        assert server.client.get("/readyz").status_code == 200
        for row in expected:  # those of the command
            answer = server.infer((folder / row["filename"]).read_bytes()).json()
            assert answer["raw_score"] == pytest.approx(float(row["raw_score"]), abs=2e-6)
        picture = server.infer((folder / row["filename"]).read_bytes(), accept="image/png")
        assert picture.headers["content-type"] == "image/png"
        assert cv2.imdecode(np.frombuffer(picture.content, np.uint8), 1).shape[2] == 3
        models_seen = server.client.get("/healthz").json()
    assert f'"{line.kind}"' in json.dumps(models_seen)


def test_a_line_and_a_row_per_image(line: Line) -> None:
    found = rows(line.root / "bin" / f"result_{line.kind}.csv")
    pictures = sorted((line.root / "data" / "test" / CATEGORY / "anomaly").iterdir())
    assert [row["filename"] for row in found] == [path.name for path in pictures]
    assert {row["decision"] for row in found} <= {"Normal", "Anomaly"}
    for row in found:
        expected = f"{row['filename']}  {row['raw_score']}  {row['decision']}"
        assert expected in line.said["inspect"].stdout


@pytest.mark.parametrize(
    "line", ["padim", "vae", pytest.param("efficientad", marks=pytest.mark.soak)], indirect=True
)
def test_the_model_has_changed_and_scores_the_new_normals_lower(line: Line, tmp_path: Path) -> None:
    """Retraining in the older scripts changed nothing. New normals: parts on a dark belt."""
    new = tmp_path / "data" / "train" / "dark"
    new.mkdir(parents=True)
    for path in sorted((line.root / "data" / "train" / CATEGORY).iterdir()):
        cv2.imwrite(str(new / path.name), cv2.imread(str(path)) // 3)
    test = tmp_path / "data" / "test" / "dark" / "normal"
    shutil.copytree(new, test)
    learned = line.seed / "retrained"
    more = Retrain(
        line.kind, "dark", tmp_path / "data", tmp_path / "out", learned / "meta.json",
        str(learned / "model.pth"), epochs=6, batch=2,
        load_stats=learned / "stats.npz" if line.kind == "padim" else None,
    )  # fmt: skip
    retrain(more, Progress())
    pictures = np.stack([load_picture(path) for path in sorted(new.iterdir())])
    before, after = (raw_scores(line.kind, at, pictures) for at in (learned, tmp_path / "out"))
    assert after.mean() < before.mean()


def load_picture(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return load(path.read_bytes(), 256)


def raw_scores(kind: str, folder: Path, pictures: Any) -> Any:
    module, meta = models.module(kind), Meta.read(folder / "meta.json")
    model = module.build(meta, folder / meta.weights_pth)
    if module.LEARNED is not None:
        module.load(model, folder / getattr(meta, module.LEARNED))
    return module.scores(model, [pictures])


def test_a_meta_json_of_another_kind_is_refused(
    line: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = next(name for name in DIRECTORIES if name != line.kind)
    flags = {"weights_pth": line.seed / "model.pth", "meta_json": line.seed / "meta.json",
             "model": other, "out_dir": tmp_path / "o"}  # fmt: skip
    assert convtrt.main([f"--{name}={value}" for name, value in flags.items()]) == 2
    assert f"describes a {line.kind} model, but --model says {other}" in capsys.readouterr().err


Command = Callable[[str], str]


@pytest.mark.soak
@pytest.mark.parametrize("kind", DIRECTORIES)
def test_the_commands_run_on_real_photos(kind: str, assets: Path, tmp_path: Path) -> None:
    """The same on alien, with pretrained weights."""
    data = tmp_path / "photos"
    for part in ("train", "test"):
        (data / part).mkdir(parents=True)
        (data / part / CATEGORY).symlink_to(assets / "data" / part / "alien")
    seed_layout(tmp_path, data)
    weights = assets / "weights" / "resnet18.safetensors"
    first_training(kind, tmp_path, weights=str(weights) if kind == "padim" else "untrained")
    commands: tuple[Command, ...] = (retrain_command, convert_command, inspect_command)
    for command in commands:
        run("bash", "-c", command(kind), cwd=tmp_path)
    assert len(rows(tmp_path / "bin" / f"result_{kind}.csv")) == 60
