"""Versions of the small CLIP to serve, and their correct answers, computed without a server or a client."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from clipweld.exporter.checks.accuracy import in_onnx_runtime
from clipweld.exporter.checks.parity import to_uint8
from clipweld.exporter.release.publish import release
from clipweld.exporter.serving.switch import promote
from clipweld.exporter.store.repository import Repository, towers
from clipweld.trainer.adapters.adapter import load_lineage
from clipweld.trainer.base.backbone import Backbone, load_backbone
from clipweld.trainer.tasks import sample
from evidence.studies.release import EXPERTS, write_adapters
from evidence.trust.answers import FEW, LABELS, Known

IMAGES = 24
SPREAD = 0.04  # of adapters' entries: large enough that the answers of two versions clearly differ


def write_versions(folder: Path, lineages: Sequence[int], name: str = "models") -> Repository:
    """Write a repository with the base as version 1, and one further version per number of random adapters.

    The last version is served.

    Args:
        folder: where the repository and the adapters are written.
        lineages: the number of adapters that are merged into each further version.
        name: of the repository's folder.
    """
    backbone = load_backbone("mini")
    repository = Repository(folder / name, "clip")
    for count in lineages:
        adapters = folder / f"adapters-{count}"
        if not adapters.exists():
            write_adapters(backbone, count, EXPERTS, adapters, SPREAD)
        release(backbone, load_lineage(adapters, backbone.fingerprint), repository, *sample(4))
    promote(repository, repository.versions()[-1], [])
    return repository


def pictures() -> list[Image.Image]:
    """Return real images of many sizes."""
    draw = random.Random(0)
    sizes = [(draw.randint(16, 400), draw.randint(16, 400)) for _ in range(IMAGES)]
    return [image.convert("RGB").resize(size) for image, size in zip(sample(IMAGES)[0], sizes, strict=True)]


def known(repository: Repository, version: int, images: Sequence[Image.Image], backbone: Backbone) -> Known:
    """Compute the correct answers of a version in a repository's store."""
    encoder = in_onnx_runtime(backbone, *towers(repository.store / str(version)))
    batch = torch.stack([backbone.preprocess(image) for image in images])
    pixels = to_uint8(batch, backbone.mean, backbone.std)
    return Known(np.concatenate([encoder.images(part) for part in np.array_split(pixels, 6)]) @ _texts(encoder).T)


def distance(answers: Iterable[Known]) -> float:
    """Return the smallest difference between the scores of any two versions.

    The difference of two versions is taken on the picture on which they differ least. If it is too small, an answer of
    the wrong version is not noticed.
    """
    few = [known.scores[:, : len(FEW)] for known in answers]
    return min(float(np.abs(a - b).max(axis=1).min()) for a, b in itertools.combinations(few, 2))


def _texts(encoder) -> np.ndarray:
    return encoder.classes(LABELS, ("a photo of a {}",))
