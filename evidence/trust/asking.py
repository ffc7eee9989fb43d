"""A process that runs clients without torch: it classifies until its stdin is closed, then prints the outcomes.

It reads one line of JSON from stdin: URLs by protocol, the folder to which ``keep`` wrote pictures and scores, a seed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from evidence.trust.answers import Known
from evidence.trust.load import Load, Manner, Truth

MANNER = Manner(timeout_s=30, retries=3, deadline_s=None, most_images=100, pause_s=0.1)
SCORES = "scores.npz"


def keep(folder: Path, pictures: Sequence[Image.Image], versions: Mapping[int, Known]) -> None:
    """Write the pictures and the correct scores for a process of clients."""
    for place, picture in enumerate(pictures):
        picture.save(folder / f"{place:03}.png")
    np.savez(folder / SCORES, **{str(version): known.scores for version, known in versions.items()})


def main() -> None:
    told = json.loads(sys.stdin.readline())
    folder = Path(told["folder"])
    pictures = [Image.open(file).convert("RGB") for file in sorted(folder.glob("*.png"))]
    with np.load(folder / SCORES) as scores:
        truth = Truth({int(version): Known(scores[version]) for version in scores.files})
    with Load(told["urls"], pictures, truth, told["seed"], workers=1, manner=MANNER) as load:
        sys.stdin.read()
    print(json.dumps({"ends": load.ends, "images": load.images, "faults": load.faults}))


if __name__ == "__main__":
    main()
