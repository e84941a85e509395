"""`Pictures`: the images of decisions, as they were sent, and their anomaly maps."""

from __future__ import annotations

import io
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FOLDER = "pictures"
PER_FOLDER = 1000


class Pictures:
    """Files in a folder, named by the number of the decision."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / FOLDER

    def keep(self, number: int, image: bytes, anomaly_map: NDArray[np.float32] | None) -> int:
        """Write the image, and the map (h, w) where there is one; how many bytes that took.

        What was there under this number is replaced: a decision that was not written down.

        Raises:
            OSError: the disk is full, or cannot be written.
        """
        path = self._path(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
        taken = len(image)
        path.with_suffix(".map").unlink(missing_ok=True)
        if anomaly_map is not None:
            packed = _pack(anomaly_map)
            path.with_suffix(".map").write_bytes(packed)
            taken += len(packed)
        return taken

    def image(self, number: int) -> bytes:
        """As it was sent. Raises FileNotFoundError where it is not kept."""
        return self._path(number).read_bytes()

    def anomaly_map(self, number: int) -> NDArray[np.float32]:
        """(h, w), raw. Raises FileNotFoundError where it is not kept."""
        return _unpack(self._path(number).with_suffix(".map").read_bytes())

    def delete(self, number: int) -> None:
        """Also where there is none."""
        path = self._path(number)
        for one in (path, path.with_suffix(".map")):
            with suppress(FileNotFoundError):
                one.unlink()

    def sweep(self, kept: set[int]) -> None:
        """Delete what belongs to no decision of these numbers, after a kill or a pruning."""
        for path in list(self._folder.glob("*/*")):
            if not path.stem.isdigit() or int(path.stem) not in kept:
                path.unlink(missing_ok=True)
        for folder in list(self._folder.glob("*")):
            with suppress(OSError):  # it is not empty
                folder.rmdir()

    def _path(self, number: int) -> Path:
        return self._folder / str(number // PER_FOLDER) / f"{number}.image"


def _pack(anomaly_map: NDArray[np.float32]) -> bytes:
    """float16 is enough to be drawn, and a third of it once it is packed."""
    file = io.BytesIO()
    np.save(file, np.clip(anomaly_map, -6e4, 6e4).astype(np.float16), allow_pickle=False)
    return zlib.compress(file.getvalue(), 1)


def _unpack(packed: bytes) -> NDArray[np.float32]:
    found: NDArray[np.float16] = np.load(io.BytesIO(zlib.decompress(packed)), allow_pickle=False)
    return found.astype(np.float32)
