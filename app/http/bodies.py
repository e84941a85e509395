"""The bodies of requests and responses, as the OpenAPI document describes them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from engines.queue.requests import RetrainRequest
from engines.store.datasets import Split
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
    precision: str = Field(description="What is computed in: f32, bf16, f16 or int8.")
    image_size: int = Field(
        description="Side of the square that pictures are stretched to, pixels."
    )
    bank_rows: int | None = Field(description="Patches in the memory bank; null for other kinds.")
    resident_bytes: int = Field(description="About what it takes where it runs.")
    stale: str | None = Field(description="As in /models/{name}.")


class InspectionsBody(Body):
    """Images since the start of the process."""

    normal: int
    anomaly: int
    refused: int = Field(description="Damaged, too large, or of a kind that is not read.")


class DiskBody(Body):
    """The disk of the data folder; null where it does not say."""

    free_bytes: int | None
    size_bytes: int | None


class DeviceBody(Body):
    """The machine; null where it does not say."""

    memory_total: int | None = Field(description="Bytes; a Jetson's GPU has its share in them.")
    memory_available: int | None = Field(description="Bytes that could be taken.")
    gpu_memory: int | None = Field(description="Bytes taken for a Jetson's GPU.")
    gpu_load: float | None = Field(description="Of a Jetson's GPU, 0 to 1.")
    cpus: int | None
    temperatures: dict[str, float] = Field(description="Degrees Celsius of each thermal zone.")
    power_mode: str | None = Field(description="Of a Jetson, as nvpmodel calls it.")
    throttled: dict[str, bool] = Field(
        description="Parts of a Jetson, and whether each is slowed down now because it is hot."
    )
    over_currents: int | None = Field(
        description="How often a Jetson's power supply ran short since it was started."
    )


class HealthBody(Body):
    """What is running, for people and dashboards."""

    status: str = Field(description="`ok` or `not_ready`.")
    error: str | None = Field(None, description="Only when not ready: what is wrong.")
    code: str | None = Field(None, description="Only when not ready: `not_ready`.")
    version: str = Field(description="Of Kensa.")
    uptime_s: float
    models: list[ModelBody] = Field(description="In memory.")
    problems: dict[str, str] = Field(description="Models that should be in memory, and why not.")
    unloaded: list[str] = Field(description="Models that were unloaded by hand.")
    resting: list[str] = Field(description="Models that made room for others, until a part comes.")
    degraded: list[str] = Field(description="What is wrong at the moment, in sentences.")
    worker: str = Field(description="running, starting, off, or why there is none.")
    queue: str = Field(description="ok, or what is wrong with it.")
    jobs: dict[str, int] | None = Field(
        description="How many are in each state; null while the queue does not answer."
    )
    resident_bytes: int | None = Field(description="Memory of the process; null where unknown.")
    disk: DiskBody
    device: DeviceBody
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
    at_rest: bool = Field(description="It made room for another model, until a part comes for it.")
    resident_bytes: int | None = Field(
        description="What the version in memory takes: of the GPU with TensorRT, else reckoned."
    )
    stale: str | None = Field(
        description="Why TensorRT has no plan for the version that is to judge, so that OpenVINO"
        " judges in its place, or nobody; and what is done about it. Else null."
    )
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

    phase: str = Field(
        description="images, coreset, epochs, verify, convert, publish, gate ..., or what it waits"
        " for."
    )
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

    model_config = ConfigDict(
        strict=True,
        json_schema_extra={
            "examples": [
                {
                    "cron": "0 2 * * *",
                    "timezone": "Asia/Tokyo",
                    "retrain": {"model": "bracket", "category": "bracket"},
                }
            ]
        },
    )

    cron: str = Field(
        max_length=100,
        description="Minute, hour, day, month, weekday: `0 2 * * *` is 2 at night.",
    )
    timezone: str = Field("UTC", max_length=100, description="Such as Asia/Tokyo.")
    retrain: RetrainRequest = Field(description="The body of POST /retrain.")


class ScheduleBody(ScheduleRequest):
    """A schedule."""

    name: str
    last: str | None = Field(description="When it last began a job.")


class SchedulesBody(Body):
    """All schedules."""

    schedules: list[ScheduleBody]


# ---- Open Inference Protocol --------------------------------------------------------------------

MAX_IMAGES = 64  # of one request


class StrictBody(Body):
    """What a program sends: "1", 1.0 and true are no whole numbers. Unknown keys are ignored."""

    model_config = ConfigDict(strict=True, protected_namespaces=())


# Keys that are not named here are skipped, and never become objects.
_Pixel = Annotated[int, Field(ge=0, le=255)]
_Pixels = Annotated[list[_Pixel], Field(fail_fast=True)]
_Files = Annotated[list[str], Field(max_length=MAX_IMAGES, fail_fast=True)]


class InferTensorParameters(StrictBody):
    """Where the data of an input tensor is."""

    binary_data_size: int | None = Field(default=None, description="Bytes that follow the JSON.")
    shared_memory_region: str | None = Field(default=None, description="Refused.")


class InferTensorBody(StrictBody):
    """An input tensor."""

    name: str = Field(description="`image` or `file`.")
    datatype: str = Field(description="`UINT8` for `image`, `BYTES` for `file`.")
    shape: list[Annotated[int, Field(le=2**31 - 1)]] = Field(
        description="[N, height, width, 3] for `image`, [N] for `file`.",
        max_length=8,
        fail_fast=True,
    )
    parameters: InferTensorParameters = Field(default_factory=InferTensorParameters)
    data: _Pixels | _Files | None = Field(
        default=None,
        union_mode="left_to_right",
        description="All numbers in one list; files as strings in base64.",
    )


class InferOutputParameters(StrictBody):
    """How an output tensor is to come."""

    binary_data: bool | None = Field(default=None, description="Behind the JSON.")
    classification: int | None = Field(default=None, description="Refused.")
    shared_memory_region: str | None = Field(default=None, description="Refused.")


class InferOutputBody(StrictBody):
    """An output tensor that is asked for."""

    name: str
    parameters: InferOutputParameters = Field(default_factory=InferOutputParameters)


class InferParameters(StrictBody):
    """Of a request. `priority` and others are ignored."""

    timeout: int = Field(
        default=0, ge=0, description="Microseconds until 504, at most KENSA_DEADLINE_MS; 0: that."
    )
    binary_data_output: bool = Field(default=False, description="All outputs behind the JSON.")


class InferBody(StrictBody):
    """A request of the Open Inference Protocol."""

    id: str | None = Field(default=None, description="Comes back.")
    parameters: InferParameters = Field(default_factory=InferParameters)
    inputs: list[InferTensorBody] = Field(max_length=16, fail_fast=True)
    outputs: list[InferOutputBody] = Field(
        default_factory=list,
        max_length=16,
        fail_fast=True,
        description="Without any, all but `map`.",
    )


class OutputTensorBody(Body):
    """An output tensor."""

    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, int] = Field(
        default_factory=dict, description="`binary_data_size`, where the data follows the JSON."
    )
    data: list[float | bool | str] | None = None


class InferredBody(Body):
    """The verdicts, as tensors."""

    model_name: str
    model_version: str
    id: str | None = Field(default=None, description="The request's.")
    outputs: list[OutputTensorBody]


class RepositoryBody(StrictBody):
    """What a client says about the models it means."""

    ready: bool = Field(default=False, description="Only models in memory.")
    parameters: dict[str, bool | int | float | str] = Field(default_factory=dict)


class RepositoryModelBody(Body):
    """A model, and whether it is in memory."""

    name: str
    version: str = Field(description="The live one; empty where there is none.")
    state: Literal["READY", "UNAVAILABLE"]
    reason: str = Field(description="Why it is not in memory.")


class ServerMetadataBody(Body):
    """What answers here."""

    name: str
    version: str
    extensions: list[str] = Field(description="Of Triton's extensions, those that work here.")


class TensorBody(Body):
    """A tensor that a model takes or gives; -1 is any number."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadataBody(Body):
    """A model's tensors."""

    name: str
    versions: list[str] = Field(description="The live one.")
    platform: str
    inputs: list[TensorBody] = Field(description="One of them is sent.")
    outputs: list[TensorBody]


class DurationBody(Body):
    """How often, and how long in all."""

    count: int
    ns: int = Field(description="Nanoseconds.")


class InferenceStatisticsBody(Body):
    """Where the time went. The parts add up to `success`."""

    success: DurationBody
    fail: DurationBody
    queue: DurationBody = Field(description="Waiting for a thread.")
    compute_input: DurationBody = Field(description="Decoding and resizing.")
    compute_infer: DurationBody = Field(description="In the engine.")
    compute_output: DurationBody = Field(description="Judging, drawing, and the rest.")


class ModelStatisticsBody(Body):
    """What a version did since it was loaded, over whichever route. Each image counts."""

    name: str
    version: str
    last_inference: int = Field(description="Milliseconds since 1970; 0: none yet.")
    inference_count: int
    execution_count: int
    inference_stats: InferenceStatisticsBody


class StatisticsBody(Body):
    """Statistics of each model that was asked for."""

    model_stats: list[ModelStatisticsBody]


class ServerLiveBody(Body):
    live: bool


class ServerReadyBody(Body):
    ready: bool


class ModelReadyBody(Body):
    name: str
    ready: bool
