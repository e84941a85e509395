"""What is asked for, whether to ask again, and what a refusal says: nothing is sent here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import httpx

from kensa_client.errors import KensaRefused, NoAnswer, NoVerdict, Try

# The server, or a proxy before it, could not answer now. All else that is no success stays so.
PASSING = {408, 502, 503, 504}
STAYING = {"not_released"}  # until a person has done something
FIRST_PAUSE_S = 0.05  # before the second try, where nobody said how long; then twice as long
MOST_DOUBLINGS = 5
OTHERS_S = 60.0  # all tries of a call that is no inspection


@dataclass(frozen=True)
class Asked:
    """One call, whatever number of requests it takes."""

    method: str
    path: str
    deadline_s: float = OTHERS_S
    query: dict[str, Any] = field(default_factory=dict)  # None: left out
    picture: bytes | Path | None = None
    json: dict[str, Any] | None = None
    files: Sequence[Path] = ()
    named_files: Sequence[tuple[str, Path]] = ()  # of a form, with the names of its fields
    fields: dict[str, str] = field(default_factory=dict)  # of a form, besides its files
    may_repeat: bool = True  # though the server may have done it already
    inspects: bool = False
    part: str = ""  # where it stands in the path

    def query_with(self, left_s: float) -> dict[str, Any]:
        """The query of a try that has so many seconds."""
        known = {name: value for name, value in self.query.items() if value is not None}
        return {"deadline_ms": max(1, int(left_s * 1000)), **known} if self.inspects else known

    def failed(self, seconds: float, tries: Sequence[Try]) -> NoAnswer:
        """What to raise where no try brought an answer."""
        what = f"{self.method} {self.path}"
        if not self.inspects:
            return NoAnswer(what, seconds, tries)
        part = self.part or self.query.get("part")
        return NoVerdict(f"{what} of part {part!r}" if part else what, seconds, tries)


@dataclass(frozen=True)
class DecisionFilter:
    """Which decisions: docs/record.md has what each means. Times have a zone."""

    part: str | None = None
    model: str | None = None
    version: str | None = None
    verdict: Literal["normal", "anomaly", "unusable", "none"] | None = None
    label: Literal["good", "defect", "unusable", "none"] | None = None
    min_score: float | None = None
    max_score: float | None = None
    since: datetime | None = None
    until: datetime | None = None

    def query(self) -> dict[str, Any]:
        return {**asdict(self), "since": as_text(self.since), "until": as_text(self.until)}


def as_text(time: datetime | None) -> str | None:
    """ISO 8601 with its zone.

    Raises:
        ValueError: it has none.
    """
    if time is not None and time.tzinfo is None:
        raise ValueError(f"{time} has no zone: say datetime(..., tzinfo=timezone.utc)")
    return None if time is None else time.isoformat()


def pause_before_next(
    tries: Sequence[Try], *, may_repeat: bool, retries: int, left_s: float
) -> float | None:
    """How long to wait before asking again, seconds; None: do not.

    A connection that was closed while idle says nothing about the server, and does not count.
    Waiting longer than what is left would only bring the bad news later.
    """
    last = tries[-1]
    if last.was_idle and may_repeat:
        return 0.0 if left_s > 0 else None
    counted = sum(not one.was_idle for one in tries)
    if counted > retries or not (may_repeat or last.did_nothing):
        return None
    pause = last.retry_after_s
    if pause is None:
        pause = FIRST_PAUSE_S * 2 ** min(counted - 1, MOST_DOUBLINGS)
    return pause if pause < left_s else None


def note_answer(one: Try, answer: httpx.Response) -> None:
    """What an answer that is no success says about its try.

    Raises:
        KensaRefused: it would be the same again.
    """
    refused = _refusal(answer)
    if refused.status not in PASSING or refused.code in STAYING:
        raise refused
    one.problem, one.code = str(refused), refused.code
    one.did_nothing = refused.status == 503
    seconds = answer.headers.get("retry-after", "")
    one.retry_after_s = float(seconds) if seconds.isascii() and seconds.isdigit() else None


def _refusal(answer: httpx.Response) -> KensaRefused:
    try:
        said = answer.json()
        code, sentence = said["code"], said["error"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return KensaRefused("", answer.text[:200] or answer.reason_phrase, answer.status_code)
    return KensaRefused(str(code), str(sentence), answer.status_code)
