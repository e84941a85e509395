"""What a job is asked for: the bodies of POST /retrain, /convert and /teacher."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from engines.errors import BadMeta, BadWeights
from engines.limits import LEAST_SHARE
from engines.meta import FEATURES, FIRST, Kind, Meta, of_kind, other_features
from engines.nvidia.library import TARGET, TARGETS
from engines.store.versions import NAME, NAME_LENGTH, Store, is_name

MAX_KEYS = 100  # that are unknown each get a line from pydantic, and hold Python's lock
MAX_META = 16 * 1024  # bytes as JSON: it stands in every list of jobs
FILE = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"  # in the folder weights of the data folder
META_LEVELS = 8  # of lists and objects in each other; a meta.json has two

JobKind = Literal["retrain", "convert", "teacher"]


def few_keys(content: Any) -> Any:
    """A body before it is validated; ValueError where it has more keys than any may have."""
    if isinstance(content, dict) and len(content) > MAX_KEYS:
        raise ValueError(f"it has {len(content):,} keys, more than {MAX_KEYS}")
    return content


def makes(request: Mapping[str, Any]) -> str:
    """The model, or the file of a teacher, that a job works on: no two at the same time."""
    return str(request.get("model") or request.get("teacher") or "")


class JobRequest(BaseModel):
    """What jobs have in common."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _is_short(cls, content: Any) -> Any:
        return few_keys(content)

    queue: bool = Field(
        False,
        description="Wait behind a job of the same model, or teacher, rather than be refused with"
        " 409.",
    )


class VersionRequest(JobRequest):
    """What jobs have in common that make a version of a model."""

    model: str = Field(
        pattern=NAME, max_length=NAME_LENGTH, description="The model's name in this server."
    )
    version: str | None = Field(
        None, description="The version to start from; without it, the live one, or the newest."
    )
    activate: bool = Field(
        True, description="Let the result go live when it passes the gate; else it is only kept."
    )
    max_flips: float | None = Field(
        None, ge=0, le=1, description="Instead of KENSA_GATE_FLIPS, for this job."
    )

    @field_validator("model")
    @classmethod
    def _is_name(cls, name: str) -> str:
        if not is_name(name):
            raise ValueError("it takes up to 64 letters, digits, - and _, each in its usual form")
        return name


def weights_in(data: Path, named: str | None) -> str | None:
    """The weights that `pretrained` names, in a data folder; None for the backbone's own.

    Raises:
        BadWeights: they are not there.
    """
    if named in (None, "untrained"):
        return named
    path = data / "weights" / str(named)
    if not path.is_file():
        raise BadWeights(f"{path} does not exist: put the weights there, or leave pretrained out.")
    return str(path)


class RetrainRequest(VersionRequest):
    """Learn from the images of a category, and put the result in the place of the live version."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": "my-part", "category": "my-part"}]}
    )

    category: str = Field(
        pattern=NAME, max_length=NAME_LENGTH, description="The dataset, as in /datasets."
    )
    kind: Kind | None = Field(
        None,
        description="For a first training; without it, PatchCore. To begin anew with a model whose"
        " versions were all held or rolled back from, say it.",
    )
    meta: dict[str, Any] = Field(
        default_factory=dict,
        description="Keys of meta.json that are to be otherwise: than in the version to start from,"
        " or, in a first training, than PatchCore's usual ones. Another kind needs all of its own.",
    )
    update: bool = Field(
        True,
        description="Keep what the model knows, and add to it; false learns anew. An EfficientAD or"
        " VAE goes on from its weights.",
    )
    pretrained: str | None = Field(
        None,
        pattern=FILE,
        description="For a first training: a file in the folder weights of the data folder, or the"
        " word untrained. Without it, pretrained ones: of an installed package, else timm's.",
    )
    epochs: int = Field(1, ge=1, le=10_000, description="Passes over the images.")
    batch: int = Field(4, ge=1, le=256, description="Images at once.")
    false_rejects: float | None = Field(
        None,
        ge=LEAST_SHARE,
        lt=1,
        description="The share of good parts that may be rejected: the threshold is found for it."
        " Without it, as in the version to start from, else 0.01.",
    )
    false_rejects_cap: float | None = Field(
        None,
        ge=LEAST_SHARE,
        lt=1,
        description="The share that may be rejected where that finds more of the known defects."
        " Without it, as in the version to start from, else 0.05.",
    )
    keep_strange: bool = Field(
        False,
        description="Learn pictures too that are unlike the others and unlike what is known."
        " Without it they are left out, and named in `images` of the job.",
    )
    convert: bool = Field(True, description="Make an engine of it; without one it cannot go live.")

    @field_validator("meta")
    @classmethod
    def _can_be_sent_back(cls, meta: dict[str, Any]) -> dict[str, Any]:
        if len(meta) > MAX_KEYS or _json_length(meta) > MAX_META:
            raise ValueError(f"it may have {MAX_KEYS} keys and {MAX_META:,} bytes as JSON")
        if not _is_plain(meta, META_LEVELS):
            raise ValueError(
                f"it may hold what JSON has, in UTF-8, at most {META_LEVELS} levels deep, and no"
                " NaN or Infinity"
            )
        return meta

    def start(self, store: Store) -> str | None:
        """The version to start from; None for a first training.

        Raises:
            UnknownModel, UnknownVersion: there is no such version.
            BadMeta: each was held or rolled back from, and nobody says to begin anew.
        """
        parent = store.to_start_from(self.model, self.version)
        if parent is None and self.kind is None and (versions := store.versions(self.model)):
            raise BadMeta(
                f"Every version of {self.model} was held by the gate or rolled back from: name the"
                f' one to start from, such as "version": "{versions[-1]}"; or say a kind, to begin'
                " anew."
            )
        return parent

    def first_meta(self) -> Meta:
        """What a first training makes: as asked, and PatchCore's usual keys where none are said.

        Raises:
            BadMeta: keys are missing or contradict each other, or are of another kind.
        """
        kind = self.kind or self.meta.get("model") or of_kind(self.meta) or FIRST["model"]
        self._check_kind(kind)
        if self.kind is None and kind != FIRST["model"]:
            raise BadMeta(f'meta is of a {kind} model: say so with "kind": "{kind}".')
        usual = FIRST if kind == FIRST["model"] else {}
        if self.meta.keys() & {"backbone", "layers"}:  # the others were measured with these
            usual = {key: value for key, value in usual.items() if key not in FEATURES}
        return Meta.parse({**usual, **self.meta, "model": kind})

    def meta_after(self, before: Meta) -> Meta:
        """What a training makes that goes on from a version with this meta.json.

        Raises:
            BadMeta: keys contradict each other, or another kind of model is asked for.
        """
        self._check_kind(before.model)
        after = before.with_(**self.meta)
        if self.update and (other := other_features(before, after)):
            key, was, now = other
            raise BadMeta(
                f"{self.model} was learned with {key} {was}, and what {now} would see cannot be"
                ' compared with that: learn anew, with "update": false.'
            )
        return after

    def _check_kind(self, kind: Any) -> None:
        for asked in (self.kind, self.meta.get("model")):
            if asked not in (None, kind):
                raise BadMeta(
                    f"{self.model} is, or becomes, a {kind} model, and {asked} is asked for, too:"
                    " leave that out, or give the other one a name of its own."
                )


class ConvertRequest(VersionRequest):
    """Make an engine of a version that has weights, as convtrt.py does."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"model": "my-part"}]})

    opset: Literal[17, 18] = Field(17, description="Of the ONNX graph.")
    fp16: bool = Field(False, description="The backbone in half precision.")
    int8: bool = Field(
        False,
        description="Convolutions in int8, with ranges from the golden images, and from those of"
        " category. Those that would change scores or verdicts too much stay in float32.",
    )
    category: str | None = Field(
        None,
        pattern=NAME,
        max_length=NAME_LENGTH,
        description="For int8: the dataset to measure ranges and AUROC on.",
    )
    workspace: int = Field(4096, ge=1, le=1_048_576, description="MiB for building a plan.")
    use_dla: bool = Field(False, description="Use the accelerator of a Jetson that has one.")
    from_onnx: bool = Field(
        False,
        description="Build the plan again from the version's own model.onnx: needs no training"
        " packages.",
    )
    target: str | None = Field(
        None,
        pattern=f"^{TARGET}$",
        max_length=100,
        description="Build the plan for GPUs of other machines, also without one here: rtx,"
        " rtx:SM86, rtx:SM86,SM120, see docs/gpu-pc.md. Else for this machine.",
    )

    @field_validator("target", mode="before")
    @classmethod
    def _is_target(cls, target: Any) -> Any:
        if isinstance(target, str) and re.fullmatch(TARGET, target) is None:
            raise ValueError(f"it is no target: {TARGETS}")
        return target

    @model_validator(mode="after")
    def _fits(self) -> ConvertRequest:
        if self.fp16 and self.int8:
            raise ValueError("either fp16 or int8: what is not in int8 stays in float32")
        if self.category is not None and not self.int8:
            raise ValueError("category is for int8")
        if self.from_onnx and (self.fp16 or self.int8):
            raise ValueError("from_onnx takes the graph as it is: leave out fp16 and int8")
        if self.target is not None and self.use_dla:
            raise ValueError("a PC's GPU has no DLA: either target or use_dla")
        return self


class TeacherRequest(JobRequest):
    """Make a teacher for EfficientAD, as `python3 -m workers.distil` does."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"category": "my-part"}]})

    category: str = Field(
        pattern=NAME,
        max_length=NAME_LENGTH,
        description="The dataset whose training images it learns from.",
    )
    teacher: str = Field(
        "teacher.pth",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,123}\.pth$",
        description="What to call it in the folder weights of the data folder, where `pretrained`"
        " of POST /retrain finds it. One of the same name is replaced.",
    )
    pretrained: str | None = Field(
        None,
        pattern=FILE,
        description="Weights of the network that it learns to imitate, tf_efficientnet_lite0: a"
        " file in the folder weights, or the word untrained. Without it, pretrained ones: of an"
        " installed package, else timm's.",
    )
    model_size: Literal["small", "medium"] = Field(
        "small", description="Of the EfficientAD model that is to have it."
    )
    image_size: int = Field(
        256, ge=256, le=1024, description="Of the EfficientAD model, pixels: how large parts look."
    )
    steps: int = Field(
        2000, ge=1, le=1_000_000, description="How long to learn; twice as many take twice as long."
    )


def _json_length(value: Any) -> int:
    try:
        return len(json.dumps(value))
    except (ValueError, RecursionError):  # `_is_plain` says what is wrong
        return 0


def _is_plain(value: Any, levels: int) -> bool:
    """Whether a value that a client sent can be sent back, inside another one, as JSON in UTF-8."""
    if isinstance(value, dict):
        keys = all(_is_plain(key, 0) for key in value)
        return keys and levels > 0 and all(_is_plain(one, levels - 1) for one in value.values())
    if isinstance(value, list):
        return levels > 0 and all(_is_plain(one, levels - 1) for one in value)
    if isinstance(value, str):
        return not any("\ud800" <= character <= "\udfff" for character in value)
    return not isinstance(value, float) or math.isfinite(value)
