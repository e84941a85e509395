"""NVIDIA's client of the Open Inference Protocol, and what it sends."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import tritonclient.http as triton
from numpy.typing import NDArray
from PIL import Image

from support.damage import picture, saved
from support.server import Server

Client = triton.InferenceServerClient


Pixels = NDArray[np.uint8]


@contextmanager
def connected(server: Server, concurrency: int = 1) -> Iterator[Client]:
    with Client(server.url.removeprefix("http://"), concurrency=concurrency) as connection:
        yield connection


def photo(number: int = 0, height: int = 300, width: int = 256) -> Pixels:
    return np.roll(picture(height, width), 31 * number, 1)


def photo_file(number: int = 0, kind: str = "PNG") -> bytes:
    return saved(Image.fromarray(photo(number)), kind)


def files_input(files: list[bytes], *, binary: bool = True) -> Any:
    tensor = triton.InferInput("file", [len(files)], "BYTES")
    held = files if binary else [base64.b64encode(file) for file in files]
    return tensor.set_data_from_numpy(np.array(held, object), binary_data=binary)


def pixels_input(pixels: Pixels, *, binary: bool = True) -> Any:
    tensor = triton.InferInput("image", list(pixels.shape), "UINT8")
    return tensor.set_data_from_numpy(pixels, binary_data=binary)


def outputs(*names: str, binary: bool = True) -> list[Any]:
    return [triton.InferRequestedOutput(name, binary_data=binary) for name in names]


def raw_scores(answer: Any) -> list[float]:
    return [float(one) for one in answer.as_numpy("raw_score")]
