"""Image files with a structure that says something else: headers, tables, offsets and lengths.

Unlike `support.damage`, whose bytes are damaged anywhere, each file here is changed in a field that
a decoder decides by, and checksums are made right again. The same on every machine.
"""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from support.damage import Damaged, picture, png, png_chunk, png_rows, saved, seeds, tiff

Seeds = dict[str, bytes]


def mutations(kind: str, count: int) -> Iterator[Damaged]:
    """`count` files of a kind ("jpeg", "png", "bmp" or "tiff"), one to three changes in each."""
    good = list(structured_seeds(kind).items())
    for number in range(count):
        name, data = good[number % len(good)]
        chance = random.Random(f"{kind}-{number}")
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            data = _MUTATE[kind](data, chance)
        yield Damaged(f"{name}-{number}", data)


def structured_seeds(kind: str) -> Seeds:
    """Good files of a kind: those of `support.damage`, and the rarer forms of each."""
    ours = {name: data for name, data in seeds().items() if name.startswith(kind)}
    return ours | {"jpeg": _jpegs, "png": _pngs, "bmp": _bmps, "tiff": _tiffs}[kind]()


def _jpegs() -> Seeds:
    colour = Image.fromarray(picture())
    exif = Image.Exif()
    exif[274] = 6
    return {
        "jpeg_411": flat_jpeg(4, 1),
        "jpeg_411_turned": flat_jpeg(1, 4),
        "jpeg_444": saved(colour, "JPEG", subsampling=0),
        "jpeg_422_exif": saved(colour, "JPEG", subsampling=1, exif=exif),
        "jpeg_progressive_444": saved(colour, "JPEG", progressive=True, subsampling=0),
        "jpeg_progressive_grey": saved(colour.convert("L"), "JPEG", progressive=True),
    }


def _codes(data: bytes, wanted: int) -> dict[int, str]:
    """The Huffman code of each symbol, as bits, by the table of that class and number."""
    position = 2
    while data[position + 1] != 0xDA:
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        if data[position + 1] == 0xC4 and data[position + 4] == wanted:
            counts, symbols = data[position + 5 : position + 21], data[position + 21 :]
            found, code, number = {}, 0, 0
            for bits, count in enumerate(counts, 1):
                for _ in range(count):
                    found[symbols[number]] = f"{code:0{bits}b}"
                    code, number = code + 1, number + 1
                code <<= 1
            return found
        position += 2 + length
    raise AssertionError(f"no table {wanted}")


def flat_jpeg(across: int, down: int) -> bytes:
    """48 x 64 pixels of flat blocks; luma is sampled `across` x `down` as often as the colours."""
    model = saved(Image.new("RGB", (48, 64)), "JPEG", subsampling=0)
    frame, scan = model.index(b"\xff\xc0"), model.index(b"\xff\xda")
    head = bytearray(model[: scan + 14])
    head[frame + 11] = across << 4 | down
    bits, before = "", [0, 0, 0]
    levels = np.random.default_rng(0).integers(-60, 60, 1000).tolist()
    for _ in range(-(-48 // (8 * across)) * -(-64 // (8 * down))):
        for component in (*[0] * (across * down), 1, 2):
            level = levels.pop()
            bits += _block(model, component, level - before[component])
            before[component] = level
    bits += "1" * (-len(bits) % 8)
    body = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    return bytes(head) + body + b"\xff\xd9"


def _block(model: bytes, component: int, step: int) -> str:
    """A block of one level, as bits: how far it is from the one before, and an end."""
    number = 0 if component == 0 else 1
    size = abs(step).bit_length()
    value = step if step > 0 else step + (1 << size) - 1
    level = _codes(model, number)[size] + (f"{value:0{size}b}" if size else "")
    return level + _codes(model, 0x10 + number)[0]


def _pngs() -> Seeds:
    colour = Image.fromarray(picture())
    return {
        "png_palette4": saved(colour.quantize(9), "PNG", bits=4),
        "png_palette2": saved(colour.quantize(3), "PNG", bits=2),
        "png_transparent": saved(colour.quantize(50), "PNG", transparency=3),
        "png_grey_alpha": saved(colour.convert("LA"), "PNG"),
        "png_interlaced": interlaced(picture()),
    }


def interlaced(pixels: np.ndarray) -> bytes:
    """An RGB PNG in Adam7's seven passes; Pillow and cv2 write none."""
    passes = (
        (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
        (0, 1, 1, 2),
    )  # fmt: skip
    parts = (pixels[y::dy, x::dx] for x, y, dx, dy in passes)
    packed = zlib.compress(b"".join(png_rows(part) for part in parts if part.size))
    plain = png(pixels, packed=packed)
    header = plain[16:28] + b"\1"
    return plain[:8] + png_chunk(b"IHDR", header) + plain[33:]


def bmp(
    pixels: bytes,
    size: tuple[int, int],
    bits: int,
    *,
    header: int = 40,
    table: bytes = b"",
    colours: int = 0,
    compression: int = 0,
    masks: bytes = b"",
    offset: int | None = None,
) -> bytes:
    """A BMP of any form; `pixels` are its padded rows, `size` is width and height (or less than 0).

    `header` bytes long is its second header, and `masks` stand behind one of 40.
    """
    width, height = size
    if header == 12:
        second = struct.pack("<IHHHH", 12, width, height, 1, bits)
    else:
        fields = (header, width, height, 1, bits, compression, len(pixels), 2835, 2835, colours, 0)
        second = struct.pack("<IiiHHIIiiII", *fields) + (masks if header > 40 else b"")
        second = second.ljust(header, b"\0") + (masks if header == 40 else b"")
    place = 14 + len(second) + len(table)
    start = place if offset is None else offset
    return struct.pack("<2sIHHI", b"BM", place + len(pixels), 0, 0, start) + second + table + pixels


def padded(rows: np.ndarray) -> bytes:
    """Rows (H, bytes) as BMP has them: from the bottom up, each a multiple of four bytes."""
    return np.pad(rows[::-1], ((0, 0), (0, -rows.shape[1] % 4))).tobytes()


def _bmps() -> Seeds:
    pixels = picture()
    height, width, _ = pixels.shape
    bgr = padded(pixels[..., ::-1].reshape(height, -1))
    four = np.dstack([pixels[..., ::-1], np.full((height, width), 9, np.uint8)])
    red, green, blue = (pixels[..., channel].astype(np.uint16) for channel in range(3))
    words = (red >> 3 << 10 | green >> 3 << 5 | blue >> 3).astype("<u2").view(np.uint8)
    sixes = (red >> 3 << 11 | green >> 2 << 5 | blue >> 3).astype("<u2").view(np.uint8)
    indices = pixels[..., 0] % 16
    nibbles = np.pad(indices, ((0, 0), (0, width % 2)))
    nibbles = nibbles[:, ::2] << 4 | nibbles[:, 1::2]
    table = bytes(random.Random(0).randbytes(64))
    return {
        "bmp_core": bmp(bgr, (width, height), 24, header=12),
        "bmp_core_palette": bmp(padded(nibbles), (width, height), 4, header=12, table=table[:48]),
        "bmp_4": bmp(padded(nibbles), (width, height), 4, table=table),
        "bmp_top_down": bmp(bgr, (width, -height), 24),
        "bmp_v4": bmp(bgr, (width, height), 24, header=108),
        "bmp_v5": bmp(bgr, (width, height), 24, header=124),
        "bmp_few_colours": bmp(
            padded(indices), (width, height), 8, table=table, colours=16
        ),
        "bmp_32": bmp(padded(four.reshape(height, -1)), (width, height), 32),
        "bmp_32_masks": bmp(
            padded(four.reshape(height, -1)), (width, height), 32, compression=3,
            masks=struct.pack("<III", 0xFF0000, 0xFF00, 0xFF),
        ),
        "bmp_555": bmp(padded(words), (width, height), 16),
        "bmp_565": bmp(
            padded(sixes), (width, height), 16, compression=3,
            masks=struct.pack("<III", 0xF800, 0x7E0, 0x1F),
        ),
    }  # fmt: skip


def _tiffs() -> Seeds:
    colour = Image.fromarray(picture())
    grey, few = colour.convert("L"), colour.quantize(16)
    strips = {278: 8}
    seen_through = Image.fromarray(np.dstack([picture(), picture()[..., 0] | 1]))
    return {
        "tiff_palette": saved(few, "TIFF"),
        "tiff_strips": saved(colour, "TIFF", tiffinfo=strips, compression="tiff_lzw"),
        "tiff_raw_strips": saved(grey, "TIFF", tiffinfo=strips),
        "tiff_bilevel": saved(colour.convert("1"), "TIFF"),
        "tiff_planes": tiff(np.ascontiguousarray(picture())),
        "tiff_turned": tiff(picture(), orientation=6),
        "tiff_alpha": saved(seen_through, "TIFF", compression="tiff_lzw"),
        "tiff_associated": tiff(np.asarray(seen_through), extra=1),
        "tiff_alpha16": tiff(np.asarray(seen_through).astype(np.uint16) * 257),
        "tiff_associated16": tiff(np.asarray(seen_through).astype(np.uint16) * 257, extra=1),
        "tiff_grey_alpha": saved(seen_through.convert("LA"), "TIFF"),
    }


# ---- what is changed ----------------------------------------------------------------------------


def _other(value: int, bits: int, chance: random.Random) -> int:
    """Another value for a field of so many bits: near it, or one that means something."""
    near = (value + 1, value - 1, value + 4, value - 4, value * 2, value // 2, value + 2, value ^ 3)
    known = (0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 14, 16, 24, 32, 40, 64, 100, 255, 256, 257, 1024, 32773,
             65535, 1 << 31, (1 << 32) - 1)  # fmt: skip
    return chance.choice((*near, *known, chance.getrandbits(bits))) & ((1 << bits) - 1)


def _poke(data: bytes, place: int, form: str, chance: random.Random) -> bytes:
    """`data` with another value in the field at `place`."""
    changed = bytearray(data)
    if place + struct.calcsize(form) <= len(data):
        (value,) = struct.unpack_from(form, data, place)
        struct.pack_into(form, changed, place, _other(value, 8 * struct.calcsize(form), chance))
    return bytes(changed)


def _bmp(data: bytes, chance: random.Random) -> bytes:
    how = chance.randrange(10)
    if how < 7:  # a field of the headers
        place, form = chance.choice(
            ((2, "<I"), (10, "<I"), (10, "<I"), (14, "<I"), (18, "<I"), (22, "<I"), (26, "<H"),
             (28, "<H"), (30, "<I"), (34, "<I"), (46, "<I"), (46, "<I"), (50, "<I"), (54, "<I"),
             (58, "<I"), (62, "<I"), (18, "<H"), (20, "<H"), (22, "<H"), (24, "<H"))
        )  # fmt: skip
        return _poke(data, place, form, chance)
    place = chance.randrange(14, min(len(data), 1100))
    if how == 7:  # the table, or what stands for it, is shorter
        return data[:place] + data[place + chance.choice((1, 2, 4, 40, 64, 1024)) :]
    if how == 8:  # or longer
        return data[:place] + bytes(chance.choice((1, 2, 4, 16))) + data[place:]
    changed = bytearray(data)
    changed[place] = chance.randrange(256)
    return bytes(changed)


def _png(data: bytes, chance: random.Random) -> bytes:
    chunks = _chunks(data)
    number = chance.randrange(len(chunks))
    kind, body = chunks[number]
    how = chance.randrange(12)
    if how < 4:
        chunks[0] = chunks[0][0], _png_header(chunks[0][1], chance)
    elif how == 4:
        del chunks[number]
    elif how == 5:
        chunks.insert(chance.randrange(len(chunks)), (kind, body))
    elif how == 6:
        other = chance.randrange(len(chunks))
        chunks[number], chunks[other] = chunks[other], chunks[number]
    elif how == 7:
        chunks[number] = kind, body[: chance.randrange(len(body) + 1)]
    elif how == 8:
        chunks[number] = kind, body + chance.randbytes(chance.randint(1, 9))
    elif how == 9:
        chunks[number] = bytes([*kind[:3], chance.choice(b"TEaRX")]), body
    elif how == 10:
        chunks = [
            (kind, _other_rows(body, chance) if kind == b"IDAT" else body) for kind, body in chunks
        ]
    else:
        chunks = [
            (kind, _shorter(body, chance) if kind == b"PLTE" else body) for kind, body in chunks
        ]
    written = data[:8] + b"".join(png_chunk(kind, body) for kind, body in chunks)
    if chance.random() < 0.1:  # a length, whose checksum does not cover it
        return _poke(written, chance.choice((8, 33)), ">I", chance)
    return written


def _chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    found, position = [], 8
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        found.append((kind, data[position + 8 : position + 8 + length]))
        position += 12 + length
    return found or [(b"IHDR", b"")]


def _png_header(body: bytes, chance: random.Random) -> bytes:
    place, form = chance.choice(
        ((0, ">I"), (4, ">I"), (8, "B"), (9, "B"), (10, "B"), (11, "B"), (12, "B"))
    )
    return _poke(body, place, form, chance)


def _other_rows(body: bytes, chance: random.Random) -> bytes:
    """Other bytes in the unpacked rows, or more or fewer of them; a right stream all the same."""
    try:
        rows = bytearray(zlib.decompress(body))
    except zlib.error:
        return body
    for _ in range(chance.randint(1, 40)):
        if rows:
            rows[chance.randrange(len(rows))] = chance.randrange(256)
    rows = rows[: len(rows) - chance.choice((0, 0, 1, 100))] + bytes(
        chance.choice((0, 0, 0, 1, 99))
    )
    return zlib.compress(bytes(rows))


def _shorter(body: bytes, chance: random.Random) -> bytes:
    return body[
        : chance.choice((3 * chance.randrange(len(body) // 3 + 1), chance.randrange(len(body) + 1)))
    ]


def _jpeg(data: bytes, chance: random.Random) -> bytes:
    segments, scans = _segments(data)
    number = chance.randrange(len(segments))
    how = chance.randrange(12)
    if how == 0:
        del segments[number]
    elif how == 1:
        segments.insert(chance.randrange(len(segments)), segments[number])
    elif how == 2:
        other = chance.randrange(len(segments))
        segments[number], segments[other] = segments[other], segments[number]
    elif how == 3:  # a length
        segments[number] = _poke(segments[number], 2, ">H", chance)
    elif how < 8 and len(segments[number]) > 4:  # a field of a header or table
        place = chance.randrange(4, min(24, len(segments[number])))
        segments[number] = _poke(segments[number], place, "B", chance)
    elif how == 8 and len(scans) > 1:
        del scans[chance.randrange(len(scans))]
    elif how == 9 and scans:
        scans = scans[: chance.randrange(len(scans) + 1)]
    elif how == 10 and scans:  # the header of a scan
        one = chance.randrange(len(scans))
        scans[one] = _poke(scans[one], chance.randrange(2, min(16, len(scans[one]))), "B", chance)
    elif scans:
        one = chance.randrange(len(scans))
        scans[one] = scans[one][: chance.randrange(4, len(scans[one]) + 1)]
    return b"\xff\xd8" + b"".join(segments) + b"".join(scans) + b"\xff\xd9"


def _segments(data: bytes) -> tuple[list[bytes], list[bytes]]:
    """The segments before the first scan; the scans, each with the tables in front of it."""
    place = data.find(b"\xff\xda")
    head, tail = (data[2:place], data[place:-2]) if place > 0 else (data[2:-2], b"")
    segments, position = [], 0
    while position < len(head):
        end = max(
            position + 2 + int.from_bytes(head[position + 2 : position + 4], "big"), position + 4
        )
        segments.append(head[position:end])
        position = end
    scans = [b"\xff\xda" + one for one in tail.split(b"\xff\xda")[1:]]
    return segments or [b"\xff\xfe\0\2"], scans


def _tiff(data: bytes, chance: random.Random) -> bytes:
    order = "<" if data[:2] == b"II" else ">"
    start = int.from_bytes(data[4:8], "little" if order == "<" else "big")
    count = int.from_bytes(data[start : start + 2], "little" if order == "<" else "big")
    entry = start + 2 + 12 * chance.randrange(max(1, count))
    how = chance.randrange(14)
    if how < 5:  # a value, or where the values stand
        return _poke(data, entry + 8, chance.choice((f"{order}H", f"{order}I")), chance)
    if how < 7:
        return _poke(data, entry + 4, f"{order}I", chance)
    if how < 8:
        return _poke(data, entry + 2, f"{order}H", chance)
    if how < 9:
        return _poke(data, entry, f"{order}H", chance)
    if how < 10:
        return _poke(data, start, f"{order}H", chance)
    if how < 11:
        return _poke(data, 4, f"{order}I", chance)
    if how < 12:
        return _poke(data, start + 2 + 12 * count, f"{order}I", chance)
    if how < 13:  # the values that an entry points to
        (place,) = struct.unpack_from(f"{order}I", data.ljust(entry + 12, b"\0"), entry + 8)
        return _poke(data, place + 2 * chance.randrange(8), f"{order}H", chance)
    return (
        data[:entry] + data[entry + 12 :]
        if chance.random() < 0.5
        else data[: -chance.randint(1, 99)]
    )


_MUTATE: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "jpeg": _jpeg,
    "png": _png,
    "bmp": _bmp,
    "tiff": _tiff,
}
