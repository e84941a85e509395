"""Which kind of answer a client prefers, and how an error is told as one line of text."""

from __future__ import annotations

import re
from typing import Literal

from engines.logs import printable

Answer = Literal["application/json", "text/plain", "image/png"]
ANSWERS: tuple[Answer, ...] = ("application/json", "text/plain", "image/png")
MAX_SENTENCE = 500  # characters, in a header


def error_line(code: str) -> str:
    """`ERR overloaded`, where a verdict would be `OK 0.1234`."""
    return f"ERR {code}\n"


def sentence_header(sentence: str) -> dict[str, str]:
    """What is wrong, beside such a line; what is not ASCII is escaped."""
    shown = printable(sentence).encode("ascii", "backslashreplace").decode()
    return {"X-Kensa-Error": shown[:MAX_SENTENCE]}


def wanted(accept: str) -> Answer:
    """Which kind of answer an `Accept` header prefers; JSON when it does not know any."""
    best: Answer = "application/json"
    best_quality = 0.0
    for answer in ANSWERS:
        quality = _quality(answer, accept)
        if quality > best_quality:
            best, best_quality = answer, quality
    return best


def _quality(answer: str, accept: str) -> float:
    """The q value, 0 to 1, of the most specific range in `accept` that covers `answer`."""
    ranges = {}
    for item in accept.lower().split(","):
        media_range, _, parameters = item.partition(";")
        found = re.search(r"\bq\s*=\s*([01](?:\.\d+)?)", parameters)
        ranges[media_range.strip()] = float(found[1]) if found else 1.0
    group = answer.partition("/")[0] + "/*"
    return ranges.get(answer, ranges.get(group, ranges.get("*/*", 0.0)))
