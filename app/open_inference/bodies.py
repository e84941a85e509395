"""The bodies of the Open Inference Protocol, as the OpenAPI document describes them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from app.http.base_body import Body
from app.http.part import MEANING, SCHEMA

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
    part: str = Field(default="", description=f"{MEANING} Comes back.", json_schema_extra=SCHEMA)


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
    parameters: dict[str, str] = Field(
        default_factory=dict,
        description="`part`, where the request has one; `hint`: what speaks against a picture,"
        " though it was judged.",
    )
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
