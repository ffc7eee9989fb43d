"""The ``client`` command: a thin layer over the library."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import webbrowser
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console
from rich.progress import track

from clipweld.client import ClientError, ZeroShotClassifier
from clipweld.client import bench as run_bench
from clipweld.client._classifier import DEFAULT_URL
from clipweld.client._command_line import WrongUsage, application, run
from clipweld.client._figure import draw
from clipweld.client._folder_command import check_images, classify_into, image_names, say_left_out
from clipweld.client._folders import Tally
from clipweld.client._label_lists import read_labels
from clipweld.client._output import console, messages, print_json, printing, say
from clipweld.client._tables import answers_table, bench_table, tasks_table, versions_table

app = application(
    "client",
    """Name what is on images, with a CLIP that a Triton server serves.

    Example: client classify samples/seven.png --labels "the number seven, a shoe"
    """,
)

Url = Annotated[
    str,
    Parameter(
        env_var="CLIPWELD_URL", help="host:port or grpc://host:port for gRPC, http://host:port for HTTP.", metavar="URL"
    ),
]
Model = Annotated[str, Parameter(help="Name of the served model.", metavar="NAME")]
Version = Annotated[
    int | None, Parameter(validator=Number(gte=1), help="Model version; the newest where not given.", metavar="N")
]
Timeout = Annotated[
    float, Parameter(validator=Number(gte=0.001), help="Longest wait for one request, in seconds.", metavar="SECONDS")
]
Json = Annotated[bool, Parameter(name="--json", help="Print JSON.")]


@app.command
def classify(
    images: Annotated[list[str], Parameter(help="Image files, and folders of them.", metavar="IMAGE")],
    /,
    *,
    labels: Annotated[
        list[str] | None,
        Parameter(
            help='Labels, with commas between: "cat, dog". Or @FILE: one a line, or a .json of prompts: '
            '{"cat": "a photo of my cat"}. Again for more.',
            metavar="LABELS",
        ),
    ] = None,
    task: Annotated[
        str | None,
        Parameter(help="Labels and prompts of a task that the model has learned.", metavar="TASK"),
    ] = None,
    template: Annotated[
        list[str] | None,
        Parameter(
            help="Prompt with {} where the label goes; more than one are averaged. "
            'Where not given: those of the task, or "a photo of a {}".',
            metavar="TEXT",
        ),
    ] = None,
    top_k: Annotated[int, Parameter(validator=Number(gte=1), help="Labels to show for an image.", metavar="K")] = 5,
    out: Annotated[
        Path | None,
        Parameter(
            help="Write the answers to this .csv, .jsonl or .parquet. Resumes an earlier run, and skips images "
            "that cannot be read.",
            metavar="FILE",
        ),
    ] = None,
    allow_urls: Annotated[bool, Parameter(help="Fetch images that are http:// or https:// addresses.")] = False,
    no_exif_orientation: Annotated[bool, Parameter(help="Do not turn images upright as their Exif says.")] = False,
    version: Version = None,
    model: Model = "clip",
    url: Url = DEFAULT_URL,
    timeout: Timeout = 30.0,
    as_json: Json = False,
) -> None:
    """Rank labels for each image.

    Example: client classify samples/seven.png --labels "the number seven, a shoe"

    Example: client classify samples/scans --task digits --top-k 1 --out answers.csv
    """
    if (not labels) == (task is None):
        raise WrongUsage("--labels and --task: give exactly one of --labels and --task.")
    names, repeated = read_labels(labels) if labels else (None, [])
    if labels and not names:
        raise WrongUsage("--labels: no label in it.")
    if template and isinstance(names, dict):
        raise WrongUsage("--template: the labels bring their own prompts.")
    if repeated:
        say(f"{len(repeated)} labels are given more than once, and count once: {', '.join(repeated[:5])}")
    if any("{}" not in text for text in template or ()):
        raise WrongUsage("--template: expected {} where the label goes.")
    check_images(images, allow_urls)
    question: dict[str, Any] = {"labels": names, "task": task, "templates": template or None, "top_k": top_k}
    with ZeroShotClassifier(
        url,
        model,
        version or "latest",
        timeout_s=timeout,
        exif_orientation=not no_exif_orientation,
        allow_urls=allow_urls,
    ) as classifier:
        if out is not None:
            question |= {"model": model, "version": version}
            if no_exif_orientation:  # only then: a file that was begun before this choice existed is still resumed
                question["exif_orientation"] = False
            classify_into(classifier, images, question, out, as_json)
            return
        tally = Tally()
        with Console(stderr=True).status("Classifying"):
            answers = list(classifier.classify(image_names(images, tally), **question))
    say_left_out(tally)
    if as_json:
        print_json([answer.to_dict() for answer in answers])
    else:
        console().print(answers_table(answers))
        console().print(f"model {model} version {answers[-1].version}", style="dim", markup=False)


@app.command
def bench(
    *,
    versions: Annotated[str, Parameter(help="Base and merged version: 1,2.", metavar="BASE,MERGED")],
    requests: Annotated[
        int, Parameter(validator=Number(gte=1), help="Requests to each, in each setting.", metavar="N")
    ] = 200,
    batch: Annotated[
        list[int] | None,
        Parameter(
            validator=Number(gte=1),
            consume_multiple=True,
            show_default="1",
            help="Images in a request; one or more.",
            metavar="B",
        ),
    ] = None,
    concurrency: Annotated[
        list[int] | None,
        Parameter(
            validator=Number(gte=1),
            consume_multiple=True,
            show_default="1",
            help="Requests at a time; one or more.",
            metavar="C",
        ),
    ] = None,
    figure: Annotated[Path | None, Parameter(help="Draw it: a .svg or .png.", metavar="FILE")] = None,
    model: Model = "clip",
    url: Url = DEFAULT_URL,
    timeout: Timeout = 30.0,
    as_json: Json = False,
) -> None:
    """Measure the inference cost of adapters: base and merged image towers, in turns, on one server.

    If exporter merge --unmerged has written the same adapters unmerged, those versions take part too.

    Example: client bench --versions 1,2 --batch 1 --batch 8 --concurrency 1 --concurrency 4 --figure overhead.svg
    """
    try:
        base, merged = (int(number) for number in versions.split(","))
    except ValueError as exc:
        raise WrongUsage("--versions: expected two version numbers, such as 1,2.") from exc

    def tracked(rounds: Iterable[int]) -> Iterable[int]:
        return track(rounds, "Measuring", console=Console(stderr=True), transient=True, update_period=1.0)

    result = run_bench(
        url,
        (base, merged),
        model=model,
        requests=requests,
        batches=batch or [1],
        concurrencies=concurrency or [1],
        timeout_s=timeout,
        track=tracked,
    )
    if as_json:
        print_json(result.to_dict())
    else:
        console().print(bench_table(result))
        console().print(result.verdict, style="bold", highlight=False, soft_wrap=True)
        if result.warning:
            console().print(f"Warning: {result.warning}", style="yellow", highlight=False, soft_wrap=True, markup=False)
    if figure is not None:
        draw(result, figure)


@app.command
def tasks(
    *,
    version: Version = None,
    model: Model = "clip",
    url: Url = DEFAULT_URL,
    timeout: Timeout = 30.0,
    as_json: Json = False,
) -> None:
    """List the tasks that a version has learned.

    Example: client tasks --version 2 --json
    """
    with ZeroShotClassifier(url, model, version or "latest", timeout_s=timeout) as classifier:
        card = classifier.card()
    if as_json:
        print_json({"version": card.version, "tasks": [_task_row(task) for task in card.tasks]})
    else:
        base = f"{card.base_model_name}/{card.base_pretrained}"
        console().print(tasks_table(card) if card.tasks else "no tasks: the base model")
        console().print(f"model {model} version {card.version}, base {base}", style="dim", markup=False)


@app.command
def versions(*, model: Model = "clip", url: Url = DEFAULT_URL, timeout: Timeout = 30.0, as_json: Json = False) -> None:
    """List the versions that are served, and what each has learned.

    Example: client versions --url localhost:8001
    """
    with ZeroShotClassifier(url, model, timeout_s=timeout) as classifier:
        numbers = classifier.versions()
    cards = []
    for number in numbers:
        with ZeroShotClassifier(url, model, number, timeout_s=timeout) as classifier:
            cards.append(classifier.card())
    if as_json:
        print_json([{"version": card.version, "tasks": [task.name for task in card.tasks]} for card in cards])
    else:
        console().print(versions_table(cards))


@app.command
def demo(
    *,
    port: Annotated[
        int, Parameter(validator=Number(gte=0, lte=65535), help="Port of the page; 0 takes a free one.")
    ] = 7860,
    browser: Annotated[bool, Parameter(negative="--no-browser", help="Open the page in the browser.")] = True,
    model: Model = "clip",
    url: Url = DEFAULT_URL,
) -> None:
    """Open a page that shows what the base and the newest version see on your images, side by side.

    The page is for this machine alone. Ctrl-C ends it.

    Example: client demo --port 0 --no-browser
    """
    from clipweld.client._demo import Comparison
    from clipweld.client._page import PageServer

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
    """Run the command line: exit with 0, 1 (after one line on stderr that says why) or 2 (wrong usage)."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # a failure is reported once, by the one-line error
    with messages():
        try:
            with printing():
                run(app, sys.argv[1:])
                sys.exit(0)
        except ClientError as exc:
            say(str(exc))
            sys.exit(1)


def _task_row(task: Any) -> dict[str, Any]:
    return {
        "name": task.name,
        "class_names": list(task.class_names),
        "templates": list(task.templates),
        "accuracy": {"before": task.accuracy_before, "after": task.accuracy_after},
        "adapter_sha256": task.adapter_sha256,
    }
