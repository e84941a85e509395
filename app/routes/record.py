"""What routes share that ask the record: the words of their queries, and how they ask it."""

from __future__ import annotations

import asyncio
import csv
import io
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from typing import Annotated, Any, TypeVar, overload

from fastapi import Query, Request
from pydantic import AwareDatetime, BeforeValidator

from app.decisions.recorder import Recorder
from app.http.base_body import MOST_REASON, error_response
from app.http.part import SCHEMA

PAGE, MOST = 50, 500  # lines
Result = TypeVar("Result")

_THREADS = ThreadPoolExecutor(2, "record")  # parts have their own

OFF = error_response(
    "Nothing is recorded here.",
    conflict="Nothing is recorded here: set KENSA_RECORD=on and start Kensa again.",
)

_TIME = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d(\.\d+)?)?(Z|[+-]\d\d:?\d\d)", re.IGNORECASE)


def _written(given: Any) -> Any:
    """A time in words: a number would be taken for seconds, and a large one for milliseconds."""
    if not isinstance(given, str) or not _TIME.fullmatch(given):
        raise ValueError(
            "say a time with its zone, such as 2026-11-29T06:00:00Z, or 2026-11-29T15:00:00+09:00,"
            " whose + is %2B in a URL"
        )
    return given


Moment = Annotated[AwareDatetime, BeforeValidator(_written)]


Since = Annotated[
    Moment | None,
    Query(description="Only from this time on, with its zone.", examples=["2026-11-29T06:00:00Z"]),
]
Until = Annotated[
    Moment | None,
    Query(description="Only before this time.", examples=["2026-11-29T14:00:00Z"]),
]
_UNSEEN = SCHEMA["pattern"].removeprefix("^[^").removesuffix("]*$")
Why = Annotated[
    str,
    Query(
        min_length=1, max_length=MOST_REASON, examples=["kept for ten years, as agreed"],
        description="Why, in a sentence: it stands in the audit trail.",
        json_schema_extra={"pattern": f"^[^{_UNSEEN}]*[^{_UNSEEN}\\s][^{_UNSEEN}]*$"},
    ),
]  # fmt: skip
Before = Annotated[
    int | None,
    Query(ge=1, le=2**62, examples=[481], description="The `next` of the page before."),
]
Limit = Annotated[int, Query(ge=1, le=MOST, description="How many at once.")]


def time_of(at: int) -> datetime:
    return datetime.fromtimestamp(at / 1000, timezone.utc)


@overload
def milliseconds(time: datetime) -> int: ...


@overload
def milliseconds(time: datetime | None) -> int | None: ...


def milliseconds(time: datetime | None) -> int | None:
    """Since 1970."""
    return None if time is None else round(time.timestamp() * 1000)


def recorder_of(request: Request) -> Recorder:
    found: Recorder = request.app.state.recorder
    return found


async def ask(work: Callable[..., Result], *arguments: Any) -> Result:
    """Ask the record, in threads that no part needs."""
    return await asyncio.get_running_loop().run_in_executor(_THREADS, work, *arguments)


def csv_row(values: list[Any]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\r\n").writerow(
        # A spreadsheet takes what begins so for a formula, in Japan also in full width.
        f"'{one}" if isinstance(one, str) and one.startswith(tuple("=+-@＝＋－＠")) else one
        for one in values
    )
    return file.getvalue()
