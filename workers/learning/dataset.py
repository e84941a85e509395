"""A folder of images -> batches, decoded and resized by `engines.image`, as serving does it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from engines import image
from engines.errors import BadDataset, BadImage
from workers.progress import Progress, Tick

T = TypeVar("T")

THREADS = 2  # decoding; the backbone takes the rest of the machine


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


@dataclass
class Images:
    """Image files as batches. A broken one is named and left out; the others go on.

    Attributes:
        broken: file and reason of every image that was left out, filled while iterating.
        used: the files that were read, in order, filled while iterating.
    """

    paths: list[Path]
    size: int
    batch: int
    bit_depth: int | None
    progress: Progress
    tick: Tick = lambda done, total: None
    broken: dict[Path, str] = field(default_factory=dict)
    used: list[Path] = field(default_factory=list)

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        """Batches (N, size, size, 3) uint8 RGB, N = `batch` but for the last."""
        ready: list[NDArray[np.uint8]] = []
        for done, (path, loaded) in enumerate(_in_order(self.paths, self._load, self.batch), 1):
            if isinstance(loaded, str):
                self.broken[path] = loaded
                self.progress.say(f"skipped {path}: {loaded}")
            else:
                self.used.append(path)
                ready.append(loaded)
            if len(ready) == self.batch or (ready and done == len(self.paths)):
                yield np.stack(ready)
                ready = []
            self.tick(done, len(self.paths))

    def _load(self, path: Path) -> NDArray[np.uint8] | str:
        try:
            return image.load(path.read_bytes(), self.size, bit_depth=self.bit_depth)
        except BadImage as error:
            return str(error)
        except OSError as error:
            return f"cannot be read: {error.strerror}"


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
