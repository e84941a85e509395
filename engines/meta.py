"""meta.json: what a model is, and how its scores are judged. All four kinds, old files too."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from engines.errors import BadMeta, Unreadable
from engines.files import write_atomically

Kind = Literal["patchcore", "padim", "efficientad", "vae"]

FORMAT = 1
_MOST = 1e38  # of a raw score, which is a float32; the difference of two is one, too

# What a first model is where nobody says otherwise; docs/models.md says how it was chosen.
FIRST: dict[str, Any] = {
    "model": "patchcore",
    "backbone": "tf_efficientnet_lite0",
    "layers": ["blocks.2", "blocks.4"],
    "centre_weight": 0.3,
    "feature_power": 0.7,
    "coreset_ratio": 0.1,
    "image_size": 256,
}

# The key that only one kind of model has: how a file without `model` says what it is.
_TELLTALE: dict[str, Kind] = {
    "coreset_ratio": "patchcore",
    "n_features": "padim",
    "model_size": "efficientad",
    "latent_dim": "vae",
}
_REQUIRED: dict[Kind, tuple[str, ...]] = {
    "patchcore": ("backbone", "layers", "coreset_ratio"),
    "padim": ("backbone", "layers", "n_features"),
    "efficientad": ("model_size",),
    "vae": ("latent_dim",),
}
_OLD_NAMES = {"image_min": "raw_image_min", "image_max": "raw_image_max"}  # older PaDiM files


# What the features follow from that a bank or statistics were learned with, and what absent means.
FEATURES = {"backbone": None, "layers": None, "centre_weight": 0, "feature_power": 1, "grid": None}


def other_features(before: Meta, now: Meta) -> tuple[str, str, str] | None:
    """A key by which two models see other features, and what it was and is; None: none does."""
    for key, absent in FEATURES.items():
        was, is_now = (getattr(meta, key, None) or absent for meta in (before, now))
        if was != is_now:
            return key, json.dumps(was), json.dumps(is_now)
    return None


def of_kind(keys: dict[str, Any]) -> Kind | None:
    """The kind of model that alone has one of these keys; None where they do not say it."""
    kinds = [kind for key, kind in _TELLTALE.items() if key in keys]
    return kinds[0] if len(kinds) == 1 else None


class Meta(BaseModel):
    """One meta.json. Keys it does not know are kept and written back."""

    model_config = ConfigDict(
        extra="allow", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )

    model: Kind
    format: int = Field(FORMAT, ge=1, le=FORMAT)
    backbone: str | None = None
    layers: list[str] | None = Field(None, min_length=1)
    centre_weight: float | None = Field(None, ge=0, le=1)  # PatchCore: see its `embed`; absent: 0
    feature_power: float | None = Field(None, gt=0, le=1)  # the same; absent: 1
    coreset_ratio: float | None = Field(None, gt=0, le=1)
    n_features: int | None = Field(None, ge=1)
    channel_choice: Literal["random", "steady"] | None = None  # of n_features; random if absent
    channel_seed: int | None = Field(None, ge=0)  # of the random choice; 0 if absent
    model_size: Literal["small", "medium"] | None = None
    latent_dim: int | None = Field(None, ge=1)
    learning_rate: float | None = Field(None, gt=0)
    decay_at: float | None = Field(None, gt=0, le=1)  # then a tenth of the rate
    image_size: int = Field(ge=32, le=4096)
    bit_depth: int | None = Field(None, ge=8, le=16)  # of 16-bit images, found in training
    resize: Literal["each_axis"] | None = None  # see `engines.image.resize`; absent in older files
    weights_pth: str = "model.pth"
    memory_bank: str | None = None
    stats: str | None = None
    regions: str | None = None  # a PNG of the pixels that never count; see engines.store.regions
    image_threshold: float = Field(0.5, ge=0, le=1)  # set by hand, on the normalised score
    image_threshold_auto: float | None = None  # found by verification, on the raw score
    raw_image_min: float | None = None
    raw_image_max: float | None = None
    score_kind: str | None = None
    calibration: dict[str, Any] | None = None
    camera: dict[str, Any] | None = None  # what its pictures look like; see `engines.camera`
    files: dict[str, str] | None = None  # file name -> SHA-256 of the files written with this one

    @model_validator(mode="before")
    @classmethod
    def _understand_old_files(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            raise ValueError("it must be a JSON object")
        data = dict(data)
        for old, new in _OLD_NAMES.items():
            if old in data:
                data.setdefault(new, data.pop(old))
        if "model" not in data:
            kind = of_kind(data)
            if kind is None:
                raise ValueError(
                    "cannot tell which model it describes: it needs `model`,"
                    f" or one of {', '.join(_TELLTALE)}"
                )
            data["model"] = kind
        if data["model"] == "patchcore":
            data.setdefault("memory_bank", "memory_bank.npz")
        if data["model"] == "padim":
            data.setdefault("stats", "stats.npz")
        return data

    @model_validator(mode="after")
    def _check(self) -> Meta:
        missing = [key for key in _REQUIRED[self.model] if getattr(self, key) is None]
        if missing:
            raise ValueError(f"a {self.model} model also needs {', '.join(missing)}")
        for key in ("centre_weight", "feature_power"):
            if self.model != "patchcore" and getattr(self, key) is not None:
                raise ValueError(f"{key} is for a patchcore model, not for a {self.model} model")
        low, high = self.raw_image_min, self.raw_image_max
        if low is not None and high is not None and low >= high:
            raise ValueError(f"raw_image_min ({low}) must be less than raw_image_max ({high})")
        return self

    @field_validator("weights_pth", "memory_bank", "stats", "regions", "files")
    @classmethod
    def _plain_names(cls, names: Any) -> Any:
        for name in names if isinstance(names, dict) else [names]:
            if name is not None and (name in ("", ".", "..") or set(name) & set("/\\\0")):
                raise ValueError("must be a plain file name, without a folder")
        return names

    @field_validator("image_threshold_auto", "raw_image_min", "raw_image_max")
    @classmethod
    def _raw_scores(cls, value: float | None) -> float | None:
        if value is not None and abs(value) > _MOST:  # a limit that is NaN rejects nothing
            raise ValueError(f"must be a raw score, from -{_MOST:g} to {_MOST:g}")
        return value

    @field_validator("calibration", "camera")
    @classmethod
    def _known_numbers(cls, value: Any) -> Any:
        return _without_nan(value)  # which no JSON holds, so it could not be said or written

    @field_validator("*", mode="before")
    @classmethod
    def _no_yes_or_no(cls, value: Any) -> Any:
        if isinstance(value, bool):  # which pydantic takes for 0 or 1
            raise ValueError("must not be true or false")
        return value

    @classmethod
    def read(cls, path: Path) -> Meta:
        """Read a meta.json.

        Raises:
            BadMeta: it is missing, is not JSON, or contradicts itself; the sentence says where.
            Unreadable: the system does not give it.
        """
        try:
            return cls.model_validate(json.loads(path.read_text(encoding="utf-8-sig")))
        except FileNotFoundError:
            raise BadMeta(f"{path} does not exist.") from None
        except OSError as error:
            Unreadable.check(path, error)
            raise BadMeta(f"{path} cannot be read: {error.strerror}.") from None
        except ValidationError as error:
            raise BadMeta(f"{path} is not a valid meta.json: {_first_problem(error)}.") from None
        except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or absurdly so
            raise BadMeta(f"{path} is not JSON: {error}.") from None

    @classmethod
    def parse(cls, content: dict[str, Any]) -> Meta:
        """The meta.json of these keys; BadMeta when they contradict themselves."""
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise BadMeta(f"meta.json would be wrong: {_first_problem(error)}.") from None

    def write(self, path: Path) -> None:
        """Write it in whole or not at all; known keys without a value are left out."""
        text = json.dumps(self._content(), indent=2, ensure_ascii=False)
        write_atomically(path, (text + "\n").encode())

    def with_(self, **changes: Any) -> Meta:
        """A copy with some keys changed, checked like a file that was read."""
        try:
            return Meta.model_validate({**self._content(), **changes})
        except ValidationError as error:
            raise BadMeta(f"meta.json would become invalid: {_first_problem(error)}.") from None

    def _content(self) -> dict[str, Any]:
        unknown = self.model_extra or {}
        return {
            key: value
            for key, value in self.model_dump().items()
            if value is not None or key in unknown
        }


def _without_nan(value: Any) -> Any:
    """The same with None, which is not known, for each number that is NaN or infinite."""
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    what = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {what}" if where else what
