"""The pictures that a teacher learns from: found, read, cut and recoloured by chance."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from engines import image
from engines.errors import BadDataset, BadImage
from engines.machine.memory_needs import MOST_PICTURES
from workers.progress import Progress

Picture = NDArray[np.uint8]  # (H, W, 3) RGB

HELD_OUT = 10  # one picture in ten, at most as many, is not learned but tells how well it goes
CUT_PX = 128  # of the teacher's input: many small cuts teach more than few whole pictures
LEAST_ZOOM, MOST_ZOOM = 0.6, 2.5  # of a cut, where 1 is a picture stretched to image_size


def find_pictures(places: list[Path]) -> list[Path]:
    """Pictures, and all in and below folders; evenly chosen ones where there are too many."""
    for place in places:
        if not place.exists():
            raise BadDataset(f"{place} does not exist: --images takes folders of pictures.")
    paths = sorted(
        {
            path
            for place in places
            for path in (place.rglob("*") if place.is_dir() else [place])
            if path.suffix.lower() in image.SUFFIXES and not path.name.startswith(".")
        }
    )
    if not paths:
        raise BadDataset(
            f"{', '.join(map(str, places))} holds no images: put pictures there"
            f" ({', '.join(sorted(image.SUFFIXES))})."
        )
    return paths[:: math.ceil(len(paths) / MOST_PICTURES)]


def read_pictures(
    paths: list[Path], largest: int, limits: image.ImageLimits, progress: Progress
) -> list[Picture]:
    """Decode the files, and shrink them until no side is longer than `largest` pixels.

    Raises:
        BadDataset: none can be read.
    """
    tick, found = progress.phase("images"), []
    for done, path in enumerate(paths, 1):
        try:
            picture = image.decode(path.read_bytes(), limits)
        except (BadImage, OSError) as error:
            progress.say(f"skipped {path}: {error}")
        else:
            scale = min(1.0, largest / max(picture.shape[:2]))
            width, height = (max(1, round(scale * picture.shape[axis])) for axis in (1, 0))
            shrunk = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
            found.append(np.asarray(shrunk, np.uint8))
        tick(done, len(paths))
    if not found:
        raise BadDataset("None of the images can be read, so nothing can be learned.")
    return found


def held_out(pictures: list[Picture]) -> tuple[list[Picture], list[Picture]]:
    """(unlearned, learned): every tenth is held out; of fewer than ten, none is."""
    if len(pictures) < HELD_OUT:
        return pictures, pictures
    unlearned = set(range(HELD_OUT // 2, len(pictures), HELD_OUT))
    return (
        [picture for index, picture in enumerate(pictures) if index in unlearned],
        [picture for index, picture in enumerate(pictures) if index not in unlearned],
    )


def cut_batches(
    pictures: list[Picture], size: int, batch: int, steps: int, dice: np.random.Generator
) -> Iterator[Picture]:
    """`steps` batches of cuts (batch, 2C, 2C, 3), the next one made while one is learned."""

    def make() -> Picture:
        return np.stack(list(random_cuts(pictures, size, batch, dice)))

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(make)
        for _ in range(steps):
            ready = coming.result()
            coming = pool.submit(make)
            yield ready


def random_cuts(
    pictures: list[Picture], size: int, count: int, dice: np.random.Generator
) -> Iterator[Picture]:
    """Cuts of random pictures, (2C, 2C, 3): at twice the size, for the backbone."""
    for index in dice.integers(len(pictures), size=count):
        yield _recolour(_cut(pictures[index], size, dice), dice)


def _cut(picture: Picture, size: int, dice: np.random.Generator) -> Picture:
    """A part of a picture, enlarged or shrunk, turned and mirrored by chance: (2C, 2C, 3).

    Zoom 1 shows the part as large as in the whole picture at `size` pixels.
    """
    side = min(CUT_PX, size)
    zoom = math.exp(dice.uniform(math.log(LEAST_ZOOM), math.log(MOST_ZOOM)))
    aspect = math.exp(dice.uniform(-0.15, 0.15))
    height, width = picture.shape[:2]
    tall = max(1, round(min(1.0, side / (size * zoom) * aspect) * height))
    wide = max(1, round(min(1.0, side / (size * zoom) / aspect) * width))
    top, left = dice.integers(height - tall + 1), dice.integers(width - wide + 1)
    cut = image.resize(picture[top : top + tall, left : left + wide], 2 * side)
    turned: Picture = np.rot90(cut, int(dice.integers(4)))
    return turned[:, ::-1] if dice.random() < 0.5 else turned


def _recolour(picture: Picture, dice: np.random.Generator) -> Picture:
    """The same under other light: gain of each colour, contrast, saturation; some grey."""
    pixels = picture.astype(np.float32)
    if dice.random() < 0.8:
        grey = pixels.mean(axis=2, keepdims=True)
        saturation = 0.0 if dice.random() < 0.1 else dice.uniform(0.4, 1.8)
        pixels = grey + saturation * (pixels - grey)
        if dice.random() < 0.3:
            pixels = pixels[..., dice.permutation(3)]
        gain = np.exp(dice.uniform(-0.25, 0.25) + dice.uniform(-0.2, 0.2, 3)).astype(np.float32)
        middle = np.float32(pixels.mean())
        pixels = gain * (middle + dice.uniform(0.7, 1.4) * (pixels - middle))
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
