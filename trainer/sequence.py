"""Task after task: the accuracy matrix and what it says about transfer and forgetting."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar, TypeVar

from lightning_fabric import Fabric

from trainer.backbone import Backbone
from trainer.batches import check_batch_size
from trainer.checkpoint import differences
from trainer.config import LABEL_SPACES, LabelSpace, Method, TrainConfig, without_pool
from trainer.errors import CheckpointError, ConfigError
from trainer.evaluate import Accuracies, evaluate
from trainer.files import check_writable, output_errors, replacing
from trainer.fit import Step, one_device
from trainer.methods import LEARNERS, Learned, Run
from trainer.records import STRICT, Count, Items, Percent, Setting, Sha256, Text, one_line, read_json_file
from trainer.tasks import Task, check_distinct, check_prompts

LEFT_BEHIND = ("sequence.json", "progress.json", "unfinished.safetensors", "adapters", "weights")


@dataclass(frozen=True)
class SequenceResult:
    """What learning ``tasks`` one after another did to the accuracy on ``tested``, in percent.

    Attributes:
        tasks: learned, in this order.
        tested: columns of the matrix: the learned tasks, then those that were only watched.
        label_space: classified among the class names of the image's own task, or of all that are tested.
        zero_shot: row 0, before anything was learned.
        matrix: row i is the accuracy on every tested task after learning task i; one row where all are learned at once.
        transfer, average, last, forgetting: over the learned tasks; None where one row alone defines nothing.
    """

    __pydantic_config__: ClassVar[Any] = STRICT

    method: Text
    tasks: Items[Text]
    tested: Items[Text]
    label_space: LabelSpace
    seed: int
    zero_shot: Items[Percent]
    matrix: Items[Items[Percent]]
    transfer: float | None
    average: float
    last: float
    forgetting: float | None
    trainable_parameters: int
    kept_parameters: int
    seconds_per_task: Items[float]


@dataclass(frozen=True)
class Identity:
    """What a run is of: it is gone on with only where all of it is equal.

    ``method`` is one of ours in what this trainer writes; reports compare records of others too.
    """

    __pydantic_config__: ClassVar[Any] = STRICT

    model: Text
    pretrained: Text
    base_fingerprint: Sha256
    method: Text
    tasks: Items[Text]
    watch: Items[Text]
    sources: Items[Text]
    order_seed: int | None
    devices: Count
    precision: Text | None
    config: dict[Text, Setting]


@dataclass(frozen=True)
class Progress(Identity):
    """``progress.json``: a run that isn't finished, with the words of all its tasks."""

    class_names: dict[Text, Items[Text]]
    templates: dict[Text, Items[Text]]
    zero_shot: Accuracies
    stages: Items[Learned]


@dataclass(frozen=True)
class Finished(Identity):
    """``sequence.json``: a run that is."""

    results: dict[LabelSpace, SequenceResult]


Found = TypeVar("Found", bound=Identity)


def run_sequence(
    tasks: Sequence[Task],
    base: Backbone,
    config: TrainConfig,
    out: Path,
    *,
    method: Method = "pool",
    watch: Sequence[Task] = (),
    order_seed: int | None = None,
    fabric: Fabric | None = None,
    resume: bool = False,
    on_stage: Callable[[Sequence[Task]], Callable[[Step], None]] = lambda tasks: lambda step: None,
) -> dict[LabelSpace, SequenceResult]:
    """Learn tasks one after another, each on top of the last, and test all of them after each.

    Writes ``sequence.json`` below ``out``, and what the method leaves behind. Until the run is finished,
    ``progress.json`` and ``unfinished.safetensors`` say how far it is.

    Args:
        method: ``joint`` learns all tasks at once.
        watch: tasks that are tested but never learned.
        order_seed: shuffles ``tasks``; None leaves them in the order given.
        resume: go on with the run in ``out`` where it was interrupted; start it where there is none.
        on_stage: told of the tasks that are learned next; what it returns is told of every step.

    Raises:
        ConfigError: a task is listed twice, batches of one image, or ``out`` holds a run and ``resume`` isn't set.
        TaskInvalid: two classes of a task are the same tokens.
        CheckpointError: ``out`` holds a run with other settings.
        OutputError: ``out`` can't be written; what is there can be gone on with.
    """
    fabric = fabric or one_device(base)
    config = config if method == "pool" else without_pool(config)
    if order_seed is not None:
        tasks = random.Random(order_seed).sample(tasks, len(tasks))
    tested = [*tasks, *watch]
    check_distinct(tested)
    check_batch_size(config, fabric.world_size)
    for task in tested:
        check_prompts(task, base.tokenizer)
    identity = Identity(
        model=base.model_name,
        pretrained=base.pretrained,
        base_fingerprint=base.fingerprint,
        method=method,
        tasks=[task.name for task in tasks],
        watch=[task.name for task in watch],
        sources=[task.source for task in tested],
        order_seed=order_seed,
        devices=fabric.world_size,
        precision=fabric.strategy.precision.precision,
        config=asdict(config),
    )
    if not resume and any((out / name).exists() for name in LEFT_BEHIND):
        raise ConfigError(f"{out} holds a run already; --resume goes on with it, or give another --out")
    if (out / "sequence.json").exists():
        finished = _read(out / "sequence.json", Finished, asdict(identity)).results
        if fabric.is_global_zero:
            (out / "progress.json").unlink(missing_ok=True)
        return finished

    check_writable(out)
    stages = [tasks] if method == "joint" else [[task] for task in tasks]
    words = {
        "class_names": {task.name: list(task.class_names) for task in tested},
        "templates": {task.name: list(task.templates) for task in tested},
    }
    saved = out / "progress.json"
    progress = _read(saved, Progress, asdict(identity) | words) if saved.exists() else None
    zero_shot = progress.zero_shot if progress else evaluate(base, tested, fabric)
    learned = list(progress.stages) if progress else []
    run = Run(base, config, out, tested, fabric)
    learner = LEARNERS[method](run)
    learner.restore([task for stage in stages[: len(learned)] for task in stage])
    if fabric.is_global_zero:
        learner.clear()
    for stage in stages[len(learned) :]:
        before = learned[-1].accuracies if learned else zero_shot
        learned.append(learner.learn(stage, before, resume=resume, on_step=on_stage(stage)))
        if fabric.is_global_zero:
            with output_errors(out):
                run.unfinished.unlink(missing_ok=True)  # before the task is on record: the next can't go on with it
            _write(saved, Progress(**vars(identity), **words, zero_shot=zero_shot, stages=learned))
            with output_errors(out):
                learner.clear()
    results = {space: _result(space, identity, tested, zero_shot, learned) for space in LABEL_SPACES}
    if fabric.is_global_zero:
        _write(out / "sequence.json", Finished(**vars(identity), results=results))
        with output_errors(out):
            saved.unlink()
    return results


def _result(
    space: LabelSpace, identity: Identity, tested: Sequence[Task], zero_shot: Accuracies, learned: Sequence[Learned]
) -> SequenceResult:
    """What the stages came to, seen in one label space."""
    rows = [[stage.accuracies[space][task.name] for task in tested] for stage in learned]
    square = [row[: len(identity.tasks)] for row in rows]
    return SequenceResult(
        method=identity.method,
        tasks=identity.tasks,
        tested=[task.name for task in tested],
        label_space=space,
        seed=identity.config["seed"],
        zero_shot=[zero_shot[space][task.name] for task in tested],
        matrix=rows,
        transfer=transfer(square),
        average=average(square),
        last=last(square),
        forgetting=forgetting(square),
        trainable_parameters=learned[-1].trainable_parameters,
        kept_parameters=learned[-1].kept_parameters,
        seconds_per_task=[round(stage.seconds, 2) for stage in learned],
    )


def _read(path: Path, kind: type[Found], wanted: dict[str, Any]) -> Found:
    """A run's record, if it is of this very run and whole."""
    try:
        found = read_json_file(kind, path)
        faults = differences({name: getattr(found, name) for name in wanted}, wanted)
        if not faults:
            _check_whole(found)
    except (OSError, ValueError) as exc:
        raise CheckpointError(
            f"{path}: not the record of a run ({one_line(str(exc))}); remove the folder, or give another --out"
        ) from exc
    if faults:
        raise CheckpointError(
            f"{path}: is of a run with {one_line('; '.join(faults))}; give the same settings, or another --out"
        )
    return found


def _check_whole(found: Identity) -> None:
    """Raises:
    ValueError: a label space or a task without its accuracies, or more stages than there are.
    """
    spaces = set(LABEL_SPACES)
    if isinstance(found, Finished) and found.results.keys() != spaces:
        raise ValueError(f"its results are not of {' and '.join(LABEL_SPACES)}")
    if isinstance(found, Progress):
        tested = {*found.tasks, *found.watch}
        for accuracies in (found.zero_shot, *(stage.accuracies for stage in found.stages)):
            if accuracies.keys() != spaces or any(own.keys() != tested for own in accuracies.values()):
                raise ValueError("its accuracies are not those of all tasks in both label spaces")
        if len(found.stages) > (1 if found.method == "joint" else len(found.tasks)):
            raise ValueError(f"{len(found.stages)} stages of {len(found.tasks)} tasks")


def _write(path: Path, record: Identity) -> None:
    with replacing(path) as staged:
        staged.write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="utf-8")


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
