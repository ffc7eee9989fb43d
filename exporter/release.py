"""One merge: from adapters to a version that counts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

from PIL import Image

from exporter.accuracy import Accuracy, in_onnx_runtime, measure_accuracy, recorded_accuracies
from exporter.build import Build, Builder, Cast
from exporter.card import describe
from exporter.config import Precision
from exporter.errors import OtherBase, RepositoryError
from exporter.gate import Gate
from exporter.lineage import merged_backbone
from exporter.manifest import check_files
from exporter.parity import Parity
from exporter.repository import BASE_VERSION, Repository, towers
from trainer.adapter import Adapter
from trainer.backbone import Backbone
from trainer.tasks import Task


@dataclass(frozen=True)
class Release:
    """A version that was written, and the checks it passed.

    Attributes:
        model: the common name of the three models.
        version: the newest version written.
        parity: ONNX Runtime against PyTorch, both in float32.
        graph_identical_to_base: always true of a version that exists; false ones are refused.
        seconds: wall time of the whole merge.
        served: the version that is served: the first ones at once, later ones when they are promoted.
        precision: what the version computes in.
        accuracy: of every task, before and after.
        cast: how far a lower precision is from float32; None where there is none.
        forced: what it failed at and was written in spite of.
    """

    model: str
    version: int
    parity: Parity
    graph_identical_to_base: bool
    seconds: float
    served: int
    precision: Precision
    accuracy: list[Accuracy]
    cast: Cast | None
    forced: list[str]

    def to_dict(self) -> dict:
        """The fields as JSON has them."""
        return asdict(self) | {"seconds": round(self.seconds, 2)}


@dataclass(frozen=True)
class Checks:
    """What a version must pass beside parity.

    Attributes:
        gate: how good it must be.
        validation: tasks to measure the version served now and the new one on.
        compared_on: tasks with the images on which a lower precision is compared with float32.
    """

    gate: Gate = field(default_factory=Gate)
    validation: Sequence[Task] = ()
    compared_on: Sequence[Task] = ()


def release(
    backbone: Backbone,
    adapters: Sequence[Adapter],
    repository: Repository,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    report: Callable[[str], None] = lambda step: None,
    *,
    precision: Precision = Precision.fp32,
    checks: Checks | None = None,
) -> Release:
    """Write the next version: base with all adapters merged; before it version 1, the base, where there is none.

    A repository that serves nothing yet serves them at once; later versions rest in the store until they are promoted.

    Args:
        backbone: the base.
        adapters: one lineage, in order (``trainer.adapter.load_lineage``); empty writes the base alone.
        images, prompts: what ONNX Runtime and PyTorch must agree on.
        report: called with a line when a step begins.
        precision: of the version; the base, version 1, is always float32.

    Raises:
        ParityError: answers or graphs differ; nothing was written, as with all of these.
        GateClosed: it is worse than was allowed.
        RepositoryError: held by another merge, of another base or architecture, or nothing to add.
        VersionDamaged: a file of the version that this one builds on is not what was written.
        UnsupportedModel: the backbone can't be exported or served faithfully.
    """
    began = time.perf_counter()
    checks = checks or Checks()
    gate, validated = checks.gate, {task.name for task in checks.validation}
    with repository.writing() as staging:
        adds = bool(adapters) or precision is not Precision.fp32
        number = max([BASE_VERSION, *repository.versions()]) + 1
        _check_repository(repository, backbone, adds, number)
        describe(repository.name, BASE_VERSION, backbone, adapters)  # refuses what clients can't follow, early
        served, there = repository.served, repository.versions()
        known = repository.manifest(served)["accuracy"] if served else []
        earlier = {entry["task"] for entry in known} | validated
        recorded = [a for a in recorded_accuracies(adapters, known) if a.task not in validated]
        gate.check(recorded, earlier)  # again below: here it is minutes sooner

        traced = towers(repository.store / str(BASE_VERSION)) if there else None
        builder = Builder(repository, backbone, precision, images, prompts, report, traced)
        builds: list[Build] = []
        if not there:
            builds.append(builder.build(staging / str(BASE_VERSION), BASE_VERSION, backbone, ()))
        base = builds[0].folder if builds else repository.store / str(BASE_VERSION)
        if adds:
            report("merging")
            merged = merged_backbone(repository, backbone, adapters)
            build = builder.build(staging / str(number), number, merged, adapters)
            builder.compare_graphs(build, base)
            if precision is not Precision.fp32:
                builder.cast(build, base, checks.compared_on)
            build.accuracies = recorded
            if validated:
                if served:
                    check_files(repository, served)
                before = repository.store / str(served) if served else base
                encoders = [in_onnx_runtime(merged, *towers(folder)) for folder in (before, build.folder)]
                build.accuracies = recorded + measure_accuracy(merged, *encoders, checks.validation, report)
            build.forced = gate.check(build.accuracies, earlier, build.cast and build.cast.agreement)
            builds.append(build)
        for build in builds:
            repository.check_free(build.number)  # below, what has these numbers is ours to take back
        try:
            for build in builds:
                builder.finish(build)
            if served is None:
                for number in (builds[-1].number, BASE_VERSION):  # killed in between, the newest is served all the same
                    repository.put_in(number, staging)
                repository.record(repository.standing())
        except BaseException:
            for build in builds:
                repository.take_out(build.number, staging)
            repository.remove_empty()  # while the store has what tells that they are ours
            for build in builds:
                repository.remove(build.number)
            raise
    newest = builds[-1]
    return Release(
        model=repository.name,
        version=newest.number,
        parity=newest.parity,
        graph_identical_to_base=True,
        seconds=time.perf_counter() - began,
        served=repository.served,
        precision=newest.precision,
        accuracy=newest.accuracies,
        cast=newest.cast,
        forced=newest.forced,
    )


def check_base(repository: Repository, backbone: Backbone) -> None:
    """Raises:
    OtherBase: versions of other base weights are there.
    """
    for version in repository.versions()[:1]:
        base = repository.card(version)["base"]
        if base["fingerprint"] != backbone.fingerprint:
            raise OtherBase(
                f"repository {repository.path}: its {repository.name!r} is {base['model_name']} "
                f"({base['pretrained']}), base {base['fingerprint'][:8]}; to merge is {backbone.model_name} "
                f"({backbone.pretrained}), {backbone.fingerprint[:8]}: give another --name or --repository"
            )


def _check_repository(repository: Repository, backbone: Backbone, adds: bool, number: int) -> None:
    """Refuse a repository that a version of this base can't go into as this number."""
    repository.check_store()
    repository.check_foreign()
    for new in [*([] if BASE_VERSION in repository.versions() else [BASE_VERSION]), *([number] if adds else [])]:
        repository.check_free(new)
    if not repository.versions():
        return
    check_base(repository, backbone)
    if any(map(repository.is_unmerged, repository.versions())):
        raise RepositoryError(
            f"repository {repository.path}: the versions of {repository.name!r} are unmerged, for measuring speed; "
            "give another --name or --repository"
        )
    if not repository.file("image", BASE_VERSION).is_file():
        raise RepositoryError(
            f"repository {repository.path}: version {BASE_VERSION}, the base that a merge is compared with, is gone; "
            "merge into a new repository"
        )
    if not adds:
        raise RepositoryError(
            f"repository {repository.path}: the base is there already and there is no adapter to merge; learn a task "
            "first: trainer fit"
        )
