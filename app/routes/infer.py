"""POST /infer: an image in, a verdict out, as JSON, as one line of text or as a picture."""

from __future__ import annotations

import base64
import contextlib
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Query, Request, Response
from pydantic import Field
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from app.decisions.recorder import Asked, Recorder, why_none
from app.decisions.repeats import Repeats
from app.http.accept import Answer, wanted
from app.http.access import must_have, needs, who
from app.http.base_body import Body, error_response
from app.http.body_limit import body_of
from app.http.deadlines import within_deadline
from app.http.part import ANSWERED, HEADER, MEANING, SCHEMA, checked, part_of
from app.http.request_log import request_id
from app.serving.inspection import Drawing, Inspection, Inspector
from engines.camera import Code
from engines.errors import BadImage, BadRequest, ImageTooLarge, UnsupportedBody
from engines.logs import note
from engines.verdict import Label, Verdict


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


class ImageBody(Body):
    """What was judged."""

    format: str = Field(description="What the file is by its bytes: JPEG, PNG, BMP or TIFF.")
    width: int = Field(description="Pixels, upright.")
    height: int = Field(description="Pixels, upright.")


class UnusableBody(Body):
    """Why nobody should go by a picture."""

    code: Code
    reason: str = Field(description="A sentence.")


class InspectionBody(Body):
    """The verdict on one part."""

    id: str = Field(description="The X-Request-ID of the request, or a new one.")
    part: str | None = Field(None, description="What the request called the part, as it was sent.")
    repeat_of: str | None = Field(
        None,
        description="The `id` of the inspection that this one repeats: the same picture of the same"
        " part was sent again, and this is the answer from then. It is counted once.",
    )
    model_name: str
    model_version: str = Field(description="Changes whenever a file of the model changes.")
    label: Label
    is_anomalous: bool = Field(
        description="True when `raw_score` is above `raw_threshold`, or the picture is unusable."
    )
    unusable: UnusableBody | None = Field(
        description="Why the picture is not usable, where KENSA_UNUSABLE asks; else null."
    )
    raw_score: float = Field(description="What the model measured, in units of its own.")
    score: float = Field(description="`raw_score` scaled to 0 ... 1 by the model's calibration.")
    threshold: float = Field(description="The limit for `score`.")
    raw_threshold: float = Field(description="The same limit for `raw_score`.")
    image: ImageBody
    hint: str | None = Field(
        description="What speaks against the picture, though it was judged; else null."
    )
    heatmap: HeatmapBody | None = Field(description="Null unless asked for with `heatmap=true`.")
    timing: TimingBody


router = APIRouter(tags=["inspection"], dependencies=[needs("line")])

FORM_OVERHEAD = 64 * 1024  # bytes that a form may have around its file
MAX_FIELDS = 16  # of a form, besides the file

_IMAGE_TYPES = ("image/jpeg", "image/png", "image/bmp", "image/tiff", "application/octet-stream")
_BINARY = {"type": "string", "format": "binary"}
EXAMPLE = {
    "id": "5f0c8e6c0b1d4a6f9d7c2f0e8a3b1c4d",
    "part": "KB-2046/A 17",
    "repeat_of": None,
    "model_name": "sample_bracket",
    "model_version": "0001-3f9a0c41d2e8",
    "label": "Anomaly",
    "is_anomalous": True,
    "unusable": None,
    "raw_score": 2.8731,
    "score": 0.8712,
    "threshold": 0.5,
    "raw_threshold": 1.6204,
    "image": {"format": "JPEG", "width": 1280, "height": 1024},
    "hint": None,
    "heatmap": None,
    "timing": {"queue_ms": 0.2, "decode_ms": 6.1, "infer_ms": 21.4, "total_ms": 28.0},
}
_HEADERS = {
    "X-Request-ID": "The id of the inspection.",
    "X-Kensa-Id": "The same.",
    ANSWERED: "What the request called the part, percent-encoded where it is not ASCII.",
    "X-Kensa-Repeat-Of": "The id of the inspection that this one repeats; absent otherwise.",
    "X-Kensa-Model-Name": "The model that judged.",
    "X-Kensa-Model-Version": "Its version.",
    "X-Kensa-Label": "Normal, Anomaly or Unusable.",
    "X-Kensa-Unusable": "Why the picture is not usable, such as camera_dark; absent otherwise.",
    "X-Kensa-Score": "The normalised score, 0 to 1.",
    "X-Kensa-Threshold": "The limit for it.",
    "X-Kensa-Raw-Score": "The score in the model's own units.",
    "X-Kensa-Raw-Threshold": "The limit for it.",
    "X-Kensa-Image": "The format of the file, its width and height: JPEG 1280x1024.",
    "X-Kensa-Hint": "What speaks against the picture, though it was judged; absent otherwise.",
}
RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The verdict, in the form that the header `Accept` asks for.",
        "headers": {
            name: {"description": meaning, "schema": {"type": "string"}}
            for name, meaning in _HEADERS.items()
        },
        "content": {
            "application/json": {"example": EXAMPLE},
            "text/plain": {"schema": {"type": "string"}, "example": "NG 0.8712\n"},
            "image/png": {"schema": _BINARY},
        },
    },
    400: error_response(
        "The image is damaged.", bad_image="The PNG image is damaged: a checksum does not match."
    ),
    404: error_response(
        "No model of that name.", unknown_model="There is no model 'bolt'; there is 'bracket'."
    ),
    413: error_response(
        "The image has too many bytes or pixels.",
        image_too_large="The image is 30000 x 30000 pixels; allowed are 16,000,000 in all"
        " and 65,535 a side.",
    ),
    415: error_response(
        "Not an image that Kensa reads.",
        unsupported_image="This is not a JPEG, PNG, BMP or TIFF image; send one of these.",
        unsupported_body="Kensa does not read a body of type text/html: send ...",
    ),
    422: error_response(
        "The request is malformed.",
        bad_request="The form has no file part named file; it has: image.",
    ),
    500: error_response(
        "The runtime failed on a good image.",
        runtime_failed="The model gave a score that is no number: see the log.",
    ),
    503: error_response(
        "No model is loaded, it failed a challenge, or too many requests wait: see `Retry-After`.",
        not_ready="No model is set: set KENSA_MODEL_DIR to a folder that convtrt.py made.",
        overloaded="64 parts wait for their verdict already, as many as ...",
        not_released="bracket is not released: 0001-3f9a0c41d2e8 judged 1 of 12 known ...",
    ),
    504: error_response(
        "Not within the deadline.",
        deadline_exceeded="There was no verdict within 300 ms: it takes longer, or ...",
    ),
}
_FORM = {
    "schema": {
        "type": "object",
        "required": ["file"],
        "properties": {
            "file": {**_BINARY, "description": "A JPEG, PNG, BMP or TIFF image."},
            "part": {**SCHEMA, "description": MEANING},
        },
    }
}
REQUEST_BODY = {
    "required": True,
    "description": "The image: as the part `file` of a form, or as the body itself.",
    "content": {
        "multipart/form-data": _FORM,
        **{media_type: {"schema": _BINARY} for media_type in _IMAGE_TYPES},
    },
}
ID_PARAMETER = {
    "name": "X-Request-ID",
    "in": "header",
    "required": False,
    "description": "Becomes the id of the inspection, and comes back: 1 to 128 letters, digits,"
    " `.`, `_` or `-`. Without it, or in place of any other, there is a new one.",
    "schema": {"type": "string", "examples": ["line-3.part_17"]},
}

_PART_PARAMETER = {
    "name": HEADER,
    "in": "header",
    "required": False,
    "description": f"{MEANING} Percent-encoded where it is not ASCII.",
    "schema": {"type": "string", "examples": ["KB-2046/A 17"]},
}


Words = Annotated[
    Literal["2", "3"],
    Query(description="Of the text: OK and NG, or with 3 also UNUSABLE and the reason."),
]


@router.post(
    "/infer",
    summary="Inspect one image",
    response_model=InspectionBody,
    responses=RESPONSES,
    openapi_extra={"requestBody": REQUEST_BODY, "parameters": [ID_PARAMETER, _PART_PARAMETER]},
)
async def infer(
    request: Request,
    model: Annotated[str, Query(description="The model's name; may be left out.")] = "",
    heatmap: Annotated[
        bool, Query(description="Add a heat map to the JSON answer: where the part differs.")
    ] = False,
    deadline_ms: Annotated[
        int | None,
        Query(
            ge=1,
            examples=[2000],
            description="Answer 504 after so many ms; KENSA_DEADLINE_MS at most, and where it is"
            " left out.",
        ),
    ] = None,
    part: Annotated[str, Query(description=MEANING, json_schema_extra=SCHEMA)] = "",
    words: Words = "2",
    record: Annotated[
        bool,
        Query(
            description="False: it is judged in a gap of the line, counted nowhere, not recorded;"
            " needs the role operator."
        ),
    ] = True,
) -> Response:
    """Send a JPEG, PNG, BMP or TIFF image; the answer says whether the part is normal.

    `Accept: application/json` (the default) answers with all numbers, `text/plain` with one line
    for a PLC, `OK 0.1234` or `NG 0.8712`, and `image/png` with the picture, anomalies painted over.
    With `words=3` the line of a picture that is not usable is `UNUSABLE camera_dark`.
    """
    recorder: Recorder = request.app.state.recorder
    called = part_of(request.scope["query_string"], request.headers.raw)
    inspector: Inspector = request.app.state.inspector
    # A refusal counts under the only model as a verdict does.
    named = model or inspector.residents.only or ""
    asked = Asked(request_id(request), called, named, who(request))
    if not record:
        must_have(request, "operator")
        answer, drawing = how_to_answer(request, heatmap=heatmap)
        inspection = await _tried(request, asked, drawing, deadline_ms)
        return _answer(inspection, answer, asked, None, words)
    data: bytes | None = None
    try:
        answer, drawing = how_to_answer(request, heatmap=heatmap)
        async with picture_of(request, model) as (data, in_form):
            if not called and in_form:
                asked = replace(asked, part=in_form)
                note(part=in_form)
            with inspector.admission.admitted():
                inspecting = _once(request, asked, data, drawing)
                inspection, repeat_of = await within_deadline(request, inspecting, deadline_ms)
    except Exception as error:
        bad = isinstance(error, BadImage)
        inspector.counts.refused += bad
        recorder.no_verdict(asked, why_none(error), data if bad else None)
        raise
    if repeat_of is None:
        recorder.verdict(asked, inspection, data)
    else:  # in the log it is a part as any other, which the inspector would have noted
        judged_by, verdict = inspection.model, inspection.verdict
        note(model=judged_by.name, version=judged_by.version, label=verdict.label)
    return _answer(inspection, answer, asked, repeat_of, words)


async def _tried(
    request: Request, asked: Asked, drawing: Drawing | None, deadline_ms: int | None
) -> Inspection:
    """The inspection of a picture that is no part of the line: it is counted nowhere."""
    inspector: Inspector = request.app.state.inspector
    async with picture_of(request, asked.model) as (data, _):
        trying = inspector.try_out(data, asked.model or None, drawing)
        return await within_deadline(request, trying, deadline_ms)


def how_to_answer(request: Request, *, heatmap: bool) -> tuple[Answer, Drawing | None]:
    """In which form a request wants its answer, and what has to be drawn for that."""
    answer = wanted(request.headers.get("accept", ""))
    if answer == "image/png":
        return answer, "overlay"
    return answer, "heatmap" if heatmap and answer == "application/json" else None


@contextlib.asynccontextmanager
async def picture_of(request: Request, model: str) -> AsyncIterator[tuple[bytes, str]]:
    """The picture in a request, and its field `part`; counted as in memory as long as the block.

    Raises:
        UnknownModel, NotReady, Overloaded: before it is read, where it would not be judged.
        BadRequest, ImageTooLarge: as `read_image`.
    """
    inspector: Inspector = request.app.state.inspector
    inspector.residents.call(model or None)
    inspector.admission.check_room()
    with inspector.admission.holding() as hold:
        data, in_form = await read_image(request, inspector.limits.max_bytes, hold)
        yield data, checked(in_form)  # also where another one comes first


async def _once(
    request: Request, asked: Asked, data: bytes, drawing: Drawing | None
) -> tuple[Inspection, str | None]:
    """The inspection of a picture, and the id of the one that it repeats, if it does."""
    inspector: Inspector = request.app.state.inspector
    repeats: Repeats = request.app.state.repeats

    def inspect() -> Awaitable[Inspection]:
        return inspector.inspect(data, asked.model or None, drawing, asked.part)

    if not asked.part or not repeats.seconds:
        return await inspect(), None
    sha256 = await inspector.beside(lambda: hashlib.sha256(data).hexdigest())
    key = asked.model, asked.part, sha256
    inspection, repeat_of = await repeats.once(key, asked.id, inspect)
    if repeat_of is not None and drawing is not None:  # which are not remembered
        drawn = await inspector.draw_again(data, asked.model or None, drawing)
        inspection = replace(inspection, drawing=drawn)
    return inspection, repeat_of


async def read_image(
    request: Request, max_bytes: int, hold: Callable[[int], None]
) -> tuple[bytes, str]:
    """The image file in a request, the body itself or the part `file` of a form; its field `part`.

    Args:
        hold: is told how many bytes have come, see `Inspector.holding`.

    Raises:
        Overloaded: by `hold`.
        UnsupportedBody: the content type is neither.
        BadRequest: the form is malformed, or has no such part, or several files.
        ImageTooLarge: more than `max_bytes`; what comes after them is not read.
    """
    content_type = request.headers.get("content-type", "application/octet-stream")
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type == "multipart/form-data":
        return await _file_of_form(request, max_bytes + FORM_OVERHEAD, hold)
    if media_type.startswith("image/") or media_type == "application/octet-stream":
        return b"".join([chunk async for chunk in _capped(request, max_bytes, hold)]), ""
    raise UnsupportedBody(
        f"Kensa does not read a body of type {media_type[:100]}: send the image with Content-Type"
        " image/jpeg (or png, bmp, tiff), or a multipart/form-data form with a part named file."
    )


def _capped(
    request: Request, most: int, hold: Callable[[int], None]
) -> AsyncGenerator[bytes, None]:
    too_large = ImageTooLarge(
        f"The request has more than the {most:,} bytes allowed: send a smaller image, or raise"
        " KENSA_MAX_IMAGE_BYTES."
    )
    return body_of(request, most, too_large, hold)


async def _file_of_form(
    request: Request, most: int, hold: Callable[[int], None]
) -> tuple[bytes, str]:
    async with contextlib.aclosing(_capped(request, most, hold)) as chunks:
        parser = MultiPartParser(request.headers, chunks, max_files=1, max_fields=MAX_FIELDS)
        parser.spool_max_size = most  # in memory: a temporary file for each image wears out a disk
        try:
            form = await parser.parse()
        except MultiPartException as error:
            if error.message.startswith("Part exceeded"):  # Starlette's word for one without a name
                raise BadRequest(
                    "A part of the form is as large as a file and has no filename: send it as a"
                    ' file, with filename="part.jpg" in its Content-Disposition (curl -F'
                    " file=@part.jpg does so)."
                ) from None
            raise BadRequest(f"The form cannot be read: {error.message}") from None
    file = form.get("file")
    if isinstance(file, UploadFile):
        part = form.get("part", "")
        return await file.read(), part if isinstance(part, str) else ""
    raise BadRequest(
        "The form has no file part named file (one with a filename);"
        f" it has: {', '.join(sorted(form))[:200] or 'nothing'}."
    )


def _answer(
    inspection: Inspection, answer: Answer, asked: Asked, repeat_of: str | None, words: str
) -> Response:
    headers = _headers(inspection, asked.id)
    if repeat_of is not None:
        headers["X-Kensa-Repeat-Of"] = repeat_of
    if answer == "image/png":
        return Response(inspection.drawing, media_type=answer, headers=headers)
    if answer == "text/plain":
        line = text_line(inspection.verdict, words)
        return Response(line, media_type=answer, headers=headers)
    body = inspection_body(inspection, asked, repeat_of).model_dump_json()
    return Response(body, media_type=answer, headers=headers)


def text_line(verdict: Verdict, words: str) -> str:
    """A verdict for a PLC that knows two words, or three."""
    if verdict.unusable is not None and words == "3":
        return f"UNUSABLE {verdict.unusable.code}\n"
    return f"{'NG' if verdict.is_anomalous else 'OK'} {verdict.score:.4f}\n"


def _headers(inspection: Inspection, request_id: str) -> dict[str, str]:
    verdict, seen = inspection.verdict, inspection.seen
    hint = {"X-Kensa-Hint": seen.hint} if seen.hint else {}
    unusable = {"X-Kensa-Unusable": verdict.unusable.code} if verdict.unusable else {}
    return {
        "X-Kensa-Id": request_id,
        "X-Kensa-Model-Name": quote(inspection.model.name),  # headers are ASCII
        "X-Kensa-Model-Version": inspection.model.version,
        "X-Kensa-Label": verdict.label,
        **unusable,
        "X-Kensa-Score": f"{verdict.score:.6f}",
        "X-Kensa-Threshold": f"{verdict.threshold:.6f}",
        "X-Kensa-Raw-Score": f"{verdict.raw_score:.6g}",
        "X-Kensa-Raw-Threshold": f"{verdict.raw_threshold:.6g}",
        "X-Kensa-Image": f"{seen.kind} {seen.width}x{seen.height}",
        **hint,
    }


def inspection_body(inspection: Inspection, asked: Asked, repeat_of: str | None) -> InspectionBody:
    verdict, timing, model = inspection.verdict, inspection.timing, inspection.model
    seen = inspection.seen
    size = model.runtime.image_size
    heatmap = None
    if inspection.drawing is not None:
        png = base64.b64encode(inspection.drawing).decode()
        heatmap = HeatmapBody(width=size, height=size, png=png)
    return InspectionBody(
        id=asked.id,
        part=asked.part or None,
        repeat_of=repeat_of,
        model_name=model.name,
        model_version=model.version,
        label=verdict.label,
        is_anomalous=verdict.is_anomalous,
        unusable=UnusableBody(**verdict.unusable._asdict()) if verdict.unusable else None,
        raw_score=verdict.raw_score,
        score=verdict.score,
        threshold=verdict.threshold,
        raw_threshold=verdict.raw_threshold,
        image=ImageBody(format=seen.kind, width=seen.width, height=seen.height),
        hint=seen.hint,
        heatmap=heatmap,
        timing=TimingBody(
            queue_ms=round(timing.queue_ms, 2),
            decode_ms=round(timing.decode_ms, 2),
            infer_ms=round(timing.infer_ms, 2),
            total_ms=round(timing.total_ms, 2),
        ),
    )
