"""Preprocessing of anything that can be an image into the image tower's input, equal to that of open_clip.

The steps are those of open_clip: resize, crop the centre, then convert to RGB. Scaling to [0, 1] and normalising by
mean and std are part of the served model. Two steps that open_clip does not have come first, as in training. An image
is rotated and mirrored according to its Exif orientation, so that the model sees what a person sees
(``exif_orientation=False`` omits this). And 16-bit grey is reduced to 8 bits by keeping the high byte; 32-bit and
signed grey is refused, as nothing says which value is white. The rest is what open_clip leaves to Pillow: transparency
is dropped, not blended; palettes, CMYK, LAB and the like go through ``convert("RGB")``; of an animation the first frame
is used. See docs/images.md.

A file must be complete and of one of the `_image_files.FORMATS`. An image has at most ``PIL.Image.MAX_IMAGE_PIXELS``
pixels (89 million) before and after resizing, a file at most 8 bytes for each of that many pixels (716 MB), a JPEG at
most 100 scans.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from PIL import Image

from clipweld.client._arrays import each, image_from, is_array
from clipweld.client._folders import LeftOut, image_files
from clipweld.client._image_files import Stream, as_seen, decoder, max_pixels, one_line, read_path
from clipweld.client.errors import BadImage


class SupportsArray(Protocol):
    """An object that NumPy can read, such as a tensor."""

    def __array__(self) -> Any: ...


ImageLike = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | Image.Image | np.ndarray | SupportsArray
)
"""One image.

It is a path, the bytes of an image file, an open binary file, a PIL image, or an array of pixels (NumPy's, or a tensor
on the CPU) of shape (height, width[, channels]) or (channels, height, width), in grey, RGB or RGBA, of dtype uint8,
uint16, bool, or float with values in [0, 1]. It may also be a ``data:`` URL and, if URLs are allowed, an ``http://`` or
``https://`` URL.
"""

INTERPOLATIONS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
RESIZE_MODES = ("shortest", "squash")


@dataclass(frozen=True)
class Reading:
    """How images are read.

    Attributes:
        exif_orientation: rotate and mirror an image according to its Exif orientation.
        allow_urls: fetch images given as http:// or https:// URLs (`clipweld.client._urls`).
    """

    exif_orientation: bool = True
    allow_urls: bool = False


def as_images(
    images: ImageLike | Iterable[ImageLike], left_out: Callable[[LeftOut], object] | None = None
) -> Iterator[Any]:
    """Iterate over one image, several, or the image files below a folder.

    Args:
        images: an image, a batch, an iterable of images, or a folder.
        left_out: called with whatever else a folder contains; None: a warning sums it up.

    Raises:
        BadImage: these are not images, or a folder has none.
    """
    if isinstance(images, (str, os.PathLike)) and os.path.isdir(images):
        return image_files(Path(os.fsdecode(images)), left_out)
    if isinstance(images, (str, os.PathLike, bytes, bytearray, memoryview, Image.Image)) or hasattr(images, "read"):
        return iter([_once(images)])
    if is_array(images):
        return each(images)
    if isinstance(images, Mapping) or not isinstance(images, Iterable):
        raise BadImage(f"images is a {type(images).__name__}; {_EXPECTED}, or several of them")
    return map(_once, images)


def preprocess(
    image: Any, name: str, *, size: int, resize_mode: str, interpolation: str, reading: Reading = Reading()
) -> np.ndarray:
    """Read, resize and crop one image.

    Args:
        image: see `ImageLike`.
        name: what error messages call it.
        size: side of the square that the model takes, in pixels.
        resize_mode: "shortest" (resize the shortest side to ``size``, then crop the centre) or "squash" (resize both
            sides to ``size``).
        interpolation: "bicubic" or "bilinear".
        reading: how to treat orientation and URLs.

    Returns:
        uint8 (size, size, 3), RGB.

    Raises:
        BadImage: it can't be read or decoded, is too large, or is not an image.
    """
    opened = _open(image, name, reading)
    width, height = _resized(opened, size, resize_mode)
    if max(opened.width * opened.height, width * height) > max_pixels():
        raise BadImage(
            f"{name} is too large: {opened.width} x {opened.height} pixels, resized {width} x {height}, "
            f"expected at most {max_pixels():,} pixels (PIL.Image.MAX_IMAGE_PIXELS)"
        )
    try:
        opened = as_seen(opened, name, exif_orientation=reading.exif_orientation)
        width, height = _resized(opened, size, resize_mode)
        if opened.size != (width, height):
            opened = opened.resize((width, height), INTERPOLATIONS[interpolation])
        left, top = round((width - size) / 2), round((height - size) / 2)
        cropped = opened.crop((left, top, left + size, top + size))
        return np.array(cropped.convert("RGB"))
    except BadImage:
        raise
    except Exception as exc:  # on damaged files, Pillow's readers may raise anything
        raise BadImage(f"{name} cannot be decoded: {one_line(exc)}") from exc


def name_of(image: Any, index: int) -> str:
    """Return what messages call an image: its path without passwords, or its place in the call, counted from 0."""
    if isinstance(image, (str, os.PathLike)) and (path := os.fsdecode(image)):
        if _DATA.match(path):
            return f"data URL {hashlib.sha256(path.encode(errors='replace')).hexdigest()[:12]}"
        return _PASSWORD.sub(r"\1...@", path)
    if isinstance(image, Stream):
        return image.name or f"image {index} ({image.kind})"
    kind = "PIL image" if isinstance(image, Image.Image) else type(image).__name__
    return f"image {index} ({kind})"


def is_url(image: str) -> bool:
    """Whether this is a URL, which would be fetched."""
    return _HTTP.match(image) is not None


def _once(image: Any) -> Any:
    """Wrap an open file so that it is read only once; return other images as they are."""
    return Stream(image) if hasattr(image, "read") and not isinstance(image, Stream) else image


def _open(image: Any, name: str, reading: Reading) -> Image.Image:
    if isinstance(image, Image.Image):
        opened = image
    elif isinstance(image, (bytes, bytearray, memoryview)):
        opened = decoder(bytes(image), name)
    elif isinstance(image, (str, os.PathLike)):
        opened = decoder(_read(os.fsdecode(image), name, reading), name)
    elif hasattr(image, "read"):
        opened = decoder(_once(image).read(name), name)
    elif is_array(image):
        opened = image_from(image, name)
    else:
        raise BadImage(f"{name}: {_EXPECTED}")
    if 0 in opened.size:
        raise BadImage(f"{name} is empty: {opened.width} x {opened.height} pixels")
    return opened


def _read(path: str, name: str, reading: Reading) -> bytes:
    if not path:
        raise BadImage(f"{name} is an empty text; name an image file")
    if is_url(path):
        if not reading.allow_urls:
            raise BadImage(f"{name} is a URL; allow that with allow_urls=True, or --allow-urls on the command line")
        from clipweld.client._urls import fetch  # imported here: few need it, and it loads http and ssl

        return fetch(path, name)
    if _DATA.match(path):
        from clipweld.client._urls import data_of

        return data_of(path, name)
    if (scheme := _SCHEME.match(path)) and not os.path.lexists(path):
        taken = "a path, or an http:// or https:// address where URLs are allowed"
        raise BadImage(f"{name} is a URL of scheme {scheme[1]!r}; expected {taken}")
    return read_path(path, name)


def _resized(image: Image.Image, size: int, resize_mode: str) -> tuple[int, int]:
    """Return (width, height) before cropping."""
    return (size, size) if resize_mode == "squash" else _shortest_side_to(size, *image.size)


def _shortest_side_to(size: int, width: int, height: int) -> tuple[int, int]:
    """Return (width, height) with the shortest side at ``size``; the longest is rounded down, as in torchvision."""
    if width <= height:
        return size, int(size * height / width)
    return int(size * width / height), size


_HTTP = re.compile(r"https?://", re.IGNORECASE)
_PASSWORD = re.compile(r"^([a-zA-Z][a-zA-Z0-9+.-]*://)[^/?#]*@")
_DATA = re.compile(r"data:[\w/+.;=-]*,", re.IGNORECASE)
_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+):/")
_EXPECTED = "expected a path, the bytes of an image file, an open binary file, a PIL image or an array of pixels"
