"""What anomalib has trained becomes a Kensa model with the same scores and the same verdicts."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.models import Dfm, EfficientAd, Padim, Patchcore
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Trainer, seed_everything
from numpy.typing import NDArray
from torchvision.transforms import v2

import import_anomalib as command
from engines.errors import BadBundle, BadDataset, BadMeta, BadWeights
from engines.files import sha256
from engines.meta import Meta
from engines.runtimes.openvino import OpenVINORuntime
from engines.runtimes.parity import FLOAT32_LIMIT
from engines.store.bundle import Bundle
from engines.verdict import Scale, judge
from support.project import ROOT
from workers import models
from workers.converting.convert import Convert, convert
from workers.importing import import_anomalib as worker
from workers.importing.import_anomalib import Import, import_anomalib
from workers.models import Training
from workers.progress import Progress
from workers.sample_parts.drawing import draw_part

QUIET = Progress(quiet=True)
KINDS = ("patchcore", "padim", "efficientad")
SIZES = {"patchcore": 64, "padim": 64, "efficientad": 256}  # pixels; 256 is the least of the last
CLASSES = {"patchcore": Patchcore, "padim": Padim, "efficientad": EfficientAd}
LAYERS = ["layer1", "layer2"]
CALM = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}

Pictures = NDArray[np.uint8]


@dataclass(frozen=True)
class Taken:
    """A checkpoint, what Kensa made of it, and anomalib's own reading of it."""

    checkpoint: Path
    folder: Path
    theirs: Any  # anomalib's Lightning module, loaded from the checkpoint
    pictures: Pictures  # (n, S, S, 3) uint8 RGB that neither has seen
    expected: NDArray[np.float32]  # anomalib's raw scores of them, (n,)

    @property
    def meta(self) -> Meta:
        return Meta.read(self.folder / "meta.json")

    def ours(self) -> Any:
        """The torch model that convtrt.py would build."""
        kind = models.module(self.meta.model)
        model = kind.build(self.meta, self.folder / self.meta.weights_pth)
        if kind.LEARNED is not None:
            kind.load(model, self.folder / getattr(self.meta, kind.LEARNED))
        return model


def parts(*seeds: int, size: int, defect: str | None = None) -> Pictures:
    """Drawn parts (n, size, size, 3) uint8 RGB."""
    drawn = [draw_part(seed, defect, 256)[0] for seed in seeds]
    return np.stack([cv2.resize(one, (size, size), interpolation=cv2.INTER_AREA) for one in drawn])


def pixels_of(pictures: Pictures) -> torch.Tensor:
    """As anomalib reads files: (N, 3, S, S) float32 in [0, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


def write_pictures(folder: Path, pictures: Pictures) -> Path:
    folder.mkdir(parents=True)
    for index, picture in enumerate(pictures):
        cv2.imwrite(str(folder / f"{index}.png"), picture[..., ::-1])
    return folder


def new_module(kind: str, **changes: Any) -> Any:
    """anomalib's module with an untrained network; its pre-processor for small images."""
    size = SIZES[kind]
    seed_everything(3, verbose=False)  # a coreset is begun by chance, by numpy's
    arguments: dict[str, Any] = {
        "pre_processor": CLASSES[kind].configure_pre_processor((size, size))
    }
    if kind != "efficientad":
        arguments |= {"backbone": "resnet18", "layers": LAYERS, "pre_trained": False}
    if kind == "padim":
        arguments["n_features"] = 24
    return CLASSES[kind](**{**arguments, **changes})


def write_checkpoint(module: Any, path: Path) -> Path:
    """By Lightning's own trainer, as it writes all checkpoints."""
    trainer = Trainer(accelerator="cpu", **CALM)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)
    return path


def train(kind: str, folder: Path, **changes: Any) -> Path:
    """Fit and validate with anomalib's Engine, on drawn parts in files; returns the checkpoint."""
    size, few = SIZES[kind], kind == "efficientad"
    normal = parts(*range(2 if few else 8), size=size)
    write_pictures(folder / "data" / "good", normal)
    write_pictures(folder / "data" / "test", parts(*range(20, 22 if few else 26), size=size))
    write_pictures(folder / "data" / "bad", parts(30, 31, size=size, defect="stain")[:: 1 + few])
    data = Folder(
        "parts", root=folder / "data", normal_dir="good", normal_test_dir="test",
        abnormal_dir="bad", train_batch_size=1 if few else 8, eval_batch_size=8, num_workers=0,
        val_split_mode="same_as_test",
    )  # fmt: skip
    module = new_module(kind, **changes)
    engine = Engine(accelerator="cpu", default_root_dir=folder, logger=False)
    if few:  # its training wants a teacher and photos from the network
        networks = module.model
        with torch.inference_mode():
            taught = networks.teacher(pixels_of(normal))
        networks.mean_std["mean"].data.copy_(taught.mean(dim=(0, 2, 3), keepdim=True))
        networks.mean_std["std"].data.copy_(taught.std(dim=(0, 2, 3), keepdim=True))
        engine.validate(model=module, datamodule=data)
        engine.trainer.save_checkpoint(folder / "model.ckpt")
    else:
        engine.fit(model=module, datamodule=data)
        shutil.copy(engine.trainer.checkpoint_callback.best_model_path, folder / "model.ckpt")
    return folder / "model.ckpt"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def checkpoint(kind: str) -> Path:
        if kind not in made:
            made[kind] = train(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return checkpoint


@pytest.fixture(scope="module", params=KINDS)
def taken(
    request: pytest.FixtureRequest,
    checkpoints: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Taken:
    kind = request.param
    checkpoint, folder = checkpoints(kind), tmp_path_factory.mktemp("kensa") / kind
    import_anomalib(Import(checkpoint, folder), QUIET)
    extra = {} if kind == "efficientad" else {"pre_trained": False}
    theirs = CLASSES[kind].load_from_checkpoint(checkpoint, map_location="cpu", **extra).eval()
    size = SIZES[kind]
    dark = parts(44, size=size) // 2
    defective = parts(42, 43, size=size, defect="missing_hole")
    pictures = np.concatenate([parts(40, size=size), defective, dark])
    with torch.inference_mode():
        expected = theirs.model(theirs.pre_processor(pixels_of(pictures))).pred_score.reshape(-1)
    return Taken(checkpoint, folder, theirs, pictures, expected.numpy())


@pytest.fixture
def patchcore(checkpoints: Callable[[str], Path]) -> Path:
    return checkpoints("patchcore")


def with_changes(checkpoint: Path, path: Path, change: Callable[[Any], Any]) -> Path:
    """A copy of a checkpoint with something changed in it."""
    content = torch.load(checkpoint, weights_only=False)
    change(content)
    torch.save(content, path)
    return path


# ---- what is taken over ----------------------------------------------------------------------


def test_scores_are_those_that_anomalib_gives_from_its_own_checkpoint(taken: Taken) -> None:
    kind = models.module(taken.meta.model)
    found = kind.scores(taken.ours(), [taken.pictures])
    np.testing.assert_allclose(found, taken.expected, rtol=FLOAT32_LIMIT)
    assert len(np.unique(taken.expected)) == len(taken.pictures)


@pytest.mark.parametrize(
    "taken",
    [pytest.param(kind, marks=pytest.mark.soak if kind == "efficientad" else ()) for kind in KINDS],
    indirect=True,
)
def test_the_converted_graph_gives_them_too(taken: Taken, tmp_path: Path) -> None:
    report = convert(
        Convert(taken.meta.model, taken.folder / "model.pth", taken.folder / "meta.json", tmp_path),
        QUIET,
    )
    assert report["imported"]["file"] == "model.ckpt"
    bundle = Bundle.open(tmp_path)
    runtime = OpenVINORuntime(bundle.onnx, bundle.memory_bank())
    found = np.concatenate([runtime.infer(one[None])[0] for one in taken.pictures])
    runtime.close()
    np.testing.assert_allclose(found, taken.expected, rtol=FLOAT32_LIMIT)


def test_threshold_and_range_are_those_of_anomalibs_post_processor(taken: Taken) -> None:
    post = taken.theirs.post_processor
    assert taken.meta.image_threshold_auto == float(post.image_threshold)
    assert taken.meta.raw_image_min == float(post.image_min)
    assert taken.meta.raw_image_max == float(post.image_max)
    assert taken.meta.image_threshold == 0.5
    assert post.image_min < post.image_threshold <= post.image_max


def test_verdicts_and_normalised_scores_are_anomalibs(taken: Taken) -> None:
    scale = Scale.of(taken.meta)
    with torch.inference_mode():
        theirs = taken.theirs(pixels_of(taken.pictures))
    labels = theirs.pred_label.reshape(-1).tolist()
    verdicts = [judge(float(raw), scale) for raw in taken.expected]
    assert [verdict.is_anomalous for verdict in verdicts] == labels
    np.testing.assert_allclose(
        [verdict.score for verdict in verdicts], theirs.pred_score.reshape(-1), atol=1e-5
    )


@pytest.mark.parametrize("sensitivity", [0.2, 0.5, 0.7, 1.0])
def test_every_raw_score_gets_anomalibs_verdict_at_any_sensitivity(
    patchcore: Path, tmp_path: Path, sensitivity: float
) -> None:
    def change(content: Any) -> None:
        content["anomalib_post_processor_config"]["image_sensitivity"] = sensitivity

    changed = with_changes(patchcore, tmp_path / "model.ckpt", change)
    import_anomalib(Import(changed, tmp_path / "out"), QUIET)
    meta = Meta.read(tmp_path / "out" / "meta.json")
    assert meta.image_threshold == pytest.approx(1 - sensitivity)
    theirs = Patchcore.load_from_checkpoint(changed, map_location="cpu").post_processor
    assert theirs.image_sensitivity == sensitivity
    scale = Scale.of(meta)
    raw = np.linspace(0.5 * scale.raw_min, 2 * scale.raw_max, 999, dtype=np.float32)
    scores = theirs._normalize(
        torch.from_numpy(raw), theirs.image_min, theirs.image_max, theirs.image_threshold
    )
    labels = theirs._apply_threshold(scores, theirs.normalized_image_threshold)
    ours = [judge(float(score), scale) for score in raw]
    assert [verdict.is_anomalous for verdict in ours] == labels.tolist()
    np.testing.assert_allclose([verdict.score for verdict in ours], scores, atol=1e-5)


def test_the_folder_is_what_retrain_would_have_left(taken: Taken) -> None:
    learned = {"patchcore": ["memory_bank.npz"], "padim": ["stats.npz"]}
    names = {"model.pth", "report.json", *learned.get(taken.meta.model, [])}
    assert {path.name for path in taken.folder.iterdir()} == names | {"meta.json"}
    assert taken.meta.files == {name: sha256(taken.folder / name) for name in names}
    assert taken.meta.score_kind == models.module(taken.meta.model).SCORE_KIND
    assert taken.meta.image_size == SIZES[taken.meta.model]
    report = json.loads((taken.folder / "report.json").read_text())
    assert report["imported"]["file"] == "model.ckpt"
    assert report["imported"]["sha256"] == sha256(taken.checkpoint)
    assert any("resizes (bilinear)" in note for note in report["imported"]["notes"])


def test_hyper_parameters_come_from_the_checkpoint(taken: Taken) -> None:
    expected: dict[str, dict[str, Any]] = {
        "patchcore": {"backbone": "resnet18", "layers": LAYERS, "coreset_ratio": 0.1},
        "padim": {"backbone": "resnet18", "layers": LAYERS, "n_features": 24},
        "efficientad": {"model_size": "small", "learning_rate": 1e-4},
    }
    for key, value in expected[taken.meta.model].items():
        assert getattr(taken.meta, key) == value


def test_images_give_golden_ones_none_of_which_lies_on_the_threshold(
    patchcore: Path, tmp_path: Path
) -> None:
    # The very files of the validation: one of them is the score that anomalib's threshold is.
    images = tmp_path / "images"
    for name in ("test", "bad"):
        for path in (patchcore.parent / "data" / name).iterdir():
            images.mkdir(exist_ok=True)
            shutil.copy(path, images / f"{name}_{path.name}")
    report = import_anomalib(Import(patchcore, tmp_path / "out", images=images), QUIET)
    meta, kind = Meta.read(tmp_path / "out" / "meta.json"), models.module("patchcore")
    golden = np.load(tmp_path / "out" / "golden.npz")["images"]
    assert 0 < len(golden) == report["golden_images"] < len(list(images.iterdir()))
    model = kind.build(meta, tmp_path / "out" / "model.pth")
    kind.load(model, tmp_path / "out" / "memory_bank.npz")
    scores = kind.scores(model, [golden])
    assert (np.abs(scores / meta.image_threshold_auto - 1) > FLOAT32_LIMIT / 2).all()
    assert meta.bit_depth == 8


def test_an_imported_bank_grows_and_imported_statistics_say_why_they_cannot(
    taken: Taken,
) -> None:
    kind, model = models.module(taken.meta.model), taken.ours()
    if taken.meta.model == "patchcore":
        before = len(model.bank.embeddings)
        kind.update(model, taken.meta, [taken.pictures[-1:]], Training(), QUIET)
        assert len(model.bank.embeddings) > before
        assert model.bank.coverage_radius > 0
    elif taken.meta.model == "padim":
        with pytest.raises(BadBundle, match="of how many images"):
            kind.update(model, taken.meta, [taken.pictures], Training(), QUIET)


def test_channels_of_padim_may_come_in_any_order(
    checkpoints: Callable[[str], Path], taken: Taken
) -> None:
    if taken.meta.model == "padim":
        index = taken.theirs.model.idx
        assert (index.diff() < 0).any()  # so the test of the scores was one of the order, too
        assert taken.ours().index.tolist() == sorted(index.tolist())


# ---- what must be asked for ------------------------------------------------------------------


def strip(*keys: str) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        for key in keys:
            content["hyper_parameters"].pop(key)

    return change


def forget_preparation(content: Any) -> None:
    del content["anomalib_pre_processor_config"]


@pytest.mark.parametrize(
    ("change", "flag", "given"),
    [
        (strip("backbone"), "--backbone", {"backbone": "resnet18"}),
        (strip("layers"), "--layers", {"layers": LAYERS}),
        (forget_preparation, "--image_size", {"image_size": 64}),
    ],
)
def test_what_the_checkpoint_does_not_say_is_asked_for_by_its_flag(
    patchcore: Path, tmp_path: Path, change: Callable[[Any], None], flag: str, given: Any
) -> None:
    changed = with_changes(patchcore, tmp_path / "model.ckpt", change)
    with pytest.raises(BadWeights, match=rf"does not say its .*: pass {flag}\."):
        import_anomalib(Import(changed, tmp_path / "out"), QUIET)
    assert not (tmp_path / "out").exists()
    import_anomalib(Import(changed, tmp_path / "out", **given), QUIET)
    whole = tmp_path / "whole"
    import_anomalib(Import(patchcore, whole), QUIET)
    assert sha256(whole / "memory_bank.npz") == sha256(tmp_path / "out" / "memory_bank.npz")
    other = {"backbone": "resnet34", "layers": ["layer3"], "image_size": 128}
    key = next(iter(given))
    with pytest.raises(BadWeights, match=rf"omit {flag}\."):
        import_anomalib(Import(patchcore, tmp_path / "no", **{key: other[key]}), QUIET)


def test_a_flag_that_does_not_fit_what_was_learned_is_refused(
    patchcore: Path, tmp_path: Path
) -> None:
    changed = with_changes(patchcore, tmp_path / "model.ckpt", strip("layers"))
    with pytest.raises(BadWeights, match=r"does not fit resnet18 with layers layer2"):
        import_anomalib(Import(changed, tmp_path / "out", layers=["layer2"]), QUIET)
    assert not (tmp_path / "out").exists()


def older(**components: Any) -> Callable[[Any], None]:
    """As anomalib 2.1 to 2.6 write it: its components stand, as objects, in the arguments."""

    def change(content: Any) -> None:
        for key in [key for key in content if key.startswith("anomalib_")]:
            del content[key]
        content["hyper_parameters"] |= components

    return change


def test_a_checkpoint_of_an_older_anomalib_with_its_default_components_says_all(
    patchcore: Path, tmp_path: Path
) -> None:
    changed = with_changes(
        patchcore, tmp_path / "model.ckpt", older(pre_processor=True, post_processor=True)
    )
    report = import_anomalib(Import(changed, tmp_path / "out"), QUIET)
    assert report["meta"]["image_size"] == 256
    assert len(report["imported"]["notes"]) == 1  # how anomalib resizes


def test_objects_in_an_older_checkpoint_are_not_made_so_what_they_say_is_asked_for(
    patchcore: Path, tmp_path: Path
) -> None:
    objects = {
        "pre_processor": Patchcore.configure_pre_processor((64, 64)),
        "post_processor": PostProcessor(image_sensitivity=0.3),
    }
    changed = with_changes(patchcore, tmp_path / "model.ckpt", older(**objects))
    with pytest.raises(BadWeights, match="pass --image_size"):
        import_anomalib(Import(changed, tmp_path / "out"), QUIET)
    report = import_anomalib(Import(changed, tmp_path / "out", image_size=64), QUIET)
    notes = " ".join(report["imported"]["notes"])
    assert "does not say how images are prepared" in notes
    assert "does not say its image_sensitivity: taken as 0.5" in notes


def test_a_checkpoint_that_was_never_validated_wants_images_for_its_threshold(
    patchcore: Path, tmp_path: Path
) -> None:
    def forget(content: Any) -> None:
        for name in ("_image_threshold", "_pixel_threshold", "image_min", "image_max"):
            content["state_dict"][f"post_processor.{name}"].fill_(torch.nan)

    changed = with_changes(patchcore, tmp_path / "model.ckpt", forget)
    with pytest.raises(BadWeights, match=r"saved before a validation.*--images"):
        import_anomalib(Import(changed, tmp_path / "out"), QUIET)
    images = write_pictures(tmp_path / "images", parts(*range(50, 58), size=64))
    report = import_anomalib(Import(changed, tmp_path / "out", images=images), QUIET)
    assert report["calibration"]["method"] == "test"
    assert Scale.of(Meta.read(tmp_path / "out" / "meta.json")).threshold == 0.5


# ---- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("transforms", "says"),
    [
        ([v2.Resize((64, 64)), v2.CenterCrop(56)], r"CenterCrop\(size="),
        ([v2.Resize((64, 96))], r"Resize\(size=\[64, 96\]\)"),
        ([v2.Resize(64)], r"Resize\(size="),
        ([v2.Resize((64, 64)), v2.Normalize([0.5] * 3, [0.5] * 3)], r"Normalize\(mean=\[0\.5"),
        ([v2.Resize((64, 64))], "does not normalise"),
        ([v2.Grayscale(3)], "Grayscale"),
        (None, "pre_processor=False"),
    ],
)
def test_images_that_anomalib_prepares_otherwise_are_refused(
    tmp_path: Path, transforms: list[Any] | None, says: str
) -> None:
    how = False if transforms is None else PreProcessor(v2.Compose(transforms))
    path = write_checkpoint(new_module("patchcore", pre_processor=how), tmp_path / "model.ckpt")
    with pytest.raises(BadWeights, match=says):
        import_anomalib(Import(path, tmp_path / "out", image_size=64), QUIET)


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("patchcore", {"num_neighbors": 3}, "num_neighbors=3"),
        ("efficientad", {"padding": True}, "padding=True"),
        ("efficientad", {"pad_maps": False}, "pad_maps=False"),
    ],
)
def test_models_that_score_otherwise_than_ours_are_refused(
    tmp_path: Path, kind: str, changes: dict[str, Any], says: str
) -> None:
    path = write_checkpoint(new_module(kind, **changes), tmp_path / "model.ckpt")
    with pytest.raises(BadWeights, match=says):
        import_anomalib(Import(path, tmp_path / "out"), QUIET)


@pytest.mark.parametrize("kind", KINDS)
def test_an_untrained_model_is_refused(tmp_path: Path, kind: str) -> None:
    path = write_checkpoint(new_module(kind), tmp_path / "model.ckpt")
    with pytest.raises(BadWeights, match="has learned nothing yet"):
        import_anomalib(Import(path, tmp_path / "out"), QUIET)
    assert not (tmp_path / "out").exists()


def test_a_sensitivity_that_calls_nothing_anomalous_is_refused(
    patchcore: Path, tmp_path: Path
) -> None:
    def change(content: Any) -> None:
        content["anomalib_post_processor_config"]["image_sensitivity"] = 0.0

    changed = with_changes(patchcore, tmp_path / "model.ckpt", change)
    with pytest.raises(BadMeta, match=r"image_sensitivity 0\.0"):
        import_anomalib(Import(changed, tmp_path / "out"), QUIET)


def test_another_model_ends_the_command_with_2_and_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = Dfm(backbone="resnet18", layer="layer3", pre_trained=False)
    path = write_checkpoint(module, tmp_path / "model.ckpt")
    assert run_command(path, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "is a Dfm model" in said
    assert not (tmp_path / "out").exists()


def test_another_kind_than_the_flag_says_is_refused(patchcore: Path, tmp_path: Path) -> None:
    with pytest.raises(BadWeights, match="is a patchcore model, but --model says padim"):
        import_anomalib(Import(patchcore, tmp_path / "out", model="padim"), QUIET)


def test_a_damaged_file_and_one_of_something_else_are_refused_by_name(
    patchcore: Path, tmp_path: Path
) -> None:
    path, whole = tmp_path / "model.ckpt", patchcore.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:20], b"", b"not a checkpoint at all"):
        path.write_bytes(damaged)
        with pytest.raises(BadWeights, match=r"model\.ckpt"):
            import_anomalib(Import(path, tmp_path / "out"), QUIET)
    torch.save({"weight": torch.ones(3)}, path)
    with pytest.raises(BadWeights, match="is no Lightning checkpoint"):
        import_anomalib(Import(path, tmp_path / "out"), QUIET)
    path.unlink()
    with pytest.raises(BadWeights, match="does not exist"):
        import_anomalib(Import(path, tmp_path / "out"), QUIET)
    assert not (tmp_path / "out").exists()


class Code:
    """Unpickles as a call, as an attacker writes it."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize("hidden", [False, True], ids=["system", "mkdir"])
def test_code_in_a_checkpoint_is_never_run(patchcore: Path, tmp_path: Path, hidden: bool) -> None:
    marker = tmp_path / "it_ran"
    attack = Code(Path.mkdir, marker) if hidden else Code(os.system, f"touch {marker}")

    def change(content: Any) -> None:
        content["hyper_parameters"]["root"] = attack

    content = torch.load(patchcore, weights_only=False)
    change(content)
    path = tmp_path / "model.ckpt"
    torch.save(content, path, pickle_protocol=4)
    with contextlib.suppress(BadWeights):
        import_anomalib(Import(path, tmp_path / "out"), QUIET)
    assert not marker.exists()
    torch.load(path, weights_only=False)  # the proof that it is an attack
    assert marker.exists()


def test_golden_images_of_another_model_are_not_left_beside_it(
    patchcore: Path, tmp_path: Path
) -> None:
    (tmp_path / "golden.npz").write_bytes(b"")
    with pytest.raises(BadDataset, match="is of another model"):
        import_anomalib(Import(patchcore, tmp_path), QUIET)
    with pytest.raises(BadDataset, match="holds no images"):
        import_anomalib(Import(patchcore, tmp_path, images=tmp_path / "none"), QUIET)


# ---- the command -----------------------------------------------------------------------------


def run_command(checkpoint: Path, out_dir: Path, *more: str) -> int:
    return command.main(["--checkpoint", str(checkpoint), "--out_dir", str(out_dir), *more])


def test_the_command_says_what_it_did_and_what_is_not_the_same(
    patchcore: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(patchcore, tmp_path / "out", "--model", "patchcore") == 0
    said = capsys.readouterr().out
    assert "patchcore, resnet18 layer1,layer2, 64 px, from model.ckpt" in said
    assert "the checkpoint's own" in said
    assert "bf16 stays off" in said
    assert "those of files of another size differ a little" in said.replace("\n", " ")


def tree(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def kept(patchcore: Path, tmp_path: Path) -> Iterator[Path]:
    """A folder with a model in it; the test must leave it as it is, and nothing beside it."""
    out = tmp_path / "models" / "out"
    import_anomalib(Import(patchcore, out), QUIET)
    before = tree(out)
    yield out
    assert tree(out) == before


def test_ctrl_c_leaves_what_was_there(
    patchcore: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(worker, "write_report", stop)
    assert run_command(patchcore, kept) == 130
    assert [path.name for path in kept.parent.iterdir()] == ["out"]


def test_a_kill_leaves_what_was_there_and_the_next_import_clears_up(
    patchcore: Path, kept: Path
) -> None:
    script = (
        "import os, signal, sys; import import_anomalib as command;"
        " from workers.importing import import_anomalib as worker;"
        " worker.write_report = lambda *_: os.kill(os.getpid(), signal.SIGKILL);"
        " command.main(sys.argv[1:])"
    )
    killed = subprocess.run(
        [sys.executable, "-c", script, "--checkpoint", patchcore, "--out_dir", kept],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, timeout=120,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(list(kept.parent.iterdir())) == 2
    before = tree(kept)
    import_anomalib(Import(patchcore, kept.with_name("other")), QUIET)
    assert tree(kept) == before
