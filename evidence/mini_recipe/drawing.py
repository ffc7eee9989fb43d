"""Make small square pictures: trim and centre them, render SVG icons and font glyphs, and find repeats."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 64  # pixels, the model's image size
MARGIN = 2  # pixels left free on every side
THUMBNAIL = 16  # pixels


def centre_in_square(picture: Image.Image) -> np.ndarray | None:
    """Trim the transparent border of a picture, scale it to fit the square, and centre it.

    Args:
        picture: any size and mode.

    Returns:
        RGBA, uint8, (64, 64, 4); None if nothing is visible.
    """
    picture = picture.convert("RGBA")
    box = picture.getchannel("A").point(lambda alpha: 255 * (alpha > 8)).getbbox()
    if box is None:
        return None
    picture = picture.crop(box)
    scale = (SIZE - 2 * MARGIN) / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    # Premultiplied colours: otherwise the colours of transparent pixels would bleed into the edges.
    picture = picture.convert("RGBa").resize((width, height), Image.Resampling.BICUBIC).convert("RGBA")
    square = Image.new("RGBA", (SIZE, SIZE))
    square.paste(picture, ((SIZE - width) // 2, (SIZE - height) // 2))
    return np.asarray(square)


def read_square(path: Path) -> np.ndarray | None:
    """Read a picture file as RGBA, uint8, (64, 64, 4); None if nothing is visible or it can't be read."""
    try:
        with Image.open(path) as picture:
            picture.draft("RGB", (4 * SIZE, 4 * SIZE))
            return centre_in_square(picture)
    except (OSError, SyntaxError, Image.DecompressionBombError):  # what Pillow raises on broken or huge files
        return None


def render_svg(body: str, box: tuple[float, float, float, float]) -> np.ndarray | None:
    """Draw the SVG body of an icon in its own colours (black for `currentColor`).

    Args:
        body: the text between `<svg>` and `</svg>`.
        box: left, top, width and height of the view box.

    Returns:
        RGBA, uint8, (64, 64, 4); None if nothing is visible.
    """
    left, top, width, height = box
    side = 2 * SIZE
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" color="#000" '
        f'viewBox="{left} {top} {width} {height}" width="{side}" height="{side * height / width}">{body}</svg>'
    )
    return centre_in_square(_rendered(svg))


def draw_icon(icon_set: dict[str, Any], name: str) -> np.ndarray | None:
    """Draw an icon of a set as RGBA, uint8, (64, 64, 4); None if nothing is visible.

    Args:
        icon_set: what the set's `icons.json` holds.
    """
    icon = icon_set["icons"][name]
    default = icon_set.get("width", 16), icon_set.get("height", 16)
    box = icon.get("left", 0), icon.get("top", 0), icon.get("width", default[0]), icon.get("height", default[1])
    return render_svg(icon["body"], box)


def read_svg(path: Path) -> np.ndarray | None:
    """Draw an SVG file as RGBA, uint8, (64, 64, 4); None if nothing is visible."""
    return centre_in_square(_rendered(path.read_text(encoding="utf-8"), 2 * SIZE))


def _rendered(svg: str, width: int | None = None) -> Image.Image:
    """Return an SVG as a picture as wide as it says, or ``width`` pixels wide."""
    from resvg_py import svg_to_bytes

    return Image.open(io.BytesIO(bytes(svg_to_bytes(svg_string=svg, width=width))))


def draw_glyph(character: str, font_file: Path) -> np.ndarray | None:
    """Draw one character in black on transparent: RGBA, uint8, (64, 64, 4); None if the font lacks it."""
    font = ImageFont.truetype(str(font_file), 96)
    missing = font.getmask("\U0010fffd")
    mask = font.getmask(character)
    if mask.size[0] == 0 or (mask.size == missing.size and bytes(mask) == bytes(missing)):
        return None
    canvas = Image.new("L", (256, 256))
    ImageDraw.Draw(canvas).text((128, 128), character, fill=255, font=font, anchor="mm")
    glyph = Image.new("RGBA", canvas.size)
    glyph.putalpha(canvas)
    return centre_in_square(glyph)


def on_white(images: np.ndarray) -> np.ndarray:
    """Composite RGBA images, uint8, (count, 64, 64, 4), on white: RGB, float32 in 0..255, (count, 64, 64, 3)."""
    alpha = images[..., 3:].astype(np.float32) / 255
    return images[..., :3] * alpha + 255 * (1 - alpha)


def thumbnails(rgb: np.ndarray) -> np.ndarray:
    """Return the mean colours of a 16x16 grid in 0..255: (count, 64, 64, 3) becomes float32 (count, 768)."""
    step = SIZE // THUMBNAIL
    grid = rgb.reshape(len(rgb), THUMBNAIL, step, THUMBNAIL, step, 3).astype(np.float32)
    return grid.mean(axis=(2, 4)).reshape(len(rgb), -1)


def nearest(queries: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the nearest key for each query thumbnail.

    Args:
        queries: float32, (queries, 768).
        keys: float32, (keys, 768).

    Returns:
        The index of the nearest key, int64, and its root mean square distance in grey levels (0..255), float32; both
        (queries,).
    """
    index = np.empty(len(queries), dtype=np.int64)
    distance = np.empty(len(queries), dtype=np.float32)
    key_norms = (keys**2).sum(axis=1)
    for start in range(0, len(queries), 1024):
        part = queries[start : start + 1024]
        squares = (part**2).sum(axis=1, keepdims=True) + key_norms - 2 * part @ keys.T
        best = squares.argmin(axis=1)
        index[start : start + 1024] = best
        distance[start : start + 1024] = np.sqrt(np.maximum(squares[np.arange(len(part)), best], 0) / part.shape[1])
    return index, distance
