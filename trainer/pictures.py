"""Pictures of nothing in particular: shapes and strokes, drawn by a seed.

They stand in for all the images that a model is not being taught and that nobody kept. That such pictures teach much of
what real ones do is the finding of *Learning to See by Looking at Noise* (arXiv 2106.05963).
"""

from __future__ import annotations

import functools
import random

from PIL import Image, ImageDraw

SIZE = 128
COUNTS = (1, 2, 3, 5, 8, 15, 30)


@functools.lru_cache(maxsize=1024)
def picture(seed: int) -> Image.Image:
    """One RGB picture of ``SIZE`` pixels: up to thirty shapes on a plain ground, a third of them tilted or grey."""
    draw = random.Random(f"picture {seed}")
    image = Image.new("RGB", (SIZE, SIZE), draw.choice([(0, 0, 0), (255, 255, 255), _colour(draw), _colour(draw)]))
    canvas = ImageDraw.Draw(image)
    for _ in range(draw.choice(COUNTS)):
        _shape(canvas, draw)
    if draw.random() < 1 / 3:
        image = image.rotate(draw.uniform(-30, 30), resample=Image.Resampling.BILINEAR)
    return image.convert("L").convert("RGB") if draw.random() < 1 / 3 else image


def _shape(canvas: ImageDraw.ImageDraw, draw: random.Random) -> None:
    """A rectangle, ellipse, polygon, line, arc, or stripe, of any size and place."""
    width, height = (abs(draw.gauss(0, SIZE / 3)) + 6 for _ in range(2))
    left, top = draw.uniform(-width / 2, SIZE - width / 2), draw.uniform(-height / 2, SIZE - height / 2)
    box = (left, top, left + width, top + height)
    colour, stroke = _colour(draw), draw.randrange(2, 16)

    def points(count: int) -> list[tuple[float, float]]:
        return [(draw.uniform(0, SIZE), draw.uniform(0, SIZE)) for _ in range(count)]

    kind = draw.randrange(6)
    if kind == 0:
        canvas.rectangle(box, fill=colour)
    elif kind == 1:
        canvas.ellipse(box, fill=colour)
    elif kind == 2:
        canvas.polygon(points(draw.randrange(3, 7)), fill=colour)
    elif kind == 3:
        canvas.line(points(draw.randrange(2, 6)), fill=colour, width=stroke, joint="curve")
    elif kind == 4:
        canvas.arc(box, draw.randrange(360), draw.randrange(360), fill=colour, width=stroke)
    else:
        canvas.rectangle(
            draw.choice([(0, top, SIZE, top + height / 2), (left, 0, left + width / 2, SIZE)]), fill=colour
        )


def _colour(draw: random.Random) -> tuple[int, int, int]:
    return draw.randrange(256), draw.randrange(256), draw.randrange(256)
