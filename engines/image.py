"""From the bytes of an image file to uint8 RGB, shape (H, W, 3): the only copy of preprocessing.

Training and serving both call `load`, so a score means the same in both.

Damaged files are refused, never scored: a half-black picture would get a verdict. Each kind has a
reader in `engines.image_files` that is strict about it: libraries show what they can, and guess the
rest. What one of them raises on a picture leaves as BadImage, so it never ends a run.

What comes after the end of a JPEG, PNG or BMP is ignored, as libjpeg and libpng do: many cameras
pad. Grey becomes RGB by repetition, palettes are expanded, 1 bit becomes 0 and 255, alpha is
dropped. The EXIF orientation (in TIFF, the tag) is applied, once. Colour profiles are ignored.
"""

from __future__ import annotations

import logging
import struct
import zlib
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from engines.errors import BadImage, BadSettings, ImageTooLarge, KensaError, UnsupportedImage
from engines.image_files import bmp, jpeg, png, tiff
from engines.image_files.reading import CheckSize, Pixels

Resizing = Literal["each_axis"]  # as meta.json names it; see `resize`

SUFFIXES = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".tif", ".tiff"}
# Pictures that are not read: whoever finds them in a folder says so.
OTHER_PICTURES = {
    ".webp", ".heic", ".heif", ".avif", ".gif", ".jp2", ".j2k", ".jxl", ".jxr", ".apng", ".svg",
    ".pgm", ".ppm", ".pnm", ".pbm", ".pfm", ".tga", ".exr", ".hdr", ".psd", ".ico", ".btf", ".raw",
    ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".mp4", ".avi", ".mov", ".mkv",
}  # fmt: skip
LONG = 4  # times as long as wide: pressed into a square, little is left of the longer side
TILES = (
    f"Cut the pictures into tiles of at most {LONG}:1, where they are learned and on the line, or"
    " train with a larger image_size, which is one number for both sides."
)
MAX_SIDE = 65_535  # pixels: JPEG's own limit, far below the one of cv2

# What simplejpeg, cv2 and Pillow raise at damaged bytes: documented, or seen when fuzzing.
_DECODER_ERRORS = (
    cv2.error,
    IndexError,
    OSError,
    OverflowError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)

_set_log_level = getattr(cv2, "setLogLevel", None) or cv2.utils.logging.setLogLevel  # 4.x or 5
_set_log_level(1)  # fatal only

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageLimits:
    """The largest image that is read: bytes of the file, and pixels (width x height)."""

    max_bytes: int = 32 * 1024 * 1024
    max_pixels: int = 16_000_000

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> ImageLimits:
        """Those of the server that started this process; the usual ones where it says none.

        Raises:
            BadSettings: they are no numbers.
        """
        usual = cls().environment()
        found = {name: environment.get(name) or value for name, value in usual.items()}
        try:
            return cls(*(int(value) for value in found.values()))
        except ValueError:
            raise BadSettings(f"{found} must be whole numbers.") from None

    def environment(self) -> dict[str, str]:
        """What `read` reads: settings of the server."""
        return {
            "KENSA_MAX_IMAGE_BYTES": str(self.max_bytes),
            "KENSA_MAX_IMAGE_PIXELS": str(self.max_pixels),
        }

    @staticmethod
    def add_flags(parser: ArgumentParser) -> None:
        """Let a command take them as flags, as `of_flags` reads them."""
        usual, add = ImageLimits(), parser.add_argument
        add("--max_image_bytes", type=int, default=usual.max_bytes, metavar="N",
            help=f"largest image file that is read (default {usual.max_bytes})")  # fmt: skip
        add("--max_image_pixels", type=int, default=usual.max_pixels, metavar="N",
            help="largest image that is read, width x height"
            f" (default {usual.max_pixels})")  # fmt: skip

    @classmethod
    def of_flags(cls, flags: dict[str, Any]) -> ImageLimits:
        """Take them out of the flags of a command."""
        return cls(flags.pop("max_image_bytes"), flags.pop("max_image_pixels"))


DEFAULT_LIMITS = ImageLimits()


def files_in(folder: Path) -> list[Path]:
    """The image files of a folder by the endings of their names, sorted; none if it is missing."""
    return [path for path in visible(folder) if path.suffix.lower() in SUFFIXES]


def visible(folder: Path) -> list[Path]:
    """What is in a folder, sorted, without hidden names; nothing if it is missing."""
    there = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in there if not path.name.startswith("."))


def load(
    data: bytes,
    size: int,
    limits: ImageLimits = DEFAULT_LIMITS,
    bit_depth: int | None = None,
    resizing: Resizing | None = "each_axis",
) -> NDArray[np.uint8]:
    """What a model sees of an image file: decoded and resized, (size, size, 3) uint8 RGB.

    Arguments and errors are those of `decode` and `resize`.
    """
    return resize(decode(data, limits, bit_depth), size, resizing)


def decode(
    data: bytes, limits: ImageLimits = DEFAULT_LIMITS, bit_depth: int | None = None
) -> NDArray[np.uint8]:
    """Decode an image file to upright uint8 RGB, (H, W, 3), C-contiguous.

    `bit_depth` (8 to 16) is how many bits of a 16-bit file the camera fills; None means all 16.
    The upper 8 of these are kept (`value >> (bit_depth - 8)`), the same for every image: a dark
    picture stays dark. It comes from meta.json, where the operator states it, and does not matter
    for 8-bit files.

    Raises UnsupportedImage for a kind that Kensa does not read, ImageTooLarge before anything is
    decoded, and BadImage for damage and for values above `bit_depth`. No bytes make it raise
    anything else; ValueError is for a `bit_depth` that is none.
    """
    return to_rgb(read(data, limits), bit_depth)


def read(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> Pixels:
    """The upright pixels as the file holds them, 8 or 16 bits; errors as of `decode`."""
    return _read(data, limits)


def to_rgb(image: Pixels, bit_depth: int | None) -> NDArray[np.uint8]:
    """What `read` found, as `decode` returns it."""
    bits = 16 if bit_depth is None else bit_depth
    if not 8 <= bits <= 16:
        raise ValueError(f"bit_depth is {bits}, not 8 to 16")
    image = _to_8_bits(image, bits)
    if image.ndim == 2:
        image = cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
    return np.ascontiguousarray(image)


def same_either_way(width: int, height: int, size: int) -> bool:
    """Whether a picture is resized alike whatever meta.json names: unless one axis alone grows."""
    return not min(height, width) < size < max(height, width)


def resize(
    image: NDArray[np.uint8], size: int, how: Resizing | None = "each_axis"
) -> NDArray[np.uint8]:
    """Stretch (H, W, 3) to (size, size, 3), whatever the shape of the picture.

    An axis that shrinks is averaged, one that grows is interpolated, each by itself.
    With `how` None, for models whose meta.json does not name it, both are interpolated as soon as
    one of them grows: what is narrow along the other may be passed over.
    """
    height, width = image.shape[:2]
    if how == "each_axis" and not same_either_way(width, height, size):
        between = (size, height) if width > size else (width, size)
        image = cv2.resize(image, between, interpolation=cv2.INTER_AREA)
    shrinks = min(image.shape[:2]) >= size
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    resized: NDArray[np.uint8] = cv2.resize(image, (size, size), interpolation=interpolation)
    return resized


def hint_on(width: int, height: int, size: int) -> str | None:
    """What speaks against a picture in the shape that the model sees; None where nothing does.

    It is judged all the same: a model may have learned from just such pictures.
    """
    hints = []
    if is_small(width, height, size):
        hints.append(
            f"The picture is only {width} x {height} pixels, and was enlarged to the {size} x"
            f" {size} of the model: fine defects cannot show. Send it as the camera took it; where"
            " it is that small, train with a smaller image_size."
        )
    if is_long(width, height):
        hints.append(
            f"The picture is {width} x {height} pixels, longer than {LONG}:1:"
            f" {max(width, height) / size:.3g} pixels along the longer side become one, so narrow"
            f" defects fade. {TILES}"
        )
    return " ".join(hints) or None


def is_small(width: int, height: int, size: int) -> bool:
    """Whether a picture is at most half as wide or high as what the model sees."""
    return 2 * min(width, height) <= size


def is_long(width: int, height: int) -> bool:
    """Whether little is left of the longer side, once it is pressed into a square."""
    return max(width, height) > LONG * min(width, height)


def hints_in_short(hints: dict[str, str | None]) -> str | None:
    """What `hint_on` said of several pictures, by their names: how many, and one of the sentences.

    None where it said nothing.
    """
    said = {name: hint for name, hint in hints.items() if hint}
    if not said or len(hints) == 1:
        return next(iter(said.values()), None)
    name, hint = next(iter(said.items()))
    return f"{len(said)} of {len(hints)} pictures, such as {name}: {hint}"


def measured_bit_depth(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> int:
    """The smallest of 8, 10, 12, 14 and 16 bits that holds every value of an image file.

    8 for 8-bit files. A dark picture measures less than its camera's depth, so this is for showing
    a picture, and no model is made of it. Raises what `decode` raises.
    """
    highest = int(_read(data, limits).max())
    return next(depth for depth in (8, 10, 12, 14, 16) if highest < 1 << depth)


def _read(data: bytes, limits: ImageLimits) -> Pixels:
    """The upright pixels as the file holds them. The first bytes decide the kind, never a name."""
    if not data:
        raise BadImage("The image is empty: 0 bytes.")
    if len(data) > limits.max_bytes:
        raise ImageTooLarge(
            f"The image file has {len(data):,} bytes, more than the {limits.max_bytes:,} allowed"
            " by KENSA_MAX_IMAGE_BYTES, or --max_image_bytes of a command."
        )
    kind = readable_kind(data)
    with _named_errors(kind):
        return _READERS[kind](data, partial(check_size, limits))


def readable_kind(data: bytes) -> str:
    """`kind_of` a file; raises UnsupportedImage, with what to do, where Kensa does not read it."""
    kind = kind_of(data)
    if kind not in _READERS:
        raise UnsupportedImage(_OTHER_KINDS.get(kind, _UNKNOWN_KIND))
    return kind


def kind_of(data: bytes) -> str:
    """What kind of file begins like this: "JPEG", "PNG", ..., or "unknown"."""
    for kind, starts in _STARTS.items():
        if data.startswith(starts):
            return kind
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WebP"
    if data[4:8] == b"ftyp":  # the container that MP4 has as well
        return {b"he": "HEIC", b"mi": "HEIC", b"av": "AVIF"}.get(data[8:10], "unknown")
    return "unknown"


@contextmanager
def _named_errors(kind: str) -> Iterator[None]:
    """The seam to the image libraries: whatever they raise leaves as BadImage."""
    message = f"The {kind} image is damaged, or of a form that Kensa does not read."
    try:
        yield
    except (KensaError, MemoryError):
        raise
    except _DECODER_ERRORS as error:
        raise BadImage(message) from error
    except Exception as error:
        _log.exception("a decoder failed in a way that nobody foresaw: the image is refused")
        raise BadImage(message) from error


def check_size(limits: ImageLimits, width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise BadImage(f"The image is {width} x {height} pixels: it has none.")
    if width * height > limits.max_pixels or max(width, height) > MAX_SIDE:
        raise ImageTooLarge(
            f"The image is {width} x {height} pixels; allowed are {limits.max_pixels:,} in all "
            f"and {MAX_SIDE:,} a side: raise KENSA_MAX_IMAGE_PIXELS, or --max_image_pixels of a"
            " command."
        )


def _to_8_bits(image: Pixels, bit_depth: int) -> Pixels:
    """The upper 8 of `bit_depth` bits. Raises BadImage where a pixel has more bits than these."""
    if image.dtype == np.uint8:
        return image
    highest = int(image.max())
    if highest >= 1 << bit_depth:
        raise BadImage(
            f"The image has values up to {highest}, but the model learned from {bit_depth}-bit "
            "images: the camera's bit depth differs from the one learned. Learn with the camera's"
            " own, which bit_depth in meta.json states."
        )
    narrow = np.empty(image.shape, np.uint8)
    return np.right_shift(image, bit_depth - 8, out=narrow, casting="unsafe")


_STARTS: dict[str, bytes | tuple[bytes, ...]] = {
    "JPEG": b"\xff\xd8\xff",
    "PNG": b"\x89PNG\r\n\x1a\n",
    "BMP": b"BM",
    "TIFF": (b"II*\0", b"MM\0*"),
    "BigTIFF": (b"II+\0", b"MM\0+"),
    "GIF": (b"GIF87a", b"GIF89a"),
    "JPEG 2000": (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"),
    "JPEG XL": (b"\xff\x0a", b"\0\0\0\x0cJXL "),
    "PDF": b"%PDF",
    "SVG": (b"<svg", b"<?xml"),
    "zip": b"PK\3\4",
    "gzip": b"\x1f\x8b",
    "base64": (b"data:image/", b"/9j/", b"iVBORw0KGgo"),
}
_READERS: dict[str, Callable[[bytes, CheckSize], Pixels]] = {
    "JPEG": jpeg.read,
    "PNG": png.read,
    "BMP": bmp.read,
    "TIFF": tiff.read,
    "BigTIFF": tiff.read,
}
_UNKNOWN_KIND = "This is not a JPEG, PNG, BMP or TIFF image; send one of these."
_OTHER_KINDS = {
    kind: f"This is a {kind} image, which Kensa does not read; save it as a JPEG, PNG, BMP or TIFF"
    " image."
    for kind in ("WebP", "GIF", "JPEG 2000", "JPEG XL", "SVG")
} | {
    "HEIC": "This is a HEIC image, as phones take them, which Kensa does not read; set the camera"
    ' to JPEG ("most compatible"), or save it as a JPEG, PNG, BMP or TIFF image.',
    "AVIF": "This is an AVIF image, which Kensa does not read; save it as a JPEG, PNG, BMP or TIFF"
    " image.",
    "PDF": "This is a PDF, not an image; send the picture in it as a JPEG, PNG, BMP or TIFF image.",
    "zip": "This is a zip, not an image; send one JPEG, PNG, BMP or TIFF image.",
    "gzip": "This is compressed with gzip; send the JPEG, PNG, BMP or TIFF image as it is.",
    "base64": "This is an image as base64 text; send the bytes of the JPEG, PNG, BMP or TIFF image"
    " themselves.",
}
