"""Uploads: written to the disk while they arrive, never held in memory, gone in the end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from app.http.body_limit import body_of
from engines.errors import BadRequest, UnsupportedBody, UploadTooLarge
from engines.store.datasets import Datasets, room
from engines.store.image_names import sent_name
from engines.store.image_zip import MAX_FILES

BLOCK = 1024 * 1024  # bytes of an upload that are written at once

_ZIP_TYPES = ("application/zip", "application/x-zip-compressed")
_IMAGE_TYPES = ("image/jpeg", "image/png", "image/bmp", "image/tiff", "application/octet-stream")


@dataclass(frozen=True)
class Part:
    """A file of an upload: what it is called, and where its bytes wait."""

    name: str
    path: Path


@contextlib.asynccontextmanager
async def upload_folder(datasets: Datasets) -> AsyncGenerator[Path, None]:
    """`Datasets.upload`, entered and left in a thread: there may be much to delete.

    A server that stops cancels its requests twice, and ends when the executor's threads are done:
    what was handed to one of them happens, whoever no longer waits for it.
    """
    stack = contextlib.ExitStack()
    try:
        with room():
            yield await run_in_threadpool(stack.enter_context, datasets.upload())
    finally:
        closing = asyncio.get_running_loop().run_in_executor(None, stack.close)
        await asyncio.shield(closing)


async def receive(request: Request, folder: Path, name: str, most: int) -> list[Part]:
    """Write the files of a request into `folder`; `name` is for a body that is a file itself.

    Raises:
        UnsupportedBody: the content type is no form, image or zip.
        BadRequest: the form is malformed.
        UploadTooLarge: more than `most` bytes, or too many parts; what comes after is not read.
        OSError: the disk is full, see `room`.
    """
    content_type = request.headers.get("content-type", "application/octet-stream")
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type == "multipart/form-data":
        spool: _Form | _Body = _Form(folder, content_type)
    elif media_type.startswith("image/") or media_type in (*_IMAGE_TYPES, *_ZIP_TYPES):
        spool = await run_in_threadpool(_Body, folder, name)
    else:
        raise UnsupportedBody(
            f"Kensa does not read a body of type {media_type[:100]}: send the image with"
            " Content-Type image/jpeg (or png, bmp, tiff), a zip with application/zip, or a"
            " multipart/form-data form."
        )
    async with contextlib.aclosing(_blocks(request, most)) as blocks:
        with contextlib.closing(spool):
            async for block in blocks:
                await run_in_threadpool(spool.write, block)
            return spool.parts()


async def _blocks(request: Request, most: int) -> AsyncGenerator[bytes, None]:
    """The body in blocks of about 1 MiB, up to `most` bytes, whether or not it says its length."""
    too_large = UploadTooLarge(
        f"The upload has more than the {most:,} bytes allowed: send it in parts, or raise"
        " KENSA_MAX_UPLOAD_BYTES."
    )
    block = bytearray()
    async for chunk in body_of(request, most, too_large):
        block += chunk
        if len(block) >= BLOCK:
            yield bytes(block)
            block.clear()
    yield bytes(block)


class _Body:
    """A body that is one file."""

    def __init__(self, folder: Path, name: str) -> None:
        self._part = Part(name, folder / "0")
        self._file = self._part.path.open("wb")

    def write(self, block: bytes) -> None:
        self._file.write(block)
        self._file.flush()

    def parts(self) -> list[Part]:
        return [self._part]

    def close(self) -> None:
        self._file.close()


class _Form:
    """A form that is taken apart while it arrives: a file on the disk for each file part.

    Not Starlette's parser: it holds a descriptor or 1 MB of memory for each part until the end.
    """

    def __init__(self, folder: Path, content_type: str) -> None:
        self._folder = folder
        self._parts: list[Part] = []
        self._seen = 0  # parts of any kind
        self._file: BinaryIO | None = None  # of the part that is arriving
        self._header, self._value, self._disposition = b"", b"", b""
        self._ended = False
        boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
        if not 0 < len(boundary) <= 70:
            raise BadRequest("The form cannot be read: its boundary is missing or too long.")
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._add_to_header,
                "on_header_value": self._add_to_value,
                "on_header_end": self._end_header,
                "on_headers_finished": self._open,
                "on_part_data": self._add_data,
                "on_part_end": self.close,
                "on_end": self._end,
            },
        )

    def write(self, block: bytes) -> None:
        try:
            self._parser.write(block)
        except FormParserError as error:
            raise BadRequest(f"The form cannot be read: {error}.") from None
        if self._file is not None:
            self._file.flush()

    def parts(self) -> list[Part]:
        if not self._ended:
            raise BadRequest("The form cannot be read: it is cut short.")
        return self._parts

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _begin(self) -> None:
        self._disposition = b""
        self._seen += 1
        if self._seen > MAX_FILES:
            raise UploadTooLarge(f"The form has more parts than the {MAX_FILES:,} allowed.")

    def _add_to_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _add_to_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header, self._value = b"", b""

    def _open(self) -> None:
        name = sent_name(self._disposition)
        if name is not None:  # other fields are read over
            part = Part(name, self._folder / str(self._seen))
            self._parts.append(part)
            self._file = part.path.open("wb")

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        if self._file is not None:
            self._file.write(memoryview(data)[start:end])

    def _end(self) -> None:
        self._ended = True
