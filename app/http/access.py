"""Who may ask: API keys and their roles, which each route says that it needs."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import Request, Response, Security
from fastapi.routing import APIRoute
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer

from app.http.keys import ROLES, Key, Role, fingerprint, read_keys
from app.http.known_hosts import is_foreign
from app.settings import Settings
from engines.errors import (
    BadKeys,
    BadSettings,
    Forbidden,
    ForeignOrigin,
    Unauthorized,
)
from engines.logs import note

log = logging.getLogger("kensa")

NO_KEY = (
    "This server wants an API key: send it as Authorization: Bearer KEY, or as X-API-Key: KEY;"
    " kensa keys add NAME --role ROLE makes one on the server."
)
WRONG_KEY = (
    "This API key is not known: it is mistyped, or was removed; kensa keys list shows on the server"
    " which there are."
)
NOT_OURS = (
    "Who is known by a cookie alone changes nothing without the header X-Kensa-Page: 1, which pages"
    " of this server send: send the key as Authorization or X-API-Key instead."
)
NOBODY = (
    "The server's file of API keys cannot be read, so nobody is let in; the server's log says what"
    " is wrong with it."
)

COOKIE = "kensa_key"
PAGE = "X-Kensa-Page"


class Access:
    """Which keys there are now, and what they may do."""

    def __init__(self, settings: Settings) -> None:
        self._mode = settings.access
        self.path = settings.keys_path
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

    @property
    def opens_without_keys(self) -> bool:
        """Whether whoever reaches this server may do everything once there is no key."""
        return self._mode == "anyone" or self._open_without_keys

    def check(self, given: str | None, role: Role) -> Key | None:
        """The key that was given; None where none is needed.

        Raises:
            Unauthorized: none was given, or it is not known.
            Forbidden: its role is less than `role`.
            BadKeys: the file of keys is damaged.
        """
        if self.is_open():
            return None
        if not given:
            raise Unauthorized(NO_KEY)
        key = self.known(given)
        if key is None:
            raise Unauthorized(WRONG_KEY)
        if ROLES.index(key.role) < ROLES.index(role):
            raise Forbidden(_too_little(key.name, key.role, role))
        return key

    def is_open(self) -> bool:
        """Whether whoever asks may do everything, without a key. Raises BadKeys as `check`."""
        if self._mode == "anyone":
            return True
        self._look()
        if self._problem is not None:
            raise BadKeys(NOBODY)
        return not self._keys and self._open_without_keys

    def known(self, given: str) -> Key | None:
        """The key of this text, as the file was when it was last looked at."""
        key = self._keys.get(given[6:14])
        # Also where there is no such id: so both take the same time.
        is_right = hmac.compare_digest(fingerprint(given), key.sha256 if key else "0" * 64)
        return key if is_right else None

    def _look(self) -> None:
        """Read the file again when it has changed; to see that costs two microseconds."""
        try:
            now = self.path.stat()
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
            keys = read_keys(self.path)
            if keys is None and before:
                raise BadKeys(f"{self.path} is gone: restore it, or start the server again.")
        except BadKeys as error:
            self._problem, self._keys = str(error), before
            log.error("Nobody is let in. %s", error)
            return
        self._problem, self._keys = None, {key.id: key for key in keys or ()}
        if not is_first:
            log.info("API keys: %d", len(self._keys))


def _too_little(name: str, has: Role, needed: Role) -> str:
    more = " or admin" if needed == "operator" else ""
    return f"The key {name} has the role {has}; this needs a key with the role {needed}{more}."


# What routes say of themselves

_BEARER = HTTPBearer(
    auto_error=False, scheme_name="bearer", description="Authorization: Bearer KEY"
)
_HEADER = APIKeyHeader(
    name="X-API-Key", auto_error=False, scheme_name="header", description="X-API-Key: KEY"
)


def needs(role: Role) -> Any:
    """A dependency for a route or a router: only who has a key of this role, or of a higher one."""

    async def known(
        request: Request,
        bearer: Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)],
        header: Annotated[str | None, Security(_HEADER)],
    ) -> None:
        _check(request, _sent(bearer, header), role)

    return Security(known, scopes=[role])


def must_have(request: Request, role: Role) -> None:
    """For what only some ways of asking a route need: more than the role of the route.

    Raises:
        Forbidden: the key that it came with has less.
    """
    has: Role = request.state.role
    if ROLES.index(has) < ROLES.index(role):
        raise Forbidden(_too_little(who(request), has, role))


def who(request: Request) -> str:
    """The name of the key that a request came with; empty where none was needed."""
    return getattr(request.state, "key", None) or ""


class KeyFirst(APIRoute):
    """A route that reads its body when the key is known; FastAPI reads and parses it before."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        roles = [role for one in self.dependencies for role in getattr(one, "scopes", None) or ()]

        async def handle_known(request: Request) -> Response:
            bearer, header = await _BEARER(request), await _HEADER(request)
            for role in roles:
                _check(request, _sent(bearer, header), role)
            return await handle(request)

        return handle_known


def _sent(bearer: HTTPAuthorizationCredentials | None, header: str | None) -> str | None:
    return bearer.credentials if bearer else header


def cookie_of(request: Request) -> str | None:
    """The key in a request's cookie, unless the page of another server asks.

    To a browser, http://machine:3000 and http://machine:8000 are one site: SameSite lets both.
    """
    kept = request.cookies.get(COOKIE)
    return kept if kept and not is_foreign(request.headers) else None


async def given_to(request: Request) -> str | None:
    """The key that a request came with, in a header or as a cookie; of a route that needs none."""
    return _sent(await _BEARER(request), await _HEADER(request)) or cookie_of(request)


async def may_still(request: Request, role: Role) -> Callable[[], bool]:
    """Whether who asked would be let in now, too: of an answer that goes on for long."""
    access: Access = request.app.state.access
    given = await given_to(request)

    def is_let_in() -> bool:
        try:
            access.check(given, role)
        except (Unauthorized, Forbidden, BadKeys):
            return False
        return True

    return is_let_in


def _check(request: Request, sent: str | None, role: Role) -> None:
    access: Access = request.app.state.access
    kept = None if sent else cookie_of(request)
    key = access.check(sent or kept, role)
    changes = request.method not in ("GET", "HEAD")
    if key and kept and changes and request.headers.get(PAGE) != "1":  # which no form can send
        raise ForeignOrigin(NOT_OURS)
    request.state.key = key.name if key else None
    request.state.role = key.role if key else "admin"
    if key:
        note(key=key.name)
