"""What a search is asked for, and the hyper-parameters that its trials draw from."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import optuna

from engines.errors import BadWeights
from engines.image import DEFAULT_LIMITS, ImageLimits
from engines.meta import Meta
from workers import models

UNTRAINED = "untrained"  # as in workers.models.backbone, which takes seconds to load

CORESET_RATIO = (0.01, 0.25)
MOST_ROWS = 10_000  # of a bank, but the start's own: more take minutes to choose, and serve slowly
FEWEST_FEATURES = 16
LATENT_DIMS = (16, 32, 64, 128, 256)
MODEL_SIZES = ("small", "medium")
LEARNING_RATE_FACTOR = 10.0  # up and down from the kind's own
STRIDES = range(4, 17)  # pixels between the features of a stage; others are too fine or too coarse
MOST_STAGES = 3  # of a backbone; of a transformer, whose blocks all have one stride, a few

WITH_BACKBONE = ("patchcore", "padim")


@dataclass(frozen=True)
class Tune:
    """What to search: the flags of tune.py."""

    model: str
    meta_json: Path
    category: str
    data_root: Path
    out_dir: Path
    trials: int = 20
    pretrained_pth: str | None = None
    backbones: list[str] = field(default_factory=list)  # "name" or "name=weights"
    image_sizes: list[int] = field(default_factory=list)  # pixels
    epochs: int = 1
    batch: int = 4
    timeout: float | None = None  # seconds
    penalty_dir: Path | None = None
    regions: Path | None = None  # as for retrain.py
    limits: ImageLimits = DEFAULT_LIMITS  # of pictures

    @property
    def never(self) -> Path | None:
        """The mask of what never counts: as asked, or as the start has it."""
        named = Meta.read(self.meta_json).regions
        return self.regions or (None if named is None else self.meta_json.with_name(named))


class Stage(NamedTuple):
    """A layer of a backbone that features can be taken from."""

    layer: str
    channels: int
    stride: int  # pixels of the image between two features


@dataclass(frozen=True)
class Space:
    """The values that trials draw from. The start's own are always among them."""

    start: Meta
    images: int  # that are learned
    weights: dict[str | None, str | None]  # of each backbone; None for kinds without one
    stages: dict[str, list[Stage]]  # of each backbone
    image_sizes: list[int]
    model_sizes: list[str]  # that there is a teacher for
    learning_rate: float | None  # of the start; None for kinds without one

    @classmethod
    def of(cls, request: Tune, start: Meta, images: int) -> Space:
        """Find out what can be searched with so many training images.

        Raises:
            BadMeta: timm does not know a backbone.
            BadWeights: there are no weights for one of `backbones`.
        """
        weights: dict[str | None, str | None] = {start.backbone: request.pretrained_pth}
        for word in request.backbones:
            name, _, file = word.partition("=")
            if name != start.backbone:
                weights[name] = file or (UNTRAINED if request.pretrained_pth == UNTRAINED else None)
        stages = {str(name): _stages(str(name)) for name in weights if start.model in WITH_BACKBONE}
        for backbone in stages:
            if backbone != start.backbone:
                _check_weights(backbone, stages[backbone], weights[backbone])
        return cls(
            start,
            images,
            weights,
            stages,
            sorted({start.image_size, *request.image_sizes}),
            _model_sizes(start, request.pretrained_pth),
            start.learning_rate or getattr(models.module(start.model), "LEARNING_RATE", None),
        )

    def first(self) -> dict[str, Any]:
        """The start, as `draw` names its parameters."""
        return {
            "image_size": self.start.image_size,
            "backbone": self.start.backbone,
            f"layers of {self.start.backbone}": "+".join(self.start.layers or []),
            "coreset_ratio": self.start.coreset_ratio,
            "n_features": self.start.n_features,
            "model_size": self.start.model_size,
            "latent_dim": self.start.latent_dim,
            "learning_rate": self.learning_rate,
        }

    def draw(self, trial: optuna.Trial) -> dict[str, Any]:
        """Values for the keys of meta.json that are searched."""
        start, kind = self.start, self.start.model
        values: dict[str, Any] = {}
        image_size = trial.suggest_categorical("image_size", self.image_sizes)
        if kind in WITH_BACKBONE:
            backbone = trial.suggest_categorical("backbone", list(self.stages))
            choices = self.layer_choices(backbone)
            chosen = trial.suggest_categorical(f"layers of {backbone}", choices)
            values |= {"backbone": backbone, "layers": chosen.split("+")}
        if kind == "patchcore":
            assert start.coreset_ratio is not None, "Meta requires it of a patchcore model"
            low, high = self.coreset_range(backbone, values["layers"], image_size)
            drawn = trial.suggest_float("coreset_ratio", low, high, log=True)
            values["coreset_ratio"] = _rounded(drawn, start.coreset_ratio)
        if kind == "padim":
            most = self.most_features(backbone, values["layers"], image_size)
            fewest = min(FEWEST_FEATURES, most)
            values["n_features"] = trial.suggest_int("n_features", fewest, most, log=True)
        if kind == "efficientad":
            values["model_size"] = trial.suggest_categorical("model_size", self.model_sizes)
        if kind == "vae":
            assert start.latent_dim is not None, "Meta requires it of a vae"
            fresh = self.weights[start.backbone] in (
                None,
                UNTRAINED,
            )  # a file holds weights of one size
            sizes = sorted({start.latent_dim, *(LATENT_DIMS if fresh else ())})
            values["latent_dim"] = trial.suggest_categorical("latent_dim", sizes)
        if self.learning_rate is not None:
            usual = models.module(kind).LEARNING_RATE
            low = min(usual / LEARNING_RATE_FACTOR, self.learning_rate)
            high = max(usual * LEARNING_RATE_FACTOR, self.learning_rate)
            drawn = trial.suggest_float("learning_rate", low, high, log=True)
            values["learning_rate"] = _rounded(drawn, self.learning_rate)
        return {**values, "image_size": image_size}

    def layer_choices(self, backbone: str) -> list[str]:
        """Runs of neighbouring stages, as "layer2+layer3": in the middle of the network, where
        features are neither edges nor whole objects (arXiv:2106.08265, section 3.1)."""
        stages = self.stages[backbone]
        middle = [stage.layer for stage in stages if stage.stride in STRIDES]
        names = middle or [stage.layer for stage in stages]
        if len(names) > MOST_STAGES:
            part = len(names) / MOST_STAGES
            names = [names[int((index + 0.5) * part)] for index in range(MOST_STAGES)]
        count = len(names)
        runs = ["+".join(names[i:j]) for i in range(count) for j in range(i + 1, count + 1)]
        own = "+".join(self.start.layers or [])
        return runs if backbone != self.start.backbone or own in runs else [*runs, own]

    def coreset_range(
        self, backbone: str, layers: list[str], image_size: int
    ) -> tuple[float, float]:
        """The least and the most coreset_ratio. Fine layers make too many rows of a large one."""
        low, high = CORESET_RATIO
        patches = self.images * self.positions(backbone, layers, image_size)
        high = max(low, min(high, MOST_ROWS / patches))
        own = self.start.coreset_ratio
        of_start = (self.start.backbone, self.start.layers, self.start.image_size)
        if own is not None and (backbone, layers, image_size) == of_start:
            return min(low, own), max(high, own)
        return low, high

    def most_features(self, backbone: str, layers: list[str], image_size: int) -> int:
        """n_features at most: the channels there are, and the statistics that PaDiM allows."""
        from workers.models.padim import LARGEST_MIB

        channels = sum(stage.channels for stage in self.stages[backbone] if stage.layer in layers)
        fits = math.isqrt(LARGEST_MIB * 2**20 // (4 * self.positions(backbone, layers, image_size)))
        return max(1, min(channels, fits))

    def positions(self, backbone: str, layers: list[str], image_size: int) -> int:
        """Patches of an image; 1 where there is no such layer, which the training will say."""
        strides = [stage.stride for stage in self.stages[backbone] if stage.layer == layers[0]]
        return math.ceil(image_size / strides[0]) ** 2 if strides else 1


def _rounded(drawn: float, start: float) -> float:
    """With three digits, but for the start's own."""
    return drawn if drawn == start else float(f"{drawn:.3g}")


def _stages(backbone: str) -> list[Stage]:
    from workers.models.backbone import feature_info

    return [
        Stage(info["module"], info["num_chs"], info["reduction"]) for info in feature_info(backbone)
    ]


def _check_weights(backbone: str, stages: list[Stage], weights: str | None) -> None:
    """Raise now, and not in each trial, where a backbone has no weights."""
    from workers.models.backbone import extractor

    try:
        extractor(backbone, [stages[-1].layer], weights)
    except BadWeights as error:
        raise BadWeights(f"{error} In --backbones, {backbone}=F names a file.") from error


def _model_sizes(start: Meta, weights: str | None) -> list[str]:
    """The sizes that there is a teacher for; the start's first, whether there is or not."""
    if start.model_size is None:
        return []
    sizes: list[str] = [start.model_size]
    for size in MODEL_SIZES if weights in (None, UNTRAINED) else ():  # a file is of one size
        with suppress(BadWeights):
            if size not in sizes:
                models.module(start.model).build(start.with_(model_size=size), weights)
                sizes.append(size)
    return sizes
