"""One merge: from adapters to a version that counts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx
from onnx import ModelProto
from PIL import Image

from exporter.card import card_model, describe
from exporter.checkpoints import architecture
from exporter.errors import OtherBase, RepositoryError
from exporter.graph import fill, to_bytes, trace_image_tower, trace_text_tower
from exporter.manifest import manifest, to_text
from exporter.parity import Parity, check_parity, check_same_graph, measure_parity
from exporter.repository import BASE_VERSION, MANIFEST_FILE, MODEL_FILE, TOWERS, Repository, config, stage, write
from trainer.adapter import Adapter
from trainer.backbone import Backbone, with_weights
from trainer.merge import merge


@dataclass(frozen=True)
class Release:
    """A version that was written, and the checks it passed.

    Attributes:
        model: the common name of the three models.
        version: the newest version written.
        parity: ONNX Runtime against PyTorch.
        graph_identical_to_base: always true of a version that exists; false ones are refused.
        seconds: wall time of the whole merge.
        served: the version that is served: the first ones at once, later ones when they are promoted.
    """

    model: str
    version: int
    parity: Parity
    graph_identical_to_base: bool
    seconds: float
    served: int

    def to_dict(self) -> dict:
        """The fields as JSON has them."""
        return asdict(self) | {"seconds": round(self.seconds, 2)}


def release(
    backbone: Backbone,
    adapters: Sequence[Adapter],
    repository: Repository,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    report: Callable[[str], None] = lambda step: None,
) -> Release:
    """Write the next version: base with all adapters merged; before it version 1, the base, where there is none.

    A repository that serves nothing yet serves them at once; later versions rest in the store until they are promoted.

    Args:
        backbone: the base.
        adapters: one lineage, in order (``trainer.adapter.load_lineage``); empty writes the base alone.
        images, prompts: what ONNX Runtime and PyTorch must agree on.
        report: called with a line when a step begins.

    Raises:
        ParityError: answers or graphs differ; nothing was written.
        RepositoryError: held by another merge, of another base or architecture, or nothing to add.
        UnsupportedModel: the backbone can't be exported or served faithfully.
    """
    began = time.perf_counter()
    with repository.writing() as staging:
        if strays := set(repository.standing()) - set(repository.versions()):
            raise RepositoryError(
                f"repository {repository.path}: version {min(strays)} is not in {repository.store}; restore that, "
                "or merge into a new repository"
            )
        has_base = bool(repository.versions())
        if has_base:
            _check_base(repository, backbone, adapters)
        describe(repository.name, BASE_VERSION, backbone, adapters)  # refuses what clients can't follow, early
        report("tracing both towers")
        graphs = {"image": trace_image_tower(backbone), "text": trace_text_tower(backbone)}
        staged = {}
        if not has_base:
            version = BASE_VERSION
            staged[version] = staging / str(version)
            parity = _stage_version(staged[version], repository, version, backbone, (), graphs, images, prompts, report)
        if adapters:
            version = max(BASE_VERSION, *repository.versions()) + 1 if has_base else BASE_VERSION + 1
            staged[version] = staging / str(version)
            merged = with_weights(backbone, merge(backbone.model.state_dict(), adapters))
            parity = _stage_version(
                staged[version], repository, version, merged, adapters, graphs, images, prompts, report
            )
            base = staged.get(BASE_VERSION, repository.store / str(BASE_VERSION))
            for kind in TOWERS:
                files = (folder / kind / MODEL_FILE for folder in (base, staged[version]))
                check_same_graph(*map(onnx.load, files), f"{kind} tower")
        for number, folder in staged.items():
            repository.add(folder, number)
        if not repository.standing():
            for number in (version, BASE_VERSION):  # the newest first: cut off in between, it is served all the same
                repository.put_in(number, staging)
            repository.record(repository.standing())
    return Release(repository.name, version, parity, True, time.perf_counter() - began, repository.served)


def _check_base(repository: Repository, backbone: Backbone, adapters: Sequence[Adapter]) -> None:
    base = repository.card(repository.versions()[0])["base"]
    if base["fingerprint"] != backbone.fingerprint:
        raise OtherBase(
            f"repository {repository.path}: its {repository.name!r} is {base['model_name']} ({base['pretrained']}), "
            f"base {base['fingerprint'][:8]}; to merge is {backbone.model_name} ({backbone.pretrained}), "
            f"{backbone.fingerprint[:8]}: give another --name or --repository"
        )
    if not repository.file("image", BASE_VERSION).is_file():
        raise RepositoryError(
            f"repository {repository.path}: version {BASE_VERSION}, the base that a merge is compared with, is gone; "
            "merge into a new repository"
        )
    if not adapters:
        raise RepositoryError(
            f"repository {repository.path}: the base is there already and there is no adapter to merge; learn a task "
            "first: trainer fit"
        )


def _stage_version(
    folder: Path,
    repository: Repository,
    version: int,
    backbone: Backbone,
    adapters: Sequence[Adapter],
    graphs: dict[str, ModelProto],
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    report: Callable[[str], None],
) -> Parity:
    """Write a version into a folder, manifest and all, and compare it with PyTorch."""
    label = f"{repository.name} version {version}"
    report(f"{label}: writing")
    weights = backbone.model.state_dict()
    models = {kind: fill(graph, weights) for kind, graph in graphs.items()}
    card = describe(repository.name, version, backbone, adapters)
    models["card"] = card_model(card)
    configs = {kind: config(repository.name, kind, model) for kind, model in models.items()}
    for kind, text in configs.items():
        repository.check_config(kind, text)
    files = {kind: to_bytes(model) for kind, model in models.items()}
    stage(folder, files, configs)
    report(f"{label}: comparing ONNX Runtime with PyTorch")
    parity = measure_parity(backbone, *(folder / kind / MODEL_FILE for kind in TOWERS), images, prompts)
    check_parity(parity, label)
    write(folder / MANIFEST_FILE, to_text(manifest(card, architecture(backbone), adapters, files, parity)).encode())
    return parity
