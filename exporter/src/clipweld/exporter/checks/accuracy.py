"""A version's accuracy on labelled images, and its agreement with PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F

from clipweld.exporter.checks.parity import TIE, check_unit, to_uint8
from clipweld.exporter.results import Accuracy, Agreement
from clipweld.exporter.store import schemas
from clipweld.trainer.adapters.adapter import Adapter
from clipweld.trainer.base.backbone import Backbone, encode_classes
from clipweld.trainer.tasks import Images, Task
from clipweld.trainer.text import prompt_of

BATCH_SIZE = 8
AGREEMENT_IMAGES = 400  # of all tasks together: at 99%, four may differ


@dataclass(frozen=True)
class Encoder:
    """A CLIP as clients see it: pixels and class names to L2-normalised features.

    Attributes:
        images: uint8 (batch, image_size, image_size, 3) -> float32 (batch, embed_dim).
        classes: (class names, templates) -> float32 (num_classes, embed_dim).
    """

    images: Callable[[np.ndarray], np.ndarray]
    classes: Callable[[tuple[str, ...], tuple[str, ...]], np.ndarray]


def in_onnx_runtime(backbone: Backbone, image_file: Path, text_file: Path) -> Encoder:
    """Run two tower files on the CPU; the backbone provides only the tokenizer."""
    image, text = (_session(file) for file in (image_file, text_file))

    def classes(class_names: tuple[str, ...], templates: tuple[str, ...]) -> np.ndarray:
        prompts = [prompt_of(template, name) for name in class_names for template in templates]
        tokens = backbone.tokenizer(prompts).to(torch.int32).numpy()
        parts = np.array_split(tokens, -(-len(tokens) // BATCH_SIZE))
        cut = (part[:, : int(part.argmax(axis=1).max()) + 1] for part in parts)
        features = np.concatenate([text(part) for part in cut]).reshape(len(class_names), len(templates), -1)
        mean: np.ndarray = features.mean(axis=1)
        unit: np.ndarray = mean / np.linalg.norm(mean, axis=1, keepdims=True)
        return unit

    return Encoder(image, classes)


def in_pytorch(backbone: Backbone) -> Encoder:
    """Run the backbone itself, in float32."""
    mean, std = (torch.tensor(value).view(1, -1, 1, 1) for value in (backbone.mean, backbone.std))

    @torch.no_grad()
    def images(pixels: np.ndarray) -> np.ndarray:
        scaled = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std
        return F.normalize(backbone.model.encode_image(scaled), dim=-1).numpy()

    return Encoder(images, lambda *classes: encode_classes(backbone, *classes).numpy())


def measure_accuracy(
    backbone: Backbone, before: Encoder, after: Encoder, tasks: Sequence[Task], report: Callable[[str], None]
) -> list[Accuracy]:
    """Measure the accuracy of two versions on all test images of the tasks.

    Args:
        backbone: provides the preprocessing of both.
    """
    measured = []
    for task in tasks:
        images = task.load("test")
        scores = _scores(backbone, (before, after), task, images, report)
        right = [(s.argmax(axis=1) == np.asarray(images.labels)).mean() for s in scores]
        percent = [round(100 * float(share), 2) for share in right]
        measured.append(Accuracy(task.name, percent[0], percent[1], "merge"))
    return measured


def measure_agreement(
    backbone: Backbone, served: Encoder, tasks: Sequence[Task], report: Callable[[str], None]
) -> list[Agreement]:
    """Measure how often a version's files agree with PyTorch, on some test images of every task.

    Args:
        backbone: the version in PyTorch.
    """
    measured = []
    for task in tasks:
        images = task.load("test")
        places = np.linspace(0, len(images) - 1, min(len(images), -(-AGREEMENT_IMAGES // len(tasks))), dtype=int)
        few = images.subset(places.tolist())
        want, got = _scores(backbone, (in_pytorch(backbone), served), task, few, report)
        rows = np.arange(len(few))
        agree = want.max(axis=1) - want[rows, got.argmax(axis=1)] <= TIE
        measured.append(Agreement(task.name, round(float(agree.mean()), 4), len(few)))
    return measured


def recorded_accuracies(adapters: Sequence[Adapter], served: Sequence[schemas.Accuracy]) -> list[Accuracy]:
    """Return the accuracies that the trainer measured, valid here because adapters are bound to their base by hash.

    Other tasks that the served version was measured on are included without an ``after``.

    Args:
        adapters: one lineage, in order.
        served: the accuracies in the manifest of the version that is served now.
    """
    before = {entry["task"]: entry["after"] for entry in served}
    after = adapters[-1].accuracy.get("after", {}) if adapters else {}
    learned = [
        Accuracy(
            adapter.task,
            before.get(adapter.task, adapter.accuracy.get("before", {}).get(adapter.task)),
            after.get(adapter.task),
            "training",
        )
        for adapter in adapters
    ]
    names = {accuracy.task for accuracy in learned}
    return [
        *learned,
        *(Accuracy(task, figure, None, "training") for task, figure in before.items() if task not in names),
    ]


def _scores(
    backbone: Backbone, encoders: Sequence[Encoder], task: Task, images: Images, report: Callable[[str], None]
) -> list[np.ndarray]:
    """Return cosines (num_images, num_classes) per encoder; each image is read once.

    Raises:
        NotFinite: a feature is not a unit vector.
    """
    classes = [encoder.classes(task.class_names, task.templates) for encoder in encoders]
    for weights in classes:
        check_unit(weights, f"class names of {task.name}")
    rows: list[list[np.ndarray]] = [[] for _ in encoders]
    for done, pixels in _batches(backbone, images):
        report(f"{task.name}: {done:,} of {len(images):,} images")
        for encoder, weights, found in zip(encoders, classes, rows, strict=True):
            features = encoder.images(pixels)
            check_unit(features, f"test images of {task.name} up to {done}")
            found.append(features @ weights.T)
    return [np.concatenate(found) for found in rows]


def _batches(backbone: Backbone, images: Images) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(images), BATCH_SIZE):
        stop = min(start + BATCH_SIZE, len(images))
        pixels = torch.stack([images.pixels(index, backbone.preprocess) for index in range(start, stop)])
        yield stop, to_uint8(pixels, backbone.mean, backbone.std)


def _session(file: Path) -> Callable[[np.ndarray], np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda rows: session.run(None, {name: rows})[0]
