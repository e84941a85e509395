"""A folder of images -> batches, decoded and resized by `engines.image`, as serving does it."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from engines import camera, image
from engines.errors import BadDataset, BadImage
from engines.image_files.reading import Pixels
from engines.meta import Meta
from workers.learning.camera import Look
from workers.progress import Progress, Tick

T = TypeVar("T")

THREADS = 2  # decoding; the backbone takes the rest of the machine
NAMED = 5  # files that a sentence names
MOST_BROKEN = 10  # one in so many pictures may be broken; more would make another training
SURE = 1 << 14  # a value from which on all 16 bits are filled, whatever the scene


@dataclass(frozen=True)
class Category:
    """The images of one category in the layout of the README.

    Attributes:
        passed_over: what lies beside them and is no part of it: where and what, and the files.
    """

    train: list[Path]
    test_normal: list[Path]
    test_anomaly: list[Path]
    passed_over: dict[str, list[Path]] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many images there are in all."""
        return len(self.train) + len(self.test_normal) + len(self.test_anomaly)

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
        train = _normals(folder)
        tests = find_tests(root, name)
        return cls(
            train.images,
            tests.test_normal,
            tests.test_anomaly,
            {**train.passed_over, **tests.passed_over},
        )

    @classmethod
    def of(cls, folder: Path, normal: Path | None, anomaly: Path | None) -> Category:
        """The same, of folders that may lie anywhere.

        Raises:
            BadDataset: there are no training images.
        """
        train = _normals(folder)
        tests = [
            _Found([], {}) if place is None else _below(place, belongs)
            for place, belongs in ((normal, _is_good), (anomaly, _is_no_good))
        ]
        over = {**train.passed_over, **tests[0].passed_over, **tests[1].passed_over}
        return cls(train.images, tests[0].images, tests[1].images, over)


def find_tests(root: Path, name: str) -> Category:
    """The test images of a category, without those to learn from; none where there are none."""
    folder = root / "test" / name
    beside = _below(folder, _none, leave_out=("normal", "anomaly"))
    normal = _below(folder / "normal", _is_good)
    anomaly = _below(folder / "anomaly", _is_no_good)
    over = {**beside.passed_over, **normal.passed_over, **anomaly.passed_over}
    if beside.images:
        over[f"{folder}: neither in normal nor in anomaly"] = beside.images
    return Category([], normal.images, anomaly.images, over)


def find_pictures(folder: Path, progress: Progress) -> list[Path]:
    """The images of a folder of normal parts; what is passed over is told."""
    found = _below(folder, _is_good)
    for note in notes_on_passed_over(found.passed_over):
        progress.say(note)
    return found.images


def notes_on_passed_over(passed_over: dict[str, list[Path]]) -> list[str]:
    """What was passed over, a sentence for each kind: how many, and what they are called."""
    return [
        f"Passed over {len(paths)} in {where}: {', '.join(path.name for path in paths[:NAMED])}"
        f"{' and others' if len(paths) > NAMED else ''}."
        for where, paths in passed_over.items()
    ]


class _Found(NamedTuple):
    images: list[Path]
    passed_over: dict[str, list[Path]]


def _normals(folder: Path) -> _Found:
    """The images of normal parts in a folder; BadDataset where there are none."""
    found = _below(folder, _is_good)
    if not found.images:
        raise BadDataset(
            f"{folder} holds no images: put normal images there"
            f" ({', '.join(sorted(image.SUFFIXES))})."
            f" {' '.join(notes_on_passed_over(found.passed_over))}".rstrip()
        )
    return found


def _is_good(folder: str) -> bool:
    """Whether a folder's name says that normal parts are in it."""
    return folder.lower() in {"good", "normal", "ok"}


def _is_no_good(folder: str) -> bool:
    return not _is_good(folder)


def _every(_: str) -> bool:
    return True


def _none(_: str) -> bool:
    return False


def _below(folder: Path, belongs: Callable[[str], bool], leave_out: tuple[str, ...] = ()) -> _Found:
    """The images of a folder and of the folders in it that belong to it, and what is passed over.

    Args:
        belongs: whether a folder of that name does.
        leave_out: folders that somebody else looks into.
    """
    images, over = [], defaultdict[str, list[Path]](list)
    for path in image.visible(folder):
        ending = path.suffix.lower()
        if path.is_dir():
            if path.name in leave_out:
                continue
            if path.resolve() in folder.resolve().parents or path.resolve() == folder.resolve():
                continue  # a link in a circle
            inside = _below(path, _every if belongs(path.name) else _none)
            over |= inside.passed_over
            if belongs(path.name):
                images += inside.images
            elif inside.images:
                over[f"{path}, which is none of the folders that are read"] = inside.images
        elif ending in image.OTHER_PICTURES:
            over[f"{folder} that end in {ending} (save them as PNG, JPEG, BMP or TIFF)"] += [path]
        elif ending in image.SUFFIXES:
            if path.is_file():
                images.append(path)
            else:
                over[f"{folder} that are links to nowhere"] += [path]
    return _Found(images, dict(over))


class File(NamedTuple):
    """What a picture is like before it is resized: pixels, and whether it has 16 bits."""

    width: int
    height: int
    is_deep: bool
    look: Look | None = None

    @property
    def is_long(self) -> bool:
        return image.is_long(self.width, self.height)


@dataclass
class Images:
    """Image files as batches. A broken one is named and left out; the others go on.

    Iterating raises BadDataset where a file cannot be read at all, where one has more bits than the
    model learned, and, at the end, where more than `most_broken` were left out.

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
    most_broken: int | None = None  # None: as many as there are
    limits: image.ImageLimits = image.DEFAULT_LIMITS
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
            if done == len(self.paths) and self.most_broken is not None:
                check_broken(self.broken, len(self.paths), self.most_broken)
            if len(ready) == self.batch or (ready and done == len(self.paths)):
                yield np.stack(ready)
                ready = []
            self.tick(done, len(self.paths))

    def _load(self, path: Path) -> tuple[NDArray[np.uint8], File] | str:
        meta = self.meta
        try:
            stored = image.read(bytes_of(path), self.limits)
            _check_bits(path, stored, meta.bit_depth)
            rgb = image.to_rgb(stored, meta.bit_depth)
        except BadImage as error:
            return str(error)
        (height, width), pixels = rgb.shape[:2], image.resize(rgb, meta.image_size, meta.resize)
        look = Look(width, height, *camera.measure(rgb, pixels))
        return pixels, File(width, height, stored.dtype == np.uint16, look)


@dataclass(frozen=True)
class Survey:
    """What the pictures of a folder are, before anything is learned from them.

    Attributes:
        kinds: how many there are of each format, such as PNG.
        sizes: of each (width, height).
        broken: file and reason of those that cannot be read.
        copies: files that hold the same bytes as one before them.
    """

    kinds: Counter[str]
    sizes: Counter[tuple[int, int]]
    broken: dict[Path, str]
    copies: list[Path]

    @classmethod
    def of(cls, paths: list[Path], tick: Tick, limits: image.ImageLimits) -> Survey:
        """Read them all, in threads.

        Raises:
            BadDataset: a file cannot be read from the disk.
        """

        def look(path: Path) -> tuple[str, str, tuple[int, int]] | str:
            data = bytes_of(path)
            try:
                height, width = image.read(data, limits).shape[:2]
            except BadImage as error:
                return str(error)
            return hashlib.sha256(data).hexdigest(), image.kind_of(data), (width, height)

        found = cls(Counter(), Counter(), {}, [])
        known: set[str] = set()
        for done, (path, seen) in enumerate(_in_order(paths, look, THREADS), 1):
            tick(done, len(paths))
            if isinstance(seen, str):
                found.broken[path] = seen
                continue
            digest, kind, size = seen
            found.kinds[kind] += 1
            found.sizes[size] += 1
            if digest in known:
                found.copies.append(path)
            known.add(digest)
        return found


def bytes_of(path: Path) -> bytes:
    """The bytes of a file that is to be learned from.

    Raises:
        BadDataset: it went away, or the disk does not give it: what would be learned from the
            others is not what was asked for.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadDataset(
            f"{path} cannot be read: {error.strerror}. Nothing was learned, because pictures"
            " must stay where they are until all were read: see that they are all there, and begin"
            " again."
        ) from error


def check_broken(broken: Mapping[Any, str], of: int, most: int) -> None:
    """Raise BadDataset where more than `most` of so many pictures were left out as broken."""
    if len(broken) > most:
        path, why = next(iter(broken.items()))
        raise BadDataset(
            f"{len(broken)} of {of} pictures cannot be read, more than one in {MOST_BROKEN}, so"
            f" nothing was learned. The first is {path}: {why} Save them again, or take them away."
        )


def _check_bits(path: Path, stored: Pixels, bit_depth: int | None) -> None:
    """Raise BadDataset where a picture has more bits than were learned, or stated."""
    bits = bit_depth or 16
    highest = int(stored.max()) if stored.dtype == np.uint16 else 0
    if highest >> bits:
        raise BadDataset(
            f"{path} has values up to {highest}, which are more than {bits} bits, the bit_depth of"
            f" this model: nothing was learned. {_SAY_BITS.format(_deep_enough(highest))}"
        )


def notes_on(files: dict[Path, File], meta: Meta) -> list[str]:
    """What a person should know of the pictures that a model learned from: sentences."""
    return [
        *_on_mixed_ones(files, meta.bit_depth or 8),
        *_on_long_ones(files, meta.image_size),
        *_on_small_ones(files, meta.image_size),
    ]


def _on_mixed_ones(files: dict[Path, File], bit_depth: int) -> list[str]:
    """That some have 8 bits and others 16, now or before, which nothing puts on one scale."""
    deep = [path for path, file in files.items() if file.is_deep]
    shallow = [path for path, file in files.items() if not file.is_deep]
    if not shallow or (not deep and bit_depth <= 8):
        return []
    if not deep:
        return [
            f"The pictures have 8 bits, such as {shallow[0].name}, but bit_depth says {bit_depth},"
            " as of 16-bit files that were learned before, or will come: one part may look darker"
            " in one kind than in the other. Save all of them as the line sends its parts."
        ]
    return [
        f"{len(deep)} pictures have 16 bits, such as {deep[0].name}, and {len(shallow)} have 8,"
        f" such as {shallow[0].name}: of the first the upper 8 bits of bit_depth are seen, the"
        " others as they are, so one part may look darker in one kind than in the other. Save all"
        " of them as the line sends its parts."
    ]


def _on_long_ones(files: dict[Path, File], size: int) -> list[str]:
    """How little is left of pictures that are far longer than wide, and what to do about it."""
    long = {path: file for path, file in files.items() if file.is_long}
    if not long:
        return []
    path, file = max(long.items(), key=lambda one: max(one[1][:2]) / min(one[1][:2]))
    longer, shorter = max(file[:2]), min(file[:2])
    return [
        f"{len(long)} of {len(files)} pictures are longer than {image.LONG}:1, such as {path.name}"
        f" ({file.width} x {file.height}, {longer / shorter:.3g}:1): {longer / size:.3g} pixels"
        f" along the longer side become one, so narrow defects fade. {image.TILES}"
    ]


def _on_small_ones(files: dict[Path, File], size: int) -> list[str]:
    """That pictures were enlarged, and what to do about it."""
    small = [path for path, file in files.items() if image.is_small(file.width, file.height, size)]
    if not small:
        return []
    file = files[small[0]]
    return [
        f"{len(small)} of {len(files)} pictures are at most half as wide or high as the {size} x"
        f" {size} that the model sees, such as {small[0].name} ({file.width} x {file.height}):"
        " they were enlarged, and fine defects cannot show. Take the pictures as the camera gives"
        " them; where they are that small, take a smaller image_size."
    ]


_SAY_BITS = (
    "Say how many bits the camera gives, probably {}: bit_depth in meta.json, in `meta` of a job,"
    " or --bit_depth of the command."
)


def bit_depth_of(paths: list[Path], limits: image.ImageLimits = image.DEFAULT_LIMITS) -> int:
    """The bits that the camera of these images fills, where they leave no doubt: 8 or 16.

    Broken images do not count.

    Raises:
        BadDataset: they do not say it. A dark scene of a 12-bit camera looks like one of 10 bits,
            and a model of these would refuse the next part that shines.
    """

    def look(path: Path) -> int | None:
        return _highest(path, limits)

    highest = [value for _, value in _in_order(paths, look, THREADS) if value is not None]
    if not highest:
        return 8
    if max(highest) >= SURE:
        return 16
    raise BadDataset(
        f"{len(highest)} of {len(paths)} pictures have 16 bits, and no value above {max(highest)}:"
        " that does not tell a dark scene from a camera with fewer bits."
        f" {_SAY_BITS.format(_deep_enough(max(highest)))}"
    )


def _highest(path: Path, limits: image.ImageLimits) -> int | None:
    """The highest value of a 16-bit image, None for another or a broken one."""
    try:
        stored = image.read(bytes_of(path), limits)
    except BadImage:
        return None
    return int(stored.max()) if stored.dtype == np.uint16 else None


def _deep_enough(highest: int) -> str:
    """The bit depths of cameras that may give a value: `12, 14 or 16`."""
    *others, last = (str(bits) for bits in (10, 12, 14, 16) if not highest >> bits)
    return f"{', '.join(others)} or {last}" if others else last


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
