"""regions.png in a bundle: read, drawn from polygons, checked, written.

White never counts, black does, and there is nothing between: what would have to be guessed is
refused. The mask is as large as the pictures that are learned, so it is pressed into the model's
square as they are.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from engines.errors import BadBundle, BadImage, BadRequest, Unreadable, UnsupportedImage
from engines.files import write_atomically
from engines.image import DEFAULT_LIMITS, ImageLimits, check_size, kind_of, read
from engines.meta import Meta
from engines.regions import REACH, Regions
from engines.verdict import OVERLAY_SIDE, png

REGIONS = "regions.png"
_COLOUR_TYPE, _RGB = 25, 2  # where a PNG says what its pixels are; without alpha or palette
MOST_POLYGONS = 100
MOST_CORNERS = 200  # of a polygon
_RED, _WHITE = (40, 40, 230), (255, 255, 255)  # BGR
_IN_A_BUNDLE = ImageLimits(max_bytes=1 << 30, max_pixels=1 << 28)  # whatever the server's are

Size = tuple[int, int]  # width, height
Polygon = Sequence[Sequence[float]]  # points (x, y), pixels from the upper left corner


def read_regions(root: Path, meta: Meta) -> Regions | None:
    """The regions of a bundle; None where all of a picture counts.

    Raises:
        BadBundle: the file that meta.json names is missing, or is no mask.
        Unreadable: the system does not give it.
    """
    if meta.regions is None:
        return None
    path = root / meta.regions
    try:
        return of_png(path.read_bytes(), _IN_A_BUNDLE)
    except FileNotFoundError:
        raise BadBundle(f"{path} does not exist, but meta.json beside it names it.") from None
    except OSError as error:
        Unreadable.check(path, error)
        raise BadBundle(f"{path} cannot be read: {error.strerror}.") from None
    except (BadImage, BadRequest) as error:
        raise BadBundle(f"{path} is no mask of regions: {error}") from error


@dataclass(frozen=True)
class _File:
    """A file of a version, known by what is in it: versions share it, and it never changes."""

    sha256: str
    root: Path = field(compare=False)
    meta: Meta = field(compare=False)


def never_counts(root: Path, meta: Meta, files: Mapping[str, str]) -> float | None:
    """The share of a picture's pixels that never count in a version; None where it has no regions.

    Args:
        files: name -> SHA-256, as the manifest of the version has them.

    Raises:
        BadBundle, Unreadable: as `read_regions`.
    """
    if meta.regions is None:
        return None
    return _share(_File(files.get(meta.regions, ""), root, meta))


@lru_cache(1024)
def _share(file: _File) -> float:
    regions = read_regions(file.root, file.meta)
    assert regions is not None
    return regions.share


def of_png(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> Regions:
    """The regions that a grey PNG draws: white never counts, black does.

    Raises:
        BadImage, UnsupportedImage, ImageTooLarge: it is damaged, no PNG, or too large.
        BadRequest: it is a picture of another form, or leaves no pixel that counts.
    """
    if data and (kind := kind_of(data)) != "PNG":
        what = "no image that Kensa knows" if kind == "unknown" else f"a {kind} image"
        raise UnsupportedImage(
            f"A mask of regions is a PNG, whose pixels are exactly black or white; this is {what}."
        )
    pixels = read(data, limits)
    if pixels.ndim == 3 and data[_COLOUR_TYPE] == _RGB and (pixels == pixels[..., :1]).all():
        pixels = pixels[..., 0]  # as programs save it that know no grey, such as Paint
    if pixels.ndim != 2 or pixels.dtype != np.uint8:
        form = "16 bits a pixel" if pixels.dtype != np.uint8 else "colours, a palette or alpha"
        raise BadRequest(
            f"The mask of regions has {form}: save it as a grey PNG of 8 bits, or of 1 bit, where"
            " white never counts and black does."
        )
    between = pixels[(pixels != 0) & (pixels != 255)]
    if between.size:
        raise BadRequest(
            f"{between.size:,} pixels of the mask of regions are neither black (0) nor white"
            f" (255), such as {between[0]}: draw it without smooth edges, or save it with 1 bit."
        )
    return _checked(pixels == 255)


def of_polygons(
    width: int, height: int, polygons: Sequence[Polygon], limits: ImageLimits = DEFAULT_LIMITS
) -> Regions:
    """The regions that polygons enclose on a picture of `width` x `height` pixels.

    A pixel never counts whose centre is inside of one, by the even-odd rule.

    Raises:
        BadRequest: a point lies outside or is no number, a polygon covers no pixel, there are too
            many, or they leave no pixel that counts.
        ImageTooLarge: the picture is larger than any that is read.
    """
    check_size(limits, width, height)
    corners = max(map(len, polygons), default=0)
    if len(polygons) > MOST_POLYGONS or corners > MOST_CORNERS:
        raise BadRequest(
            f"There are {len(polygons):,} polygons of up to {corners:,} corners; {MOST_POLYGONS} of"
            f" {MOST_CORNERS} each are taken: send the mask as a PNG."
        )
    columns = np.zeros((width, height), np.bool_)  # so that all rows are walked along at once
    for number, polygon in enumerate(polygons, 1):
        _check_points(number, polygon, width, height)
        if not _fill(columns, np.asarray(polygon, np.float64)):
            raise BadRequest(
                f"Polygon {number} covers the centre of no pixel: its points are pixels of a"
                f" picture of {width} x {height}, not shares of it."
            )
    return _checked(np.ascontiguousarray(columns.T))


def as_png(regions: Regions) -> bytes:
    """The file: 8-bit grey, 255 never counts, 0 does."""
    return png(np.where(regions.mask, np.uint8(255), np.uint8(0)))


def drawn_over(picture: NDArray[np.uint8], regions: Regions, meta: Meta) -> bytes:
    """A PNG of a picture with what never counts painted red, and paler what is within its reach.

    Args:
        picture: (h, w, 3) RGB; it is stretched to the shape of the mask.
        meta: of the model that has these regions.
    """
    high, wide = regions.mask.shape
    scale = min(1.0, OVERLAY_SIDE / max(high, wide))
    width, height = max(1, round(wide * scale)), max(1, round(high * scale))
    shown = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)[..., ::-1].copy()
    hidden = cv2.resize(
        regions.mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_AREA
    )
    reached = regions.reached(meta.image_size, REACH[meta.model]).astype(np.uint8)
    reached = cv2.resize(reached, (width, height), interpolation=cv2.INTER_NEAREST)
    for mask, red, edge in ((reached | hidden, 0.2, _RED), (hidden, 0.44, _WHITE)):
        away = mask.astype(bool)
        shown[away] = ((1 - red) * shown[away] + red * np.array(_RED)).astype(np.uint8)
        outlines, _ = cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
        cv2.drawContours(shown, outlines, -1, edge, 1, cv2.LINE_AA)
    return png(shown)


def write_regions(root: Path, regions: Regions, meta: Meta) -> Meta:
    """Write regions.png into a folder; the meta.json that belongs to it, which is not written."""
    data = as_png(regions)
    write_atomically(root / REGIONS, data)
    files = None  # older tools wrote no hashes: there are none to add one to
    if meta.files is not None:
        files = {**meta.files, REGIONS: hashlib.sha256(data).hexdigest()}
    return meta.with_(regions=REGIONS, files=files)


def without_regions(meta: Meta) -> Meta:
    """The meta.json of the same model with no regions."""
    files = {name: one for name, one in (meta.files or {}).items() if name != meta.regions}
    return meta.with_(regions=None, files=None if meta.files is None else files)


def learned_sizes(meta: Meta) -> set[Size]:
    """Width and height of most pictures that a model learned; none where nobody wrote them down."""
    match getattr(meta, "camera", None):
        case {"size": [int(width), int(height)]}:
            return {(width, height)}
    return set()


def must_fit(regions: Regions, sizes: Collection[Size], whose: str) -> None:
    """Raise BadRequest unless the mask is as large as one of the pictures that are known.

    Args:
        sizes: none where nobody knows any.
        whose: pictures, for the sentence: "the pictures that were learned".
    """
    height, width = regions.mask.shape
    if sizes and (width, height) not in sizes:
        known = " or ".join(f"{wide} x {high}" for wide, high in sorted(sizes)[:3])
        raise BadRequest(
            f"The mask of regions is {width} x {height} pixels, and {whose} are {known}: draw it on"
            " one of these."
        )


def _checked(mask: NDArray[np.bool_]) -> Regions:
    if mask.all():
        raise BadRequest(
            "The mask of regions leaves no pixel that counts: nothing could be found. White never"
            " counts, black does."
        )
    return Regions(mask)


def _check_points(number: int, polygon: Polygon, width: int, height: int) -> None:
    """Raise BadRequest unless these are the corners of a polygon in the picture."""
    if len(polygon) < 3:
        raise BadRequest(f"Polygon {number} has {len(polygon)} points; it takes three or more.")
    for x, y in polygon:
        if not (math.isfinite(x) and math.isfinite(y)):
            raise BadRequest(f"Polygon {number} has a point ({x}, {y}), which is no place.")
        if not (0 <= x <= width and 0 <= y <= height):
            raise BadRequest(
                f"Polygon {number} has a point ({x:g}, {y:g}) outside of the picture of {width} x"
                f" {height} pixels."
            )


def _fill(columns: NDArray[np.bool_], corners: NDArray[np.float64]) -> bool:
    """Set the pixels whose centres are inside of a polygon; whether there was one.

    Each edge changes inside and outside in the rows that it crosses, right of where it does.

    Args:
        columns: (W, H).
        corners: (n, 2), x and y.
    """
    left, top = np.floor(corners.min(axis=0)).astype(int)
    right, bottom = np.ceil(corners.max(axis=0)).astype(int)
    changes = np.zeros((right - left + 1, bottom - top), np.bool_)
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        low, high = sorted((y0, y1))
        rows = np.arange(math.ceil(low - 0.5), math.ceil(high - 0.5))  # low <= row + 0.5 < high
        if len(rows):
            crossed = x0 + (rows + 0.5 - y0) * ((x1 - x0) / (y1 - y0))
            first = np.ceil(crossed - 0.5).astype(int) - left  # the first centre to its right
            changes[np.clip(first, 0, right - left), rows - top] ^= True
    for before, column in itertools.pairwise(changes):  # 5 times faster than `accumulate`
        column ^= before
    inside = changes[:-1]
    columns[left:right, top:bottom] |= inside
    return bool(inside.any())
