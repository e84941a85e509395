"""Who is asking, a browser that stays known, and the keys themselves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi import Path as InPath
from pydantic import ConfigDict, Field

from app.http.access import COOKIE, WRONG_KEY, Access, KeyFirst, given_to, needs, who
from app.http.base_body import Body, error_response
from app.http.keys import Key, Role, add_key, read_keys, remove_key
from app.routes.record import recorder_of
from app.settings import NAME
from engines.errors import BadSettings, Conflict, ReadOnly, Unauthorized

YEAR_S = 365 * 86_400
Result = TypeVar("Result")
A_KEY = "kensa_9f31c04e_5b0c9e1f7a2d4c6b8e0f1a3c5d7e9b2f4a6c8d0e1f3b5a79"


class SessionBody(Body):
    """Who asks, as far as that is known."""

    keys: bool = Field(description="Whether a key is needed here.")
    key: str | None = Field(description="The name of the key that came; null for none.")
    role: Role | None = Field(
        description="What whoever asks may do; null: nothing. admin where no key is needed."
    )


class SessionRequest(Body):
    """A key, to be kept in a cookie."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"key": A_KEY}]})

    key: str = Field(min_length=1, max_length=200, description="Its text.")


class KeyBody(Body):
    """A key, as far as the server knows it."""

    name: str
    role: Role
    id: str = Field(description="The first word of its text, after kensa_.")
    created: str = Field(description="UTC.")


class KeysBody(Body):
    """All keys."""

    keys: list[KeyBody]
    opens_without: bool = Field(
        description="Whether whoever reaches this server may do everything once there is no key."
    )


class KeyRequest(Body):
    """A key to be made."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"name": "line-3", "role": "line"}]}
    )

    name: str = Field(pattern=NAME, description="Whose it is, such as line-3.")
    role: Role


class NewKeyBody(Body):
    """A key that was made."""

    name: str
    role: Role
    key: str = Field(description="Its text. It is shown only now.")


_BAD_KEYS = error_response(
    "The file of keys cannot be read.", bad_keys="The server's file of API keys cannot be read, ..."
)
_LOCKED_OUT = {
    "conflict": "After this there would be keys, and no admin's among them: make one with the role"
    " admin first."
}
_CANNOT_WRITE = error_response(
    "The file of keys cannot be written.", read_only="Cannot write keys.json: Read-only file ..."
)
OnName = Annotated[str, InPath(pattern=NAME, description="Of the key.", examples=["line-3"])]

router = APIRouter(tags=["access"], route_class=KeyFirst)


@router.get("/session", summary="Who am I?", responses={503: _BAD_KEYS})
async def session(request: Request, response: Response) -> SessionBody:
    """Whether a key is needed here, and what the one may do that came, in a header or as a cookie.

    A cookie whose key is not known (any more) is taken back.
    """
    access, given = _access(request), await given_to(request)
    response.headers["Cache-Control"] = "no-store"
    if access.is_open():
        return SessionBody(keys=False, key=None, role="admin")
    kept = request.cookies.get(COOKIE)
    if kept is not None and access.known(kept) is None:  # whatever came in a header
        _forget(request, response)
    return _of(access.known(given) if given else None)


@router.post(
    "/session",
    summary="Stay known to this browser",
    responses={
        401: error_response("The key is not known.", unauthorized=WRONG_KEY),
        503: _BAD_KEYS,
    },
)
async def log_in(request: Request, asked: SessionRequest, response: Response) -> SessionBody:
    """Keeps a key in a cookie that no script can read, for a year, or until DELETE /session.

    A request that is known by the cookie alone and changes something needs `X-Kensa-Page: 1`.
    """
    access = _access(request)
    if access.is_open():
        return SessionBody(keys=False, key=None, role="admin")
    key = access.known(asked.key)
    if key is None:
        raise Unauthorized(WRONG_KEY)
    response.set_cookie(
        COOKIE, asked.key, max_age=YEAR_S, httponly=True, samesite="strict", secure=_by_tls(request)
    )
    return _of(key)


@router.delete("/session", status_code=204, summary="Be forgotten by this browser")
async def log_out(request: Request, response: Response) -> None:
    """Takes the cookie back. The key itself stays good."""
    _forget(request, response)


@router.get("/keys", dependencies=[needs("admin")], summary="Which keys are there?")
async def keys(request: Request) -> KeysBody:
    """Name, role, id and date of each. Their texts nobody knows but who has them."""
    access = _access(request)
    found = await asyncio.to_thread(read_keys, access.path)
    return KeysBody(
        keys=[KeyBody(**one.model_dump(exclude={"sha256"})) for one in found or ()],
        opens_without=access.opens_without_keys,
    )


@router.post(
    "/keys",
    dependencies=[needs("admin")],
    status_code=201,
    summary="Make a key",
    responses={
        409: error_response("The name is taken, or no admin's key would be there.", **_LOCKED_OUT),
        507: _CANNOT_WRITE,
    },
)
async def make_key(request: Request, asked: KeyRequest, response: Response) -> NewKeyBody:
    """As `kensa keys add` makes it. The first key has to be an admin's.

    Else nobody could make another one over HTTP: once there is a key, every request needs one.
    """
    access = _access(request)
    text = await _changed(
        lambda: add_key(access.path, asked.name, asked.role, lambda left: _an_admin(access, left))
    )
    recorder_of(request).note("key_added", who(request), asked.name, role=asked.role)
    response.headers["Cache-Control"] = "no-store"
    return NewKeyBody(name=asked.name, role=asked.role, key=text)


@router.delete(
    "/keys/{name}",
    dependencies=[needs("admin")],
    status_code=204,
    summary="Refuse a key from now on",
    responses={
        404: error_response("There is no such key.", unknown_key="There is no key line-4; ..."),
        409: error_response("No admin's key would be left.", **_LOCKED_OUT),
        507: _CANNOT_WRITE,
    },
)
async def end_key(request: Request, name: OnName) -> None:
    """As `kensa keys remove` ends it; but not the last key of an admin, while there are others.

    The last key of all goes only where the server is open without any: see `opens_without`.
    """
    access = _access(request)
    await _changed(lambda: remove_key(access.path, name, lambda left: _an_admin(access, left)))
    recorder_of(request).note("key_removed", who(request), name)


def _an_admin(access: Access, left: list[Key]) -> None:
    """Raise Conflict where nobody could make keys over HTTP any more."""
    if not left and not access.opens_without_keys:
        raise Conflict(
            "This is the last key, and without any this server refuses everybody: kensa keys"
            " remove, on the server, removes it all the same."
        )
    if left and all(key.role != "admin" for key in left):
        raise Conflict(
            "After this there would be keys, and no admin's among them, so that nobody could make"
            " or remove keys here: make one with the role admin first."
        )


async def _changed(work: Callable[[], Result]) -> Result:
    """Do it in a thread, since another process may hold the file of keys."""
    try:
        return await asyncio.to_thread(work)
    except BadSettings as error:
        raise ReadOnly(str(error)) from None


def _of(key: Key | None) -> SessionBody:
    return SessionBody(keys=True, key=key.name if key else None, role=key.role if key else None)


def _forget(request: Request, response: Response) -> None:
    response.delete_cookie(COOKIE, httponly=True, samesite="strict", secure=_by_tls(request))


def _by_tls(request: Request) -> bool:
    """Whether the browser speaks TLS, with a proxy: then it sends the cookie nowhere else."""
    return request.headers.get("origin", "").lower().startswith("https://")


def _access(request: Request) -> Access:
    found: Access = request.app.state.access
    return found
