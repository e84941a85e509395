"""Under which names this server is asked, and by whose pages."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Container
from ipaddress import ip_address

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from app.http.base_body import Answer
from app.settings import Settings
from engines.errors import ForeignOrigin, KensaError, UnknownHost


class KnownHosts:
    """ASGI: refuses who asks under a foreign name, and pages of other servers that want a change.

    A page that lets its own name point to this machine (DNS rebinding) reads and writes as if it
    came from here; but it asks under its own name. A browser sends a page's form to any server
    without asking it first; but it says which page that was.
    """

    def __init__(self, app: ASGIApp, settings: Settings, answer: Answer) -> None:
        self.app = app
        self._answer = answer
        self._origins = set(settings.origin_names)
        name = socket.gethostname().lower()
        short = name.partition(".")[0]
        self._names = {"localhost", name, short, f"{short}.local", *settings.host_names}
        # In a thread: without a DNS server this takes many seconds.
        threading.Thread(target=self._learn_full_name, name="hostname", daemon=True).start()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        problem = self._problem(scope) if scope["type"] == "http" else None
        if problem is None:
            await self.app(scope, receive, send)
        else:
            response = await self._answer(Request(scope), problem)
            await response(scope, receive, send)

    def _learn_full_name(self) -> None:
        self._names.add(socket.getfqdn().lower())

    def _problem(self, scope: Scope) -> KensaError | None:
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        host = hosts[0].lower() if len(hosts) == 1 else ""
        if not self._is_known(host):
            return UnknownHost(
                f"This server is not called {host[:100]!r}: ask it by its address or its name, or"
                " add this name to KENSA_HOSTS."
            )
        if scope["method"] in ("GET", "HEAD"):
            return None
        if not is_foreign(headers, self._origins):
            return None
        origin = headers.get("origin", "").lower()
        return ForeignOrigin(
            f"A web page of {origin[:100] or 'another server'} asks for this: where that is"
            " wanted, add the server it comes from to KENSA_ORIGINS."
        )

    def _is_known(self, host: str) -> bool:
        found = re.fullmatch(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?", host)
        if found is None:
            return False
        name = found[1].strip("[]").removesuffix(".")
        return name in self._names or _is_address(name)


def is_foreign(headers: Headers, known: Container[str] = ()) -> bool:
    """Whether the page of another server asks, and none of those that are known."""
    origin = headers.get("origin", "").lower()
    if origin:
        own = headers.get("host", "").lower()
        return origin.partition("://")[2] != own and origin not in known
    return headers.get("sec-fetch-site", "none") not in ("none", "same-origin")


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
