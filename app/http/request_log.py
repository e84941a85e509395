"""`RequestLog`: what every request gets besides its answer: an id, a count, a line in the log."""

from __future__ import annotations

import json
import logging
import time
from contextlib import suppress
from typing import Any

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.http.part import given_back, part_of, request_id_of
from app.watching.metrics import Metrics
from engines.errors import BadRequest
from engines.logs import begin

CLIENT_LEFT = 499  # nginx's number for it; nobody is there to read it
LINES_A_SECOND = 20  # of requests that fail: a camera that is out of order must not fill the disk
NO_ROUTE = "none"

_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
_PROBES = {
    "/livez",
    "/readyz",
    "/healthz",
    "/metrics",
}  # asked every few seconds

log = logging.getLogger("kensa.http")


class RequestLog:
    """ASGI middleware, around all others, so that whatever answers is counted and logged."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics
        self._second = 0
        self._lines = 0  # in this second

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        request_id = request_id_of(scope["headers"])
        scope.setdefault("state", {})["request_id"] = request_id
        fields = begin(request_id)
        with suppress(BadRequest):  # whoever takes a part says so
            if part := part_of(scope.get("query_string", b""), scope["headers"]):
                fields["part"] = part
        status, ended = 0, False

        def end() -> None:
            """Before the answer is whole: who has it finds it counted and logged."""
            nonlocal ended
            if not ended:
                ended = True
                took_ms = (time.perf_counter() - began) * 1000
                self._end(scope, status or CLIENT_LEFT, fields, took_ms)

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *(pair for pair in message.get("headers", ()) if pair[0] != b"x-request-id"),
                    *given_back(request_id, fields.get("part", "")),
                ]
            elif message["type"] == "http.response.body" and not message.get("more_body"):
                end()
            await send(message)

        try:
            await self._app(scope, receive, answer)
        except Exception:
            status = status or 500  # which Starlette answers, around this
            raise
        finally:
            end()

    def _end(self, scope: Scope, status: int, fields: dict[str, Any], ms: float) -> None:
        route = _route(scope)
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._metrics.request(route, method, status)
        if status >= 400 and status != CLIENT_LEFT:
            fields.setdefault("code", "internal_error" if status == 500 else "other")
            self._metrics.failure(route, fields["code"])
        level = _level(status, method, route, "model" in fields)
        if log.isEnabledFor(level) and (level < logging.WARNING or self._may_speak()):
            path = scope["path"][:200]
            message = f"{scope['method'][:20]} {path} {status} in {ms:.1f} ms"
            if "code" in fields:
                message += f", {fields['code']}: {fields.get('error', '')}"
            if "part" in fields:
                message += f", part {json.dumps(fields['part'], ensure_ascii=False)}"
            extra = {"method": method, "route": route, "path": path, "status": status}
            log.log(level, "%s", message, extra={**extra, "ms": round(ms, 2), **fields})

    def _may_speak(self) -> bool:
        """Whether another failure may have a line; says afterwards how many had none."""
        second = int(time.monotonic())
        if second != self._second:
            left_out = self._lines - LINES_A_SECOND
            self._second, self._lines = second, 0
            if left_out > 0:
                log.warning("%d more requests failed within a second", left_out)
        self._lines += 1
        return self._lines <= LINES_A_SECOND


def request_id(request: Request) -> str:
    """The id of a request, see `request_id_of`."""
    known: str = request.state.request_id
    return known


def _route(scope: Scope) -> str:
    """The template of the route, such as /models/{name}: paths would be a series each."""
    return str(getattr(scope.get("route"), "path", NO_ROUTE))


def _level(status: int, method: str, route: str, inspected: bool) -> int:
    """What changes something, and what fails, is news; a part every 50 ms would wear out flash."""
    if status == CLIENT_LEFT or route in _PROBES or (inspected and status < 400):
        return logging.DEBUG
    if status >= 500:
        return logging.ERROR
    if status >= 400:
        return logging.WARNING
    return logging.INFO if method in ("POST", "PUT", "PATCH", "DELETE") else logging.DEBUG
