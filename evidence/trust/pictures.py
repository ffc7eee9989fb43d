"""Image files in every format and mode that clipweld reads, as written by Pillow: files to damage, and large files."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

ENDINGS = {"JPEG": "jpg", "JPEG2000": "jp2", "TIFF": "tif"}
# For each format, groups of image modes and the settings to write them with; together they cover every mode.
WAYS: dict[str, tuple[tuple[tuple[str, ...], dict], ...]] = {
    "JPEG": (
        (("RGB", "L", "CMYK"), {}),
        (("RGB", "L", "CMYK"), {"progressive": True, "quality": 30}),
        (("RGB",), {"subsampling": 0, "restart_marker_blocks": 1}),
    ),
    "PNG": ((("1", "L", "LA", "I;16", "P", "RGB", "RGBA"), {}), (("P",), {"transparency": 3, "bits": 4})),
    "WEBP": ((("RGB", "RGBA"), {"quality": 50}), (("RGB", "RGBA"), {"lossless": True})),
    "GIF": ((("1", "L", "P", "RGB"), {}), (("P",), {"transparency": 3, "interlace": True})),
    "TIFF": (
        (("1", "L", "LA", "P", "RGB", "RGBA", "RGBX", "CMYK", "LAB", "I;16", "I", "F"), {}),
        (("L", "P", "RGB", "RGBA", "CMYK", "I;16"), {"compression": "tiff_lzw"}),
        (("L", "RGB", "F"), {"compression": "tiff_adobe_deflate"}),
        (("L", "RGB"), {"compression": "packbits"}),
        (("L", "RGB", "YCbCr"), {"compression": "jpeg"}),
        (("1",), {"compression": "group4"}),
        (("RGB", "L"), {"big_tiff": True}),
    ),
    "BMP": ((("1", "L", "P", "RGB", "RGBA"), {}),),
    "PPM": ((("1", "L", "I;16", "RGB", "F"), {}),),
    "JPEG2000": ((("L", "LA", "RGB", "RGBA", "I;16"), {}), (("RGB",), {"irreversible": True, "tile_size": (32, 32)})),
    "AVIF": ((("RGB", "RGBA", "L"), {"speed": 10}),),
}
ANIMATED = ("GIF", "WEBP", "PNG", "TIFF", "AVIF")
# (format, mode, size, settings) of undamaged files near the limits: 9459 x 9459 pixels are just allowed, and so are
# 1500 x 1 for a model of 224 pixels.
LARGE: tuple[tuple[str, str, tuple[int, int], dict], ...] = (
    ("JPEG", "RGB", (9459, 9459), {}),
    ("JPEG", "CMYK", (9459, 9459), {"progressive": True, "subsampling": 0}),
    ("PNG", "RGBA", (9459, 9459), {}),
    ("PNG", "I;16", (9459, 9459), {}),
    ("WEBP", "RGBA", (9459, 9459), {"lossless": True, "method": 0}),
    ("GIF", "P", (9459, 9459), {}),
    ("TIFF", "RGBA", (9459, 9459), {"compression": "tiff_adobe_deflate"}),
    ("TIFF", "F", (9459, 9459), {}),
    ("BMP", "RGB", (9459, 9459), {}),
    ("JPEG2000", "RGB", (9459, 9459), {"tile_size": (1024, 1024)}),
    ("AVIF", "RGB", (9459, 9459), {"speed": 10}),
    *((kind, "L", (9460, 9460), {}) for kind in ("JPEG", "PNG", "GIF", "TIFF", "BMP", "PPM")),
    *((kind, "L", (13_400, 13_400), {}) for kind in ("JPEG", "PNG", "GIF", "TIFF", "BMP", "PPM")),
    *(("PNG", mode, size, {}) for mode in ("RGBA", "I;16", "P") for size in ((1500, 1), (1, 8000), (60_000, 1))),
)


def seeds(pictures: Sequence[Image.Image]) -> list[tuple[str, bytes]]:
    """Return (format, bytes) of a file for every format, mode and setting, with the pictures in turn."""
    files = []
    for kind, ways in WAYS.items():
        for modes, settings in ways:
            for mode in modes:
                picture = pictures[len(files) % len(pictures)].convert("RGB")
                extra = {"exif": _exif(), "icc_profile": bytes(600)} if kind in ("JPEG", "PNG", "WEBP", "TIFF") else {}
                files.append((kind, saved(in_mode(picture, mode), kind, **settings, **extra)))
        if kind in ANIMATED:
            first, *more = (picture.convert("RGB").resize((40, 30)) for picture in pictures[:3])
            files.append((kind, saved(first, kind, save_all=True, append_images=more)))
    return files


def in_mode(picture: Image.Image, mode: str) -> Image.Image:
    """Convert an RGB picture to any mode, also to those for which Pillow has no direct conversion."""
    if mode == "I;16":
        return Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    if mode == "LAB":
        return Image.frombytes("LAB", picture.size, picture.tobytes())
    return picture.convert("L").convert(mode) if mode in ("I", "F") else picture.convert(mode)


def of_unknown_range(data: bytes) -> bool:
    """Return whether a file holds 32-bit grey, which is refused although it is undamaged."""
    with Image.open(io.BytesIO(data)) as image:
        return image.mode == "F" or (image.mode == "I" and image.format != "PPM")


def saved(picture: Image.Image, kind: str, **settings: object) -> bytes:
    """Return the picture as the bytes of a file."""
    file = io.BytesIO()
    picture.save(file, kind, **settings)
    return _without_times(file.getvalue()) if kind == "AVIF" else file.getvalue()


def _without_times(data: bytes) -> bytes:
    """Clear the creation times of an animated AVIF, so that its bytes are the same each time."""
    for name in (b"mvhd", b"tkhd", b"mdhd"):
        start, found, end = data.partition(name)
        data = start + found + (end[:4] + bytes(16) + end[20:] if found else b"")
    return data


def _exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "camera"
    return exif.tobytes()
