"""What else the server answers with, as it is sent: docs/http.md and docs/record.md say more."""

from __future__ import annotations

from typing import Any, Literal, TypedDict

Label = Literal["good", "defect", "unusable"]
Split = Literal["train", "normal", "anomaly"]


class Image(TypedDict):
    """What was judged."""

    format: str
    width: int
    height: int


class Decision(TypedDict):
    """What was decided of a part, and when."""

    number: int
    id: str
    part: str | None
    time: str  # ISO 8601, UTC
    model: str
    version: str | None
    verdict: Literal["normal", "anomaly", "unusable", "none"]
    code: str | None
    raw_score: float | None
    score: float | None
    threshold: float | None
    raw_threshold: float | None
    image: Image | None
    sha256: str | None
    has_picture: bool
    timing: dict[str, float] | None
    key: str | None
    label: Label | None
    defect: str | None


class Line(TypedDict):
    """A line of the audit trail."""

    number: int
    time: str
    key: str | None
    what: str
    subject: str
    reason: str | None
    details: dict[str, Any]
    hash: str


class WholeDecision(Decision):
    """A decision, and what was said of it since."""

    hash: str
    history: list[Line]


class Decisions(TypedDict):
    """A page of them, newest first."""

    decisions: list[Decision]
    next: int | None


class Preview(TypedDict):
    """What another threshold would have said of the parts that came."""

    model: str
    version: str
    raw: float
    raw_threshold: float
    parts: int
    rejected: int
    would_reject: int
    good: int
    good_rejected: int
    good_would_reject: int
    good_at_most: float | None
    defects: int
    defects_missed: int
    defects_would_miss: int
    defects_at_most: float | None
    flips: list[Decision]


class Version(TypedDict):
    """A version of a model."""

    version: str
    state: str
    created: str | None
    kind: str | None
    origin: dict[str, Any]
    files: dict[str, str]
    threshold: float | None
    raw_threshold: float | None
    calibration: dict[str, Any] | None
    camera: dict[str, Any] | None
    gate: dict[str, Any] | None
    problem: str | None


class Model(TypedDict):
    """A model and its newest versions."""

    name: str
    live: str | None
    previous: str | None
    problem: str | None
    at_rest: bool
    resident_bytes: int | None
    stale: str | None
    drift: list[dict[str, Any]]
    versions: list[Version]
    refused: dict[str, str]


class Models(TypedDict):
    """All of a server."""

    models: list[Model]


class Refused(TypedDict):
    """An image that was not taken."""

    name: str
    error: str
    code: str


class Upload(TypedDict):
    """What became of an upload: look at `refused`."""

    category: str
    split: Split
    added: list[str]
    already_there: list[str]
    refused: list[Refused]
    skipped: list[dict[str, Any]]
    images: int


class Job(TypedDict):
    """A job that learns or converts."""

    id: str
    kind: str
    model: str
    state: Literal["queued", "running", "succeeded", "failed", "cancelled", "interrupted"]
    created: str | None
    ended: str | None
    attempts: int
    request: dict[str, Any]
    progress: dict[str, Any] | None
    version: str | None
    outcome: str | None
    error: str | None
    code: str | None
    machine: str | None
    images: dict[str, Any] | None
