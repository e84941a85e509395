"""Writes that are made to fail, one at a time: what is said to be undone must be undone."""

from __future__ import annotations

import errno
import os
import re
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Python's own names of what it is about to do (audit events): all that changes a file system.
CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.truncate", "os.symlink"}
# What a statement of SQL changes; SQLite writes in C, where Python announces nothing.
_WRITES = re.compile(r"\s*(INSERT|UPDATE|DELETE|REPLACE|CREATE|ALTER|DROP)\b", re.IGNORECASE)
_fsync, _connect = os.fsync, sqlite3.dbapi2.connect


@dataclass
class Step:
    """The write that fails, counted from 0."""

    root: str
    left: int
    error: int
    spared: str | tuple[str, ...]
    failed: str | None = None  # what it was

    def meets(self, what: str, path: str) -> None:
        if not path.startswith(self.root) or self.failed is not None:
            return
        if self.spared and path.endswith(self.spared):
            return
        if self.left == 0:
            self.failed = f"{what} {path.removeprefix(self.root)}"
            raise OSError(self.error, os.strerror(self.error), path)
        self.left -= 1


_now: Step | None = None
_is_hooked = False


@contextmanager
def failing(
    root: Path, step: int, error: int = errno.ENOSPC, spared: str | tuple[str, ...] = ""
) -> Iterator[Step]:
    """Let write number `step` below a folder fail, in whatever thread; all others work.

    Args:
        spared: writes to paths that end so are not counted, and work.
    """
    global _now, _is_hooked
    if not _is_hooked:
        sys.addaudithook(_audit)  # which stays for good
        _is_hooked = True
    _now = Step(str(root), step, error, spared)
    os.fsync = _flush
    try:
        yield _now
    finally:
        _now, os.fsync = None, _fsync


@contextmanager
def databases_may_fail() -> Iterator[None]:
    """Databases of SQLite that are opened meanwhile count as files: statements and commits."""

    def connect(database: str, *arguments: Any, **options: Any) -> Any:
        made = _connect(database, *arguments, **{"factory": _Database, **options})
        made.path = str(database)
        return made

    sqlite3.dbapi2.connect = connect  # type: ignore[assignment]
    try:
        yield
    finally:
        sqlite3.dbapi2.connect = _connect


class _Database(sqlite3.Connection):
    path = ""

    def meets(self, what: str) -> None:
        try:
            if _now is not None:
                _now.meets(what, self.path)
        except OSError as error:  # in SQLite's own words
            words = {errno.ENOSPC: "database or disk is full"}
            raise sqlite3.OperationalError(words.get(error.errno or 0, "disk I/O error")) from None

    def cursor(self, factory: Any = None) -> Any:
        return super().cursor(factory or _Cursor)

    def commit(self) -> None:
        if self.in_transaction:
            self.meets("commit")
        super().commit()


class _Cursor(sqlite3.Cursor):
    def execute(self, sql: str, *parameters: Any) -> Any:
        connection = self.connection
        if isinstance(connection, _Database) and (found := _WRITES.match(sql)):
            connection.meets(found[1])
        return super().execute(sql, *parameters)

    def executemany(self, sql: str, *parameters: Any) -> Any:
        connection = self.connection
        if isinstance(connection, _Database) and (found := _WRITES.match(sql)):
            connection.meets(found[1])
        return super().executemany(sql, *parameters)


def _audit(event: str, arguments: tuple[object, ...]) -> None:
    if _now is None:
        return
    if event == "open":
        path, _, flags = arguments
        if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            _now.meets(event, os.fsdecode(path) if isinstance(path, (str, bytes)) else "")
    elif event in CHANGES:
        path = arguments[0]
        if event == "os.mkdir" and Path(str(path)).is_dir():  # nothing is written
            return
        _now.meets(event, os.fspath(path) if isinstance(path, (str, os.PathLike)) else "")


def _flush(descriptor: int) -> None:
    if _now is not None:
        _now.meets("fsync", str(Path(f"/proc/self/fd/{descriptor}").readlink()))
    _fsync(descriptor)
