"""Named models on disk: their versions, the live one, and the one before it.

    models/<name>/live                  the live version and the one before it, a line each
    models/<name>/folder                the hash of what KENSA_MODEL_DIR held when it was taken in
    models/<name>/0007-3f9a0c41d2e8/    a version: the files of a bundle, and manifest.json
    models/<name>/gates/0007-…/         what the gate found before it went live, and the flips; and
                                        marks: that it was live, is being opened, was opened once
    models/<name>/refused/0007-…/       a version that cannot be used, and why
    models/<name>/discarded             the highest number of a version that a person discarded

A version never changes once it is there. It appears in one rename, with everything flushed to the
disk before, so a kill or a power cut at any moment leaves a whole version or none. Its name is a
running number, which does not depend on a clock, and a hash over its files.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from unicodedata import normalize

from engines.errors import (
    BadBundle,
    BadRequest,
    Conflict,
    UnknownModel,
    UnknownVersion,
    Unreadable,
)
from engines.files import json_text, replaced, sha256, sweep, sync_folder, write_atomically
from engines.meta import Meta
from engines.regions import Regions
from engines.store.bundle import ONNX, PLAN, PLAN_RECORD, REPORT, check_files, check_hash
from engines.store.golden import GOLDEN
from engines.store.known_scores import SCORES
from engines.store.regions import without_regions, write_regions

# Of a model: letters of any alphabet. The length stands apart from the pattern: 64 times any letter
# is one that takes pydantic 20 ms, at each place where a request has it.
NAME = r"^[\w-]+$"
NAME_LENGTH = 64  # characters
MANIFEST = "manifest.json"
META = "meta.json"
GATE = "gate.json"

_NAME_BYTES = 200  # a file system takes 255
# Of a file that is missing, or is something else than a file that this user may read.
_UNREADABLE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.ELOOP}
_VERSION = re.compile(r"[0-9]{4,9}-[0-9a-f]{12}")
_POINTER = "live"
_LOST = "the file that says which version is live is damaged or missing"
_GATES = "gates"
_REFUSED = "refused"
_REASON = "reason.txt"
_REFUSED_KEPT = 5
_FOLDER = "folder"
_DISCARDED = "discarded"
_THRESHOLD_OF, _REGIONS_OF = "threshold_of", "regions_of"  # in an origin
_STAGING = ".staging"
_OPENING = "opening"  # there while a version is being opened
_OPENED = "opened"  # there once a version was
_WAS_ONCE = ".was_live"  # the mark of one that is being rolled back
_WAS_LIVE = "was_live"  # beside gate.json; not beside that of a version that was rolled back


@dataclass(frozen=True)
class Manifest:
    """What a version is made of, and where it came from."""

    version: str
    created: str  # ISO 8601, for people; nothing is decided by it
    files: dict[str, str]  # name -> SHA-256
    origin: dict[str, Any] = field(default_factory=dict)  # job, parent, category, activate ...


@dataclass(frozen=True)
class Pointer:
    """Which version is live, and which one was before."""

    live: str
    previous: str | None = None


@dataclass(frozen=True)
class PointerBack:
    """A pointer as a rollback makes it: both are known."""

    live: str
    previous: str


class Store:
    """The models below one folder. Several processes may use it at once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._marks: set[Path] = set()  # of versions that are being opened
        self._is_ending = False

    # ---- what is there ------------------------------------------------------------------------

    def names(self) -> list[str]:
        """The models that have a version, or had one."""
        if not self.root.is_dir():
            return []
        names = (path.name for path in self.root.iterdir() if is_name(path.name))
        return sorted(name for name in names if self._may_be_known(name))

    def must_know(self, name: str) -> None:
        """Raise UnknownModel unless there is a model of that name."""
        if not self._may_be_known(name):
            raise UnknownModel(f"There is no model {name[:100]!r}{_there_is(self.names())}.")

    def versions(self, name: str) -> list[str]:
        """The versions of a model, oldest first; none for a model that does not exist."""
        return _versions_in(self._model(name))

    def refused(self, name: str) -> dict[str, str]:
        """Versions that cannot be used -> why."""
        folder = self._model(name) / _REFUSED
        return {
            version: _text(folder / version / _REASON) or "The reason was not kept."
            for version in _versions_in(folder)
        }

    def folder(self, name: str, version: str) -> Path:
        """Where the files of a version are.

        Raises:
            UnknownModel, UnknownVersion: there is no such thing.
        """
        if _VERSION.fullmatch(version):  # without a look at all the others
            folder = self._model(name) / version
            if folder.is_dir():
                return folder
        self.must_know(name)
        versions = self.versions(name)
        raise UnknownVersion(f"{name} has no version {version[:100]!r}{_there_is(versions)}.")

    def manifest(self, name: str, version: str) -> Manifest:
        """The manifest of a version.

        Raises:
            BadBundle: it is missing or damaged, or is not that of this version.
            Unreadable: the system does not give it.
        """
        path = self.folder(name, version) / MANIFEST
        try:
            content = _from_json(path.read_text(encoding="utf-8"))
            manifest = Manifest(
                version, str(content["created"]), dict(content["files"]), dict(content["origin"])
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            Unreadable.check(path, error)
            raise BadBundle(f"{path} cannot be read: {error}.") from None
        if not version.endswith(_digest(manifest.files)):
            raise BadBundle(f"{path} is damaged: it does not belong to {version}.")
        return manifest

    def check(self, name: str, version: str) -> Path:
        """The folder of a version, after every file in it was compared with its SHA-256.

        Raises:
            BadBundle: a file is missing or has changed.
        """
        folder = self.folder(name, version)
        for file, expected in self.manifest(name, version).files.items():
            path = folder / file
            if file == META and path.is_file() and sha256(path) != expected:
                raise BadBundle(
                    f"{path} is not the file that was published (its SHA-256 differs): a version"
                    f" never changes. PUT /models/{name}/threshold sets another threshold."
                )
            check_hash(path, expected)
        return folder

    def differences(self, name: str, one: str, other: str) -> set[str]:
        """Which files two versions do not share: meta.json alone where the threshold differs."""
        first, second = (self.manifest(name, version).files for version in (one, other))
        return {file for file, _ in first.items() ^ second.items()}

    # ---- the live version ---------------------------------------------------------------------

    def pointer(self, name: str) -> Pointer | None:
        """Which version is live; None when none is, or when the file that says it is damaged."""
        text = _text(self._model(name) / _POINTER)
        lines = (text or "").split("\n")
        if len(lines) != 3 or not _VERSION.fullmatch(lines[0]):
            return None
        return Pointer(lines[0], lines[1] if _VERSION.fullmatch(lines[1]) else None)

    def candidates(self, name: str) -> list[str]:
        """The versions that may be served, best first: live, the one before, older live ones.

        None that was never live, or was rolled back from since: nobody has let it through.
        """
        known, named = self.versions(name), self._named(name)
        once = [version for version in reversed(known) if self._mark(name, version).exists()]
        before = [version for version in named[1:] if version in once]
        order = dict.fromkeys([*named[:1], *before, *once])
        return [version for version in order if version in known]

    def to_serve(self, name: str) -> tuple[list[str], str | None, str | None]:
        """The candidates; the one that should serve; a clause that says why it cannot, if known.

        The second is None where nobody knows which one is live, or none ever was.
        """
        candidates, pointer = self.candidates(name), self.pointer(name)
        if pointer is None:
            is_lost = candidates or (self._model(name) / _POINTER).exists()
            return candidates, None, _LOST if is_lost else None
        if pointer.live in self.versions(name):
            return candidates, pointer.live, None
        reason = self.refused(name).get(pointer.live)
        why = f"was refused: {reason.rstrip('.')}" if reason else "is not there any more"
        return candidates, pointer.live, why

    def held(self, name: str) -> tuple[str, list[str]] | None:
        """Where none was ever live: the newest version that the gate holds, and its reasons."""
        if self.to_serve(name) != ([], None, None):
            return None
        for version in reversed(self.versions(name)):
            found = self.gate(name, version)
            if found is not None and found.get("ok") is not True:
                return version, found.get("reasons", [])
        return None

    def to_start_from(self, name: str, version: str | None = None) -> str | None:
        """The version that a job starts from: the one it names, else the best that may be served.

        Before any was live, the newest that the gate has not held. None where there is none.

        Raises:
            UnknownModel, UnknownVersion: the one that is named is not there.
        """
        if version is not None:
            self.folder(name, version)
            return version
        new = [one for one in self.versions(name) if self.gate(name, one) is None]
        return next(iter([*self.candidates(name), *reversed(new)]), None)

    def made_by(self, name: str, job_id: str) -> str | None:
        """The version that a job published, also where it was killed before it could say so."""
        for version in self.versions(name):
            with suppress(BadBundle, UnknownVersion):  # damaged, or deleted just now
                if self.manifest(name, version).origin.get("job") == job_id:
                    return version
        return None

    def activate(self, name: str, version: str, found: dict[str, Any] | None = None) -> None:
        """Make a version the live one; the live one becomes the one before it.

        Where the live one is gone, the best of the others becomes that.

        Args:
            found: what the gate found, or a person said, which is recorded with it.

        Raises:
            UnknownModel, UnknownVersion: there is no such thing.
            OSError: the disk is full; pointer and record are as they were.
        """
        with self._locked(name):
            self.folder(name, version)  # looked for inside the lock: it might be pruned just now
            others, pointer = self.candidates(name), self.pointer(name)
            if pointer is not None and pointer.live == version:  # what was before it stays so
                others = [one for one in self._named(name) if one in self.versions(name)] + others
            before = next((one for one in others if one != version), None)
            with self._recorded(name, version, found), self._marked(name, version):
                self._point(name, version, before)

    def roll_back(self, name: str, found: dict[str, Any] | None = None) -> str:
        """Make the version before the live one live again, and return it.

        The one that was live is the one before then: a second call takes the first one back.

        Args:
            found: why, which is recorded as what the gate found of the one that was live.

        Raises:
            UnknownModel, Conflict: as `pointer_back`.
            OSError: the disk is full; pointer and record are as they were.
        """
        with self._locked(name):
            back = self.pointer_back(name)
            with (
                self._recorded(name, back.previous, found),
                self._marked(name, back.live, instead_of=back.previous),
            ):
                self._point(name, back.live, back.previous)
        return back.live

    def pointer_back(self, name: str) -> PointerBack:
        """What `roll_back` makes of the pointer.

        Raises:
            UnknownModel: there is no such model.
            Conflict: there is no version before the live one.
        """
        self.must_know(name)
        pointer = self.pointer(name)
        if pointer is None or pointer.previous not in self.versions(name):
            raise Conflict(f"{name} has no version before the live one to go back to.")
        return PointerBack(live=str(pointer.previous), previous=pointer.live)

    def _named(self, name: str) -> list[str]:
        """What the pointer names: the live version, and the one before it."""
        pointer = self.pointer(name)
        named = [pointer.live, pointer.previous] if pointer else []
        return [version for version in named if version is not None]

    @contextmanager
    def _marked(self, name: str, version: str, instead_of: str | None = None) -> Iterator[None]:
        """Mark a version as one that was live, another one no longer; undone when the body fails.

        Before the pointer changes, so that after a kill no version that was rolled back is marked.
        """
        mark = self._mark(name, version)
        others = [self._mark(name, instead_of)] if instead_of else []
        others = [other for other in others if other.exists()]
        is_new = not mark.exists()
        mark.parent.mkdir(parents=True, exist_ok=True)
        try:
            mark.touch()
            for other in others:  # it keeps its place, so that undoing it needs no room
                other.rename(other.with_name(_WAS_ONCE))
            yield
        except BaseException:
            if is_new:
                mark.unlink(missing_ok=True)
            for other in others:
                with suppress(FileNotFoundError):
                    other.with_name(_WAS_ONCE).rename(other)
            raise
        for other in others:
            with suppress(OSError):  # it says nothing
                other.with_name(_WAS_ONCE).unlink()

    def _mark(self, name: str, version: str) -> Path:
        return self.gate_folder(name, version) / _WAS_LIVE

    def _point(self, name: str, live: str, previous: str | None) -> None:
        write_atomically(self._model(name) / _POINTER, f"{live}\n{previous or ''}\n".encode())

    # ---- the gate -----------------------------------------------------------------------------

    def gate(self, name: str, version: str) -> dict[str, Any] | None:
        """What the gate found, None where it has not looked, or its record is damaged.

        Its `reasons`, where it has them, are a list of sentences, whoever wrote it.
        """
        try:
            found = _from_json(_text(self.gate_folder(name, version) / GATE) or "null")
            reasons = found.get("reasons", [])
        except (ValueError, AttributeError):
            return None
        sentences = isinstance(reasons, list) and all(isinstance(one, str) for one in reasons)
        return found if sentences else None

    def passed(self, name: str, version: str) -> bool:
        gate = self.gate(name, version)
        return gate is not None and gate.get("ok") is True

    def record_gate(self, name: str, version: str, found: dict[str, Any]) -> None:
        """Keep what the gate found. Files that belong to it lie in `gate_folder` already."""
        with self._locked(name), self._recorded(name, version, found):  # nobody prunes it now
            pass

    @contextmanager
    def _recorded(self, name: str, version: str, found: dict[str, Any] | None) -> Iterator[None]:
        """Keep what the gate found; undone when the body fails. Nothing where that is None."""
        if found is None or found == self.gate(name, version):
            yield
            return
        text = json.dumps(found, indent=2, allow_nan=False) + "\n"
        folder = self.gate_folder(name, version)
        folder.mkdir(parents=True, exist_ok=True)
        with replaced(folder / GATE, text.encode()):
            sync_folder(folder.parent)
            yield

    def gate_folder(self, name: str, version: str) -> Path:
        return self._model(name) / _GATES / version

    # ---- opening ------------------------------------------------------------------------------

    @contextmanager
    def opening(self, name: str, version: str) -> Iterator[None]:
        """Remember on the disk that a version is being opened, in case that ends the process."""
        mark = self.gate_folder(name, version) / _OPENING
        self._marks.add(mark)
        with suppress(OSError):  # a full disk keeps nobody from judging
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.write_text(f"{_boot()}\n{_tries(mark) + 1}\n", encoding="ascii")
        try:
            if self._is_ending:
                self.end_of_process()
            yield
            with suppress(OSError):  # then it is refused sooner
                mark.with_name(_OPENED).touch()
        finally:
            self._marks.discard(mark)
            with suppress(OSError):
                mark.unlink()

    def end_of_process(self) -> None:
        """The process is told to end, and may be killed meanwhile: no version is to blame for that.

        May be called in a handler of a signal, while another thread opens one.
        """
        self._is_ending = True
        for mark in [*self._marks]:
            with suppress(OSError):
                mark.unlink()

    def did_not_end(self, name: str, version: str) -> bool:
        """Whether opening a version ended the process, so that it should not be opened by itself.

        The first time where it was never opened before. One that once was, and one whose opening a
        restart of the machine ended, may have been killed for another reason: the second time, with
        nothing in between.
        """
        mark = self.gate_folder(name, version) / _OPENING
        doubtful = mark.with_name(_OPENED).exists() or not _is_of_this_boot(mark)
        return _tries(mark) > (1 if doubtful else 0)

    # ---- publishing, refusing, pruning --------------------------------------------------------

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A new folder on the store's file system, gone at the end unless it was published.

        Folders that killed processes left there are removed on the way.
        """
        root = self.root / _STAGING
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / ".lock"):
            sweep(root.glob("tmp*"))
            folder = Path(tempfile.mkdtemp(dir=root, prefix="tmp"))
            in_use = os.open(folder, os.O_RDONLY)
            fcntl.flock(in_use, fcntl.LOCK_EX)  # the system gives it back however this process ends
        try:
            folder.chmod(0o755)  # so that a server of another user may read the version
            yield folder
        finally:
            os.close(in_use)
            shutil.rmtree(folder, ignore_errors=True)

    def publish(
        self,
        name: str,
        folder: Path,
        origin: dict[str, Any],
        *,
        anew: bool = False,
        known: dict[str, str] | None = None,
    ) -> str:
        """Turn a folder of files into the newest version of a model, and return its name.

        The folder must lie on the store's file system; it is moved. When these very files are a
        version already, that one is returned, and the folder stays, unless it is `anew`.

        Args:
            known: the SHA-256 of files that were compared with it just now.

        Raises:
            BadRequest: the name is no name for a model.
            OSError: the disk is full; the store is as it was.
        """
        if not is_name(name):
            raise BadRequest(f"A model's name has up to 64 letters, digits, - and _, not {name!r}.")
        names = {path.name for path in folder.iterdir() if path.is_file()} - {MANIFEST}
        known = known or {}
        files = {file: known.get(file) or sha256(folder / file) for file in sorted(names)}
        digest = _digest(files)
        model = self._model(name)
        model.mkdir(parents=True, exist_ok=True)
        if anew or not self._versions_of(name, digest):
            _flush(folder, files)  # the bulk of it before the lock, where others wait
        with _locked(model / ".lock"):
            same = self._versions_of(name, digest)
            if same and not anew:
                return same[-1]
            places = (model, model / _REFUSED, model / _GATES)
            ever = [version for place in places for version in _versions_in(place)]
            serial = max([self._discarded(name), *map(_serial, ever)]) + 1
            version = f"{serial:04d}-{digest}"
            created = datetime.now(timezone.utc).isoformat(timespec="seconds")
            content = {"version": version, "created": created, "files": files, "origin": origin}
            (folder / MANIFEST).write_text(json_text(content), encoding="utf-8")
            _flush(folder, [*files, MANIFEST])
            folder.rename(model / version)
            try:
                sync_folder(model)
                sync_folder(self.root)
            except OSError:
                (model / version).rename(folder)
                raise
        return version

    def take_in(
        self, name: str, source: Path, origin: dict[str, Any], *, plan: bool = False
    ) -> str:
        """Copy a model out of a folder that the commands made, and publish it.

        Only the files that belong to a model are taken. Without model.onnx it cannot go live until
        it was converted.

        Args:
            plan: take its plan as well, where it is the one that meta.json was written with. Not
                that of a stranger, whatever meta.json calls it: it is machine code.

        Raises:
            BadMeta, BadBundle: the folder holds no model, or a damaged one.
        """
        meta = Meta.read(source / META)
        check_files(source, meta)
        named = (meta.weights_pth, meta.memory_bank, meta.stats, meta.regions, *(meta.files or {}))
        wanted = {META, REPORT, GOLDEN, SCORES, ONNX, *filter(None, named)}
        wanted -= {PLAN, PLAN_RECORD, MANIFEST}
        if plan and {PLAN, PLAN_RECORD} <= {*(meta.files or {})}:
            wanted |= {PLAN, PLAN_RECORD}
        with self.staging() as folder:
            for file in wanted:
                if (source / file).is_file():
                    shutil.copyfile(source / file, folder / file)
            return self.publish(name, folder, origin)

    def publish_threshold(self, name: str, base: str, meta: Meta, origin: dict[str, Any]) -> str:
        """Publish the files of a version with another meta.json, and return the new version.

        Args:
            origin: `threshold_of` is added: the version that was trained.

        Raises:
            UnknownModel, UnknownVersion, BadBundle, OSError: as `_publish_change`.
        """
        origin = {**origin, _THRESHOLD_OF: self._trained(name, base) or base}
        return self._publish_change(name, base, origin, {META}, lambda it: meta.write(it / META))

    def publish_regions(
        self, name: str, base: str, regions: Regions | None, origin: dict[str, Any]
    ) -> str:
        """Publish the files of a version with other regions, or none, and return the new version.

        Args:
            origin: `regions_of` is added: the version that was trained.

        Raises:
            BadMeta: its meta.json is damaged.
            UnknownModel, UnknownVersion, BadBundle, OSError: as `_publish_change`.
        """
        meta = Meta.read(self.folder(name, base) / META)

        def write(folder: Path) -> None:
            changed = without_regions(meta)
            if regions is not None:
                changed = write_regions(folder, regions, changed)
            changed.write(folder / META)

        origin = {**origin, _REGIONS_OF: self._trained(name, base) or base}
        return self._publish_change(name, base, origin, {META, meta.regions}, write)

    def _publish_change(
        self,
        name: str,
        base: str,
        origin: dict[str, Any],
        without: set[str | None],
        write: Callable[[Path], None],
    ) -> str:
        """Publish the files of a version with some of its small ones replaced.

        Large files are not copied. It is a version of its own, also where these very files are one:
        each change has its reason, and is judged by the gate for itself.

        Args:
            without: the names of those.
            write: puts others in their place, into a folder.

        Raises:
            UnknownModel, UnknownVersion, BadBundle: there is no such version, or it is damaged.
            OSError: the disk is full; the store is as it was.
        """
        source, before = self.check(name, base), self.manifest(name, base)
        kept = {key: before.origin[key] for key in ("category",) if key in before.origin}
        with self.staging() as folder:
            known = {file: one for file, one in before.files.items() if file not in without}
            for file in known:
                _link(source / file, folder / file)
            write(folder)
            origin = {**kept, **origin, "parent": base}
            return self.publish(name, folder, origin, anew=True, known=known)

    def offer(self, name: str, source: Path, origin: dict[str, Any]) -> str:
        """Take a model in that is to go live, also where these very files were kept or held before.

        Raises:
            BadMeta, BadBundle: as `take_in`.
        """
        version = self.take_in(name, source, {**origin, "activate": True})
        if self.wants_to_go_live(name, version):
            return version
        return self.publish_again(name, version, {**origin, "activate": True})

    def wants_to_go_live(self, name: str, version: str) -> bool:
        """Whether a version is live, or is to go live and the gate has not seen it yet."""
        pointer = self.pointer(name)
        if pointer is not None and pointer.live == version:
            return True
        wanted = self.manifest(name, version).origin.get("activate") is True
        return wanted and self.gate(name, version) is None

    def publish_again(self, name: str, version: str, origin: dict[str, Any]) -> str:
        """Publish the files of a version as a new one, which the gate has not seen; its name.

        Large files are not copied.

        Raises:
            UnknownModel, UnknownVersion, BadBundle: there is no such version, or it is damaged.
            OSError: the disk is full; the store is as it was.
        """
        source, files = self.check(name, version), self.manifest(name, version).files
        with self.staging() as folder:
            for file in files:
                _link(source / file, folder / file)
            return self.publish(name, folder, {**origin, "parent": version}, anew=True, known=files)

    def withdraw(self, name: str, version: str) -> None:
        """Delete a version that was just published, and did not become the live one.

        Also where it was put aside since, because it cannot be used: whoever asked for it is told.
        """
        with self._locked(name):
            if version in self._named(name):
                return
            hidden = self._model(name) / f".{version}"
            for place in (self._model(name) / version, self._model(name) / _REFUSED / version):
                if place.is_dir():
                    place.rename(hidden)
                    shutil.rmtree(hidden, ignore_errors=True)
                    shutil.rmtree(self.gate_folder(name, version), ignore_errors=True)

    def discard(self, name: str, version: str) -> None:
        """Delete a version for good, because a person says so; its number is never given again.

        Files that other versions have too are theirs as well: they stay.

        Raises:
            UnknownModel, UnknownVersion: there is no such thing.
            Conflict: it is the live one or the one before, or nobody knows which one is live.
            OSError: the disk cannot be written; the version is as it was.
        """
        with self._locked(name):
            folder = self.folder(name, version)
            self._must_be_spare(name, version)
            if _serial(version) > self._discarded(name):  # first: what is killed here wastes one
                write_atomically(self._model(name) / _DISCARDED, str(_serial(version)).encode())
            hidden = folder.with_name(f".{version}")  # who prunes finds what a kill leaves
            folder.rename(hidden)
            try:
                sync_folder(hidden.parent)
            except OSError:
                hidden.rename(folder)
                raise
            shutil.rmtree(hidden, ignore_errors=True)
            shutil.rmtree(self.gate_folder(name, version), ignore_errors=True)

    def _must_be_spare(self, name: str, version: str) -> None:
        if self._is_in_doubt(name):
            raise Conflict(
                f"Nobody knows which version of {name} is to judge, so none is discarded: activate"
                " one first."
            )
        live, *before = [*self._named(name), None]
        if version == live:
            raise Conflict(
                f"{name} {version} judges, so it is not discarded: activate another one first."
            )
        if version in before:
            raise Conflict(
                f"{name} {version} is what a rollback goes to, so it is not discarded: it may be"
                " once another version went live."
            )

    def _discarded(self, name: str) -> int:
        """The highest number that a person discarded; 0 for none."""
        text = _text(self._model(name) / _DISCARDED) or ""
        return int(text) if re.fullmatch("[0-9]{1,9}", text) else 0

    def is_news(self, name: str, version: str, *, is_there: bool) -> bool:
        """Whether a folder that was taken in as `version` is to go live, because it has changed.

        Else what became of its files since then stays so: others were learned, or a person went
        back. A live version that was refused is replaced by the same files from the folder.

        Args:
            is_there: whether the version was there before.
        """
        digest, pointer = _digest_of(version), self.pointer(name)
        last = _text(self._model(name) / _FOLDER)
        if not is_there:
            return last != digest or pointer is None or _digest_of(pointer.live) == digest
        if last is not None and last != digest:
            return True
        is_new = self.gate(name, version) is None  # killed before it could go live
        return pointer is None and not self.candidates(name) and is_new

    def folders(self, name: str) -> dict[str, str]:
        """The versions that were taken in from a folder -> that folder, oldest first."""
        found = {}
        for version in self.versions(name):
            with suppress(BadBundle, UnknownVersion):
                found[version] = self.manifest(name, version).origin.get("folder")
        return {version: folder for version, folder in found.items() if isinstance(folder, str)}

    def last_folder(self, name: str) -> str | None:
        """The folder that was taken in last; None where the version made of it is gone."""
        last = _text(self._model(name) / _FOLDER)
        found = [one for version, one in self.folders(name).items() if _digest_of(version) == last]
        return next(reversed(found), None)

    def note_folder(self, name: str, version: str) -> None:
        """Remember which files a folder had that was taken in."""
        path, digest = self._model(name) / _FOLDER, _digest_of(version)
        if _text(path) != digest:
            write_atomically(path, digest.encode())

    def refuse(self, name: str, version: str, reason: str) -> None:
        """Put a version aside that cannot be used, so that nobody tries it again."""
        with self._locked(name):
            if version in self.versions(name):
                folder, target = self._model(name) / version, self._model(name) / _REFUSED / version
                target.parent.mkdir(exist_ok=True)
                with replaced(folder / _REASON, reason.encode(errors="replace")):
                    folder.rename(target)
                for old in _versions_in(target.parent)[:-_REFUSED_KEPT]:
                    shutil.rmtree(target.parent / old, ignore_errors=True)

    def prune(self, name: str, keep: int) -> list[str]:
        """Delete old versions but the live one, the one before, and the `keep` newest.

        Versions that differ from another only in threshold or regions do not count among these: of
        those whose files are kept, the `keep` newest stay too. The newest one always stays: its
        number is used up.
        """
        self.must_know(name)
        model = self._model(name)
        if not (self._old(name, keep) or self._left_behind(name)):
            return []
        with self._locked(name):
            gone = self._old(name, keep)
            for version in gone:  # out of sight in one step, so that nobody meets half of it
                (model / version).rename(model / f".{version}")
            if gone:
                sync_folder(model)
            for folder in self._left_behind(name):
                shutil.rmtree(folder, ignore_errors=True)
        return gone

    def _old(self, name: str, keep: int) -> list[str]:
        """The versions that are not kept."""
        if self._is_in_doubt(name):
            return []
        known, named = self.versions(name), self._named(name)
        kept = {*named, *known[-1:], *self._newest(name, known, named, max(keep, 1))}
        return [version for version in known if version not in kept]

    def _is_in_doubt(self, name: str) -> bool:
        """Whether one was live, and nobody knows which one, or it is gone: then all are kept."""
        named = self._named(name)
        was_live = named or (self._model(name) / _POINTER).exists() or self.candidates(name)
        return bool(was_live) and named[:1] not in [[one] for one in self.versions(name)]

    def _left_behind(self, name: str) -> list[Path]:
        """What is not needed any more, also of a process that was killed."""
        if self._is_in_doubt(name):
            return []
        model, known = self._model(name), {*self.versions(name)}
        gates = [self.gate_folder(name, one) for one in _versions_in(model / _GATES)]
        return [*model.glob(".*-*/"), *(one for one in gates if one.name not in known)]

    def _newest(self, name: str, known: list[str], named: list[str], keep: int) -> list[str]:
        """The newest versions that were trained and those whose threshold or regions are in force,
        or were before; and the newest changes of these.
        """
        roots = {version: self._trained(name, version) for version in known}
        trained = [version for version in known if roots[version] is None][-keep:]
        trained += [root for version in named if (root := roots.get(version))]  # also discarded
        return trained + [one for one in known if roots[one] in trained][-keep:]

    def _trained(self, name: str, version: str) -> str | None:
        """The version from which this one differs only in threshold or regions; None for others."""
        with suppress(BadBundle, UnknownVersion):  # damaged, or deleted just now
            origin = self.manifest(name, version).origin
            return origin.get(_THRESHOLD_OF) or origin.get(_REGIONS_OF)
        return None

    def _model(self, name: str) -> Path:
        if not is_name(name):
            raise UnknownModel(f"There is no model {name[:100]!r}{_there_is(self.names())}.")
        return self.root / name

    def _may_be_known(self, name: str) -> bool:
        """The same; a folder that cannot be read is taken for a model, which has a problem."""
        try:
            return self._is_known(name)
        except UnknownModel:
            return False
        except OSError:
            return True

    def _is_known(self, name: str) -> bool:
        """Not for the folder that a publisher leaves who was killed, or found the disk full."""
        return bool(self.versions(name) or _versions_in(self._model(name) / _REFUSED))

    def _versions_of(self, name: str, digest: str) -> list[str]:
        return [version for version in self.versions(name) if version.endswith(digest)]

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """One process at a time changes a model. Raises UnknownModel where there is none."""
        self.must_know(name)
        with _locked(self._model(name) / ".lock"):
            yield


def stamp(path: Path) -> tuple[int, ...]:
    """What differs once a file is another; empty where there is none."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def is_name(name: str) -> bool:
    """Whether a model may be called so: in one spelling only, and short enough for a folder."""
    alone = name == normalize("NFC", name) and len(name.encode(errors="replace")) <= _NAME_BYTES
    return alone and len(name) <= NAME_LENGTH and re.fullmatch(NAME, name) is not None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock file; the system takes it from a process that is killed."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _boot() -> str:
    """Another word after each start of the machine; the same where nobody tells."""
    return (_text(Path("/proc/sys/kernel/random/boot_id")) or "unknown").strip()


def _is_of_this_boot(mark: Path) -> bool:
    return (_text(mark) or "").startswith(f"{_boot()}\n")


def _tries(mark: Path) -> int:
    """How often a version was begun to be opened, and never was."""
    _, _, tries = (_text(mark) or "").partition("\n")
    return int(tries) if tries.strip().isdecimal() else 0


def _digest(files: dict[str, str]) -> str:
    """12 hexadecimal digits for exactly these files: another one when any byte changes."""
    lines = "".join(f"{name} {files[name]}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()[:12]


def _versions_in(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:  # a list of 1,000 as paths takes three times as long
        names = [entry.name for entry in entries if _VERSION.fullmatch(entry.name)]
    return sorted(names, key=_serial)


def _serial(version: str) -> int:
    return int(version.partition("-")[0])


def _link(source: Path, target: Path) -> None:
    """A second name for a file, or a copy where the file system has no such names."""
    try:
        target.hardlink_to(source)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENOENT):
            raise
        shutil.copyfile(source, target)


def _digest_of(version: str) -> str:
    return version.partition("-")[2]


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
    except OSError as error:
        if error.errno in _UNREADABLE:
            return None
        raise


def _from_json(text: str) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: it is none, or absurdly deep, or has a number that no answer in JSON can hold.
    """
    try:
        return json.loads(text, parse_float=_number, parse_constant=_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _number(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:40]} is no number")
    return number


def _there_is(names: list[str]) -> str:
    return f"; there is {', '.join(map(repr, names[-5:]))}" if names else "; there is none"


def _flush(folder: Path, files: Iterable[str]) -> None:
    """Make these files, and the folder's list of them, survive a power cut."""
    for file in files:
        with (folder / file).open("rb") as opened:
            os.fsync(opened.fileno())
    sync_folder(folder)
