"""How long an answer is worked on: until its deadline, and while somebody waits for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from engines.errors import DeadlineExceeded

Result = TypeVar("Result")


async def within_deadline(
    request: Request,
    work: Coroutine[Any, Any, Result],
    within_ms: int | None = None,
    since: float | None = None,
) -> Result:
    """The result of `work`, which is cancelled once nobody wants it any more.

    The whole body of the request must have been read.

    Args:
        within_ms: None leaves it to the server.
        since: when that was, on `time.monotonic`'s clock; now where it is not given.

    Raises:
        DeadlineExceeded: it is not there within so many milliseconds, or KENSA_DEADLINE_MS.
        ClientDisconnect: the client has closed the connection.
    """
    most_ms: int = request.app.state.settings.deadline_ms
    within_ms = min(within_ms or most_ms, most_ms)
    left_s = within_ms / 1000 + (0.0 if since is None else since - time.monotonic())
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(until_gone(request))
    try:
        both, first = {working, leaving}, asyncio.FIRST_COMPLETED
        await asyncio.wait(both, timeout=max(left_s, 0), return_when=first)
        if working.done():
            return working.result()
        if leaving.done():
            raise ClientDisconnect
        raise DeadlineExceeded(
            f"There was no verdict within {within_ms:,} ms: it takes longer, or others came first."
            " Allow more time, or send less at once."
        )
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()
            await asyncio.wait({working})


async def until_gone(request: Request) -> None:
    """Returns once the client has closed the connection; the body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
