"""Read and check the records that ``trainer sequence`` writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from clipweld.trainer.adapters.adapter import Adapter, load_adapter
from clipweld.trainer.adapters.folder import adapter_files
from clipweld.trainer.errors import ReportError
from clipweld.trainer.schemas import Json, one_line, read_json, read_json_file
from clipweld.trainer.sequence.folder import Finished, SequenceResult

RECORD = "sequence.json"
VALIDATION = ", validation"  # what clipweld.trainer.tasks.validation adds to a task's source


@dataclass(frozen=True)
class Run:
    """One sequence of tasks, learned once.

    Attributes:
        name: path of its folder, relative to the folder that is reported on.
        order_seed: seed that shuffled the tasks; None if their order was given.
        validation: whether accuracy was measured on held-out training images, not on test images.
        config: the settings of the run, including the number of devices and the precision.
        results: by label space: "task" (images are classified among the classes of their own task) and "union" (among
            those of all tasks).
    """

    name: str
    folder: Path
    model: str
    pretrained: str
    order_seed: int | None
    validation: bool
    config: dict[str, Any]
    results: Mapping[str, SequenceResult]

    @property
    def result(self) -> SequenceResult:
        """The results in the label space "task", which every record has; only accuracies depend on the space."""
        return self.results["task"]

    @property
    def method(self) -> str:
        return self.result.method

    @property
    def order(self) -> tuple[str, ...]:
        """The learned tasks, first to last."""
        return tuple(self.result.tasks)

    @property
    def seed(self) -> int:
        return self.result.seed

    def measure(self, space: str, name: str) -> float | None:
        """Return transfer, average, last or forgetting in percent; None if it is not defined."""
        return getattr(self.results[space], name)

    def zero_shot(self, space: str) -> float:
        """Return the mean accuracy on the learned tasks before anything was learned, in percent."""
        return mean(self.results[space].zero_shot[: len(self.order)])

    def zero_shot_transfer(self, space: str) -> float | None:
        """Return what Transfer would be if learning changed nothing: the mean over all learned tasks but the first."""
        return mean(self.results[space].zero_shot[1 : len(self.order)]) if len(self.order) > 1 else None

    def gain(self, space: str) -> float | None:
        """Return Transfer minus zero-shot accuracy on the same tasks."""
        transfer, before = self.measure(space, "transfer"), self.zero_shot_transfer(space)
        return None if transfer is None or before is None else transfer - before

    def adapters(self) -> list[Adapter]:
        """Load the adapters of the learned tasks, in the order they were learned; methods without adapters have none.

        Raises:
            AdapterError: an adapter is corrupted or can't be read.
        """
        found = {adapter.task: adapter for adapter in map(load_adapter, adapter_files(self.folder / "adapters"))}
        return [found[task] for task in self.order if task in found]


def read_runs(root: Path) -> list[Run]:
    """Read all runs at any depth below a folder, sorted by path.

    Raises:
        ReportError: no such folder, no record below it, or a record that can't be read.
    """
    if not root.is_dir():
        raise ReportError(f"{root}: no such folder; give one that 'trainer sequence --out' wrote to")
    paths = sorted(root.rglob(RECORD))
    if not paths:
        raise ReportError(f"{root}: no {RECORD} in it or below it; 'trainer sequence --out {root}' writes one")
    return [_read(path, root) for path in paths]


def _read(path: Path, root: Path) -> Run:
    try:
        record = {"precision": None, **read_json_file(Json, path)}  # which the first records lack
        found = read_json(Finished, json.dumps(record))
        if "task" not in found.results:
            raise ValueError("its results lack the label space 'task'")
        for result in found.results.values():
            _check(found, result)
    except (OSError, ValueError) as exc:
        raise ReportError(
            f"{path}: not a record that this trainer can read ({one_line(str(exc))}); remove it, or run "
            "'trainer sequence' again"
        ) from exc
    precision = {} if found.precision is None else {"precision": found.precision}
    return Run(
        name=path.parent.relative_to(root).as_posix(),
        folder=path.parent,
        model=found.model,
        pretrained=found.pretrained,
        order_seed=found.order_seed,
        validation=any(source.endswith(VALIDATION) for source in found.sources),
        config={**found.config, "devices": found.devices, **precision},
        results=dict(found.results.items()),
    )


def _check(found: Finished, result: SequenceResult) -> None:
    """Check that a result belongs to its run and is complete.

    Raises:
        ValueError: its method or tasks are not the run's, or it has too many or too few rows, or rows of wrong length.
    """
    if (result.method, result.tasks) != (found.method, found.tasks):
        raise ValueError("its results are not of its method and its tasks")
    if not result.tasks or result.tested[: len(result.tasks)] != result.tasks:
        raise ValueError("the tested tasks do not begin with the learned ones")
    if len(result.matrix) not in (1, len(result.tasks)):
        raise ValueError(f"{len(result.matrix)} rows of accuracies for {len(result.tasks)} learned tasks")
    if result.class_matrix and len(result.class_matrix) != len(result.matrix):
        raise ValueError(f"{len(result.class_matrix)} rows of means over classes, {len(result.matrix)} of accuracies")
    if any(len(row) != len(result.tested) for row in (result.zero_shot, *result.matrix, *result.class_matrix)):
        raise ValueError(f"a row of accuracies is not as long as the {len(result.tested)} tested tasks")
