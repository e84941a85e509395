"""Claims about the readers of image files: right or refused, where libraries show what they can."""

from __future__ import annotations

import io
import logging
import struct
import time
import zlib
from contextlib import suppress

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from engines.errors import BadImage, KensaError, UnsupportedImage
from engines.image import decode, kind_of
from support.damage import (
    Damaged,
    big_tiff,
    damaged,
    odd_streams,
    picture,
    png,
    png_chunk,
    png_rows,
    saved,
    tiff,
    tiff_file,
)
from support.mutations import bmp, flat_jpeg, interlaced, mutations, padded, structured_seeds
from support.tiff_forms import tiff_forms

INDICES = np.arange(12, dtype=np.uint8).reshape(3, 4)
COLOURS = np.random.default_rng(1).integers(0, 256, (256, 3), np.uint8)


def refused(data: bytes) -> str:
    """The sentence that refuses a file."""
    with pytest.raises(BadImage) as caught:
        decode(data)
    return str(caught.value)


def refuses(data: bytes) -> bool:
    try:
        decode(data)
    except KensaError:
        return True
    return False


# BMP


def table(colours: np.ndarray) -> bytes:
    """A colour table as BMP has it: blue, green, red, 0."""
    return np.pad(colours[:, ::-1], ((0, 0), (0, 1))).tobytes()


def indexed_bmp(there: int, **options: int) -> bytes:
    """The indices 0 to 11 with a table of so many colours."""
    return bmp(padded(INDICES), (4, 3), 8, table=table(COLOURS[:there]), **options)


def test_a_bmp_shows_the_colours_of_its_table() -> None:
    for colours in (12, 256):
        assert np.array_equal(decode(indexed_bmp(colours, colours=colours)), COLOURS[INDICES])
    assert np.array_equal(decode(indexed_bmp(256)), COLOURS[INDICES])


@pytest.mark.parametrize("colours", [0, 1, 11])
def test_a_bmp_with_an_index_beyond_its_table_is_refused(colours: int) -> None:
    assert "damaged" in refused(indexed_bmp(colours, colours=colours or 1))


@pytest.mark.parametrize("colours", [0, 1, 12, 255])
def test_a_bmp_without_the_table_that_its_header_claims_is_refused(colours: int) -> None:
    assert "damaged" in refused(indexed_bmp(colours))


@pytest.mark.parametrize("offset", [0, 14, 53, 54, 54 + 4 * 256 - 4, 54 + 4 * 256 - 1])
def test_a_bmp_whose_pixels_start_inside_its_header_or_table_is_refused(offset: int) -> None:
    assert "inside its headers or colours" in refused(indexed_bmp(256, offset=offset) + bytes(4096))


@pytest.mark.parametrize("header", [12, 40, 52, 56, 64, 108, 124])
def test_a_bmp_of_24_bits_is_right_with_every_kind_of_header(header: int) -> None:
    rows = padded(picture()[..., ::-1].reshape(41, -1))
    assert np.array_equal(decode(bmp(rows, (53, 41), 24, header=header)), picture())
    inside = bmp(rows, (53, 41), 24, header=header, offset=14 + header - 2) + bytes(64)
    assert "inside its headers" in refused(inside)


def test_a_bmp_of_24_bits_may_claim_a_table_that_it_does_not_have() -> None:
    """Many writers do. Where there is room for the table, pixels inside of it are damage."""
    rows = padded(picture()[..., ::-1].reshape(41, -1))
    assert np.array_equal(decode(bmp(rows, (53, 41), 24, colours=1 << 24)), picture())
    assert np.array_equal(decode(bmp(rows, (53, 41), 24, colours=16)), picture())
    with_table = bmp(rows, (53, 41), 24, colours=16, table=bytes(64))
    assert np.array_equal(decode(with_table), picture())
    inside = bmp(rows, (53, 41), 24, colours=16, table=bytes(64), offset=54)
    assert "inside its headers or colours" in refused(inside)


def test_a_bmp_from_the_top_down_and_one_with_a_gap_before_its_pixels_are_right() -> None:
    rows = padded(picture()[::-1, :, ::-1].reshape(41, -1))
    assert np.array_equal(decode(bmp(rows, (53, -41), 24)), picture())
    gap = bmp(bytes(6) + padded(picture()[..., ::-1].reshape(41, -1)), (53, 41), 24, offset=60)
    assert np.array_equal(decode(gap), picture())


def test_a_bmp_of_16_bits_reaches_from_black_to_white() -> None:
    """cv2 makes 248 of white."""
    words = np.array([[0, 0x7FFF, 0x7C00, 0x001F]], "<u2").view(np.uint8)
    expected = [[[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 0, 255]]]
    assert decode(bmp(padded(words), (4, 1), 16)).tolist() == expected


def test_a_bmp_of_another_width_or_height_than_its_pixels_is_refused() -> None:
    """Two signs are needed: many writers get the size of the pixels wrong, and many cameras pad."""
    good = bmp(padded(picture()[..., ::-1].reshape(41, -1)), (53, 41), 24)
    wrong = good[:34] + b"\x11\x22\0\0" + good[38:]
    photoshop = good[:34] + struct.pack("<I", 41 * 160 + 2) + good[38:] + bytes(2)
    for whole in (good, wrong, good + bytes(512), photoshop):
        assert np.array_equal(decode(whole), picture())
    for size in ((51, 41), (53, 40), (40, 41)):
        assert "do not fit" in refused(good[:18] + struct.pack("<ii", *size) + good[26:])


@pytest.mark.parametrize(
    ("masks", "what"),
    [
        ((0xFF, 0xFF, 0xFF00), "the same bits"),
        ((0x3FF00000, 0xFFC00, 0x3FF), "unusual bits"),
        ((0, 0, 0), "unusual bits"),
    ],
)
def test_a_bmp_with_strange_masks_is_refused(masks: tuple[int, int, int], what: str) -> None:
    strange = bmp(bytes(16), (2, 2), 32, compression=3, masks=struct.pack("<III", *masks))
    assert what in refused(strange)


@pytest.mark.parametrize(
    ("bits", "compression"), [(8, 1), (4, 2), (24, 4), (24, 5), (8, 3), (24, 3), (2, 0), (0, 0)]
)
def test_a_bmp_of_a_form_that_is_not_read_is_refused_in_words(bits: int, compression: int) -> None:
    with pytest.raises(UnsupportedImage, match="save it"):
        decode(bmp(bytes(2048), (4, 4), bits, compression=compression, table=bytes(1024)))


# TIFF


def palette_tiff(bits: int, colours: np.ndarray) -> bytes:
    """The indices 0 to 11 (of what the bits hold) with a colour map (2**bits, 3)."""
    indices = INDICES & ((1 << bits) - 1)
    spread = np.unpackbits(indices[..., None], axis=-1)[..., 8 - bits :].reshape(3, -1)
    body = np.packbits(spread, axis=-1).tobytes()
    tags = {256: [4], 257: [3], 258: [bits], 259: [1], 262: [3], 273: [8], 277: [1], 278: [3],
            279: [len(body)], 320: colours.T.ravel().tolist()}  # fmt: skip
    return tiff_file(body, tags)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_colour_map_of_a_tiff_is_right_in_16_bits_and_where_a_writer_left_it_in_8(
    bits: int,
) -> None:
    colours = COLOURS[: 1 << bits].astype(int)
    expected = COLOURS[INDICES & ((1 << bits) - 1)]
    assert np.array_equal(decode(palette_tiff(bits, colours * 257)), expected)
    assert np.array_equal(decode(palette_tiff(bits, colours * 256)), expected)
    assert np.array_equal(decode(palette_tiff(bits, colours)), expected)


def test_a_tiff_without_the_whole_of_its_colour_map_is_refused() -> None:
    for colours in (COLOURS[:255], COLOURS[:16], COLOURS[:1]):
        assert "palette" in refused(palette_tiff(8, colours))


def test_values_of_a_tiff_that_lie_in_its_header_or_its_directory_are_none() -> None:
    whole = palette_tiff(8, COLOURS.astype(int) * 257)
    (start,) = struct.unpack_from("<I", whole, 4)
    entry = whole.index(struct.pack("<HHI", 320, 3, 768), start)
    for place in (0, 4, 7, start - 1530, start, start + 100):
        assert "directory" in refused(
            whole[: entry + 8] + struct.pack("<I", place) + whole[entry + 12 :]
        )


def test_a_tiff_of_millions_of_samples_is_refused_without_so_much_memory() -> None:
    whole = raw_tiff({277: [1]})
    entry = whole.index(struct.pack("<HHIH", 277, 3, 1, 1))
    many = struct.pack("<HHII", 277, 4, 1, 2**32 - 1)
    assert "channels" in refused(whole[:entry] + many + whole[entry + 12 :])


def raw_tiff(changes: dict[int, list[int]], lost: tuple[int, ...] = ()) -> bytes:
    """A grey picture of 8 x 6 in strips of two rows, with some tags changed and others lost."""
    tags = {256: [8], 257: [6], 258: [8], 259: [1], 262: [1], 273: [8, 24, 40], 277: [1],
            278: [2], 279: [16, 16, 16]} | changes  # fmt: skip
    return tiff_file(bytes(range(48)), {tag: tags[tag] for tag in tags if tag not in lost})


def test_a_tiff_in_strips_is_right_in_every_order_of_these() -> None:
    rows = np.arange(48, dtype=np.uint8).reshape(6, 8)
    assert np.array_equal(decode(raw_tiff({}))[..., 0], rows)
    other = decode(raw_tiff({273: [40, 8, 24]}))[..., 0]
    assert np.array_equal(other, np.concatenate([rows[4:], rows[:4]]))


@pytest.mark.parametrize(
    "changes",
    [
        {273: [8, 24]},  # a strip is missing
        {279: [16, 16]},
        {273: [8, 24, 4000]},  # beyond the end
        {273: [8, 24, 0]},  # inside the header
        {273: [8, 24, 60]},  # inside the directory
        {273: [8, 24, 24]},  # over another one
        {273: [8, 24, 32]},
        {279: [16, 16, 0]},
        {279: [16, 16, 15]},
        {256: [7]},  # rows of another length than the strips hold
        {256: [9]},
        {257: [4]},
        {257: [7]},
        {258: [4]},
        {277: [2]},
        {278: [3]},
        {278: [0]},
        {262: [2]},  # RGB of one channel
        {262: [3]},  # colours of a map that is not there
        {322: [16], 323: [16], 324: [8], 325: [48]},  # strips and tiles
        {256: [8, 8]},
        {258: [8, 8]},
        {284: [3]},
        {338: [2]},  # alpha that is not there
        {266: [2]},
    ],
    ids=str,
)
def test_a_tiff_that_contradicts_itself_is_refused(changes: dict[int, list[int]]) -> None:
    refused(raw_tiff(changes))


@pytest.mark.parametrize("tag", [256, 257, 258, 262, 273, 279])
def test_a_tiff_without_a_tag_that_it_needs_is_refused(tag: int) -> None:
    """Readers guess: without 262, Pillow takes black for white."""
    refused(raw_tiff({}, lost=(tag,)))


def test_a_tiff_of_every_form_that_is_read_is_right_in_both_orders_of_bytes() -> None:
    other = [
        form.name for form in tiff_forms(600) if not np.array_equal(decode(form.data), form.pixels)
    ]
    assert not other


@pytest.mark.parametrize("said", [None, 0, 1, 2])
@pytest.mark.parametrize("planar", [1, 2])
@pytest.mark.parametrize("channels", [2, 4])
def test_a_sample_that_is_no_colour_is_dropped_whatever_a_tiff_says_of_it(
    channels: int, planar: int, said: int | None
) -> None:
    """Four planes of which nothing was said came out as other colours."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, channels), np.uint8)
    planes = np.moveaxis(pixels, 2, 0) if planar == 2 else pixels[None]
    size = planes[0].size
    tags = {256: [6], 257: [5], 258: [8] * channels, 259: [1], 262: [channels // 2],
            273: [8 + size * n for n in range(len(planes))], 277: [channels], 278: [5],
            279: [size] * len(planes), 284: [planar]}  # fmt: skip
    tags |= {} if said is None else {338: [said]}
    colours = pixels[..., : channels - 1].repeat(3 if channels == 2 else 1, axis=2)
    assert np.array_equal(decode(tiff_file(planes.tobytes(), tags)), colours)


def test_deflate_in_a_tiff_must_unpack_to_just_its_rows() -> None:
    good = tiff(picture())
    packed = zlib.compress(picture().tobytes())
    assert good.count(packed) == 1
    for rows in (picture()[:-1], np.concatenate([picture(), picture()[:1]])):
        other = zlib.compress(rows.tobytes())
        tags = {256: [53], 257: [41], 258: [8, 8, 8], 259: [8], 262: [2], 273: [8], 277: [3],
                278: [41], 279: [len(other)]}  # fmt: skip
        assert "does not unpack to its rows" in refused(tiff_file(other, tags))


def test_a_bomb_of_tiles_around_a_flat_picture_is_refused_before_it_is_unpacked() -> None:
    """4,096 tiles of a megapixel each, in 4 MB."""
    tile = zlib.compress(bytes(16 * 60_000), 9)
    tags = {256: [65_535], 257: [200], 258: [8], 259: [8], 262: [1], 277: [1], 322: [16],
            323: [60_000], 324: [8 + len(tile) * n for n in range(4096)],
            325: [len(tile)] * 4096}  # fmt: skip
    start = time.process_time()
    assert "far larger than the picture" in refused(tiff_file(tile * 4096, tags))
    assert time.process_time() - start < 0.5


def test_exif_without_end_costs_nothing() -> None:
    many = directory(*[entry(40_000, 3, 1, 0)] * 5000)
    start = time.process_time()
    decode(with_exif(*[many] * 400))
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_bigtiff_is_read_like_any_other(order: str) -> None:
    grey = np.ascontiguousarray(picture()[..., 0])
    assert np.array_equal(decode(big_tiff(grey, order))[..., 2], grey)
    for cut in (8, 15, 100, len(big_tiff(grey, order)) - 20):
        refused(big_tiff(grey, order)[:cut])


# PNG


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_png_with_an_index_beyond_its_palette_is_refused(bits: int) -> None:
    image = Image.fromarray(picture()).quantize(1 << bits)
    good = saved(image, "PNG", bits=bits)
    start = good.index(b"PLTE") - 4
    length = int.from_bytes(good[start : start + 4], "big")
    body = good[start + 8 : start + 8 + length]
    assert np.array_equal(decode(good), np.asarray(image.convert("RGB")))
    for shorter in (body[:-3], body[:3], body[:-1], b""):
        chunk = png_chunk(b"PLTE", shorter)
        assert "palette" in refused(good[:start] + chunk + good[start + 12 + length :])
    assert "palette" in refused(
        good[:start] + good[start + 12 + length :].replace(b"PLTE", b"tEXt")
    )


def test_chunks_that_are_not_about_pixels_write_no_line_and_refuse_nothing(
    capfd: pytest.CaptureFixture[str],
) -> None:
    strange = b"".join(
        png_chunk(kind, b"\xff\0\7")
        for kind in (b"iCCP", b"gAMA", b"cHRM", b"sBIT", b"tRNS", b"tIME", b"pHYs", b"sRGB",
                     b"hIST", b"bKGD", b"zTXt", b"iTXt", b"caNv", b"eXIf")
    )  # fmt: skip
    deep = picture().astype(np.uint16) << 8
    for pixels in (picture(), picture()[..., 0], deep, deep[..., 0]):
        plain = png(pixels)
        assert np.array_equal(decode(png(pixels, extra=strange)), decode(plain))
        assert np.array_equal(decode(plain[:-12] + strange + plain[-12:]), decode(plain))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("file", odd_streams(), ids=lambda file: file.name)
def test_a_stream_that_is_not_all_the_rows_of_a_png_is_refused(file: Damaged) -> None:
    """libpng shows one with too many rows, or whose own checksum is wrong."""
    assert "damaged" in (said := refused(file.data)) or "cut short" in said


def test_what_stands_behind_the_stream_of_a_png_does_not_matter() -> None:
    """Some writers leave it, and it says nothing of the pixels."""
    packed = zlib.compress(png_rows(picture())) + b"left over"
    assert np.array_equal(decode(png(picture(), packed=packed)), picture())


@pytest.mark.parametrize("level", [0, 1, 9])
@pytest.mark.parametrize("size", [1, 7, 300, 60_000])
def test_a_png_in_chunks_of_any_size_is_the_same_picture(size: int, level: int) -> None:
    pixels = picture(150, 200)  # 90,150 bytes: more than are unpacked together
    packed = zlib.compress(png_rows(pixels), level)
    whole = png(pixels, packed=b"")
    place = whole.index(b"IDAT") - 4
    parts = [packed[start : start + size] for start in range(0, len(packed), size)]
    chunks = b"".join(png_chunk(b"IDAT", part) for part in parts)
    assert np.array_equal(decode(whole[:place] + chunks + whole[place + 12 :]), pixels)


def test_a_png_that_unpacks_to_far_more_than_was_read_is_whole() -> None:
    flat = np.full((900, 1200, 3), 77, np.uint8)
    assert np.array_equal(decode(png(flat)), flat)


@pytest.mark.parametrize("height", [1, 2, 5, 8, 9])
@pytest.mark.parametrize("width", [1, 2, 5, 8, 9])
def test_an_interlaced_png_of_any_size_is_right_and_each_pass_is_proven(
    width: int, height: int
) -> None:
    """Small ones lack some of the seven passes."""
    pixels = picture(height, width)
    data = interlaced(pixels)
    assert np.array_equal(decode(data), pixels)
    start = data.index(b"IDAT") + 4
    rows = zlib.decompress(data[start:-16])
    for broken in (rows[:-1], rows + b"\0", b"\5" + rows[1:]):
        body = png_chunk(b"IDAT", zlib.compress(broken))
        assert "damaged" in refused(data[: start - 8] + body + data[-12:])


def test_no_damage_makes_a_library_write_a_line_of_its_own(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The log of a server has one format, and a camera's cable may break a thousand parts."""
    every = [*damaged(), *odd_streams()]
    for kind in ("jpeg", "png", "bmp", "tiff"):
        every += mutations(kind, 150)
    read = [None for file in every if not refuses(file.data)]
    assert len(read) < len(every) / 2
    assert capfd.readouterr() == ("", "")


# JPEG


def scans(data: bytes) -> list[bytes]:
    """The file up to its first scan, and each scan with the tables behind it."""
    first, *others = data[:-2].split(b"\xff\xda")
    return [first, *(b"\xff\xda" + scan for scan in others)]


@pytest.mark.parametrize(
    "name", ["jpeg_progressive", "jpeg_progressive_444", "jpeg_progressive_grey"]
)
def test_a_progressive_jpeg_without_any_of_its_scans_is_refused(name: str) -> None:
    """libjpeg warns of nothing: the picture is only blurred."""
    head, *parts = scans(structured_seeds("jpeg")[name])
    assert len(parts) > 4
    decode(head + b"".join(parts) + b"\xff\xd9")
    for kept in range(1, len(parts)):
        refused(head + b"".join(parts[:kept]) + b"\xff\xd9")
    for lost in range(len(parts)):
        refused(head + b"".join(parts[:lost] + parts[lost + 1 :]) + b"\xff\xd9")


def test_a_sequential_jpeg_without_the_scan_of_a_component_is_refused() -> None:
    grey = saved(Image.fromarray(picture()).convert("L"), "JPEG")
    start = grey.index(b"\xff\xc0")
    header = grey[start + 4 : start + 9] + b"\3\1\x11\0\2\x11\0\3\x11\0"
    three = grey[:start] + b"\xff\xc0\0\x11" + header + grey[start + 13 :]
    assert simplejpeg.decode_jpeg(three, strict=True).shape == (41, 53, 3)  # and says nothing
    assert "scans are missing" in refused(three)


@pytest.mark.parametrize("sampling", [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4)])
def test_a_jpeg_of_every_usual_sampling_and_these_turned_is_decoded(
    sampling: tuple[int, int],
) -> None:
    data = flat_jpeg(*sampling)
    with Image.open(io.BytesIO(data)) as image:
        theirs = np.asarray(image)
    assert theirs.std() > 10
    assert np.abs(decode(data).astype(int) - theirs).max() <= 2


@pytest.mark.parametrize("sampling", [(3, 1), (1, 3)])
def test_a_jpeg_of_another_sampling_is_refused_in_words(
    sampling: tuple[int, int],
) -> None:
    with pytest.raises(UnsupportedImage, match="save it with 4:4:4"):
        decode(flat_jpeg(*sampling))


@pytest.mark.parametrize("marker", [0xC9, 0xCA])
def test_a_jpeg_whose_code_hides_damage_is_refused_in_words(marker: int) -> None:
    """libjpeg shows a picture of an arithmetic scan that is empty, and warns of nothing."""
    good = saved(Image.fromarray(picture()), "JPEG")
    head = bytearray(good[: good.index(b"\xff\xda") + 14])
    head[head.index(b"\xff\xc0") + 1] = marker
    assert "arithmetically" in refused(bytes(head) + b"\xff\xd9")


@pytest.mark.parametrize("marker", [0xC3, 0xC5, 0xC6, 0xC7, 0xCB, 0xCD, 0xCE, 0xCF])
def test_a_lossless_or_hierarchical_jpeg_is_refused_in_words(marker: int) -> None:
    good = structured_seeds("jpeg")["jpeg_444"]
    with pytest.raises(UnsupportedImage, match="save it as a plain JPEG"):
        decode(good.replace(b"\xff\xc0", bytes([0xFF, marker])))
    with pytest.raises(UnsupportedImage, match="12 bits a channel"):
        decode(good.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc1\0\x11\x0c"))


# EXIF


def entry(tag: int, kind: int, count: int, value: int) -> bytes:
    packed = struct.pack("<H2x", value) if kind == 3 else struct.pack("<I", value)
    return struct.pack("<HHI", tag, kind, count) + packed


TURN = entry(274, 3, 1, 6)
HEAD = b"II*\0\x08\0\0\0"


def directory(*entries: bytes, count: int | None = None, end: bytes = bytes(4)) -> bytes:
    number = len(entries) if count is None else count
    return HEAD + struct.pack("<H", number) + b"".join(entries) + end


TURNED = {
    "plain": directory(TURN),
    "of another type": directory(entry(274, 4, 1, 6)),
    "in one byte": directory(entry(274, 1, 1, 6)),
    "more entries than there are": directory(TURN, count=9),
    "cut behind it": directory(TURN, entry(282, 5, 1, 4000), count=5, end=b""),
    "twice the same": directory(TURN, TURN),
    "another tag twice": directory(entry(271, 2, 4, 7), entry(271, 2, 4, 7), TURN),
    "empty entries": directory(TURN, bytes(12), bytes(12)),
    "an unknown type": directory(entry(40000, 0, 200, 0), TURN),
    "UTF-8 of Exif 3.0": directory(entry(270, 129, 137, 38), TURN),
    "a type beyond all": directory(entry(40000, 65535, 2, 2), TURN),
    "a value outside": directory(entry(271, 2, 5000, 8), TURN),
    "a count beyond the segment": directory(entry(37510, 7, 70_000, 8), TURN),
    "a directory further back": b"II*\0\x10\0\0\0" + bytes(8) + directory(TURN)[8:],
    "big-endian": b"MM\0*\0\0\0\x08\0\1" + struct.pack(">HHIHxx", 274, 3, 1, 6) + bytes(4),
    "beside one that means nothing": directory(entry(274, 3, 1, 0), TURN),
    "a second directory": directory(TURN, end=struct.pack("<I", 26)) + b"\0\0" + bytes(4),
}
AS_STORED = {
    "nothing": b"",
    "a header": HEAD,
    "zeros": bytes(40),
    "no header": b"camera:basler;gain=3" + bytes(20),
    "a directory at 0": b"II*\0" + bytes(4),
    "a directory beyond": b"II*\0\0\x10\0\0" + bytes(30),
    "an empty directory": directory(),
    "a number that means nothing": directory(entry(274, 3, 1, 9)),
    "a list of orientations": directory(entry(274, 3, 2, 6)),
    "words": directory(entry(274, 2, 1, 6)),
}


def with_exif(*contents: bytes, extra: int = 0) -> bytes:
    """A JPEG with EXIF segments, which claim to be `extra` bytes longer than they are."""
    jpeg = saved(Image.fromarray(picture()), "JPEG", quality=95)
    segments = [
        b"\xff\xe1" + struct.pack(">H", 8 + len(content) + extra) + b"Exif\0\0" + content
        for content in contents
    ]
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


@pytest.mark.parametrize("name", TURNED)
def test_an_orientation_that_can_be_read_turns_the_picture_whatever_else_exif_holds(
    name: str,
) -> None:
    upright = np.rot90(decode(with_exif()), -1)
    assert np.array_equal(decode(with_exif(TURNED[name])), upright)
    lossless = png(picture(), extra=png_chunk(b"eXIf", TURNED[name]))
    assert np.array_equal(decode(lossless), np.rot90(picture(), -1))


@pytest.mark.parametrize("name", AS_STORED)
def test_exif_without_an_orientation_that_can_be_read_leaves_the_picture_as_it_is(
    name: str,
) -> None:
    assert np.array_equal(decode(with_exif(AS_STORED[name])), decode(with_exif()))
    lossless = png(picture(), extra=png_chunk(b"eXIf", AS_STORED[name]))
    assert np.array_equal(decode(lossless), picture())


def test_only_two_different_orientations_are_refused() -> None:
    other = directory(entry(274, 3, 1, 3))
    assert "which side is up" in refused(with_exif(directory(TURN, entry(274, 3, 1, 1))))
    assert "which side is up" in refused(with_exif(directory(TURN), other))
    again = with_exif(directory(TURN), directory(), directory(TURN))
    assert np.array_equal(decode(again), np.rot90(decode(with_exif()), -1))


@pytest.mark.parametrize("extra", [1, 2, 3, 10, 17, 18])
def test_exif_that_claims_to_reach_into_the_note_behind_it_is_put_right(extra: int) -> None:
    """A program that shortens EXIF and not its length leaves such files."""
    assert np.array_equal(
        decode(with_exif(directory(TURN), extra=extra)), np.rot90(decode(with_exif()), -1)
    )


@pytest.mark.parametrize("extra", [-30, -2, 19, 40, 60_000])
def test_exif_that_claims_to_reach_over_what_makes_the_picture_is_damage(extra: int) -> None:
    refused(with_exif(directory(TURN), extra=extra))


# Other kinds


@pytest.mark.parametrize(
    ("start", "kind", "advice"),
    [
        (b"RIFF\x1a\0\0\0WEBPVP8 ", "WebP", "save it as a JPEG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC", "set the camera to JPEG"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0", "HEIC", "set the camera to JPEG"),
        (b"\0\0\0\x18ftypavif\0\0\0\0", "AVIF", "save it as a JPEG"),
        (b"GIF89a\1\0\1\0", "GIF", "save it as a JPEG"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000", "save it as a JPEG"),
        (b"\xff\x0a\x12\x34", "JPEG XL", "save it as a JPEG"),
        (b"%PDF-1.7\n", "PDF", "send the picture in it"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG", "save it as a JPEG"),
        (b"PK\3\4\x14\0", "zip", "send one JPEG"),
        (b"\x1f\x8b\x08\0", "gzip", "as it is"),
        (b"data:image/png;base64,iVBORw0KGgo", "base64", "send the bytes"),
        (b"/9j/4AAQSkZJRg", "base64", "send the bytes"),
    ],
)
def test_each_kind_that_is_not_read_is_named_and_says_what_to_do(
    start: bytes, kind: str, advice: str
) -> None:
    assert kind_of(start + bytes(40)) == kind
    with pytest.raises(UnsupportedImage, match=advice) as caught:
        decode(start + bytes(40))
    assert kind in str(caught.value)


# What nobody foresaw


@pytest.mark.parametrize("error", [KeyError(6), RuntimeError("!"), AttributeError("?")])
def test_whatever_a_library_raises_refuses_the_picture_and_says_so_in_the_log(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(simplejpeg, "decode_jpeg", fails)
    with caplog.at_level(logging.ERROR), pytest.raises(BadImage, match="damaged, or of a form"):
        decode(structured_seeds("jpeg")["jpeg_444"])
    assert [record.message for record in caplog.records if record.exc_info]


def test_a_machine_without_memory_is_no_damaged_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(simplejpeg, "decode_jpeg", fails)
    with pytest.raises(MemoryError):
        decode(structured_seeds("jpeg")["jpeg_444"])


def test_every_refusal_is_a_sentence() -> None:
    for kind in ("jpeg", "png", "bmp", "tiff"):
        for data in structured_seeds(kind).values():
            with pytest.raises(KensaError) as caught:
                decode(data[: len(data) // 3])
            assert str(caught.value).endswith(".")


def test_libtiff_says_nothing_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    """A line that no log knows, for each damaged part."""
    whole = saved(Image.fromarray(picture(80, 64)), "TIFF", compression="tiff_lzw")
    refusals = 0
    for place in range(8, 2000, 40):
        with suppress(BadImage):
            decode(whole[:place] + b"\xff\xff\xff" + whole[place + 3 :])
            continue
        refusals += 1
    assert refusals
    assert capfd.readouterr() == ("", "")


def test_how_many_pixels_a_tiff_may_have_is_said_by_the_limits_alone() -> None:
    """Pillow's own limit, 179 million, is below what KENSA_MAX_IMAGE_PIXELS may be set to."""
    assert Image.MAX_IMAGE_PIXELS is None
