"""The VAE draws parts as they should be, goes on from what it knows, and never by chance."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from engines.errors import BadDataset, BadMeta, BadWeights
from engines.image import resize
from engines.meta import Meta
from engines.runtimes.openvino import OpenVINORuntime
from engines.runtimes.parity import FLOAT32_LIMIT, HALF_LIMIT
from support.project import ROOT
from workers.converting.export import Opset, export_onnx, parity
from workers.models import Training, vae
from workers.models.vae import KL_WARM_UP, Vae, kl_weight
from workers.progress import Progress
from workers.sample_parts.defects import DEFECTS, HARD_DEFECTS
from workers.sample_parts.drawing import draw_part

SIZE = 64  # pixels: the smallest
QUIET = Progress(quiet=True)
FIVE = Training(epochs=5, batch=4)

Pictures = NDArray[np.uint8]


def settings(**changes: Any) -> Meta:
    return Meta.model_validate({"model": "vae", "latent_dim": 8, "image_size": SIZE, **changes})


def parts(*seeds: int, defect: str | None = None, size: int = SIZE) -> Pictures:
    """Drawn parts (n, size, size, 3) uint8 RGB."""
    return np.stack([resize(draw_part(seed, defect, 128)[0], size) for seed in seeds])


def darker(pictures: Pictures) -> Pictures:
    """The same parts under half the light: normal, but not known."""
    return (pictures // 2).astype(np.uint8)


def learned(pictures: Pictures, how: Training = FIVE, **changes: Any) -> Vae:
    meta = settings(**changes)
    model = vae.build(meta, None)
    vae.train(model, meta, [pictures], how, QUIET)
    return model


@pytest.fixture(scope="module")
def model() -> Vae:
    """A model that has learned 12 parts; tests do not change it."""
    return learned(parts(*range(1, 13)), Training(epochs=60))


@pytest.fixture(scope="module")
def weights(model: Vae, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its model.pth."""
    folder = tmp_path_factory.mktemp("vae")
    assert vae.save(model, settings(), folder) == ["model.pth"]
    return folder / "model.pth"


def as_ever(weights: Path, **changes: Any) -> Vae:
    """A copy that a test may change."""
    return vae.build(settings(**changes), weights)


def same(one: Vae, other: Vae) -> bool:
    both = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in both)


def drawing_error(model: Vae, pictures: Pictures) -> float:
    """Root mean square difference of pictures and their drawings, of [0, 1]."""
    with torch.inference_mode():
        seen = model.see(torch.from_numpy(pictures))
        return float((seen - model.decode(model.encode(seen)[0])).square().mean().sqrt())


# ---- scores ----------------------------------------------------------------------------------


def test_the_same_image_scores_the_same_every_time(model: Vae) -> None:
    unseen = parts(21, 22)
    first = vae.scores(model, [unseen])
    torch.manual_seed(5)
    np.testing.assert_array_equal(vae.scores(model, [unseen]), first)
    assert first.dtype == np.float32
    assert len(np.unique(first)) == 2


def test_the_same_image_scores_the_same_in_another_process(model: Vae, weights: Path) -> None:
    script = f"""
import sys; sys.path[:0] = {[str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]!r}
from pathlib import Path
from test_vae import as_ever, parts, vae
print(*vae.scores(as_ever(Path({str(weights)!r})), [parts(21, 22)]).tolist())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = np.array(done.stdout.split(), np.float32)
    np.testing.assert_array_equal(found, vae.scores(model, [parts(21, 22)]))


def test_the_score_of_an_image_does_not_depend_on_its_batch(model: Vae) -> None:
    unseen = parts(21, 22, 23)
    alone = vae.scores(model, [unseen[:1], unseen[1:]])
    np.testing.assert_array_equal(vae.scores(model, [unseen]), alone)
    with torch.inference_mode():
        together = model(torch.from_numpy(unseen))[0].numpy()
    np.testing.assert_allclose(together, alone, rtol=1e-5)


def test_no_image_has_no_score(model: Vae) -> None:
    assert vae.scores(model, []).shape == (0,)


@pytest.mark.parametrize("place", [(12, 12), (40, 12), (20, 44)])
def test_a_defect_shows_in_the_map_where_it_is(model: Vae, place: tuple[int, int]) -> None:
    good = parts(21)
    down, right = place
    bad = good.copy()
    bad[0, down : down + 8, right : right + 8] = (200, 60, 20)
    with torch.inference_mode():
        score, found = model(torch.from_numpy(np.concatenate([good, bad])))
    assert found.shape == (2, SIZE // 4, SIZE // 4)
    assert torch.equal(found.amax(dim=(1, 2)), score)  # the score is the map's largest value
    assert score[1] > 2 * score[0]
    row, column = divmod(int(found[1].argmax()), SIZE // 4)
    assert down - 4 <= 4 * row <= down + 8
    assert right - 4 <= 4 * column <= right + 8


@pytest.mark.parametrize("level", [0, 90, 255])
def test_a_plain_colour_that_it_learned_has_no_error_however_bright(level: int) -> None:
    plain = np.full((6, SIZE, SIZE, 3), level, np.uint8)
    model = learned(plain, Training(epochs=10))
    assert drawing_error(model, plain[:1]) < 3 / 255
    other = np.full((1, SIZE, SIZE, 3), abs(level - 120), np.uint8)
    assert vae.scores(model, [other])[0] > 3 * vae.scores(model, [plain[:1]])[0]


def test_camera_and_drawing_are_compared_in_the_same_range(model: Vae) -> None:
    known = parts(1, 2)
    with torch.inference_mode():
        seen = model.see(torch.from_numpy(known))
        drawn = model.decode(model.encode(seen)[0])
    np.testing.assert_allclose(float(seen.mean()), known.mean() / 255, rtol=1e-5)
    assert seen.shape == drawn.shape == (2, 3, SIZE // 2, SIZE // 2)
    for of_colour in (torch.Tensor.mean, torch.Tensor.std):
        np.testing.assert_allclose(float(of_colour(drawn)), float(of_colour(seen)), rtol=0.1)


# ---- learning --------------------------------------------------------------------------------


def test_an_untrained_model_is_the_same_every_time_and_knows_nothing() -> None:
    torch.manual_seed(1)
    first = vae.build(settings(), None)
    drawn_after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn_after)
    assert same(first, vae.build(settings(), "untrained"))
    assert not vae.knows(first)


def test_training_is_the_same_every_time_and_leaves_the_random_state_alone() -> None:
    pictures, how = parts(1, 2, 3, 4, 5), Training(epochs=2)
    torch.manual_seed(1)
    first = learned(pictures, how)
    drawn_after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn_after)
    assert same(first, learned(pictures, how))


def test_batches_are_read_once_and_how_they_are_cut_does_not_matter() -> None:
    pictures, meta = parts(1, 2, 3, 4, 5), settings()
    whole = learned(pictures)
    model = vae.build(meta, None)
    vae.train(model, meta, (pictures[i : i + 2] for i in (0, 2, 4)), FIVE, QUIET)
    assert same(model, whole)


def test_known_normals_are_drawn_better_the_longer_it_learns() -> None:
    pictures = parts(*range(1, 9))
    found = [drawing_error(learned(pictures, Training(epochs)), pictures) for epochs in (1, 40, 90)]
    assert found[0] > found[1] > found[2]


def test_one_epoch_with_one_image_is_enough_to_go_on_with() -> None:
    model = learned(parts(1), Training(epochs=1, batch=1))
    assert vae.knows(model)
    assert np.isfinite(vae.scores(model, [parts(2), parts(3, defect="stain")])).all()


def test_new_normals_score_lower_after_an_update(weights: Path) -> None:
    known, new = parts(1, 2, 3, 4), darker(parts(5, 6, 7, 8))
    model = as_ever(weights)
    before = vae.scores(model, [new])
    vae.update(model, settings(), [np.concatenate([known, new])], Training(epochs=10), QUIET)
    assert (vae.scores(model, [new]) < 0.8 * before).all()


def test_an_update_goes_on_from_what_the_weights_know(weights: Path) -> None:
    pictures, unseen, once = parts(1, 2, 3, 4), parts(*range(21, 27)), Training(epochs=1)
    continued, fresh = as_ever(weights), vae.build(settings(), None)
    known = drawing_error(continued, unseen)
    vae.update(continued, settings(), [pictures], once, QUIET)
    vae.train(fresh, settings(), [pictures], once, QUIET)
    assert drawing_error(continued, unseen) < 1.05 * known
    assert drawing_error(continued, unseen) < 0.9 * drawing_error(fresh, unseen)
    assert vae.summary(continued)["vae"]["steps_in_all"] == 60 * 3 + 1


def test_an_update_does_change_the_weights(weights: Path) -> None:
    model = as_ever(weights)
    vae.update(model, settings(), [parts(31, 32)], Training(epochs=1), QUIET)
    assert not torch.equal(model.from_latent.weight, as_ever(weights).from_latent.weight)


def test_the_kl_term_begins_at_nothing_and_ends_in_full() -> None:
    steps = 200
    found = [kl_weight(step, steps) for step in range(steps)]
    assert found[0] == 0
    assert found[-1] == 1
    assert found == sorted(found)
    assert found.index(1.0) == KL_WARM_UP * steps
    assert kl_weight(0, 1) == 0  # a training of one step


def test_the_learning_rate_of_meta_json_is_taken() -> None:
    pictures, how = parts(1, 2), Training(epochs=1)
    slow, usual = learned(pictures, how, learning_rate=1e-7), learned(pictures, how)
    new = vae.build(settings(), None)
    moved = [float((m.to_latent.weight - new.to_latent.weight).abs().max()) for m in (slow, usual)]
    assert moved[0] < 1e-3 * moved[1]


def test_a_learning_rate_that_runs_away_is_named() -> None:
    with pytest.raises(BadMeta, match=r"learning_rate \(1e\+20\) is too high"):
        learned(parts(1, 2), learning_rate=1e20)


def test_learning_from_no_image_is_refused() -> None:
    with pytest.raises(BadDataset, match="no usable training image"):
        vae.train(vae.build(settings(), None), settings(), [], FIVE, QUIET)


class Watched(Progress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.seen: list[tuple[str, int, int]] = []
        self.said: list[str] = []

    def phase(self, name: str) -> Any:
        return lambda done, total: self.seen.append((name, done, total))

    def say(self, line: str) -> None:
        self.said.append(line)


def test_progress_counts_to_the_end_and_says_when_that_was_early() -> None:
    progress = Watched()
    vae.train(vae.build(settings(), None), settings(), [parts(1, 2, 3)], Training(3, 2), progress)
    assert progress.seen == [("epochs", 2, 6), ("epochs", 4, 6), ("epochs", 6, 6)]
    (line,) = progress.said
    assert "learned for 6 steps" in line
    assert "--epochs 200 would be enough" in line


# ---- files -----------------------------------------------------------------------------------


def test_what_is_saved_scores_the_same_when_it_is_loaded(model: Vae, weights: Path) -> None:
    again, unseen = as_ever(weights), parts(21, 22)
    assert vae.knows(again)
    assert same(again, model)
    np.testing.assert_array_equal(vae.scores(again, [unseen]), vae.scores(model, [unseen]))


def test_weights_of_another_latent_dim_are_refused_and_both_are_named(weights: Path) -> None:
    with pytest.raises(BadWeights, match=r"latent_dim is 8, and meta\.json says 16"):
        as_ever(weights, latent_dim=16)


def test_weights_of_another_size_are_refused_and_both_are_named(weights: Path) -> None:
    with pytest.raises(BadWeights, match=r"image_size is 64, and meta\.json says 128"):
        as_ever(weights, image_size=128)


def test_weights_of_something_else_are_refused(tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.ones(3)}, tmp_path / "resnet.pth")
    with pytest.raises(BadWeights, match=r"resnet\.pth is not a VAE that Kensa trained"):
        as_ever(tmp_path / "resnet.pth")
    with pytest.raises(BadWeights, match=r"gone\.pth does not exist"):
        as_ever(tmp_path / "gone.pth")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensor: tensor[:1], r"decoder\.0\.0\.bias is \(1,\)"),
        (lambda tensor: tensor * torch.nan, r"decoder\.0\.0\.bias holds values that are not fin"),
    ],
)
def test_weights_that_are_damaged_are_refused_by_name(
    model: Vae, tmp_path: Path, change: Any, says: str
) -> None:
    state = model.state_dict()
    state["decoder.0.0.bias"] = change(state["decoder.0.0.bias"])
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(BadWeights, match=says):
        as_ever(tmp_path / "model.pth")


def test_the_largest_model_at_256_pixels_is_well_under_30_mb(tmp_path: Path) -> None:
    meta = settings(latent_dim=256, image_size=256)
    vae.save(vae.build(meta, None), meta, tmp_path)
    assert (tmp_path / "model.pth").stat().st_size < 20e6


# ---- sizes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "says"),
    [
        (32, "multiple of 32 here, such as 64 or 96"),
        (100, "multiple of 32 here, such as 96 or 128"),
        (272, "multiple of 64 here, such as 256 or 320"),
        (513, "multiple of 128 here, such as 512 or 640"),
    ],
)
def test_a_size_that_cannot_be_halved_is_refused_and_says_which_can(size: int, says: str) -> None:
    with pytest.raises(BadMeta, match=rf"{size} x {size}: image_size must be a {says}\."):
        vae.build(settings(image_size=size), None)


@pytest.mark.parametrize("size", [64, 96, 224, 256, 320, 512, 640])
def test_the_sizes_that_it_names_work(size: int) -> None:
    model = vae.build(settings(image_size=size), None)
    with torch.inference_mode():
        score, found = model(torch.zeros(1, size, size, 3, dtype=torch.uint8))
    assert score.shape == (1,)
    assert found.shape == (1, size // 4, size // 4)
    assert sum(p.numel() for p in model.parameters()) < 1e6


# ---- the graph -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [SIZE, 96])
def test_the_graphs_of_both_opsets_agree_with_torch_and_each_other(
    tmp_path: Path, size: int
) -> None:
    meta = settings(image_size=size)
    model = learned(parts(1, 2, 3, 4, size=size), image_size=size)
    unseen = np.concatenate([parts(21, 22, size=size), parts(23, defect="stain", size=size)])
    expected = vae.scores(model, [unseen])
    assert (np.abs(expected) > 0.1).all()
    opsets: list[Opset] = [17, 18]
    maps = []
    for opset in opsets:
        path = tmp_path / f"{opset}.onnx"
        graph, inputs = vae.graph(model, half=False)
        export_onnx(graph, inputs, path, opset)
        report = parity(path, expected, unseen, None, meta, precision="f32")
        assert report["onnx"]["max_relative"] <= FLOAT32_LIMIT
        assert report["openvino_f32"]["max_relative"] <= FLOAT32_LIMIT
        maps.append(OpenVINORuntime(path, None, precision="f32").infer(unseen)[1])
    np.testing.assert_allclose(maps[0], maps[1], rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        found = model(torch.from_numpy(unseen))[1].numpy()
    np.testing.assert_allclose(maps[0], found, rtol=1e-3, atol=1e-3)


def test_a_batch_through_the_graph_scores_as_its_images_alone(model: Vae, tmp_path: Path) -> None:
    graph, inputs = vae.graph(model, half=False)
    export_onnx(graph, inputs, tmp_path / "model.onnx", 17)
    config = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = ov.Core().compile_model(str(tmp_path / "model.onnx"), "CPU", config)
    unseen, keep = parts(21, 22, 23, 24, 25), inputs["keep"].numpy()
    together = compiled({"image": unseen, "keep": keep})
    assert together["map"].shape == (5, SIZE // 4, SIZE // 4)
    for index, picture in enumerate(unseen):
        alone = compiled({"image": picture[None], "keep": keep})
        for name in ("score", "map"):
            np.testing.assert_allclose(alone[name][0], together[name][index], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("opset", [17, 18])
def test_a_graph_in_half_precision_stays_within_the_limit(
    model: Vae, weights: Path, tmp_path: Path, opset: Opset
) -> None:
    unseen = np.concatenate([parts(21, 22), parts(23, defect="stain")])
    expected = vae.scores(model, [unseen])
    graph, inputs = vae.graph(as_ever(weights), half=True)
    export_onnx(graph, inputs, tmp_path / "half.onnx", opset)
    export_onnx(*vae.graph(model, half=False), tmp_path / "full.onnx", opset)
    report = parity(tmp_path / "half.onnx", expected, unseen, None, settings(), precision="f16")
    assert report["onnx"]["max_relative"] <= HALF_LIMIT
    assert report["openvino_f32"]["max_relative"] <= HALF_LIMIT
    halved = (tmp_path / "half.onnx").stat().st_size / (tmp_path / "full.onnx").stat().st_size
    assert halved < 0.65  # the weights are really float16


# ---- accuracy --------------------------------------------------------------------------------


@pytest.mark.soak
def test_every_easy_defect_of_the_sample_parts_is_told_apart() -> None:
    size = 256
    model = learned(
        parts(*range(60), size=size), Training(epochs=60), image_size=size, latent_dim=64
    )
    normal = vae.scores(model, [parts(*range(100, 120), size=size)])
    for defect in set(DEFECTS) - set(HARD_DEFECTS):
        defective = vae.scores(model, [parts(*range(200, 210), defect=defect, size=size)])
        truth = [0] * len(normal) + [1] * len(defective)
        assert roc_auc_score(truth, [*normal, *defective]) >= 0.9, defect
