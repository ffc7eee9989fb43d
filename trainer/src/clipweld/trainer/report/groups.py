"""Groups of runs that may be averaged: they share model, tasks, method and settings; seed and order may differ."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from statistics import mean, stdev
from typing import Any

from clipweld.trainer.config import LABEL_SPACES, METHODS, TrainConfig, on_benchmark, train_config
from clipweld.trainer.report.runs import Run

NOT_SETTINGS = {"seed", "order_seed"}


@dataclass(frozen=True)
class Spread:
    """Values of several runs: their mean and, for two or more, standard deviation (n - 1 in the denominator)."""

    values: tuple[float, ...]

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float:
        return mean(self.values)

    @property
    def sd(self) -> float | None:
        return stdev(self.values) if self.n > 1 else None


def spread(values: Iterable[float | None]) -> Spread | None:
    """Return the spread of the values that are defined; None if there are none."""
    defined = tuple(value for value in values if value is not None)
    return Spread(defined) if defined else None


@dataclass(frozen=True)
class Group:
    """Runs of one method with one set of settings.

    Attributes:
        label: the method, and each setting in which the group differs from the method's reference group.
        is_reference: whether the other groups of the method are labelled by their differences from this one. It is the
            group with the model's default settings; if there is none, the group that differs in the fewest settings
            from all others, as the starting point of ablations does. Ties go to the group with the most runs, then to
            the highest final accuracy.
        runs: sorted by seed, then by order.
    """

    method: str
    label: str
    is_reference: bool
    runs: tuple[Run, ...]

    @property
    def config(self) -> dict[str, Any]:
        """Settings that all runs of the group share."""
        return _settings(self.runs[0])

    @property
    def seeds(self) -> set[int]:
        return {run.seed for run in self.runs}

    @property
    def orders(self) -> set[tuple[str, ...]]:
        return {run.order for run in self.runs}

    @property
    def repeats(self) -> int:
        """Number of runs that repeat the seed and order of another run, so they say nothing about the spread."""
        return len(self.runs) - len({(run.seed, run.order) for run in self.runs})

    @property
    def kept_parameters(self) -> float:
        """Number of parameters kept per task, mean over runs."""
        return mean(run.result.kept_parameters for run in self.runs)

    def measure(self, space: str, name: str) -> Spread | None:
        """Return a measure over the group's runs, in percent; None if no run defines it."""
        return spread(run.measure(space, name) for run in self.runs)

    def last(self, space: str) -> Spread:
        """Return the final accuracy over the group's runs, in percent; every run defines it."""
        return Spread(tuple(run.results[space].last for run in self.runs))

    def last_classes(self, space: str) -> Spread | None:
        """Return the final accuracy over the group's runs, mean over classes, in percent; None in old records."""
        matrices = [(len(run.order), run.results[space].class_matrix) for run in self.runs]
        return spread(mean(matrix[-1][:learned]) for learned, matrix in matrices if matrix)

    def gain(self, space: str) -> Spread | None:
        """Return Transfer minus zero-shot accuracy on the same tasks, in each run's own order, in percentage points."""
        return spread(run.gain(space) for run in self.runs)

    def zero_shot(self, space: str, name: str) -> Spread | None:
        """Return what a measure would be if learning changed nothing, over the group's runs; None for forgetting."""
        runs = [run for run in self.runs if run.measure(space, name) is not None]
        if name == "forgetting" or not runs:
            return None
        return spread(run.zero_shot_transfer(space) if name == "transfer" else run.zero_shot(space) for run in runs)

    def against(self, other: Group, space: str, name: str) -> Spread | None:
        """Return a measure minus that of another group, over runs with the same seed and order."""
        theirs = {(run.seed, run.order): run.measure(space, name) for run in other.runs}
        pairs = [(run.measure(space, name), theirs.get((run.seed, run.order))) for run in self.runs]
        return spread(mine - its for mine, its in pairs if mine is not None and its is not None)


@dataclass(frozen=True)
class Section:
    """Groups that may be compared: one model that learned one set of tasks, tested on one kind of images.

    Attributes:
        validation: whether accuracy was measured on held-out training images, not on test images.
        groups: by method, the pool first; within a method, its reference group first.
    """

    model: str
    pretrained: str
    validation: bool
    groups: tuple[Group, ...]

    @property
    def runs(self) -> list[Run]:
        return [run for group in self.groups for run in group.runs]

    @property
    def spaces(self) -> list[str]:
        """Label spaces in which all runs were measured; the union only if all runs tested the same tasks."""
        measured = set.intersection(*(set(run.results) for run in self.runs))
        if len({frozenset(run.result.tested) for run in self.runs}) > 1:
            measured.discard("union")
        return [space for space in LABEL_SPACES if space in measured]

    @property
    def watched(self) -> list[str]:
        """Tasks that a run tested but never learned."""
        return sorted({task for run in self.runs for task in run.result.tested} - set(self.order))

    @cached_property
    def order(self) -> tuple[str, ...]:
        """The order of tasks that most groups used; ties go to the order as given, then to the lowest order seed."""
        shared = Counter(order for group in self.groups for order in group.orders)
        seeds = {run.order: run.order_seed for run in reversed(self.runs)}
        return min(shared, key=lambda order: (-shared[order], seeds[order] is not None, seeds[order] or 0, order))

    @property
    def orders(self) -> list[tuple[str, ...]]:
        """All orders in which methods learned task after task, the reference order first."""
        found = dict.fromkeys(run.order for run in self.runs if len(run.result.matrix) > 1 or len(run.order) == 1)
        return sorted(found or [self.order], key=lambda order: order != self.order)

    @property
    def reference(self) -> Group:
        """The group that the others are compared with."""
        return self.groups[0]

    def representative(self, group: Group) -> Run:
        """Return the run to show if a figure has room for one: in the reference order, with the lowest seed."""
        return min(group.runs, key=lambda run: (run.order != self.order, run.seed))

    def zero_shot(self, space: str) -> Spread:
        """Return the mean zero-shot accuracy on the learned tasks: one value, unless it differs between machines."""
        return Spread(tuple(sorted({round(run.zero_shot(space), 4) for run in self.runs})))

    def zero_shot_transfer(self, space: str) -> Spread | None:
        """Return what Transfer would be if learning changed nothing, one value per order."""
        found = {run.order: run.zero_shot_transfer(space) for run in self.runs}
        return spread(found[order] for order in self.orders)


def sections(runs: Sequence[Run]) -> list[Section]:
    """Divide runs by model, kind of test images and set of learned tasks, in the order in which they appear."""
    found: dict[tuple, list[Run]] = {}
    for run in runs:
        found.setdefault((run.model, run.pretrained, run.validation, frozenset(run.order)), []).append(run)
    return [
        Section(model, pretrained, validation, _groups(some))
        for (model, pretrained, validation, _), some in found.items()
    ]


def _groups(runs: Sequence[Run]) -> tuple[Group, ...]:
    by_method: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        settings = json.dumps(_settings(run), sort_keys=True)
        by_method.setdefault(run.method, {}).setdefault(settings, []).append(run)
    known = {method: place for place, method in enumerate(METHODS)}
    groups = []
    for method in sorted(by_method, key=lambda name: (known.get(name, len(known)), name)):
        candidates = list(by_method[method].values())
        reference = max(candidates, key=lambda some: _standing(some, candidates))
        rest = [some for some in candidates if some is not reference]
        labelled = sorted((_label(method, some[0], reference[0]), some) for some in rest)
        for label, some in [(method, reference), *labelled]:
            ordered = sorted(some, key=lambda run: (run.seed, run.order_seed or 0, run.name))
            groups.append(Group(method, label, some is reference, tuple(ordered)))
    return tuple(groups)


def _by_default(run: Run) -> bool:
    """Return whether a run has the default settings of its model and method."""
    default = on_benchmark(asdict(train_config(run.model, run.method)), run.model)
    mine = _settings(run)
    return all(mine.get(name) == value for name, value in default.items() if name not in NOT_SETTINGS)


def _standing(some: list[Run], candidates: list[list[Run]]) -> tuple:
    """Return a key that is highest for the best reference, as defined by ``Group.is_reference``."""
    apart = sum(len(_differing(some[0], others[0])) for others in candidates)
    return _by_default(some[0]), -apart, len(some), mean(run.result.last for run in some)


def _label(method: str, run: Run, reference: Run) -> str:
    mine = _settings(run)
    return ", ".join([method, *(f"{name}={mine.get(name, 'unset')}" for name in _differing(run, reference))])


def _differing(run: Run, reference: Run) -> list[str]:
    """Return the settings in which two runs differ, in the reference's order."""
    mine, theirs = _settings(run), _settings(reference)
    names = [*theirs, *(name for name in mine if name not in theirs)]
    return [name for name in names if mine.get(name, "unset") != theirs.get(name, "unset")]


def _settings(run: Run) -> dict[str, Any]:
    """Return the settings of a run; one that came after its record was written is as it was before there was one."""
    settings = on_benchmark({**asdict(TrainConfig()), "precision": "32-true", **run.config}, run.model)
    return {name: value for name, value in settings.items() if name not in NOT_SETTINGS}
