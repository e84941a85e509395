"""What a call may raise, and what is told of its tries.

KensaError
├── KensaRefused   the server answered, and not with what was asked for
└── NoAnswer       no answer in time: away, overloaded, cut off
    └── NoVerdict  the same, of an inspection
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class KensaError(Exception):
    """There is no answer to use."""


class KensaRefused(KensaError):
    """The server answered, and not with what was asked for: asking again does not help.

    `code` is one of docs/http.md, and empty where the answer is not Kensa's; `status` is HTTP's.
    """

    def __init__(self, code: str, sentence: str, status: int) -> None:
        super().__init__(f"{sentence} ({code or 'not an answer of Kensa'}, {status})")
        self.code = code
        self.sentence = sentence
        self.status = status


@dataclass
class Try:
    """One request of a call, and why it brought no answer."""

    id: str  # its X-Request-ID: what the log and the record call it
    problem: str = "time was up"
    code: str = ""  # of the answer, where there was one
    retry_after_s: float | None = None  # as the answer said
    did_nothing: bool = False  # the server has not begun to work on it
    was_idle: bool = False  # its connection had been closed while nobody used it


class NoAnswer(KensaError):
    """No answer in time; `tries` says what was tried, the first one first."""

    def __init__(self, what: str, seconds: float, tries: Sequence[Try]) -> None:
        tried = "; ".join(f"{one.problem} [{one.id}]" for one in tries) or "time was up"
        super().__init__(f"No answer to {what} in {seconds:.3f} s: {tried}")
        self.tries = tuple(tries)


class NoVerdict(NoAnswer):
    """Nobody has said in time whether the part is normal."""
