"""The bodies of requests and responses, as the OpenAPI document describes them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

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
    model: ModelBody | None
    resident_bytes: int | None = Field(description="Memory of the process; null where unknown.")
    inspections: InspectionsBody


def error_response(meaning: str, **examples: str) -> dict[str, Any]:
    """An OpenAPI response in the agreed form, with an example sentence for each code."""
    shown = {code: {"value": {"error": text, "code": code}} for code, text in examples.items()}
    content = {"application/json": {"examples": shown}}
    return {"model": ErrorBody, "description": meaning, "content": content}
