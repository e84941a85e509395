"""API keys: `kensa keys` makes and removes them, the server looks them up.

A key is `kensa_<id>_<secret>`: the id says which one it is, the secret is 192 random bits. Of it
only the SHA-256 is kept. A slow hash, as for passwords, would protect what can be guessed; nobody
guesses 192 bits, and a slow one would cost every request its time.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.settings import NAME, Settings
from engines.errors import BadKeys, BadSettings, Conflict, UnknownKey
from engines.files import write_atomically

Role = Literal["line", "operator", "admin"]
ROLES: tuple[Role, ...] = get_args(Role)  # each may do what those before it may

MEANINGS: dict[Role, str] = {
    "line": "to inspect and to look at everything",
    "operator": "for training images, retraining and which version is live as well",
    "admin": "to take in models, and to make keys, as well",
}


class Key(BaseModel):
    """A key as it is kept: enough to know it again, too little to use it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=NAME)
    id: str = Field(pattern=r"^[0-9a-f]{8}$")
    role: Role
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    created: str


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    keys: list[Key]


def fingerprint(text: str) -> str:
    """The SHA-256 of a key's text, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def read_keys(path: Path) -> list[Key] | None:
    """The keys in a file; None where there is no file.

    Raises:
        BadKeys: it is damaged, or this user may not read it.
    """
    try:
        return _File.model_validate_json(path.read_bytes()).keys
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BadKeys(
            f"{path} cannot be read ({error.strerror}): it must belong to the user who runs the"
            " server."
        ) from None
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"])
        raise BadKeys(
            f"{path} is damaged ({f'{place}: ' if place else ''}{problem['msg']}): restore it, or"
            " delete it and make new keys."
        ) from None


Left = Callable[[list[Key]], None]  # raises where these keys, after a change, are none to leave


def _any(_: list[Key]) -> None:
    """Whoever may run the command on the server may leave what keys they like."""


def add_key(path: Path, name: str, role: Role, look: Left = _any) -> str:
    """Make a key and keep its fingerprint; the text of the key is known to nobody else.

    Raises:
        Conflict: there is a key of that name.
        BadKeys: the file is damaged.
        BadSettings: it cannot be written.
    """
    with _changing(path) as keys:
        if any(key.name == name for key in keys):
            raise Conflict(f"There is a key {name} already: remove it first, or take another name.")
        ids = {key.id for key in keys}
        new = next(one for one in iter(lambda: secrets.token_hex(4), "") if one not in ids)
        text = f"kensa_{new}_{secrets.token_hex(24)}"
        created = datetime.now(timezone.utc).isoformat(timespec="seconds")
        keys.append(Key(name=name, id=new, role=role, sha256=fingerprint(text), created=created))
        look(keys)
    return text


def remove_key(path: Path, name: str, look: Left = _any) -> int:
    """Forget a key. Returns how many are left.

    Raises:
        UnknownKey: there is none of that name.
        BadKeys, BadSettings: as `add_key`.
    """
    with _changing(path) as keys:
        found = [key for key in keys if key.name == name]
        if not found:
            known = ", ".join(key.name for key in keys) or "none"
            raise UnknownKey(f"There is no key {name}; there is: {known}.")
        keys.remove(found[0])
        look(keys)
    return len(keys)


@contextmanager
def _changing(path: Path) -> Iterator[list[Key]]:
    """The keys, to be changed and written, while every other process that wants to waits."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(path.with_name(f".{path.name}.lock"), os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            keys = read_keys(path) or []
            yield keys
            data = {"keys": [key.model_dump() for key in keys]}
            write_atomically(path, json.dumps(data, indent=1).encode() + b"\n", mode=0o600)
        finally:
            os.close(lock)
    except OSError as error:
        raise BadSettings(f"Cannot write {path}: {error.strerror}.") from None


# The command


def command(arguments: list[str]) -> None:
    """`kensa keys add`, `list` and `remove`.

    Raises:
        KensaError: as the functions above.
    """
    asked = _parser().parse_args(arguments)
    settings = Settings.read()
    path = settings.keys_path
    if asked.what == "add":
        print(add_key(path, asked.name, asked.role))  # noqa: T201 (alone, so that a script can take it)
        _say(f"This is the key {asked.name}, role {asked.role}. It is shown only now.")
        _note(settings, "key_added", asked.name, role=asked.role)
    elif asked.what == "remove":
        left = remove_key(path, asked.name)
        _say(f"The key {asked.name} is removed; a running server refuses it from now on.")
        _note(settings, "key_removed", asked.name)
        if not left:
            _say(
                "There are no more keys: a server that only this machine reaches lets everybody in"
                " now (unless KENSA_ACCESS=keys), any other refuses everybody."
            )
    else:
        for key in read_keys(path) or []:
            print(f"{key.name:20} {key.role:8} {key.id} {key.created}")  # noqa: T201


def _note(settings: Settings, what: str, name: str, **details: str) -> None:
    from app.decisions.database import note_once

    if settings.record == "on":
        note_once(settings.data / "decisions", what, name, **details)


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kensa keys",
        description="Who may ask the server. A running server notices changes at once.",
        epilog="Roles: " + ", ".join(f"{role} {MEANINGS[role]}" for role in ROLES) + ".",
    )
    actions = parser.add_subparsers(dest="what", required=True, metavar="add|list|remove")
    add = actions.add_parser("add", help="make a key and print it, once")
    add.add_argument("name", type=_name, metavar="NAME", help="whose it is, such as line-3")
    add.add_argument("--role", choices=ROLES, required=True, help="what it may do")
    actions.add_parser("list", help="name, role, id and date of each key")
    remove = actions.add_parser("remove", help="refuse a key from now on")
    remove.add_argument("name", metavar="NAME", help="of the key")
    return parser


def _name(text: str) -> str:
    import re

    if not re.fullmatch(NAME, text):
        raise argparse.ArgumentTypeError("1 to 64 letters, digits, - and _")
    return text
