"""The ``client`` command: a thin layer of words over the library."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import webbrowser
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from client import BenchResult, Card, Classification, ClientError, ZeroShotClassifier
from client import bench as run_bench
from client._classifier import DEFAULT_URL

app = typer.Typer(
    name="client",
    help="Name what is on images, with a CLIP that a Triton server serves.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)

Url = Annotated[
    str,
    typer.Option(
        envvar="CLIPWELD_URL", help="host:port or grpc://host:port for gRPC, http://host:port for HTTP.", metavar="URL"
    ),
]
Model = Annotated[str, typer.Option(help="Name of the served model.", metavar="NAME")]
Version = Annotated[
    int | None, typer.Option(min=1, help="Model version; the newest where not given.", metavar="N", show_default=False)
]
Timeout = Annotated[float, typer.Option(min=0.001, help="Longest wait for one request, in seconds.", metavar="SECONDS")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def classify(
    images: Annotated[list[Path], typer.Argument(help="Image files.", metavar="IMAGE", show_default=False)],
    labels: Annotated[
        str | None, typer.Option(help='Labels, with commas between: "cat, dog".', metavar="LABELS", show_default=False)
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="Labels and prompts of a task that the model has learned.", metavar="TASK", show_default=False
        ),
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(
            help="Prompt with {} where the label goes; more than one are averaged. "
            'Where not given: those of the task, or "a photo of a {}".',
            metavar="TEXT",
            show_default=False,
        ),
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Labels to show for an image.", metavar="K")] = 5,
    version: Version = None,
    model: Model = "clip",
    url: Url = DEFAULT_URL,
    timeout: Timeout = 30.0,
    as_json: Json = False,
) -> None:
    """Rank labels for each image.

    Examples:

    client classify cat.jpg --labels "cat, dog"

    client classify scan.png --task digits --top-k 3 --json
    """
    if (labels is None) == (task is None):
        raise typer.BadParameter("give exactly one of --labels and --task", param_hint="'--labels' / '--task'")
    names = None if labels is None else [label.strip() for label in labels.split(",") if label.strip()]
    if names == []:
        raise typer.BadParameter("no label in it", param_hint="'--labels'")
    if any("{}" not in text for text in template or ()):
        raise typer.BadParameter("expected {} where the label goes", param_hint="'--template'")
    with (
        ZeroShotClassifier(url, model, version, timeout) as classifier,
        Console(stderr=True).status(f"Classifying {len(images)} image(s)"),
    ):
        answers = classifier.classify(images, labels=names, task=task, templates=template or None, top_k=top_k)
    if as_json:
        _print_json([{"image": str(path), **answer.to_dict()} for path, answer in zip(images, answers, strict=True)])
    else:
        Console().print(_answers_table(images, answers))
        Console().print(f"model {model} version {answers[0].version}", style="dim", markup=False)


@app.command()
def bench(
    versions: Annotated[
        str, typer.Option(help="Base and merged version: 1,2.", metavar="BASE,MERGED", show_default=False)
    ],
    requests: Annotated[int, typer.Option(min=1, help="Requests to each version.", metavar="N")] = 200,
    batch: Annotated[int, typer.Option(min=1, help="Images in a request.", metavar="B")] = 1,
    model: Model = "clip",
    url: Url = DEFAULT_URL,
    timeout: Timeout = 30.0,
    as_json: Json = False,
) -> None:
    """Measure whether a merged version is as fast as the base: image towers in turns, on one server.

    Example:

    client bench --versions 1,2 --requests 500 --batch 8
    """
    try:
        base, merged = (int(number) for number in versions.split(","))
    except ValueError as exc:
        raise typer.BadParameter("expected two version numbers, such as 1,2", param_hint="'--versions'") from exc

    def tracked(turns: range) -> Any:
        return track(turns, "Measuring", console=Console(stderr=True), transient=True, update_period=1.0)

    result = run_bench(
        url, (base, merged), model=model, requests=requests, batch=batch, timeout_s=timeout, track=tracked
    )
    if as_json:
        _print_json(result.to_dict())
    else:
        Console().print(_bench_table(result, base, merged))
        Console().print(f"{result.requests} requests to each; ratio of p50: median over pairs", style="dim")


@app.command()
def tasks(
    version: Version = None,
    model: Model = "clip",
    url: Url = DEFAULT_URL,
    timeout: Timeout = 30.0,
    as_json: Json = False,
) -> None:
    """List the tasks that a version has learned.

    Example:

    client tasks --version 2 --json
    """
    with ZeroShotClassifier(url, model, version, timeout) as classifier:
        card = classifier.card
    if as_json:
        _print_json({"version": card.version, "tasks": [_task_row(task) for task in card.tasks]})
    else:
        base = f"{card.base_model_name}/{card.base_pretrained}"
        Console().print(_tasks_table(card) if card.tasks else "no tasks: the base model")
        Console().print(f"model {model} version {card.version}, base {base}", style="dim", markup=False)


@app.command()
def versions(model: Model = "clip", url: Url = DEFAULT_URL, timeout: Timeout = 30.0, as_json: Json = False) -> None:
    """List the versions that are served, and what each has learned.

    Example:

    client versions --url localhost:8001
    """
    with ZeroShotClassifier(url, model, timeout_s=timeout) as classifier:
        numbers = classifier.versions()
    cards = []
    for number in numbers:
        with ZeroShotClassifier(url, model, number, timeout) as classifier:
            cards.append(classifier.card)
    if as_json:
        _print_json([{"version": card.version, "tasks": [task.name for task in card.tasks]} for card in cards])
    else:
        Console().print(_versions_table(cards))


@app.command()
def demo(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the page; 0 takes a free one.")] = 7860,
    browser: Annotated[bool, typer.Option(help="Open the page in the browser.")] = True,
    model: Model = "clip",
    url: Url = DEFAULT_URL,
) -> None:
    """Open a page that shows what the base and the newest version see on your images, side by side.

    The page is for this machine alone. Ctrl-C ends it.

    Example:

    client demo --port 0 --no-browser
    """
    from client._demo import Comparison
    from client._page import PageServer

    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # it would log each restart of the server here; the page says it
    with (
        contextlib.suppress(KeyboardInterrupt),
        contextlib.closing(Comparison(url, model)) as comparison,
        PageServer(comparison, port) as page,
    ):
        print(f"{page.url} shows model {model} at {url}; Ctrl-C ends it", flush=True)
        if browser:  # in a thread: some browsers return only when they are closed
            threading.Thread(target=webbrowser.open, args=(page.url,), daemon=True).start()
        page.serve_forever()


def main() -> None:
    """Run the command line: exit 0, 1 (said why in one line on stderr) or 2 (usage)."""
    try:
        app(prog_name="client")
    except ClientError as exc:
        print(f"client: {exc}", file=sys.stderr)
        sys.exit(1)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _task_row(task: Any) -> dict[str, Any]:
    return {
        "name": task.name,
        "class_names": list(task.class_names),
        "templates": list(task.templates),
        "accuracy": {"before": task.accuracy_before, "after": task.accuracy_after},
        "adapter_sha256": task.adapter_sha256,
    }


def _table(*columns: str, numbers: tuple[str, ...] = ()) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return table


def _answers_table(images: list[Path], answers: list[Classification]) -> Table:
    table = _table(
        "Image",
        "Label",
        "Probability",
        "Cosine",
        numbers=("Probability", "Cosine"),
    )
    for path, answer in zip(images, answers, strict=True):
        for rank, found in enumerate(answer):
            name = escape(str(path)) if rank == 0 else ""
            table.add_row(name, escape(found.label), f"{found.probability:.1%}", f"{found.score:.3f}")
    return table


def _bench_table(result: BenchResult, base: int, merged: int) -> Table:
    table = _table(
        "Image tower",
        "p50 ms",
        "p95 ms",
        "images/s",
        numbers=("p50 ms", "p95 ms", "images/s"),
    )
    for name, timing in ((f"base (version {base})", result.base), (f"merged (version {merged})", result.merged)):
        table.add_row(name, f"{timing.p50_ms:.3f}", f"{timing.p95_ms:.3f}", f"{timing.images_per_s:.1f}")
    table.add_row("merged / base", f"{result.ratio_p50:.3f}", "", f"{result.ratio_throughput:.3f}")
    return table


def _tasks_table(card: Card) -> Table:
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


def _versions_table(cards: list[Card]) -> Table:
    table = _table("Version", "Base", "Tasks", numbers=("Version",))
    for card in cards:
        learned = ", ".join(task.name for task in card.tasks) or "none: the base model"
        table.add_row(str(card.version), f"{card.base_model_name}/{card.base_pretrained}", escape(learned))
    return table
