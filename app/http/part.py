"""What a client calls the part: its serial number, which comes back and stands in the log."""

from __future__ import annotations

import unicodedata
from typing import Any
from urllib.parse import quote, unquote

from fastapi import Request

from engines.errors import BadRequest
from engines.logs import note

HEADER = "X-Part"
ANSWERED = "X-Kensa-Part"
MAX_PART = 200  # characters
_UNPRINTABLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # control, invisible or half characters, line ends
_AS_IT_IS = "".join(one for one in map(chr, range(32, 127)) if one != "%")
MEANING = f"What the part is called: any printable text of up to {MAX_PART} characters."
# The same for programs, as far as JSON Schema can say it.
SCHEMA: dict[str, Any] = {
    "type": "string",
    "maxLength": MAX_PART,
    "pattern": "^[^\u0000-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f"
    "\ufeff]*$",
    "examples": ["KB-2046/A 17"],
}


def checked(part: str) -> str | None:
    """A part's name as it was given, None for an empty one; it is noted for the log.

    Raises:
        BadRequest: it is too long, or holds what cannot be seen.
    """
    if len(part) > MAX_PART:
        raise BadRequest(f"The part's name has {len(part):,} characters: {MAX_PART} are allowed.")
    if any(unicodedata.category(one) in _UNPRINTABLE for one in part):
        raise BadRequest(
            f"The part's name {part!a} holds characters that cannot be seen: send visible text."
        )
    if not part:
        return None
    note(part=part)
    return part


def part_of(request: Request) -> str | None:
    """What the query or the header of a request calls the part.

    Raises:
        BadRequest: as `checked`.
    """
    return checked(request.query_params.get("part") or _read(request.headers.get(HEADER, "")))


def in_header(part: str | None) -> dict[str, str]:
    """The header of an answer: what is not ASCII is percent-encoded, as is % itself."""
    return {ANSWERED: quote(part, safe=_AS_IT_IS)} if part else {}


def _read(header: str) -> str:
    """Percent-encoded, or bytes of UTF-8, which a header holds as latin-1."""
    try:
        return unquote(header.encode("latin-1").decode(), errors="strict")
    except UnicodeDecodeError:
        raise BadRequest(f"The header {HEADER} is not UTF-8: percent-encode it.") from None
