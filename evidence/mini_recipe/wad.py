"""Read wall and floor pictures from a WAD, the archive of the Doom engine."""

import struct
from pathlib import Path

import numpy as np

FLOOR = 64  # pixels: floors are squares without a header


def read(path: Path, names: set[str]) -> dict[str, np.ndarray]:
    """Return the floors and wall patches of these names: RGB, uint8, (height, width, 3).

    Raises:
        KeyError: a name is in neither; lists all such names.
    """
    lumps = _lumps(path.read_bytes())
    palette = np.frombuffer(dict(lumps)["PLAYPAL"], np.uint8, 768).reshape(256, 3)
    floors, patches = _between(lumps, "F"), _between(lumps, "P")
    missing = names - floors.keys() - patches.keys()
    if missing:
        raise KeyError(f"{path.name} has no {sorted(missing)}")
    return {name: palette[_floor(floors[name]) if name in floors else _patch(patches[name])] for name in names}


def _lumps(wad: bytes) -> list[tuple[str, bytes]]:
    """Return names and bytes of all entries; names may repeat."""
    _, count, directory = struct.unpack_from("<4sii", wad)
    entries = struct.iter_unpack("<ii8s", wad[directory : directory + 16 * count])
    return [(name.rstrip(b"\0").decode("ascii"), wad[start : start + size]) for start, size, name in entries]


def _between(lumps: list[tuple[str, bytes]], letter: str) -> dict[str, bytes]:
    """Return the entries between two markers, for example F_START and F_END."""
    names = [name for name, _ in lumps]
    return dict(lumps[names.index(f"{letter}_START") + 1 : names.index(f"{letter}_END")])


def _floor(lump: bytes) -> np.ndarray:
    """Return palette indices, uint8, (64, 64)."""
    return np.frombuffer(lump, np.uint8).reshape(FLOOR, FLOOR)


def _patch(lump: bytes) -> np.ndarray:
    """Return palette indices, uint8, (height, width); where nothing is drawn, index 0, which is black."""
    width, height = struct.unpack_from("<hh", lump)
    pixels = np.zeros((height, width), np.uint8)
    for column, place in enumerate(struct.unpack_from(f"<{width}i", lump, 8)):
        while lump[place] != 255:  # a post: top, length, padding, pixels, padding
            top, length = lump[place], lump[place + 1]
            pixels[top : top + length, column] = np.frombuffer(lump, np.uint8, length, place + 3)
            place += length + 4
    return pixels
