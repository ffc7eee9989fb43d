"""Versions with unmerged adapters, used only to measure the cost of adapters against base and merged.

They form a separate model, ``<name>-unmerged``, in the same repository, so requests to ``<name>`` and its versions are
not affected. A version's number is the number of adapters in its graph.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from PIL import Image

from clipweld.exporter.config import Precision
from clipweld.exporter.errors import RepositoryError
from clipweld.exporter.release.build import Builder
from clipweld.exporter.release.publish import check_base
from clipweld.exporter.results import Parity
from clipweld.exporter.store.lineage import on_weights
from clipweld.exporter.store.repository import BASE_VERSION, Repository, towers
from clipweld.trainer.adapters.adapter import Adapter
from clipweld.trainer.adapters.merge import merge
from clipweld.trainer.base.backbone import Backbone

STEP = 4


@dataclass(frozen=True)
class Unmerged:
    """The unmerged versions that were written.

    Attributes:
        model: the common name of the three models.
        versions: their numbers; each is the number of adapters in its graph.
        parity: per version, ONNX Runtime against PyTorch with the same adapters merged.
        seconds: wall time.
    """

    model: str
    versions: list[int]
    parity: list[Parity]
    seconds: float

    def to_dict(self) -> dict:
        """The fields as JSON has them."""
        return asdict(self) | {"seconds": round(self.seconds, 2)}


def release_unmerged(
    backbone: Backbone,
    adapters: Sequence[Adapter],
    repository: Repository,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    report: Callable[[str], None] = lambda step: None,
) -> Unmerged:
    """Write or replace ``<name>-unmerged``, with the first 1, 4, 16, ... and all adapters.

    Its versions are active at once on disk; a running server loads them only on request.

    Args:
        backbone: the base.
        adapters: one lineage, in order.
        repository: of ``<name>``.
        images, prompts: samples on which its answers must equal those of the merged weights.
        report: called with a line when a step begins.

    Raises:
        AnswersDiffer: they don't. This and all errors below leave nothing written.
        RepositoryError: held by another merge, of another base, without an adapter, or the name is taken.
        UnsupportedModel: the backbone can't be exported, or not with unmerged adapters.
    """
    began = time.perf_counter()
    if not adapters:
        raise RepositoryError(
            f"repository {repository.path}: there is no adapter to leave unmerged; learn a task first: trainer fit"
        )
    sibling = Repository(repository.path, f"{repository.name}-unmerged")
    with sibling.writing() as staging:
        check_base(repository, backbone)
        sibling.check_replaceable()
        if not all(map(sibling.is_unmerged, sibling.versions())):
            raise RepositoryError(
                f"repository {repository.path}: {sibling.name!r} has merged versions, which unmerged ones would "
                "replace; give another --name or --repository"
            )
        base = towers(repository.store / str(BASE_VERSION))
        traced = base if all(file.is_file() for file in base) else None
        builder = Builder(sibling, backbone, Precision.fp32, images, prompts, report, traced)
        builds = []
        for count in counts(len(adapters)):
            some = adapters[:count]
            merged = on_weights(backbone, merge(backbone.model.state_dict(), some))
            builds.append(builder.build(staging / str(count), count, merged, some, unmerged=True))
        with sibling.replacing(staging):
            for build in builds:
                builder.finish(build)
            for build in builds:
                sibling.put_in(build.number, staging)
    return Unmerged(
        sibling.name,
        [build.number for build in builds],
        [build.parity for build in builds],
        time.perf_counter() - began,
    )


def counts(adapters: int) -> list[int]:
    """Return numbers of adapters to measure: 1, 4, 16, ... and all, enough to see the cost of one more."""
    return [*(STEP**n for n in range(adapters) if STEP**n < adapters), adapters]
