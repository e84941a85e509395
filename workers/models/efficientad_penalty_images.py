"""Natural images that an EfficientAD student must not imitate: a folder of photos, without end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from engines import image
from engines.errors import BadDataset, BadImage
from workers.progress import Progress

GREY_PENALTY = 0.3  # share of the penalty images that are made grey
LUMA = torch.tensor([0.2989, 0.587, 0.114])[:, None, None]  # of red, green, blue; torchvision's


def penalty_images(
    folder: Path, size: int, limits: image.ImageLimits, progress: Progress
) -> Iterator[torch.Tensor]:
    """Natural images (1, 3, S, S) in [0, 1] without end: the middle of a picture of twice the size.

    Raises:
        BadDataset: there is none in the folder or below it that can be read.
    """
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in image.SUFFIXES]
    if not paths:
        raise BadDataset(f"{folder} holds no images: --penalty_dir takes a folder of photos.")
    found = _pass_after_pass(paths, size, limits, progress.say)
    first = next(found, None)  # now, so that a folder of broken files is refused at once
    if first is None:
        raise BadDataset(f"No image in {folder} can be read: --penalty_dir takes photos.")
    return chain([first], found)


def _pass_after_pass(
    paths: list[Path], size: int, limits: image.ImageLimits, say: Callable[[str], None]
) -> Iterator[torch.Tensor]:
    """Pass after pass in a new order; broken files are named once. Ends when none is left."""
    order = torch.Generator().manual_seed(0)
    left = dict(enumerate(paths))
    while left:
        keys = list(left)
        for index in torch.randperm(len(keys), generator=order).tolist():
            path = left[keys[index]]
            try:
                picture = image.load(path.read_bytes(), 2 * size, limits)
            except (BadImage, OSError) as error:
                say(f"skipped {path}: {error}")
                del left[keys[index]]
                continue
            middle = picture[size // 2 : size // 2 + size, size // 2 : size // 2 + size]
            cut = torch.from_numpy(np.ascontiguousarray(middle))[None]
            pixels = cut.permute(0, 3, 1, 2).float() / 255
            if float(torch.rand((), generator=order)) < GREY_PENALTY:
                pixels = (pixels * LUMA).sum(dim=1, keepdim=True).expand(1, 3, -1, -1)
            yield pixels
