"""Files whose structure was changed: the pixels that a second decoder reads, or refused.

Pillow judges JPEG, PNG and BMP; tifffile, which is no libtiff, judges TIFF.
"""

from __future__ import annotations

import contextlib
import io
import logging
import struct
import zlib
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageOps

from engines.errors import KensaError
from engines.image import decode
from support.mutations import mutations, structured_seeds

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of the judges
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
]

KINDS = ("jpeg", "png", "bmp", "tiff")
TOLERANCE = {"jpeg": 2}  # two versions of libjpeg
FLIPPED = {1: (), 2: (1,), 3: (0, 1), 4: (0,), 5: (), 6: (1,), 7: (0, 1), 8: (0,)}  # after turning
REFUSES = (OSError, ValueError, SyntaxError, TypeError, IndexError, KeyError, OverflowError,
           EOFError, ZeroDivisionError, RuntimeError, struct.error, zlib.error)  # fmt: skip


def judged(kind: str, data: bytes) -> np.ndarray | None:
    """The upright pixels by another decoder, 8-bit RGB; None where it refuses the file.

    imagecodecs refuses PackBits with something left over, which libtiff does not see: there Pillow
    is asked as well.
    """
    for judge in (by_tifffile, by_pillow) if kind == "tiff" else (by_pillow,):
        with contextlib.suppress(*REFUSES):
            return judge(data)
    return None


def by_pillow(data: bytes) -> np.ndarray:
    # Colours of a TIFF that were multiplied by alpha are wanted as they are stored.
    data = data.replace(b"R\1\3\0\1\0\0\0\1", b"R\1\3\0\1\0\0\0\0")
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):
            return np.repeat((np.asarray(upright) >> 8).astype(np.uint8)[..., None], 3, axis=-1)
        return np.asarray(upright.convert("RGB"))


def by_tifffile(data: bytes) -> np.ndarray:
    tifffile = pytest.importorskip("tifffile", reason="comes with the train extra")
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages[0]
        pixels = page.asarray()
        if page.planarconfig == 2 and pixels.ndim == 3:
            pixels = np.moveaxis(pixels, 0, -1)
        if page.photometric == 3:
            colours = page.colormap if page.colormap.max() <= 255 else page.colormap >> 8
            pixels = np.moveaxis(colours, 0, -1).astype(np.uint8)[pixels]
        elif page.bitspersample < 8:
            pixels = pixels.astype(np.uint8) * (255 // ((1 << page.bitspersample) - 1))
        if page.photometric == 0:
            pixels = 255 - pixels
        orientation = page.tags.valueof(274, 1)
    pixels = (pixels >> 8 if pixels.dtype == np.uint16 else pixels).astype(np.uint8)
    pixels = pixels[..., :3] if pixels.ndim == 3 and pixels.shape[2] >= 3 else first(pixels)
    turned = np.swapaxes(pixels, 0, 1) if orientation in (5, 6, 7, 8) else pixels
    return np.flip(turned, FLIPPED.get(orientation, ()))


def first(pixels: np.ndarray) -> np.ndarray:
    """Grey, without its alpha, three times."""
    grey = pixels if pixels.ndim == 2 else pixels[..., 0]
    return np.repeat(grey[..., None], 3, axis=-1)


def turned(pixels: np.ndarray) -> list[np.ndarray]:
    """In all eight orientations."""
    return [np.rot90(one, times) for one in (pixels, pixels[:, ::-1]) for times in range(4)]


def verdict(kind: str, name: str, data: bytes) -> str:
    """How our pixels compare: "equal", "refused" or "other"."""
    try:
        ours = decode(data)
    except KensaError:
        return "refused"
    theirs = judged(kind, data)
    if theirs is None:
        return "judged by us alone"
    # Of two EXIF notes ours takes the orientation of the one that has it, Pillow that of the first.
    ways = turned(theirs) if data.count(b"Exif\0\0") > 1 else [theirs]
    same = [one for one in ways if one.shape == ours.shape]
    if not same:
        return "other"
    furthest = min(np.abs(ours.astype(int) - one).max() for one in same)
    return "equal" if furthest <= TOLERANCE.get(kind, 0) else "other"


def verdicts(kind: str, count: int) -> tuple[Counter[str], list[str]]:
    """How many came out in which way, and the names of those that are wrong."""
    found = {file.name: verdict(kind, file.name, file.data) for file in mutations(kind, count)}
    wrong = [name for name, how in found.items() if how not in ("equal", "refused")]
    return Counter(found.values()), wrong


@pytest.mark.parametrize("kind", KINDS)
def test_both_decoders_agree_on_every_form_of_a_whole_file(kind: str) -> None:
    seeds = structured_seeds(kind)
    assert len(seeds) > 7
    assert {name: verdict(kind, name, data) for name, data in seeds.items()} == dict.fromkeys(
        seeds, "equal"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_structure_gives_the_same_pixels_or_a_refusal(kind: str) -> None:
    counted, wrong = verdicts(kind, 2_000)
    assert not wrong
    assert counted["equal"] > 10
    assert counted["refused"] > 100


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS)
def test_thousands_of_changed_structures_give_the_same_pixels_or_a_refusal(kind: str) -> None:
    counted, wrong = verdicts(kind, 50_000)
    print(f"{kind}: {dict(counted)}")
    assert not wrong
