"""Proving a version again, with nothing but its own files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import onnx
import torch
from onnx import numpy_helper
from PIL import Image

from exporter.errors import RepositoryError
from exporter.manifest import check_files
from exporter.parity import Parity, check_parity, check_same_graph, measure_parity
from exporter.repository import BASE_VERSION, TOWERS, Repository
from trainer.backbone import Backbone, load_backbone, with_weights


@dataclass(frozen=True)
class Verified:
    """A version whose files are those that were written, and that still answers as PyTorch does.

    Attributes:
        parity: measured now, PyTorch with the weights that are in the files.
        recorded: measured when the version was made.
        graph_identical_to_base: whether it was compared with version 1; None where that is gone.
    """

    model: str
    version: int
    parity: Parity
    recorded: dict
    graph_identical_to_base: bool | None

    def to_dict(self) -> dict:
        """The fields as JSON has them."""
        return asdict(self)


def verify(repository: Repository, version: int, images: Sequence[Image.Image], prompts: Sequence[str]) -> Verified:
    """Hash a version's files, compare its graph with the base's and its answers with PyTorch's.

    Args:
        images, prompts: what ONNX Runtime and PyTorch must agree on.

    Raises:
        VersionMissing: no such version.
        VersionDamaged: a file is not what was written.
        ParityError: answers or graphs differ.
    """
    repository.check(version)
    check_files(repository, version)
    files = {kind: repository.file(kind, version) for kind in TOWERS}
    same_graph = None
    if BASE_VERSION in repository.versions():
        for kind in TOWERS:
            base = repository.file(kind, BASE_VERSION)
            check_same_graph(onnx.load(base), onnx.load(files[kind]), f"{kind} tower of version {version}")
        same_graph = True
    parity = measure_parity(_read_backbone(repository, version), *files.values(), images, prompts)
    check_parity(parity, f"{repository.name} version {version}")
    recorded = repository.manifest(version)["parity"]
    return Verified(repository.name, version, parity, recorded, same_graph)


def _read_backbone(repository: Repository, version: int) -> Backbone:
    """The CLIP that a version's files hold, in PyTorch: initializers have open_clip's own names."""
    base = repository.manifest(version)["base"]
    backbone = load_backbone(base["architecture"], "random")
    own = backbone.model.state_dict()
    stored = {
        tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy())
        for kind in TOWERS
        for tensor in onnx.load(repository.file(kind, version)).graph.initializer
        if tensor.name in own
    }
    if missing := set(own) - set(stored) - {"logit_scale", "logit_bias"}:
        raise RepositoryError(
            f"{repository.name} version {version}: its towers lack {min(missing)} of {base['architecture']}; was it "
            "written for another open_clip?"
        )
    return with_weights(backbone, own | stored)
