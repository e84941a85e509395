"""What a client calls a request and its part: both come back with every answer, refusals too.

Only the standard library is imported here, since `Starting` needs it before the rest is there.
"""

from __future__ import annotations

import re
import unicodedata
import uuid
from collections.abc import Sequence
from typing import Any
from urllib.parse import parse_qsl, quote, unquote

from engines.errors import BadRequest

Headers = Sequence[tuple[bytes, bytes]]  # of a request, as ASGI has them: names in lower case

# A path /decisions/.. is another one before it leaves a browser, and most other clients.
REQUEST_ID = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._-]{1,128}")
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


def request_id_of(headers: Headers) -> str:
    """The id of a request: its X-Request-ID where that is a sane one, else a new one."""
    given = _first(headers, b"x-request-id").decode("latin-1")
    return given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def part_of(query: bytes, headers: Headers) -> str:
    """What the query or the header of a request calls the part; "" where neither does.

    Raises:
        BadRequest: as `checked`.
    """
    if b"part" in query:
        asked = dict(parse_qsl(query.decode("latin-1"), keep_blank_values=True))
        if part := asked.get("part"):
            return checked(part)
    return checked(_read(_first(headers, HEADER.lower().encode())))


def checked(part: str) -> str:
    """A part's name as it was given.

    Raises:
        BadRequest: it is too long, or holds what cannot be seen.
    """
    return visible(part, "part's name", MAX_PART)


def visible(text: str, what: str, most: int) -> str:
    """A text as it was given, which people will read and files will hold.

    Raises:
        BadRequest: it is too long, or holds what cannot be seen.
    """
    if len(text) > most:
        raise BadRequest(f"The {what} has {len(text):,} characters: {most} are allowed.")
    if any(unicodedata.category(one) in _UNPRINTABLE for one in text):
        raise BadRequest(
            f"The {what} {text!a} holds characters that cannot be seen: send visible text."
        )
    return text


def given_back(request_id: str, part: str) -> list[tuple[bytes, bytes]]:
    """The headers of any answer: what is not ASCII is percent-encoded, as is % itself."""
    found = [(b"x-request-id", request_id.encode())]
    if part:
        found.append((ANSWERED.lower().encode(), quote(part, safe=_AS_IT_IS).encode()))
    return found


def given_back_at_once(
    query: bytes, headers: Headers, known_id: str | None = None
) -> list[tuple[bytes, bytes]]:
    """The same, of a request that is refused before anybody has looked into it."""
    try:
        part = part_of(query, headers)
    except BadRequest:  # it cannot be sent back, and something else is wrong already
        part = ""
    return given_back(known_id or request_id_of(headers), part)


def _first(headers: Headers, name: bytes) -> bytes:
    return next((value for known, value in headers if known == name), b"")


def _read(header: bytes) -> str:
    """Percent-encoded, or bytes of UTF-8."""
    try:
        return unquote(header.decode(), errors="strict")
    except UnicodeDecodeError:
        raise BadRequest(f"The header {HEADER} is not UTF-8: percent-encode it.") from None
