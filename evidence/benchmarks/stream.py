"""Compare a folder classified through client and Triton with the same ONNX file run in process.

Run: python -m evidence.benchmarks.stream --out runs/stream.json

In process, ONNX Runtime gets pixels that are already decoded and resized. The client does everything: it reads, decodes
and resizes the files, asks the server, and ranks the labels. Server and client share the machine.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import onnxruntime
from cyclopts import Parameter
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from clipweld.client import ZeroShotClassifier
from clipweld.client._images import preprocess
from clipweld.exporter.release.publish import release
from clipweld.exporter.serving.triton import serve
from clipweld.exporter.store.repository import Repository
from clipweld.trainer.base.backbone import Backbone, load_backbone
from clipweld.trainer.tasks import sample
from evidence import command_line
from evidence.command_line import POSITIVE

LABELS = ["a cat", "a dog", "a flag", "a shoe"]
PHOTO = (640, 480)  # pixels of the files, which are JPEG
IDLE_S = 0.3  # threads spin for a while after their work, and would take a core from the next run


def main(
    *,
    model: Annotated[str, Parameter(help="open_clip's name of the model.")] = "ViT-B-16",
    pretrained: Annotated[str, Parameter(help="Its weights; speed doesn't depend on them.")] = "random",
    images: Annotated[int, Parameter(validator=POSITIVE, help="Number of files in the folder.")] = 96,
    batch_size: Annotated[
        list[int] | None, Parameter(validator=POSITIVE, help="In process; may be repeated. [default: 8 16 32]")
    ] = None,
    rounds: Annotated[int, Parameter(validator=POSITIVE, help="Rounds; in each, every run has a turn.")] = 5,
    out: Annotated[Path, Parameter(help="JSON file for the figures.")] = Path("runs/stream.json"),
) -> None:
    """Measure images per second in turn, and the client's throughput as a share of ONNX Runtime's in process."""
    sizes = batch_size or [8, 16, 32]
    with tempfile.TemporaryDirectory(prefix="clipweld-stream-") as folder:
        backbone = load_backbone(model, pretrained)
        repository = Repository(Path(folder) / "model_repository", "clip")
        samples, prompts = sample(images)
        release(backbone, [], repository, samples[:8], prompts)
        photos = Path(folder) / "photos"
        photos.mkdir()
        for number, image in enumerate(samples):
            image.convert("RGB").resize(PHOTO, Image.Resampling.BICUBIC).save(photos / f"{number:05}.jpg", quality=90)
        session = onnxruntime.InferenceSession(repository.file("image", 1), providers=["CPUExecutionProvider"])
        pixels = _pixels(backbone, photos)
        with serve(repository.path) as server, ZeroShotClassifier(server.url, timeout_s=300) as clip:
            runs = {"client": lambda: sum(1 for _ in clip.classify(photos, labels=LABELS, top_k=1))}
            for size in sizes:
                runs[f"ONNX Runtime, batches of {size}"] = lambda size=size: _in_process(session, pixels, size)
            seconds = _time(runs, rounds)
    rows = {
        name: {
            "images_per_s": images / statistics.median(taken),
            "client_share": statistics.median(
                theirs / ours for theirs, ours in zip(taken, seconds["client"], strict=True)
            ),
        }
        for name, taken in seconds.items()
    }
    table = Table("", "images/s", "the client does", title=f"{model}: {images} photos of {PHOTO[0]} x {PHOTO[1]}")
    for name, row in rows.items():
        table.add_row(
            name, f"{row['images_per_s']:.2f}", "" if name == "client" else f"{row['client_share']:.1%} of it"
        )
    Console().print(table)
    out.parent.mkdir(parents=True, exist_ok=True)
    figures = {"model": model, "images": images, "rounds": rounds, "rows": rows}
    out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _pixels(backbone: Backbone, photos: Path) -> np.ndarray:
    """Return the preprocessed photos: uint8 (num_images, image_size, image_size, 3)."""
    how = {
        "size": backbone.image_size,
        "resize_mode": backbone.resize_mode,
        "interpolation": backbone.interpolation,
    }
    return np.stack([preprocess(path, path.name, **how) for path in sorted(photos.iterdir())])


def _in_process(session: onnxruntime.InferenceSession, pixels: np.ndarray, size: int) -> int:
    for start in range(0, len(pixels), size):
        session.run(None, {"image": pixels[start : start + size]})
    return len(pixels)


def _time(runs: dict, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each run in each round; one warm-up round comes first and does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in track(range(rounds + 1), "rounds", console=Console(stderr=True)):
        for name, run in runs.items():
            time.sleep(IDLE_S)
            began = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - began)
    return seconds


if __name__ == "__main__":
    command_line.run(main)
