"""Building a version: write it to a folder, compare it with PyTorch, cast it, and write its manifest."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from clipweld.exporter import __version__
from clipweld.exporter.checks.accuracy import in_onnx_runtime, measure_agreement
from clipweld.exporter.checks.parity import check_parity, check_same_graph, measure_parity
from clipweld.exporter.config import OPSET, Precision
from clipweld.exporter.disk import changing, write
from clipweld.exporter.graph import onnx_file
from clipweld.exporter.graph.branches import branch_weights
from clipweld.exporter.graph.config_pbtxt import config
from clipweld.exporter.graph.onnx_file import DATA_FILE
from clipweld.exporter.graph.precision import Towers
from clipweld.exporter.graph.trace import hollow
from clipweld.exporter.release.checkpoints import architecture
from clipweld.exporter.results import Accuracy, Cast, Parity
from clipweld.exporter.store.card import card_model, describe
from clipweld.exporter.store.manifest import to_text
from clipweld.exporter.store.repository import (
    CONFIG_FILE,
    EXACT,
    KINDS,
    MANIFEST_FILE,
    MODEL_FILE,
    TOWERS,
    Repository,
    towers,
)
from clipweld.exporter.store.schemas import MANIFEST_FORMAT, Card, Manifest
from clipweld.trainer.adapters.adapter import Adapter
from clipweld.trainer.base.backbone import Backbone
from clipweld.trainer.schemas import sha256_of
from clipweld.trainer.tasks import Task

TOOLS = ("torch", "open_clip_torch", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu")


@dataclass
class Build:
    """A version that is being built.

    Attributes:
        folder: staged, with the layout of the store.
        backbone: the version in PyTorch.
        parity: of its float32 towers.
        cast: None where it stays float32.
        forced: faults that ``--force`` overrides.
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
    """Build the versions of one repository, all on the graphs of version 1: traced once, by one version of torch.

    Args:
        backbone: the base.
        images, prompts: samples on which ONNX Runtime and PyTorch are compared.
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
        self.repository, self._base, self._precision = repository, backbone, precision
        self._samples, self.report = (images, prompts), report
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
            ConfigChanged: a model in the repository has another configuration.
        """
        label = f"{self.repository.name} version {number}"
        self.report(f"{label}: writing")
        card = describe(self.repository.name, number, backbone, adapters)
        weights: Mapping[str, Tensor] = backbone.model.state_dict()
        branches: Sequence[Adapter] = ()
        if unmerged:
            weights, branches = self._base.model.state_dict() | branch_weights(adapters), adapters
        for kind in KINDS:
            model = card_model(card) if kind == "card" else self._towers.exact(kind, weights, branches)
            text = config(self.repository.name, kind, model)
            self.repository.check_config(kind, text)
            onnx_file.save(model, folder / kind / MODEL_FILE)
            write(folder / kind / CONFIG_FILE, text.encode())
            del model  # hundreds of megabytes
        self.report(f"{label}: comparing ONNX Runtime with PyTorch")
        parity = measure_parity(backbone, *towers(folder), *self._samples)
        check_parity(parity, label)
        return Build(number, folder, backbone, adapters, card, parity, unmerged=unmerged)

    def compare_graphs(self, build: Build, base: Path) -> None:
        """Compare a float32 version's graphs with those of the base.

        Args:
            base: the folder of version 1.

        Raises:
            GraphsDiffer: they differ in more than weights.
        """
        names = build.backbone.model.state_dict()
        for kind, ours, theirs in zip(TOWERS, towers(build.folder), towers(base), strict=True):
            check_same_graph(hollow(theirs, names), hollow(ours, names), f"{kind} tower")

    def cast(self, build: Build, base: Path, tasks: Sequence[Task]) -> None:
        """Cast a float32 version to the builder's precision; its float32 towers are kept in the ``fp32`` folder.

        Args:
            base: the folder of version 1, whose cast must give the same graph.
            tasks: with the images on which the cast is compared with PyTorch in float32.

        Raises:
            GraphsDiffer: base and version differ in more than weights.
        """
        self.report(f"{self.repository.name} version {build.number}: casting to {self._precision.value}")
        weights, base_weights = build.backbone.model.state_dict(), self._base.model.state_dict()
        for kind in TOWERS:
            exact = build.folder / kind / MODEL_FILE
            model = self._towers.cast(kind, weights, exact)
            if model is None:
                continue
            same = self._towers.cast(kind, base_weights, base / kind / MODEL_FILE)
            assert same is not None  # of the same precision
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
            measure_agreement(build.backbone, served, tasks, self.report),
        )
        build.precision = self._precision

    def finish(self, build: Build) -> None:
        """Write the manifest and move the version into the store."""
        write(build.folder / MANIFEST_FILE, to_text(manifest(build, architecture(build.backbone))).encode())
        self.repository.add(build.folder, build.number)


def manifest(build: Build, architecture: str) -> Manifest:
    """Return a version's manifest: its origin, its checks, and the hashes of its files.

    Args:
        build: complete in its folder.
        architecture: the name by which open_clip builds its model.
    """
    card = build.card
    models = sorted(build.folder.rglob(MODEL_FILE))
    files = {file.parent.relative_to(build.folder).as_posix(): file for file in models}
    files |= {file.relative_to(build.folder).as_posix(): file for file in sorted(build.folder.rglob(DATA_FILE))}
    return {
        "format": MANIFEST_FORMAT,
        "model": card["model"],
        "version": build.number,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "base": {**card["base"], "architecture": architecture},
        "lineage": [{"task": adapter.task, "sha256": adapter.sha256} for adapter in build.adapters],
        "accuracy": [_plain(accuracy) for accuracy in build.accuracies],
        "forced": build.forced,
        "unmerged": build.unmerged,
        "precision": build.precision.value,
        "opset": OPSET,
        "parity": _plain(build.parity),
        "cast": _plain(build.cast) if build.cast else None,
        "files": {part: {"sha256": sha256_of(file), "bytes": file.stat().st_size} for part, file in files.items()},
        "tools": {"python": platform.python_version(), "clipweld": __version__}
        | {tool: found for tool in TOOLS if (found := _version(tool))},
    }


def _plain(record: Accuracy | Parity | Cast) -> Any:
    """The TypedDict of the same name in ``clipweld.exporter.store.schemas``."""
    return asdict(record)


def _version(tool: str) -> str | None:
    try:
        return version(tool)
    except PackageNotFoundError:
        return None
