"""The models and their versions: look, take in, make live, go back."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar
from urllib.parse import quote

from fastapi import APIRouter, Query, Request, Response
from fastapi import Path as InPath
from pydantic import ConfigDict, Field, ValidationError, WithJsonSchema, model_validator

from app.http.access import KeyFirst, needs
from app.http.base_body import MOST_REASON, Body, error_response, given_reason
from app.http.model_zip import unpack_model
from app.http.uploads import receive, upload_folder
from app.routes.record import time_of
from app.routes.statistics import DriftBody, drifting
from app.serving.challenges import Challenger
from app.serving.inspection import Inspector
from app.serving.rollout import Rollout
from app.settings import Settings
from engines.camera import CODES, Camera, Code
from engines.errors import BadBundle, BadMeta, BadRequest, UnknownVersion, Unreadable
from engines.limits import KEYS, in_force
from engines.meta import Meta
from engines.promise import drawn_found, promise
from engines.queue.job_requests import few_keys
from engines.store.bundle import ONNX
from engines.store.challenges import Outcome
from engines.store.datasets import Datasets, room
from engines.store.regions import never_counts
from engines.store.versions import GATE, MANIFEST, META, NAME, NAME_LENGTH, Store, stamp
from engines.verdict import Label, Scale


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


class MarkedGoodBody(Body):
    """Parts that a person has marked as good."""

    marked: int = Field(description="How many were shown to both versions.")
    rejected_before: int = Field(description="By the live version.")
    rejected_now: int = Field(description="By the new one.")


class MarkedDefectBody(Body):
    """Parts that a person has marked as defects."""

    marked: int = Field(description="How many were shown to both versions.")
    missed_before: int = Field(description="By the live version.")
    missed_now: int = Field(description="By the new one.")


class UnmarkedBody(Body):
    """Rejects that nobody has marked."""

    rejects: int = Field(description="How many were shown to both versions.")
    flips: int = Field(description="Of how many the verdict changes.")


class DecisionFlipBody(Body):
    """A decision of the record that the new version judges otherwise, as a replay by each says."""

    number: int = Field(description="The decision's.")
    id: str = Field(description="The decision's: /decisions/{id}/image shows its picture.")
    part: str | None
    label: Literal["good", "defect"] | None = Field(description="What a person said of it.")
    defect: str | None = Field(description="The kind of defect, where it is one.")
    was: Label = Field(description="By the live version.")
    becomes: Label = Field(description="By the new one.")
    old_score: float
    new_score: float
    old_threshold: float = Field(description="The limit for `old_score`.")
    new_threshold: float
    old_raw_score: float
    new_raw_score: float
    old_raw_threshold: float = Field(description="The limit for `old_raw_score`.")
    new_raw_threshold: float


class GateRecordBody(Body):
    """What both versions say of decisions of the record."""

    good: MarkedGoodBody
    defect: MarkedDefectBody
    unmarked: UnmarkedBody
    left_out: int = Field(description="Their picture is not kept, or could not be read in time.")
    problem: str | None = Field(description="Why none could be shown; else null.")
    flips: list[DecisionFlipBody] = Field(description="Each decision whose verdict changes.")


class OtherRegionsBody(Body):
    """What share of a picture never counts, where that is another one."""

    was: float = Field(description="By the live version, 0 to 1; 0 without regions.")
    becomes: float = Field(description="By the new one.")


class GateBody(Body):
    """What the gate found when it showed images to the live version and the new one."""

    ok: bool = Field(description="False: held, until a person makes it live.")
    reasons: list[str] = Field(description="Why it is held.")
    against: str | None = Field(None, description="The version that was live.")
    limit: float | None = Field(None, description="The share of each group that may flip.")
    groups: dict[str, GroupBody] = Field(default_factory=dict)
    flips: list[FlipBody] = Field(default_factory=list)
    record: GateRecordBody | None = Field(
        None, description="Null where there was no live version, and from an older Kensa."
    )
    regions: OtherRegionsBody | None = Field(
        None, description="Null where its regions are those of the live version."
    )
    seconds: float | None = None
    by_hand: bool = Field(False, description="A person made it live.")


class CalibrationBody(Body):
    """What a version can promise at its threshold, as its training measured it; null: not known."""

    normals: int | None = Field(description="Pictures of normal parts that it was measured on.")
    parts: int | None = Field(description="Of how many parts they are.")
    false_rejects: float | None = Field(description="The share of good parts that may be rejected.")
    rejected: int | None = Field(description="How many of `parts` are.")
    at_most: float | None = Field(
        description="What share of good parts is rejected at most, 95 % sure."
    )
    parts_needed: int | None = Field(
        description="How many parts without a false reject would promise `false_rejects`."
    )
    defects: int | None = Field(description="Known defects; 0 where none were given.")
    misses: int | None = Field(description="How many of them pass.")
    drawn: int | None = Field(
        description="Defects drawn onto normal parts that any model has to find."
    )
    found: int | None = Field(description="How many of `drawn` are found.")
    untrained: bool = Field(description="The weights of its backbone are random.")


class StatisticBody(Body):
    """A number that is measured of each picture."""

    mean: float = Field(description="Of the pictures that were learned.")
    spread: float = Field(description="Their standard deviation.")
    low: float | None = Field(description="A single picture is usable down to this; null: any is.")
    high: float | None = Field(description="And up to this.")


class CameraBody(Body):
    """What pictures of good parts look like."""

    pictures: int = Field(description="How many that was learned from.")
    width: int = Field(description="Pixels, of most of them.")
    height: int
    statistics: dict[str, StatisticBody] = Field(
        description="Brightness, contrast and colour in shares of the whole range; sharpness,"
        " width, height and aspect as natural logarithms; shifts in shares of the picture; turns in"
        " degrees; `score`, raw."
    )
    sees: list[Code] = Field(description="What can be seen of a picture.")
    blind: dict[str, str] = Field(description="What cannot, and why.")


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
    raw_threshold: float | None = Field(default=None, description="The same limit for `raw_score`.")
    never_counts: float | None = Field(
        default=None,
        description="The share of a picture's pixels that never count, 0 to 1; null where it has"
        " no regions.",
    )
    calibration: CalibrationBody | None = Field(
        default=None, description="What it can promise; null where that was never measured."
    )
    camera: CameraBody | None = Field(
        default=None,
        description="What its pictures look like; null where its training did not note that: train"
        " it again.",
    )
    gate: GateBody | None = None
    problem: str | None = Field(None, description="What is wrong with it.")


class LastChallengeBody(Body):
    """A challenge with known pictures."""

    time: datetime = Field(description="UTC.")
    version: str = Field(description="Which judged.")
    passed: bool = Field(description="Whether all were judged rightly.")
    right: int = Field(description="How many were.")
    of: int = Field(description="How many there were.")
    by: Literal["request", "shift"] = Field(
        description="`shift`: Kensa itself, when a shift began."
    )
    key: str | None = Field(description="Whose key asked for it.")


class StoredModelBody(Body):
    """A model and its versions."""

    name: str
    live: str | None = Field(description="The version in memory, which judges.")
    previous: str | None = Field(description="What a rollback goes to.")
    problem: str | None = Field(
        description="Why none is in memory, or which one judges in the place of which, and why."
    )
    at_rest: bool = Field(description="It made room for another model, until a part comes for it.")
    resident_bytes: int | None = Field(
        description="What the version in memory takes: of the GPU with TensorRT, else reckoned."
    )
    stale: str | None = Field(
        description="Why TensorRT has no plan for the version that is to judge, so that OpenVINO"
        " judges in its place, or nobody; and what is done about it. Else null."
    )
    plan_unused: str | None = Field(
        description="Why this machine has no use for the plan of the version in memory, such as one"
        " for GPUs of other machines: OpenVINO judges. Else null."
    )
    released: bool = Field(description="False: it failed a challenge, and no part passes.")
    challenge: LastChallengeBody | None = Field(
        description="The last challenge with its known pictures; null where there was none."
    )
    drift: list[DriftBody] = Field(
        description="What of the last parts is no more as it was when the version in memory"
        " learned, where KENSA_DRIFT_PARTS asks; else empty."
    )
    versions: list[VersionBody] = Field(description="`limit` of them, newest first.")
    refused: dict[str, str] = Field(description="Versions put aside as unusable, and why.")


class LimitBody(Body):
    """A limit, and how many good parts it rejects."""

    false_rejects: float = Field(description="The share of good parts that it is meant to reject.")
    raw: float = Field(description="The limit for `raw_score`.")
    at_most: float | None = Field(
        description="What share of good parts it rejects at most, 95 % sure; null where unknown."
    )


class ThresholdBody(Body):
    """The threshold of a version."""

    model: str
    version: str
    state: str = Field(description="As in the model's `versions`: `live`, or `at the gate`.")
    threshold: float = Field(description="The limit for `score`, 0 to 1.")
    raw: float = Field(description="The same limit for `raw_score`.")
    false_rejects: float | None = Field(
        description="The share of good parts that this limit is meant to reject; null where the"
        " version does not know, or the limit lies outside of `limits`."
    )
    at_most: float | None = Field(
        description="What share it rejects at most, 95 % sure; null where unknown."
    )
    drawn: int | None = Field(
        description="Defects that training drew onto normal parts; null where it drew none."
    )
    found: int | None = Field(description="How many of `drawn` this limit finds.")
    limits: list[LimitBody] = Field(
        description="The table that `false_rejects` is read from; empty where there is none."
    )


def _any(**schema: Any) -> Any:
    """A number that is checked once the model is known, so that its range can be said."""
    return WithJsonSchema({"anyOf": [{"type": "number", **schema}, {"type": "null"}]})


class ChangeThresholdBody(Body):
    """Exactly one of `threshold`, `raw` and `false_rejects`, and a reason."""

    model_config = ConfigDict(
        protected_namespaces=(),
        extra="forbid",
        json_schema_extra={"examples": [{"false_rejects": 0.005, "reason": "Too many good ones."}]},
    )

    @model_validator(mode="before")
    @classmethod
    def _is_short(cls, content: Any) -> Any:
        return few_keys(content)

    threshold: Annotated[Any, _any(minimum=0, maximum=1)] = Field(
        None, description="The limit for `score`, 0 to 1; 0.5 is the one that training found."
    )
    raw: Annotated[Any, _any()] = Field(
        None, description="The limit for `raw_score`, as far as `threshold` can express it."
    )
    false_rejects: Annotated[Any, _any(exclusiveMinimum=0, exclusiveMaximum=1)] = Field(
        None, description="The share of good parts to reject, within `limits` of GET."
    )
    reason: str = Field(
        min_length=1,
        max_length=MOST_REASON,
        pattern=r"\S",
        strict=True,
        description="Why, in a sentence.",
    )
    gate: bool = Field(
        False, strict=True, description="True: it goes through the gate; false: live at once."
    )


class ModelsBody(Body):
    """All models of this server."""

    models: list[StoredModelBody]


class TakenInBody(Body):
    """A model that was taken in."""

    name: str
    version: str
    needs_conversion: bool = Field(description="It has no model.onnx: POST /convert makes one.")


PAGE = 100  # versions
RECORDS_KEPT = 1024  # versions whose files are not read again; 5 KB of memory each
Limit = Annotated[int, Query(ge=1, le=200, description="How many versions of a model to list.")]
Offset = Annotated[int, Query(ge=0, le=1_000_000, description="How many newer ones to pass over.")]
Result = TypeVar("Result")

_THREADS = ThreadPoolExecutor(2, "models")  # parts have their own

router = APIRouter(tags=["models"], route_class=KeyFirst)

Name = Annotated[str, InPath(description="The model's name.", examples=["bracket"])]
Version = Annotated[
    str, InPath(description="As in the model's `versions`.", examples=["0001-3f9a0c41d2e8"])
]
OnlyIf = Annotated[
    str | None,
    Query(max_length=64, description="Else 409.", examples=["0001-3f9a0c41d2e8"]),
]

ZIP = "application/zip"
FILE = {"schema": {"type": "string", "format": "binary"}}

UNKNOWN = error_response(
    "No such model or version.",
    unknown_model="There is no model 'bolt'; there is 'bracket'.",
    unknown_version="bracket has no version '0009-aaaaaaaaaaaa'; there is '0001-3f9a0c41d2e8'.",
)
RESIDENT: dict[int | str, dict[str, Any]] = {  # what is asked of the model that judges
    404: error_response(
        "No such model.", unknown_model="There is no model 'bolt'; there is 'bracket'."
    ),
    503: error_response(
        "The model is not in memory, such as one that rests.",
        not_ready="bracket was unloaded; POST /v2/repository/models/bracket/load brings it back.",
    ),
}
UNUSABLE = error_response(
    "The version's files are damaged, or do not fit together. It is put aside.",
    bad_bundle="model.onnx is not the file that was written with the meta.json beside it ...",
    bad_meta="meta.json has no image_threshold_auto ...",
)
FULL = error_response(
    "There is no room, on the disk or in memory; nothing was changed.",
    disk_full="Nothing was changed: No space left on device. Free some space.",
    read_only="Nothing was changed, because the data folder cannot be written (...): ...",
    out_of_memory="bracket 0002-... needs about 410 MiB beside the live version, and 200 are free.",
)
_NO_PLAN = error_response(
    "TensorRT is to run it, and cannot.",
    stale_plan="model.plan was built for TensorRT 10.3.0 (here 10.16.1.11). Build it again ...",
    no_tensorrt="The CUDA driver is not to be found ...",
)
NONE_LIVE = error_response(
    "No version of it is live, or that one cannot be used.",
    conflict="There is no threshold to speak of: bracket has no live version.",
)
CHANGE: dict[int | str, dict[str, Any]] = {
    404: UNKNOWN, 422: UNUSABLE, 503: _NO_PLAN, 507: FULL,
}  # fmt: skip


@router.get("/models", dependencies=[needs("line")], summary="Which models are there?")
async def models(request: Request, limit: Limit = PAGE) -> ModelsBody:
    """Every model of this server, its live version and whether it is in memory."""
    names = await aside(store_of(request).names)
    return ModelsBody(models=[await described(request, name, limit) for name in names])


@router.post(
    "/models",
    dependencies=[needs("admin")],
    status_code=201,
    summary="Take in a model",
    responses={
        413: error_response("Too large.", upload_too_large="The upload has more than ... bytes."),
        415: error_response("No zip.", unsupported_body="Send the zip as the body, or in a form."),
        422: error_response(
            "The zip holds no model, or a damaged one.",
            bad_bundle="The zip has no meta.json.",
            bad_request="The zip cannot be read: ...",
        ),
        507: FULL,
    },
    openapi_extra={
        "requestBody": {
            "required": True,
            "description": "A zip of the folder that convtrt.py or retrain.py left.",
            "content": {
                "application/zip": FILE,
                "application/x-zip-compressed": FILE,
                "application/octet-stream": FILE,
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "properties": {"file": {"type": "string", "format": "binary"}},
                    }
                },
            },
        }
    },
)
async def take_in(
    request: Request,
    response: Response,
    name: Annotated[
        str,
        Query(
            description="What to call it.",
            pattern=NAME,
            max_length=NAME_LENGTH,
            examples=["bracket"],
        ),
    ],
    activate: Annotated[
        bool,
        Query(
            description="Let it go live when it passes the gate, also where these very files were"
            " kept or held before; else it is only kept."
        ),
    ] = True,
) -> TakenInBody:
    """Send a zip with meta.json, model.onnx, the memory bank or statistics, and the weights.

    A plan is not taken: it holds machine code. It is made on the device that runs it.
    """
    store, settings = store_of(request), _settings(request)

    def publish(zipped: Path) -> str:
        with store.staging() as folder:
            unpack_model(zipped, folder, settings.max_upload_bytes)
            if activate and (folder / ONNX).is_file():
                return store.offer(name, folder, {"upload": True})
            return store.take_in(name, folder, {"upload": True, "activate": False})

    datasets: Datasets = request.app.state.datasets
    async with upload_folder(datasets) as folder:
        with room():
            parts = await receive(request, folder, "model.zip", settings.max_upload_bytes)
            if len(parts) != 1:
                raise BadRequest(f"The form has {len(parts)} files; send one zip.")
            version = await asyncio.to_thread(publish, parts[0].path)
    response.headers["Location"] = f"/models/{quote(name)}/versions/{version}"
    has_engine = (store.folder(name, version) / ONNX).is_file()
    return TakenInBody(name=name, version=version, needs_conversion=not has_engine)


@router.get(
    "/models/{name}",
    dependencies=[needs("line")],
    summary="What is this model?",
    responses={404: UNKNOWN},
)
async def model(
    request: Request, name: Name, limit: Limit = PAGE, offset: Offset = 0
) -> StoredModelBody:
    """Its versions, newest first, and which one judges."""
    await aside(store_of(request).must_know, name)
    return await described(request, name, limit, offset)


@router.post(
    "/models/{name}/rollback",
    dependencies=[needs("operator")],
    summary="Go back to the version before",
    responses={
        **CHANGE,
        409: error_response(
            "There is none before it, or others than `live` and `to` are by now.",
            conflict="bracket has no version before the live one to go back to.",
        ),
    },
)
async def rollback(
    request: Request, name: Name, live: OnlyIf = None, to: OnlyIf = None
) -> StoredModelBody:
    """At once. A second call goes forward again, unless it says what it wants.

    With `live`, only where this version is live still; with `to`, only where that one takes over.
    """
    await rollout_of(request).roll_back(name, live, to)
    return await described(request, name)


@router.get(
    "/models/{name}/threshold",
    dependencies=[needs("line")],
    summary="What is the threshold?",
    responses={404: UNKNOWN, 409: NONE_LIVE, 422: UNUSABLE},
)
async def threshold(request: Request, name: Name) -> ThresholdBody:
    """That of the version that judges, in all its forms."""

    def look() -> ThresholdBody:
        return _threshold(request, name, rollout_of(request).that_judges(name, "threshold"))

    return await aside(look)


@router.put(
    "/models/{name}/threshold",
    dependencies=[needs("operator")],
    summary="Change the threshold",
    responses={**CHANGE, 409: NONE_LIVE},
)
async def change_threshold(
    request: Request, name: Name, body: ChangeThresholdBody
) -> ThresholdBody:
    """Without training again. It makes a new version, live at once unless `gate` is true.

    Its large files are those of the version before; POST /models/{name}/rollback undoes it.
    """
    wanted = {key: value for key in KEYS if (value := getattr(body, key)) is not None}
    version = await rollout_of(request).change_threshold(
        name, wanted, given_reason(body.reason), gate=body.gate
    )
    return await aside(_threshold, request, name, version)


def _threshold(request: Request, name: str, version: str) -> ThresholdBody:
    meta = Meta.read(store_of(request).folder(name, version) / META)
    found, (drawn, seen) = in_force(meta), drawn_found(meta)
    return ThresholdBody(
        model=name,
        version=version,
        state=state_of(request, name, version),
        threshold=found.threshold,
        raw=found.raw,
        false_rejects=found.false_rejects,
        at_most=found.at_most,
        drawn=drawn,
        found=seen,
        limits=[LimitBody(**asdict(row)) for row in found.rows],
    )


def state_of(request: Request, name: str, version: str) -> str:
    """As it stands in the model's `versions`. Blocks."""
    return versions_of(request, name, [version])[0].state


async def aside(work: Callable[..., Result], *arguments: Any) -> Result:
    """Look at the disk, in threads that no part needs."""
    return await asyncio.get_running_loop().run_in_executor(_THREADS, work, *arguments)


async def described(
    request: Request, name: str, limit: int = PAGE, offset: int = 0
) -> StoredModelBody:
    inspector: Inspector = request.app.state.inspector
    resident = name in inspector.residents.names()
    found = inspector.residents.get(name) if resident else None
    live = found.version if found else None
    at_rest = name in inspector.residents.resting
    challenger: Challenger = request.app.state.challenger
    known = challenger.of(name)
    last = known.last if known else None
    drift = drifting(request, name)

    def look() -> StoredModelBody:
        store = store_of(request)
        body = StoredModelBody(
            name=name,
            live=live,
            previous=None,
            problem=inspector.residents.problem(name),
            at_rest=at_rest,
            resident_bytes=found.runtime.nbytes if found else None,
            stale=inspector.residents.stale.get(name),
            plan_unused=found.unused if found else None,
            released=name not in inspector.not_released,
            challenge=last_challenge(last) if last else None,
            drift=drift,
            versions=[],
            refused={},
        )
        try:
            pointer, known = store.pointer(name), store.versions(name)[::-1]
            body.previous = pointer.previous if pointer else None
            body.versions = versions_of(request, name, known[offset : offset + limit], among=True)
            body.refused = store.refused(name)
        except OSError as error:  # the others are listed all the same
            body.problem = body.problem or f"{name} cannot be read: {error}."
        return body

    return await aside(look)


def last_challenge(one: Outcome) -> LastChallengeBody:
    """A challenge in short."""
    return LastChallengeBody(
        time=time_of(one.at), version=one.version,
        passed=one.passed, right=one.right, of=len(one.pictures), by=one.by, key=one.who or None,
    )  # fmt: skip


class _Record(NamedTuple):
    """What the files of a version say of it."""

    body: VersionBody  # its state is "kept", or "damaged"
    activate: bool  # it was published to go live
    gate: dict[str, Any] | None


def versions_of(
    request: Request, name: str, versions: list[str], *, among: bool = False
) -> list[VersionBody]:
    """Versions and their states: what is on the disk is looked at first, then what is in memory.

    Args:
        among: they are a list, where one that was deleted just now keeps its place, since a short
            page is the last one; else that raises UnknownVersion.
    """
    store, rollout = store_of(request), rollout_of(request)
    live = rollout.answering(name)
    records = [_record(store, name, one, among=among) for one in versions]
    pointer, coming = store.pointer(name), rollout.coming(name)

    def state(one: str, record: _Record) -> str:
        if record.body.state == "damaged":
            return "damaged"
        found, waits = record.gate, record.activate and record.gate is None
        states = {
            "live": one == live,
            "held": found is not None and found.get("ok") is False and not found.get("by_hand"),
            "previous": pointer is not None and one == pointer.previous,
            "at the gate": waits or one in coming,
            "kept": True,
        }
        return next(state for state, is_so in states.items() if is_so)

    return [
        record.body.model_copy(update={"state": state(one, record)})
        for one, record in zip(versions, records, strict=True)
    ]


def _record(store: Store, name: str, version: str, *, among: bool) -> _Record:
    try:
        stamps = tuple(map(stamp, _files(store, name, version)))
        if not stamps[0]:  # perhaps it was deleted since its files were named
            store.folder(name, version)
    except UnknownVersion as error:
        if not among:
            raise
        return _Record(_damaged(version, error), activate=False, gate=None)
    try:
        return _read_record(store, name, version, stamps)
    except Unreadable as error:
        return _Record(_damaged(version, error), activate=False, gate=None)


@lru_cache(RECORDS_KEPT)
def _files(store: Store, name: str, version: str) -> tuple[Path, ...]:
    """Where it stands what a version is; to name 600 paths takes longer than to look at them."""
    folder = store.folder(name, version)
    return folder / MANIFEST, folder / META, store.gate_folder(name, version) / GATE


@lru_cache(RECORDS_KEPT)
def _read_record(
    store: Store, name: str, version: str, stamps: tuple[tuple[int, ...], ...]
) -> _Record:
    """Read once for all lists, since a version never changes: most of a list's time is this.

    Args:
        stamps: of the files that are read.

    Raises:
        Unreadable: the system does not give them, which may pass: it is not remembered.
    """
    found = store.gate(name, version)
    try:
        manifest = store.manifest(name, version)
        folder = store.folder(name, version)
        meta = Meta.read(folder / META)
        share = never_counts(folder, meta, manifest.files)
    except Unreadable:
        raise
    except (BadBundle, BadMeta, UnknownVersion) as error:
        return _Record(_damaged(version, error), activate=False, gate=found)
    gate, problem = _gate_body(found)
    body = VersionBody(
        version=version,
        state="kept",
        created=manifest.created,
        kind=meta.model,
        origin=manifest.origin,
        files=manifest.files,
        threshold=meta.image_threshold,
        raw_threshold=_raw_threshold(meta),
        never_counts=share,
        calibration=_calibration(meta),
        camera=_camera(meta),
        gate=gate,
        problem=problem,
    )
    return _Record(body, manifest.origin.get("activate") is True, found)


def _damaged(version: str, error: Exception) -> VersionBody:
    return VersionBody(version=version, state="damaged", problem=str(error))


def _raw_threshold(meta: Meta) -> float | None:
    """None of a model that was never verified, or only in part."""
    with contextlib.suppress(BadMeta):
        return Scale.of(meta).raw_threshold
    return None


def _calibration(meta: Meta) -> CalibrationBody | None:
    known = promise(meta)
    if known is None:
        return None
    return CalibrationBody(**{key: getattr(known, key) for key in CalibrationBody.model_fields})


def _camera(meta: Meta) -> CameraBody | None:
    known = Camera.of(meta.camera)
    if known is None:
        return None
    statistics = {}
    for name, one in known.statistics.items():
        limits = known.limits.get(name)
        low, high = (side if math.isfinite(side) else None for side in limits or (math.inf,) * 2)
        statistics[name] = StatisticBody(mean=one.mean, spread=one.spread, low=low, high=high)
    blind = known.blind()
    width, height = known.size
    return CameraBody(
        pictures=known.pictures, width=width, height=height, statistics=statistics,
        sees=[code for code in CODES if code not in blind],
        blind={str(code): why for code, why in blind.items()},
    )  # fmt: skip


def _gate_body(found: dict[str, Any] | None) -> tuple[GateBody | None, str | None]:
    """What the gate found, or what is wrong with its record: any file may be damaged."""
    if found is None:
        return None, None
    try:
        return GateBody(**found), None
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        return None, f"What the gate found cannot be read: {where}: {problem['msg']}."


def store_of(request: Request) -> Store:
    store: Store = request.app.state.store
    return store


def rollout_of(request: Request) -> Rollout:
    rollout: Rollout = request.app.state.rollout
    return rollout


def _settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings
