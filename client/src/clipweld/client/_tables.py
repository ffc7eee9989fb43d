"""Tables that the command prints."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from clipweld.client import BenchResult, Card, Classification


def _table(*columns: str, numbers: tuple[str, ...] = ()) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return table


def answers_table(answers: list[Classification]) -> Table:
    """Return the labels of each image, best first."""
    table = _table(
        "Image",
        "Label",
        "Probability",
        "Cosine",
        numbers=("Probability", "Cosine"),
    )
    for answer in answers:
        for rank, found in enumerate(answer):
            name = escape(answer.image) if rank == 0 else ""
            table.add_row(name, escape(found.label), f"{found.probability:.1%}", f"{found.score:.3f}")
    return table


def bench_table(result: BenchResult) -> Table:
    """Return the timings of each image tower in each setting."""
    numbers = ("Batch", "At a time", "p50 ms", "p95 ms", "p99 ms", "Images/s", "Times the base", "By the server")
    table = _table("Image tower", *numbers, numbers=numbers)
    for timing in result.timings:
        if timing.contender == "base" and table.row_count:
            table.add_row()
        tasks = f", {timing.tasks} task{'s' if timing.tasks != 1 else ''}"
        computed = "" if timing.compute_to_base is None else f"{timing.compute_to_base:.3f}"
        table.add_row(
            timing.contender + ("" if timing.contender == "base" else tasks),
            *(str(number) for number in (timing.batch, timing.concurrency)),
            *(f"{ms:.2f}" for ms in (timing.p50_ms, timing.p95_ms, timing.p99_ms)),
            f"{timing.images_per_s:.1f}",
            *(("", "") if timing.contender == "base" else (str(timing.to_base), computed)),
        )
    return table


def tasks_table(card: Card) -> Table:
    """Return the learned tasks of one version."""
    table = _table(
        "Task",
        "Classes",
        "Before %",
        "After %",
        "Prompts",
        numbers=("Classes", "Before %", "After %"),
    )
    for task in card.tasks:
        before, after = (
            "" if accuracy is None else f"{accuracy:.1f}" for accuracy in (task.accuracy_before, task.accuracy_after)
        )
        table.add_row(escape(task.name), str(len(task.class_names)), before, after, escape("\n".join(task.templates)))
    return table


def versions_table(cards: list[Card]) -> Table:
    """Return the served versions and their tasks."""
    table = _table("Version", "Base", "Tasks", numbers=("Version",))
    for card in cards:
        learned = ", ".join(task.name for task in card.tasks) or "none: the base model"
        table.add_row(str(card.version), f"{card.base_model_name}/{card.base_pretrained}", escape(learned))
    return table
