"""From the bytes of an image file to uint8 RGB, shape (H, W, 3): the only copy of preprocessing.

Training and serving both call `load`, so a score means the same in both.

Damaged files are refused, never scored: a half-black picture would get a verdict. Each kind goes to
a reader that is strict about it:

- JPEG: libjpeg-turbo through simplejpeg, where a warning is an error.
- PNG: the CRC of every chunk is checked here, the stream inside by libpng (cv2).
- BMP: cv2, which refuses short pixel data. The format has no checksum.
- TIFF: libtiff through Pillow. Not cv2: it returns the rows that failed to decompress as black, and
  darkens colours by their alpha. Uncompressed, LZW, Deflate and PackBits only: libtiff shows
  damaged JPEG and fax data as a picture.

BigTIFF is not read: it is for files of more than 4 GB.

What comes after the end of a JPEG, PNG or BMP is ignored, as libjpeg and libpng do: many cameras
pad. Grey becomes RGB by repetition, palettes are expanded, 1 bit becomes 0 and 255, alpha is
dropped. The EXIF orientation (in TIFF, the tag) is applied, once. Colour profiles are ignored.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

from engines.errors import BadImage, BadSettings, ImageTooLarge, UnsupportedImage

Pixels = NDArray[Any]  # uint8 or uint16, (H, W) grey or (H, W, 3) RGB
Resizing = Literal["each_axis"]  # as meta.json names it; see `resize`

SUFFIXES = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".tif", ".tiff"}
# Pictures that are not read: whoever finds them in a folder says so.
OTHER_PICTURES = {
    ".webp", ".heic", ".heif", ".avif", ".gif", ".jp2", ".j2k", ".jxl", ".jxr", ".apng", ".svg",
    ".pgm", ".ppm", ".pnm", ".pbm", ".pfm", ".tga", ".exr", ".hdr", ".psd", ".ico", ".btf", ".raw",
    ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".mp4", ".avi", ".mov", ".mkv",
}  # fmt: skip
MAX_SIDE = 65_535  # pixels: JPEG's own limit, far below the one of cv2
_MAX_PNG_CHUNKS = 100_000  # 32 MiB of empty chunks would keep a thread busy for seconds
_MAX_JPEG_SCANS = 500  # 883 scans over 16 million pixels, in 58 KB, took 2.3 s; 1 to 20 are usual
_MAX_JPEG_SEGMENTS = 1_000
# Tags of TIFF, and of EXIF, which is a TIFF without pixels.
_BITS_PER_SAMPLE, _PHOTOMETRIC, _ORIENTATION, _PLANAR = 258, 262, 274, 284
_TILE_WIDTH, _TILE_LENGTH, _SAMPLE_FORMAT = 322, 323, 339
_LAYOUT = {256, 257, 258, 259, 262, 273, 277, 278, 279, 284, 317, 322, 323, 324, 325, 338, 339}
_EXIF, _GPS, _MAKER_NOTE, _INTEROP = 34665, 34853, 37500, 40965  # directories below the first
_TYPE_BYTES = dict(enumerate((0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8)))
_TIFF_COMPRESSIONS = {"raw", "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "packbits"}
_TIFF_MODES = {"1", "L", "LA", "P", "RGB", "RGBA", "RGBX", "I;16", "I;16B"}

# What simplejpeg, cv2 and Pillow raise at damaged bytes: documented, or seen when fuzzing.
_DECODER_ERRORS = (
    cv2.error,
    OSError,
    OverflowError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
)

# Pillow reads uncompressed TIFF itself, and leaves strips that are missing black. libtiff does not.
TiffImagePlugin.READ_LIBTIFF = True
# What is wrong with a file is in the answer; the log of a server must not fill with it too.
warnings.filterwarnings("ignore", module=r"PIL\.")
_set_log_level = getattr(cv2, "setLogLevel", None) or cv2.utils.logging.setLogLevel  # 4.x or 5
_set_log_level(1)  # fatal only


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


def resize(
    image: NDArray[np.uint8], size: int, how: Resizing | None = "each_axis"
) -> NDArray[np.uint8]:
    """Stretch (H, W, 3) to (size, size, 3), whatever the shape of the picture.

    An axis that shrinks is averaged, one that grows is interpolated, each by itself.
    With `how` None, for models whose meta.json does not name it, both are interpolated as soon as
    one of them grows: what is narrow along the other may be passed over.
    """
    height, width = image.shape[:2]
    if how == "each_axis" and min(height, width) < size < max(height, width):
        between = (size, height) if width > size else (width, size)
        image = cv2.resize(image, between, interpolation=cv2.INTER_AREA)
    shrinks = min(image.shape[:2]) >= size
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    resized: NDArray[np.uint8] = cv2.resize(image, (size, size), interpolation=interpolation)
    return resized


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
    for kind, (reader, magics) in _READERS.items():
        if data.startswith(magics):
            with _named_errors(kind):
                return reader(data, limits)
    raise UnsupportedImage("This is not a JPEG, PNG, BMP or TIFF image; send one of these.")


@contextmanager
def _named_errors(kind: str) -> Iterator[None]:
    """The seam to the image libraries: whatever they raise leaves as BadImage."""
    try:
        yield
    except Image.DecompressionBombError as error:
        raise ImageTooLarge(f"The {kind} image has too many pixels.") from error
    except _DECODER_ERRORS as error:
        message = f"The {kind} image is damaged, or of a form that Kensa does not read."
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


def _read_jpeg(data: bytes, limits: ImageLimits) -> Pixels:
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    check_size(limits, width, height)
    if colours not in {"YCbCr", "RGB", "Gray"}:
        raise UnsupportedImage(f"The JPEG image is {colours}; save it as RGB or grey.")
    if data.count(b"\xff\xda") > _MAX_JPEG_SCANS:
        raise UnsupportedImage(f"The JPEG image has more than {_MAX_JPEG_SCANS} scans.")
    return _upright(simplejpeg.decode_jpeg(data, "RGB", strict=True), _jpeg_orientation(data))


def _jpeg_orientation(data: bytes) -> int:
    position = 2
    for _ in range(_MAX_JPEG_SEGMENTS):
        marker, length = struct.unpack_from(">HH", data, position)
        if marker == 0xFFE1 and data.startswith(b"Exif\0\0", position + 4):
            return _exif_orientation(data[position + 10 : position + 2 + length])
        if marker == 0xFFDA:  # the pixels begin
            break
        position += 1 if marker == 0xFFFF else 2 + length  # 0xFF may be repeated as padding
    return 1


def _read_png(data: bytes, limits: ImageLimits) -> Pixels:
    orientation = 1
    for number, (kind, body) in enumerate(_png_chunks(data)):
        if number == 0:
            if kind != b"IHDR":
                raise BadImage("The PNG image is damaged: it does not start with its header.")
            check_size(limits, *struct.unpack_from(">II", body))
        elif kind == b"acTL":
            raise UnsupportedImage("The PNG image is animated; send one picture.")
        elif kind == b"eXIf":
            orientation = _exif_orientation(body)
    return _upright(_decode_with_cv2(data), orientation)


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The kind and body of each chunk up to IEND. Raises BadImage where one is cut or altered."""
    position = 8  # after the signature
    for _ in range(_MAX_PNG_CHUNKS):
        if position + 12 > len(data):
            raise BadImage("The PNG image is cut short.")
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 8 + length
        if end + 4 > len(data):
            raise BadImage("The PNG image is cut short.")
        body = data[position + 8 : end]
        if zlib.crc32(body, zlib.crc32(kind)) != int.from_bytes(data[end : end + 4], "big"):
            raise BadImage("The PNG image is damaged: a checksum does not match.")
        yield kind, body
        if kind == b"IEND":
            return
        position = end + 4
    raise BadImage(f"The PNG image has more than {_MAX_PNG_CHUNKS:,} chunks.")


def _read_bmp(data: bytes, limits: ImageLimits) -> Pixels:
    with Image.open(BytesIO(data), formats=["BMP"]) as header:
        check_size(limits, *header.size)
        if header.info.get("compression") in (1, 2):
            # Nothing in a run-length file says how many pixels it should hold.
            raise UnsupportedImage("The BMP image is run-length encoded; save it uncompressed.")
    return _decode_with_cv2(data)


def _read_tiff(data: bytes, limits: ImageLimits) -> Pixels:
    directory = _tiff_directory(data)
    with Image.open(BytesIO(data), formats=["TIFF"]) as image:
        check_size(limits, *image.size)
        # Pillow skips entries that libtiff may understand: a tile of 1 GB could hide there.
        if directory & _LAYOUT != set(image.tag_v2) & _LAYOUT:
            raise BadImage("The TIFF image is damaged: its directory of tags makes no sense.")
        bits = _check_tiff(image, limits)
        image.load()  # strict, and turns the picture upright
        if image.mode.startswith("I;16"):
            return np.asarray(image)
        if bits == 8:
            return _rgb_of(image)
    # Pillow keeps 8 bits of 16-bit colour, so it only was the judge. cv2 turns it upright as well.
    return _decode_with_cv2(data)


def _tiff_directory(data: bytes) -> set[int]:
    """The tags of the first directory, after a look at every directory that Pillow will read."""
    directory = _directory(data)
    for pointer in directory.keys() & {_EXIF, _GPS}:
        _directory(data, directory[pointer])
    if directory.keys() & {_MAKER_NOTE, _INTEROP}:
        raise BadImage("The TIFF image is damaged: tags of EXIF stand among its own.")
    return set(directory)


def _check_tiff(image: Any, limits: ImageLimits) -> int:
    """Bits per channel, 8 (or less) or 16. Raises for what cannot be read, or not strictly."""
    tags = image.tag_v2
    # A tile is unpacked whole, however small the picture.
    check_size(limits, tags.get(_TILE_WIDTH, 1), tags.get(_TILE_LENGTH, 1))
    if image.is_animated:
        raise UnsupportedImage("The TIFF image has several pages; send one picture.")
    if image.info.get("compression") not in _TIFF_COMPRESSIONS:
        raise UnsupportedImage(
            f"The TIFF image is compressed as {image.info.get('compression')}, where damage goes "
            "unnoticed; save it uncompressed, as LZW or Deflate, or as a JPEG or PNG file."
        )
    bits = max(tags.get(_BITS_PER_SAMPLE, (1,)))
    photometric = tags.get(_PHOTOMETRIC, 0)
    plain = (0, 1, 2, 3) if bits <= 8 else (1, 2)  # white is 0, black is 0, RGB, palette
    readable = (
        image.mode in _TIFF_MODES
        and photometric in plain
        and (bits <= 8 or (bits == 16 and tags.get(_PLANAR, 1) == 1))
        and max(tags.get(_SAMPLE_FORMAT, (1,))) == 1  # unsigned
    )
    if not readable:
        raise UnsupportedImage(
            f"The TIFF image is {image.mode}, {bits} bits a channel, photometric {photometric}; "
            "save it as grey or RGB of 8 or 16 bits."
        )
    return 8 if bits <= 8 else 16


def _rgb_of(image: Image.Image) -> Pixels:
    """(H, W, 3) RGB in bands of rows, because Pillow's conversions copy the picture three times."""
    width, height = image.size
    rgb = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, 256):
        bottom = min(top + 256, height)
        rgb[top:bottom] = np.asarray(image.crop((0, top, width, bottom)).convert("RGB"))
    return rgb


def _decode_with_cv2(data: bytes) -> Pixels:
    """(H, W) or (H, W, 3) RGB, 8 or 16 bits. cv2 returns None for what it cannot decode."""
    flags = cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION
    image: Pixels | None = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if image is None:
        raise BadImage("The image is damaged: its pixels cannot be decoded.")
    if image.ndim == 3:
        for top in range(0, len(image), 256):  # in bands: a second whole picture is 48 MB
            band = image[top : top + 256]
            band[...] = cv2.cvtColor(band, cv2.COLOR_BGR2RGB)
    return image


def _exif_orientation(exif: bytes) -> int:
    return _directory(exif.removeprefix(b"Exif\0\0")).get(_ORIENTATION, 1)


def _directory(data: bytes, place: int | None = None) -> dict[int, int]:
    """A directory of TIFF or EXIF data, the first one or that at `place`: tag -> value or offset.

    Raises BadImage where a tag comes twice (libraries differ in which one counts), or where the
    entries point to more bytes than there are: Pillow 12 copies these, so that a small file in
    which many entries share the same bytes takes all memory.
    """
    order = "<" if data[:2] == b"II" else ">"
    if place is None:
        (place,) = struct.unpack_from(f"{order}I", data, 4)
    (count,) = struct.unpack_from(f"{order}H", data, place)
    values, pointed_to = {}, 0
    for entry in range(place + 2, place + 2 + 12 * count, 12):
        tag, kind, length = struct.unpack_from(f"{order}HHI", data, entry)
        (values[tag],) = struct.unpack_from(order + ("H" if kind == 3 else "I"), data, entry + 8)
        pointed_to += length * _TYPE_BYTES.get(kind, 8)
    if len(values) < count or pointed_to > len(data):
        raise BadImage("The image is damaged: its directory of tags makes no sense.")
    return values


def _upright(image: Pixels, orientation: int) -> Pixels:
    """Undo an EXIF orientation: 1 to 8, anything else counts as 1."""
    if orientation in (5, 6, 7, 8):
        image = cv2.transpose(image)
    flips = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}  # cv2's codes: 1 left-right, 0 up-down, -1 both
    return cv2.flip(image, flips[orientation]) if orientation in flips else image


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


_Reader = Callable[[bytes, ImageLimits], Pixels]
_READERS: dict[str, tuple[_Reader, tuple[bytes, ...]]] = {
    "JPEG": (_read_jpeg, (b"\xff\xd8\xff",)),
    "PNG": (_read_png, (b"\x89PNG\r\n\x1a\n",)),
    "BMP": (_read_bmp, (b"BM",)),
    "TIFF": (_read_tiff, (b"II*\0", b"MM\0*")),
}
