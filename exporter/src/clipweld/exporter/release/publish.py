"""One merge: from adapters to a published version."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from PIL import Image

from clipweld.exporter.checks.accuracy import in_onnx_runtime, measure_accuracy, recorded_accuracies
from clipweld.exporter.checks.gate import Gate
from clipweld.exporter.config import Precision
from clipweld.exporter.errors import OtherBase, RepositoryError
from clipweld.exporter.release.build import Build, Builder
from clipweld.exporter.results import Accuracy, Cast, Parity
from clipweld.exporter.store.card import describe
from clipweld.exporter.store.lineage import merged_backbone
from clipweld.exporter.store.manifest import check_files
from clipweld.exporter.store.repository import BASE_VERSION, Repository, towers
from clipweld.trainer.adapters.adapter import Adapter
from clipweld.trainer.base.backbone import Backbone
from clipweld.trainer.tasks import Task


@dataclass(frozen=True)
class Release:
    """A version that was written, and the checks it passed.

    Attributes:
        model: the common name of the three models.
        version: the newest version written.
        parity: ONNX Runtime against PyTorch, both in float32.
        graph_identical_to_base: always true of a version that exists; false ones are refused.
        seconds: wall time of the whole merge.
        served: the active version. First versions are activated at once, later ones when promoted.
        precision: of the version.
        accuracy: of every task, before and after.
        cast: how far a lower precision is from float32; None where there is none.
        forced: faults that ``--force`` overrode.
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
    """What a version must pass besides parity.

    Attributes:
        gate: limits on its accuracy and agreement.
        validation: tasks on which the served version and the new one are measured.
        compared_on: tasks whose images are used to compare a lower precision with float32.
    """

    gate: Gate = field(default_factory=Gate)
    validation: Sequence[Task] = ()
    compared_on: Sequence[Task] = ()


@dataclass(frozen=True)
class _Known:
    """Facts determined before anything is built.

    Attributes:
        number: of the next version; None where only the base is written.
        recorded: accuracies that the trainer and earlier releases measured.
        earlier: the tasks that the served version was or will be measured on.
    """

    number: int | None
    recorded: list[Accuracy]
    earlier: set[str]


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
    """Write the next version, base with all adapters merged; in a new repository, write the base as version 1 first.

    If nothing is served yet the versions are activated at once; later versions stay in the store until promoted.

    Args:
        backbone: the base.
        adapters: one lineage, in order (see ``load_lineage``); empty writes the base alone.
        repository: gets the version.
        images: samples on which ONNX Runtime and PyTorch must agree.
        prompts: texts on which they must agree, likewise.
        report: called with a line when a step begins.
        precision: of the version; the base, version 1, is always float32.
        checks: what else the version must satisfy.

    Raises:
        ParityError: answers or graphs differ. This and all errors below leave nothing written.
        GateClosed: it is worse than the limits allow.
        RepositoryError: held by another merge, of another base or architecture, or nothing to add.
        VersionDamaged: a file of the version that this one builds on differs from its manifest entry.
        UnsupportedModel: the backbone can't be exported or served faithfully.
    """
    began = time.perf_counter()
    checks = checks or Checks()
    with repository.writing() as staging:
        known = _preflight(repository, backbone, adapters, precision, checks)
        traced = towers(repository.store / str(BASE_VERSION)) if repository.versions() else None
        builder = Builder(repository, backbone, precision, images, prompts, report, traced)
        builds = _build(builder, staging, backbone, adapters, precision, checks, known)
        _publish(builder, builds, staging)
    newest, served = builds[-1], repository.served
    assert served is not None  # _publish activates the first versions
    return Release(
        model=repository.name,
        version=newest.number,
        parity=newest.parity,
        graph_identical_to_base=True,
        seconds=time.perf_counter() - began,
        served=served,
        precision=newest.precision,
        accuracy=newest.accuracies,
        cast=newest.cast,
        forced=newest.forced,
    )


def _preflight(
    repository: Repository, backbone: Backbone, adapters: Sequence[Adapter], precision: Precision, checks: Checks
) -> _Known:
    """Refuse before the build what would be refused after it: building takes minutes."""
    adds = bool(adapters) or precision is not Precision.fp32
    number = max([BASE_VERSION, *repository.versions()]) + 1
    _check_repository(repository, backbone, adds, number)
    describe(repository.name, BASE_VERSION, backbone, adapters)  # refuses models that clients can't handle
    validated = {task.name for task in checks.validation}
    served = repository.served
    before = repository.manifest(served)["accuracy"] if served else []
    recorded = [found for found in recorded_accuracies(adapters, before) if found.task not in validated]
    earlier = {entry["task"] for entry in before} | validated
    checks.gate.check(recorded, earlier)
    return _Known(number if adds else None, recorded, earlier)


def _build(
    builder: Builder,
    staging: Path,
    backbone: Backbone,
    adapters: Sequence[Adapter],
    precision: Precision,
    checks: Checks,
    known: _Known,
) -> list[Build]:
    """Build and check the missing versions in the staging folder: the base if there is none, and the next one."""
    repository, builds = builder.repository, []
    if not repository.versions():
        builds.append(builder.build(staging / str(BASE_VERSION), BASE_VERSION, backbone, ()))
    if known.number is None:
        return builds
    base = builds[0].folder if builds else repository.store / str(BASE_VERSION)
    builder.report("merging")
    merged = merged_backbone(repository, backbone, adapters)
    build = builder.build(staging / str(known.number), known.number, merged, adapters)
    builder.compare_graphs(build, base)
    if precision is not Precision.fp32:
        builder.cast(build, base, checks.compared_on)
    build.accuracies = known.recorded
    if checks.validation:
        served = repository.served
        if served:
            check_files(repository, served)
        before = repository.store / str(served) if served else base
        old, new = (in_onnx_runtime(merged, *towers(folder)) for folder in (before, build.folder))
        measured = measure_accuracy(merged, old, new, checks.validation, builder.report)
        build.accuracies = known.recorded + measured
    agreements = build.cast.agreement if build.cast else None
    build.forced = checks.gate.check(build.accuracies, known.earlier, agreements)
    return [*builds, build]


def _publish(builder: Builder, builds: Sequence[Build], staging: Path) -> None:
    """Move versions into the store, and activate them if nothing is served yet; on failure undo all of it."""
    repository = builder.repository
    for build in builds:
        repository.check_free(build.number)  # so that the rollback below deletes only what this call wrote
    try:
        first = repository.served is None
        for build in builds:
            builder.finish(build)
        if first:
            for number in (builds[-1].number, BASE_VERSION):  # newest first: after a kill in between it is served
                repository.put_in(number, staging)
            repository.record(repository.standing())
    except BaseException:
        for build in builds:
            repository.take_out(build.number, staging)
        repository.remove_empty()  # before the store's copies go, which prove that the models are ours
        for build in builds:
            repository.remove(build.number)
        raise


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
    """Refuse a repository that can't take a version of this base with this number."""
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
