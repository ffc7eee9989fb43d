"""The weights of a version: read from the files of an earlier version, with only the remaining adapters merged."""

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
    """Return the base with all adapters merged, starting from the stored version that has most of them.

    That version's hashes are checked first. Adapters are added one by one in float32, so the weights are bit-identical
    to a merge from the base.

    Args:
        adapters: one lineage, in order.

    Raises:
        VersionDamaged: a file of that version differs from its manifest entry.
    """
    weights, parent = backbone.model.state_dict(), _parent(repository, adapters)
    learned = 0
    if parent is not None:
        check_files(repository, parent)
        weights = weights | read_weights(repository, parent, weights)
        learned = len(repository.manifest(parent)["lineage"])
    return on_weights(backbone, merge(weights, adapters[learned:]))


def read_weights(repository: Repository, version: int, names: Container[str]) -> dict[str, Tensor]:
    """Read a version's float32 weights, by open_clip's names, which the initializers keep; branches are merged.

    Args:
        names: of weights; other tensors in the graphs are ignored.
    """
    tensors = {
        tensor.name: torch.from_numpy(onnx_file.values(tensor, file))
        for file in (repository.exact_file(kind, version) for kind in TOWERS)
        for tensor in onnx_file.load(file).graph.initializer
    }
    return {name: tensor for name, tensor in fold_branches(tensors).items() if name in names}


def on_weights(backbone: Backbone, weights: dict[str, Tensor]) -> Backbone:
    """Return the backbone with other weights, which are shared: a copy would take half a gigabyte."""
    own = (*backbone.model.parameters(), *backbone.model.buffers())
    model = copy.deepcopy(backbone.model, {id(tensor): tensor for tensor in own})
    model.load_state_dict(weights, assign=True)
    return replace(backbone, model=model.requires_grad_(False))


def _parent(repository: Repository, adapters: Sequence[Adapter]) -> int | None:
    """Return the newest version with the longest lineage that is a prefix of these adapters, if any."""
    hashes = [adapter.sha256 for adapter in adapters]
    found = {}
    for version in repository.versions():
        lineage = [entry["sha256"] for entry in repository.manifest(version)["lineage"]]
        if lineage and lineage == hashes[: len(lineage)]:
            found[len(lineage), version] = version
    return found[max(found)] if found else None
