"""The tensors of the Open Inference Protocol: a body -> images, and verdicts -> a body.

https://github.com/kserve/open-inference-protocol, with Triton's extension for binary tensors: the
JSON comes first, its length stands in a header, and the tensors follow it.
"""

from __future__ import annotations

import base64
import json
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from app.open_inference.bodies import MAX_IMAGES, InferBody, InferTensorBody
from app.serving.inspection import Image, Inspection
from engines.errors import BadRequest, ImageTooLarge, RuntimeFailed
from engines.image import ImageLimits, check_size, hints_in_short

HEADER_LENGTH = "Inference-Header-Content-Length"
MAX_JSON = 2 * 1024 * 1024  # bytes; reading them holds all other threads up
MAX_BRACKETS = 1_000  # in JSON; a million lists take a second to become objects
MAX_JSON_NUMBERS = 100_000  # of a map in an answer

SHARED_MEMORY = "Kensa shares no memory with its clients: send tensors in the body of the request."

_Body = TypeVar("_Body", bound=BaseModel)


@dataclass(frozen=True)
class TensorKind:
    """What a tensor is called and made of. -1 is any number; the first one is that of images."""

    name: str
    datatype: str
    shape: tuple[int, ...]


INPUTS = (TensorKind("image", "UINT8", (-1, -1, -1, 3)), TensorKind("file", "BYTES", (-1,)))
OUTPUTS = (
    TensorKind("score", "FP32", (-1,)),
    TensorKind("raw_score", "FP32", (-1,)),
    TensorKind("threshold", "FP32", (-1,)),
    TensorKind("raw_threshold", "FP32", (-1,)),
    TensorKind("is_anomalous", "BOOL", (-1,)),
    TensorKind("label", "BYTES", (-1,)),
    TensorKind("map", "FP32", (-1, -1, -1)),
)
_NOT_UNLESS_NAMED = "map"


@dataclass(frozen=True)
class InferRequest:
    """What a client wants: verdicts on images, as these tensors."""

    id: str | None
    tensor: str  # image or file
    images: Sequence[Image]
    outputs: dict[str, bool]  # name -> whether as binary data
    timeout_us: int = 0  # 0: none
    part: str = ""  # what the client calls it


# ---- from a body to images ----------------------------------------------------------------------


def most_bytes(limits: ImageLimits) -> int:
    """The most that a request may have: twice the largest image, and its JSON."""
    return 2 * max(limits.max_bytes, 3 * limits.max_pixels) + MAX_JSON


def read_json(kind: type[_Body], data: bytes | bytearray) -> _Body:
    """Parse and check JSON.

    Raises:
        BadRequest: it is none, or something in it is missing or of the wrong type.
    """
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, problem["loc"])) or "The body"
        if "data" in problem["loc"]:
            raise BadRequest(
                "The data must be one list: of whole numbers from 0 to 255 for image, of up to"
                f" {MAX_IMAGES} strings in base64 for file."
            ) from None
        raise BadRequest(f"{place[:100]} is wrong: {problem['msg'][:200]}.") from None


def read_request(body: bytearray, json_length: str | None, limits: ImageLimits) -> InferRequest:
    """The images in a body (not copied where they are binary pixels) and the outputs asked for.

    Args:
        json_length: the header `Inference-Header-Content-Length`; None: all of it is JSON.

    Raises:
        BadRequest: anything in it is wrong, or two things in it disagree.
        ImageTooLarge: more JSON, or more pixels in an image, than allowed.
    """
    length = _json_length(json_length, len(body))
    if length > MAX_JSON:
        raise ImageTooLarge(
            f"The JSON has {length:,} bytes, more than the {MAX_JSON:,} allowed: send the images as"
            " binary data."
        )
    if body.count(b"[", 0, length) + body.count(b"{", 0, length) > MAX_BRACKETS:
        raise BadRequest(
            f"The JSON has more than {MAX_BRACKETS:,} lists and objects: send data as one flat"
            " list."
        )
    request = read_json(InferBody, body[:length])
    if len(request.inputs) != 1:
        raise BadRequest(f"There are {len(request.inputs)} input tensors: send one, image or file.")
    (tensor,) = request.inputs
    readers: dict[str, _Reader] = {"image": _read_pixels, "file": _read_files}
    if tensor.name not in readers:
        raise BadRequest(f"There is no input {_short(tensor.name)}: send image or file.")
    data = _binary_data(tensor, memoryview(body)[length:])
    images = readers[tensor.name](tensor, data, limits)
    asked = request.parameters
    return InferRequest(
        request.id, tensor.name, images, _outputs(request), asked.timeout, asked.part
    )


def _json_length(header: str | None, most: int) -> int:
    if header is None:
        return most
    if not (header.isascii() and header.isdigit() and len(header) < 20):
        raise BadRequest(f"The header {HEADER_LENGTH} is {_short(header)}, which is no length.")
    if int(header) > most:
        raise BadRequest(f"The header {HEADER_LENGTH} is {header}, but the body has {most} bytes.")
    return int(header)


def _binary_data(tensor: InferTensorBody, tail: memoryview) -> memoryview | None:
    """The bytes behind the JSON, which must all belong to this tensor; None: its data is JSON."""
    if tensor.parameters.shared_memory_region is not None:
        raise BadRequest(SHARED_MEMORY)
    size = tensor.parameters.binary_data_size
    if (size is None) == (tensor.data is None):
        raise BadRequest(
            f"{tensor.name} needs either data, or binary_data_size and as many bytes behind the"
            " JSON."
        )
    if size is not None and size != len(tail):
        raise BadRequest(
            f"binary_data_size of {tensor.name} is {_short(size)}, but {len(tail)} bytes follow the"
            f" JSON, whose length the header {HEADER_LENGTH} says."
        )
    if size is None and len(tail):
        raise BadRequest(
            f"{len(tail)} bytes follow the JSON, but {tensor.name} has no binary_data_size."
        )
    return tail if size is not None else None


def _read_pixels(
    tensor: InferTensorBody, data: memoryview | None, limits: ImageLimits
) -> list[NDArray[np.uint8]]:
    """(N, H, W, 3) -> N pictures, RGB."""
    shape = tensor.shape
    _check(tensor, "UINT8", len(shape) == 4 and shape[3] == 3, "[N, height, width, 3], RGB")
    check_size(limits, width=shape[2], height=shape[1])
    expected = math.prod(shape)
    pixels = _bytes_of_numbers(tensor) if data is None else data
    if len(pixels) != expected:
        raise BadRequest(f"image {shape} has {expected} bytes, but there are {len(pixels)}.")
    return list(np.frombuffer(pixels, np.uint8).reshape(shape))


def _bytes_of_numbers(tensor: InferTensorBody) -> bytes:
    try:
        return bytes(tensor.data or [])  # type: ignore[arg-type]
    except TypeError:
        raise BadRequest("The data of image must be numbers, not strings.") from None


def _read_files(
    tensor: InferTensorBody, data: memoryview | None, _limits: ImageLimits
) -> list[bytes]:
    """(N,) -> N image files. Binary: each behind its length, 4 bytes, little-endian."""
    _check(tensor, "BYTES", len(tensor.shape) == 1, "[N]")
    files = _files_of_text(tensor) if data is None else _files_of_bytes(data)
    if len(files) != tensor.shape[0]:
        raise BadRequest(f"file {tensor.shape} has another number of files: {len(files)}.")
    return files


def _files_of_text(tensor: InferTensorBody) -> list[bytes]:
    texts = [text for text in tensor.data or [] if isinstance(text, str)]
    try:
        return [base64.b64decode(text, validate=True) for text in texts]
    except ValueError:
        raise BadRequest(
            "The data of file must be strings, each a file in base64: JSON cannot hold its bytes."
        ) from None


def _files_of_bytes(data: memoryview) -> list[bytes]:
    files: list[bytes] = []
    position = 0
    while position < len(data):
        if len(files) == MAX_IMAGES:
            raise BadRequest(f"file has more than {MAX_IMAGES} files: send them in parts.")
        begin = position + 4
        length = struct.unpack_from("<I", data, position)[0] if begin <= len(data) else 0
        position = begin + length
        if position > len(data):
            raise BadRequest(
                f"file[{len(files)}] is cut short: {position} bytes would be needed, and"
                f" {len(data)} are there. Each file stands behind its length, 4 bytes."
            )
        files.append(bytes(data[begin:position]))
    return files


def _check(tensor: InferTensorBody, datatype: str, fits: bool, shape: str) -> None:
    if tensor.datatype != datatype:
        raise BadRequest(f"{tensor.name} must be {datatype}, not {_short(tensor.datatype)}.")
    if not fits or min(tensor.shape) < 1:
        raise BadRequest(f"{tensor.name} must be {shape}, not {_short(tensor.shape)}.")
    if tensor.shape[0] > MAX_IMAGES:
        raise BadRequest(
            f"{tensor.name} has {_short(tensor.shape[0])} images: send at most {MAX_IMAGES}."
        )


def _outputs(request: InferBody) -> dict[str, bool]:
    """Which outputs to answer with, in this order, and whether as binary data."""
    default = request.parameters.binary_data_output
    names = [kind.name for kind in OUTPUTS]
    wanted: dict[str, bool] = {}
    for output in request.outputs:
        if output.name not in names:
            raise BadRequest(f"There is no output {_short(output.name)}: {', '.join(names)}.")
        if output.name in wanted:
            raise BadRequest(f"The output {output.name} is asked for twice.")
        if output.parameters.shared_memory_region is not None:
            raise BadRequest(SHARED_MEMORY)
        if output.parameters.classification is not None:
            raise BadRequest("Kensa does not classify: ask for label, without classification.")
        binary = output.parameters.binary_data
        wanted[output.name] = default if binary is None else binary
    return wanted or {name: default for name in names if name != _NOT_UNLESS_NAMED}


def _short(value: object) -> str:
    return repr(value)[:100]


_Reader = Callable[[InferTensorBody, memoryview | None, ImageLimits], Sequence[Image]]


# ---- from verdicts to a body --------------------------------------------------------------------


def write_answer(
    request: InferRequest, inspections: Sequence[Inspection]
) -> tuple[bytes, int | None]:
    """The answer, and the length of its JSON where binary tensors follow.

    Raises:
        BadRequest: a map that is too large for JSON.
        RuntimeFailed: a map with something else than numbers in it.
    """
    model = inspections[0].model
    described, tails = [], []
    for kind in OUTPUTS:
        if kind.name not in request.outputs:
            continue
        values = _values(kind, inspections)
        output: dict[str, Any] = {"name": kind.name, "datatype": kind.datatype}
        output["shape"] = list(values.shape)
        if request.outputs[kind.name]:
            tails.append(_bytes_of(values))
            output["parameters"] = {"binary_data_size": len(tails[-1])}
        elif values.size > MAX_JSON_NUMBERS:
            raise BadRequest(
                f"The {kind.name} has {values.size:,} numbers, more than the {MAX_JSON_NUMBERS:,}"
                " that are written as JSON: ask for it with binary_data."
            )
        else:
            output["data"] = values.ravel().tolist()
        described.append(output)
    body: dict[str, Any] = {
        "model_name": model.name,
        "model_version": model.version,
        "outputs": described,
    }
    if request.id is not None:
        body["id"] = request.id
    hints = {f"number {n}": one.seen.hint for n, one in enumerate(inspections)}
    unusable = [f"{n} {one.verdict.unusable.code}" for n, one in enumerate(inspections)
                if one.verdict.unusable is not None]  # fmt: skip
    parameters = {
        "part": request.part, "hint": hints_in_short(hints), "unusable": ", ".join(unusable),
    }  # fmt: skip
    if said := {name: value for name, value in parameters.items() if value}:
        body["parameters"] = said
    head = json.dumps(body, separators=(",", ":"), allow_nan=False).encode()
    return b"".join((head, *tails)), len(head) if tails else None


def _values(kind: TensorKind, inspections: Sequence[Inspection]) -> NDArray[Any]:
    if kind.name == _NOT_UNLESS_NAMED:
        maps = np.stack([one.anomaly_map for one in inspections]).astype(np.float32, copy=False)
        if not np.isfinite(maps).all():
            raise RuntimeFailed("The model gave a map that is not of numbers. Convert it again.")
        return maps
    types: dict[str, Any] = {"FP32": np.float32, "BOOL": np.bool_, "BYTES": np.object_}
    values = [getattr(one.verdict, kind.name) for one in inspections]
    return np.array(values, types[kind.datatype])


def _bytes_of(values: NDArray[Any]) -> bytes:
    """As Triton writes them: little-endian; strings behind their lengths."""
    if values.dtype != np.object_:
        return values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()
    texts = [text.encode() for text in values]
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)
