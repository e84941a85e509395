"""A zip that somebody sent, read with care: it may be damaged, or made to fill the memory."""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engines.errors import BadRequest

PIECE = 1024 * 1024  # bytes that are unpacked at once
# What zipfile raises at damaged bytes: documented, or seen when fuzzing.
DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    OverflowError,
    RuntimeError,
    ValueError,
)


@contextmanager
def opened_zip(path: Path, largest_list: int, why: str | None = None) -> Iterator[zipfile.ZipFile]:
    """A zip whose list of files takes no more than `largest_list` bytes.

    Raises:
        BadRequest: it is no zip, is damaged or lists too many files: says `why`, or else what
            zipfile says.
    """
    with _SmallReads(path, largest_list) as file:
        try:
            archive = zipfile.ZipFile(file)
        except DAMAGED as error:
            raise BadRequest(f"The zip cannot be read: {why or error}.") from error
        with archive:
            yield archive


class _SmallReads(io.FileIO):
    """A file that is read in small pieces: zipfile reads a zip's list of files in one."""

    def __init__(self, path: Path, most: int) -> None:
        super().__init__(path)
        self._most = most

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            size = os.fstat(self.fileno()).st_size - self.tell()
        if size > self._most:
            raise zipfile.BadZipFile("it lists too many files")
        return super().read(size) or b""


def unusual_compression(name: str, entry: zipfile.ZipInfo) -> BadRequest | None:
    """The refusal of an entry that zipfile would not unpack in pieces; None for all others."""
    if entry.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return None
    # zipfile unpacks a piece of the other kinds whole, however large it becomes.
    return BadRequest(f"{name[:200]!r} is compressed in an unusual way: use Deflate.")
