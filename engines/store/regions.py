"""regions.png in a bundle: read, drawn from polygons, checked, written.

White never counts, black does, and there is nothing between: what would have to be guessed is
refused. The mask is as large as the pictures that are learned, so it is pressed into the model's
square as they are.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engines.errors import BadBundle, BadImage, BadRequest, Unreadable, UnsupportedImage
from engines.files import write_atomically
from engines.image import DEFAULT_LIMITS, ImageLimits, kind_of, read
from engines.meta import Meta
from engines.regions import Regions
from engines.verdict import png

REGIONS = "regions.png"
_IN_A_BUNDLE = ImageLimits(max_bytes=1 << 30, max_pixels=1 << 28)  # whatever the server's are


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


def as_png(regions: Regions) -> bytes:
    """The file: 8-bit grey, 255 never counts, 0 does."""
    return png(np.where(regions.mask, np.uint8(255), np.uint8(0)))


def write_regions(root: Path, regions: Regions, meta: Meta) -> Meta:
    """Write regions.png into a folder; the meta.json that belongs to it, which is not written."""
    data = as_png(regions)
    write_atomically(root / REGIONS, data)
    files = None  # older tools wrote no hashes: there are none to add one to
    if meta.files is not None:
        files = {**meta.files, REGIONS: hashlib.sha256(data).hexdigest()}
    return meta.with_(regions=REGIONS, files=files)


def _checked(mask: NDArray[np.bool_]) -> Regions:
    if mask.all():
        raise BadRequest(
            "The mask of regions leaves no pixel that counts: nothing could be found. White never"
            " counts, black does."
        )
    return Regions(mask)
