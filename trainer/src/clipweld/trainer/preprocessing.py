"""Prepare image files for the image tower: open_clip's transform, on the image as a person sees it.

Before the transform, two steps are done that open_clip omits: an image is always turned and mirrored by its Exif
orientation, and 16-bit grey is reduced to 8 bits by keeping the high byte. 32-bit and signed grey is refused, because
nothing says which value is white. The rest is Pillow's ``convert("RGB")`` after resizing, as in open_clip: transparency
is dropped, not blended. The client does the same (docs/images.md).

A file must have one of the `FORMATS` and at most 8 bytes per pixel of the largest image (716 MB). An image has at most
``PIL.Image.MAX_IMAGE_PIXELS`` pixels (89 million), before and after resizing. A JPEG has at most 100 scans.
"""

from __future__ import annotations

import functools
import io
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin

if TYPE_CHECKING:  # slow to import, and not needed to open files
    from open_clip.transform import PreprocessCfg
    from torchvision.transforms import Compose

# Pillow knows more formats, among them EPS, whose files are programs that it passes to Ghostscript.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
MAX_SCANS = 100  # of a JPEG; each takes as long to decode as a whole image, and cameras and editors write about ten
# JPEG's markers, except those without a segment: stuffing, TEM, and restart markers.
_MARKER = re.compile(rb"\xff[^\x00\x01\xff\xd0-\xd7]")
# The transposition that undoes each Exif orientation; 1 is upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(path: str | Path) -> Image.Image:
    """Open an image file; its pixels are not decoded yet.

    Raises:
        OSError: it can't be read, or is not an image of a known format.
        ValueError: it is not a regular file, is too large, or has too many pixels or scans.
    """
    status = Path(path).stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is not a regular file")
    most = 8 * _max_pixels()
    if status.st_size > most:
        raise ValueError(f"it has {status.st_size:,} bytes, expected at most {most:,}")
    data = Path(path).read_bytes()
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.format in ("JPEG", "MPO") and data.count(b"\xff\xda") > MAX_SCANS and _scans(data) > MAX_SCANS:
        raise ValueError(f"it has more than {MAX_SCANS} scans")
    return check_pixels(image)


def check_pixels(image: Image.Image) -> Image.Image:
    """Return the image, if it is not empty and within Pillow's limit of pixels.

    Raises:
        ValueError: it is not; the message gives its size and the limit.
    """
    if not 0 < image.width * image.height <= _max_pixels():
        raise ValueError(f"{image.width} x {image.height} pixels, expected 1 to {_max_pixels():,}")
    return image


def preprocessing(config: PreprocessCfg) -> Compose:
    """Return open_clip's transform, applied to `as_seen`: PIL image -> float32 tensor (3, size, size).

    The transform raises ValueError for an image that is too large, or whose grey values have no known range.
    """
    from open_clip.transform import image_transform_v2
    from torchvision.transforms import Compose

    size = config.size[0] if isinstance(config.size, (tuple, list)) else config.size
    check = functools.partial(_check_resized, size=size if config.resize_mode == "shortest" else 0)
    return Compose([check, as_seen, *image_transform_v2(config, is_train=False).transforms])


def as_seen(image: Image.Image) -> Image.Image:
    """Return the image upright by its Exif orientation, with 8 bits per channel.

    Raises:
        ValueError: 32-bit or signed grey.
    """
    image.load()  # for a TIFF, this also applies the orientation and removes its tag
    turn, image = _turn(image), _eight_bits(image)
    return image if turn is None else image.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged Exif can raise anything; the pixels are intact
        return None
    return _TURNS.get(orientation) if isinstance(orientation, int) else None


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return the high bytes of 16-bit grey, as Pillow does for 16-bit colours; other images unchanged."""
    # Before Pillow 11, 16-bit PNG files also have mode I; PPM files still have it, scaled to 16 bits.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values, tags = np.asarray(image), getattr(image, "tag_v2", {})
        high = values >> (4 if tags.get(TiffImagePlugin.BITSPERSAMPLE) == (12,) else 8)
        white_is_zero = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
        return Image.fromarray((255 - high if white_is_zero else high).astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = "floats" if image.mode == "F" else "32-bit or signed integers"
        raise ValueError(f"its grey values are {kind}, of unknown range; save it with 8 or 16 bits, unsigned")
    return image


def _scans(data: bytes) -> int:
    """Return the number of scans in a JPEG; other segments, and bytes after its end, don't count."""
    scans, place = 0, 2
    while (marker := _MARKER.search(data, place)) and marker[0] != b"\xff\xd9":
        scans += marker[0] == b"\xff\xda"
        place = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return scans


def _check_resized(image: Image.Image, size: int) -> Image.Image:
    """Return the image, if it is within the limit also after its shortest side is resized to ``size``."""
    shortest, longest = sorted(check_pixels(image).size)
    if size * (size * longest // shortest) > _max_pixels():
        raise ValueError(
            f"{image.width} x {image.height} pixels are more than {_max_pixels():,} with a shortest side of {size}"
        )
    return image


def _max_pixels() -> float:
    return Image.MAX_IMAGE_PIXELS or float("inf")
