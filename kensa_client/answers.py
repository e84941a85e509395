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


class View(TypedDict):
    """What was decided of one of a part's views."""

    view: str
    id: str | None
    time: str  # ISO 8601, UTC
    model: str
    version: str | None
    verdict: Literal["normal", "anomaly", "none"]
    code: str | None
    raw_score: float | None
    score: float | None
    threshold: float | None
    raw_threshold: float | None
    image: Image | None
    sha256: str | None


class Views(TypedDict):
    """The views of a part that has its verdict from all of them."""

    line: str | None
    of: int
    decided_by: str
    views: list[View]


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
    views: Views | None


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
    never_counts: float | None
    calibration: dict[str, Any] | None
    camera: dict[str, Any] | None
    gate: dict[str, Any] | None
    problem: str | None


class LastChallenge(TypedDict):
    """A challenge with known pictures, in short."""

    time: str
    version: str
    passed: bool
    right: int
    of: int
    by: Literal["request", "shift"]
    key: str | None


class JudgedPicture(TypedDict):
    """What a version said of a known picture."""

    name: str
    expected: Literal["good", "bad"]
    sha256: str
    right: bool
    label: str | None
    score: float | None
    threshold: float | None
    raw_score: float | None
    raw_threshold: float | None
    problem: str | None


class Challenge(LastChallenge):
    """What a challenge found: look at `passed`."""

    model: str
    released: bool
    pictures: list[JudgedPicture]


class KnownPicture(TypedDict):
    """A picture of which it is known what it shows."""

    name: str
    expected: Literal["good", "bad"]
    sha256: str
    bytes: int
    format: str
    origin: dict[str, Any]
    last: JudgedPicture | None


class Challenges(TypedDict):
    """What a model is challenged with, and where it stands."""

    model: str
    released: bool
    problem: str | None
    at_shifts: bool
    changed: str | None
    key: str | None
    reason: str | None
    last: LastChallenge | None
    pictures: list[KnownPicture]


class Model(TypedDict):
    """A model and its newest versions."""

    name: str
    live: str | None
    previous: str | None
    problem: str | None
    at_rest: bool
    resident_bytes: int | None
    stale: str | None
    plan_unused: str | None
    released: bool
    challenge: LastChallenge | None
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
