"""Writing files so that a reader, a crash or a full disk never meets half of one."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any
from unicodedata import normalize

_ROOM = 245  # bytes of a file's name, of 255, beside two dots and eight digits
_NOT_IN_UTF_8 = re.compile(r"[\ud800-\udfff]")  # as Python reads bytes that are not UTF-8


def write_atomically(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write to a temporary name, fsync, rename. `mode` is less what the process's umask takes.

    Raises:
        OSError: the disk is full or the folder cannot be written; `path` is as it was.
    """
    with replaced(path, data, mode):
        pass


@contextmanager
def replaced(path: Path, data: bytes, mode: int = 0o666) -> Iterator[None]:
    """The same, for a write that holds only if others do: where the body fails, it is undone.

    What was there is kept under a second name meanwhile, so that undoing it needs no room.
    """
    temporary, before = _hidden_beside(path), _hidden_beside(path)
    try:
        created = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(created, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        was_there = _kept(path, before)
        temporary.replace(path)
        try:
            sync_folder(path.parent)
            yield
        except BaseException:
            if was_there:
                before.replace(path)
            else:
                path.unlink(missing_ok=True)
            raise
    finally:
        for rest in (temporary, before):
            with suppress(OSError):  # what was said of `path` holds all the same
                rest.unlink()


def remove(*paths: Path) -> None:
    """Delete files and folders with all that is in them, for good: all of them, or none.

    Raises:
        OSError: one cannot be deleted, or that cannot be flushed; they are there as they were.
    """
    aside = [_hidden_beside(path) for path in paths]
    moved: list[tuple[Path, Path]] = []
    try:
        for path, hidden in zip(paths, aside, strict=True):
            path.rename(hidden)
            moved.append((path, hidden))
            sync_folder(path.parent)
    except BaseException:
        for path, hidden in reversed(moved):
            hidden.rename(path)
        raise
    for hidden in aside:  # nobody sees it, and who tidies up finds what is left
        remove_hidden(hidden)


def _hidden_beside(path: Path) -> Path:
    """A name of its own beside a path, and not too long for a file system where that is not."""
    name = os.fsdecode(os.fsencode(path.name)[:_ROOM])
    return path.with_name(f".{name}.{secrets.token_hex(4)}")


def remove_hidden(path: Path) -> None:
    """Delete what nobody reads any more, as far as it can be."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _kept(path: Path, second: Path) -> bool:
    """Give a file a second name, or a copy where there are none; False where it is missing."""
    try:
        second.hardlink_to(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
            raise
        try:
            shutil.copyfile(path, second)
        except FileNotFoundError:
            return False
    return True


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A new folder beside `target`; what is in it at the end moves into `target` in one go.

    When the body raises, or the process dies before its end, `target` is as it was. After that the
    files move one by one, meta.json first: it carries the hashes of the others, so whoever reads
    before the last one meets a mixture that it can tell, even over old files without hashes.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target.parent.glob(f".{glob.escape(target.name)}.*/"))
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    in_use = os.open(staging, os.O_RDONLY)
    fcntl.flock(in_use, fcntl.LOCK_EX)  # the system gives it back however this process ends
    try:
        staging.chmod(0o755)
        yield staging
        for path in staging.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if not target.exists():
            staging.rename(target)
        for path in sorted(staging.glob("*"), key=lambda path: path.name != "meta.json"):
            path.replace(target / path.name)
        sync_folder(target)
        sync_folder(target.parent)
    finally:
        os.close(in_use)
        shutil.rmtree(staging, ignore_errors=True)


def sweep(folders: Iterable[Path]) -> None:
    """Remove the staging folders of processes that are gone."""
    for folder in folders:
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except (FileNotFoundError, PermissionError):  # finished just now; of another user
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            pass  # somebody is at work in it
        finally:
            os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_object(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where it is missing or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # missing, not JSON, or absurdly so
        return None
    return found if isinstance(found, dict) else None


def printable(text: str) -> str:
    """A text as UTF-8 can hold it: bytes of a file's name that are none are written as `\\x83`."""
    return _NOT_IN_UTF_8.sub(_escaped, text)


def json_text(content: Any) -> str:
    """Indented JSON whose texts are all `printable`."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    return _NOT_IN_UTF_8.sub(lambda found: f"\\{_escaped(found)}", text) + "\n"


def print_anything() -> None:
    """Let stdout and stderr escape what their encoding does not have, rather than raise."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a test may have put another in its place
            stream.reconfigure(errors="backslashreplace")


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"


def name_of_folder(folder: Path) -> str:
    """The model's name that a folder's name makes; "" where it has no letter and no digit."""
    name = re.sub(r"[^\w-]+", "-", normalize("NFC", folder.resolve().name)).strip("-")[:64]
    return name if re.search(r"[^\W_]", name) else ""
