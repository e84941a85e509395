"""The shared store: how images and models travel between machines. A folder, S3, or whatever fsspec
reads.

    <place>/<sha256>     the bytes of a file, or a list: names and hashes of a folder's files

A folder is its list, and a list is named by its own hash. So who knows that hash (it stands in the
queue's database) can check everything, and nothing that is there already is sent again. The list
is written last: a transfer that was cut off leaves files that no list names.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn
from urllib.parse import urlsplit

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import known_implementations

from engines.errors import BadSettings, BadShared, KensaError, NoShared
from engines.files import sha256, sync_folder

Tick = Callable[[int, int], None]  # (done, total)

MARK = "kensa.json"  # who does not find it looks at another folder, or at one that is not mounted
AT_ONCE = 8  # transfers

_DIGEST = re.compile(r"[0-9a-f]{64}")
_PLACE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")


class Shared:
    """The files below one URL. Several machines may use it at once."""

    def __init__(self, fs: Any, root: str) -> None:
        self._fs = fs
        self._root = root.rstrip("/")
        self._is_folder = isinstance(fs, LocalFileSystem)

    @classmethod
    def open(cls, url: str) -> Shared:
        """What a URL, or the path of a folder, names. Nothing is connected or made yet.

        Raises:
            BadSettings: nothing here reads such a URL.
        """
        check_url(url)
        fs, root = url_to_fs(url)
        return cls(fs, root)

    # ---- folders ------------------------------------------------------------------------------

    def push(self, place: str, files: Mapping[str, Path], tick: Tick = lambda *_: None) -> str:
        """Send files (their names in the folder -> where they are), and return the list's hash.

        Raises:
            NoShared: the store does not answer, or is full; what was sent stays sent.
            OSError: a file cannot be read.
        """
        with _reached():
            self._touch_mark()
            there = self._sizes(place)
        listed: dict[str, str] = {}
        before = {name: _state(path) for name, path in files.items()}

        def send(name: str) -> None:
            path = files[name]
            digest = sha256(path)
            if there.get(digest) != path.stat().st_size:
                with _reached():
                    self._put(path, f"{place}/{digest}")
            if _state(path) != before[name]:
                raise NoShared(f"{path.name} was changed while it was sent.")
            listed[name] = digest

        _all(send, sorted(files), tick)
        content = json.dumps({"files": dict(sorted(listed.items()))}).encode()
        digest = hashlib.sha256(content).hexdigest()
        if there.get(digest) != len(content):
            self.write(f"{place}/{digest}", content)
        return digest

    def pull(self, place: str, digest: str, target: Path, tick: Tick = lambda *_: None) -> None:
        """Make a folder hold the files of a list, and no others. Good ones that it has stay.

        Raises:
            BadShared: something is missing, damaged, or leads out of the folder; the sentence names
                it. What is damaged is removed from the store, so that it can be sent again.
            NoShared: the store does not answer.
            OSError: `target` cannot be written.
        """
        files = self._listed(place, digest)
        target.mkdir(parents=True, exist_ok=True)

        def fetch(name: str) -> None:
            path, expected = target / name, files[name]
            if path.is_file() and sha256(path) == expected:
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            arriving = path.with_name(f".{secrets.token_hex(8)}")
            try:
                self._get(f"{place}/{expected}", arriving, name)
                if sha256(arriving) != expected:
                    self._refuse(f"{place}/{expected}", name)
                arriving.replace(path)
            finally:
                arriving.unlink(missing_ok=True)

        for path in sorted(target.rglob("*"), reverse=True):
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path.relative_to(target).as_posix() not in files:
                path.unlink()
        _all(fetch, sorted(files), tick)

    def sweep(self, place: str, keep: Iterable[str] = ()) -> None:
        """Remove what no list of `keep` needs: all where there is none.

        Raises:
            NoShared: the store does not answer.
        """
        needed = set(keep)
        for digest in list(needed):
            try:
                needed |= {*self._listed(place, digest).values()}
            except BadShared:  # noqa: PERF203 (who needs it will hear of it)
                continue
        with _reached():
            if not needed:
                self._remove(place)
                return
            gone = [name for name in self._sizes(place) if name not in needed]
            for name in gone:
                self._fs.rm_file(f"{self._at(place)}/{name}")  # it may begin with a dot

    def _listed(self, place: str, digest: str) -> dict[str, str]:
        """Name -> SHA-256. No name leads out of a folder."""
        content = self.read(f"{place}/{digest}")
        if content is None:
            self._refuse_missing(f"{place}/{digest}", "a list of files")
        if hashlib.sha256(content).hexdigest() != digest:
            self._refuse(f"{place}/{digest}", "a list of files")
        files: dict[str, str] = json.loads(content)["files"]  # as its hash says, we wrote it
        for name, expected in files.items():
            if not _is_inside(name) or not _DIGEST.fullmatch(expected):
                raise BadShared(f"A list in the shared store names {name[:200]!r}: it is refused.")
        return files

    # ---- single files -------------------------------------------------------------------------

    def write(self, path: str, content: bytes) -> None:
        """Raises NoShared where it cannot be written; what was there is as it was then."""
        with _reached():
            if not self._is_folder:
                self._fs.pipe_file(self._at(path), content)
                return
            with _arriving(Path(self._at(path))) as temporary:
                temporary.write_bytes(content)

    def read(self, path: str) -> bytes | None:
        """None where it is missing. Raises NoShared."""
        with _reached():
            try:
                content: bytes = self._fs.cat_file(self._at(path))
            except FileNotFoundError:
                return None
            return content

    def names(self, place: str) -> list[str]:
        """The files and folders of a place, sorted; none where there is no such place."""
        with _reached():
            try:
                self._fs.invalidate_cache()
                found = self._fs.ls(self._at(place), detail=False)
            except FileNotFoundError:
                return []
        return sorted(name for name in map(_base, found) if _PLACE.fullmatch(name))

    # ---- how it is done -----------------------------------------------------------------------

    def _at(self, path: str) -> str:
        if not _PLACE.fullmatch(path):
            raise BadShared(f"{path[:200]!r} is no place in the shared store.")
        return f"{self._root}/{path}"

    def _sizes(self, place: str) -> dict[str, int]:
        self._fs.invalidate_cache()
        try:
            found = self._fs.ls(self._at(place), detail=True)
        except FileNotFoundError:
            return {}
        return {_base(one["name"]): int(one["size"] or 0) for one in found if one["type"] == "file"}

    def _put(self, source: Path, path: str) -> None:
        if not self._is_folder:  # an upload appears in one step
            self._fs.put_file(str(source), self._at(path))
            return
        with _arriving(Path(self._at(path))) as temporary:
            self._fs.put_file(str(source), str(temporary))

    def _get(self, path: str, target: Path, name: str) -> None:
        try:
            with _reached(local=True):
                self._fs.get_file(self._at(path), str(target))
        except FileNotFoundError:
            self._refuse_missing(path, name)

    def _remove(self, path: str) -> None:
        try:
            self._fs.rm(self._at(path), recursive=True)
        except FileNotFoundError:
            return

    def _touch_mark(self) -> None:
        if not self._fs.exists(self._at(MARK)):
            self.write(MARK, b'{"kensa": 1}\n')

    def _refuse(self, path: str, name: str) -> NoReturn:
        with _reached():
            self._remove(path)
        raise BadShared(
            f"{name} in the shared store is damaged (its SHA-256 is not {_base(path)[:12]}...): it"
            " is refused and removed. Send the job again."
        )

    def _refuse_missing(self, path: str, name: str) -> NoReturn:
        with _reached():
            self._fs.invalidate_cache()
            known = self._fs.exists(self._at(MARK))
        if not known:
            raise NoShared(
                f"The shared store has no {MARK}: is it mounted, and is it that of the others?"
            )
        raise BadShared(
            f"{name} ({_base(path)[:12]}...) is missing in the shared store. Send the job again."
        )


def check_url(url: str) -> None:
    """Whether something here reads such a URL; it is not loaded, as a server never needs it.

    Raises:
        BadSettings: nothing does.
    """
    scheme = urlsplit(url).scheme
    if not scheme and not Path(url).is_absolute():
        raise BadSettings(
            f"KENSA_SHARED_URL is {url!r}: it takes the whole path of a folder, or a URL that"
            " fsspec reads, such as s3://bucket/kensa."
        )
    found = known_implementations.get(scheme or "file")
    if found is None:
        raise BadSettings(
            f"KENSA_SHARED_URL begins with {scheme}, which fsspec does not know: it takes a folder,"
            " or a URL such as s3://bucket/kensa."
        )
    if find_spec(found["class"].partition(".")[0]) is None:
        hint = found.get("err", "something is not installed").rstrip(".")
        raise BadSettings(f"KENSA_SHARED_URL begins with {scheme}: {hint}.")


@contextmanager
def _reached(local: bool = False) -> Iterator[None]:
    """Turns whatever a file system raises into NoShared; FileNotFoundError means what it says.

    `local`: a full disk may be this machine's own, and leaves as it came.
    """
    try:
        yield
    except (KensaError, FileNotFoundError):
        raise
    except Exception as error:
        is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if is_full and local:
            raise
        if is_full:
            raise NoShared("The shared store is full: free some space there.") from error
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        why = " ".join(str(why).split())[:300].rstrip(".")
        where = getattr(error, "filename", None)
        where = f" ({where})" if where else ""
        raise NoShared(f"The shared store cannot be used now: {why}{where}.") from error


@contextmanager
def _arriving(path: Path) -> Iterator[Path]:
    """A temporary name that becomes `path` at the end, flushed to the disk; gone after an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:64]}.{secrets.token_hex(4)}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _all(work: Callable[[str], None], names: Collection[str], tick: Tick) -> None:
    """Do work for every name, a few at a time. The first error ends it."""
    with ThreadPoolExecutor(AT_ONCE, "shared") as threads:
        futures = [threads.submit(work, name) for name in names]
        try:
            for done, future in enumerate(futures, 1):
                future.result()
                tick(done, len(names))
        finally:
            threads.shutdown(wait=True, cancel_futures=True)


def _is_inside(name: str) -> bool:
    parts = PurePosixPath(name).parts
    plain = all(part not in (".", "..") and not set(part) & set("\\\0/") for part in parts)
    return bool(parts) and plain and name == "/".join(parts) and not name.startswith("/")


def _state(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _base(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]
