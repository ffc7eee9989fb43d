"""Make the pictures in this folder: digits of the shipped task's test images, and drawings of bolts and of a plane.

Run from a checkout: ``python samples/draw.py``. The same pictures come out each time.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from clipweld.trainer.tasks import load_task

HERE = Path(__file__).parent
SEED = 0
SCANS = (7, 2, 0, 9, 4)
COUNTS = {"train": 6, "test": 3}
SIZE = (200, 150)  # pixels
SCALE = 4  # drawn larger, for smooth edges
STEEL, SHADE = (176, 182, 190), (104, 110, 120)


def main() -> None:
    """Write all of them."""
    draw_digits()
    generator = np.random.default_rng(SEED)
    for name, shape in (("hex bolt", hex_bolt), ("eye bolt", eye_bolt)):
        for split, count in COUNTS.items():
            for number in range(1, count + 1):
                save(photo(shape, generator), HERE / "bolts" / split / name / f"{number}.jpg")
    save(photo(hex_bolt, generator), HERE / "new.jpg")
    save(photo(plane, generator, turn=False, background=(170, 205, 240)), HERE / "plane.jpg")


def draw_digits() -> None:
    """One seven, and a folder of scans."""
    images = load_task("digits").load("test")
    first = {digit: images[list(images.labels).index(digit)][0] for digit in SCANS}
    save(first[7], HERE / "seven.png")
    for number, digit in enumerate(SCANS, start=1):
        save(first[digit], HERE / "scans" / f"{number}.png")


def photo(
    shape: Callable[[ImageDraw.ImageDraw, int, int], None],
    generator: np.random.Generator,
    turn: bool = True,
    background: tuple[int, int, int] | None = None,
) -> Image.Image:
    """A shape on a plain background, turned and moved at random, with the noise of a camera."""
    width, height = (SCALE * side for side in SIZE)
    ground = background or tuple(int(level) for level in generator.integers(200, 245, 3))
    picture = Image.new("RGB", (width, height), ground)
    layer = Image.new("RGBA", (width, height))
    shape(ImageDraw.Draw(layer), width, height)
    if turn:
        layer = layer.rotate(float(generator.uniform(-40, 40)), Image.Resampling.BICUBIC)
    place = tuple(int(shift) for shift in generator.integers(-40, 40, 2))
    shadow = Image.new("RGBA", layer.size, (0, 0, 0, 70))
    shadow.putalpha(layer.getchannel("A").point(lambda alpha: alpha // 4).filter(ImageFilter.GaussianBlur(12)))
    picture.paste(shadow, (place[0] + 16, place[1] + 20), shadow)
    picture.paste(layer, place, layer)
    pixels = np.asarray(picture.resize(SIZE, Image.Resampling.LANCZOS), np.float32)
    noisy = pixels + generator.normal(0, 5, pixels.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def hex_bolt(draw: ImageDraw.ImageDraw, width: int, height: int) -> None:
    """Six edges seen from the side, and a threaded shaft."""
    x, y = width // 2, height // 2
    draw.polygon([(x - 230, y - 90), (x - 130, y - 90), (x - 130, y + 90), (x - 230, y + 90)], STEEL, SHADE, 6)
    for edge in (-30, 30):
        draw.line([(x - 230, y + edge), (x - 130, y + edge)], SHADE, 6)
    _shaft(draw, x - 130, x + 240, y)


def eye_bolt(draw: ImageDraw.ImageDraw, width: int, height: int) -> None:
    """A ring, and a threaded shaft."""
    x, y = width // 2, height // 2
    draw.ellipse([x - 290, y - 110, x - 70, y + 110], outline=SHADE, width=52)
    draw.ellipse([x - 284, y - 104, x - 76, y + 104], outline=STEEL, width=40)
    _shaft(draw, x - 75, x + 240, y)


def plane(draw: ImageDraw.ImageDraw, width: int, height: int) -> None:
    """An airliner from the side: body, tail, wing, engine and windows."""
    x, y, white, blue = width // 2, height // 2, (245, 246, 248), (40, 80, 150)
    draw.polygon([(x + 170, y - 10), (x + 260, y - 150), (x + 310, y - 150), (x + 290, y + 10)], blue)
    draw.rounded_rectangle([x - 300, y - 45, x + 250, y + 45], 45, white, SHADE, 4)
    draw.polygon([(x + 200, y - 43), (x + 320, y - 20), (x + 200, y + 43)], white)
    for window in range(x - 220, x + 180, 30):
        draw.ellipse([window, y - 22, window + 13, y - 6], blue)
    draw.polygon([(x - 60, y + 15), (x + 40, y + 15), (x + 150, y + 140), (x + 100, y + 140)], STEEL, SHADE)
    draw.rounded_rectangle([x - 50, y + 58, x + 30, y + 92], 16, SHADE)


def _shaft(draw: ImageDraw.ImageDraw, left: int, right: int, y: int) -> None:
    draw.rectangle([left, y - 34, right, y + 34], STEEL, SHADE, 4)
    for place in range(left + (right - left) // 3, right, 20):
        draw.line([(place, y - 36), (place + 10, y + 36)], SHADE, 6)


def save(image: Image.Image, file: Path) -> None:
    """Write a picture, in a folder that is made if need be."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)


if __name__ == "__main__":
    main()
