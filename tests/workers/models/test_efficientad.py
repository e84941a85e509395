"""EfficientAD scores as anomalib's does, and learns on CPUs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from anomalib.models.image.efficient_ad.torch_model import EfficientAdModel
from numpy.typing import NDArray

from engines import image
from engines.errors import BadDataset, BadMeta, BadWeights
from engines.files import sha256
from engines.meta import Meta
from engines.runtimes.openvino import OpenVINORuntime
from engines.runtimes.parity import FLOAT32_LIMIT
from support.progress import Said
from workers.converting.export import Opset, export_onnx, parity
from workers.models import Training, efficientad, efficientad_weights
from workers.models.backbone import IMAGENET_MEAN, IMAGENET_STD
from workers.models.efficientad import CHANNELS, EfficientAd
from workers.models.efficientad_penalty_images import LUMA, penalty_images
from workers.progress import Progress
from workers.sample_parts.drawing import draw_part

SIZE = 256  # pixels: the least that the networks take
ONCE = Training(epochs=1, batch=4)

Pictures = NDArray[np.uint8]
State = dict[str, torch.Tensor]


def settings(**changes: Any) -> Meta:
    content = {"model": "efficientad", "model_size": "small", "image_size": SIZE, **changes}
    return Meta.model_validate(content)


def parts(*seeds: int, defect: str | None = None) -> Pictures:
    """Drawn parts (n, S, S, 3) uint8 RGB."""
    return np.stack([draw_part(seed, defect, SIZE)[0] for seed in seeds])


def darker(pictures: Pictures) -> Pictures:
    """The same parts under half the light: normal, but not known."""
    return (pictures // 2).astype(np.uint8)


def learned(
    pictures: Pictures, how: Training = ONCE, progress: Progress | None = None, **changes: Any
) -> EfficientAd:
    meta = settings(**changes)
    model = efficientad.build(meta, "untrained")
    efficientad.train(model, meta, [pictures], how, progress or Said())
    return model


def state_of(model: EfficientAd) -> State:
    return {name: tensor.clone() for name, tensor in model.networks.state_dict().items()}


def scored(model: EfficientAd, pictures: Pictures) -> NDArray[np.float32]:
    return efficientad.scores(model, [pictures])


def pixels_of(pictures: Pictures) -> torch.Tensor:
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


@pytest.fixture(scope="module")
def first_training() -> tuple[EfficientAd, Said]:
    """Seven drawn parts: five are learned, four and one at once, and two are held out."""
    said, meta = Said(), settings(learning_rate=1e-3)
    model = efficientad.build(meta, "untrained")
    batches = iter([parts(1, 2, 3, 4), parts(5, 6, 7)])  # can be read once
    efficientad.train(model, meta, batches, Training(epochs=2, batch=4), said)
    return model, said


@pytest.fixture(scope="module")
def saved(
    first_training: tuple[EfficientAd, Said], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("efficientad")
    assert efficientad.save(first_training[0], settings(), folder) == ["model.pth"]
    return folder / "model.pth"


@pytest.fixture
def model(saved: Path) -> EfficientAd:
    return efficientad.build(settings(), saved)


@pytest.fixture(scope="module")
def unseen() -> Pictures:
    return np.concatenate([parts(8), darker(parts(9, defect="stain"))])


# ---- scores ----------------------------------------------------------------------------------


@torch.inference_mode()
def test_scores_and_maps_are_those_of_anomalibs_model_with_the_same_weights(
    model: EfficientAd, unseen: Pictures
) -> None:
    theirs = EfficientAdModel()
    theirs.load_state_dict(model.networks.state_dict())
    expected = theirs.eval()(pixels_of(unseen))
    score, maps = model(torch.from_numpy(unseen))
    torch.testing.assert_close(score, expected.pred_score[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        model.enlarged(maps[:, None]), expected.anomaly_map, rtol=1e-3, atol=1e-5
    )
    assert maps.shape == (len(unseen), 64, 64)
    assert len(np.unique(score.numpy())) == len(unseen)


def test_each_network_sees_the_picture_normalised_once(
    model: EfficientAd, unseen: Pictures
) -> None:
    networks, seen = model.networks, []
    for first in (networks.teacher.conv1, networks.student.conv1, networks.ae.encoder.enconv1):
        first.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    scored(model, unseen[:1])
    mean, std = (torch.tensor(of)[:, None, None] for of in (IMAGENET_MEAN, IMAGENET_STD))
    assert len(seen) == 3
    for pixels in seen:
        torch.testing.assert_close(pixels, (pixels_of(unseen[:1]) - mean) / std)


def test_what_is_strange_scores_higher_than_what_was_learned(model: EfficientAd) -> None:
    known = parts(1, 2)
    coloured = known.copy()
    coloured[:, 90:150, 90:150] = (220, 40, 40)
    assert (scored(model, coloured) > scored(model, known)).all()


@pytest.mark.parametrize("size", [257, 300])
def test_other_sizes_score_as_anomalibs(saved: Path, unseen: Pictures, size: int) -> None:
    model = efficientad.build(settings(image_size=size), saved)
    picture = image.resize(unseen[0], size)[None]
    with torch.inference_mode():
        expected = model.networks(pixels_of(picture)).pred_score[:, 0]
    np.testing.assert_allclose(scored(model, picture), expected, rtol=1e-4)


@pytest.mark.parametrize("size", [128, 255])
def test_a_size_that_the_networks_cannot_take_is_refused_and_says_which_they_can(size: int) -> None:
    with pytest.raises(BadMeta, match=rf"{size} x {size}: image_size must be 256 or more"):
        efficientad.build(settings(image_size=size), "untrained")


# ---- the graph -------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [pytest.param(17, marks=pytest.mark.soak), 18])
def test_the_graph_gives_the_scores_of_torch_alone_and_in_a_batch(
    model: EfficientAd, unseen: Pictures, tmp_path: Path, opset: Opset
) -> None:
    with torch.inference_mode():
        expected, expected_map = (found.numpy() for found in model(torch.from_numpy(unseen)))
    graph, inputs = efficientad.graph(model, half=False)
    assert inputs["image"].shape == (2, SIZE, SIZE, 3)
    export_onnx(graph, inputs, tmp_path / "model.onnx", opset)
    report = parity(tmp_path / "model.onnx", expected, unseen, None, settings(), precision="f32")
    assert report["onnx"]["max_relative"] <= FLOAT32_LIMIT
    assert report["openvino_f32"]["max_relative"] <= FLOAT32_LIMIT
    runtime = OpenVINORuntime(tmp_path / "model.onnx", None, precision="f32")
    score, maps = runtime.infer(unseen[[0, 1, 0]])  # three, where the example had two
    runtime.close()
    np.testing.assert_allclose(score, expected[[0, 1, 0]], rtol=FLOAT32_LIMIT)
    np.testing.assert_allclose(maps, expected_map[[0, 1, 0]], rtol=FLOAT32_LIMIT, atol=1e-4)


def test_in_half_precision_only_the_networks_are(model: EfficientAd) -> None:
    """How well such a graph agrees is told in tests/product/test_kinds.py."""
    efficientad.graph(model, half=True)
    assert {tensor.dtype for tensor in model.networks.student.parameters()} == {torch.float16}
    rest = [*model.networks.quantiles.values(), *model.networks.mean_std.values()]
    assert {tensor.dtype for tensor in rest} == {torch.float32}


# ---- learning --------------------------------------------------------------------------------


def test_retraining_lowers_the_scores_of_new_normals_and_forgets_no_known_ones(
    model: EfficientAd,
) -> None:
    def far_from_the_teacher(pictures: Pictures) -> float:
        with torch.inference_mode():  # without the quantiles, which new normals move too
            return float(model.maps(pixels_of(pictures))[0].mean())

    known, new = parts(1), darker(parts(1))
    before = scored(model, new)
    distances = [far_from_the_teacher(pictures) for pictures in (known, new)]
    meta = settings(learning_rate=5e-4)
    efficientad.train(model, meta, [known, new], Training(epochs=3, batch=2), Said())
    assert (scored(model, new) < 0.8 * before).all()
    assert far_from_the_teacher(known) < distances[0]
    assert far_from_the_teacher(new) < 0.9 * distances[1]


def test_training_goes_on_from_what_the_model_knows(model: EfficientAd) -> None:
    assert efficientad.knows(model)
    assert not efficientad.knows(efficientad.build(settings(), "untrained"))
    before = state_of(model)
    meta = settings(learning_rate=1e-9)  # next to nothing is learned
    efficientad.update(model, meta, [parts(1)], ONCE, Said())
    after = state_of(model)
    assert all(
        torch.allclose(after[name], before[name], atol=1e-7)
        for name in before
        if not name.startswith("quantiles.")
    )


def test_a_batch_of_four_learns_and_an_uneven_rest_too(
    first_training: tuple[EfficientAd, Said],
) -> None:
    model, said = first_training
    record = efficientad.summary(model)["efficientad"]
    assert record["steps"] == 4
    assert record["images"] == {"learned": 5, "validation": 2}
    checked = [float(line.split()[-1]) for line in said.lines if line.startswith("epoch ")]
    assert len(checked) == 2
    assert checked[1] < checked[0]
    assert record["validation_loss"] == pytest.approx(min(checked), abs=1e-4)


@pytest.mark.parametrize("rate", [1e-3, None])
def test_the_first_step_is_as_long_as_the_learning_rate_says(rate: float | None) -> None:
    """Adam moves every weight by the learning rate, whatever its gradient."""
    before = state_of(efficientad.build(settings(), "untrained"))
    after = state_of(learned(parts(1), learning_rate=rate))
    for name in ("student.conv4.weight", "ae.decoder.deconv8.weight"):
        moved = float((after[name] - before[name]).abs().max())
        assert moved == pytest.approx(rate or 1e-4, rel=0.02)
    unmoved = [name for name in before if name.startswith("teacher.")]
    assert all(torch.equal(after[name], before[name]) for name in unmoved)


@pytest.mark.parametrize(("decay_at", "rates"), [(None, [1, 1, 1, 0.1]), (0.5, [1, 1, 0.1, 0.1])])
def test_the_schedule_comes_from_meta_json(decay_at: float | None, rates: list[float]) -> None:
    meta = settings(decay_at=decay_at)
    assert [efficientad.decayed(meta, done) for done in (0.0, 0.49, 0.94, 0.95)] == rates


@pytest.mark.soak
def test_after_the_decay_a_step_is_a_tenth_as_long() -> None:
    start = state_of(efficientad.build(settings(), "untrained"))
    before, after = (
        state_of(learned(parts(1, 2), Training(epochs=2, batch=2), decay_at=at)) for at in (1, 0.5)
    )
    name = "student.conv4.weight"
    first, both = (float((state[name] - start[name]).abs().max()) for state in (after, before))
    assert first < 0.8 * both


def test_the_same_training_gives_the_same_model_and_leaves_the_random_state_alone() -> None:
    torch.manual_seed(1)
    first = state_of(learned(parts(1)))
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn)
    second = state_of(learned(parts(1)))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_teacher_is_measured_over_the_training_images() -> None:
    model, pictures = efficientad.build(settings(), "untrained"), parts(1, 2)
    efficientad._measure_teacher(model, torch.from_numpy(pictures))
    with torch.inference_mode():
        found = model.teaches(pixels_of(pictures))
    torch.testing.assert_close(found.mean(dim=(0, 2, 3)), torch.zeros(CHANNELS), atol=1e-3, rtol=0)
    torch.testing.assert_close(found.std(dim=(0, 2, 3)), torch.ones(CHANNELS), atol=1e-3, rtol=0)


def test_the_losses_are_those_of_anomalib_and_what_they_do_to_the_student(
    model: EfficientAd,
) -> None:
    pixels, natural = pixels_of(parts(9)), pixels_of(parts(10, defect="burr"))
    theirs = EfficientAdModel()
    theirs.load_state_dict(model.networks.state_dict())
    theirs.eval()  # without dropout, which draws
    torch.manual_seed(5)
    distance = theirs.compute_student_teacher_distance(pixels)[1]
    expected = theirs.compute_losses(pixels, natural, distance)
    torch.manual_seed(5)
    found = efficientad._losses(model, pixels, natural)
    together = (found.student + found.penalty, found.autoencoder, found.both)
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-6)
    gradients = (
        torch.autograd.grad(sum(losses), networks.student.conv4.weight)[0]
        for losses, networks in ((together, model.networks), (expected, theirs))
    )
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("size", ["small", "medium"])
@torch.inference_mode()
def test_some_channels_of_a_student_are_what_it_says_there(size: str) -> None:
    model = efficientad.build(settings(model_size=size), "untrained")
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    everything = model.networks.student(picture)
    for some in (slice(0, CHANNELS), slice(CHANNELS, 2 * CHANNELS)):
        found = efficientad._student_channels(model.networks.student, picture, some)
        torch.testing.assert_close(found, everything[:, some])


def test_a_plain_background_does_not_blow_the_maps_up() -> None:
    """Where most of a picture is one colour, most of a map is one number: 90 % and 99.5 % alike."""
    model = efficientad.build(settings(), "untrained")
    efficientad._measure_teacher(model, torch.from_numpy(parts(1)))
    efficientad._measure_quantiles(model, torch.full((1, SIZE, SIZE, 3), 90, dtype=torch.uint8))
    quantiles = {name: value.item() for name, value in model.networks.quantiles.items()}
    assert quantiles["qb_st"] >= 1.0999 * quantiles["qa_st"] > 0


def test_learning_from_no_image_is_refused() -> None:
    model = efficientad.build(settings(), "untrained")
    with pytest.raises(BadDataset, match="no usable training image"):
        efficientad.train(model, settings(), [], ONCE, Said())


def test_a_learning_rate_that_runs_away_is_named() -> None:
    with pytest.raises(BadMeta, match=r"learning_rate \(1000000\.0\) is too high"):
        learned(parts(1), Training(epochs=3, batch=1), learning_rate=1e6)


# ---- the penalty -----------------------------------------------------------------------------


def seen_by_the_student(model: EfficientAd) -> list[torch.Tensor]:
    seen: list[torch.Tensor] = []
    model.networks.student.register_forward_pre_hook(
        lambda _, given: seen.append(given[0].detach().clone())
    )
    return seen


def test_natural_images_are_cut_as_anomalib_cuts_them_and_shown_to_the_student(
    tmp_path: Path,
) -> None:
    photo = image.resize(draw_part(20, "stain", 512)[0], 600)
    (tmp_path / "below").mkdir()
    cv2.imwrite(str(tmp_path / "below" / "photo.png"), photo[..., ::-1])
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    model, said = efficientad.build(settings(), "untrained"), Said()
    seen = seen_by_the_student(model)
    how = Training(epochs=2, batch=4, penalty_dir=tmp_path)
    efficientad.train(model, settings(), [parts(1)], how, said)
    middle = image.resize(photo, 2 * SIZE)[SIZE // 2 : -SIZE // 2, SIZE // 2 : -SIZE // 2]
    colour = pixels_of(middle[None])
    grey = (colour * LUMA).sum(dim=1, keepdim=True)
    shown = [
        pixels
        for pixels in seen
        if torch.allclose(pixels, colour, atol=0.01) or torch.allclose(pixels, grey, atol=0.01)
    ]
    assert len(shown) == 2  # one a step
    assert model.training_record["losses"]["penalty"] > 0
    assert sum("broken.png" in line for line in said.lines) == 1
    assert not any("no folder of natural images" in line for line in said.lines)


def test_without_natural_images_it_says_so_and_shows_no_zero_image() -> None:
    model, said = efficientad.build(settings(), "untrained"), Said()
    seen = seen_by_the_student(model)
    efficientad.train(model, settings(), [parts(1)], ONCE, said)
    assert any("no folder of natural images" in line for line in said.lines)
    assert model.training_record["losses"]["penalty"] == 0
    assert all(float(picture.std()) > 0.05 for pixels in seen for picture in pixels)


@pytest.mark.parametrize("content", [None, b"not a picture"])
def test_a_folder_without_natural_images_is_refused_before_training(
    tmp_path: Path, content: bytes | None
) -> None:
    if content:
        (tmp_path / "broken.jpg").write_bytes(content)
    with pytest.raises(BadDataset, match=f"{tmp_path}.*--penalty_dir"):
        learned(parts(1), Training(penalty_dir=tmp_path))


def test_natural_images_are_read_within_the_limits_that_were_stated(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "photo.png"), np.zeros((40, 50, 3), np.uint8))
    for pixels, fits in ((2000, True), (1999, False)):
        how = Training(penalty_dir=tmp_path, limits=image.ImageLimits(max_pixels=pixels))
        refused = pytest.raises(BadDataset, match="can be read")
        with nullcontext() if fits else refused:
            next(penalty_images(tmp_path, SIZE, how.limits, Said()))


# ---- weights ---------------------------------------------------------------------------------


def test_what_is_saved_scores_the_same_when_it_is_loaded(
    model: EfficientAd, unseen: Pictures, tmp_path: Path
) -> None:
    meta = settings(weights_pth="other.pth")
    assert efficientad.save(model, meta, tmp_path) == ["other.pth"]
    again = efficientad.build(meta, tmp_path / "other.pth")
    assert efficientad.knows(again)
    np.testing.assert_array_equal(scored(again, unseen), scored(model, unseen))


def test_a_checkpoint_of_anomalibs_trainer_scores_as_it_does_there(
    model: EfficientAd, unseen: Pictures, tmp_path: Path
) -> None:
    from anomalib.models import EfficientAd as AnomalibsEfficientAd
    from lightning.pytorch import Trainer

    theirs = AnomalibsEfficientAd()
    theirs.model.load_state_dict(model.networks.state_dict())
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", **quiet)
    trainer.strategy.connect(theirs)
    trainer.save_checkpoint(tmp_path / "lightning.ckpt")
    again = efficientad.build(settings(), tmp_path / "lightning.ckpt")
    assert efficientad.knows(again)
    np.testing.assert_array_equal(scored(again, unseen), scored(model, unseen))


@torch.inference_mode()
def test_weights_that_were_saved_before_a_validation_score_as_anomalibs(
    model: EfficientAd, unseen: Pictures, tmp_path: Path
) -> None:
    state = state_of(model)
    state.update({name: torch.tensor(0.0) for name in state if name.startswith("quantiles.")})
    torch.save(state, tmp_path / "weights.pth")
    theirs = EfficientAdModel()
    theirs.load_state_dict(state)
    expected = theirs.eval()(pixels_of(unseen)).pred_score[:, 0].numpy()
    again = efficientad.build(settings(), tmp_path / "weights.pth")
    np.testing.assert_allclose(scored(again, unseen), expected, rtol=1e-4)


def teacher(size: str, prefix: str = "") -> State:
    torch.manual_seed(7)
    state = efficientad.new_teacher(size).state_dict()
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize("size", ["small", "medium"])
@pytest.mark.parametrize("prefix", ["", "teacher.", "model.teacher."])
def test_a_teacher_alone_arrives_unchanged_and_knows_no_part(
    tmp_path: Path, size: str, prefix: str
) -> None:
    torch.save(teacher(size, prefix), tmp_path / "teacher.pth")
    model = efficientad.build(settings(model_size=size), tmp_path / "teacher.pth")
    found, expected = model.networks.teacher.state_dict(), teacher(size)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not efficientad.knows(model)


def test_without_a_file_the_teacher_comes_from_anomalibs_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(efficientad_weights, "get_pretrained_weights_dir", lambda: tmp_path)
    (tmp_path / "efficientad_pretrained_weights").mkdir()
    path = tmp_path / "efficientad_pretrained_weights" / "pretrained_teacher_small.pth"
    torch.save(teacher("small"), path)
    model = efficientad.build(settings(), None)
    found = model.networks.teacher.state_dict()
    assert torch.equal(found["conv1.weight"], teacher("small")["conv1.weight"])
    assert model.origin == {"cache": "anomalib", "model": path.name, "sha256": sha256(path)}
    with pytest.raises(BadWeights, match=r"pretrained_teacher_medium\.pth does not exist"):
        efficientad.build(settings(model_size="medium"), None)


def test_without_any_teacher_it_says_what_to_pass_and_how_to_make_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(efficientad_weights, "get_pretrained_weights_dir", lambda: tmp_path)
    says = r"python3 -m workers\.distil --images .*POST /teacher.*pretrained_teacher_small\.pth of"
    with pytest.raises(BadWeights, match=says):
        efficientad.build(settings(), None)


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (lambda: teacher("medium"), r"model_size small: conv1\.weight is \(256, 3, 4, 4\).*other"),
        (lambda: {**teacher("small"), "conv4.bias": torch.full((384,), torch.nan)}, "not finite"),
        (lambda: {"layer1.0.conv1.weight": torch.ones(3)}, r"it has no conv1\.weight.*a teacher"),
        (lambda: {"epoch": 3}, "holds no weights"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, state: Callable[[], Any], says: str
) -> None:
    torch.save(state(), tmp_path / "weights.pth")
    with pytest.raises(BadWeights, match=rf"weights\.pth.*{says}"):
        efficientad.build(settings(), tmp_path / "weights.pth")
