"""The trainer's command line: a command builds its settings, calls one library function, and prints."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from trainer import commands
from trainer.config import MEASURES
from trainer.errors import OutputError, TrainerError
from trainer.files import check_surroundings
from trainer.printing import printing

if TYPE_CHECKING:  # heavy: imported where a command needs them, so that --help is instant
    from lightning_fabric import Fabric

    from trainer.adapter import Adapter
    from trainer.backbone import Backbone
    from trainer.fit import Step
    from trainer.sequence import SequenceResult
    from trainer.tasks import Task

stdout, stderr = Console(), Console(stderr=True)


def main(args: list[str] | None = None) -> None:
    """Run one command; errors of the trainer become one line and exit status 1."""
    args = sys.argv[1:] if args is None else args
    run = {
        commands.Tasks: tasks,
        commands.Fit: fit,
        commands.Chain: sequence,
        commands.Evaluate: evaluate,
        commands.Report: report,
        commands.Bench: bench,
    }
    try:
        with printing():
            check_surroundings(args)
            command = commands.parse(args)
            run[type(command)](command)
    except OutputError as exc:
        _complain(f"{exc}{_go_on(args)}")
        raise SystemExit(1) from exc
    except TrainerError as exc:
        _complain(str(exc))
        raise SystemExit(1) from exc
    except KeyboardInterrupt:
        _complain(f"interrupted{_go_on(args)}")
        raise SystemExit(130) from None


def _go_on(args: list[str]) -> str:
    """How to go on with training that was interrupted; nothing of other commands."""
    if args[:1] not in (["fit"], ["sequence"]):
        return ""
    again = ["trainer", *args] if "--resume" in args else ["trainer", *args, "--resume"]
    return f"; go on with: {shlex.join(again)}"


def _complain(message: str) -> None:
    """One line on stderr; of several processes the first one speaks for all."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"trainer: {message}", file=sys.stderr)


def tasks(command: commands.Tasks) -> None:
    """List what can be learned here."""
    from trainer.tasks import catalogue

    known = catalogue(command.data)
    if command.json:
        print(json.dumps([dataclasses.asdict(entry) for entry in known], indent=2))
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
    from trainer.files import check_writable, output_errors
    from trainer.fit import fit as fit_task
    from trainer.tasks import find_learned, load_task

    task = load_task(
        command.task, command.data, download=command.download, rename=command.name, templates=command.template
    )
    fabric = _fabric(command)
    _announce([task], fabric, command.train.shots)
    base = _load(command, fabric)
    _announce_prompts([task], base, fabric)
    lineage = load_lineage(command.adapters, base.fingerprint)
    (task,) = _readable([task], base, command)
    earlier = _readable([found for adapter in lineage if (found := find_learned(adapter, command.data))], base, command)
    if command.dry_run:
        _show_dry_run(task, base, lineage, command, fabric)
        return
    check_writable(command.adapters)
    path = command.adapters / f"{task.name}.safetensors"
    unfinished = command.adapters / f".{task.name}.unfinished"
    if path.is_file():  # and loads: killed after that, training left what it saved on its way
        unfinished.unlink(missing_ok=True)
    with _progress(fabric) as progress:
        fitted = fit_task(
            task, base, lineage, command.train, test_on=[*earlier, task], fabric=fabric, unfinished=unfinished,
            resume=command.resume, on_step=_follow(progress, task.name, command.train.iterations),
        )  # fmt: skip
    if not fabric.is_global_zero:
        return
    save_adapter(fitted.adapter, path)
    with output_errors(unfinished):
        unfinished.unlink(missing_ok=True)
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
    from trainer.tasks import check_distinct, load_tasks, validation

    given = [load_tasks(names, command.data, download=command.download) for names in (command.tasks, command.watch)]
    check_distinct([task for tasks in given for task in tasks])
    fabric = _fabric(command)
    for tasks, shots in zip(given, (command.train.shots, None), strict=True):
        _announce([validation(task) for task in tasks] if command.validate else tasks, fabric, shots)
    base = _load(command, fabric)
    _announce_prompts([task for tasks in given for task in tasks], base, fabric)
    learn, watch = (_readable(tasks, base, command) for tasks in given)
    if command.validate:
        learn, watch = ([validation(task) for task in tasks] for tasks in (learn, watch))
    results = []
    for seed in command.seeds or (command.train.seed,):
        config = dataclasses.replace(command.train, seed=seed)
        out = command.out / f"seed-{seed}" if command.seeds else command.out
        with _progress(fabric) as progress:

            def on_stage(tasks, progress=progress):
                names = ", ".join(task.name for task in tasks)
                return _follow(progress, names, command.train.iterations * len(tasks))

            found = run_sequence(
                learn, base, config, out, method=command.method, watch=watch, order_seed=command.order_seed,
                fabric=fabric, resume=command.resume, on_stage=on_stage,
            )  # fmt: skip
        results.append(found[command.label_space])
    if not fabric.is_global_zero:
        return
    if command.json:
        printed = [dataclasses.asdict(result) for result in results]
        print(json.dumps(printed if command.seeds else printed[0], indent=2))
        return
    for result in results:
        _show_matrix(result)
    if command.seeds:
        _show_spread(results)
    stdout.print(f"Written to {command.out}. Figures: trainer report {command.out}", soft_wrap=True)


def report(command: commands.Report) -> None:
    """Draw the figures of a run."""
    from trainer.report import write_report

    page = write_report(command.run)
    if command.json:
        print(json.dumps({"page": str(page), "figures": sorted(str(p) for p in (command.run / "figures").iterdir())}))
        return
    stdout.print(f"{page}: the whole report in one file; its figures are in {command.run / 'figures'}", soft_wrap=True)


def evaluate(command: commands.Evaluate) -> None:
    """Test a model with its adapters merged."""
    from trainer.adapter import load_lineage
    from trainer.backbone import with_weights
    from trainer.evaluate import evaluate as evaluate_tasks
    from trainer.merge import merge
    from trainer.tasks import load_tasks

    found = load_tasks(command.tasks, command.data, download=command.download)
    fabric = _fabric(command)
    _announce(found, fabric)
    base = _load(command, fabric)
    _announce_prompts(found, base, fabric)
    found = _readable(found, base, command)
    lineage = load_lineage(command.adapters, base.fingerprint)
    accuracies = evaluate_tasks(with_weights(base, merge(base.model.state_dict(), lineage)), found, fabric)["task"]
    if not fabric.is_global_zero:
        return
    learned = [adapter.task for adapter in lineage]
    if command.json:
        print(json.dumps({"model": base.model_name, "learned": learned, "accuracy": accuracies}, indent=2))
        return
    table = Table("task", "accuracy %", title=f"{base.model_name}, learned: {', '.join(learned) or 'nothing'}")
    for name, value in accuracies.items():
        table.add_row(name, f"{value:.1f}")
    stdout.print(table)


def bench(command: commands.Bench) -> None:
    """Time training steps."""
    from trainer.bench import bench as bench_steps

    with stderr.status(f"{command.pairs} pairs of steps of {command.model}"):
        found = bench_steps(
            command.model, command.pretrained, batch_size=command.batch_size, pairs=command.pairs,
            accelerator=command.accelerator, precision=_precision(command),
        )  # fmt: skip
    if command.json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
        return
    title = f"A training step of {found.model}, {found.batch_size} images, {found.device}"
    table = Table("step", "seconds", "images/s", "memory, GB", "time / pool's", title=title)
    for name, seconds, memory, ratio in (
        (f"pool, {found.precision}", found.pool_seconds, f"{found.pool_bytes / 1e9:.2f}", 1.0),
        ("naive, 32-true", found.naive_seconds, f"{found.naive_bytes / 1e9:.2f}", found.speedup),
        ("floor", found.floor_seconds, "", 1 / found.times_floor),
    ):
        table.add_row(name, f"{seconds:.3g}", f"{found.batch_size / seconds:.1f}", memory, f"{ratio:.2f}")
    stdout.print(table)
    stdout.print(
        f"Floor: {found.floor_flops / 1e9:,.1f} billion operations of the frozen towers at "
        f"{found.flops_per_second / 1e9:,.1f} billion a second, as matrix products of that size run here; the naive "
        f"step's are {found.naive_flops / found.floor_flops:.2f} times as many. In float32 losses differ by "
        f"{found.loss_difference:.0e}, gradients by {found.gradient_difference:.0e} of their size.",
        soft_wrap=True,
    )


def _fabric(command: commands.WithModel) -> Fabric:
    """The devices of a command; with several, this process becomes one of them."""
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator=command.accelerator, devices=command.devices, precision=_precision(command))
    with _stdout_to_stderr():  # gloo greets there, from C++
        fabric.launch()
    return fabric


def _precision(command: commands.WithModel | commands.Bench) -> str:
    """What was asked for, or what the device is best at."""
    import torch

    if command.precision != "auto":
        return command.precision
    on_gpu = command.accelerator in ("auto", "cuda") and torch.cuda.is_available()
    return "bf16-mixed" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Keep stdout for results: whatever is printed there goes to stderr, from this process and those it starts."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _load(command: commands.WithModel, fabric: Fabric) -> Backbone:
    """The command's base model, on the fabric's device."""
    from trainer.backbone import load_backbone
    from trainer.model_choice import choose_weights

    with stderr.status(f"loading {command.model}"):
        weights = choose_weights(command.pretrained, command.model, getattr(command, "adapters", None))
        backbone = load_backbone(command.model, weights)
        backbone.model.to(fabric.device)
    if fabric.is_global_zero:
        for note in backbone.notes:
            stderr.print(note, soft_wrap=True, markup=False, highlight=False)
    return backbone


def _announce(tasks: list[Task], fabric: Fabric, shots: int | None = None) -> None:
    """One line for each task on what was loaded, then its warnings; ``shots`` where it is learned."""
    from trainer.tasks import summarise

    if fabric.is_global_zero:
        for task in tasks:
            for line in summarise(task, shots).lines():
                _say(line)


def _announce_prompts(tasks: list[Task], base: Backbone, fabric: Fabric) -> None:
    """Warnings on how the model reads the tasks' prompts.

    Raises:
        TaskInvalid: it can't tell two classes apart.
    """
    from trainer.tasks import check_prompts

    for task in tasks:
        for warning in check_prompts(task, base.tokenizer):
            if fabric.is_global_zero:
                _say(f"warning: {task.name}: {warning}")


def _say(line: str) -> None:
    """A line on stderr, as it is."""
    stderr.print(line, soft_wrap=True, markup=False, highlight=False)


def _show_dry_run(task: Task, base: Backbone, lineage: list[Adapter], command: commands.Fit, fabric: Fabric) -> None:
    """What learning the task would take."""
    from trainer.dry_run import dry_run

    found = dry_run(task, base, lineage, command.train, fabric)
    if not fabric.is_global_zero:
        return
    if command.json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
        return
    table = Table("trained", "numbers", title=f"{task.name} on {base.model_name}")
    for name, count in (*found.parts.items(), ("all", found.trainable_parameters)):
        table.add_row(name.replace("_", " "), f"{count:,}")
    stdout.print(table)
    minutes = command.train.iterations * found.seconds_per_step / 60
    stdout.print(
        f"Kept: {found.kept_parameters:,} numbers, {found.kept_bytes / 1e6:.1f} MB. "
        f"Memory: {found.memory_bytes / 1e9:.1f} GB on {base.device.type}. "
        f"Time: {command.train.iterations} steps of {found.seconds_per_step:.2f} s, {minutes:.1f} minutes, testing not "
        "counted. Nothing was written.",
        soft_wrap=True,
    )


def _readable(tasks: list[Task], base: Backbone, command: commands.WithModel) -> list[Task]:
    """The tasks, without unreadable images where that was asked for."""
    from trainer.tasks import skip_unreadable

    if not command.skip_unreadable:
        return tasks

    def tell(fault: str) -> None:
        _say(f"skipped: {fault}")

    return [skip_unreadable(task, base.preprocess, tell) for task in tasks]


def _show_matrix(result: SequenceResult) -> None:
    """One run: the accuracy matrix and its four measures."""
    among = "the classes of their own task" if result.label_space == "task" else "the classes of all tasks"
    title = f"{result.method}, seed {result.seed}: accuracy on test images among {among}, %"
    table = Table("after learning", *result.tested, title=title)
    learned = result.tasks if len(result.matrix) == len(result.tasks) else ("all at once",)
    for name, row in zip(("nothing", *learned), (result.zero_shot, *result.matrix), strict=True):
        table.add_row(name, *(f"{cell:.1f}" for cell in row))
    stdout.print(table)
    for name in MEASURES:
        value = getattr(result, name)
        stdout.print(f"{name.capitalize():<11}{'not defined by one row' if value is None else f'{value:.1f}'}")


def _show_spread(results: list[SequenceResult]) -> None:
    """Mean and standard deviation over seeds."""
    table = Table("over seeds", "mean", "standard deviation")
    for name in MEASURES:
        values = [getattr(result, name) for result in results]
        if None not in values:
            spread = f"{statistics.stdev(values):.2f}" if len(values) > 1 else "one seed"
            table.add_row(name.capitalize(), f"{statistics.mean(values):.2f}", spread)
    stdout.print(table)


def _progress(fabric: Fabric) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[rate]:.0f} images/s"),
        TimeRemainingColumn(),
        console=stderr,
        disable=not fabric.is_global_zero,
    )


def _follow(progress: Progress, name: str, iterations: int) -> Callable[[Step], None]:
    """A bar for what is learned next, told of every step."""
    bar = progress.add_task(f"learning {escape(name)}", total=iterations, loss=float("nan"), rate=0.0)
    return lambda step: progress.update(bar, completed=step.number, loss=step.loss, rate=step.images_per_s)
