"""A folder of images -> batches, decoded and resized by `engines.image`, as serving does it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from engines import image
from engines.errors import BadDataset, BadImage
from engines.meta import Meta
from workers.progress import Progress, Tick

T = TypeVar("T")

THREADS = 2  # decoding; the backbone takes the rest of the machine
LONG = 4  # times as long as wide: pressed into a square, little is left of the longer side


@dataclass(frozen=True)
class Category:
    """The images of one category in the layout of the README."""

    train: list[Path]
    test_normal: list[Path]
    test_anomaly: list[Path]

    @classmethod
    def find(cls, root: Path, name: str) -> Category:
        """List the images of a category.

        Raises:
            BadDataset: the folder is missing or has no training images; says what is there.
        """
        if not root.is_dir():
            raise BadDataset(
                f"{root} does not exist: --data_root takes the folder that holds train/ and test/."
            )
        folder = root / "train" / name
        if not folder.is_dir():
            there = sorted(path.name for path in (root / "train").glob("*") if path.is_dir())
            raise BadDataset(
                f"{folder} does not exist: --category must be one of {', '.join(there)}."
                if there
                else f"{folder} does not exist: put the normal images there."
            )
        train = image.files_in(folder)
        if not train:
            raise BadDataset(
                f"{folder} holds no images: put normal images there"
                f" ({', '.join(sorted(image.SUFFIXES))})."
            )
        test = root / "test" / name
        return cls(train, image.files_in(test / "normal"), image.files_in(test / "anomaly"))


class File(NamedTuple):
    """What a picture is like before it is resized: pixels, and whether it has 16 bits."""

    width: int
    height: int
    is_deep: bool

    @property
    def is_long(self) -> bool:
        return max(self.width, self.height) > LONG * min(self.width, self.height)


@dataclass
class Images:
    """Image files as batches. A broken one is named and left out; the others go on.

    Attributes:
        broken: file and reason of every image that was left out, filled while iterating.
        used: the files that were read, in order, filled while iterating.
        files: what each of them is like, filled while iterating.
    """

    paths: list[Path]
    meta: Meta  # how they are decoded and resized
    batch: int
    progress: Progress
    tick: Tick = lambda done, total: None
    broken: dict[Path, str] = field(default_factory=dict)
    used: list[Path] = field(default_factory=list)
    files: dict[Path, File] = field(default_factory=dict)

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        """Batches (N, S, S, 3) uint8 RGB, N = `batch` but for the last."""
        ready: list[NDArray[np.uint8]] = []
        for done, (path, loaded) in enumerate(_in_order(self.paths, self._load, self.batch), 1):
            if isinstance(loaded, str):
                self.broken[path] = loaded
                self.progress.say(f"skipped {path}: {loaded}")
            else:
                pixels, self.files[path] = loaded
                self.used.append(path)
                ready.append(pixels)
            if len(ready) == self.batch or (ready and done == len(self.paths)):
                yield np.stack(ready)
                ready = []
            self.tick(done, len(self.paths))

    def _load(self, path: Path) -> tuple[NDArray[np.uint8], File] | str:
        meta = self.meta
        try:
            stored = image.read(path.read_bytes())
            rgb = image.to_rgb(stored, meta.bit_depth)
            file = File(rgb.shape[1], rgb.shape[0], stored.dtype == np.uint16)
            return image.resize(rgb, meta.image_size, meta.resize), file
        except BadImage as error:
            return str(error)
        except OSError as error:
            return f"cannot be read: {error.strerror}"


def notes_on(files: dict[Path, File], size: int) -> list[str]:
    """What a person should know of the pictures that a model of `size` learned from: sentences."""
    return _on_long_ones(files, size)


def _on_long_ones(files: dict[Path, File], size: int) -> list[str]:
    """How little is left of pictures that are far longer than wide, and what to do about it."""
    long = {path: file for path, file in files.items() if file.is_long}
    if not long:
        return []
    path, file = max(long.items(), key=lambda one: max(one[1][:2]) / min(one[1][:2]))
    longer, shorter = max(file[:2]), min(file[:2])
    return [
        f"{len(long)} of {len(files)} pictures are longer than {LONG}:1, such as {path.name}"
        f" ({file.width} x {file.height}, {longer / shorter:.3g}:1): {longer / size:.3g} pixels"
        " along the longer side become one, so narrow defects fade. Cut the pictures into tiles"
        f" of at most {LONG}:1, here and on the line, or take a larger image_size, which is one"
        " number for both sides."
    ]


def measure_bit_depth(paths: list[Path]) -> int:
    """The bits that the camera of these images fills: 8, or up to 16. Broken ones do not count."""

    def measure(path: Path) -> int:
        try:
            return image.measured_bit_depth(path.read_bytes())
        except (BadImage, OSError):
            return 8

    return max(depth for _, depth in _in_order(paths, measure, THREADS))


def _in_order(paths: list[Path], work: Callable[[Path], T], ahead: int) -> Iterator[tuple[Path, T]]:
    """(path, work(path)) in order, with a few worked on ahead in threads."""
    with ThreadPoolExecutor(THREADS) as pool:
        coming = iter(paths)
        waiting = [(path, pool.submit(work, path)) for path in islice(coming, ahead + THREADS)]
        while waiting:
            path, future = waiting.pop(0)
            waiting.extend(
                (next_path, pool.submit(work, next_path)) for next_path in islice(coming, 1)
            )
            yield path, future.result()
