"""A version in the making: written into a folder, compared with PyTorch, cast, and at last described."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from exporter import onnx_file
from exporter.accuracy import Accuracy, Agreement, in_onnx_runtime, measure_agreement
from exporter.branches import branch_weights
from exporter.card import card_model, describe
from exporter.checkpoints import architecture
from exporter.config import Precision
from exporter.disk import changing, write
from exporter.graph import hollow
from exporter.manifest import manifest, to_text
from exporter.parity import Parity, check_parity, check_same_graph, measure_parity
from exporter.pbtxt import config
from exporter.precision import Towers
from exporter.records import Card
from exporter.repository import (
    CONFIG_FILE,
    EXACT,
    KINDS,
    MANIFEST_FILE,
    MODEL_FILE,
    TOWERS,
    Repository,
    towers,
)
from trainer.adapter import Adapter
from trainer.backbone import Backbone
from trainer.tasks import Task


@dataclass(frozen=True)
class Cast:
    """How far a version of lower precision is from PyTorch in float32.

    Attributes:
        parity: on the images and prompts that every version is compared on.
        agreement: of the best labels, on labelled images.
    """

    parity: Parity
    agreement: list[Agreement]


@dataclass
class Build:
    """One version.

    Attributes:
        folder: as it will stand in the store.
        backbone: the version in PyTorch.
        parity: of its float32 towers.
        cast: None where it stays float32.
        forced: what it fails at and is released in spite of.
        unmerged: whether its adapters are branches in its graphs.
    """

    number: int
    folder: Path
    backbone: Backbone
    adapters: Sequence[Adapter]
    card: Card
    parity: Parity
    precision: Precision = Precision.fp32
    cast: Cast | None = None
    accuracies: list[Accuracy] = field(default_factory=list)
    forced: list[str] = field(default_factory=list)
    unmerged: bool = False


class Builder:
    """Builds the versions of one repository, all with the graphs of its version 1: traced once, by one torch.

    Args:
        backbone: the base.
        images, prompts: what ONNX Runtime and PyTorch are compared on.
        traced: the towers of version 1; None where there is none yet.

    Raises:
        UnsupportedModel: the backbone can't be exported.
    """

    def __init__(
        self,
        repository: Repository,
        backbone: Backbone,
        precision: Precision,
        images: Sequence[Image.Image],
        prompts: Sequence[str],
        report: Callable[[str], None],
        traced: tuple[Path, Path] | None,
    ) -> None:
        self._repository, self._base, self._precision = repository, backbone, precision
        self._samples, self._report = (images, prompts), report
        report("reading the graphs of both towers" if traced else "tracing both towers")
        self._towers = Towers(backbone, precision, traced)

    def build(
        self, folder: Path, number: int, backbone: Backbone, adapters: Sequence[Adapter], *, unmerged: bool = False
    ) -> Build:
        """Write a version in float32 and compare it with PyTorch.

        Args:
            backbone: with the adapters merged.
            unmerged: write the base with the adapters as branches; its answers must be the same.

        Raises:
            AnswersDiffer: they disagree.
            ConfigChanged: a model stands in the repository with another configuration.
        """
        label = f"{self._repository.name} version {number}"
        self._report(f"{label}: writing")
        card = describe(self._repository.name, number, backbone, adapters)
        weights, branches = backbone.model.state_dict(), ()
        if unmerged:
            weights, branches = self._base.model.state_dict() | branch_weights(adapters), adapters
        for kind in KINDS:
            model = card_model(card) if kind == "card" else self._towers.exact(kind, weights, branches)
            text = config(self._repository.name, kind, model)
            self._repository.check_config(kind, text)
            onnx_file.save(model, folder / kind / MODEL_FILE)
            write(folder / kind / CONFIG_FILE, text.encode())
            del model  # of hundreds of megabytes
        self._report(f"{label}: comparing ONNX Runtime with PyTorch")
        parity = measure_parity(backbone, *towers(folder), *self._samples)
        check_parity(parity, label)
        return Build(number, folder, backbone, adapters, card, parity, unmerged=unmerged)

    def compare_graphs(self, build: Build, base: Path) -> None:
        """Hold a float32 version's graphs against those of the base.

        Args:
            base: the folder of version 1.

        Raises:
            GraphsDiffer: in more than weights.
        """
        names = build.backbone.model.state_dict()
        for kind, ours, theirs in zip(TOWERS, towers(build.folder), towers(base), strict=True):
            check_same_graph(hollow(theirs, names), hollow(ours, names), f"{kind} tower")

    def cast(self, build: Build, base: Path, tasks: Sequence[Task]) -> None:
        """Bring a float32 version to the builder's precision; the towers it had are kept beside.

        Args:
            base: the folder of version 1, of which the same must become.
            tasks: with the images on which it is compared with PyTorch in float32.

        Raises:
            GraphsDiffer: base and version differ in more than weights.
        """
        self._report(f"{self._repository.name} version {build.number}: casting to {self._precision.value}")
        weights, base_weights = build.backbone.model.state_dict(), self._base.model.state_dict()
        for kind in TOWERS:
            exact = build.folder / kind / MODEL_FILE
            model = self._towers.cast(kind, weights, exact)
            if model is None:
                continue
            same = self._towers.cast(kind, base_weights, base / kind / MODEL_FILE)
            check_same_graph(same, model, f"{kind} tower in {self._precision.value}")
            kept = build.folder / EXACT / kind / MODEL_FILE
            with changing(kept):
                kept.parent.mkdir(parents=True)
                for file in (exact, onnx_file.data_file(exact)):
                    if file.exists():
                        file.rename(kept.parent / file.name)
            onnx_file.save(model, exact)
        served = in_onnx_runtime(build.backbone, *towers(build.folder))
        build.cast = Cast(
            measure_parity(build.backbone, *towers(build.folder), *self._samples),
            measure_agreement(build.backbone, served, tasks, self._report),
        )
        build.precision = self._precision

    def finish(self, build: Build) -> None:
        """Write the manifest and move the version into the store."""
        write(build.folder / MANIFEST_FILE, to_text(manifest(build, architecture(build.backbone))).encode())
        self._repository.add(build.folder, build.number)
