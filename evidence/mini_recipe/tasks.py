"""Build the nine tasks from packages, as zips of `train/<class>/*` and `test/<class>/*`.

Here are the six of the list `mini`; the three of `mini-unseen` are in `unseen.py`, equal in bytes to the shipped
zips, given the same packages and libraries. Digits, fashion, emoji and clip art use the same pictures as the shipped
zips (emoji and clip art: exactly the pictures that `held_out.json` lists). Letters and flags are drawn again with other
random numbers, so their zips are of the same kind as the shipped ones but not equal in bytes.
"""

import gzip
import io
import json
import random
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from evidence.mini_recipe import drawing, sources
from evidence.mini_recipe.measure import MINI

HELD_OUT = MINI / "held_out.json"
TRAIN_FONTS = ("fonts-lato", "fonts-roboto-unhinted", "fonts-sil-charis", "fonts-sil-gentium")
TEST_FONTS = ("fonts-quicksand", "fonts-ebgaramond", "fonts-lobster", "fonts-firacode")
COUNTRIES = """
    fr de it es gb us ca br ar mx jp cn in kr za ng eg ke se no fi dk nl be ch at gr tr ua pl pt ie il sa au nz cu jm
    cl vn
"""
Item = tuple[str, str, np.ndarray]  # split, class name, grey or RGB picture, uint8, (64, 64) or (64, 64, 3)


def _enlarged(grey: np.ndarray) -> np.ndarray:
    """Resize a small grey picture, uint8, to 64x64."""
    return np.asarray(Image.fromarray(grey).resize((drawing.SIZE, drawing.SIZE), Image.Resampling.BICUBIC))


def digits(work: sources.Folder, class_names: list[str]) -> Iterator[Item]:
    """Yield scikit-learn's handwritten digits.

    The first 1,000 (at most 100 per class) are for training, those after the first 1,000 for testing.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    times: Counter[int] = Counter()
    for index, (image, label) in enumerate(zip(data.images, data.target.tolist(), strict=True)):
        times[label] += index < 1000
        if index >= 1000 or times[label] <= 100:
            grey = (image * (255 / 16)).round().astype(np.uint8)
            yield "train" if index < 1000 else "test", class_names[label], _enlarged(grey)


def fashion(work: sources.Folder, class_names: list[str]) -> Iterator[Item]:
    """Yield pictures of Fashion-MNIST.

    Per class, the first 100 of its training set are for training, the first 200 of its test set for testing.
    """
    root = work.deb("dataset-fashion-mnist") / "usr/share/datasets/fashion-mnist"
    for split, prefix, most in (("train", "train", 100), ("test", "t10k", 200)):
        pixels = gzip.decompress((root / f"{prefix}-images-idx3-ubyte.gz").read_bytes())
        labels = gzip.decompress((root / f"{prefix}-labels-idx1-ubyte.gz").read_bytes())[8:]
        images = np.frombuffer(pixels, np.uint8, offset=16).reshape(-1, 28, 28)
        times: Counter[int] = Counter()
        for image, label in zip(images, labels, strict=True):
            times[label] += 1
            if times[label] <= most:
                yield split, class_names[label], _enlarged(image)


def letters(work: sources.Folder, class_names: list[str]) -> Iterator[Item]:
    """Yield capital letters, tilted, in contrasting colours with noise.

    There are 40 per class and split, and no font is in both splits.
    """
    for split, packages in (("train", TRAIN_FONTS), ("test", TEST_FONTS)):
        rng = np.random.default_rng([7, split == "test"])
        files = [
            path
            for package in packages
            for path in sorted(work.deb(package).rglob("*"))
            if path.suffix.lower() in (".ttf", ".otf")
        ]
        for name in class_names:
            for _ in range(40):
                glyph = None
                while glyph is None:
                    glyph = drawing.draw_glyph(name.upper(), files[rng.integers(len(files))])
                yield split, name, _on_noisy_ground(glyph, rng)


def _on_noisy_ground(glyph: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Scale, tilt and move a glyph, uint8, (64, 64, 4), and draw it dark on light or light on dark, with noise."""
    side = int(rng.uniform(36, 60))
    mask = Image.fromarray(glyph[..., 3]).resize((side, side), Image.Resampling.BICUBIC)
    mask = mask.rotate(rng.uniform(-15, 15), Image.Resampling.BICUBIC, expand=False)
    canvas = Image.new("L", (drawing.SIZE, drawing.SIZE))
    canvas.paste(mask, tuple(rng.integers(0, drawing.SIZE - side + 1, 2).tolist()))
    dark, light = rng.uniform(0, 120, 3), rng.uniform(140, 255, 3)
    ink, ground = (dark, light) if rng.random() < 0.5 else (light, dark)
    alpha = np.asarray(canvas, dtype=np.float64)[..., None] / 255
    picture = ground + (ink - ground) * alpha + rng.normal(0, 8, (drawing.SIZE, drawing.SIZE, 3))
    return picture.clip(0, 255).astype(np.uint8)


def flags(work: sources.Folder, class_names: list[str]) -> Iterator[Item]:
    """Yield waving flags of 40 countries.

    Per class, 12 made from two emoji sets are for training, 8 made from a third drawing for testing.
    """
    for name, code in zip(class_names, COUNTRIES.split(), strict=True):
        unified = "-".join(f"{0x1F1E6 + ord(letter) - ord('a'):x}" for letter in code)
        vendors = [(vendor, work.npm(f"emoji-datasource-{vendor}")) for vendor in ("twitter", "google")]
        drawings = {
            "train": [folder / "img" / vendor / "64" / f"{unified}.png" for vendor, folder in vendors] * 6,
            "test": [work.npm("svg-country-flags") / "png250px" / f"{code}.png"] * 8,
        }
        for split, paths in drawings.items():
            for index, path in enumerate(paths):
                square = drawing.read_square(path)
                if square is None:
                    raise FileNotFoundError(f"no flag of {name} at {path}")
                yield split, name, _waving(square, random.Random(f"{name} {split} {index}"))


def _waving(square: np.ndarray, rng: random.Random) -> np.ndarray:
    """Make a flag, uint8, (64, 64, 4), wave on a background of one colour, with noise: uint8, (64, 64, 3)."""
    size = drawing.SIZE
    y, x = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    y = y + rng.uniform(0.03, 0.12) * torch.sin(rng.uniform(2, 5) * x + rng.uniform(0, 6.3))
    angle, zoom = rng.uniform(-0.25, 0.25), rng.uniform(0.9, 1.2)
    grid = torch.stack([x + angle * y, y - angle * x], dim=-1)[None] * zoom
    rgba = torch.from_numpy(square.copy()).permute(2, 0, 1)[None].float() / 255
    rgba = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], dim=1)
    bent = F.grid_sample(rgba, grid, mode="bilinear", padding_mode="zeros", align_corners=False)[0]
    ground = torch.tensor([rng.random() for _ in range(3)]).view(3, 1, 1)
    grain = torch.randn(3, size, size, generator=torch.Generator().manual_seed(rng.getrandbits(31)))
    picture = bent[:3] + ground * (1 - bent[3:]) + rng.uniform(0, 0.08) * grain
    return (picture.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()


def emoji(work: sources.Folder, class_names: list[str]) -> Iterator[Item]:
    """Yield the emoji listed in `held_out.json`, on white."""
    for split, name, entry in listed("emoji"):
        vendor, unified = entry.split("/")
        folder = work.npm(f"emoji-datasource-{vendor}") / "img" / vendor / "64"
        yield split, name, _on_white(folder / f"{unified}.png")


def clipart(work: sources.Folder, class_names: list[str]) -> Iterator[Item]:
    """Yield the clip art listed in `held_out.json`, on white."""
    root = work.deb("openclipart-png") / "usr/share/openclipart/png"
    for split, name, entry in listed("clipart"):
        yield split, name, _on_white(root / entry)


def listed(task: str, file: Path = HELD_OUT) -> Iterator[tuple[str, str, str]]:
    """Yield split, class name and picture (a code or path) of every entry of a task in a list of pictures."""
    for split, classes in json.loads(file.read_text(encoding="utf-8"))[task].items():
        for name, entries in classes.items():
            for entry in entries:
                yield split, name, entry


def _on_white(path: Path) -> np.ndarray:
    square = drawing.read_square(path)
    if square is None:
        raise FileNotFoundError(f"no picture at {path}")
    return drawing.on_white(square[None])[0].round().astype(np.uint8)


BUILDERS: dict[str, Callable[[sources.Folder, list[str]], Iterator[Item]]] = {
    "digits": digits,
    "fashion": fashion,
    "letters": letters,
    "flags": flags,
    "emoji": emoji,
    "clipart": clipart,
}


def write(task: str, items: Iterator[Item], class_names: list[str], path: Path) -> dict[str, list[int]]:
    """Write a task's zip and return the number of pictures per split and class, in the order of ``class_names``.

    The bytes depend on the pictures alone: no dates are stored.
    """
    counts = {split: [0] * len(class_names) for split in ("train", "test")}
    with zipfile.ZipFile(path, "w") as archive:
        for split, name, pixels in items:
            index = class_names.index(name)
            encoded = io.BytesIO()
            suffix = "png" if pixels.ndim == 2 else "webp"
            Image.fromarray(pixels).save(encoded, format=suffix, quality=90)
            member = zipfile.ZipInfo(f"{split}/{name}/{counts[split][index]:03d}.{suffix}")
            archive.writestr(member, encoded.getvalue())
            counts[split][index] += 1
    return counts


def build(work: sources.Folder, out: Path) -> None:
    """Write all nine zips and `tasks.json` to a folder, with the class names and templates of the shipped tasks."""
    from evidence.mini_recipe import unseen  # imports this module

    catalogue = json.loads((MINI / "tasks" / "tasks.json").read_text(encoding="utf-8"))
    out.mkdir(parents=True, exist_ok=True)
    for name, builder in (BUILDERS | unseen.BUILDERS).items():
        names = catalogue[name]["class_names"]
        catalogue[name]["counts"] = write(name, builder(work, names), names, out / f"{name}.zip")
    (out / "tasks.json").write_text(json.dumps(catalogue, indent=1) + "\n", encoding="utf-8")
