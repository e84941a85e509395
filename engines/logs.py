"""Lines of the log: the same for the server, its worker and its jobs, as text or as JSON.

What is known of the request under way hangs on a context variable, so that every line that is
logged meanwhile carries its id.
"""

from __future__ import annotations

import logging
import sys
from contextvars import ContextVar
from typing import Any

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

FORMAT = "KENSA_LOG_FORMAT"  # the server's setting, which its worker inherits

# What uvicorn and DBOS hang on their records, and nobody needs.
_NOT_LOGGED = ("color_message", "applicationID", "applicationVersion", "executorID")

_under_way: ContextVar[dict[str, Any] | None] = ContextVar("under_way", default=None)


def begin(request_id: str) -> dict[str, Any]:
    """A request begins: lines carry its id from now on. Returns what `note` adds to."""
    fields: dict[str, Any] = {"request_id": request_id}
    _under_way.set(fields)
    return fields


def note(**fields: Any) -> None:
    """Something that the line of the request under way shall say; nothing outside of one.

    The names are those of docs/metrics.md, and none of `logging.LogRecord`'s own.
    """
    known = _under_way.get()
    if known is not None:
        known.update(fields)


def noted(field: str) -> Any:
    """What was noted of the request under way; None outside of one."""
    return (_under_way.get() or {}).get(field)


def set_up(level: str, form: str, who: str = "") -> None:
    """Log to stderr, "text" or "json", also what uvicorn, DBOS and Python's warnings say.

    Args:
        who: stands before each message of text; "" for the server.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_add_request_id)
    handler.setFormatter(_json() if form == "json" else Text(who))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.captureWarnings(True)
    logging.getLogger("dbos").addHandler(logging.NullHandler())  # else it brings a handler along


class Text(logging.Formatter):
    """A line of text for each record; a traceback stands indented below it.

    What a client sent can neither begin a line of its own nor move the cursor of a terminal.
    """

    def __init__(self, who: str = "") -> None:
        super().__init__(f"%(asctime)s %(levelname)s {who and who + ': '}%(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        request_id = getattr(record, "request_id", None)
        line = super().formatMessage(record)
        return printable(f"{line} [{request_id}]" if request_id else line)

    def formatException(self, ei: Any) -> str:  # noqa: N802 (logging's name)
        lines = super().formatException(ei).split("\n")
        return "\n".join(f"    {printable(line)}" for line in lines)


def printable(text: str) -> str:
    """Text with line ends and other control characters as Python would write them: \\n, \\x1b."""
    if text.isprintable():
        return text
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode() for one in text
    )


def _json() -> JsonFormatter:
    return JsonFormatter(
        "%(levelname)s %(name)s %(message)s",
        rename_fields={"levelname": "level", "name": "logger", "exc_info": "exception"},
        timestamp="time",  # ISO 8601, UTC
        reserved_attrs=[*RESERVED_ATTRS, *_NOT_LOGGED],
    )


def _add_request_id(record: logging.LogRecord) -> bool:
    known = _under_way.get()
    if known is not None and not hasattr(record, "request_id"):
        record.request_id = known["request_id"]
    return True
