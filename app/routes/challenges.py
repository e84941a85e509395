"""Known pictures that a model is challenged with, and whether it is released."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi import Path as InPath
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from pydantic import ConfigDict, Field, model_validator
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from app.decisions.database import Line
from app.http.accept import wanted
from app.http.access import KeyFirst, needs, who
from app.http.base_body import (
    MOST_REASON,
    Body,
    error_response,
    given_reason,
    read_json,
    whole_schema,
)
from app.http.body_limit import body_of
from app.routes.decisions import picture_of
from app.routes.models import LastChallengeBody, Name, last_challenge
from app.routes.record import OFF, Before, Limit, Why, ask, recorder_of, time_of
from app.serving.challenges import RIGHT, Challenger
from engines.errors import BadRequest, UnknownDataset, UnsupportedBody, UploadTooLarge
from engines.image import ImageLimits
from engines.queue.job_requests import few_keys
from engines.store.challenges import (
    MOST,
    MOST_BYTES,
    ChallengeSet,
    Expected,
    Judged,
    Offered,
    Outcome,
)
from engines.store.datasets import Datasets, Split
from engines.store.image_names import checked_name
from engines.store.versions import Store

FORM_OVERHEAD = 256 * 1024  # bytes that a form may have around its files
MAX_FIELDS = 16  # of a form, besides its files
PAGE = 100  # challenges


class PictureBody(Body):
    """A picture that the server has: one of these three."""

    model_config = ConfigDict(protected_namespaces=(), extra="forbid")

    decision: str | None = Field(
        None,
        min_length=1,
        max_length=200,
        description="The id of a decision whose picture is kept.",
    )
    number: int | None = Field(
        None, ge=1, le=2**62, strict=True, description="Its `number`, where an id came twice."
    )
    category: str | None = Field(
        None, max_length=64, description="Of a training image, with `split` and `name`."
    )
    split: Split | None = None
    name: str | None = Field(None, max_length=200, description="The image's.")
    sha256: str | None = Field(
        None,
        pattern=r"^[0-9a-f]{64}$",
        description="Of a picture that is one of the known already.",
    )

    @model_validator(mode="after")
    def _is_one(self) -> PictureBody:
        image = (self.category, self.split, self.name)
        ways = [self.decision is not None, None not in image, self.sha256 is not None]
        is_mixed = image != (None, None, None) and None in image
        if sum(ways) != 1 or is_mixed or (self.number is not None and self.decision is None):
            raise ValueError(
                "name a picture by decision (and number), by category, split and name, or by the"
                " sha256 of one that is known already"
            )
        return self


_REFERRED = Field(min_length=1, max_length=MOST, description=f"1 to {MOST}, with the others.")


class ChallengesRequest(Body):
    """All pictures that a model is challenged with from now on."""

    model_config = ConfigDict(
        protected_namespaces=(),
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "good": [{"category": "bracket", "split": "normal", "name": "01.png"}],
                    "bad": [{"decision": "line-3.part_17"}],
                    "reason": "The master parts of 2026.",
                    "at_shifts": True,
                }
            ]
        },
    )

    @model_validator(mode="before")
    @classmethod
    def _is_short(cls, content: Any) -> Any:
        return few_keys(content)

    good: list[PictureBody] = _REFERRED
    bad: list[PictureBody] = _REFERRED
    reason: str = Field(
        min_length=1, max_length=MOST_REASON, pattern=r"\S", strict=True, description="Why."
    )
    at_shifts: bool = Field(
        False,
        strict=True,
        description="True: the server challenges the model by itself when a shift begins"
        " (KENSA_SHIFTS).",
    )


class BesideFiles(Body):
    """Pictures that the server has, beside the files of a form."""

    model_config = ConfigDict(protected_namespaces=(), extra="forbid")

    good: list[PictureBody] = Field([], max_length=MOST)
    bad: list[PictureBody] = Field([], max_length=MOST)


class ReleaseBody(Body):
    """Why parts may pass though a challenge failed."""

    model_config = ConfigDict(
        protected_namespaces=(),
        extra="forbid",
        json_schema_extra={"examples": [{"reason": "The master part bad/3.png was worn."}]},
    )

    reason: str = Field(
        min_length=1, max_length=MOST_REASON, pattern=r"\S", strict=True, description="Why."
    )


class JudgedBody(Body):
    """What a version said of a known picture."""

    name: str = Field(description="With its group: `bad/3.png`.")
    expected: Expected = Field(description="What it shows.")
    sha256: str
    right: bool = Field(description="Whether the verdict is the one that was expected.")
    label: str | None = Field(description="Null where it could not be judged.")
    score: float | None = Field(description="0 to 1.")
    threshold: float | None = Field(description="The limit for `score`.")
    raw_score: float | None
    raw_threshold: float | None
    problem: str | None = Field(description="Why it could not be judged; else null.")


class OutcomeBody(LastChallengeBody):
    """What a challenge found."""

    model: str
    released: bool = Field(description="Whether parts pass now.")
    pictures: list[JudgedBody]


class KnownBody(Body):
    """A picture of which it is known what it shows."""

    name: str = Field(description="With its group: `bad/3.png`.")
    expected: Expected = Field(description="What it shows.")
    sha256: str
    bytes: int
    format: str = Field(description="What the file is by its bytes: JPEG, PNG, BMP or TIFF.")
    origin: dict[str, Any] = Field(
        description="The decision or the training image that it is a copy of; empty for an upload."
    )
    last: JudgedBody | None = Field(description="Of the last challenge; null before the first.")


class ChallengesBody(Body):
    """What a model is challenged with, and where it stands."""

    model: str
    released: bool = Field(description="Whether parts pass.")
    problem: str | None = Field(description="Why not, and what opens it; else null.")
    at_shifts: bool = Field(description="Whether it is challenged when a shift begins.")
    changed: datetime | None = Field(description="When these pictures were named, UTC.")
    key: str | None = Field(description="Whose key named them.")
    reason: str | None = Field(description="Why.")
    last: LastChallengeBody | None = Field(description="The last challenge with these pictures.")
    pictures: list[KnownBody]


class PastChallengeBody(LastChallengeBody):
    """A challenge, as the audit trail has it."""

    number: int = Field(description="Of its line in the audit trail.")
    hash: str = Field(description="SHA-256 of the line and of the hash before it.")


class EvidenceBody(Body):
    """How a version judged a picture, again and again."""

    name: str = Field(description="With its group: `bad/3.png`.")
    expected: Expected
    sha256: str
    version: str
    attempts: int = Field(description="How often it was shown.")
    right: int = Field(description="How often the verdict was the one that was expected.")
    failed: int = Field(description="How often it could not be judged.")
    raw_score_min: float | None = Field(description="Null where it never was.")
    raw_score_max: float | None
    score_min: float | None
    score_max: float | None


class HistoryBody(Body):
    """Past challenges of a model, newest first, and what they say of each picture."""

    model: str
    challenges: list[PastChallengeBody]
    pictures: list[EvidenceBody] = Field(
        description="Of the challenges on this page, by picture and version."
    )
    next: int | None = Field(description="The next page's `before`; null at the end.")


router = APIRouter(tags=["challenges"], route_class=KeyFirst)

_BINARY = {"type": "string", "format": "binary"}
_IMAGES = ("image/jpeg", "image/png", "image/bmp", "image/tiff")
_UNKNOWN_MODEL = error_response(
    "No such model.", unknown_model="There is no model 'bolt'; there is 'bracket'."
)
_FULL = error_response(
    "There is no room on the disk; nothing was changed.",
    disk_full="The disk of the data folder is full: delete images or models that are not needed.",
    read_only="Nothing was changed, because the data folder cannot be written (...): ...",
)
_UNREADABLE = error_response(
    "The system does not give a file of them.",
    unreadable=".../3f9a0c41... cannot be read at the moment (Permission denied): ...",
)
_NONE = error_response(
    "The model has no known pictures.",
    conflict="bracket has no known pictures: PUT /models/bracket/challenges names some.",
)
_PUT: dict[int | str, dict[str, Any]] = {
    400: error_response("A picture is damaged.", bad_image="The PNG image is cut short."),
    404: error_response(
        "No such model, decision or training image, or its picture is not kept.",
        unknown_model="There is no model 'bolt'; there is 'bracket'.",
        unknown_decision="There is no decision 'KB-2046': it was never made, or is too old to ...",
        unknown_dataset="There is no category bolt; there is: bracket.",
    ),
    409: OFF,
    413: error_response(
        "Too many pictures, or one is too large.",
        upload_too_large="A model is challenged with up to 64 pictures of 256 MiB together: ...",
        image_too_large="The image is 30000 x 30000 pixels; allowed are 16,000,000 in all ...",
    ),
    415: error_response(
        "Not a picture that Kensa reads, or neither JSON nor a form.",
        unsupported_image="This is not a JPEG, PNG, BMP or TIFF image; send one of these.",
        unsupported_body="Kensa does not read a body of type text/html here: send JSON, or a form"
        " with files named good and bad.",
    ),
    422: error_response(
        "There is no good or no bad one, or a known one is damaged.",
        bad_request="There is no bad picture: a model is challenged with good and bad ones, ...",
        bad_bundle="The picture bad/3.png is damaged (its SHA-256 differs): PUT ...",
    ),
    503: _UNREADABLE,
    507: _FULL,
}


_FORM = {
    "type": "object",
    "required": ["reason"],
    "properties": {
        "good": {"type": "array", "items": _BINARY, "description": "Pictures of good parts."},
        "bad": {"type": "array", "items": _BINARY, "description": "Pictures of defects."},
        "pictures": {
            "type": "string",
            "description": "Those that the server has, as JSON: its `good` and `bad` as in a body"
            " of JSON.",
        },
        "reason": {"type": "string", "description": "Why."},
        "at_shifts": {"type": "string", "enum": ["true", "false"], "default": "false"},
    },
}
_REQUEST_BODY = {
    "required": True,
    "description": "Pictures that the server has, as JSON; or a form with the files themselves.",
    "content": {
        "application/json": {"schema": whole_schema(ChallengesRequest)},
        "multipart/form-data": {"schema": _FORM},
    },
}


# ---- which pictures ------------------------------------------------------------------------------


@router.put(
    "/models/{name}/challenges",
    dependencies=[needs("operator")],
    summary="Name the pictures that a model is challenged with",
    responses=_PUT,
    openapi_extra={"requestBody": _REQUEST_BODY},
)
async def put(request: Request, name: Name) -> ChallengesBody:
    """Known good and known bad ones; they take the place of those before. They are copied.

    Whether the model is released stays as it is: one that is not has to pass with these.
    """
    await run_in_threadpool(_store(request).must_know, name)
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    async with contextlib.AsyncExitStack() as stack:
        if media_type == "application/json":
            asked = read_json(ChallengesRequest, await request.body())
            offered = [*_offered(request, name, asked.good, "good"),
                       *_offered(request, name, asked.bad, "bad")]  # fmt: skip
            reason, at_shifts = asked.reason, asked.at_shifts
        elif media_type == "multipart/form-data":
            form = await _form(request)
            stack.push_async_callback(form.close)
            offered, fields = _sent(form)
            reason, at_shifts = fields["reason"], fields["at_shifts"] == "true"
            known = _beside(fields["pictures"])
            offered = [*_offered(request, name, known.good, "good"),
                       *_offered(request, name, known.bad, "bad"), *offered]  # fmt: skip
        else:
            raise UnsupportedBody(
                f"Kensa does not read a body of type {media_type[:100] or 'unknown'} here: send"
                " JSON with Content-Type application/json, or a form with files named good and bad."
            )
        await _challenger(request).put(
            name, offered, who(request), given_reason(reason), at_shifts=at_shifts
        )
    return _described(request, name)


@router.get(
    "/models/{name}/challenges",
    dependencies=[needs("line")],
    summary="What is a model challenged with?",
    responses={404: _UNKNOWN_MODEL},
)
async def challenges(request: Request, name: Name) -> ChallengesBody:
    """Its known pictures, what the last challenge said of each, and whether it is released."""
    await run_in_threadpool(_store(request).must_know, name)
    return _described(request, name)


@router.delete(
    "/models/{name}/challenges",
    dependencies=[needs("operator")],
    summary="Challenge a model no more",
    status_code=204,
    response_class=Response,
    responses={404: _UNKNOWN_MODEL, 409: _NONE, 503: _UNREADABLE, 507: _FULL},
)
async def delete(request: Request, name: Name, reason: Why) -> None:
    """And delete its known pictures. It is released then, as any model without such."""
    await run_in_threadpool(_store(request).must_know, name)
    await _challenger(request).delete(name, who(request), given_reason(reason))


@router.get(
    "/models/{name}/challenges/history",
    dependencies=[needs("line")],
    summary="How were the known pictures judged until now?",
    responses={404: _UNKNOWN_MODEL, 409: OFF},
)
async def history(
    request: Request,
    name: Name,
    version: Annotated[
        str | None,
        Query(description="By this one alone.", max_length=64, examples=["0001-3f9a0c41d2e8"]),
    ] = None,
    limit: Limit = PAGE,
    before: Before = None,
) -> HistoryBody:
    """Challenges, newest first; and of each picture how often it was judged rightly, and how far
    its scores lay apart: what an auditor asks of a gauge.
    """

    def look() -> HistoryBody:
        _store(request).must_know(name)
        lines = recorder_of(request).read(lambda it: it.challenges(name, limit, before, version))
        past = [(line, _outcome_of(line)) for line in lines]
        return HistoryBody(
            model=name,
            challenges=[
                PastChallengeBody(**last_challenge(one).model_dump(), number=line.number,
                                  hash=line.hash)
                for line, one in past
            ],
            pictures=_evidence([one for _, one in past]),
            next=lines[-1].number if len(lines) == limit else None,
        )  # fmt: skip

    return await ask(look)


@router.get(
    "/models/{name}/challenges/{sha256}",
    dependencies=[needs("line")],
    summary="See a known picture",
    response_class=Response,
    responses={
        200: {
            "description": "The file.",
            "content": {kind: {"schema": _BINARY} for kind in _IMAGES},
        },
        404: error_response(
            "No such model, or no such picture.",
            unknown_model="There is no model 'bolt'; there is 'bracket'.",
            unknown_dataset="bracket is challenged with no picture of this SHA-256.",
        ),
        422: error_response(
            "It is gone, or damaged.",
            bad_bundle="The picture bad/3.png is damaged (its SHA-256 differs): PUT ...",
        ),
        503: _UNREADABLE,
    },
)
async def picture(
    request: Request,
    name: Name,
    sha256: Annotated[str, InPath(description="As in the list.", examples=["9f0c61b2" * 8])],
) -> Response:
    """The file as it was sent."""
    await run_in_threadpool(_store(request).must_know, name)
    found = _challenger(request).of(name) or ChallengeSet()
    known = next((one for one in found.pictures if one.sha256 == sha256), None)
    if known is None:
        raise UnknownDataset(f"{name} is challenged with no picture of this SHA-256.")
    data = await run_in_threadpool(_challenger(request).picture, name, known)
    media_type = f"image/{known.format.removeprefix('Big').lower()}"
    return Response(data, media_type=media_type, headers={"X-Content-Type-Options": "nosniff"})


# ---- a challenge, and what comes of it -----------------------------------------------------------


@router.post(
    "/models/{name}/challenge",
    dependencies=[needs("line")],
    summary="Challenge a model",
    response_model=OutcomeBody,
    responses={
        200: {
            "description": "What it found, whether it passed or not.",
            "content": {
                "text/plain": {"schema": {"type": "string"}, "example": "NG 11/12 bad/3.png\n"}
            },
        },
        404: _UNKNOWN_MODEL,
        409: _NONE,
        503: error_response(
            "The model is not in memory, or what is known of it cannot be read.",
            not_ready="bracket was unloaded; POST /v2/repository/models/bracket/load brings it ...",
            gpu_lost="The GPU failed: ...",
            unreadable=".../challenges.json cannot be read at the moment (Permission denied): ...",
        ),
        507: _FULL,
    },
)
async def challenge(request: Request, name: Name) -> Response:
    """The live version judges its known pictures. One that is judged wrongly, or cannot be judged,
    and no part passes until all are judged rightly, or a person lets it through.

    `Accept: text/plain` answers with one line: `OK 12/12`, or `NG 11/12` and the first wrong one.
    """
    await run_in_threadpool(_store(request).must_know, name)
    challenger = _challenger(request)
    outcome = await challenger.challenge(name, who(request), "request")
    if wanted(request.headers.get("accept", "")) == "text/plain":
        return Response(_line(outcome), media_type="text/plain")
    found = challenger.of(name)
    body = OutcomeBody(
        **last_challenge(outcome).model_dump(), model=name,
        released=found is None or found.released,
        pictures=[_judged(one) for one in outcome.pictures],
    )  # fmt: skip
    return Response(body.model_dump_json(), media_type="application/json")


@router.post(
    "/models/{name}/release",
    dependencies=[needs("operator")],
    summary="Let parts pass though a challenge failed",
    responses={
        404: _UNKNOWN_MODEL,
        409: error_response(
            "The model is released.",
            conflict="bracket is released: there is nothing to let through.",
        ),
        503: _UNREADABLE,
        507: _FULL,
    },
)
async def release(request: Request, name: Name, body: ReleaseBody) -> ChallengesBody:
    """A person's word, with a reason, until the next challenge fails."""
    await run_in_threadpool(_store(request).must_know, name)
    await _challenger(request).release(name, who(request), given_reason(body.reason))
    return _described(request, name)


# ---- what is asked for ---------------------------------------------------------------------------


def _offered(
    request: Request, model: str, pictures: Sequence[PictureBody], expected: Expected
) -> list[Offered]:
    """Pictures that the server has; they are looked for when they are read."""
    recorder, limits = recorder_of(request), _limits(request)
    datasets: Datasets = request.app.state.datasets
    challenger = _challenger(request)

    def offer(one: PictureBody) -> Offered:
        origin = one.model_dump(exclude_none=True)
        if (decision := one.decision) is not None:
            name = decision if one.number is None else f"{decision}-{one.number}"
            return Offered(
                name, expected, origin, lambda: picture_of(recorder, decision, one.number)
            )
        if one.category is not None and one.split is not None and one.name is not None:
            place = one.category, one.split, one.name
            return Offered(one.name, expected, origin, lambda: datasets.read(*place, limits))
        there = challenger.of(model) or ChallengeSet()
        known = next((known for known in there.pictures if known.sha256 == one.sha256), None)
        if known is None:
            raise UnknownDataset(f"{model} is challenged with no picture {one.sha256}.")
        return Offered(known.name, expected, known.origin, lambda: challenger.picture(model, known))

    return [offer(one) for one in pictures]


async def _form(request: Request) -> FormData:
    too_large = UploadTooLarge(
        f"The form has more than the {MOST_BYTES // 1024**2} MiB that known pictures may have:"
        " send fewer, or smaller ones."
    )
    most = MOST_BYTES + FORM_OVERHEAD
    async with contextlib.aclosing(body_of(request, most, too_large)) as chunks:
        parser = MultiPartParser(request.headers, chunks, max_files=MOST, max_fields=MAX_FIELDS)
        try:
            return await parser.parse()
        except MultiPartException as error:
            raise BadRequest(f"The form cannot be read: {error.message}") from None


def _sent(form: FormData) -> tuple[list[Offered], dict[str, str]]:
    """The files in a form, and its fields."""
    offered, fields = list[Offered](), {"reason": "", "at_shifts": "false", "pictures": "{}"}
    for key, value in form.multi_items():
        if isinstance(value, UploadFile) and key == "good":
            offered.append(Offered(_name(value), "good", {}, _reader(value)))
        elif isinstance(value, UploadFile) and key == "bad":
            offered.append(Offered(_name(value), "bad", {}, _reader(value)))
        elif key in RIGHT:
            raise BadRequest(f"A part {key!r} of the form has no file name: say what it is called.")
        elif isinstance(value, str) and key in fields:
            fields[key] = value
        else:
            raise BadRequest(
                f"The form has a part {key[:100]!r}: it may have files named good and bad, and the"
                " fields reason, at_shifts and pictures."
            )
    if fields["at_shifts"] not in ("true", "false"):
        raise BadRequest("The field at_shifts is wrong: say true or false.")
    return offered, fields


def _beside(text: str) -> BesideFiles:
    """What the field `pictures` says. Raises as `read_json`, and names the field."""
    try:
        return read_json(BesideFiles, text.encode(errors="replace"))
    except RequestValidationError as error:
        problems = [{**one, "loc": ("body", "pictures", *one["loc"][1:])} for one in error.errors()]
        raise RequestValidationError(problems) from None


def _name(file: UploadFile) -> str:
    return checked_name(file.filename or "")


def _reader(file: UploadFile) -> Any:
    def read() -> bytes:
        file.file.seek(0)
        return file.file.read()

    return read


# ---- what is shown -------------------------------------------------------------------------------


def _described(request: Request, name: str) -> ChallengesBody:
    found = _challenger(request).of(name) or ChallengeSet()
    inspector = request.app.state.inspector
    said = {one.sha256: _judged(one) for one in (found.last.pictures if found.last else ())}
    return ChallengesBody(
        model=name,
        released=found.released,
        problem=inspector.not_released.get(name),
        at_shifts=found.at_shifts,
        changed=time_of(found.changed) if found.changed else None,
        key=found.who or None,
        reason=found.reason or None,
        last=last_challenge(found.last) if found.last else None,
        pictures=[
            KnownBody(name=one.called, expected=one.expected, sha256=one.sha256, bytes=one.bytes,
                      format=one.format, origin=one.origin, last=said.get(one.sha256))
            for one in found.pictures
        ],
    )  # fmt: skip


def _judged(one: Judged) -> JudgedBody:
    return JudgedBody(**{**one.model_dump(), "name": one.called})


def _line(outcome: Outcome) -> str:
    """For a PLC: `OK 12/12`, or `NG 11/12 bad/3.png`."""
    counts = f"{outcome.right}/{len(outcome.pictures)}"
    if outcome.passed:
        return f"OK {counts}\n"
    return f"NG {counts} {outcome.wrong[0].called}\n"


def _outcome_of(line: Line) -> Outcome:
    """What the trail says of a challenge."""
    details = line.details
    return Outcome(at=line.at, version=details["version"], who=line.who, by=details["by"],
                   pictures=tuple(map(Judged.model_validate, details["pictures"])))  # fmt: skip


def _evidence(outcomes: Sequence[Outcome]) -> list[EvidenceBody]:
    """By picture and version, in the order of the newest challenge."""
    found: dict[tuple[str, str, str], list[Judged]] = {}
    for outcome in outcomes:
        for one in outcome.pictures:
            found.setdefault((one.sha256, one.expected, outcome.version), []).append(one)
    rows = []
    for (sha256, _, version), said in found.items():
        raw = [one.raw_score for one in said if one.raw_score is not None]
        scores = [one.score for one in said if one.score is not None]
        rows.append(EvidenceBody(
            name=said[0].called, expected=said[0].expected, sha256=sha256, version=version,
            attempts=len(said), right=sum(one.right for one in said), failed=len(said) - len(raw),
            raw_score_min=min(raw, default=None), raw_score_max=max(raw, default=None),
            score_min=min(scores, default=None), score_max=max(scores, default=None),
        ))  # fmt: skip
    return rows


def _challenger(request: Request) -> Challenger:
    found: Challenger = request.app.state.challenger
    return found


def _store(request: Request) -> Store:
    found: Store = request.app.state.store
    return found


def _limits(request: Request) -> ImageLimits:
    limits: ImageLimits = request.app.state.inspector.limits
    return limits
