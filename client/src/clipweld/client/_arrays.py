"""Images from arrays of pixels: NumPy's, and any that NumPy can read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from clipweld.client._image_files import one_line
from clipweld.client.errors import BadImage

CHANNELS = (1, 3, 4)  # grey, RGB, RGB with transparency
ROUNDING = 1e-6  # how far float32 rounding may take values beyond 0 and 1
TAKEN = (
    "expected (height, width[, channels]) or (channels, height, width), with 1 channel (grey), 3 (RGB) or 4 (RGBA), "
    "of uint8, uint16, bool, or floats in [0, 1]"
)


def is_array(value: Any) -> bool:
    """Whether NumPy can read a value: an array, a tensor, a column of a table."""
    return hasattr(value, "__array__") or hasattr(value, "__array_interface__")


def as_array(value: Any, name: str) -> np.ndarray:
    """Return a NumPy array of the same values, without importing the library that they come from.

    Raises:
        BadImage: only that library can read the values, such as those of a tensor on a GPU.
    """
    steps = ".detach()" if getattr(value, "requires_grad", False) is True else ""
    device = getattr(getattr(value, "device", None), "type", "cpu")
    steps += "" if device == "cpu" else ".cpu()"
    if steps:
        where = "needs gradients" if device == "cpu" else f"is on device {device!r}"
        raise BadImage(f"{name} is a {type(value).__name__} that {where}; give {steps.removeprefix('.')} of it")
    try:
        return np.asarray(value)
    except Exception as exc:  # other libraries may raise anything
        raise BadImage(f"{name} is a {type(value).__name__} that is no array ({one_line(exc)}); {TAKEN}") from exc


def each(value: Any) -> Iterator[Any]:
    """Iterate over one image, the images of a batch, or the entries of an array of paths or objects.

    Raises:
        BadImage: it is an array of neither images nor paths.
    """
    array = as_array(value, "images")
    if array.dtype.kind in "OUS" and array.ndim <= 1:
        items = array.reshape(-1).tolist()
        return map(os.fsdecode, items) if array.dtype.kind == "S" else iter(items)
    if array.dtype.kind not in "OUS" and array.ndim <= 3:
        return iter([value])
    if array.dtype.kind not in "OUS" and array.ndim == 4:
        return iter(array)
    raise BadImage(
        f"images is an array of {array.dtype} of shape {array.shape}; expected a batch of images, or paths in one row"
    )


def image_from(value: Any, name: str) -> Image.Image:
    """Convert one array to an image.

    Args:
        value: (height, width), (height, width, channels) or (channels, height, width). A last dimension of 3 holds the
            channels, whatever the first one is.

    Raises:
        BadImage: it has another shape or dtype, a shape that can be read both ways, or floats outside [0, 1].
    """
    array = as_array(value, name)
    found = f"{name} is {array.dtype} of shape {array.shape}"
    if array.ndim == 3:
        first, last = array.shape[0] in CHANNELS, array.shape[2] in CHANNELS
        if first and last and array.shape[2] != 3:
            raise BadImage(f"{found}, whose channels may be first or last; {TAKEN}: leave out the channel of grey")
        if first and not last:
            array = np.moveaxis(array, 0, 2)
        if array.shape[2] == 1:
            array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in CHANNELS) or 0 in array.shape:
        several = "; several images are given as a list of them, or as a batch of 4 dimensions"
        raise BadImage(f"{found}; {TAKEN}{several if array.ndim > 2 else ''}")
    return Image.fromarray(np.ascontiguousarray(_eight_bits(array, found)))


def _eight_bits(array: np.ndarray, found: str) -> Any:
    kind, size = array.dtype.kind, array.dtype.itemsize
    if kind == "u" and size <= 2:
        return np.asarray(array >> 8 * (size - 1), np.uint8)
    if kind == "b":
        return array.astype(np.uint8) * np.uint8(255)
    if kind == "f":
        low, high = float(array.min()), float(array.max())
        if not (low >= -ROUNDING and high <= 1 + ROUNDING):  # true for NaN too
            raise BadImage(
                f"{found} with values from {low:g} to {high:g}; expected floats in [0, 1]: divide by what white is, "
                "undo normalization by mean and std, or give uint8"
            )
        return np.rint(array.astype(np.float32).clip(0, 1) * 255).astype(np.uint8)
    raise BadImage(f"{found}; {TAKEN}" + ("; convert with .astype('uint8') where 255 is white" if kind in "iu" else ""))
