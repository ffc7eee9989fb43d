"""Results as the commands print them: a line or a table each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the help needs none of it
    from rich.table import Table

    from clipweld.exporter.release.publish import Release
    from clipweld.exporter.release.unmerged import Unmerged
    from clipweld.exporter.results import Accuracy, Agreement
    from clipweld.exporter.serving.servers import Found
    from clipweld.exporter.serving.switch import Switched
    from clipweld.exporter.store.foreign import Foreign
    from clipweld.exporter.store.repository import Repository


def summaries(repository: Repository) -> list[dict]:
    """Return the rows of ``exporter versions --json``, one per version; if the store is missing, of active versions."""
    stored, standing, served = repository.versions(), repository.standing(), repository.served
    rows = []
    for version in stored or standing:
        manifest = repository.manifest(version)
        rows.append(
            {
                "model": manifest["model"],
                "version": version,
                "tasks": [entry["task"] for entry in manifest["lineage"]],
                "base": manifest["base"],
                "served": version == served,
                "standing": version in standing,
                "stored": version in stored,
                "date": manifest["date"],
                "precision": manifest["precision"],
                "unmerged": manifest["unmerged"],
                "lineage": manifest["lineage"],
                "parity": manifest["parity"],
                "accuracy": manifest["accuracy"],
                "cast": manifest["cast"],
                "forced": manifest["forced"],
                "foreign": None,
            }
        )
    return rows


def foreign_summary(entry: Foreign) -> dict:
    """Return the row of something that clipweld did not write; of a version's fields it has only the number, if any."""
    return {
        "model": entry.model,
        "version": entry.version,
        "tasks": [],
        "base": None,
        "served": False,
        "standing": False,
        "stored": False,
        "date": None,
        "precision": None,
        "unmerged": False,
        "lineage": [],
        "parity": None,
        "accuracy": [],
        "cast": None,
        "forced": [],
        "foreign": {"path": str(entry.path), "reason": entry.reason},
    }


def versions_table(rows: Sequence[dict]) -> Table:
    """Return a table of summaries, one row per version."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("model", "version", "state", "learned tasks, accuracy %", "precision", "made on", "base weights")
    for row in rows:
        number = "" if row["version"] is None else str(row["version"])
        if row["foreign"]:
            table.add_row(row["model"], number, "foreign", escape("{path}: {reason}".format(**row["foreign"])))
            continue
        base = f"{row['base']['model_name']} ({row['base']['pretrained']}) {row['base']['fingerprint'][:8]}"
        state = "served" if row["served"] else "loaded" if row["standing"] else "stored"
        accuracy = {entry["task"]: f" {entry['after']:.1f}" for entry in row["accuracy"] if entry["after"] is not None}
        tasks = ", ".join(f"{task}{accuracy.get(task, '')}" for task in row["tasks"]) or "none: the base"
        table.add_row(row["model"], number, state, tasks, row["precision"], row["date"][:10], base)
    return table


def running(repository: Repository, url: str, loaded: Sequence[int]) -> str:
    """Return a line about what a server really serves, and how that differs from what the files say."""
    if not loaded:
        return f"{url} has no version of {repository.name} loaded, whole"
    others = ", ".join(map(str, loaded[:-1]))
    text = f"{url} serves {repository.name} version {loaded[-1]}"
    text += f", and {others} to those who name one" if others else ""
    if loaded[-1] != repository.served:
        text += f"; version {repository.served} is what is active on disk: exporter promote {repository.served}"
    return text


def accuracy_table(accuracies: Sequence[Accuracy], agreements: Sequence[Agreement]) -> Table:
    """Return a table of measurements, one row per task."""
    from rich.table import Table

    table = Table("task", title="Test images, %")
    if accuracies:
        for column in ("right before", "right after", "change"):
            table.add_column(column, justify="right")
    if agreements:
        table.add_column("answered as in float32", justify="right")
    known = {accuracy.task: accuracy for accuracy in accuracies}
    agreeing = {agreement.task: agreement for agreement in agreements}
    for task in dict.fromkeys([*known, *agreeing]):
        before, after = (known[task].before, known[task].after) if task in known else (None, None)
        row = ["" if value is None else f"{value:.1f}" for value in (before, after)]
        row.append("" if before is None or after is None else f"{after - before:+.1f}")
        same = f"{100 * agreeing[task].top1:.1f} of {agreeing[task].images}" if task in agreeing else ""
        table.add_row(task, *(row if accuracies else ()), *([same] if agreements else ()))
    return table


def released(result: Release, tasks: Sequence[str], servers_run: bool) -> str:
    """Return the last line of a merge that wrote a version, which servers that already run have not loaded."""
    name = "" if result.model == "clip" else f" --name {result.model}"
    served = result.served == result.version and not servers_run
    return (
        f"{result.model} version {result.version}, {learned(tasks)}; ONNX Runtime is within "
        f"{result.parity.max_abs:.1e} of PyTorch, the graph is the base's own"
        + (f", then cast to {result.precision.value}" if result.cast else "")
        + f"; {result.seconds:.1f} s. "
        + ("It is served" if served else f"Serve it: exporter promote {result.version}{name}")
        + (f". FORCED though {'; '.join(result.forced)}" if result.forced else "")
    )


def switched(result: Switched, found: Found) -> str:
    """Return the last line of a promotion or rollback, given the outcome of the search for servers before it."""
    before = f" (before: {result.previous})" if result.previous not in (None, result.version) else ""
    where = f"on {', '.join(result.servers)}" if result.servers else f"from the next start on ({found.nowhere})"
    loaded = ", ".join(map(str, result.standing))
    served = f"{result.model} version {result.version} is served{before} {where}"
    return f"{served}; loaded: {loaded}; {result.seconds:.1f} s"


def unmerged(result: Unmerged) -> str:
    """Return the last line of a merge that left the adapters in the graph."""
    numbers = ", ".join(map(str, result.versions))
    apart = max(parity.max_abs for parity in result.parity)
    return (
        f"{result.model} versions {numbers}, each with as many adapters in its graph; ONNX Runtime is within "
        f"{apart:.1e} of PyTorch with them merged; {result.seconds:.1f} s. Serve them: exporter serve"
    )


def learned(tasks: Sequence[str]) -> str:
    """Return a version's learned tasks, in words."""
    return f"learned {', '.join(tasks)}" if tasks else "the base, no adapters"
