"""Build three more tasks, which no setting was chosen on: textures, signs and icons.

`unseen.json` lists which picture shows which class in which split. No file is in both splits. The pictures of a file
that is drawn or cropped several times are alike, but always in the same split.
"""

import itertools
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from evidence.mini_recipe import drawing, sources, wad
from evidence.mini_recipe.tasks import Item, listed

LISTED = Path(__file__).with_name("unseen.json")
TEXTURES = {"train": 30, "test": 36}  # crops per class
SIGNS = {"train": 24, "test": 24}  # drawings per class
SMALLEST_CROP = 48  # pixels


def textures(work: sources.Folder, class_names: list[str]) -> Iterator[Item]:
    """Yield square crops of pictures of materials, scaled to 64x64; 30 per class for training, 36 for testing.

    The files are materials of simulators, mostly photos, and walls and floors of a game.
    """
    files = _by_class("textures")
    entries = {entry for group in files.values() for entry in group}
    pictures = {entry: _photo(work, entry) for entry in entries if not entry.startswith("freedoom/")}
    game = wad.read(
        work.deb("freedoom") / "usr/share/games/doom/freedoom2.wad",
        {entry.removeprefix("freedoom/") for entry in entries - pictures.keys()},
    )
    pictures |= {f"freedoom/{name}": Image.fromarray(pixels) for name, pixels in game.items()}
    for (split, name), group in files.items():
        for index, entry in zip(range(TEXTURES[split]), itertools.cycle(group)):
            yield split, name, _cropped(pictures[entry], random.Random(f"{name} {split} {index}"))


def _photo(work: sources.Folder, entry: str) -> Image.Image:
    with Image.open(work.wheel(entry.split("/")[0]) / entry) as picture:
        return picture.convert("RGB")


def _cropped(picture: Image.Image, rng: random.Random) -> np.ndarray:
    """Cut a random square out of an RGB picture, mirror it in half of the cases, and scale it: uint8, (64, 64, 3)."""
    short = min(picture.size)
    side = min(short, max(SMALLEST_CROP, round(short * rng.uniform(0.35, 0.75))))
    left, top = (rng.randint(0, length - side) for length in picture.size)
    box = (left, top, left + side, top + side)
    square = picture.resize((drawing.SIZE, drawing.SIZE), Image.Resampling.LANCZOS, box)
    return np.asarray(square.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else square)


def signs(work: sources.Folder, class_names: list[str]) -> Iterator[Item]:
    """Yield road signs of many countries, tilted, on a ground of one colour with noise.

    There are 24 per class and split; a country's sign is in one of the splits only.
    """
    folder = work.npm("mapillary_sprite_source") / "package_signs"
    for (split, name), group in _by_class("signs").items():
        squares = [_visible(drawing.read_svg(folder / f"{entry}.svg"), entry) for entry in group]
        for index, square in zip(range(SIGNS[split]), itertools.cycle(squares)):
            yield split, name, _put_up(square, random.Random(f"{name} {split} {index}"))


def _put_up(square: np.ndarray, rng: random.Random) -> np.ndarray:
    """Scale, tilt and move a sign, uint8, (64, 64, 4), on a dull ground, with noise: uint8, (64, 64, 3)."""
    side = rng.randint(52, drawing.SIZE)
    sign = Image.fromarray(square).convert("RGBa").resize((side, side), Image.Resampling.BICUBIC)
    sign = sign.rotate(rng.uniform(-8, 8), Image.Resampling.BICUBIC).convert("RGBA")
    grey = rng.randint(60, 200)
    colour = tuple(grey + rng.randint(-25, 25) for _ in range(3))
    ground = Image.new("RGBA", (drawing.SIZE, drawing.SIZE), colour)
    left, top = (rng.randint(0, drawing.SIZE - side) for _ in range(2))
    ground.alpha_composite(sign, (left, top))
    grain = np.random.default_rng(rng.getrandbits(31)).normal(0, rng.uniform(0, 6), (drawing.SIZE, drawing.SIZE, 3))
    light = rng.uniform(0.75, 1.0)
    return (np.asarray(ground)[..., :3] * light + grain).clip(0, 255).astype(np.uint8)


def icons(work: sources.Folder, class_names: list[str]) -> Iterator[Item]:
    """Yield icons in black on white: grey, uint8, (64, 64); no icon set is in both splits."""
    sets: dict[str, dict[str, Any]] = {}
    for split, name, entry in listed("icons", LISTED):
        place, icon = entry.split("/")
        if place not in sets:
            path = work.npm(f"@iconify-json/{place}") / "icons.json"
            sets[place] = json.loads(path.read_text(encoding="utf-8"))
        square = _visible(drawing.draw_icon(sets[place], icon), entry)
        yield split, name, drawing.on_white(square[None])[0].mean(axis=-1).round().astype(np.uint8)


def _visible(square: np.ndarray | None, entry: str) -> np.ndarray:
    if square is None:
        raise ValueError(f"nothing is visible in {entry}")
    return square


def _by_class(task: str) -> dict[tuple[str, str], list[str]]:
    """Return the listed pictures of each split and class."""
    groups = defaultdict(list)
    for split, name, entry in listed(task, LISTED):
        groups[split, name].append(entry)
    return groups


BUILDERS: dict[str, Callable[[sources.Folder, list[str]], Iterator[Item]]] = {
    "textures": textures,
    "signs": signs,
    "icons": icons,
}
