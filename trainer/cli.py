"""The trainer's command line: a command builds its settings, calls one library function, and prints."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from trainer import commands
from trainer.errors import TaskError, TrainerError

if TYPE_CHECKING:  # heavy: imported where a command needs them, so that --help is instant
    from trainer.adapter import Adapter
    from trainer.backbone import Backbone
    from trainer.tasks import Task

stdout, stderr = Console(), Console(stderr=True)


def main(args: list[str] | None = None) -> None:
    """Run one command; errors of the trainer become one line and exit status 1."""
    try:
        command = commands.parse(args)
        run = {commands.Tasks: tasks, commands.Fit: fit, commands.Chain: sequence, commands.Evaluate: evaluate}
        run[type(command)](command)
    except TrainerError as exc:
        print(f"trainer: {exc}", file=sys.stderr)
        raise SystemExit(1) from exc
    except KeyboardInterrupt:
        print("trainer: interrupted; the task at hand was not written", file=sys.stderr)
        raise SystemExit(130) from None


def tasks(command: commands.Tasks) -> None:
    """List what can be learned here."""
    from trainer.tasks import catalogue

    known = catalogue(command.data)
    if command.json:
        print(json.dumps([asdict(entry) for entry in known], indent=2))
        return
    table = Table("task", "classes", "train", "test", "where", "missing", title="What can be learned here")
    for entry in known:
        counts = ("", "", "") if entry.missing else (f"{n:,}" for n in (entry.classes, entry.train, entry.test))
        style = "dim" if entry.missing else None
        table.add_row(entry.name, *counts, escape(entry.source), entry.missing, style=style)
    stdout.print(table)
    stdout.print("Your own images: trainer fit --task FOLDER, with FOLDER/train/CLASS/* and FOLDER/test/CLASS/*")


def fit(command: commands.Fit) -> None:
    """Learn one task."""
    from trainer.adapter import load_lineage, save_adapter
    from trainer.fit import fit as fit_task
    from trainer.tasks import load_task

    task = load_task(
        command.task, command.data, download=command.download, rename=command.name, templates=command.template
    )
    base = _load(command)
    lineage = load_lineage(command.adapters, base.fingerprint)
    earlier = [found for adapter in lineage if (found := _learned(adapter, command.data))]
    path = command.adapters / f"{task.name}.safetensors"
    with _progress() as progress:
        fitted = fit_task(
            task, base, lineage, command.train, test_on=[*earlier, task], on_step=_follow(progress, task, command)
        )
    save_adapter(fitted.adapter, path)
    if command.json:
        summary = {
            "task": task.name,
            "adapter": str(path),
            "sha256": fitted.adapter.sha256,
            "accuracy": fitted.adapter.accuracy,
            "trainable_parameters": fitted.trainable_parameters,
            "kept_parameters": fitted.adapter.num_parameters,
            "seconds": round(fitted.seconds, 2),
        }
        print(json.dumps(summary, indent=2))
        return
    table = Table("task", "before", "after", "change", title=f"Accuracy on test images, % (learned: {task.name})")
    for adapter in (*lineage, fitted.adapter):
        before, after = (fitted.adapter.accuracy[when].get(adapter.task) for when in ("before", "after"))
        cells = (
            (f"{before:.1f}", f"{after:.1f}", f"{after - before:+.1f}")
            if before is not None
            else ("no images here", "", "")
        )
        table.add_row(adapter.task, *cells, style="bold" if adapter.task == task.name else None)
    stdout.print(table)
    stdout.print(
        f"{path}: {fitted.adapter.num_parameters:,} numbers kept of {fitted.trainable_parameters:,} trained, "
        f"{fitted.seconds:.0f} s. Next: exporter merge --to onnx --model {base.model_name}",
        soft_wrap=True,
    )


def sequence(command: commands.Chain) -> None:
    """Learn several tasks one after another."""
    from trainer.sequence import run_sequence
    from trainer.tasks import load_task

    learn, watch = (
        [load_task(name, command.data, download=command.download) for name in names]
        for names in (command.tasks, command.watch)
    )
    base = _load(command)
    with _progress() as progress:
        result = run_sequence(
            learn, base, command.train, command.out, watch=watch,
            on_task=lambda task: _follow(progress, task, command),
        )  # fmt: skip
    if command.json:
        print(json.dumps(asdict(result), indent=2))
        return
    table = Table("after learning", *result.tested, title="Accuracy on test images, %")
    for name, row in zip(("nothing", *result.tasks), (result.zero_shot, *result.matrix), strict=True):
        table.add_row(name, *(f"{cell:.1f}" for cell in row))
    stdout.print(table)
    for name in ("transfer", "average", "last", "forgetting"):
        value = getattr(result, name)
        stdout.print(f"{name.capitalize():<11}{'one task defines none' if value is None else f'{value:.1f}'}")
    stdout.print(f"Written to {command.out}: adapters/ and sequence.json", soft_wrap=True)


def evaluate(command: commands.Evaluate) -> None:
    """Test a model with its adapters merged."""
    from trainer.adapter import load_lineage
    from trainer.backbone import with_weights
    from trainer.evaluate import evaluate as evaluate_tasks
    from trainer.merge import merge
    from trainer.tasks import load_task

    found = [load_task(name, command.data, download=command.download) for name in command.tasks]
    base = _load(command)
    lineage = load_lineage(command.adapters, base.fingerprint)
    accuracies = evaluate_tasks(with_weights(base, merge(base.model.state_dict(), lineage)), found)
    learned = [adapter.task for adapter in lineage]
    if command.json:
        print(json.dumps({"model": base.model_name, "learned": learned, "accuracy": accuracies}, indent=2))
        return
    table = Table("task", "accuracy %", title=f"{base.model_name}, learned: {', '.join(learned) or 'nothing'}")
    for name, value in accuracies.items():
        table.add_row(name, f"{value:.1f}")
    stdout.print(table)


def _load(command: commands.WithModel) -> Backbone:
    """The command's base model, on the best device there is."""
    from lightning_fabric import Fabric

    from trainer.backbone import load_backbone

    with stderr.status(f"loading {command.model}"):
        backbone = load_backbone(command.model, command.pretrained)
        backbone.model.to(Fabric(accelerator="auto", devices=1).device)
    return backbone


def _learned(adapter: Adapter, data: Path) -> Task | None:
    """The task of an adapter, if its images are still to be found; a folder's task remembers its folder."""
    from trainer.tasks import load_task

    for reference in (adapter.config["source"], adapter.task):
        try:
            task = load_task(reference, data, rename=adapter.task, templates=adapter.templates)
        except TaskError:
            continue
        if task.class_names == adapter.class_names:
            return task
    return None


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[rate]:.0f} images/s"),
        TimeRemainingColumn(),
        console=stderr,
    )


def _follow(progress: Progress, task: Task, command: commands.Fit | commands.Chain):
    """A bar for one task, told of every step."""
    bar = progress.add_task(
        f"learning {escape(task.name)}", total=command.train.iterations, loss=float("nan"), rate=0.0
    )
    return lambda step: progress.update(bar, completed=step.number, loss=step.loss, rate=step.images_per_s)
