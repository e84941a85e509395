"""Who may ask: API keys with roles, the names of this server, and how much is read of a body."""

from __future__ import annotations

import hmac
import logging
import re
import socket
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from ipaddress import ip_address
from typing import Annotated, Any

from fastapi import Request, Response, Security
from fastapi.routing import APIRoute
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.http.keys import ROLES, Key, Role, fingerprint, read_keys
from app.settings import Settings
from engines.errors import (
    BadKeys,
    BadSettings,
    BodyTooLarge,
    Forbidden,
    ForeignOrigin,
    KensaError,
    Unauthorized,
    UnknownHost,
)

log = logging.getLogger("kensa")

Answer = Callable[[Request, Exception], Awaitable[Response]]

MAX_BODY = 1024 * 1024  # bytes, of a body that a route does not count itself
NO_KEY = (
    "This server wants an API key: send it as Authorization: Bearer KEY, or as X-API-Key: KEY;"
    " kensa keys add NAME --role ROLE makes one on the server."
)
WRONG_KEY = (
    "This API key is not known: it is mistyped, or was removed; kensa keys list shows on the server"
    " which there are."
)
NOBODY = (
    "The server's file of API keys cannot be read, so nobody is let in; the server's log says what"
    " is wrong with it."
)


class Access:
    """Which keys there are now, and what they may do."""

    def __init__(self, settings: Settings) -> None:
        self._mode = settings.access
        self._path = settings.keys_path
        self._open_without_keys = settings.access == "auto" and settings.is_local
        self._keys: dict[str, Key] = {}  # by id
        self._problem: str | None = None
        self._seen: tuple[int, ...] | None = ()  # of the file when it was read; None: no file

    def must_be_safe(self) -> None:
        """Raise BadSettings where everybody on the network would be let in without being asked to.

        Where everybody or nobody is let in all the same, the log says so.
        """
        if self._mode == "anyone":
            log.warning("KENSA_ACCESS is anyone: everybody who reaches the port may do everything")
            return
        self._look()
        if self._keys:
            log.info("API keys: %d", len(self._keys))
        if self._keys or self._problem or self._open_without_keys:
            return
        if self._mode == "keys":
            log.warning("There is no API key, so nobody is let in: kensa keys add makes one")
            return
        raise BadSettings(
            "KENSA_HOST opens this server to the network, and there is no API key: make one with"
            " kensa keys add NAME --role admin, or set KENSA_ACCESS=anyone to let everybody do"
            " everything."
        )

    def check(self, given: str | None, role: Role) -> Key | None:
        """The key that was given; None where none is needed.

        Raises:
            Unauthorized: none was given, or it is not known.
            Forbidden: its role is less than `role`.
            BadKeys: the file of keys is damaged.
        """
        if self._mode == "anyone":
            return None
        self._look()
        if self._problem is not None:
            raise BadKeys(NOBODY)
        if not self._keys and self._open_without_keys:
            return None
        if not given:
            raise Unauthorized(NO_KEY)
        key = self._keys.get(given[6:14])
        # Also where there is no such id: so both take the same time.
        is_right = hmac.compare_digest(fingerprint(given), key.sha256 if key else "0" * 64)
        if key is None or not is_right:
            raise Unauthorized(WRONG_KEY)
        if ROLES.index(key.role) < ROLES.index(role):
            raise Forbidden(
                f"The key {key.name} has the role {key.role}; this needs a key with the role {role}"
                f"{' or admin' if role == 'operator' else ''}."
            )
        return key

    def _look(self) -> None:
        """Read the file again when it has changed; to see that costs two microseconds."""
        try:
            now = self._path.stat()
            seen: tuple[int, ...] | None = (now.st_mtime_ns, now.st_ino, now.st_size)
        except FileNotFoundError:
            seen = None
        except OSError as error:
            seen = (error.errno or 0,)
        if seen == self._seen:
            return
        is_first = self._seen == ()
        self._seen, before = seen, self._keys
        try:
            keys = read_keys(self._path)
            if keys is None and before:
                raise BadKeys(f"{self._path} is gone: restore it, or start the server again.")
        except BadKeys as error:
            self._problem, self._keys = str(error), before
            log.error("Nobody is let in. %s", error)
            return
        self._problem, self._keys = None, {key.id: key for key in keys or ()}
        if not is_first:
            log.info("API keys: %d", len(self._keys))


# What routes say of themselves

_BEARER = HTTPBearer(
    auto_error=False, scheme_name="bearer", description="Authorization: Bearer KEY"
)
_HEADER = APIKeyHeader(
    name="X-API-Key", auto_error=False, scheme_name="header", description="X-API-Key: KEY"
)


def needs(role: Role) -> Any:
    """A dependency for a route or a router: only who has a key of this role, or of a higher one."""

    async def who(
        request: Request,
        bearer: Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)],
        header: Annotated[str | None, Security(_HEADER)],
    ) -> None:
        _check(request, bearer.credentials if bearer else header, role)

    return Security(who, scopes=[role])


class KeyFirst(APIRoute):
    """A route that reads its body when the key is known; FastAPI reads and parses it before."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        roles = [role for one in self.dependencies for role in getattr(one, "scopes", None) or ()]

        async def handle_known(request: Request) -> Response:
            bearer, header = await _BEARER(request), await _HEADER(request)
            for role in roles:
                _check(request, bearer.credentials if bearer else header, role)
            return await handle(request)

        return handle_known


def _check(request: Request, given: str | None, role: Role) -> None:
    access: Access = request.app.state.access
    key = access.check(given, role)
    request.state.key = key.name if key else None


# Before routes


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
        origin = headers.get("origin", "").lower()
        if origin:
            is_foreign = origin.partition("://")[2] != host and origin not in self._origins
        else:
            is_foreign = headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
        if not is_foreign:
            return None
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


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


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
        hold: is told the size of each chunk, see `Inspector.holding`.
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


class BodyLimit:
    """ASGI: no more than 1 MiB of a body is read, unless the route counts for itself.

    It answers itself: an error that is raised while FastAPI reads a body becomes a 400.
    """

    def __init__(self, app: ASGIApp, answer: Answer) -> None:
        self.app = app
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "")
        said = int(length) if length.isdecimal() else 0
        received, is_answered = 0, False

        async def count() -> Message:
            nonlocal received, is_answered
            if is_answered:
                return {"type": "http.disconnect"}
            if said <= MAX_BODY or _counts_itself(scope):
                message = await receive()
                received += len(message.get("body", b""))
                if received <= MAX_BODY or _counts_itself(scope):
                    return message
            is_answered = True
            problem = BodyTooLarge(
                f"The body has more than the {MAX_BODY:,} bytes that are read here."
            )
            response = await self._answer(Request(scope), problem)
            await response(scope, receive, send)
            return {"type": "http.disconnect"}

        async def pass_on(message: Message) -> None:
            if not is_answered:
                await send(message)

        await self.app(scope, count, pass_on)
