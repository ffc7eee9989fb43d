"""Damage image files: change bytes anywhere, and put false values into the fields that matter.

Checksums of PNG chunks stay valid, as do the lengths of JPEG segments, TIFF entries, and WebP, AVIF and JPEG 2000
boxes, so that the damage reaches the decoders.
"""

from __future__ import annotations

import functools
import random
import struct
import zlib
from collections.abc import Callable, Sequence

EXTREMES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
MANY = 80 << 20  # bytes in a zlib bomb; Pillow's limit for texts is 64 MiB
# The first five formats, in which most untrusted files come, are drawn three times as often.
KINDS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF") * 3 + ("BMP", "PPM", "JPEG2000", "AVIF")
PNG_CHUNKS = (b"PLTE tRNS gAMA cHRM pHYs sRGB eXIf acTL fcTL fdAT zTXt iTXt iCCP IHDR IDAT IEND CgBI ABCD").split()


def mutated(files: Sequence[tuple[str, bytes]], draw: random.Random) -> tuple[str, str, bytes]:
    """Draw one of the files and change it one to three times; return its format, the changes, and its bytes.

    Args:
        files: (format, bytes) of whole files.
    """
    kind = draw.choice(KINDS)
    data = draw.choice([data for own, data in files if own == kind])
    chosen = draw.choices([*GENERAL, *STRUCTURED[kind]], k=draw.choice((1, 1, 1, 2, 3)))
    for mutate in chosen:
        data = mutate(data, draw) or data
    return kind, "+".join(mutate.__name__ for mutate in chosen), data


# Any format


def bits(data: bytes, draw: random.Random) -> bytes:
    """Flip a few bits."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 3, 10, 100))):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def cut_short(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(1, len(data))]


def piece(data: bytes, draw: random.Random) -> bytes:
    """Remove, double or blank a piece of the file, or replace it with noise."""
    start = draw.randrange(len(data))
    end = min(len(data), start + draw.choice((1, 2, 4, 8, 64, 1024)))
    old = data[start:end]
    new = draw.choice((b"", old * 2, bytes(len(old)), b"\xff" * len(old), draw.randbytes(len(old)), draw.randbytes(9)))
    return data[:start] + new + data[end:]


def header(data: bytes, draw: random.Random) -> bytes:
    """Set a number near the start to an extreme or random value."""
    return _with_number(data, draw.randrange(min(len(data), 80)), draw.choice((1, 2, 4)), draw)


def number(data: bytes, draw: random.Random) -> bytes:
    """Set a number anywhere to an extreme or random value."""
    return _with_number(data, draw.randrange(len(data)), draw.choice((1, 2, 4, 8)), draw)


def tail(data: bytes, draw: random.Random) -> bytes:
    """Append bytes to the end of the file."""
    return data + draw.choice((data, bytes(5000), draw.randbytes(5000), b"\xff" * 5000))


GENERAL: tuple[Callable, ...] = (bits, cut_short, piece, header, number, tail)


# PNG


def png_chunk(data: bytes, draw: random.Random) -> bytes | None:
    """Damage a chunk and give it a valid checksum."""
    return _with_chunks(data, lambda chunks: _damage_one(chunks, draw))


def png_order(data: bytes, draw: random.Random) -> bytes | None:
    return _with_chunks(data, lambda chunks: _reorder(chunks, draw))


def png_extra(data: bytes, draw: random.Random) -> bytes | None:
    """Insert a chunk that readers interpret, filled with a zlib bomb or nonsense."""
    bomb = _bomb()
    body = draw.choice((b"", b"k", b"k\0\0", draw.randbytes(40), bytes(300), b"\xff" * 33))
    name, body = draw.choice(
        [
            (b"zTXt", b"k\0\0" + bomb),
            (b"iTXt", b"k\0\1\0\0\0" + bomb),
            (b"iCCP", b"k\0\0" + bomb),
            (b"tEXt", b"k\0" + bytes(5_000_000)),
            *((other, body) for other in PNG_CHUNKS),
        ]
    )
    return _with_chunks(data, lambda chunks: chunks.insert(draw.randrange(1, max(2, len(chunks))), (name, body)))


def png_pixels(data: bytes, draw: random.Random) -> bytes | None:
    """Change the pixel data, so that it unpacks to other values, or to more or fewer than the header says."""

    def change(chunks: list) -> None:
        raw = bytearray(zlib.decompress(b"".join(body for name, body in chunks if name == b"IDAT")))
        for _ in range(draw.choice((1, 20))):
            raw[draw.randrange(len(raw))] = draw.randrange(256)
        raw = draw.choice((raw, raw[: len(raw) // 2], raw + bytes(MANY)))
        first = next(place for place, chunk in enumerate(chunks) if chunk[0] == b"IDAT")
        chunks[:] = [chunk for chunk in chunks if chunk[0] != b"IDAT"]
        chunks.insert(first, (b"IDAT", zlib.compress(bytes(raw))))

    return _with_chunks(data, change)


def png_size(data: bytes, draw: random.Random) -> bytes | None:
    def change(chunks: list) -> None:
        name, body = chunks[0]
        width, height = sides(draw)
        depths = bytes((draw.choice((body[8], 1, 2, 4, 8, 16, 3)), draw.choice((body[9], 0, 2, 3, 4, 6, 1))))
        chunks[0] = (name, struct.pack(">II", width, height) + depths + body[10:])

    return _with_chunks(data, change)


# JPEG


def jpeg_segment(data: bytes, draw: random.Random) -> bytes | None:
    return _with_segments(data, lambda segments: _damage_one(segments, draw))


def jpeg_order(data: bytes, draw: random.Random) -> bytes | None:
    return _with_segments(data, lambda segments: _reorder(segments, draw))


def jpeg_extra(data: bytes, draw: random.Random) -> bytes | None:
    """Insert profiles, camera data and similar segments that are huge, many, or nonsense."""
    noise = draw.randbytes(draw.choice((0, 1, 20, 2000)))
    many = [(0xE2, b"ICC_PROFILE\0" + bytes((place % 256, 255)) + bytes(65_000)) for place in range(255)]
    extra = draw.choice(
        [
            many,
            [(0xE2, b"ICC_PROFILE\0" + noise)],
            [(0xE1, b"Exif\0\0" + noise)],
            [(0xE1, b"Exif\0\0" + _looping_ifd())],
            [(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + noise)],
            [(0xE2, b"MPF\0" + draw.choice((noise, _looping_ifd())))],
            [(0xED, b"Photoshop 3.0\x008BIM" + noise)],
            [(0xEE, b"Adobe" + draw.choice((noise, bytes((0, 100, 0, 0, 0, 0, draw.randrange(256))))))],
            [(0xE0, b"JFIF\0" + noise)],
            [(0xFE, noise)],
        ]
    )

    def change(segments: list) -> None:
        segments[1:1] = extra

    return _with_segments(data, change)


def jpeg_size(data: bytes, draw: random.Random) -> bytes | None:
    """Change the width and height, and sometimes the components."""

    def change(segments: list) -> None:
        for place, (marker, body) in enumerate(segments):
            if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
                width, height = (side & 0xFFFF for side in sides(draw))
                components = bytearray(body[5:])
                if draw.random() < 0.3:
                    components[draw.randrange(len(components))] = draw.randrange(256)
                segments[place] = (marker, body[:1] + struct.pack(">HH", height, width) + bytes(components))

    return _with_segments(data, change)


def jpeg_scans(data: bytes, draw: random.Random) -> bytes | None:
    """Repeat the last scan many times; progressive files may have many scans."""
    start = data.rfind(b"\xff\xda")
    return None if start < 0 else data[:start] + data[start:-2] * draw.choice((2, 50, 500)) + data[-2:]


# TIFF


def tiff_entry(data: bytes, draw: random.Random) -> bytes | None:
    """Change the tag, type, count or value of an entry."""
    return _with_entries(data, draw, lambda entry: draw.choice(_ENTRY_CHANGES)(entry, draw))


def tiff_known(data: bytes, draw: random.Random) -> bytes | None:
    """Turn an entry into one that controls how pixels are read: compression, sample format, tiles and the like."""
    known = (256, 257, 258, 259, 262, 266, 270, 273, 274, 277, 278, 279, 284, 292, 317, 320, 322, 323, 324, 325, 330)
    known += (338, 339, 347, 529, 530, 532, 700, 33723, 34377, 34665, 34675, 34853, 40965)
    values = (*range(10), 16, 32, 64, 32773, 32946, 34661, 34712, 34925, 50000, 50001, *EXTREMES)
    return _with_entries(
        data, draw, lambda entry: (draw.choice(known), draw.choice((1, 3, 4, entry[1])), 1, draw.choice(values))
    )


def tiff_loop(data: bytes, draw: random.Random) -> bytes | None:
    """Make the first directory point to itself or to another place as the next directory."""
    if data[:4] not in (b"II*\0", b"MM\0*"):
        return None
    order = "<" if data[:2] == b"II" else ">"
    first = struct.unpack_from(f"{order}I", data, 4)[0]
    if first + 2 > len(data):
        return None
    end = first + 2 + 12 * struct.unpack_from(f"{order}H", data, first)[0]
    if end + 4 > len(data):
        return None
    changed = bytearray(data)
    struct.pack_into(f"{order}I", changed, end, draw.choice((first, 8, 0, len(data), draw.randrange(len(data)))))
    return bytes(changed)


_ENTRY_CHANGES: tuple[Callable, ...] = (
    lambda entry, draw: (draw.choice((entry[0] + 1, draw.randrange(65536))), *entry[1:]),
    lambda entry, draw: (entry[0], draw.randrange(20), *entry[2:]),
    lambda entry, draw: (*entry[:2], draw.choice((*EXTREMES, 1000)), entry[3]),
    lambda entry, draw: (*entry[:3], draw.choice((*EXTREMES, draw.randrange(1 << 32)))),
)


# GIF, WebP, AVIF, JPEG 2000, BMP, PPM


def gif_size(data: bytes, draw: random.Random) -> bytes | None:
    """Change the size of the screen, or the size or position of the first frame."""
    frame = data.find(b",", 13)
    place = draw.choice([6] if frame < 0 or frame + 9 > len(data) else [6, frame + 5, frame + 1])
    if place + 4 > len(data):
        return None
    return data[:place] + struct.pack("<HH", *(side & 0xFFFF for side in sides(draw))) + data[place + 4 :]


def gif_extra(data: bytes, draw: random.Random) -> bytes | None:
    """Insert extensions: empty, unterminated, or nonsense, once or thousands of times."""
    block = draw.choice(
        (b"!\xff\x0bNETSCAPE2.0\3\1\0\0\0", b"!\xf9\4\xff\xff\xff\xff\0", b"!\xfe\xff" + bytes(255), b"!\1\0")
    )
    frame = data.find(b",", 13)
    return None if frame < 0 else data[:frame] + block * draw.choice((1, 2, 5000)) + data[frame:]


def riff_chunk(data: bytes, draw: random.Random) -> bytes | None:
    """Damage, repeat, remove or move chunks of a WebP, with valid lengths."""
    chunks, place = [], 12
    while place + 8 <= len(data):
        length = struct.unpack_from("<I", data, place + 4)[0]
        chunks.append((data[place : place + 4], data[place + 8 : place + 8 + length]))
        place += 8 + length + length % 2
    if not chunks:
        return None
    draw.choice((_damage_one, _reorder))(chunks, draw)
    body = b"".join(name + struct.pack("<I", len(own)) + own + bytes(len(own) % 2) for name, own in chunks)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def webp_canvas(data: bytes, draw: random.Random) -> bytes | None:
    """Give a WebP a canvas with other sides and flags."""
    width, height = (side & 0xFFFFFF for side in sides(draw))
    canvas = bytes((draw.randrange(256), 0, 0, 0)) + struct.pack("<I", width)[:3] + struct.pack("<I", height)[:3]
    old = data[30:] if data[12:16] == b"VP8X" else data[12:]
    body = b"VP8X" + struct.pack("<I", 10) + canvas + old
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def box(data: bytes, draw: random.Random) -> bytes | None:
    """Change a number near the name of a box or marker that holds sizes or lengths."""
    names = [name for name in (b"ispe", b"iloc", b"iprp", b"meta", b"av1C", b"ihdr", b"colr", b"jp2h") if name in data]
    names += [b"\xff\x51"] if data[4:8] == b"jP  " and b"\xff\x51" in data else []
    if not names:
        return None
    place = data.find(draw.choice(names)) + draw.choice((-4, 4, 8, 12, 16, 6, 14, 22, 30))
    return _with_number(data, max(0, min(place, len(data) - 1)), 4, draw)


def bmp_size(data: bytes, draw: random.Random) -> bytes | None:
    if len(data) < 54:
        return None
    fields = struct.pack("<IIHHI", *sides(draw), 1, draw.choice((0, 1, 4, 8, 16, 24, 32, 64)), draw.randrange(8))
    return data[:18] + fields + data[34:]


def ppm_header(data: bytes, draw: random.Random) -> bytes | None:
    width, height = sides(draw)
    kind = draw.choice((b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"Pf", b"PF", b"P0CMYK", b"PyP", b"PyRGBA", b"P7"))
    most = draw.choice((b"255", b"65535", b"1", b"0", b"-1", b"1" * 30, b"1.0", b"nan", b"inf", b"0.0", b"-1e-320"))
    return kind + b"\n%d %d\n" % (width, height) + draw.choice((b"", b"# note\n" * 1000)) + most + b"\n" + data[15:]


def sides(draw: random.Random) -> tuple[int, int]:
    """Draw a width and height that may lead a reader to allocate too much, or nothing."""
    some = (0, 1, 2, 40, 3000, 9459, 9460, 13377, 65500, 65535, 100_000, 2**24, 2**31 - 1, 2**31, 2**32 - 1)
    return draw.choice(((draw.choice(some), draw.choice(some)), (draw.choice(some), 40), (40, draw.choice(some))))


STRUCTURED: dict[str, tuple[Callable, ...]] = {
    "PNG": (png_chunk, png_chunk, png_order, png_extra, png_extra, png_pixels, png_size),
    "JPEG": (jpeg_segment, jpeg_segment, jpeg_order, jpeg_extra, jpeg_extra, jpeg_size, jpeg_scans),
    "TIFF": (tiff_entry, tiff_entry, tiff_known, tiff_known, tiff_known, tiff_loop),
    "GIF": (gif_size, gif_size, gif_extra),
    "WEBP": (riff_chunk, riff_chunk, webp_canvas),
    "AVIF": (box, box),
    "JPEG2000": (box, box),
    "BMP": (bmp_size, bmp_size),
    "PPM": (ppm_header, ppm_header),
}


def _with_number(data: bytes, place: int, width: int, draw: random.Random) -> bytes:
    value = draw.choice((*EXTREMES, draw.randrange(1 << 32))) & ((1 << 8 * width) - 1)
    return data[:place] + value.to_bytes(width, draw.choice(("little", "big"))) + data[place + width :]


def _damage_one(parts: list, draw: random.Random) -> None:
    place = draw.randrange(len(parts))
    name, body = parts[place]
    parts[place] = (name, draw.choice((bits, piece, header, cut_short))(body, draw) if len(body) > 1 else b"\xff" * 7)


def _reorder(parts: list, draw: random.Random) -> None:
    """Remove or repeat one part, swap two, or shuffle all; the first part stays in place."""
    if len(parts) < 3:
        return
    one, other = draw.sample(range(1, len(parts)), 2)
    how = draw.randrange(4)
    if how == 0:
        del parts[one]
    elif how == 1:
        parts.insert(other, parts[one])
    elif how == 2:
        parts[one], parts[other] = parts[other], parts[one]
    else:
        rest = parts[1:]
        draw.shuffle(rest)
        parts[1:] = rest


def _with_chunks(data: bytes, change: Callable[[list], object]) -> bytes | None:
    """Change the chunks of a PNG and write them with valid checksums; return None if it can't be parsed."""
    chunks, place = [], 8
    while place + 12 <= len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + length]))
        place += 12 + length
    if not chunks or len(chunks[0][1]) != 13:
        return None
    try:
        change(chunks)
    except (zlib.error, StopIteration, ValueError):  # an earlier mutation damaged it
        return None
    return data[:8] + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


def _with_segments(data: bytes, change: Callable[[list], object]) -> bytes | None:
    """Change the segments of a JPEG before its first scan; return None if it can't be parsed."""
    segments, place = [], 2
    while place + 4 <= len(data) and data[place] == 0xFF and data[place + 1] != 0xDA:
        length = int.from_bytes(data[place + 2 : place + 4], "big")
        segments.append((data[place + 1], data[place + 4 : place + 2 + length]))
        place += 2 + length
    if not segments:
        return None
    change(segments)
    written = [(marker, body[:65_533]) for marker, body in segments]
    joined = b"".join(struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body for marker, body in written)
    return data[:2] + joined + data[place:]


def _with_entries(data: bytes, draw: random.Random, change: Callable) -> bytes | None:
    """Change one entry in the first directory of a TIFF; return None for BigTIFF and if it can't be parsed."""
    if data[:4] not in (b"II*\0", b"MM\0*"):
        return None
    order = "<" if data[:2] == b"II" else ">"
    first = struct.unpack_from(f"{order}I", data.ljust(8, b"\0"), 4)[0]
    if first + 14 > len(data):
        return None
    count = struct.unpack_from(f"{order}H", data, first)[0]
    place = first + 2 + 12 * draw.randrange(max(1, min(count, (len(data) - first - 2) // 12)))
    tag, kind, length, value = change(struct.unpack_from(f"{order}HHII", data, place))
    entry = struct.pack(f"{order}HHII", tag & 0xFFFF, kind & 0xFFFF, length & 0xFFFFFFFF, value & 0xFFFFFFFF)
    return data[:place] + entry + data[place + 12 :]


@functools.cache
def _bomb() -> bytes:
    return zlib.compress(bytes(MANY), 9)


def _looping_ifd() -> bytes:
    """Return a TIFF directory whose entries and next directory all point to itself."""
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, 8) for tag in (0x8769, 0x8825, 0xA005, 0xB001, 0xB002))
    return b"II*\0\10\0\0\0" + struct.pack("<H", 5) + entries + struct.pack("<I", 8)
