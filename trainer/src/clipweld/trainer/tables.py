"""Print the results of the trainer's commands for people, as tables and short lines."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from clipweld.trainer.config import MEASURES
from clipweld.trainer.intervals import bootstrap, wilson
from clipweld.trainer.output import console

if TYPE_CHECKING:  # slow to import, and not needed for help
    from clipweld.trainer.adapters.adapter import Adapter
    from clipweld.trainer.base.backbone import Backbone
    from clipweld.trainer.learning.bench import BenchResult
    from clipweld.trainer.learning.dry_run import DryRun
    from clipweld.trainer.learning.evaluate import Accuracies
    from clipweld.trainer.learning.fit import Fitted
    from clipweld.trainer.sequence.folder import SequenceResult
    from clipweld.trainer.tasks import Availability


def show_tasks(known: Sequence[Availability]) -> None:
    """Print a table of the tasks that can be learned here, one row per task."""
    table = Table("task", "classes", "train", "test", "where", "missing", title="What can be learned here")
    for entry in known:
        counts = ("", "", "") if entry.missing else (f"{n:,}" for n in (entry.classes, entry.train, entry.test))
        style = "dim" if entry.missing else None
        table.add_row(entry.name, *counts, escape(entry.source), entry.missing, style=style)
    console().print(table)
    console().print("Your own images: trainer fit --task FOLDER, with FOLDER/train/CLASS/* and FOLDER/test/CLASS/*")


def show_fitted(fitted: Fitted, lineage: Sequence[Adapter], path: Path) -> None:
    """Print accuracies before and after a task was learned."""
    learned = fitted.adapter
    table = Table(
        "task",
        "before",
        "after",
        "95% interval",
        "change",
        "over classes",
        title=f"Test accuracy, % ({learned.task} learned)",
    )
    for adapter in (*lineage, learned):
        name = adapter.task
        before, after, over_classes = (
            learned.accuracy[when].get(name) for when in ("before", "after", "after_classes")
        )
        cells: tuple[str, ...] = ("no images here",)
        if before is not None and after is not None and over_classes is not None:
            bounds = interval(after, fitted.tested[name])
            cells = (f"{before:.1f}", f"{after:.1f}", bounds, f"{after - before:+.1f}", f"{over_classes:.1f}")
        table.add_row(name, *cells, style="bold" if adapter is learned else None)
    console().print(table)
    if learned.moved is not None:
        console().print(
            "Moved, though not learned: the logits of common words fell by {words_mean:.2f} on average, by at most "
            "{words_p95:.2f} for 95% of them; how words describe the images diverged by {images_kl:.2f} nats. The "
            "class names moved by {names_mean:.1f} on average, for every task that has them.".format(**learned.moved),
            soft_wrap=True,
        )
    if learned.config["coefficients"] == "chosen":
        console().print(
            "Of the update, {image:.0%} was merged into the image tower and {text:.0%} into the text tower: less was "
            "worse for the images held out.".format(**learned.coefficients),
            soft_wrap=True,
        )
    console().print(
        f"{path}: {learned.num_parameters:,} numbers kept of {fitted.trainable_parameters:,} trained, "
        f"{fitted.seconds:.0f} s. Next: exporter merge --to onnx --model {learned.model_name}",
        soft_wrap=True,
        markup=False,
    )


def show_dry_run(found: DryRun, task: str, base: Backbone, iterations: int) -> None:
    """Print what learning a task would take: parameters, memory and time."""
    table = Table("trained", "numbers", title=f"{task} on {base.model_name}")
    for name, count in (*found.parts.items(), ("all", found.trainable_parameters)):
        table.add_row(name.replace("_", " "), f"{count:,}")
    console().print(table)
    console().print(
        f"Kept: {found.kept_parameters:,} numbers, {found.kept_bytes / 1e6:.1f} MB. "
        f"Memory: {found.memory_bytes / 1e9:.1f} GB on {base.device.type}. "
        f"Time: {iterations} steps of {found.seconds_per_step:.2f} s, "
        f"{iterations * found.seconds_per_step / 60:.1f} minutes, testing not counted. Nothing was written.",
        soft_wrap=True,
    )


def interval(percent: float, images: int) -> str:
    """Return the 95% interval of an accuracy as text."""
    low, high = wilson(percent, images)
    return f"{low:.1f} to {high:.1f}"


def show_accuracies(model_name: str, learned: Sequence[str], accuracies: Accuracies, tested: Mapping[str, int]) -> None:
    """Print test accuracies, one row per task; ``tested`` has the number of test images."""
    columns = ("task", "accuracy %", "95% interval", "mean over classes %")
    table = Table(*columns, title=f"{model_name}, learned: {', '.join(learned) or 'nothing'}")
    for name, value in accuracies["task"].items():
        over_classes = accuracies["task_classes"][name]
        table.add_row(name, f"{value:.1f}", interval(value, tested[name]), f"{over_classes:.1f}")
    console().print(table)


def show_bench(found: BenchResult) -> None:
    """Print time and memory of each kind of step, and the lower bound ("floor")."""
    title = f"A training step of {found.model}, {found.batch_size} images, {found.device}"
    table = Table("step", "seconds", "images/s", "memory, GB", "time / pool's", title=title)
    for name, seconds, memory, ratio in (
        (f"pool, {found.precision}", found.pool_seconds, f"{found.pool_bytes / 1e9:.2f}", 1.0),
        ("naive, 32-true", found.naive_seconds, f"{found.naive_bytes / 1e9:.2f}", found.speedup),
        ("floor", found.floor_seconds, "", 1 / found.times_floor),
    ):
        table.add_row(name, f"{seconds:.3g}", f"{found.batch_size / seconds:.1f}", memory, f"{ratio:.2f}")
    console().print(table)
    console().print(
        f"Floor: {found.floor_flops / 1e9:,.1f} billion operations of the frozen towers at "
        f"{found.flops_per_second / 1e9:,.1f} billion a second, as matrix products of that size run here; the naive "
        f"step's are {found.naive_flops / found.floor_flops:.2f} times as many. In float32 losses differ by "
        f"{found.loss_difference:.0e}, gradients by {found.gradient_difference:.0e} of their size.",
        soft_wrap=True,
    )
    if found.warning:
        console().print(f"Warning: {found.warning}", style="yellow", soft_wrap=True, markup=False)


def show_matrix(result: SequenceResult) -> None:
    """Print the accuracy matrix of a run, and its four measures."""
    among = "the classes of their own task" if result.label_space == "task" else "the classes of all tasks"
    title = f"{result.method}, seed {result.seed}: accuracy on test images among {among}, %"
    table = Table("after learning", *result.tested, title=title)
    learned = result.tasks if len(result.matrix) == len(result.tasks) else ("all at once",)
    for name, row in zip(("nothing", *learned), (result.zero_shot, *result.matrix), strict=True):
        table.add_row(name, *(f"{cell:.1f}" for cell in row))
    console().print(table)
    if result.class_matrix and result.class_zero_shot:
        table = Table("after learning", *result.tested, title="The same, mean over classes, %")
        for name, row in zip(("nothing", *learned), (result.class_zero_shot, *result.class_matrix), strict=True):
            table.add_row(name, *(f"{cell:.1f}" for cell in row))
        console().print(table)
    for name in MEASURES:
        value = getattr(result, name)
        console().print(f"{name.capitalize():<11}{'not defined by one row' if value is None else f'{value:.1f}'}")


def show_spread(results: Sequence[SequenceResult]) -> None:
    """Print the mean and standard deviation over seeds."""
    table = Table("over seeds", "mean", "standard deviation", "95% interval of the mean")
    for name in MEASURES:
        values = [getattr(result, name) for result in results]
        if None not in values:
            spread, bounds = "one seed", ""
            if len(values) > 1:
                spread = f"{statistics.stdev(values):.2f}"
                bounds = " to ".join(f"{bound:.2f}" for bound in bootstrap(values))
            table.add_row(name.capitalize(), f"{statistics.mean(values):.2f}", spread, bounds)
    console().print(table)
