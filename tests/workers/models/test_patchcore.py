"""PatchCore scores as anomalib's does, keeps what it knows, and takes weights of any make."""

from __future__ import annotations

import builtins
import contextlib
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from anomalib.models.image.patchcore.torch_model import PatchcoreModel
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch.nn import functional

from engines.errors import BadBundle, BadDataset, BadMeta, BadWeights
from engines.image import resize
from engines.meta import FIRST, Meta
from engines.runtimes.parity import FLOAT32_LIMIT
from engines.store.bundle import write_bank
from support.project import PATCHCORE
from workers.converting.export import Opset, export_onnx, parity
from workers.models import Training, patchcore
from workers.models.backbone import IMAGENET_MEAN, IMAGENET_STD, extractor
from workers.models.coreset import k_centre_greedy
from workers.models.patchcore import Bank, Lesson, PatchCore
from workers.progress import Progress
from workers.sample_parts.drawing import draw_part

SIZE = 128  # pixels: 16 x 16 patches with resnet18's layer2
LAYERS = ["layer2", "layer3"]
QUIET = Progress(quiet=True)

Pictures = NDArray[np.uint8]
State = dict[str, torch.Tensor]


def settings(**changes: Any) -> Meta:
    return Meta.model_validate({**PATCHCORE, "image_size": SIZE, **changes})


def parts(*seeds: int, defect: str | None = None, size: int = SIZE) -> Pictures:
    """Drawn parts (n, size, size, 3) uint8 RGB."""
    return np.stack([resize(draw_part(seed, defect, 256)[0], size) for seed in seeds])


def darker(pictures: Pictures) -> Pictures:
    """The same parts under half the light: normal, but not known."""
    return (pictures // 2).astype(np.uint8)


def learned(pictures: Pictures, **changes: Any) -> PatchCore:
    meta = settings(**changes)
    model = patchcore.build(meta, "untrained")
    patchcore.train(model, meta, [pictures], Training(), QUIET)
    return model


def bank_of(model: PatchCore) -> Bank:
    assert model.bank is not None
    return model.bank


def patches_of(model: PatchCore, pictures: Pictures) -> torch.Tensor:
    with torch.inference_mode():
        return model.embed(torch.from_numpy(pictures))[0].flatten(0, 1)


def anomalibs(model: PatchCore) -> PatchcoreModel:
    """anomalib's own model with the weights and the bank of ours."""
    theirs = PatchcoreModel(layers=model.layers, backbone="resnet18", pre_trained=False)
    theirs.feature_extractor.load_state_dict(model.features.state_dict())
    theirs.memory_bank = bank_of(model).embeddings
    return theirs.eval()


def scores_of(theirs: PatchcoreModel, pictures: Pictures) -> NDArray[np.float32]:
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.inference_mode():
        found: NDArray[np.float32] = theirs((pixels - mean) / std).pred_score.numpy()
    return found


# ---- scores ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [["layer2"], LAYERS, ["layer1", "layer2", "layer3"]])
def test_scores_are_those_of_anomalibs_model_with_the_same_bank(layers: list[str]) -> None:
    model = learned(parts(1, 2, 3, 4), layers=layers)
    unseen = np.concatenate([parts(5, 6), parts(7, 8, defect="stain"), darker(parts(9))])
    found = patchcore.scores(model, [unseen])
    np.testing.assert_allclose(found, scores_of(anomalibs(model), unseen), rtol=1e-4)
    assert len(np.unique(found)) == len(found)


@pytest.mark.parametrize("rows", [2, 8, 9, 10])
def test_a_bank_smaller_than_the_neighbourhood_scores_as_anomalibs(rows: int) -> None:
    model = learned(parts(1, 2))
    known = bank_of(model)
    model.bank = Bank(known.embeddings[:rows], known.coverage_radius)
    unseen = parts(5, 6, defect="dent")
    expected = scores_of(anomalibs(model), unseen)
    np.testing.assert_allclose(patchcore.scores(model, [unseen]), expected, rtol=1e-4, atol=1e-6)


def test_the_score_of_an_image_does_not_depend_on_its_batch() -> None:
    model, unseen = learned(parts(1, 2)), parts(5, 6, 7)
    assert model.bank is not None
    alone = patchcore.scores(model, [unseen[:1], unseen[1:2], unseen[2:]])
    np.testing.assert_array_equal(patchcore.scores(model, [unseen]), alone)
    with torch.inference_mode():
        together = model(torch.from_numpy(unseen), model.bank.embeddings)[0].numpy()
    np.testing.assert_allclose(together, alone, rtol=1e-5)


# ---- learning --------------------------------------------------------------------------------


def test_training_keeps_the_share_of_patches_that_meta_json_asks_for() -> None:
    for ratio, rows in ((0.1, 51), (0.5, 256), (0.0001, 1)):
        bank = bank_of(learned(parts(1, 2), coreset_ratio=ratio))
        assert bank.embeddings.shape == (rows, 384)


def test_every_training_patch_lies_within_the_coverage_radius() -> None:
    pictures = parts(1, 2, 3)
    model = learned(pictures)
    bank = bank_of(model)
    distance = torch.cdist(patches_of(model, pictures).double(), bank.embeddings.double()).amin(1)
    assert float(distance.max()) == pytest.approx(bank.coverage_radius, rel=1e-4)


def test_an_update_keeps_every_known_row_first_and_unchanged() -> None:
    model = learned(parts(1, 2, 3))
    before = bank_of(model)
    known = before.embeddings.clone()
    patchcore.update(model, settings(), [darker(parts(4, 5))], Training(), QUIET)
    after = bank_of(model)
    assert len(after.embeddings) > len(known)
    assert torch.equal(after.embeddings[: len(known)], known)
    assert after.coverage_radius >= before.coverage_radius


def test_an_update_adds_only_patches_that_were_not_covered() -> None:
    model, new = learned(parts(1, 2, 3)), darker(parts(4, 5))
    before = bank_of(model)
    patchcore.update(model, settings(), [new], Training(), QUIET)
    added = bank_of(model).embeddings[len(before.embeddings) :]
    distance = torch.cdist(added.double(), before.embeddings.double()).amin(1)
    assert float(distance.min()) > before.coverage_radius * (1 - 1e-4)
    assert len(added) <= PATCHCORE["coreset_ratio"] * len(patches_of(model, new))  # type: ignore[operator]
    assert float(torch.cdist(added, patches_of(model, new)).amin(1).max()) < 1e-2  # and no others


def test_an_update_with_the_same_images_adds_next_to_nothing() -> None:
    pictures = parts(1, 2, 3)
    model = learned(pictures)
    before = len(bank_of(model).embeddings)
    patchcore.update(model, settings(), [pictures], Training(), QUIET)
    assert len(bank_of(model).embeddings) - before <= 1  # the farthest, by rounding


def test_a_bank_that_does_not_say_its_coverage_hardly_grows_with_images_it_knows(
    tmp_path: Path,
) -> None:
    pictures = parts(1, 2, 3)
    model = learned(pictures)
    before = bank_of(model)
    np.savez(tmp_path / "memory_bank.npz", embeddings=before.embeddings.numpy())
    patchcore.load(model, tmp_path / "memory_bank.npz")
    assert bank_of(model).coverage_radius == pytest.approx(before.coverage_radius, rel=0.2)
    patchcore.update(model, settings(), [pictures], Training(), QUIET)
    assert len(bank_of(model).embeddings) <= 1.2 * len(before.embeddings)


def test_new_normals_score_lower_after_an_update_and_known_ones_no_higher() -> None:
    known, new = parts(1, 2, 3), darker(parts(4, 5, 6))
    model = learned(known)
    known_before, new_before = patchcore.scores(model, [known]), patchcore.scores(model, [new])
    patchcore.update(model, settings(), [new], Training(), QUIET)
    assert (patchcore.scores(model, [new]) < 0.8 * new_before).all()
    # The distance can only fall; the weight of the neighbourhood moves by a little.
    assert (patchcore.scores(model, [known]) <= 1.1 * known_before).all()


def test_learning_from_no_image_is_refused() -> None:
    model = patchcore.build(settings(), "untrained")
    with pytest.raises(BadDataset, match="no usable training image"):
        patchcore.train(model, settings(), [], Training(), QUIET)


# ---- leaving pictures out ---------------------------------------------------------------------


def silent(done: int, total: int) -> None:
    """No progress."""


def lesson_of(pictures: Pictures, known: Pictures | None = None, **changes: Any) -> Lesson:
    """What is learned from pictures, on top of others where they are given."""
    meta = settings(**changes)
    model = patchcore.build(meta, "untrained")
    if known is None:
        return patchcore.train(model, meta, [pictures], Training(), QUIET)
    patchcore.train(model, meta, [known], Training(), QUIET)
    return patchcore.update(model, meta, [pictures], Training(), QUIET)


@pytest.mark.parametrize("updated", [False, True])
@pytest.mark.parametrize("together", [1, 2])
def test_left_out_a_picture_scores_as_if_its_part_had_never_been_learned(
    together: int, updated: bool
) -> None:
    pictures = parts(*range(6))
    new, known = (darker(pictures), pictures) if updated else (pictures, None)
    lesson, numbers = lesson_of(new, known), np.arange(6) // together
    found = lesson.scores(numbers, silent)
    never = []
    for number, picture in enumerate(new):
        same = numbers == numbers[number]
        [judged] = lesson.judge(picture[None], np.flatnonzero(same))
        assert judged == pytest.approx(found[number], rel=1e-4)
        others = lesson_of(new[~same], known)
        never += patchcore.scores(others.model, [picture[None]]).tolist()
    np.testing.assert_allclose(found, never, rtol=0.15)
    assert found.mean() == pytest.approx(np.mean(never), rel=0.04)


@pytest.mark.parametrize("updated", [False, True])
@pytest.mark.parametrize("half_counts", [False, True])
def test_leaving_out_scores_as_by_a_bank_that_comparing_all_with_all_makes(
    updated: bool, half_counts: bool
) -> None:
    model = patchcore.build(settings(), "untrained")
    model.keep[: 8 if half_counts else 0] = 0
    counts = model.keep.bool().flatten()
    pictures, before = parts(*range(6)), None
    if updated:
        patchcore.train(model, settings(), [darker(parts(8, 9))], Training(), QUIET)
        before = bank_of(model).embeddings
    learn = patchcore.update if updated else patchcore.train
    lesson = learn(model, settings(), [pictures], Training(), QUIET)
    radius, of_rows = bank_of(model).coverage_radius, lesson.rows // len(counts)
    numbers = np.array([0, 0, 1, 2, 1, 3])
    found, expected = lesson.scores(numbers, silent), np.empty(6)
    for number in range(4):
        same = torch.from_numpy(np.flatnonzero(numbers == number))
        stays = ~torch.isin(of_rows, same)
        bank = lesson.embeddings.flatten(0, 1)[lesson.rows[stays]]
        bank = bank if before is None else torch.cat([before, bank])
        others = [one for one in range(6) if one not in same.tolist()]
        patches = lesson.embeddings[others][:, counts].flatten(0, 1)
        away = torch.cdist(patches.double(), bank.double()).amin(dim=1).float()
        uncovered, away = patches[away > radius], away[away > radius]
        if len(uncovered):
            count = int(stays.logical_not().count_nonzero())
            chosen = k_centre_greedy(uncovered, count, covered_to=away, stop_radius=radius).chosen
            bank = torch.cat([bank, uncovered[chosen]])
        with torch.inference_mode():
            expected[same] = model.judge(lesson.embeddings[same], bank)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert updated or len(uncovered)


def test_what_was_left_out_before_tells_nothing_of_what_is_left_out_now() -> None:
    """Also where the second picture has no row, so that the same rows are out."""
    lesson = lesson_of(parts(*range(8)), coreset_ratio=0.002)
    has_rows = set((lesson.rows // 256).tolist())
    one, other = min(has_rows), min(set(range(8)) - has_rows)
    picture, both = parts(other), np.array(sorted([one, other]))
    fresh = lesson_of(parts(*range(8)), coreset_ratio=0.002).judge(picture, both)
    lesson.judge(picture, np.array([one]))
    assert lesson.judge(picture, both) == pytest.approx(fresh, rel=1e-6)
    lesson.judge(picture, np.array([one]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patchcore, "k_centre_greedy", full_memory)
        with pytest.raises(MemoryError):
            lesson.judge(picture, both)
    assert lesson.judge(picture, both) == pytest.approx(fresh, rel=1e-6)


def full_memory(*arguments: Any, **keywords: Any) -> None:
    raise MemoryError


def features(count: int, seed: int) -> torch.Tensor:
    """Embeddings (count, 20, 16) of pictures that are much alike."""
    random = torch.Generator().manual_seed(seed)
    alike = torch.randn(1, 20, 16, generator=torch.Generator().manual_seed(0))
    return alike + 0.1 * torch.randn(count, 20, 16, generator=random)


@pytest.mark.parametrize("seed", range(1, 7))
def test_a_patch_out_of_all_proportion_hides_no_other_picture(seed: int) -> None:
    """Beside it the others seem to be covered: the coverage radius is rounded to 0."""
    model, embeddings = patchcore.build(settings(), "untrained"), features(6, seed)
    model.keep = torch.ones(4, 5)
    embeddings[5, 3] *= 1000
    with torch.inference_mode():
        lesson = patchcore.learn(model, settings(coreset_ratio=0.5), embeddings, None, QUIET)
        found = lesson.scores(np.arange(6), silent)
        for number, embedding in enumerate(embeddings):
            expected = lesson._without(np.array([number])).score(embedding)
            assert found[number] == pytest.approx(expected, rel=1e-5)


def test_an_update_covers_as_it_says_also_where_features_lie_far_from_zero() -> None:
    model, meta = patchcore.build(settings(), "untrained"), settings(coreset_ratio=0.3)
    model.keep = torch.ones(4, 5)
    known, new = 1000 + features(6, 1), 1000 + features(6, 2)
    with torch.inference_mode():
        patchcore.learn(model, meta, known, None, QUIET)
        patchcore.learn(model, meta, new, bank_of(model), QUIET)
    bank = bank_of(model)
    away = torch.cdist(new.flatten(0, 1).double(), bank.embeddings.double()).amin(dim=1)
    assert float(away.max()) <= 1.01 * bank.coverage_radius


def test_without_its_rows_alone_the_bank_would_have_holes_that_raise_the_scores() -> None:
    pictures = parts(*range(6))
    lesson = lesson_of(pictures)
    found, bank, with_holes = lesson.scores(np.arange(6), silent), bank_of(lesson.model), []
    for number, picture in enumerate(pictures):
        kept = bank.embeddings[lesson.rows // 256 != number]
        lesson.model.bank = Bank(kept, bank.coverage_radius)
        with_holes += patchcore.scores(lesson.model, [picture[None]]).tolist()
    assert (found <= 1.0001 * np.array(with_holes)).all()
    assert found.mean() < 0.95 * np.mean(with_holes)


def test_left_out_pictures_score_as_new_ones_do_and_learned_ones_lower() -> None:
    pictures = parts(*range(8))
    lesson = lesson_of(pictures)
    left_out, new = lesson.scores(np.arange(8), silent), parts(*range(20, 28))
    learned_ones = patchcore.scores(lesson.model, [pictures])
    assert left_out.mean() == pytest.approx(patchcore.scores(lesson.model, [new]).mean(), rel=0.2)
    assert learned_ones.max() < 0.9 * left_out.min()


def test_a_bank_of_one_row_or_of_one_part_spares_none() -> None:
    pictures = parts(1, 2, 3)
    assert lesson_of(pictures).can_spare(np.arange(3))
    assert not lesson_of(pictures).can_spare(np.zeros(3, np.int64))
    assert not lesson_of(pictures, coreset_ratio=1e-5).can_spare(np.arange(3))
    assert not lesson_of(pictures[:1]).can_spare(np.arange(1))
    assert lesson_of(pictures[:1], known=darker(pictures)).can_spare(np.arange(1))


def test_an_update_that_brings_no_row_is_judged_by_what_was_known() -> None:
    pictures = parts(1, 2, 3)
    lesson = lesson_of(pictures, known=pictures)
    nobody = torch.full_like(lesson.owners, -1)
    lesson = replace(lesson, rows=lesson.rows[:0], owners=nobody)
    assert lesson.before is not None
    lesson.model.bank = lesson.before
    expected = patchcore.scores(lesson.model, [pictures])
    np.testing.assert_allclose(lesson.scores(np.zeros(3, np.int64), silent), expected, rtol=1e-4)


def test_keeping_some_makes_the_bank_of_these_alone() -> None:
    pictures, kept = parts(1, 2, 3, 4), np.array([0, 2, 3])
    lesson = lesson_of(pictures)
    smaller, other = lesson.keeping(kept, QUIET), lesson_of(pictures[kept])
    torch.testing.assert_close(
        bank_of(lesson.model).embeddings, bank_of(other.model).embeddings, rtol=1e-4, atol=1e-4
    )
    assert smaller.pictures.tolist() == [0, 1, 2]
    np.testing.assert_allclose(
        smaller.scores(np.arange(3), silent), other.scores(np.arange(3), silent), rtol=1e-3
    )


def test_what_other_pictures_look_like_is_said_in_the_same_terms() -> None:
    pictures = parts(1, 2, 3)
    lesson = lesson_of(pictures)
    np.testing.assert_allclose(lesson.describe(pictures), lesson.descriptors(), atol=1e-4)


# ---- files -----------------------------------------------------------------------------------


def test_what_is_saved_scores_the_same_when_it_is_loaded(tmp_path: Path) -> None:
    model, unseen = learned(parts(1, 2)), parts(5, 6)
    assert patchcore.save(model, settings(), tmp_path) == ["model.pth", "memory_bank.npz"]
    again = patchcore.build(settings(), tmp_path / "model.pth")
    patchcore.load(again, tmp_path / "memory_bank.npz")
    np.testing.assert_array_equal(
        patchcore.scores(again, [unseen]), patchcore.scores(model, [unseen])
    )
    assert bank_of(again).coverage_radius == pytest.approx(bank_of(model).coverage_radius)


def test_a_bank_of_other_channels_is_refused_in_words(tmp_path: Path) -> None:
    write_bank(tmp_path / "bank.npz", np.ones((5, 128), np.float32), 1.0)
    with pytest.raises(BadBundle, match=r"bank\.npz does not fit.*128 channels.*make 384"):
        patchcore.load(patchcore.build(settings(), "untrained"), tmp_path / "bank.npz")


# ---- backbones -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "layers", "says"),
    [
        ("resnet81", ["layer2"], r"no backbone named 'resnet81'.*Did you mean .*resnet"),
        ("", ["layer2"], "no backbone named"),
        ("resnet18", ["layer2", "layer9"], r"no layer layer9: it has .*layer1, layer2, layer3"),
        ("mobilenetv2_100", ["layer2"], r"no layer layer2: it has blocks\.0"),
        ("vit_tiny_patch16_224", ["blocks.3", "blocks.12"], r"no layer blocks\.12.*blocks\.11"),
        ("vit_tiny_patch16_224", ["layer2"], r"no layer layer2: it has blocks\.0"),
        ("mobilevit_xxs", ["blocks.2"], r"mobilevit_xxs is none: choose another"),
    ],
)
def test_a_backbone_or_layer_that_is_not_there_is_refused_and_says_what_is(
    backbone: str, layers: list[str], says: str
) -> None:
    with pytest.raises(BadMeta, match=says):
        extractor(backbone, layers, "untrained")


def test_a_backbone_that_takes_one_size_only_refuses_others_in_words() -> None:
    meta = settings(backbone="mixer_s32_224", layers=["blocks.3"], image_size=256)
    with pytest.raises(BadMeta, match=r"mixer_s32_224 cannot take images of 256 x 256"):
        patchcore.build(meta, "untrained")


def test_untrained_is_the_same_every_time_and_leaves_the_random_state_alone() -> None:
    torch.manual_seed(1)
    first = extractor("resnet18", LAYERS, "untrained").state_dict()
    drawn_after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn_after)
    second = extractor("resnet18", LAYERS, "untrained").state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("layers", [["layer2", "layer3"], ["layer3", "layer2"]])
def test_as_in_anomalib_every_layer_is_pooled_and_stretched_to_the_first(layers: list[str]) -> None:
    seen = torch.from_numpy(parts(3))
    model = patchcore.build(settings(layers=layers), "untrained")
    features = model.features(model.normalise(seen))
    first, other = (functional.avg_pool2d(features[one], 3, 1, 1) for one in layers)
    other = functional.interpolate(other, size=first.shape[-2:], mode="bilinear")
    expected = torch.cat([first, other], 1).flatten(2).transpose(1, 2)
    torch.testing.assert_close(model.embed(seen)[0], expected)


def test_a_place_counts_beside_those_around_it_as_much_as_its_weight_says() -> None:
    seen = torch.from_numpy(parts(3))
    around, centre, between = (
        patchcore.build(settings(layers=["layer2"], centre_weight=weight), "untrained").embed(seen)[
            0
        ]
        for weight in (None, 1, 0.4)
    )
    model = patchcore.build(settings(layers=["layer2"]), "untrained")
    itself = model.features(model.normalise(seen))["layer2"].flatten(2).transpose(1, 2)
    torch.testing.assert_close(centre, itself)
    assert not torch.allclose(around, itself, rtol=0.1)
    torch.testing.assert_close(between, 0.4 * itself + 0.6 * around)


def test_features_are_raised_to_the_power_and_keep_their_sign() -> None:
    seen = torch.from_numpy(parts(3))
    # A last block of mobilenetv2 ends without a ReLU, so that features have both signs.
    mobile = {"backbone": "mobilenetv2_100", "layers": ["blocks.2"], "centre_weight": 1}
    plain, raised = (
        patchcore.build(settings(**mobile, feature_power=power), "untrained").embed(seen)[0]
        for power in (None, 0.7)
    )
    assert (plain < 0).any()
    assert (plain > 0).any()
    torch.testing.assert_close(raised, plain.sign() * plain.abs() ** 0.7, rtol=1e-2, atol=2e-3)


def test_no_picture_makes_a_feature_that_is_no_number() -> None:
    model = patchcore.build(settings(centre_weight=0.4, feature_power=0.3), "untrained")
    for picture in (np.zeros((1, 128, 128, 3), np.uint8), np.full((1, 128, 128, 3), 255, np.uint8)):
        assert torch.isfinite(model.embed(torch.from_numpy(picture))[0]).all()


def test_a_grid_of_an_older_build_is_refused_with_what_to_do() -> None:
    with pytest.raises(BadMeta, match="names a `grid`, which is no more: learn all pictures anew"):
        patchcore.build(settings(grid="layer2"), "untrained")


@pytest.mark.parametrize("opset", [17, 18])
@pytest.mark.parametrize(
    "changes",
    [
        {"backbone": "mobilenetv2_100", "layers": ["blocks.1", "blocks.2"]},
        FIRST,
        {"backbone": "vit_tiny_patch16_224", "layers": ["blocks.3", "blocks.6"], "image_size": 224},
    ],
    ids=lambda changes: changes["backbone"],
)
def test_other_backbones_work_from_pictures_to_a_graph_that_agrees(
    tmp_path: Path, changes: dict[str, Any], opset: Opset
) -> None:
    meta = settings(**{**changes, "image_size": changes.get("image_size", 128)})
    size = meta.image_size
    model = patchcore.build(meta, "untrained")
    patchcore.train(model, meta, [parts(1, 2, size=size)], Training(), QUIET)
    unseen = np.concatenate([parts(5, size=size), parts(6, defect="stain", size=size)])
    expected = patchcore.scores(model, [unseen])
    assert (expected > 0).all()
    bank = bank_of(model).embeddings.numpy()
    graph, inputs = patchcore.graph(model, half=False)
    export_onnx(graph, inputs, tmp_path / "model.onnx", opset)
    report = parity(tmp_path / "model.onnx", expected, unseen, bank, meta, precision="f32")
    assert report["onnx"]["max_relative"] <= FLOAT32_LIMIT
    assert report["openvino_f32"]["max_relative"] <= FLOAT32_LIMIT


# ---- weights ---------------------------------------------------------------------------------


def resnet18() -> State:
    """Weights that are not those of `untrained`, under timm's names."""
    torch.manual_seed(7)
    state: State = timm.create_model("resnet18", pretrained=False).state_dict()
    return state


def as_pth(path: Path) -> State:
    state = resnet18()
    torch.save(state, path)
    return state


def as_safetensors(path: Path) -> State:
    state = resnet18()
    save_file(state, path)
    return state


def as_half_precision(path: Path) -> State:
    state = {name: value.half().to(value.dtype) for name, value in resnet18().items()}
    save_file({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, path)
    return state


def as_torchvision(path: Path) -> State:
    torch.manual_seed(8)
    state: State = torchvision.models.resnet18(weights=None).state_dict()
    torch.save(state, path)
    return state


def as_data_parallel(path: Path) -> State:
    state = resnet18()
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, path)
    return state


def as_anomalibs_torch_model(path: Path) -> State:
    torch.manual_seed(9)
    model = PatchcoreModel(layers=LAYERS, backbone="resnet18", pre_trained=False)
    torch.save(model.state_dict(), path)
    state: State = model.feature_extractor.feature_extractor.state_dict()
    return state


def as_lightning_checkpoint(path: Path) -> State:
    """Written by Lightning's own trainer, with hyper-parameters that are objects."""
    from anomalib.models import Patchcore
    from anomalib.pre_processing import PreProcessor
    from lightning.pytorch import Trainer

    torch.manual_seed(10)
    model = Patchcore(
        backbone="resnet18",
        layers=LAYERS,
        pre_trained=False,
        pre_processor=PreProcessor(torchvision.transforms.v2.Resize((256, 256))),
    )
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", **quiet)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path)
    state: State = model.model.feature_extractor.feature_extractor.state_dict()
    return state


def as_our_own(path: Path) -> State:
    other = path.with_suffix(".other")
    state = as_pth(other)
    patchcore_model = patchcore.build(settings(), other)
    patchcore_model.bank = Bank(torch.ones(1, 384), 1.0)
    patchcore.save(patchcore_model, settings(weights_pth=path.name), path.parent)
    return state


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (as_pth, "weights.pth"),
        (as_safetensors, "weights.safetensors"),
        (as_half_precision, "half.safetensors"),
        (as_torchvision, "torchvision.pth"),
        (as_data_parallel, "parallel.pth"),
        (as_anomalibs_torch_model, "anomalib.pt"),
        (as_lightning_checkpoint, "lightning.ckpt"),
        (as_our_own, "model.pth"),
    ],
)
def test_weights_of_any_make_arrive_unchanged(
    tmp_path: Path, make: Callable[[Path], State], name: str
) -> None:
    expected = make(tmp_path / name)
    found = extractor("resnet18", LAYERS, tmp_path / name).feature_extractor.state_dict()
    untrained = extractor("resnet18", LAYERS, "untrained").feature_extractor.state_dict()
    weights = [key for key in found if "num_batches_tracked" not in key]
    assert len(weights) > 60
    assert all(torch.equal(found[key], expected[key]) for key in weights)
    assert not torch.equal(found["conv1.weight"], untrained["conv1.weight"])


@pytest.mark.parametrize(
    ("backbone", "layers"),
    [
        ("convnext_atto", ["stages.1"]),  # timm renames stages.1 to stages_1 when it cuts
        ("mobilenetv2_100", ["blocks.1", "blocks.2"]),
        ("vit_tiny_patch16_224", ["blocks.3"]),
    ],
)
def test_weights_of_other_backbones_arrive_unchanged(
    tmp_path: Path, backbone: str, layers: list[str]
) -> None:
    torch.manual_seed(3)
    # Ten classes: somebody's own task, whose classifier nobody needs here.
    whole = timm.create_model(backbone, pretrained=False, num_classes=10).eval()
    torch.save(whole.state_dict(), tmp_path / "weights.pth")
    module = extractor(backbone, layers, tmp_path / "weights.pth")
    expected = {name.replace(".", "_"): value for name, value in whole.state_dict().items()}
    found = module.feature_extractor.state_dict()
    assert all(
        torch.equal(value, expected[name.replace(".", "_")]) for name, value in found.items()
    )


def without(name: str) -> State:
    return {key: value for key, value in resnet18().items() if key != name}


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (lambda: without("layer2.0.conv1.weight"), r"has no layer2\.0\.conv1\.weight"),
        (lambda: {**resnet18(), "bn1.bias": torch.ones(5)}, r"bn1\.bias is \(5,\).*\(64,\)"),
        (
            lambda: {**resnet18(), "layer1.0.conv1.weight": torch.full((64, 64, 3, 3), torch.nan)},
            r"layer1\.0\.conv1\.weight holds values that are not finite",
        ),
        (lambda: timm.create_model("resnet50", pretrained=False).state_dict(), "does not fit"),
        (lambda: {"epoch": 3}, "holds no weights"),
        (lambda: [torch.ones(3)], "holds no weights"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, state: Callable[[], Any], says: str
) -> None:
    torch.save(state(), tmp_path / "weights.pth")
    with pytest.raises(BadWeights, match=says):
        extractor("resnet18", LAYERS, tmp_path / "weights.pth")


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_a_damaged_file_of_weights_is_refused_by_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    (as_pth if name.endswith("pth") else as_safetensors)(path)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:20], b"", b"not weights at all"):
        path.write_bytes(damaged)
        with pytest.raises(BadWeights, match=name):
            extractor("resnet18", LAYERS, path)


def test_weights_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadWeights, match=r"gone\.pth does not exist: --pretrained_pth"):
        extractor("resnet18", LAYERS, tmp_path / "gone.pth")


class Code:
    """Unpickles as a call, as an attacker writes it."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def attacks(marker: Path) -> dict[str, Code]:
    return {
        "shell": Code(os.system, f"touch {marker}"),
        "exec": Code(builtins.exec, f"open({str(marker)!r}, 'w')"),
        "open": Code(builtins.open, str(marker), "w"),
        "attribute": Code(builtins.getattr, Code(os.system, f"touch {marker}"), "real"),
        # A call that hides behind a module whose objects checkpoints carry for good reasons.
        "method": Code(Path.touch, marker),
    }


@pytest.mark.parametrize("attack", ["shell", "exec", "open", "attribute", "method"])
@pytest.mark.parametrize("plain", [False, True], ids=["torch.save", "pickle"])
def test_code_in_a_file_of_weights_is_never_run(tmp_path: Path, attack: str, plain: bool) -> None:
    marker = tmp_path / "it_ran"
    content = {"state_dict": resnet18(), "hyper_parameters": attacks(marker)[attack]}
    path = tmp_path / "weights.pth"
    if plain:
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(BadWeights, match=r"weights\.pth"):
        extractor("resnet18", LAYERS, path)
    assert not marker.exists()
    # The proof that the file is an attack: who trusts it, runs it.
    if plain:
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert marker.exists()


def test_objects_beside_the_weights_are_never_made_even_where_they_are_expected(
    tmp_path: Path,
) -> None:
    marker = tmp_path / "it_ran"
    content = {"state_dict": resnet18(), "hyper_parameters": {"root": Code(Path.mkdir, marker)}}
    torch.save(content, tmp_path / "weights.ckpt", pickle_protocol=4)
    with contextlib.suppress(BadWeights):
        extractor("resnet18", LAYERS, tmp_path / "weights.ckpt")
    assert not marker.exists()
    torch.load(tmp_path / "weights.ckpt", weights_only=False)
    assert marker.exists()
