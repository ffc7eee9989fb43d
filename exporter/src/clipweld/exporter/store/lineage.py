"""The weights of a version: read back from its files, and merged anew only as far as no earlier version has them."""

from __future__ import annotations

import copy
from collections.abc import Container, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from clipweld.exporter.graph import onnx_file
from clipweld.exporter.graph.branches import fold_branches
from clipweld.exporter.store.manifest import check_files
from clipweld.exporter.store.repository import TOWERS, Repository
from clipweld.trainer.adapters.adapter import Adapter
from clipweld.trainer.adapters.merge import merge
from clipweld.trainer.base.backbone import Backbone


def merged_backbone(repository: Repository, backbone: Backbone, adapters: Sequence[Adapter]) -> Backbone:
    """The base with all adapters merged, built on the version in the store that has most of them.

    Its files are held against their hashes first. Adapters are added one after the other in float32, so the weights
    are those of a merge from the base, to the bit.

    Args:
        adapters: one lineage, in order.

    Raises:
        VersionDamaged: a file of that version is not what was written.
    """
    weights, parent = backbone.model.state_dict(), _parent(repository, adapters)
    learned = 0
    if parent is not None:
        check_files(repository, parent)
        weights = weights | read_weights(repository, parent, weights)
        learned = len(repository.manifest(parent)["lineage"])
    return on_weights(backbone, merge(weights, adapters[learned:]))


def read_weights(repository: Repository, version: int, names: Container[str]) -> dict[str, Tensor]:
    """A version's float32 weights, by open_clip's own names, which initializers have; branches are folded in.

    Args:
        names: of weights; what else is in the graphs is left out.
    """
    tensors = {
        tensor.name: torch.from_numpy(onnx_file.values(tensor, file))
        for file in (repository.exact_file(kind, version) for kind in TOWERS)
        for tensor in onnx_file.load(file).graph.initializer
    }
    return {name: tensor for name, tensor in fold_branches(tensors).items() if name in names}


def on_weights(backbone: Backbone, weights: dict[str, Tensor]) -> Backbone:
    """The same backbone on other weights, which are taken as they are: a CLIP's copy would be half a gigabyte."""
    own = (*backbone.model.parameters(), *backbone.model.buffers())
    model = copy.deepcopy(backbone.model, {id(tensor): tensor for tensor in own})
    model.load_state_dict(weights, assign=True)
    return replace(backbone, model=model.requires_grad_(False))


def _parent(repository: Repository, adapters: Sequence[Adapter]) -> int | None:
    """The version with the longest lineage that these adapters go on from; the newest of several, none for the base."""
    hashes = [adapter.sha256 for adapter in adapters]
    found = {}
    for version in repository.versions():
        lineage = [entry["sha256"] for entry in repository.manifest(version)["lineage"]]
        if lineage and lineage == hashes[: len(lineage)]:
            found[len(lineage), version] = version
    return found[max(found)] if found else None
