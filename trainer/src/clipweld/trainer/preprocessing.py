"""From an image file to what the image tower takes: open_clip's transform, on the image as a person sees it.

Before that transform, two things that open_clip leaves undone: an image is turned and mirrored as its Exif orientation
says, always, and 16 bits of grey become 8 by keeping the high byte. 32-bit and signed grey is refused: nothing says
which value is white. The rest is Pillow's ``convert("RGB")`` after resizing, as in open_clip: transparency is dropped
and not blended. The client does the same (docs/images.md).

A file is one of `FORMATS`, an image has at most ``PIL.Image.MAX_IMAGE_PIXELS`` pixels (89 million) before and after
resizing, and a file at most 8 bytes for each of that many pixels (716 MB). A JPEG has at most 100 scans.
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

if TYPE_CHECKING:  # heavy: files are opened without it
    from open_clip.transform import PreprocessCfg
    from torchvision.transforms import Compose

# What pictures come in. Pillow knows more, among them EPS: programs, which it has Ghostscript run.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
MAX_SCANS = 100  # of a JPEG, each of which takes as long as a whole image; cameras and editors write about ten
# JPEG's markers, but for those without a segment: stuffing, TEM, and where decoding can restart.
_MARKER = re.compile(rb"\xff[^\x00\x01\xff\xd0-\xd7]")
# What undoes each Exif orientation but 1, which is upright.
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
        OSError: it can't be read, or is no image of a known format.
        ValueError: not a regular file, too large, or too many pixels or scans.
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
    """The image, if it is not empty nor larger than Pillow's limit.

    Raises:
        ValueError: says by how much.
    """
    if not 0 < image.width * image.height <= _max_pixels():
        raise ValueError(f"{image.width} x {image.height} pixels, expected 1 to {_max_pixels():,}")
    return image


def preprocessing(config: PreprocessCfg) -> Compose:
    """open_clip's transform on `as_seen`, PIL image -> float32 tensor (3, size, size).

    ValueError for what would be too large, or has no known range.
    """
    from open_clip.transform import image_transform_v2
    from torchvision.transforms import Compose

    size = config.size[0] if isinstance(config.size, (tuple, list)) else config.size
    check = functools.partial(_check_resized, size=size if config.resize_mode == "shortest" else 0)
    return Compose([check, as_seen, *image_transform_v2(config, is_train=False).transforms])


def as_seen(image: Image.Image) -> Image.Image:
    """The image upright by its Exif orientation, with 8 bits a channel.

    Raises:
        ValueError: 32-bit or signed grey.
    """
    image.load()  # of a TIFF, this applies the orientation, and forgets it
    turn, image = _turn(image), _eight_bits(image)
    return image if turn is None else image.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged Exif raises any; the pixels are whole
        return None
    return _TURNS.get(orientation) if isinstance(orientation, int) else None


def _eight_bits(image: Image.Image) -> Image.Image:
    """High bytes of 16-bit grey, as Pillow itself takes them of 16-bit colours; other images as they are."""
    # Before Pillow 11, 16-bit PNG files have mode I, too; PPM files have it still, scaled to 16 bits.
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
    """Return how many scans a JPEG has; its other segments, and bytes after its end, don't count."""
    scans, place = 0, 2
    while (marker := _MARKER.search(data, place)) and marker[0] != b"\xff\xd9":
        scans += marker[0] == b"\xff\xda"
        place = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return scans


def _check_resized(image: Image.Image, size: int) -> Image.Image:
    """The image, if it stays within the limit when its shortest side becomes ``size``."""
    shortest, longest = sorted(check_pixels(image).size)
    if size * (size * longest // shortest) > _max_pixels():
        raise ValueError(
            f"{image.width} x {image.height} pixels are more than {_max_pixels():,} with a shortest side of {size}"
        )
    return image


def _max_pixels() -> float:
    return Image.MAX_IMAGE_PIXELS or float("inf")
