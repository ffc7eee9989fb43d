"""Learn a sequence of tasks, each on top of the previous ones, and test all of them after each."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import cast

from lightning_fabric import Fabric

from clipweld.trainer.base.backbone import Backbone
from clipweld.trainer.base.batches import check_batch_size
from clipweld.trainer.config import LABEL_SPACES, LabelSpace, Measured, Method, TrainConfig, of_method
from clipweld.trainer.errors import ConfigError
from clipweld.trainer.files import check_writable, output_errors
from clipweld.trainer.learning.evaluate import Accuracies, evaluate
from clipweld.trainer.learning.fit import Step, one_device
from clipweld.trainer.sequence.folder import (
    FINISHED,
    LEFT_BEHIND,
    PROGRESS,
    Finished,
    Identity,
    Progress,
    SequenceResult,
    read_record,
    write_record,
)
from clipweld.trainer.sequence.methods import LEARNERS, Learned, Run
from clipweld.trainer.sequence.metrics import average, forgetting, last, transfer
from clipweld.trainer.tasks import Task, check_distinct, check_prompts


def run_sequence(
    tasks: Sequence[Task],
    base: Backbone,
    config: TrainConfig,
    out: Path,
    *,
    method: Method = "pool",
    watch: Sequence[Task] = (),
    before_learned: Sequence[Task] = (),
    order_seed: int | None = None,
    fabric: Fabric | None = None,
    resume: bool = False,
    on_stage: Callable[[Sequence[Task]], Callable[[Step], None]] = lambda tasks: lambda step: None,
) -> dict[LabelSpace, SequenceResult]:
    """Learn tasks one after another, each on top of the previous ones, and test all of them after each.

    Writes ``sequence.json`` below ``out``, and the files that the method leaves behind. Until the run is finished,
    ``progress.json`` and ``unfinished.safetensors`` hold its progress.

    Args:
        method: ``joint`` learns all tasks at once.
        watch: tasks that are tested but never learned.
        before_learned: the same tasks with other test images, on which they are tested until they are learned
            (``clipweld.trainer.tasks.untouched``).
        order_seed: shuffles ``tasks``; None keeps the order given.
        resume: resume the run in ``out`` if there is one; otherwise start it.
        on_stage: called with the tasks of each stage before they are learned; what it returns is called after every
            step.

    Raises:
        ConfigError: a task is listed twice, a batch would have only one image, or ``out`` holds a run and ``resume``
            isn't set.
        TaskInvalid: two classes of a task are the same tokens.
        CheckpointError: ``out`` holds a run with other settings, or its files are damaged.
        OutputError: ``out`` can't be written; the run can be resumed from what is there.
    """
    fabric = fabric or one_device(base)
    config = of_method(config, method)
    if order_seed is not None:
        tasks = random.Random(order_seed).sample(tasks, len(tasks))
    tested = [*tasks, *watch]
    _check(tested, base, config, fabric)
    identity = _identity(tasks, watch, base, config, method, order_seed, fabric)
    if not resume and any((out / name).exists() for name in LEFT_BEHIND):
        raise ConfigError(f"{out} holds a run already; --resume goes on with it, or give another --out")
    if (out / FINISHED).exists():
        finished = read_record(out / FINISHED, Finished, asdict(identity)).results
        if fabric.is_global_zero and (out / PROGRESS).exists():
            with output_errors(out):
                (out / PROGRESS).unlink()
        return finished
    check_writable(out)
    run = Run(base, config, out, tested, before_learned, fabric)
    progress = _begin(run, identity)
    learned = _learn(run, tasks, progress, resume, on_stage)
    results = {space: _result(space, identity, tested, progress.zero_shot, learned) for space in LABEL_SPACES}
    if fabric.is_global_zero:
        write_record(out / FINISHED, Finished(**vars(identity), results=results))
        with output_errors(out):
            (out / PROGRESS).unlink()
    return results


def _check(tested: Sequence[Task], base: Backbone, config: TrainConfig, fabric: Fabric) -> None:
    check_distinct(tested)
    check_batch_size(config, fabric.world_size)
    for task in tested:
        check_prompts(task, base.tokenizer)


def _identity(
    tasks: Sequence[Task],
    watch: Sequence[Task],
    base: Backbone,
    config: TrainConfig,
    method: Method,
    order_seed: int | None,
    fabric: Fabric,
) -> Identity:
    return Identity(
        model=base.model_name,
        pretrained=base.pretrained,
        base_fingerprint=base.fingerprint,
        method=method,
        tasks=[task.name for task in tasks],
        watch=[task.name for task in watch],
        sources=[task.source for task in (*tasks, *watch)],
        order_seed=order_seed,
        devices=fabric.world_size,
        precision=fabric.strategy.precision.precision,
        config=asdict(config),
    )


def _begin(run: Run, identity: Identity) -> Progress:
    """Return the progress of the run in its folder; if there is none, that of a new run: its base is tested."""
    wanted = asdict(identity) | {
        "class_names": {task.name: list(task.class_names) for task in run.tested},
        "templates": {task.name: list(task.templates) for task in run.tested},
    }
    if (run.out / PROGRESS).exists():
        return read_record(run.out / PROGRESS, Progress, wanted)
    return Progress(**wanted, zero_shot=evaluate(run.base, run.tests(learned=()), run.fabric), stages=[])


def _learn(
    run: Run,
    tasks: Sequence[Task],
    progress: Progress,
    resume: bool,
    on_stage: Callable[[Sequence[Task]], Callable[[Step], None]],
) -> list[Learned]:
    """Learn the remaining stages of a run, and record its progress after each."""
    first = run.fabric.is_global_zero
    stages = [tasks] if progress.method == "joint" else [[task] for task in tasks]
    learned = list(progress.stages)
    learner = LEARNERS[progress.method](run)
    learner.restore([task for stage in stages[: len(learned)] for task in stage])
    if first:
        learner.clear()
    for stage in stages[len(learned) :]:
        before = learned[-1].accuracies if learned else progress.zero_shot
        test_on = run.tests([task.name for stage in stages[: len(learned) + 1] for task in stage])
        learned.append(learner.learn(stage, test_on, before, resume=resume, on_step=on_stage(stage)))
        if first:
            with output_errors(run.out):
                run.unfinished.unlink(missing_ok=True)  # before progress is saved: the next task mustn't resume from it
            write_record(run.out / PROGRESS, replace(progress, stages=learned))
            with output_errors(run.out):
                learner.clear()
    return learned


def _result(
    space: LabelSpace, identity: Identity, tested: Sequence[Task], zero_shot: Accuracies, learned: Sequence[Learned]
) -> SequenceResult:
    """Collect the results of all stages in one label space."""
    over_classes: Measured = "task_classes" if space == "task" else "union_classes"
    rows = [[stage.accuracies[space][task.name] for task in tested] for stage in learned]
    square = [row[: len(identity.tasks)] for row in rows]
    return SequenceResult(
        method=identity.method,
        tasks=identity.tasks,
        tested=[task.name for task in tested],
        label_space=space,
        seed=cast("int", identity.config["seed"]),
        zero_shot=[zero_shot[space][task.name] for task in tested],
        matrix=rows,
        transfer=transfer(square),
        average=average(square),
        last=last(square),
        forgetting=forgetting(square),
        trainable_parameters=learned[-1].trainable_parameters,
        kept_parameters=learned[-1].kept_parameters,
        seconds_per_task=[round(stage.seconds, 2) for stage in learned],
        images=[len(task.load("test")) for task in tested],
        class_zero_shot=[zero_shot[over_classes][task.name] for task in tested],
        class_matrix=[[stage.accuracies[over_classes][task.name] for task in tested] for stage in learned],
    )
