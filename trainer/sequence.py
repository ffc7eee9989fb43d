"""Task after task: the accuracy matrix and what it says about transfer and forgetting."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

from trainer.adapter import Adapter, save_adapter
from trainer.backbone import Backbone
from trainer.config import TrainConfig
from trainer.errors import ConfigError
from trainer.evaluate import evaluate
from trainer.fit import Step, fit
from trainer.tasks import Task


@dataclass(frozen=True)
class SequenceResult:
    """What learning ``tasks`` one after another did to the accuracy on ``tested``, in percent.

    Attributes:
        tasks: learned, in this order.
        tested: columns of the matrix: the learned tasks, then those that were only watched.
        zero_shot: row 0, before anything was learned.
        matrix: row i is the accuracy on every tested task after learning task i.
        transfer, average, last, forgetting: over the learned tasks; None where one task alone defines nothing.
    """

    method: str
    tasks: list[str]
    tested: list[str]
    label_space: str
    seed: int
    zero_shot: list[float]
    matrix: list[list[float]]
    transfer: float | None
    average: float
    last: float
    forgetting: float | None
    trainable_parameters: int
    kept_parameters: int
    seconds_per_task: list[float]


def run_sequence(
    tasks: Sequence[Task],
    base: Backbone,
    config: TrainConfig,
    out: Path,
    *,
    watch: Sequence[Task] = (),
    on_task: Callable[[Task], Callable[[Step], None]] = lambda task: lambda step: None,
) -> SequenceResult:
    """Learn tasks one after another, each on top of the last, and test all of them after each.

    Writes ``adapters/<task>.safetensors`` and ``sequence.json`` below ``out``.

    Args:
        watch: tasks that are tested but never learned.
        on_task: told of every task as it begins; what it returns is told of every step.

    Raises:
        ConfigError: ``out`` holds adapters already, or a task stands twice.
    """
    names = [task.name for task in (*tasks, *watch)]
    if len(set(names)) < len(names):
        raise ConfigError(f"a task stands twice in: {' '.join(names)}; name each once")
    if any((out / "adapters").glob("*.safetensors")):
        raise ConfigError(f"{out / 'adapters'} holds adapters already; give another --out, or remove the folder")
    tested = [*tasks, *watch]
    rows = [evaluate(base, tested)]
    lineage: list[Adapter] = []
    seconds, trainable = [], 0
    for task in tasks:
        fitted = fit(task, base, lineage, config, test_on=tested, before=rows[-1], on_step=on_task(task))
        lineage.append(fitted.adapter)
        save_adapter(fitted.adapter, out / "adapters" / f"{task.name}.safetensors")
        rows.append(fitted.adapter.accuracy["after"])
        seconds.append(round(fitted.seconds, 2))
        trainable = fitted.trainable_parameters
    table = [[row[task.name] for task in tested] for row in rows]
    learned = [row[: len(tasks)] for row in table[1:]]
    result = SequenceResult(
        method="pool",
        tasks=[task.name for task in tasks],
        tested=[task.name for task in tested],
        label_space="task",
        seed=config.seed,
        zero_shot=table[0],
        matrix=table[1:],
        transfer=transfer(learned),
        average=average(learned),
        last=last(learned),
        forgetting=forgetting(learned),
        trainable_parameters=trainable,
        kept_parameters=lineage[-1].num_parameters,
        seconds_per_task=seconds,
    )
    (out / "sequence.json").write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")
    return result


def transfer(matrix: Sequence[Sequence[float]]) -> float | None:
    """Accuracy on tasks before they are learned: for each j > 1 the mean over i < j, then the mean over j.

    Args:
        matrix: ``matrix[i][j]`` is task j's accuracy after learning task i, square.
    """
    if len(matrix) < 2:
        return None
    return round(mean(mean(matrix[i][j] for i in range(j)) for j in range(1, len(matrix))), 2)


def average(matrix: Sequence[Sequence[float]]) -> float:
    """Mean over all tasks of the mean over all stages."""
    return round(mean(mean(row) for row in matrix), 2)


def last(matrix: Sequence[Sequence[float]]) -> float:
    """Mean of the last row."""
    return round(mean(matrix[-1]), 2)


def forgetting(matrix: Sequence[Sequence[float]]) -> float | None:
    """Mean over all tasks but the last of the best accuracy since it was learned, minus the accuracy at the end."""
    if len(matrix) < 2:
        return None
    end = len(matrix) - 1
    return round(mean(max(matrix[i][j] for i in range(j, end + 1)) - matrix[end][j] for j in range(end)), 2)
