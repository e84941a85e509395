"""What an image may be called, and how names of unknown encodings are read."""

from __future__ import annotations

import os
import unicodedata
from contextlib import suppress

from engines.errors import BadRequest
from engines.image import SUFFIXES

_MAX_NAME = 128  # characters
_MAX_NAME_BYTES = 240  # a file system takes 255, and write_atomically adds to them
_UNPRINTABLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # control, invisible or half characters, line ends


def checked_name(name: str) -> str:
    """The name under which an image is stored: as it was sent, in Unicode's composed form (NFC).

    Raises:
        BadRequest: it is no plain file name, or does not end as an image's does.
    """
    name = unicodedata.normalize("NFC", name)
    wrong = _wrong_with(name)
    if wrong:
        raise BadRequest(f"The image's name {name[:200]!r} {wrong}.")
    return name


def _wrong_with(name: str) -> str | None:
    if not name:
        return "is empty: say what the image is called"
    if set(name) & set("/\\") or ".." in name:
        return "is not a plain file name: it may not hold / or \\ or two dots in a row"
    if name.startswith("."):
        return "begins with a dot"
    if any(unicodedata.category(character) in _UNPRINTABLE for character in name):
        return "holds characters that cannot be seen"
    if len(name) > _MAX_NAME or len(name.encode()) > _MAX_NAME_BYTES:
        return f"is longer than {_MAX_NAME} characters, or than {_MAX_NAME_BYTES} bytes in UTF-8"
    if not is_image(name):
        return f"does not end in one of {', '.join(sorted(SUFFIXES))}"
    return None


def is_image(name: str) -> bool:
    """By its name, as `engines.image.files_in` decides it."""
    return os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith(".")  # noqa: PTH122


def shown(name: str) -> str:
    """A name from the disk as JSON can hold it: it need not be UTF-8."""
    return os.fsencode(name).decode("utf-8", "replace")


def readable(name: bytes) -> str:
    """A name whose encoding nobody tells: UTF-8, what Japanese Windows writes, or CP437."""
    for encoding in ("utf-8", "cp932"):
        with suppress(UnicodeDecodeError):
            return name.decode(encoding)
    return name.decode("cp437")
