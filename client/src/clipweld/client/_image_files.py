"""Image files: read within limits, decoded, and turned the way a person sees them."""

from __future__ import annotations

import inspect
import io
import os
import re
import stat
from typing import Any

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

from clipweld.client.errors import BadImage

# Formats of pictures. Pillow reads more, but some are unsafe: EPS files are programs, which it runs with Ghostscript.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
MAX_SCANS = 100  # of a JPEG; each takes as long as decoding a whole image, and cameras and editors write about ten
# JPEG's markers, except those without a segment: stuffing, TEM, and where decoding can restart.
_MARKER = re.compile(rb"\xff[^\x00\x01\xff\xd0-\xd7]")
_CHUNK = 1 << 20  # bytes
# The transpositions that undo the Exif orientations. Orientation 1 is upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Stream:
    """An open binary file, which is read from its start when its image is needed, and only once.

    Attributes:
        name: the file's path; empty if it has none.
        kind: name of its type.
    """

    def __init__(self, file: Any) -> None:
        self._file, self._data = file, b""
        name = getattr(file, "name", None)
        self.name = name if isinstance(name, str) else ""
        self.kind = type(file).__name__

    def read(self, name: str) -> bytes:
        """Return its bytes.

        Raises:
            BadImage: it is closed, opened as text or too large, or reading it fails.
        """
        if self._file is not None:
            try:
                self._data = self._whole(name)
            except BadImage:
                raise
            except Exception as exc:  # files of other libraries may raise anything
                raise BadImage(f"{name} cannot be read: {one_line(exc)}") from exc
            self._file = None
        return self._data

    def _whole(self, name: str) -> bytes:
        file, parts, size = self._file, [], 0
        if hasattr(file, "seekable") and file.seekable():  # as Pillow does: the position may be at the end of the file
            file.seek(0)
        while part := file.read(_CHUNK):
            if not isinstance(part, (bytes, bytearray, memoryview)):
                if inspect.iscoroutine(part):
                    part.close()
                found = "is open as text" if isinstance(part, str) else f"gives {type(part).__name__}"
                raise BadImage(f"{name} {found}; expected a file opened with 'rb', or its bytes")
            parts.append(bytes(part))
            size += len(part)
            if size > max_bytes():
                raise BadImage(f"{name} is too large: more than {max_bytes():,} bytes")
        return b"".join(parts)


def read_path(path: str, name: str) -> bytes:
    """Return the bytes of an image file.

    Raises:
        BadImage: it is not a regular file, is too large, or can't be read.
    """
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise BadImage(f"{name} is a directory; name the image files in it")
        if not stat.S_ISREG(status.st_mode):
            raise BadImage(f"{name} is not a regular file; name an image file")
        if status.st_size > max_bytes():
            raise BadImage(f"{name} is too large: {status.st_size:,} bytes, expected at most {max_bytes():,}")
        with open(path, "rb") as file:
            return file.read()
    except (OSError, ValueError) as exc:
        raise BadImage(f"{name} cannot be read: {getattr(exc, 'strerror', None) or exc}") from exc


def decoder(data: bytes, name: str) -> Image.Image:
    """Open the image in a file's bytes, without decoding its pixels yet.

    Raises:
        BadImage: the bytes are not an image, or a JPEG has too many scans.
    """
    try:
        opened = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as exc:
        raise BadImage(f"{name} ({len(data)} bytes) is no image; expected {', '.join(FORMATS)}") from exc
    except Exception as exc:  # on damaged files, Pillow's readers may raise anything
        raise BadImage(f"{name} cannot be decoded: {one_line(exc)}") from exc
    if opened.format in ("JPEG", "MPO") and data.count(b"\xff\xda") > MAX_SCANS and _scans(data) > MAX_SCANS:
        raise BadImage(f"{name} has more than {MAX_SCANS} scans; save it anew")
    return opened


def as_seen(image: Image.Image, name: str, *, exif_orientation: bool) -> Image.Image:
    """Return the image with 8 bits per channel and, on request, turned upright by its Exif orientation.

    Raises:
        BadImage: the image is grey with 32 bits or signed values.
        Exception: anything, on damaged files.
    """
    image.load()  # for a TIFF, this applies the orientation and removes it from the image
    turn = _turn(image) if exif_orientation else None
    image = _eight_bits(image, name)
    return image if turn is None else image.transpose(turn)


def max_pixels() -> float:
    """Return Pillow's limit on the pixels of an image, or infinity if that was lifted."""
    return Image.MAX_IMAGE_PIXELS or float("inf")


def max_bytes() -> float:
    """Return the limit on the bytes of an image file."""
    return 8 * max_pixels()


def one_line(exc: BaseException) -> str:
    """Return an error's message on one line."""
    return " ".join(str(exc).split()) or type(exc).__name__


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged Exif data may raise anything; the pixels are intact
        return None
    return _TURNS.get(orientation) if isinstance(orientation, int) else None


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    """Return the high bytes of 16-bit grey, as Pillow itself does for 16-bit colours; other images as they are."""
    # Before Pillow 11, 16-bit PNG files have mode I too; PPM files still have it, scaled to 16 bits.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values, tags = np.asarray(image), getattr(image, "tag_v2", {})
        high = values >> (4 if tags.get(TiffImagePlugin.BITSPERSAMPLE) == (12,) else 8)
        white_is_zero = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
        return Image.fromarray((255 - high if white_is_zero else high).astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = "floats" if image.mode == "F" else "32-bit or signed integers"
        raise BadImage(
            f"{name} has grey values that are {kind}, of unknown range; save it with 8 or 16 bits, unsigned, or give "
            "a uint8 or uint16 array, or one of floats in [0, 1]"
        )
    return image


def _scans(data: bytes) -> int:
    """Return how many scans a JPEG has; its other segments, and bytes after its end, don't count."""
    scans, place = 0, 2
    while (marker := _MARKER.search(data, place)) and marker[0] != b"\xff\xd9":
        scans += marker[0] == b"\xff\xda"
        place = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return scans
