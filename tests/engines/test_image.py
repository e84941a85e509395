"""Claims about engines.image. Other libraries are the judges of what is damaged."""

from __future__ import annotations

import ast
import io
import struct
import time
import tracemalloc
import zlib
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from engines.errors import BadImage, BadSettings, ImageTooLarge, KensaError, UnsupportedImage
from engines.image import (
    ImageLimits,
    decode,
    hint_on,
    hints_in_short,
    load,
    measured_bit_depth,
    resize,
)
from support.damage import (
    Damaged,
    damaged,
    picture,
    png,
    png_chunk,
    png_rows,
    saved,
    seeds,
    tiff,
    tiff_file,
)
from support.project import ROOT

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # at damaged EXIF

Writer = Callable[[np.ndarray], bytes]

SEEDS = seeds()
CORPUS = damaged()
ORIENTED = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3  # all pixels differ
ANIMATION = {"save_all": True, "append_images": [Image.new("RGB", (6, 4))]}


def decoded_or_none(data: bytes) -> np.ndarray | None:
    try:
        return decode(data)
    except KensaError:
        return None


def pillow(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


# Good files


@pytest.mark.parametrize("name", SEEDS)
def test_every_kind_decodes_to_contiguous_rgb(name: str) -> None:
    image = decode(SEEDS[name])
    assert image.shape == picture().shape
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous


@pytest.mark.parametrize("name", [name for name in SEEDS if not name.endswith("16")])
def test_eight_bit_pixels_are_those_that_pillow_reads(name: str) -> None:
    difference = np.abs(decode(SEEDS[name]).astype(int) - pillow(SEEDS[name]))
    assert difference.max() <= (2 if name.startswith("jpeg") else 0)  # two versions of libjpeg


def test_jpeg_pixels_are_those_of_simplejpeg() -> None:
    assert np.array_equal(
        decode(SEEDS["jpeg_colour"]), simplejpeg.decode_jpeg(SEEDS["jpeg_colour"])
    )


def test_grey_is_repeated_into_three_channels() -> None:
    for kind in ("JPEG", "PNG", "BMP", "TIFF"):
        red, green, blue = np.moveaxis(decode(saved(Image.new("L", (8, 8), 77), kind)), -1, 0)
        assert np.all(red == 77)
        assert np.array_equal(red, green)
        assert np.array_equal(green, blue)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_alpha_is_dropped_and_colours_stay(kind: str) -> None:
    alpha = np.full((*ORIENTED.shape[:2], 1), 9, np.uint8)
    transparent = Image.fromarray(np.concatenate([ORIENTED, alpha], axis=-1))
    assert np.array_equal(decode(saved(transparent, kind)), ORIENTED)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_one_bit_becomes_0_and_255(kind: str) -> None:
    image = decode(saved(Image.fromarray(picture()).convert("1"), kind))
    assert np.unique(image).tolist() == [0, 255]


def test_the_name_of_a_file_does_not_matter() -> None:
    """There is no name to pass: a JPEG called part.png is a JPEG."""
    assert np.array_equal(decode(SEEDS["png_colour"]), decode(SEEDS["bmp_colour"]))


@pytest.mark.parametrize("name", ["jpeg_colour", "png_colour", "bmp_colour", "tiff_lzw"])
def test_padding_after_the_end_is_harmless(name: str) -> None:
    padded = SEEDS[name] + bytes(512) + b"\xff\xd9 camera notes"
    assert np.array_equal(decode(padded), decode(SEEDS[name]))


# Orientation


def turned(orientation: int) -> np.ndarray:
    """How a viewer shows ORIENTED, spelled out independently of the loader."""
    return {
        1: ORIENTED,
        2: np.fliplr(ORIENTED),
        3: np.rot90(ORIENTED, 2),
        4: np.flipud(ORIENTED),
        5: np.rot90(np.fliplr(ORIENTED), 1),
        6: np.rot90(ORIENTED, -1),
        7: np.rot90(np.fliplr(ORIENTED), -1),
        8: np.rot90(ORIENTED, 1),
    }[orientation]


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once_in_every_kind(orientation: int) -> None:
    picture_, expected = Image.fromarray(ORIENTED), turned(orientation)
    eight_bit = {
        "png": saved(picture_, "PNG", exif=exif(orientation)),
        "tiff strip": saved(picture_, "TIFF", tiffinfo={274: orientation}),
        "tiff lzw": saved(picture_, "TIFF", compression="tiff_lzw", tiffinfo={274: orientation}),
        "tiff tiles": tiff(ORIENTED, tile=16, orientation=orientation),
        "tiff 16 bit": tiff(ORIENTED.astype(np.uint16) << 8, orientation=orientation),
        "tiff 16 tiles": tiff(ORIENTED.astype(np.uint16) << 8, tile=16, orientation=orientation),
    }
    for name, data in eight_bit.items():
        assert np.array_equal(decode(data), expected), name
    grey = decode(tiff(ORIENTED[..., 0].astype(np.uint16) << 8, orientation=orientation))
    assert np.array_equal(grey[..., 0], expected[..., 0])


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_16_bit_grey_in_either_order_of_bytes_is_turned(orientation: int, order: str) -> None:
    """Where the low bytes say something, too: cv2 turns big-endian numbers as if they were not."""
    high = ORIENTED[..., 0].astype(np.uint16)
    grey = high << 8 | 255 - high
    height, width = grey.shape
    body = grey.astype(f"{order}u2").tobytes()
    tags = {256: [width], 257: [height], 258: [16], 259: [1], 262: [1], 273: [8],
            274: [orientation], 277: [1], 278: [height], 279: [len(body)]}  # fmt: skip
    found = decode(tiff_file(body, tags, order))
    assert np.array_equal(found[..., 0], turned(orientation)[..., 0])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_jpeg_orientation_is_that_of_pillow(orientation: int) -> None:
    data = saved(Image.fromarray(picture()), "JPEG", exif=exif(orientation))
    difference = np.abs(decode(data).astype(int) - pillow(data))
    assert difference.max() <= 2


def test_exif_of_any_byte_order_behind_other_segments_and_padding_counts() -> None:
    jpeg = saved(Image.fromarray(picture()), "JPEG")
    big_endian = b"Exif\0\0MM\0*\0\0\0\x08\0\1" + struct.pack(">HHIHxx", 274, 3, 1, 3) + bytes(4)
    note = b"\xff\xfe\0\x06note\xff"  # and a byte of padding
    segment = note + b"\xff\xe1" + struct.pack(">H", 2 + len(big_endian)) + big_endian
    assert np.array_equal(decode(jpeg[:2] + segment + jpeg[2:]), np.rot90(decode(jpeg), 2))


def test_exif_that_cannot_be_read_turns_nothing() -> None:
    """The picture is whole."""
    cut = png(ORIENTED, extra=png_chunk(b"eXIf", exif(6)[6:-9]))
    assert np.array_equal(decode(cut), ORIENTED)


def test_an_orientation_after_the_pixels_of_a_png_counts() -> None:
    good = saved(Image.fromarray(ORIENTED), "PNG")
    late = png_chunk(b"eXIf", exif(6).removeprefix(b"Exif\0\0"))
    assert np.array_equal(decode(good[:-12] + late + good[-12:]), turned(6))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_means_nothing_is_ignored(orientation: int) -> None:
    data = saved(Image.fromarray(ORIENTED), "PNG", exif=exif(orientation))
    assert np.array_equal(decode(data), ORIENTED)


# 16 bits


def gradient(bits: int) -> np.ndarray:
    """All values of so many bits, (64, 2**bits / 64) uint16."""
    return np.arange(1 << bits, dtype=np.uint16).reshape(64, -1)


@pytest.mark.parametrize("write", [png, tiff])
@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_the_upper_8_of_the_learned_bits_are_kept(write: Writer, bits: int) -> None:
    image = decode(write(gradient(bits)), bit_depth=bits)
    assert np.array_equal(image[..., 1], gradient(bits) >> (bits - 8))
    assert np.bincount(image[..., 0].ravel()).tolist() == [1 << (bits - 8)] * 256


@pytest.mark.parametrize("write", [png, tiff])
def test_16_bit_colour_keeps_its_channels(write: Writer) -> None:
    deep = picture().astype(np.uint16) << 4  # 12 bits
    assert np.array_equal(decode(write(deep), bit_depth=12), picture())
    assert measured_bit_depth(write(deep)) == 12


def test_a_dark_picture_stays_dark() -> None:
    assert decode(png(gradient(12) // 8), bit_depth=12).max() == 31


def test_no_bit_depth_means_16() -> None:
    assert np.array_equal(decode(png(gradient(16))), decode(png(gradient(16)), bit_depth=16))


def test_values_above_the_learned_bit_depth_are_refused() -> None:
    with pytest.raises(BadImage, match="bit depth differs"):
        decode(png(gradient(14)), bit_depth=12)


@pytest.mark.parametrize("bits", [0, 7, 17])
def test_a_bit_depth_that_is_none_is_the_callers_mistake(bits: int) -> None:
    with pytest.raises(ValueError, match="bit_depth"):
        decode(SEEDS["png_grey16"], bit_depth=bits)


def test_the_bit_depth_does_not_matter_for_8_bit_files() -> None:
    assert np.array_equal(decode(SEEDS["png_colour"], bit_depth=12), picture())


@pytest.mark.parametrize(
    ("highest", "bits"), [(255, 8), (256, 10), (1023, 10), (4095, 12), (4096, 14), (65535, 16)]
)
def test_the_measured_bit_depth_is_the_smallest_that_holds_the_maximum(
    highest: int, bits: int
) -> None:
    assert measured_bit_depth(png(np.array([[0, highest]], np.uint16))) == bits


def test_8_bit_files_measure_8() -> None:
    assert {measured_bit_depth(SEEDS[name]) for name in SEEDS if "16" not in name} == {8}


# Damage


def strict_judge_accepts(file: Damaged) -> bool:
    """What libjpeg-turbo with warnings as errors, or Pillow (libpng's checks, libtiff), says."""
    try:
        if file.name.startswith("jpeg"):
            simplejpeg.decode_jpeg(file.data, strict=True)
            return True
        with Image.open(io.BytesIO(file.data)) as image:
            image.verify()
        with Image.open(io.BytesIO(file.data)) as image:
            image.load()
    except (OSError, ValueError, SyntaxError, TypeError):
        return False
    return True


@pytest.mark.parametrize("file", CORPUS, ids=lambda file: file.name)
def test_a_damaged_file_is_refused_unless_strict_libraries_accept_it_too(file: Damaged) -> None:
    image = decoded_or_none(file.data)
    if image is None:
        return
    assert strict_judge_accepts(file)
    if "16" not in file.name and not file.name.startswith("jpeg"):
        assert np.array_equal(image, pillow(file.data))  # and is the same picture


def test_most_of_the_damaged_files_are_refused() -> None:
    """The rest changed pixels of a format without checksums, or bytes that mean nothing."""
    accepted = [file.name for file in CORPUS if decoded_or_none(file.data) is not None]
    assert len(accepted) < 40
    assert not [name for name in accepted if "truncate" in name or "lose_the_end" in name]


@pytest.mark.parametrize("name", SEEDS)
def test_a_file_cut_anywhere_is_refused(name: str) -> None:
    data = SEEDS[name]
    end = len(data)
    if name.startswith("tiff"):
        end -= 4  # where a directory comes last, these only say that there is no second page
    lengths = {*range(0, end, 37), *range(end - 60, end)}
    assert not [length for length in lengths if decoded_or_none(data[:length]) is not None]


@pytest.mark.parametrize("name", ["png_colour", "png_palette", "png_grey16"])
def test_one_changed_bit_anywhere_in_a_png_is_refused(name: str) -> None:
    for place in range(0, len(SEEDS[name]), 7):
        flipped = bytearray(SEEDS[name])
        flipped[place] ^= 1
        assert decoded_or_none(bytes(flipped)) is None, place


def test_png_pixels_that_run_short_are_refused_though_checksums_match() -> None:
    rows = png_rows(picture())
    packed = zlib.compress(rows)
    for short in (rows[:-1], rows[: -len(rows) // 3], rows[: -picture().shape[1] * 3 - 1], b""):
        assert decoded_or_none(png(picture(), packed=zlib.compress(short))) is None
    for cut in (b"", packed[:-1], packed[:-4], packed[: len(packed) // 2]):
        assert decoded_or_none(png(picture(), packed=cut)) is None


def test_a_png_without_its_header_or_its_pixels_is_refused() -> None:
    good = png(picture())
    assert decoded_or_none(good[:8] + good[33:]) is None
    assert decoded_or_none(good[:33] + good[-12:]) is None
    assert decoded_or_none(good[:8] + png_chunk(b"IHDR", b"\0\0\0\1") + good[33:]) is None


def test_a_missing_tile_is_refused() -> None:
    """cv2 returns such a picture with a black square in it."""
    good = tiff(picture(), tile=16)
    place = good.index(zlib.compress(np.ascontiguousarray(picture()[:16, :16]).tobytes()))
    assert decoded_or_none(good[:place] + bytes(40) + good[place + 40 :]) is None


# Kinds that are refused


@pytest.mark.parametrize(
    "data",
    [
        saved(Image.new("RGB", (6, 4)), "GIF"),
        b"RIFF\x1a\0\0\0WEBPVP8 ",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%PDF-1.7\n",
        b"part 7, left camera",
        b"\0" * 100,
        b"\x89PN",
    ],
)
def test_other_kinds_are_refused_with_what_to_send(data: bytes) -> None:
    with pytest.raises(UnsupportedImage, match="JPEG, PNG, BMP or TIFF"):
        decode(data)


def test_an_empty_body_is_refused() -> None:
    with pytest.raises(BadImage, match="empty"):
        decode(b"")


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_is_refused_with_what_to_do(kind: str) -> None:
    with pytest.raises(UnsupportedImage, match=r"CMYK.*save it as .*RGB"):
        decode(saved(Image.new("CMYK", (8, 8)), kind))


@pytest.mark.parametrize("mode", ["LAB", "F", "I"])
def test_tiff_of_other_colours_and_numbers_is_refused(mode: str) -> None:
    with pytest.raises(UnsupportedImage, match="save it as grey or RGB"):
        decode(saved(Image.new(mode, (8, 8)), "TIFF"))


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.float32, np.float64])
def test_tiff_of_signed_or_float_colours_is_refused(dtype: type[np.generic]) -> None:
    assert decoded_or_none(tiff(picture().astype(dtype))) is None
    assert decoded_or_none(tiff(picture()[..., 0].astype(dtype))) is None


@pytest.mark.parametrize("compression", ["jpeg", "group4"])
def test_tiff_compressions_that_hide_damage_are_refused(compression: str) -> None:
    mode = "1" if compression == "group4" else "RGB"
    with pytest.raises(UnsupportedImage, match="damage goes unnoticed"):
        decode(saved(Image.new(mode, (16, 16)), "TIFF", compression=compression))


def test_16_bit_colour_in_planes_is_refused() -> None:
    """cv2 would read it as if it were interleaved."""
    planes = tiff(picture().astype(np.uint16), planar=2)
    assert decoded_or_none(planes) is None


@pytest.mark.parametrize(("kind", "what"), [("PNG", "animated"), ("TIFF", "several pages")])
def test_more_than_one_picture_is_refused(kind: str, what: str) -> None:
    with pytest.raises(UnsupportedImage, match=what):
        decode(saved(Image.new("RGB", (6, 4), "red"), kind, **ANIMATION))


def test_a_run_length_bmp_is_refused() -> None:
    compressed = bytearray(SEEDS["bmp_palette"])
    struct.pack_into("<I", compressed, 30, 1)
    with pytest.raises(UnsupportedImage, match="run-length"):
        decode(bytes(compressed))


# Limits


def bombs() -> dict[str, bytes]:
    """Headers that claim 30,000 x 30,000 pixels."""
    jpeg = bytearray(SEEDS["jpeg_colour"])
    struct.pack_into(">HH", jpeg, jpeg.index(b"\xff\xc0") + 5, 30_000, 30_000)
    bmp = bytearray(SEEDS["bmp_colour"])
    struct.pack_into("<ii", bmp, 18, 30_000, 30_000)
    tif = bytearray(tiff(picture()))
    directory = struct.unpack_from("<I", tif, 4)[0]
    for entry in (0, 1):  # ImageWidth, ImageLength
        struct.pack_into("<H", tif, directory + 2 + 12 * entry + 8, 30_000)
    packed = zlib.compress(bytes(100_000_000), 9)
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    pixels = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", packed) + png_chunk(b"IEND", b"")
    return {
        "jpeg": bytes(jpeg),
        "bmp": bytes(bmp),
        "tiff": bytes(tif),
        "png": b"\x89PNG\r\n\x1a\n" + pixels,
    }


@pytest.mark.parametrize(("kind", "data"), bombs().items(), ids=bombs())
def test_a_bomb_costs_nothing(kind: str, data: bytes) -> None:
    peak_rss = high_water_mark()
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(ImageTooLarge):
        decode(data)
    seconds = time.process_time() - start
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 0.05, kind
    assert peak < 2_000_000
    assert high_water_mark() - peak_rss < 20_000_000


def high_water_mark() -> int:
    """Bytes of memory that this process has ever held at once."""
    resource = pytest.importorskip("resource", reason="peak memory is read the Unix way")
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024


def test_a_huge_tile_around_a_small_picture_is_refused() -> None:
    data = tiff(picture(), tile=16)
    width_and_length = struct.pack("<HHIHxxHHIH", 322, 3, 1, 16, 323, 3, 1, 16)
    bomb = struct.pack("<HHIHxxHHIH", 322, 3, 1, 60_000, 323, 3, 1, 60_000)
    assert width_and_length in data
    with pytest.raises(ImageTooLarge):
        decode(data.replace(width_and_length, bomb))


def with_entry(data: bytes, tag: int, kind: int, count: int, value: int) -> bytes:
    """A TIFF of `tiff`, whose directory stands last, with one more entry."""
    start = struct.unpack_from("<I", data, 4)[0]
    entries = struct.unpack_from("<H", data, start)[0]
    entry = struct.pack("<HHII", tag, kind, count, value)
    directory = data[start + 2 : start + 2 + 12 * entries] + entry
    return data[:start] + struct.pack("<H", entries + 1) + directory + bytes(4)


def test_a_tile_that_only_libtiff_sees_is_refused() -> None:
    """Found by fuzzing: Pillow skipped entries of unknown types, libtiff unpacked 1.6 GB."""
    for kind in (17, 99):
        hidden = with_entry(tiff(picture()), 322, kind, 1, 60_000)
        with pytest.raises(BadImage, match="directory"):
            decode(with_entry(hidden, 323, kind, 1, 60_000))


def test_tags_that_share_their_bytes_cannot_fill_the_memory() -> None:
    """Pillow 12 copies the bytes of every entry: 500 entries of 4 MB were 2 GB. It sees none."""
    good = tiff(picture())
    start = struct.unpack_from("<I", good, 4)[0]
    many = b"".join(struct.pack("<HHII", 1000 + i, 7, len(good), 0) for i in range(500))
    below = struct.pack("<H", 500) + many + bytes(4)
    moved = good[:start] + below + good[start:]
    moved = moved[:4] + struct.pack("<I", start + len(below)) + moved[8:]
    tracemalloc.start()
    for pointer in (34665, 34853):
        assert np.array_equal(decode(with_entry(moved, pointer, 4, 1, start)), picture())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000


def test_scans_and_chunks_without_end_are_refused() -> None:
    scan = SEEDS["jpeg_colour"].index(b"\xff\xda")
    many_scans = SEEDS["jpeg_colour"][:scan] + SEEDS["jpeg_colour"][scan:-2] * 600 + b"\xff\xd9"
    with pytest.raises(UnsupportedImage, match="scans"):
        decode(many_scans)
    many_chunks = png(picture(), extra=png_chunk(b"teXt", b"") * 200_000)
    with pytest.raises(BadImage, match="chunks"):
        decode(many_chunks)


@pytest.mark.parametrize("name", SEEDS)
def test_limits_are_values_and_inclusive(name: str) -> None:
    data, (height, width, _) = SEEDS[name], picture().shape
    decode(data, ImageLimits(max_bytes=len(data), max_pixels=height * width))
    with pytest.raises(ImageTooLarge, match="bytes"):
        decode(data, ImageLimits(max_bytes=len(data) - 1))
    with pytest.raises(ImageTooLarge, match="pixels"):
        decode(data, ImageLimits(max_pixels=height * width - 1))


def test_limits_travel_through_the_environment_and_through_flags() -> None:
    limits = ImageLimits(64_000_000, 20_000_000)
    assert ImageLimits.read(limits.environment()) == limits
    assert ImageLimits.read({}) == ImageLimits()
    assert ImageLimits.read({"KENSA_MAX_IMAGE_PIXELS": "20000000"}).max_pixels == 20_000_000
    with pytest.raises(BadSettings, match="whole numbers"):
        ImageLimits.read({"KENSA_MAX_IMAGE_PIXELS": "many"})
    parser = ArgumentParser()
    ImageLimits.add_flags(parser)
    asked = vars(parser.parse_args(["--max_image_pixels", "20000000"]))
    assert ImageLimits.of_flags(asked) == ImageLimits(max_pixels=20_000_000)
    assert asked == {}


def test_what_is_too_large_says_which_limit_to_raise() -> None:
    data = png(np.zeros((40, 50), np.uint8))
    for limits, said in (
        (ImageLimits(max_pixels=1999), "KENSA_MAX_IMAGE_PIXELS, or --max_image_pixels"),
        (ImageLimits(max_bytes=20), "KENSA_MAX_IMAGE_BYTES, or --max_image_bytes"),
    ):
        with pytest.raises(ImageTooLarge, match=said):
            decode(data, limits)


def test_a_very_wide_picture_is_too_large_and_not_an_error_of_cv2() -> None:
    with pytest.raises(ImageTooLarge):
        decode(png(np.zeros((2, 70_000), np.uint8)))
    assert load(png(np.zeros((1, 65_535), np.uint8)), 256).shape == (256, 256, 3)


# Resize


def test_load_is_decode_then_resize() -> None:
    for name, data in SEEDS.items():
        assert np.array_equal(load(data, 32), resize(decode(data), 32)), name


def test_shrinking_averages_and_growing_interpolates() -> None:
    for shape, method in [
        ((64, 96), cv2.INTER_AREA),
        ((32, 96), cv2.INTER_AREA),
        ((16, 32), cv2.INTER_LINEAR),
        ((16, 16), cv2.INTER_LINEAR),
    ]:
        image = picture(*shape)
        assert np.array_equal(resize(image, 32), cv2.resize(image, (32, 32), interpolation=method))


def test_an_axis_that_shrinks_is_averaged_also_where_the_other_one_grows() -> None:
    """A streak of 10 pixels in 4,096 x 255, at every place, is as clear as with 256 lines."""
    for start in range(1000, 1064):
        seen = []
        for lines in (255, 256):
            part = np.full((lines, 4096, 3), 120, np.uint8)
            part[:, start : start + 10] = 220
            seen.append(resize(part, 256))
            assert np.array_equal(seen[-1].transpose(1, 0, 2), resize(lying(part), 256))
        assert np.abs(seen[0].astype(int) - seen[1]).max() <= 1, start
        assert seen[0].max() > 120 + 25


def lying(part: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(part.transpose(1, 0, 2))


def test_a_model_without_the_key_sees_what_it_was_trained_on() -> None:
    for shape in [(16, 96), (96, 16), (255, 4096), (64, 96), (16, 16), (32, 7)]:
        image = picture(*shape)
        method = cv2.INTER_AREA if min(shape) >= 32 else cv2.INTER_LINEAR
        as_before = cv2.resize(image, (32, 32), interpolation=method)
        assert np.array_equal(resize(image, 32, None), as_before)
        assert np.array_equal(load(png(image), 32, resizing=None), as_before)


def test_resizing_stretches_to_a_contiguous_square() -> None:
    image = np.zeros((40, 80, 3), np.uint8)
    image[:, 40:] = 200
    square = resize(image, 20)
    assert square.shape == (20, 20, 3)
    assert square.flags.c_contiguous
    assert np.all(square[:, :10] == 0)
    assert np.all(square[:, 10:] == 200)


# Photos


def test_photos_load_as_cv2_loads_them(assets: Path) -> None:
    for path in sorted((assets / "data" / "train" / "alien").glob("*.png"))[:5]:
        plain = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
        assert np.array_equal(decode(path.read_bytes()), plain)
        assert np.array_equal(
            load(path.read_bytes(), 256),
            cv2.resize(plain, (256, 256), interpolation=cv2.INTER_AREA),
        )
        assert decoded_or_none(path.read_bytes()[:-5000]) is None


# ---- limits ----------------------------------------------------------------------------------


# What reads pictures -> how many arguments it has with the limits.
READS = {
    "image.load": 3, "image.decode": 2, "image.read": 2, "decode": 2, "measured_bit_depth": 2,
    "bit_depth_of": 2, "Images": 7,
}  # fmt: skip


def test_nobody_reads_pictures_within_other_limits_than_those_that_were_stated() -> None:
    """The server's settings and the flags of the commands hold for whatever they read."""
    forgotten = []
    for room in ("app", "engines", "workers"):
        for path in (ROOT / room).rglob("*.py"):
            for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(call, ast.Call) or path.parent.name == "image_files":
                    continue
                name = ast.unparse(call.func)
                stated = len(call.args) >= READS.get(name, 0) or any(
                    one.arg == "limits" for one in call.keywords
                )
                is_bound = path.name == "page.py" and name == "decode"  # by a partial
                if name in READS and not stated and not is_bound:
                    forgotten.append(f"{path.relative_to(ROOT)}:{call.lineno} {name}")
    assert forgotten == []


# ---- hints -----------------------------------------------------------------------------------


def test_a_hint_says_what_a_square_of_the_model_loses_and_nothing_of_ordinary_pictures() -> None:
    for width, height in [(129, 129), (516, 129), (2048, 512), (4000, 3000)]:
        assert hint_on(width, height, 256) is None
        assert hint_on(height, width, 256) is None
    small, long, both = (hint_on(*size, 256) for size in [(128, 300), (1300, 300), (4096, 100)])
    assert small is not None
    assert "only 128 x 300" in small
    assert "4:1" not in small
    assert long is not None
    assert "1300 x 300 pixels, longer than 4:1: 5.08 pixels along the longer side" in long
    assert both is not None
    assert "only 4096 x 100" in both
    assert "into tiles" in both


def test_hints_on_many_pictures_are_one_with_how_many() -> None:
    assert hints_in_short({}) is None
    assert hints_in_short({"a": None, "b": None}) is None
    assert hints_in_short({"a": "It is dark."}) == "It is dark."
    found = hints_in_short({"a": None, "b": "It is dark.", "c": "It is long."})
    assert found == "2 of 3 pictures, such as b: It is dark."
