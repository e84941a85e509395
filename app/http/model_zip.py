"""The files of one model as a zip: of one that somebody sent nothing decides where they go."""

from __future__ import annotations

import contextlib
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from engines.errors import BadBundle, BadMeta, BadRequest, UploadTooLarge
from engines.meta import Meta
from engines.store.bundle import ONNX, PLAN, REPORT, STRANGE
from engines.store.golden import GOLDEN
from engines.store.known_scores import SCORES
from engines.store.versions import META
from engines.store.zip_guards import DAMAGED, PIECE, opened_zip, unusual_compression

SENT_AT_ONCE = 1 << 18  # bytes
MAX_ENTRIES = 1000
MAX_META = 1 << 20  # bytes; a meta.json has about a thousand
MAX_LIST = 1 << 20  # bytes of a zip's list of files


def unpack_model(zipped: Path, folder: Path, most: int) -> None:
    """Unpack meta.json and the files that it names into `folder`; anything else is left.

    They may lie in one folder of the zip. No name in the zip becomes a path here: only names that
    are known beforehand are written. model.plan is left, whatever meta.json calls it: it is machine
    code.

    Args:
        most: bytes, counted while unpacking, whatever the zip says of itself.

    Raises:
        BadRequest: it is no zip, is damaged or encrypted.
        BadBundle: there is no meta.json in it, or several.
        BadMeta: it is wrong.
        UploadTooLarge: it unpacks to more than `most`.
        OSError: the disk is full.
    """
    with opened_zip(zipped, MAX_LIST) as archive:
        entries = [entry for entry in archive.infolist() if not entry.filename.endswith("/")]
        if len(entries) > MAX_ENTRIES:
            raise BadRequest(f"The zip has {len(entries):,} files; a model has about ten.")
        places = [one for one in entries if PurePosixPath(one.filename).name == META]
        if len(places) != 1:
            raise BadBundle(f"The zip has {len(places) or 'no'} {META}; it must have one.")
        if places[0].file_size > MAX_META:  # zipfile unpacks no more than that
            raise BadBundle(f"{META} in the zip has {places[0].file_size:,} bytes.")
        inside = PurePosixPath(places[0].filename).parent
        left = most - _extract(archive, places[0], folder / META, most)
        wanted = _wanted(folder)
        for entry in entries:
            path = PurePosixPath(entry.filename)
            if path.parent == inside and path.name in wanted:
                left -= _extract(archive, entry, folder / path.name, left)


def pack_model(files: dict[str, BinaryIO]) -> Iterator[bytes]:
    """A zip of open files, in pieces: it is never whole in memory or on the disk. Closes them.

    Nothing is compressed: banks and weights would hardly become smaller.
    """
    written = _Written()
    with contextlib.ExitStack() as opened:
        for file in files.values():
            opened.enter_context(file)
        with zipfile.ZipFile(written, "w") as archive:
            for name, file in files.items():
                with archive.open(name, "w", force_zip64=True) as entry:
                    while piece := file.read(SENT_AT_ONCE):
                        entry.write(piece)
                        yield written.taken()
        yield written.taken()


class _Written(io.RawIOBase):
    """What a zip has come to so far; it cannot go back in it."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._pieces.append(bytes(data))
        return len(data)

    def taken(self) -> bytes:
        """What was written since the last time."""
        pieces, self._pieces = self._pieces, []
        return b"".join(pieces)


def _wanted(folder: Path) -> set[str | None]:
    """The other files of a model, by its meta.json."""
    try:
        meta = Meta.read(folder / META)
    except BadMeta as error:
        raise BadMeta(str(error).replace(str(folder / META), f"{META} in the zip")) from None
    named = {meta.weights_pth, meta.memory_bank, meta.stats, meta.regions}
    return {ONNX, REPORT, STRANGE, GOLDEN, SCORES, *named} - {META, PLAN}


def _extract(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path, most: int) -> int:
    """Write one entry to `target`, at most `most` bytes; returns how many there were."""
    size = 0
    with target.open("wb") as file:
        for piece in _pieces(archive, entry):
            size += len(piece)
            if size > most:
                raise UploadTooLarge(
                    "The zip unpacks to more than KENSA_MAX_UPLOAD_BYTES allows: raise it."
                )
            file.write(piece)
    return size


def _pieces(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Iterator[bytes]:
    """The bytes of an entry; only what is wrong with the zip is caught here, no full disk."""
    if refusal := unusual_compression(entry.filename, entry):
        raise refusal
    try:
        with archive.open(entry) as source:
            while piece := source.read(PIECE):
                yield piece
    except DAMAGED as error:
        raise BadRequest(f"The zip cannot be read: {error}.") from None
