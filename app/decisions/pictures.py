"""`Pictures`: the images of decisions, as they were sent, and their anomaly maps."""

from __future__ import annotations

import io
import shutil
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from app.serving.inspection import draw
from engines.errors import UnknownDecision
from engines.image import ImageLimits, decode
from engines.verdict import Scale, jpeg, within

FOLDER = "pictures"
PER_FOLDER = 1000


class Map(NamedTuple):
    """What a version found in a picture, and all it takes to draw it when the version is gone."""

    raw: NDArray[np.float32]  # (h, w)
    scale: Scale
    size: int  # of the pictures that the version sees, pixels
    bit_depth: int | None  # as its meta.json names it


class Pictures:
    """Files in a folder, named by the number of the decision.

    Of a part of several views the picture of the worst one lies where any other part's does, and
    those of the others in a folder beside it, each under the name of its view.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / FOLDER

    def keep(self, number: int, image: bytes, seen: Map | None, view: str = "") -> int:
        """Write the image, and the map where there is one; how many bytes that took.

        What was there under this number is replaced: a decision that was not written down.

        Raises:
            OSError: the disk is full, or cannot be written.
        """
        path = self._path(number, view)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
        taken = len(image)
        path.with_suffix(".map").unlink(missing_ok=True)
        if seen is not None:
            packed = _pack(seen)
            path.with_suffix(".map").write_bytes(packed)
            taken += len(packed)
        return taken

    def image(self, number: int, view: str = "") -> bytes:
        """As it was sent. Raises FileNotFoundError where it is not kept."""
        return self._path(number, view).read_bytes()

    def drawn(
        self, number: int, limits: ImageLimits, *, over_picture: bool, view: str = ""
    ) -> bytes:
        """A PNG of the map: over the picture, or alone in grey.

        Raises:
            FileNotFoundError: map or picture is not kept.
            UnknownDecision: the map is damaged, as a power cut may leave one.
            BadImage: and its kinds, as `engines.image.decode`: the limits are others now.
        """
        seen = self._seen(number, view)
        picture = decode(self.image(number, view), limits, seen.bit_depth) if over_picture else None
        return draw(seen.raw, seen.scale, seen.size, picture)

    def shown(
        self, number: int, limits: ImageLimits, side: int, quality: int, view: str = ""
    ) -> bytes:
        """A JPEG of the picture, upright, its longer side up to so many pixels.

        Raises:
            FileNotFoundError: it is not kept.
            BadImage: and its kinds, as `engines.image.decode`; such a one had no verdict.
        """
        data = self.image(number, view)
        try:
            bit_depth = self._seen(number, view).bit_depth
        except (FileNotFoundError, UnknownDecision):  # nobody judged it, or nobody knows
            bit_depth = None
        return jpeg(within(decode(data, limits, bit_depth), side), quality)

    def _seen(self, number: int, view: str) -> Map:
        packed = self._path(number, view).with_suffix(".map").read_bytes()
        try:
            return _unpack(packed)
        except Exception as error:  # NumPy, zipfile and zlib have many
            raise UnknownDecision(
                f"What was found in the picture of decision {number} cannot be drawn: its map is"
                " damaged."
            ) from error

    def delete(self, number: int) -> None:
        """All of a decision's, also where there is none."""
        path = self._path(number)
        for one in (path, path.with_suffix(".map")):
            with suppress(FileNotFoundError):
                one.unlink()
        with suppress(FileNotFoundError):
            shutil.rmtree(self._of_views(number))

    def sweep(self, kept: set[int]) -> None:
        """Delete what belongs to no decision of these numbers, after a kill or a pruning."""
        for path in list(self._folder.glob("*/*")):
            if path.stem.isdigit() and int(path.stem) in kept:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        for folder in list(self._folder.glob("*")):
            with suppress(OSError):  # it is not empty
                folder.rmdir()

    def _path(self, number: int, view: str = "") -> Path:
        if view:
            return self._of_views(number) / f"{view}.image"
        return self._folder / str(number // PER_FOLDER) / f"{number}.image"

    def _of_views(self, number: int) -> Path:
        return self._folder / str(number // PER_FOLDER) / f"{number}.views"


def _pack(seen: Map) -> bytes:
    """float16 is enough to be drawn, and a third of it once it is packed."""
    file = io.BytesIO()
    np.savez_compressed(
        file,
        raw=np.clip(seen.raw, -6e4, 6e4).astype(np.float16),
        scale=np.array(astuple(seen.scale), np.float64),
        size=seen.size,
        bit_depth=seen.bit_depth or 0,
    )
    return file.getvalue()


def _unpack(packed: bytes) -> Map:
    with np.load(io.BytesIO(packed), allow_pickle=False) as found:
        scale = Scale(*found["scale"].tolist())
        raw = found["raw"].astype(np.float32)
        return Map(raw, scale, int(found["size"]), int(found["bit_depth"]) or None)
