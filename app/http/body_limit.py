"""What is read of a body: as it is, and 1 MiB, unless a route counts for itself."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.http.base_body import Answer
from engines.errors import BodyTooLarge, KensaError, UnsupportedBody

MAX_BODY = 1024 * 1024  # bytes, of a body that a route does not count itself


async def body_of(
    request: Request,
    most: int,
    too_large: KensaError,
    hold: Callable[[int], None] = lambda _: None,
) -> AsyncGenerator[bytes, None]:
    """The body in chunks, for a route with a limit of its own.

    Args:
        most: bytes, whether or not the request says its length; what comes after is not read.
        too_large: is raised at more than that.
        hold: is told the size of each chunk, see `Admission.holding`.
    """
    request.state.counts_itself = True
    if int(request.headers.get("content-length", 0)) > most:
        raise too_large
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        if received > most:
            raise too_large
        hold(len(chunk))
        yield chunk


def _counts_itself(scope: Scope) -> bool:
    return bool(scope.get("state", {}).get("counts_itself"))


def _problem(encoding: str) -> KensaError:
    if encoding == "identity":
        return BodyTooLarge(f"The body has more than the {MAX_BODY:,} bytes that are read here.")
    return UnsupportedBody(
        f"Kensa does not read a body that is compressed as {encoding[:50]}: send it as it is,"
        " without the header Content-Encoding."
    )


class BodyLimit:
    """ASGI: no more than 1 MiB of a body is read, unless the route counts for itself.

    None that is compressed: what it unpacks to has no length beforehand.

    It answers itself: an error that is raised while FastAPI reads a body becomes a 400.
    """

    def __init__(self, app: ASGIApp, answer: Answer) -> None:
        self.app = app
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        length = headers.get("content-length", "")
        said = int(length) if length.isdecimal() else 0
        encoding = headers.get("content-encoding", "identity").strip().lower()
        received, is_answered = 0, False

        async def count() -> Message:
            nonlocal received, is_answered
            if is_answered:
                return {"type": "http.disconnect"}
            if encoding == "identity" and (said <= MAX_BODY or _counts_itself(scope)):
                message = await receive()
                received += len(message.get("body", b""))
                if received <= MAX_BODY or _counts_itself(scope):
                    return message
            is_answered = True
            response = await self._answer(Request(scope), _problem(encoding))
            await response(scope, receive, send)
            return {"type": "http.disconnect"}

        async def pass_on(message: Message) -> None:
            if not is_answered:
                await send(message)

        await self.app(scope, count, pass_on)
