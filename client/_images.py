"""From anything that can be an image to the pixels the image tower takes, equal to open_clip's preprocessing.

Order as in open_clip: resize, crop the centre, then convert to RGB. Scaling to [0, 1], mean and std are inside the
served model. What open_clip decides by leaving it to Pillow is decided here too: Exif orientation is not applied,
transparency is dropped and not blended, an animation is its first frame, 16 bits of grey become 8 by Pillow's rules.

A file is one of `FORMATS` and whole. An image has at most ``PIL.Image.MAX_IMAGE_PIXELS`` pixels (89 million) before and
after resizing, and a file at most 8 bytes for each of that many pixels (716 MB). A JPEG has at most 100 scans.
"""

from __future__ import annotations

import io
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from client.errors import BadImage

ImageLike = str | Path | bytes | Image.Image | np.ndarray
"""One image: a path, the bytes of an image file, a PIL image, or a uint8 array (height, width[, 3]) in RGB."""

INTERPOLATIONS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
RESIZE_MODES = ("shortest", "squash")
# What pictures come in. Pillow knows more, among them EPS: programs, which it has Ghostscript run.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
MAX_SCANS = 100  # of a JPEG, each of which takes as long as a whole image; cameras and editors write about ten


def as_images(images: ImageLike | Iterable[ImageLike]) -> Iterator[ImageLike]:
    """One image, several, or the image files below a folder, one after the other.

    Raises:
        BadImage: not images at all, or a folder without any.
    """
    if isinstance(images, (str, Path)) and Path(images).is_dir():
        return image_files(Path(images))
    if isinstance(images, (str, Path, bytes, Image.Image)) or (isinstance(images, np.ndarray) and images.ndim <= 3):
        return iter([images])
    if not isinstance(images, Iterable):
        raise BadImage(f"images is a {type(images).__name__}; {_EXPECTED}")
    return iter(images)


def image_files(folder: Path) -> Iterator[Path]:
    """The files below a folder that have an image's ending, sorted folder by folder; hidden ones are left out.

    Raises:
        BadImage: there is none.
    """
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in FORMATS}
    found = False
    for path, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in endings:
                found = True
                yield Path(path) / name
    if not found:
        raise BadImage(f"folder {folder} has no images; expected files such as .jpg or .png in it or below")


def preprocess(image: ImageLike, name: str, *, size: int, resize_mode: str, interpolation: str) -> np.ndarray:
    """Read, resize and crop one image.

    Args:
        image: see `ImageLike`.
        name: what error messages call it.
        size: side of the square that the model takes, in pixels.
        resize_mode: "shortest" (shortest side to ``size``, then a centre crop) or "squash" (both sides).
        interpolation: "bicubic" or "bilinear".

    Returns:
        uint8 (size, size, 3), RGB.

    Raises:
        BadImage: unreadable, too large, or not an image at all.
    """
    opened = _open(image, name)
    width, height = (size, size) if resize_mode == "squash" else _shortest_side_to(size, *opened.size)
    if max(opened.width * opened.height, width * height) > _max_pixels():
        raise BadImage(
            f"{name} is too large: {opened.width} x {opened.height} pixels, resized {width} x {height}, "
            f"expected at most {_max_pixels():,} pixels (PIL.Image.MAX_IMAGE_PIXELS)"
        )
    try:
        if opened.size != (width, height):
            opened = opened.resize((width, height), INTERPOLATIONS[interpolation])
        left, top = round((width - size) / 2), round((height - size) / 2)
        cropped = opened.crop((left, top, left + size, top + size))
        return np.array(cropped.convert("RGB"))
    except Exception as exc:  # on damaged files, Pillow's readers raise any
        raise BadImage(f"{name} cannot be decoded: {_one_line(exc)}") from exc


def name_of(image: Any, index: int) -> str:
    """What an error message calls an image: its path, or its place in the call, counted from 0."""
    if isinstance(image, (str, Path)):
        return str(image)
    kind = "PIL image" if isinstance(image, Image.Image) else type(image).__name__
    return f"image {index} ({kind})"


def _open(image: Any, name: str) -> Image.Image:
    if isinstance(image, np.ndarray):
        return _from_array(image, name)
    if isinstance(image, Image.Image):
        opened = image
    elif isinstance(image, bytes):
        opened = _decoder(image, name)
    elif isinstance(image, (str, Path)):
        opened = _decoder(_read(Path(image), name), name)
    else:
        raise BadImage(f"{name}: {_EXPECTED}")
    if 0 in opened.size:
        raise BadImage(f"{name} is empty: {opened.width} x {opened.height} pixels")
    return opened


def _read(path: Path, name: str) -> bytes:
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise BadImage(f"{name} is a directory; name the image files in it")
        if not stat.S_ISREG(status.st_mode):
            raise BadImage(f"{name} is not a regular file; name an image file")
        most = 8 * _max_pixels()
        if status.st_size > most:
            raise BadImage(f"{name} is too large: {status.st_size:,} bytes, expected at most {most:,}")
        return path.read_bytes()
    except (OSError, ValueError) as exc:
        raise BadImage(f"{name} cannot be read: {getattr(exc, 'strerror', None) or exc}") from exc


def _decoder(data: bytes, name: str) -> Image.Image:
    try:
        opened = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as exc:
        raise BadImage(f"{name} ({len(data)} bytes) is no image; expected {', '.join(FORMATS)}") from exc
    except Exception as exc:  # on damaged files, Pillow's readers raise any
        raise BadImage(f"{name} cannot be decoded: {_one_line(exc)}") from exc
    if opened.format in ("JPEG", "MPO") and data.count(b"\xff\xda") > MAX_SCANS and _scans(data) > MAX_SCANS:
        raise BadImage(f"{name} has more than {MAX_SCANS} scans; save it anew")
    return opened


def _scans(data: bytes) -> int:
    """How many scans a JPEG has; what stands in its other segments or behind its end doesn't count."""
    scans, place = 0, 2
    while (marker := _MARKER.search(data, place)) and marker[0] != b"\xff\xd9":
        scans += marker[0] == b"\xff\xda"
        place = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return scans


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    fits = array.dtype == np.uint8 and (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3))
    if not fits or 0 in array.shape:
        raise BadImage(
            f"{name} is {array.dtype} of shape {array.shape}; "
            f"expected uint8 of shape (height, width, 3) in RGB or (height, width) in grey"
        )
    return Image.fromarray(np.ascontiguousarray(array))


def _shortest_side_to(size: int, width: int, height: int) -> tuple[int, int]:
    """(width, height) with the shortest side at ``size``; the longest is rounded down, as torchvision does."""
    if width <= height:
        return size, int(size * height / width)
    return int(size * width / height), size


def _max_pixels() -> float:
    return Image.MAX_IMAGE_PIXELS or float("inf")


def _one_line(exc: BaseException) -> str:
    return " ".join(str(exc).split()) or type(exc).__name__


# JPEG's markers, but for those without a segment: stuffing, TEM, and where decoding can restart.
_MARKER = re.compile(rb"\xff[^\x00\x01\xff\xd0-\xd7]")
_EXPECTED = "expected a path, the bytes of an image file, a PIL image or a uint8 array (height, width[, 3])"
