"""Pictures as small squares: trimming, centring, rendering SVG icons and font glyphs, thumbnails to find repeats."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 64  # pixels, the model's image size
MARGIN = 2  # pixels left free on every side
THUMBNAIL = 16  # pixels


def centre_in_square(picture: Image.Image) -> np.ndarray | None:
    """Trim the transparent border, scale to fit and centre.

    Args:
        picture: any size and mode.

    Returns:
        RGBA, uint8, (64, 64, 4); None where nothing is visible.
    """
    picture = picture.convert("RGBA")
    box = picture.getchannel("A").point(lambda alpha: 255 * (alpha > 8)).getbbox()
    if box is None:
        return None
    picture = picture.crop(box)
    scale = (SIZE - 2 * MARGIN) / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    # Resizing premultiplied colours keeps hidden ones from bleeding into the edge.
    picture = picture.convert("RGBa").resize((width, height), Image.Resampling.BICUBIC).convert("RGBA")
    square = Image.new("RGBA", (SIZE, SIZE))
    square.paste(picture, ((SIZE - width) // 2, (SIZE - height) // 2))
    return np.asarray(square)


def read_square(path: Path) -> np.ndarray | None:
    """A picture file as RGBA, uint8, (64, 64, 4); None where nothing is visible or the file is not a picture."""
    try:
        with Image.open(path) as picture:
            picture.draft("RGB", (4 * SIZE, 4 * SIZE))
            return centre_in_square(picture)
    except (OSError, SyntaxError, Image.DecompressionBombError):  # what Pillow raises on broken or huge files
        return None


def render_svg(body: str, box: tuple[float, float, float, float]) -> np.ndarray | None:
    """An icon's SVG body drawn in its own colours (black where it asks for the current colour).

    Args:
        body: the text between `<svg>` and `</svg>`.
        box: left, top, width and height of the view box.

    Returns:
        RGBA, uint8, (64, 64, 4); None where nothing is visible.
    """
    from resvg_py import svg_to_bytes

    left, top, width, height = box
    side = 2 * SIZE
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" color="#000" '
        f'viewBox="{left} {top} {width} {height}" width="{side}" height="{side * height / width}">{body}</svg>'
    )
    return centre_in_square(Image.open(io.BytesIO(bytes(svg_to_bytes(svg_string=svg)))))


def draw_glyph(character: str, font_file: Path) -> np.ndarray | None:
    """One character in black on nothing: RGBA, uint8, (64, 64, 4); None where the font does not have it."""
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
    """RGBA, uint8, (count, 64, 64, 4) laid on white: RGB, float32 in 0..255, (count, 64, 64, 3)."""
    alpha = images[..., 3:].astype(np.float32) / 255
    return images[..., :3] * alpha + 255 * (1 - alpha)


def thumbnails(rgb: np.ndarray) -> np.ndarray:
    """Mean colours of a 16x16 grid: (count, 64, 64, 3) to float32 (count, 768), in 0..255."""
    step = SIZE // THUMBNAIL
    grid = rgb.reshape(len(rgb), THUMBNAIL, step, THUMBNAIL, step, 3).astype(np.float32)
    return grid.mean(axis=(2, 4)).reshape(len(rgb), -1)


def nearest(queries: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each query thumbnail the nearest key.

    Args:
        queries: float32, (queries, 768).
        keys: float32, (keys, 768).

    Returns:
        Index of the key, int64, and root mean square distance in grey levels (0..255), float32; both (queries,).
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
