"""What an image may be called, and how names of unknown encodings are read."""

from __future__ import annotations

import os
import re
import unicodedata
from contextlib import suppress
from email.errors import HeaderParseError
from email.header import decode_header
from urllib.parse import unquote_to_bytes

from engines.errors import BadRequest
from engines.files import printable
from engines.image import SUFFIXES

_MAX_NAME = 128  # characters
_MAX_NAME_BYTES = 240  # a file system takes 255, and write_atomically adds to them
_MAX_DISPOSITION = 2048  # bytes; the longest name takes 720 of them, each byte as %xx
# Of a Content-Disposition: names and values, an extended value, encoded words, a whole path.
_OPTION = re.compile(rb';\s*([\w*-]+)\s*=\s*("(?:[^"\\]|\\.)*"|[^;"]*)', re.DOTALL)
_EXTENDED = re.compile(rb"([\w.:-]+)'[\w-]*'(.*)", re.DOTALL)
_ENCODED_WORDS = re.compile(r"=\?[\w.-]+\?[BbQq]\?[^?]*\?=(?:\s+=\?[\w.-]+\?[BbQq]\?[^?]*\?=)*")
_WINDOWS_PATH = re.compile(rb"[A-Za-z]:\\|\\\\")
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
    return printable(name)


def sent_name(disposition: bytes) -> str | None:
    """What a form's part says its file is called; None where it is no file.

    `filename*` (RFC 8187) comes first. .NET sends it beside a `filename` of encoded words (RFC
    2047), which are decoded where they come alone.
    """
    found_options = _OPTION.findall(disposition[:_MAX_DISPOSITION])
    options = {key.lower(): _unquoted(value) for key, value in found_options}
    extended, plain = options.get(b"filename*"), options.get(b"filename")
    if extended is not None and (found := _EXTENDED.fullmatch(extended)):
        return _decoded(unquote_to_bytes(found[2]), found[1].decode("ascii"))
    if plain is None:
        return None if extended is None else readable(extended)
    if _WINDOWS_PATH.match(plain):  # an old browser sends the whole path
        plain = plain.rsplit(b"\\", 1)[-1]
    name = readable(plain)
    if not _ENCODED_WORDS.fullmatch(name):
        return name
    try:
        words = decode_header(name)
    except HeaderParseError:
        return name
    return "".join(
        _decoded(word, encoding) if isinstance(word, bytes) else word for word, encoding in words
    )


def _unquoted(value: bytes) -> bytes:
    value = value.strip()
    if not value.startswith(b'"'):
        return value
    return bytes(value[1:-1].replace(b"\\\\", b"\\").replace(b'\\"', b'"'))


def _decoded(name: bytes, encoding: str | None) -> str:
    """A name in the encoding that it says it has, or in the one that it seems to have."""
    with suppress(LookupError, UnicodeError):
        return name.decode(encoding or "utf-8")
    return readable(name)


def readable(name: bytes) -> str:
    """A name whose encoding nobody tells: UTF-8, what Japanese Windows writes, or CP437."""
    for encoding in ("utf-8", "cp932"):
        with suppress(UnicodeDecodeError):
            return name.decode(encoding)
    return name.decode("cp437")
