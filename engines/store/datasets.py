"""Training images on disk, in the layout that `retrain.py --data_root` reads.

    train/<category>/*              the split `train`: normal images, to learn from
    test/<category>/normal/*        the split `normal`
    test/<category>/anomaly/*       the split `anomaly`
    origins/<category>.json         which decisions images came from, by their names
    uploads/                        what is arriving just now

An image is decoded before it is stored, and moved in whole, so whoever reads a folder finds good
images only. Links inside the root are not followed out of it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
import threading
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import cv2
import simplejpeg

from engines.errors import (
    BadRequest,
    Conflict,
    DiskFull,
    ImageTooLarge,
    KensaError,
    ReadOnly,
    UnknownDataset,
)
from engines.files import read_object, remove, remove_hidden, sync_folder, write_atomically
from engines.image import DEFAULT_LIMITS, ImageLimits, decode, measured_bit_depth
from engines.store.image_names import checked_name, is_image, shown
from engines.store.versions import is_name

Split = Literal["train", "normal", "anomaly"]
SPLITS: tuple[Split, ...] = get_args(Split)
THUMBNAIL = 256  # longer side, pixels
MAX_LISTED = 64  # folders whose names are kept in memory
SETTLED_NS = 1_000_000_000  # a folder that changes twice within a tick of the clock has one mtime

_PLACES: dict[Split, str] = {
    "train": "train/{}",
    "normal": "test/{}/normal",
    "anomaly": "test/{}/anomaly",
}
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}")  # what write_atomically and remove hide

_MAX_NAME = 255  # bytes that a file system takes
_DECODERS = 2  # pictures decoded at once; each takes 3 bytes of memory for a pixel


class ImageFile(NamedTuple):
    """An image of a split."""

    name: str
    bytes: int


class Page(NamedTuple):
    """Some images of a split, and how many it has in all."""

    images: list[ImageFile]
    total: int


class Stored(NamedTuple):
    """What became of an image: its name, and whether it was there before with the same bytes."""

    name: str
    already_there: bool


class Datasets:
    """The training images of all categories below one folder. Safe to use from many threads."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._changing = threading.Lock()
        self._decoding = threading.Semaphore(_DECODERS)
        self._listed: dict[Path, tuple[tuple[int, int], tuple[str, ...]]] = {}

    def categories(self) -> dict[str, dict[Split, int]]:
        """How many images each split of each category has, by name."""
        return {
            category: {split: len(self._names(self._place(category, split))) for split in SPLITS}
            for category in self._categories()
        }

    def count(self, category: str, split: Split) -> int:
        """How many images a split has; 0 where there is none."""
        return len(self._names(self._folder(category, split)))

    def most_to_learn(self, category: str, split: Split) -> int:
        """How many images a job may find there: those of folders inside, such as good/, too."""
        folder = self._folder(category, split)
        below = (names for place, _, names in os.walk(folder) if Path(place) != folder)
        return len(self._names(folder)) + sum(is_image(name) for names in below for name in names)

    def images(
        self, category: str, split: Split, offset: int = 0, limit: int | None = None
    ) -> Page:
        """The images of a split sorted by name, `limit` of them from `offset` on.

        Raises:
            UnknownDataset: no such category.
        """
        folder = self._folder(category, split)
        self._must_know(category)
        names = self._names(folder)
        page = []
        for name in names[offset : None if limit is None else offset + limit]:
            with suppress(FileNotFoundError):  # deleted in the meantime
                page.append(ImageFile(shown(name), (folder / name).stat().st_size))
        return Page(page, len(names))

    def add(
        self,
        category: str,
        split: Split,
        name: str,
        data: bytes,
        *,
        limits: ImageLimits = DEFAULT_LIMITS,
        replace: bool = False,
    ) -> Stored:
        """Store an image that decodes; the category is made where there is none.

        Raises:
            BadRequest: the name of the image or of the category is not allowed.
            BadImage: and its kinds, as `engines.image.decode`.
            Conflict: another image has the name, and `replace` is not set.
            DiskFull: there is no room left.
            UnknownDataset: the folder is a link that leads out of the root.
        """
        name = checked_name(name)
        folder = self._folder(category, split)
        with self._decoding:
            decode(data, limits)
        with room(), self._at_work(), self._changing:
            self._make(folder)
            path = _where(folder, name)
            if self._is_file(path) and _has(path, data):
                return Stored(path.name, already_there=True)
            if path.exists() and not (replace and self._is_file(path)):
                raise Conflict(
                    f"{category}/{split} has another image of the name {name}: send this one under"
                    " a new name, or with ?replace=true."
                )
            write_atomically(path, data)
        return Stored(path.name, already_there=False)

    def read(
        self, category: str, split: Split, name: str, limits: ImageLimits = DEFAULT_LIMITS
    ) -> bytes:
        """The bytes of an image.

        Raises:
            UnknownDataset: no such category or image.
            ImageTooLarge: somebody copied a file there that is larger than the limit.
        """
        path = self._find(category, split, name)
        try:
            return read_file(path, limits)
        except FileNotFoundError:
            raise _unknown(category, split, name) from None

    def thumbnail(
        self, category: str, split: Split, name: str, limits: ImageLimits = DEFAULT_LIMITS
    ) -> bytes:
        """A JPEG of an image, its longer side at most 256 pixels.

        Raises what `read` raises, and BadImage where somebody copied a damaged file there.
        """
        with self._decoding:
            data = self.read(category, split, name, limits)
            picture = decode(data, limits)  # (H, W, 3)
            if picture.max() < 128:  # black to the eye: 12 of 16 bits, for example
                picture = decode(data, limits, measured_bit_depth(data, limits))
        height, width = picture.shape[:2]
        scale = min(1, THUMBNAIL / max(height, width))
        size = max(1, round(width * scale)), max(1, round(height * scale))
        small = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
        jpeg: bytes = simplejpeg.encode_jpeg(small, quality=85)
        return jpeg

    def delete_image(self, category: str, split: Split, name: str) -> None:
        """Delete one image.

        Raises:
            UnknownDataset: no such category or image.
        """
        with self._changing:
            path = self._find(category, split, name)
            with self._at_work():
                remove(path)

    def delete_split(self, category: str, split: Split) -> None:
        """Delete all images of a split, and its folder.

        Raises:
            UnknownDataset: no such category, or it has no such split.
        """
        with self._changing:
            folder = self._folder(category, split)
            self._must_know(category)
            if not folder.is_dir():
                raise UnknownDataset(f"The category {category} has no {split} images.")
            with self._at_work():
                remove(folder)
            if split != "train":
                with suppress(OSError):  # the other split is in it
                    folder.parent.rmdir()

    def delete(self, category: str) -> None:
        """Delete a category with all its images, of all its splits or of none.

        Raises:
            UnknownDataset: no such category.
        """
        with self._changing:
            self._must_know(category)
            with self._at_work():
                remove(*self._folders(category), *self._origins_there(category))

    def origins(self, category: str) -> dict[str, dict[str, Any]]:
        """Which decision an image came from, by its name; of images that came otherwise nothing.

        Raises:
            Conflict: the file that says it is damaged.
        """
        path = self._origins(category)
        found: dict[str, dict[str, Any]] | None = read_object(path)
        if found is None and path.exists():
            raise Conflict(
                f"{path} is damaged, which says what decisions the images of {category} came from:"
                " restore it from a backup, or delete it."
            )
        return found or {}

    def note_origins(self, category: str, origins: dict[str, dict[str, Any]]) -> None:
        """Keep which decisions images came from, besides what is known of others.

        Raises:
            DiskFull: there is no room left; what was there is unchanged.
        """
        with room(), self._at_work(), self._changing:
            path = self._origins(category)
            path.parent.mkdir(exist_ok=True)
            known = self.origins(category) | origins
            write_atomically(path, json.dumps(known, ensure_ascii=False, indent=1).encode())

    def _origins(self, category: str) -> Path:
        return self.root / "origins" / f"{self._folder(category, 'train').name}.json"

    def _origins_there(self, category: str) -> list[Path]:
        path = self._origins(category)
        return [path] if path.exists() else []

    @contextmanager
    def upload(self) -> Iterator[Path]:
        """A new folder for what arrives, on the disk where the images will be; gone in the end."""
        with self._at_work():
            uploads = self.root / "uploads"
            uploads.mkdir(exist_ok=True)
            folder = Path(tempfile.mkdtemp(dir=uploads))
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def sweep(self) -> None:
        """Remove what killed processes left half written or deleted, unless one is at work here."""
        with suppress(OSError):  # it only takes room; a server must start all the same
            descriptor = os.open(self.root, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(self.root / "uploads", ignore_errors=True)
                for place in ("train/.*", "test/.*", "train/*/.*", "test/*/.*", "test/*/*/.*"):
                    for path in self.root.glob(place):
                        if _TEMPORARY.fullmatch(path.name) and self._holds(path.parent):
                            remove_hidden(path)
            finally:
                os.close(descriptor)

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """While it lasts, no process sweeps this root."""
        self.root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.root, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)  # given back however this process ends
            yield
        finally:
            os.close(descriptor)

    def _folder(self, category: str, split: Split) -> Path:
        """Where a split is or would be, once that is known to be in the root."""
        folder = self._place(category, split)
        if not self._holds(folder):
            raise UnknownDataset(f"{category}/{split} is a link that leads out of the data folder.")
        return folder

    def _place(self, category: str, split: Split) -> Path:
        if not is_name(category):  # a model is called so
            raise BadRequest(
                f"The category {category[:100]!r} is no name: it takes 1 to 64 letters, digits,"
                " - and _, composed (Unicode's NFC), and 200 bytes in UTF-8 at most."
            )
        return self.root / _PLACES[split].format(category)

    def _categories(self) -> list[str]:
        folders = {path.name for path in [*self.root.glob("train/*"), *self.root.glob("test/*")]}
        return sorted(name for name in folders if is_name(name) and self._folders(name))

    def _folders(self, category: str) -> list[Path]:
        """The folders in which a category lies: none, one or two."""
        folders = [self._place(category, "train"), self._place(category, "normal").parent]
        return [folder for folder in folders if folder.is_dir() and self._holds(folder)]

    def _must_know(self, category: str) -> None:
        if not self._folders(category):
            there = self._categories()
            names = ", ".join(there[:20]) + (", ..." if len(there) > 20 else "")
            raise UnknownDataset(f"There is no category {category}; there is: {names or 'none'}.")

    def _find(self, category: str, split: Split, name: str) -> Path:
        """An image by its name, in whichever Unicode form it has on the disk, or as it is shown."""
        folder = self._folder(category, split)
        self._must_know(category)
        if is_image(name) and not set(name) & set("/\0"):
            path = _where(folder, name)
            if len(os.fsencode(path.name)) <= _MAX_NAME and self._is_file(path):
                return path
        if "\\" in name:  # as the list shows bytes that are no UTF-8
            for there in self._names(folder):
                if shown(there) == name:
                    return folder / there
        raise _unknown(category, split, name)

    def _names(self, folder: Path) -> tuple[str, ...]:
        """The images of a folder, sorted; none where it is missing or leads out of the root.

        They are read again when the folder has changed: 20,000 names take a tenth of a second.
        """
        if not self._holds(folder):
            return ()
        try:
            asked_ns = time.time_ns()
            now, known = folder.stat(), self._listed.get(folder)
            state = (now.st_mtime_ns, now.st_ino)
            if known is not None and known[0] == state:
                return known[1]
            names, may_change_unseen = self._read_names(folder)
        except (FileNotFoundError, NotADirectoryError):
            return ()
        if asked_ns - now.st_mtime_ns > SETTLED_NS and not may_change_unseen:
            for oldest in list(self._listed)[: max(len(self._listed) + 1 - MAX_LISTED, 0)]:
                self._listed.pop(oldest, None)
            self._listed[folder] = state, names
        return names

    def _read_names(self, folder: Path) -> tuple[tuple[str, ...], bool]:
        """The same from the disk, and whether one is a link, which may end without the folder."""
        names, has_links = [], False
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_image(entry.name):
                    is_link = entry.is_symlink()
                    has_links = has_links or is_link
                    if self._is_file(Path(entry)) if is_link else entry.is_file():
                        names.append(entry.name)
        return tuple(sorted(names)), has_links

    def _is_file(self, path: Path) -> bool:
        return path.is_file() and self._holds(path)

    def _holds(self, path: Path) -> bool:
        """Whether a path is inside the root, all links followed."""
        # Path.resolve would raise for links that lead in a circle.
        return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self.root))

    def _make(self, folder: Path) -> None:
        """Make a folder that survives a power cut."""
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            for parent in folder.parents:
                sync_folder(parent)
                if parent == self.root:
                    return


@contextmanager
def room() -> Iterator[None]:
    """Turns the error of a disk that is full, or cannot be written, into a sentence.

    Raises:
        DiskFull: no room, or the quota is used up.
        ReadOnly: it is mounted for reading, or this user may not write there.
    """
    try:
        yield
    except OSError as error:
        if (found := cannot_write(error)) is None:
            raise
        raise found from error


def cannot_write(error: OSError) -> KensaError | None:
    """What an error of the file system is called, where a person can mend it."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(
            "The disk of the data folder is full: delete images or models that are not needed."
        )
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return ReadOnly(
            "Nothing was changed, because the data folder cannot be written"
            f" ({error.strerror}): mount it for writing, or let this user write there."
        )
    return None


def _where(folder: Path, name: str) -> Path:
    """Where a file lies whose name may be composed or decomposed on the disk, as on a Mac.

    Just as it is asked for where it is there so: a folder may hold both.
    """
    forms = name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)
    short = (folder / one for one in dict.fromkeys(forms) if len(os.fsencode(one)) <= _MAX_NAME)
    return next((path for path in short if path.exists()), folder / name)


def _unknown(category: str, split: Split, name: str) -> UnknownDataset:
    return UnknownDataset(f"There is no image {shown(name)[:200]!r} in {category}/{split}.")


def _has(path: Path, data: bytes) -> bool:
    return path.stat().st_size == len(data) and path.read_bytes() == data


def read_file(path: Path, limits: ImageLimits) -> bytes:
    """The bytes of an image file.

    Raises:
        ImageTooLarge: before it is read.
    """
    size = path.stat().st_size
    if size > limits.max_bytes:
        raise ImageTooLarge(
            f"The image file has {size:,} bytes, more than the {limits.max_bytes:,} allowed."
        )
    return path.read_bytes()
