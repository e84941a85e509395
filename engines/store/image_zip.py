"""A zip of training images: each file under its base name, or why it is refused or passed over."""

from __future__ import annotations

import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from engines.errors import BadImage, BadRequest, ImageTooLarge, KensaError, UploadTooLarge
from engines.image import ImageLimits
from engines.store.image_names import is_image, readable
from engines.store.zip_guards import DAMAGED, PIECE, opened_zip, unusual_compression

MAX_FILES = 10_000  # in one upload

_MAX_DIRECTORY = 4 * 1024 * 1024  # bytes of a zip's list of files; 10,000 need about 2 million
_ZIP_STARTS = (b"PK\3\4", b"PK\5\6")
_UNREADABLE = "it is damaged or cut short, or lists too many files"


class Entry(NamedTuple):
    """A file in a zip: its bytes, or the error that refuses it, or the reason to pass it over."""

    name: str
    found: bytes | KensaError | str


def is_zip(path: Path) -> bool:
    """By its first bytes, which no image begins with."""
    with path.open("rb") as file:
        return file.read(4) in _ZIP_STARTS


def unzip(path: Path, limits: ImageLimits, most: int) -> Iterator[Entry]:
    """The files of a zip, each under its base name, unpacked in memory one after the other.

    What a zip says of its sizes only serves to refuse it sooner: bytes are counted as they come.

    Raises:
        BadRequest: it is no zip, or damaged, or encrypted.
        UploadTooLarge: it has too many files, or more than `most` bytes, unpacked.
    """
    with opened_zip(path, _MAX_DIRECTORY, _UNREADABLE) as archive:
        entries = archive.infolist()
        _check(entries, most)
        for entry in entries:
            name = _name_of(entry)
            found = _judged(name, entry) or _unpacked(archive, entry, limits)
            if isinstance(found, bytes):
                most -= len(found)
                if most < 0:
                    raise UploadTooLarge("The zip holds more bytes than it says.")
                name = name.rpartition("/")[2]
            yield Entry(name, found)


def _check(entries: list[zipfile.ZipInfo], most: int) -> None:
    if len(entries) > MAX_FILES:
        raise UploadTooLarge(f"The zip holds {len(entries):,} files; allowed are {MAX_FILES:,}.")
    if any(entry.flag_bits & 1 for entry in entries):
        raise BadRequest("The zip is encrypted: make one without a password.")
    unpacked = sum(entry.file_size for entry in entries if not _judged(_name_of(entry), entry))
    if unpacked > most:
        raise UploadTooLarge(
            f"The zip holds {unpacked:,} bytes of images, unpacked; {most:,} are still allowed in"
            " this upload: send it in parts, or raise KENSA_MAX_UPLOAD_BYTES."
        )


def _judged(name: str, entry: zipfile.ZipInfo) -> KensaError | str | None:
    """Why a file in a zip is refused or passed over, by what is known without unpacking it."""
    folders = name.split("/")
    if name.startswith("/") or ".." in folders or "\\" in name or "\0" in name:
        return BadRequest(f"{name[:200]!r} leads out of the zip, or could: it is not unpacked.")
    if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        return BadRequest(f"{name[:200]!r} is a link or a device, not a file.")
    if name.endswith("/"):
        return "a folder"
    if "__MACOSX" in folders:
        return "macOS's own"
    if any(folder.startswith(".") and folder != "." for folder in folders):
        return "hidden"
    if not is_image(folders[-1]):
        return "not an image, by its name"
    return unusual_compression(name, entry)


def _unpacked(
    archive: zipfile.ZipFile, entry: zipfile.ZipInfo, limits: ImageLimits
) -> bytes | KensaError:
    data = bytearray()
    try:
        with archive.open(entry) as file:
            while piece := file.read(PIECE):
                data += piece
                if len(data) > limits.max_bytes:
                    return ImageTooLarge(
                        f"The image has more than the {limits.max_bytes:,} bytes allowed."
                    )
    except DAMAGED:
        return BadImage("The image is damaged inside the zip.")
    return bytes(data)


def _name_of(entry: zipfile.ZipInfo) -> str:
    """The path of an entry. zipfile takes names that are not marked as UTF-8 for CP437."""
    name = entry.orig_filename
    marked = entry.flag_bits & 0x800
    return name if marked or name.isascii() else readable(name.encode("cp437"))
