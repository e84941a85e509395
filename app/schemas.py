"""The bodies of requests and responses, as the OpenAPI document describes them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from engines.datasets import Split
from engines.jobs import RetrainRequest
from engines.verdict import Label


class Body(BaseModel):
    """What all bodies have in common."""

    model_config = ConfigDict(protected_namespaces=())


class ErrorBody(Body):
    """Every answer that is not a success has this form."""

    error: str = Field(description="One sentence that a person can act on.")
    code: str = Field(description="What programs may rely on; it does not change.")


class TimingBody(Body):
    """Where the time went, milliseconds. The upload is not in it."""

    queue_ms: float = Field(description="Waiting for a free decoder and for the engine.")
    decode_ms: float = Field(description="From the file to the pixels that the model sees.")
    infer_ms: float = Field(description="In the engine.")
    total_ms: float = Field(description="From the last byte of the request to the answer.")


class HeatmapBody(Body):
    """Where the part differs, stretched over the whole picture."""

    width: int = Field(description="Pixels.")
    height: int = Field(description="Pixels.")
    png: str = Field(
        description=(
            "A grey 8-bit PNG, base64. A pixel's value / 255 is the normalised score of its place:"
            " compare it with `threshold`."
        )
    )


class InspectionBody(Body):
    """The verdict on one part."""

    id: str = Field(description="The X-Request-ID of the request, or a new one.")
    model_name: str
    model_version: str = Field(description="Changes whenever a file of the model changes.")
    label: Label
    is_anomalous: bool = Field(description="True when `raw_score` is above `raw_threshold`.")
    raw_score: float = Field(description="What the model measured, in units of its own.")
    score: float = Field(description="`raw_score` scaled to 0 ... 1 by the model's calibration.")
    threshold: float = Field(description="The limit for `score`.")
    raw_threshold: float = Field(description="The same limit for `raw_score`.")
    heatmap: HeatmapBody | None = Field(description="Null unless asked for with `heatmap=true`.")
    timing: TimingBody


class StatusBody(Body):
    """A state in one word."""

    status: str


class ModelBody(Body):
    """The model that is held in memory."""

    name: str
    version: str
    kind: str = Field(description="patchcore, padim, efficientad or vae.")
    runtime: str = Field(description="What computes it.")
    precision: str = Field(description="What is computed in; see KENSA_PRECISION.")
    image_size: int = Field(
        description="Side of the square that pictures are stretched to, pixels."
    )
    bank_rows: int | None = Field(description="Patches in the memory bank; null for other kinds.")


class InspectionsBody(Body):
    """Images since the start of the process."""

    normal: int
    anomaly: int
    refused: int = Field(description="Damaged, too large, or of a kind that is not read.")


class HealthBody(Body):
    """What is running, for people and dashboards."""

    status: str = Field(description="`ok` or `not_ready`.")
    error: str | None = Field(None, description="Only when not ready: what is wrong.")
    code: str | None = Field(None, description="Only when not ready: `not_ready`.")
    version: str = Field(description="Of Kensa.")
    uptime_s: float
    models: list[ModelBody] = Field(description="In memory.")
    problems: dict[str, str] = Field(description="Models that should be in memory, and why not.")
    worker: str = Field(description="running, starting, off, or why there is none.")
    queue: str = Field(description="ok, or what is wrong with it.")
    resident_bytes: int | None = Field(description="Memory of the process; null where unknown.")
    inspections: InspectionsBody


def error_response(meaning: str, **examples: str) -> dict[str, Any]:
    """An OpenAPI response in the agreed form, with an example sentence for each code."""
    shown = {code: {"value": {"error": text, "code": code}} for code, text in examples.items()}
    content = {"application/json": {"examples": shown}}
    return {"model": ErrorBody, "description": meaning, "content": content}


class CategoryBody(Body):
    """A category of training images, and how many it has."""

    category: str
    train: int = Field(description="Images to learn from.")
    normal: int = Field(description="Normal images to test with.")
    anomaly: int = Field(description="Anomalous images to test with.")


class DatasetsBody(Body):
    """All training images, counted."""

    datasets: list[CategoryBody] = Field(description="Sorted by name.")


class ImageFileBody(Body):
    """A training image."""

    name: str
    bytes: int


class ImagesBody(Body):
    """A page of the images of a split."""

    category: str
    split: Split
    total: int = Field(description="Images in the split, on this page or not.")
    offset: int = Field(description="Images before this page.")
    images: list[ImageFileBody] = Field(description="Sorted by name.")


class RefusedBody(Body):
    """An image that was not taken."""

    name: str = Field(description="As it was sent; in a zip, with its folders where they matter.")
    error: str = Field(description="One sentence that a person can act on.")
    code: str = Field(description="What programs may rely on; it does not change.")


class SkippedBody(Body):
    """Files of a zip that are no images."""

    reason: str
    count: int
    names: list[str] = Field(description="The first ten.")


class UploadBody(Body):
    """What became of an upload."""

    category: str
    split: Split
    added: list[str] = Field(description="Images that are stored now.")
    already_there: list[str] = Field(description="Images that were there with the same bytes.")
    refused: list[RefusedBody]
    skipped: list[SkippedBody]
    images: int = Field(description="Images in the split now.")


class FlipBody(Body):
    """A part that the new version judges otherwise."""

    number: int = Field(description="Of its picture, at /models/{name}/versions/{version}/flips/.")
    group: str = Field(description="`normal` or `defect`, known from training; `recent`: unknown.")
    was: Label
    becomes: Label
    old_score: float
    new_score: float
    old_raw_score: float
    new_raw_score: float


class GroupBody(Body):
    """How many images of a group were shown to both versions, and how many verdicts changed."""

    images: int
    flips: int = Field(description="Of known parts only those that became wrong.")


class GateBody(Body):
    """What the gate found when it showed images to the live version and the new one."""

    ok: bool = Field(description="False: held, until a person makes it live.")
    reasons: list[str] = Field(description="Why it is held.")
    against: str | None = Field(None, description="The version that was live.")
    limit: float | None = Field(None, description="The share of each group that may flip.")
    groups: dict[str, GroupBody] = Field(default_factory=dict)
    flips: list[FlipBody] = Field(default_factory=list)
    seconds: float | None = None
    by_hand: bool = Field(False, description="A person made it live.")


class VersionBody(Body):
    """A version of a model, on the disk."""

    version: str
    state: str = Field(
        description="`live`, `previous`, `held` by the gate, `at the gate`, `kept` or `damaged`."
    )
    created: str | None = None
    kind: str | None = Field(default=None, description="patchcore, padim, efficientad or vae.")
    origin: dict[str, Any] = Field(
        default_factory=dict, description="The job, the folder or the upload that it came from."
    )
    files: dict[str, str] = Field(default_factory=dict, description="SHA-256 of each.")
    threshold: float | None = Field(default=None, description="The limit for `score`.")
    raw_threshold: float | None = Field(default=None, description="Found by verification.")
    gate: GateBody | None = None
    problem: str | None = Field(None, description="What is wrong with it.")


class StoredModelBody(Body):
    """A model and its versions."""

    name: str
    live: str | None = Field(description="The version in memory, which judges.")
    previous: str | None = Field(description="What a rollback goes to.")
    problem: str | None = Field(description="Why none is in memory.")
    versions: list[VersionBody] = Field(description="Newest first.")
    refused: dict[str, str] = Field(description="Versions put aside as unusable, and why.")


class ModelsBody(Body):
    """All models of this server."""

    models: list[StoredModelBody]


class TakenInBody(Body):
    """A model that was taken in."""

    name: str
    version: str
    needs_conversion: bool = Field(description="It has no model.onnx: POST /convert makes one.")


class ProgressBody(Body):
    """How far a job is."""

    phase: str = Field(description="images, coreset, epochs, verify, convert, publish, gate ...")
    done: int = Field(0, description="Images or epochs of this phase.")
    total: int = 0
    fraction: float = Field(0.0, description="Of the whole job, 0 to 1.")
    seconds_left: float | None = None
    held_back: float = Field(
        0.0, description="Share of the last seconds that it was stopped, because the line was busy."
    )


class JobBody(Body):
    """A job that learns or converts."""

    id: str
    kind: str = Field(description="retrain or convert.")
    model: str
    state: str = Field(
        description="queued, running, succeeded, failed, cancelled, or interrupted: its process"
        " died three times."
    )
    created: str | None
    ended: str | None
    attempts: int = Field(description="How often it was begun.")
    request: dict[str, Any]
    progress: ProgressBody | None
    version: str | None = Field(description="What it published.")
    outcome: str | None = Field(
        description="What became of that: live, held by the gate, refused, published, or replaced"
        " by a later one."
    )
    error: str | None
    code: str | None
    machine: str | None = Field(
        None, description="Which machine learns or learned, where several share a queue."
    )


class JobsBody(Body):
    """Jobs, newest first."""

    jobs: list[JobBody]


class ScheduleRequest(Body):
    """Retrain again and again."""

    cron: str = Field(description="Minute, hour, day, month, weekday: `0 2 * * *` is 2 at night.")
    timezone: str = Field("UTC", description="Such as Asia/Tokyo.")
    retrain: RetrainRequest


class ScheduleBody(ScheduleRequest):
    """A schedule."""

    name: str
    last: str | None = Field(description="When it last began a job.")


class SchedulesBody(Body):
    """All schedules."""

    schedules: list[ScheduleBody]
