"""The trainer's command line: each command builds its settings, calls one library function, and prints the result."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from clipweld.trainer import __version__, commands, launch, tables
from clipweld.trainer.config import shots_of
from clipweld.trainer.errors import OutputError, TrainerError
from clipweld.trainer.extras import missing
from clipweld.trainer.files import check_surroundings
from clipweld.trainer.intervals import intervals
from clipweld.trainer.output import console, messages, printing

if TYPE_CHECKING:  # slow to import: commands import what they need, so that --help is instant
    from lightning_fabric import Fabric

    from clipweld.trainer.base.backbone import Backbone
    from clipweld.trainer.learning.fit import Fitted, Step
    from clipweld.trainer.tasks import Task

TIMED_STEPS = 4  # after the first, which is slow
LONG_S = 120.0

stderr = Console(stderr=True)


def main(args: list[str] | None = None) -> None:
    """Run one command; errors of the trainer become one line and exit status 1."""
    args = sys.argv[1:] if args is None else args
    run: dict[type[commands.Command], Callable[[Any], None]] = {
        commands.Tasks: tasks,
        commands.Fit: fit,
        commands.Sequence: sequence,
        commands.Evaluate: evaluate,
        commands.Report: report,
        commands.Bench: bench,
    }
    launch.forget_launchers()
    with messages():
        try:
            with printing():
                check_surroundings(args)
                if args == ["--version"]:
                    print(f"clipweld {__version__}")
                    return
                command = commands.parse(args)
                run[type(command)](command)
        except OutputError as exc:
            _complain(f"{exc}{_go_on(args)}")
            raise SystemExit(1) from exc
        except TrainerError as exc:
            _complain(str(exc))
            raise SystemExit(1) from exc
        except ModuleNotFoundError as exc:
            _complain(missing(exc, "train"))
            raise SystemExit(1) from exc
        except KeyboardInterrupt:
            _complain(f"interrupted{_go_on(args)}")
            raise SystemExit(130) from None


def _go_on(args: list[str]) -> str:
    """Return how to resume interrupted training; an empty text for other commands."""
    if args[:1] not in (["fit"], ["sequence"]):
        return ""
    again = ["trainer", *args] if "--resume" in args else ["trainer", *args, "--resume"]
    return f"; go on with: {shlex.join(again)}"


def _complain(message: str) -> None:
    """Print one line on stderr; of several processes, the first one does it for all, if it can."""
    if launch.speaks():
        print(f"trainer: {message}", file=sys.stderr)


def tasks(command: commands.Tasks) -> None:
    """List what can be learned here."""
    from clipweld.trainer.tasks import catalogue

    known = catalogue(command.data)
    if command.json:
        print(json.dumps([dataclasses.asdict(entry) for entry in known], indent=2))
    else:
        tables.show_tasks(known)


def fit(command: commands.Fit) -> None:
    """Learn one task."""
    from clipweld.trainer.adapters.folder import check_free, held
    from clipweld.trainer.base.hub import check_default_weights
    from clipweld.trainer.tasks import load_task

    task = load_task(
        command.task, command.data, download=command.download, rename=command.name, templates=command.template
    )
    check_free(command.adapters, task.name)
    check_default_weights(command.model, _weights(command))
    writes = launch.process_number() == 0 and not command.dry_run
    with held(command.adapters) if writes else contextlib.nullcontext():
        _fit(command, task)


def _fit(command: commands.Fit, task: Task) -> None:
    from clipweld.trainer.adapters.adapter import load_lineage
    from clipweld.trainer.base.backbone import check_preprocessing
    from clipweld.trainer.learning.dry_run import dry_run
    from clipweld.trainer.learning.fit import for_tasks
    from clipweld.trainer.learning.learn import adapter_path, learn_into
    from clipweld.trainer.tasks import find_learned

    fabric = _fabric(command)
    _announce([task], fabric, command)
    base = _load(command, fabric)
    _announce_prompts([task], base, fabric)
    lineage = load_lineage(command.adapters, base.fingerprint)
    check_preprocessing(base, lineage)
    if fabric.is_global_zero:
        below = ", ".join(adapter.task for adapter in lineage) or "the base alone"
        stderr.print(
            f"learning {task.name} on top of {below} (adapters: {command.adapters})", soft_wrap=True, markup=False
        )
    (task,) = _readable([task], base, command)
    earlier = _readable([found for adapter in lineage if (found := find_learned(adapter, command.data))], base, command)
    train = for_tasks(command.train, [task], base, fabric)
    if fabric.is_global_zero:
        images, shots = task.load("train"), cast("int", train.shots)
        used = len(images.few_shot(shots, train.seed))
        _say(
            f"{task.name}: {used:,} of {len(images):,} training images, {train.iterations:,} steps of "
            f"{train.batch_size * fabric.world_size}"
        )
    if command.dry_run:
        cost = dry_run(task, base, lineage, train, fabric)
        if fabric.is_global_zero and command.json:
            print(json.dumps(dataclasses.asdict(cost), indent=2))
        elif fabric.is_global_zero:
            tables.show_dry_run(cost, task.name, base, cast("int", train.iterations))
        return
    with _progress(fabric) as progress:
        fitted = learn_into(
            command.adapters, task, base, lineage, train, test_on=[*earlier, task], fabric=fabric,
            resume=command.resume, on_step=_follow(progress, task.name),
        )  # fmt: skip
    if not fabric.is_global_zero:
        return
    path = adapter_path(command.adapters, task.name)
    if command.json:
        print(json.dumps(_summary(fitted, path), indent=2))
    else:
        tables.show_fitted(fitted, lineage, path)


def _summary(fitted: Fitted, path: Path) -> dict[str, Any]:
    """Return what ``fit --json`` prints."""
    return {
        "task": fitted.adapter.task,
        "adapter": str(path),
        "sha256": fitted.adapter.sha256,
        "accuracy": fitted.adapter.accuracy,
        "intervals": intervals(fitted.accuracies["task"], fitted.tested),
        "moved": fitted.adapter.moved,
        "coefficients": fitted.adapter.coefficients,
        "trainable_parameters": fitted.trainable_parameters,
        "kept_parameters": fitted.adapter.num_parameters,
        "seconds": round(fitted.seconds, 2),
    }


def sequence(command: commands.Sequence) -> None:
    """Learn several tasks one after another."""
    from clipweld.trainer.adapters.folder import held
    from clipweld.trainer.base.hub import check_default_weights
    from clipweld.trainer.tasks import check_distinct, load_tasks, untouched, validation

    given = [load_tasks(names, command.data, download=command.download) for names in (command.tasks, command.watch)]
    check_distinct([task for tasks in given for task in tasks])
    check_default_weights(command.model, command.pretrained)
    from clipweld.trainer.sequence.run import run_sequence  # imports torch, so the arguments are checked first

    fabric = _fabric(command)
    for tasks, learns in zip(given, (command, None), strict=True):
        _announce([validation(task) for task in tasks] if command.validate else tasks, fabric, learns)
    base = _load(command, fabric)
    _announce_prompts([task for tasks in given for task in tasks], base, fabric)
    learn, watch = (_readable(tasks, base, command) for tasks in given)
    before_learned: list[Task] = []
    if command.validate:
        before_learned = [untouched(task) for task in (*learn, *watch)]
        learn, watch = ([validation(task) for task in tasks] for tasks in (learn, watch))
    results = []
    for seed in command.seeds or (command.train.seed,):
        config = dataclasses.replace(command.train, seed=seed)
        out = command.out / f"seed-{seed}" if command.seeds else command.out
        with _progress(fabric) as progress:

            def on_stage(tasks: Sequence[Task], progress: Progress = progress) -> Callable[[Step], None]:
                names = ", ".join(task.name for task in tasks)
                return _follow(progress, names)

            with held(out) if fabric.is_global_zero else contextlib.nullcontext():
                found = run_sequence(
                    learn, base, config, out, method=command.method, watch=watch, before_learned=before_learned,
                    order_seed=command.order_seed, fabric=fabric, resume=command.resume, on_stage=on_stage,
                )  # fmt: skip
        results.append(found[command.label_space])
    if not fabric.is_global_zero:
        return
    if command.json:
        printed = [dataclasses.asdict(result) for result in results]
        print(json.dumps(printed if command.seeds else printed[0], indent=2))
        return
    for result in results:
        tables.show_matrix(result)
    if command.seeds:
        tables.show_spread(results)
    console().print(f"Written to {command.out}. Figures: trainer report {command.out}", soft_wrap=True)


def report(command: commands.Report) -> None:
    """Draw the figures of a run."""
    from clipweld.trainer.report import write_report

    page = write_report(command.run)
    if command.json:
        print(json.dumps({"page": str(page), "figures": sorted(str(p) for p in (command.run / "figures").iterdir())}))
        return
    console().print(
        f"{page}: the whole report in one file; its figures are in {command.run / 'figures'}", soft_wrap=True
    )


def evaluate(command: commands.Evaluate) -> None:
    """Test a model with its adapters merged."""
    from clipweld.trainer.base.hub import check_default_weights
    from clipweld.trainer.tasks import as_learned, load_tasks

    found = load_tasks(command.tasks, command.data, download=command.download)
    check_default_weights(command.model, _weights(command))
    from clipweld.trainer.adapters.adapter import load_lineage
    from clipweld.trainer.adapters.merge import merge
    from clipweld.trainer.base.backbone import check_preprocessing, with_weights
    from clipweld.trainer.learning.evaluate import evaluate as evaluate_tasks

    fabric = _fabric(command)
    _announce(found, fabric)
    base = _load(command, fabric)
    _announce_prompts(found, base, fabric)
    found = _readable(found, base, command)
    lineage = load_lineage(command.adapters, base.fingerprint)
    found = [as_learned(task, lineage) for task in found]
    check_preprocessing(base, lineage)
    accuracies = evaluate_tasks(with_weights(base, merge(base.model.state_dict(), lineage)), found, fabric)
    if not fabric.is_global_zero:
        return
    learned = [adapter.task for adapter in lineage]
    tested = {task.name: len(task.load("test")) for task in found}
    if command.json:
        summary = {
            "model": base.model_name,
            "learned": learned,
            "accuracy": accuracies["task"],
            "intervals": intervals(accuracies["task"], tested),
            "accuracy_classes": accuracies["task_classes"],
        }
        print(json.dumps(summary, indent=2))
    else:
        tables.show_accuracies(base.model_name, learned, accuracies, tested)


def bench(command: commands.Bench) -> None:
    """Time training steps."""
    from clipweld.trainer.learning.bench import bench as bench_steps

    with stderr.status(f"{command.pairs} pairs of steps of {command.model}"):
        found = bench_steps(
            command.model, command.pretrained, batch_size=command.batch_size, pairs=command.pairs,
            accelerator=command.accelerator, precision=_precision(command),
        )  # fmt: skip
    if command.json:
        print(json.dumps({**dataclasses.asdict(found), "warning": found.warning}, indent=2))
    else:
        tables.show_bench(found)


def _fabric(command: commands.WithModel) -> Fabric:
    """Launch a command's devices; if there are several, this process runs one of them."""
    fabric = launch.fabric(command.accelerator, command.devices, _precision(command))
    with _stdout_to_stderr():  # gloo prints a message to stdout, from C++
        fabric.launch()
    return fabric


def _precision(command: commands.WithModel | commands.Bench) -> launch.Precision:
    """Return the requested precision, or the fastest one that the device supports."""
    import torch

    if command.precision != "auto":
        return command.precision
    on_gpu = command.accelerator in ("auto", "cuda") and torch.cuda.is_available()
    return "bf16-mixed" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Keep stdout for results: send to stderr what this process, or one that it starts, prints to stdout."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _weights(command: commands.WithModel) -> str | None:
    """Return the weights that were given, or those of the command's adapters."""
    from clipweld.trainer.base.model_choice import choose_weights

    return choose_weights(command.pretrained, command.model, getattr(command, "adapters", None))


def _load(command: commands.WithModel, fabric: Fabric) -> Backbone:
    """Load the command's base model onto the fabric's device."""
    from clipweld.trainer.base.backbone import load_backbone

    with stderr.status(f"loading {command.model}"):
        backbone = load_backbone(command.model, _weights(command))
        backbone.model.to(fabric.device)
    if fabric.is_global_zero:
        for note in backbone.notes:
            stderr.print(note, soft_wrap=True, markup=False, highlight=False)
    return backbone


def _announce(tasks: list[Task], fabric: Fabric, learns: commands.Fit | commands.Sequence | None = None) -> None:
    """Print a line per loaded task, then its warnings; ``learns`` is None if the tasks are only tested."""
    from clipweld.trainer.tasks import summarise

    if fabric.is_global_zero:
        for task in tasks:
            folder = task.origin is not None
            shots = None if learns is None else shots_of(learns.train, learns.model, is_folder=folder)
            balanced = learns is not None and learns.train.balance
            for line in summarise(task, shots, balanced=balanced).lines():
                _say(line)


def _announce_prompts(tasks: list[Task], base: Backbone, fabric: Fabric) -> None:
    """Print warnings about how the model reads the tasks' prompts.

    Raises:
        TaskInvalid: the model can't tell two classes of a task apart.
    """
    from clipweld.trainer.tasks import check_prompts

    for task in tasks:
        for warning in check_prompts(task, base.tokenizer):
            if fabric.is_global_zero:
                _say(f"warning: {task.name}: {warning}")


def _say(line: str) -> None:
    """Print a line on stderr, without wrapping or markup."""
    stderr.print(line, soft_wrap=True, markup=False, highlight=False)


def _readable(tasks: list[Task], base: Backbone, command: commands.WithModel) -> list[Task]:
    """Return the tasks; if ``--skip-unreadable`` is set, without unreadable images."""
    from clipweld.trainer.tasks import skip_unreadable

    if not command.skip_unreadable:
        return tasks

    def tell(fault: str) -> None:
        _say(f"skipped: {fault}")

    return [skip_unreadable(task, base.preprocess, tell) for task in tasks]


def _progress(fabric: Fabric) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[said]}"),
        TimeRemainingColumn(),
        console=stderr,
        disable=not fabric.is_global_zero,
    )


def _follow(progress: Progress, name: str) -> Callable[[Step], None]:
    """Add a progress bar and return its per-step callback, which announces a long run after the first few steps."""
    bar = progress.add_task(f"learning {escape(name)}", total=None, said="testing what is known")
    ends: list[float] = []

    def follow(step: Step) -> None:
        said = f"contrastive loss {step.contrastive:.3f}  {step.images_per_s:.0f} images/s"
        progress.update(bar, completed=step.number, total=step.iterations, said=said)
        if len(ends) <= TIMED_STEPS:
            ends.append(time.monotonic())
            if len(ends) == TIMED_STEPS + 1:
                left_s = (step.iterations - step.number) * (ends[-1] - ends[0]) / TIMED_STEPS
                if left_s > LONG_S and not progress.disable:
                    minutes = f"{left_s / 60:.0f} minutes"
                    stderr.print(f"learning {name} will take about {minutes} more", soft_wrap=True, markup=False)

    return follow
