"""Known pictures that a model is challenged with, and whether it is released: what is on the disk.

    models/<name>/challenges/challenges.json    which pictures, what the last challenge found, and
                                                whether the model is released
    models/<name>/challenges/3f9a0c41...        a picture as it was sent, by its SHA-256

The pictures are copies, so nothing that prunes a record or deletes a category takes them. The file
is replaced in one rename, after the pictures that it names are on the disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engines.errors import BadBundle, BadRequest, Unreadable, UploadTooLarge
from engines.files import remove, remove_hidden, sync_folder, write_atomically
from engines.image import ImageLimits, decode, kind_of
from engines.store.datasets import room
from engines.store.versions import Store

Expected = Literal["good", "bad"]

MOST = 64  # pictures
MOST_BYTES = 256 * 1024**2  # of all of them together
MOST_NAMED = 3  # in a sentence

_FOLDER = "challenges"
_FILE = "challenges.json"


class _Kept(BaseModel):
    """What stands in the file; keys of a newer Kensa are passed over."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False, protected_namespaces=())


class Known(_Kept):
    """A picture of which it is known what it shows."""

    name: str
    expected: Expected
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int
    format: str  # JPEG, ...
    origin: dict[str, Any]  # the decision or the training image that it was copied from

    @property
    def called(self) -> str:
        """With its group, in which alone its name is its own: `bad/3.png`."""
        return f"{self.expected}/{self.name}"


class Judged(_Kept):
    """What a version said of such a picture; None and `problem` where it could not be asked."""

    name: str
    expected: Expected
    sha256: str
    right: bool
    label: str | None = None
    score: float | None = None
    threshold: float | None = None
    raw_score: float | None = None
    raw_threshold: float | None = None
    problem: str | None = None

    @property
    def called(self) -> str:
        return f"{self.expected}/{self.name}"


class Outcome(_Kept):
    """What a challenge found."""

    at: int  # milliseconds since 1970, UTC
    version: str
    who: str  # the name of the API key; empty for Kensa itself, or where none was needed
    by: Literal["request", "shift"]
    pictures: tuple[Judged, ...]

    @property
    def wrong(self) -> list[Judged]:
        return [one for one in self.pictures if not one.right]

    @property
    def right(self) -> int:
        return len(self.pictures) - len(self.wrong)

    @property
    def passed(self) -> bool:
        return bool(self.pictures) and not self.wrong


class ChallengeSet(_Kept):
    """The known pictures of a model, and where it stands.

    Attributes:
        why: a sentence, where it is not released.
        begun: what a challenge found until it closed the model; None once it has ended.
    """

    pictures: tuple[Known, ...] = ()
    at_shifts: bool = False
    changed: int = 0  # milliseconds since 1970, UTC
    who: str = ""
    reason: str = ""
    released: bool = True
    why: str = ""
    last: Outcome | None = None  # of these very pictures
    begun: Outcome | None = None

    def is_as(self, other: ChallengeSet | None) -> bool:
        """Whether the pictures are those of another, whatever was found with them since."""
        return other is not None and self.pictures == other.pictures


class Offered(NamedTuple):
    """A picture that is to be one of the known."""

    name: str
    expected: Expected
    origin: dict[str, Any]
    read: Callable[[], bytes]  # blocks


class Challenges:
    """The known pictures of all models of a store. Its methods block; one writer at a time."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def read(self, name: str) -> ChallengeSet | None:
        """Those of a model; None where it has none. Where the file is damaged, nobody knows whether
        the model is released, so it is not.

        Raises:
            Unreadable: the system does not give the file, which may be whole.
        """
        path = self._folder(name) / _FILE
        try:
            return ChallengeSet.model_validate_json(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValidationError) as error:
            Unreadable.check(path, error)
            why = (
                f"{name} is not released: {path} is damaged, which says whether it is. PUT"
                f" /models/{name}/challenges names its known pictures again, and POST"
                f" /models/{name}/challenge opens it then; or POST /models/{name}/release does."
            )
            return ChallengeSet(released=False, why=why)

    def put(
        self, name: str, offered: Iterable[Offered], about: ChallengeSet, limits: ImageLimits
    ) -> ChallengeSet:
        """Copy pictures, and let them be all that a model is challenged with: whole, or not at all.

        Args:
            about: everything but the pictures.

        Raises:
            BadRequest: there is no good one or no bad one, or one is said to be both.
            BadImage: and its kinds: one cannot be decoded.
            UploadTooLarge: there are too many, or they are too large together.
            DiskFull, ReadOnly: nothing was changed.
        """
        folder, made = self._folder(name), list[Path]()
        is_new = not folder.is_dir()
        try:
            with room():
                folder.mkdir(exist_ok=True)
                sync_folder(folder.parent)
                pictures = self._copied(folder, offered, limits, made)
                _must_be_both(pictures)
                found = about.model_copy(update={"pictures": tuple(pictures)})
                self._write(name, found)
        except BaseException:
            for path in made:
                with suppress(OSError):
                    path.unlink()
            if is_new:
                with suppress(OSError):
                    folder.rmdir()
            raise
        self._sweep(name, found)
        return found

    def _copied(
        self, folder: Path, offered: Iterable[Offered], limits: ImageLimits, made: list[Path]
    ) -> list[Known]:
        """One picture at a time is in memory; `made` gets the files that were not there before."""
        known: list[Known] = []
        for one in offered:
            data = one.read()
            decode(data, limits)
            sha256 = hashlib.sha256(data).hexdigest()
            same = next((other for other in known if other.sha256 == sha256), None)
            if same is not None and same.expected != one.expected:
                raise BadRequest(
                    f"{same.called} and {one.expected}/{one.name} are the same picture: say whether"
                    " it is good or bad."
                )
            if same is not None:
                continue
            if len(known) == MOST or sum(other.bytes for other in known) + len(data) > MOST_BYTES:
                raise UploadTooLarge(
                    f"A model is challenged with up to {MOST} pictures of {MOST_BYTES // 1024**2}"
                    " MiB together: choose fewer."
                )
            taken = {other.called for other in known}
            name = _apart(one.name, one.expected, taken)
            path = folder / sha256
            if not _is_whole(path, sha256):
                made += [] if path.exists() else [path]
                write_atomically(path, data)
            known.append(
                Known(name=name, expected=one.expected, sha256=sha256, bytes=len(data),
                      format=kind_of(data), origin=one.origin)
            )  # fmt: skip
        return known

    def write(self, name: str, found: ChallengeSet) -> None:
        """Keep where a model stands; its pictures are there.

        Raises:
            DiskFull, ReadOnly: what was there is unchanged.
        """
        with room():
            self._write(name, found)

    def _write(self, name: str, found: ChallengeSet) -> None:
        text = found.model_dump_json(indent=1)
        write_atomically(self._folder(name) / _FILE, text.encode())

    def delete(self, name: str) -> None:
        """Delete all of it.

        Raises:
            DiskFull, ReadOnly: it is there as it was.
        """
        with room():
            remove(self._folder(name))

    def picture(self, name: str, known: Known) -> bytes:
        """The bytes of a picture as it was sent.

        Raises:
            BadBundle: it is gone, or damaged.
            Unreadable: the system does not give it.
        """
        path = self._folder(name) / known.sha256
        again = f"PUT /models/{name}/challenges sends it again"
        try:
            data = path.read_bytes()
        except OSError as error:
            Unreadable.check(path, error)
            raise BadBundle(f"The picture {known.called} is gone from the disk: {again}.") from None
        if hashlib.sha256(data).hexdigest() != known.sha256:
            raise BadBundle(
                f"The picture {known.called} is damaged (its SHA-256 differs): {again}."
            )
        return data

    def sweep(self, name: str) -> None:
        """Delete what killed processes left half written or deleted. To be called at the start."""
        with suppress(OSError, Unreadable):  # it only takes room
            for path in self._folder(name).parent.glob(f".{_FOLDER}.*"):
                remove_hidden(path)
            self._sweep(name, self.read(name))

    def _sweep(self, name: str, found: ChallengeSet | None) -> None:
        """Delete the pictures that are not known any more; none while the file is damaged."""
        if found is not None and not found.pictures:
            return
        named = {one.sha256 for one in found.pictures} if found is not None else set()
        folder = self._folder(name)
        with suppress(OSError):
            for path in folder.iterdir():
                if path.name != _FILE and path.name not in named:
                    path.unlink()
            if found is None:
                folder.rmdir()

    def _folder(self, name: str) -> Path:
        return self._store.root / name / _FOLDER


def not_released(name: str, outcome: Outcome) -> str:
    """A sentence for a model that failed a challenge."""
    wrong, of = outcome.wrong, len(outcome.pictures)
    return (
        f"{name} is not released: {outcome.version} judged {len(wrong)} of {of} known pictures"
        f" wrongly ({named(wrong)}). Mend what is wrong with it; POST /models/{name}/challenge"
        f" opens it when all are judged rightly, POST /models/{name}/release by a person's word."
    )


def named(judged: Sequence[Judged]) -> str:
    """Some of them, by their names."""
    names = ", ".join(one.called for one in judged[:MOST_NAMED])
    more = len(judged) - MOST_NAMED
    return f"{names} and {more} more" if more > 0 else names


def _must_be_both(pictures: Sequence[Known]) -> None:
    for expected in ("good", "bad"):
        if not any(one.expected == expected for one in pictures):
            raise BadRequest(
                f"There is no {expected} picture: a model is challenged with good and bad ones, of"
                " which it has to tell each."
            )


def _apart(name: str, expected: Expected, taken: set[str]) -> str:
    """The name, or one like it that no other picture of its group has."""
    found, number = name, 1
    while f"{expected}/{found}" in taken:
        number += 1
        found = f"{name}-{number}"
    return found


def _is_whole(path: Path, sha256: str) -> bool:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() == sha256
    except OSError:
        return False
