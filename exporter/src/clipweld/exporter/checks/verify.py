"""Verification of a stored version from its own files alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from PIL import Image

from clipweld.exporter.checks.parity import check_cast, check_parity, check_same_graph, measure_parity
from clipweld.exporter.errors import RepositoryError
from clipweld.exporter.graph.trace import hollow
from clipweld.exporter.results import Parity
from clipweld.exporter.store import schemas
from clipweld.exporter.store.lineage import on_weights, read_weights
from clipweld.exporter.store.manifest import check_files
from clipweld.exporter.store.repository import BASE_VERSION, TOWERS, Repository
from clipweld.trainer.base.backbone import Backbone, load_backbone


@dataclass(frozen=True)
class Verified:
    """A version whose files are unchanged and whose answers still equal PyTorch's.

    Attributes:
        parity: measured now in float32, against PyTorch with the weights read from the files.
        recorded: parity measured when the version was made.
        cast: parity of the served towers where their precision is lower, else None.
        graph_identical_to_base: True if compared with version 1; None if that is gone, or the version is unmerged.
    """

    model: str
    version: int
    parity: Parity
    recorded: schemas.Parity
    cast: Parity | None
    graph_identical_to_base: bool | None

    def to_dict(self) -> dict:
        """The fields as JSON has them."""
        return asdict(self)


def verify(repository: Repository, version: int, images: Sequence[Image.Image], prompts: Sequence[str]) -> Verified:
    """Hash a version's files, compare its graph with the base's and its answers with PyTorch's.

    Args:
        images, prompts: samples on which ONNX Runtime and PyTorch must agree.

    Raises:
        VersionMissing: no such version.
        VersionDamaged: a file differs from its manifest entry.
        ParityError: answers or graphs differ.
        AnswersDiffer: a lower precision is further from PyTorch than it was when the version was made.
    """
    repository.check(version)
    check_files(repository, version)
    files = {kind: repository.exact_file(kind, version) for kind in TOWERS}
    label, manifest = f"{repository.name} version {version}", repository.manifest(version)
    backbone = _read_backbone(repository, version)
    names, same_graph = backbone.model.state_dict(), None
    if BASE_VERSION in repository.versions() and not repository.is_unmerged(version):
        for kind in TOWERS:
            base = hollow(repository.file(kind, BASE_VERSION), names)
            check_same_graph(base, hollow(files[kind], names), f"{kind} tower of version {version}")
        same_graph = True
    parity = measure_parity(backbone, files["image"], files["text"], images, prompts)
    check_parity(parity, label)
    cast = None
    if manifest["cast"]:
        image, text = (repository.file(kind, version) for kind in TOWERS)
        cast = measure_parity(backbone, image, text, images, prompts)
        check_cast(cast, Parity(**manifest["cast"]["parity"]), label)
    return Verified(repository.name, version, parity, manifest["parity"], cast, same_graph)


def _read_backbone(repository: Repository, version: int) -> Backbone:
    """Rebuild a version in PyTorch from the weights in its files."""
    base = repository.manifest(version)["base"]
    backbone = load_backbone(base["architecture"], "random")
    own = backbone.model.state_dict()
    stored = read_weights(repository, version, own)
    if missing := set(own) - set(stored) - {"logit_scale", "logit_bias"}:
        raise RepositoryError(
            f"{repository.name} version {version}: its towers lack {min(missing)} of {base['architecture']}; was it "
            "written for another open_clip?"
        )
    return on_weights(backbone, own | stored)
