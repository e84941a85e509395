"""`HeadAsGet`: HEAD wherever GET works."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class HeadAsGet:
    """ASGI: a HEAD is answered as GET would be, without the body.

    The route is not asked for more than the head: a stream of events ends there.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return
        inner = {**scope, "method": "GET"}
        ended = False

        async def receive_until_then() -> Message:
            return {"type": "http.disconnect"} if ended else await receive()

        async def head_alone(message: Message) -> None:
            nonlocal ended
            if message["type"] == "http.response.start":
                if "route" in inner:  # for the line in the log
                    scope["route"] = inner["route"]
                await send(message)
            elif not ended:
                ended = True
                await send({"type": "http.response.body", "body": b""})

        await self._app(inner, receive_until_then, head_alone)
