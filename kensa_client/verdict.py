"""`Verdict`: what Kensa said of a part, taken only where all of it is as it must be."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

LABELS = ("Normal", "Anomaly", "Unusable")


@dataclass(frozen=True)
class Timing:
    """Where the server's time went, milliseconds."""

    queue_ms: float
    decode_ms: float
    infer_ms: float
    total_ms: float


@dataclass(frozen=True)
class Verdict:
    """What a model said of a part. It is true where `ok` is."""

    ok: bool  # Normal
    label: str  # Normal, Anomaly or Unusable
    score: float  # 0 to 1
    threshold: float  # the limit for `score`
    raw_score: float  # in the model's own units
    raw_threshold: float
    id: str  # of the inspection, as the record has it
    part: str
    model: str
    version: str
    repeat_of: str | None  # the id of the inspection that this one repeats
    hint: str | None  # what speaks against the picture, though it was judged
    timing: Timing
    unusable: str | None = None  # why its picture is not usable, such as camera_dark

    def __bool__(self) -> bool:
        return self.ok  # else `if kensa.inspect(picture):` would pass every part


@dataclass(frozen=True)
class SafeVerdict:
    """Whether a part is known to be good, and why not. It is true where `ok` is."""

    ok: bool  # a Normal verdict came within the deadline
    reason: str  # empty where ok
    verdict: Verdict | None  # None: there is none

    def __bool__(self) -> bool:
        return self.ok


@dataclass(frozen=True)
class PartVerdict:
    """What is known of a part of several views. It is true where `ok` is."""

    ok: bool  # decided, and Normal in all views
    decided: bool  # else views are awaited
    verdict: str  # pending, normal, anomaly, unusable; none where a view is missing
    score: float | None  # of the worst view
    threshold: float | None  # the limit for it
    decided_by: str | None  # the worst view, or one that is missing
    missing: tuple[str, ...]  # views without a verdict; "?" where nobody has said its name
    of: int
    id: str  # of the decision, as the record has it
    part: str
    view: Verdict | None  # of the view that was sent

    def __bool__(self) -> bool:
        return self.ok


def read_part(
    body: bytes, part: str, asked: tuple[str, str, str | None] | None = None
) -> PartVerdict:
    """What an answer says of a part.

    Args:
        asked: the id, view and model of a request that brought a view.

    Raises:
        ValueError: it says nothing, contradicts itself, or is about something else.
    """
    said = json.loads(body, parse_int=float)
    if not isinstance(said, dict):
        raise ValueError("it is no object")
    verdict, is_anomalous, missing = (
        said.get(name) for name in ("verdict", "is_anomalous", "missing")
    )
    if verdict not in ("pending", "normal", "anomaly", "unusable", "none") or is_anomalous is not (
        None if verdict == "pending" else verdict != "normal"
    ):
        raise ValueError(f"verdict is {verdict!r}, and is_anomalous {is_anomalous!r}")
    if not isinstance(missing, list) or not all(isinstance(one, str) for one in missing):
        raise ValueError(f"missing is {missing!r}")
    if verdict == "normal" and missing:
        raise ValueError(f"verdict is normal, and missing is {missing}")
    if said.get("part") != part:
        raise ValueError(f"it is about {said.get('part')!r}, and {part!r} was asked")
    own = None
    if asked is not None:
        id_, view, model = asked
        if said.get("view") != view:
            raise ValueError(f"it is about the view {said.get('view')!r}, and {view!r} was sent")
        own = read_verdict(json.dumps(said.get("inspection")).encode(), id_, part, model)
        if verdict == "normal" and not own.ok:
            raise ValueError("verdict is normal, and that of the view Anomaly")
    has_score = said.get("score") is not None
    return PartVerdict(
        ok=verdict == "normal", decided=verdict != "pending", verdict=str(verdict),
        score=_number(said, "score") if has_score else None,
        threshold=_number(said, "threshold") if has_score else None,
        decided_by=_text_or_none(said, "decided_by"), missing=tuple(missing),
        of=int(_number(said, "of")), id=_text(said, "id"), part=part, view=own,
    )  # fmt: skip


def read_verdict(body: bytes, id_: str, part: str, model: str | None) -> Verdict:
    """The verdict in an answer to a request of this id, part and model.

    Raises:
        ValueError: it is none, contradicts itself, or is about something else.
    """
    said = json.loads(body, parse_int=float)  # so that no number is too large to be looked at
    if not isinstance(said, dict):
        raise ValueError("it is no object")
    label, is_anomalous = said.get("label"), said.get("is_anomalous")
    if label not in LABELS or is_anomalous is not (label != "Normal"):
        raise ValueError(f"label is {label!r}, and is_anomalous {is_anomalous!r}")
    unusable = said.get("unusable")
    if (label == "Unusable") is not isinstance(unusable, dict):
        raise ValueError(f"label is {label!r}, and unusable {unusable!r}")
    about = said.get("id"), said.get("part") or ""
    if about != (id_, part):
        raise ValueError(f"it is about {about}, and {(id_, part)} was asked")
    if model is not None and said.get("model_name") != model:
        raise ValueError(f"{said.get('model_name')!r} judged, and {model!r} was asked")
    timing = said.get("timing")
    return Verdict(
        ok=label == "Normal", label=str(label), id=id_, part=part,
        score=_number(said, "score"), threshold=_number(said, "threshold"),
        raw_score=_number(said, "raw_score"), raw_threshold=_number(said, "raw_threshold"),
        model=_text(said, "model_name"), version=_text(said, "model_version"),
        repeat_of=_text_or_none(said, "repeat_of"), hint=_text_or_none(said, "hint"),
        timing=Timing(**{name: _number(timing, name) for name in Timing.__annotations__}),
        unusable=_text(unusable, "code") if isinstance(unusable, dict) else None,
    )  # fmt: skip


def _number(said: Any, name: str) -> float:
    found = said.get(name) if isinstance(said, dict) else None
    if not isinstance(found, float) or not math.isfinite(found):
        raise ValueError(f"{name} is {found!r}")
    return found


def _text(said: dict[str, Any], name: str) -> str:
    found = said.get(name)
    if not isinstance(found, str):
        raise ValueError(f"{name} is {found!r}")
    return found


def _text_or_none(said: dict[str, Any], name: str) -> str | None:
    return None if said.get(name) is None else _text(said, name)
