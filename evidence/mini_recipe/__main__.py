"""Make the small CLIP from packages: `python -m evidence.mini_recipe build --work DIR --minutes 60 --out DIR`."""

import dataclasses
import json
import logging
import warnings
from collections import Counter
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.logging import RichHandler

from clipweld.trainer.errors import TrainerError
from evidence import command_line

app = command_line.application(__doc__)
Work = Annotated[Path, Parameter(help="Working folder: packages, pairs, checkpoint. Reused by the next run.")]


def _start_logging() -> None:
    warnings.filterwarnings(
        "ignore", "Image size", RuntimeWarning
    )  # some clip art is large; Pillow still refuses the largest
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(show_path=False)])


@app.command
def pairs(work: Work) -> None:
    """Fetch the packages and build the pre-training pairs."""
    from evidence.mini_recipe import pairs, sources

    _start_logging()
    folder = sources.Folder(work)
    built = pairs.build(folder)
    pairs.save(built, work / "pairs.npz")
    logging.info("%d pairs: %s", len(built), dict(Counter(pair.source for pair in built)))


@app.command
def tasks(work: Work, out: Annotated[Path, Parameter(help="Folder for the zips and tasks.json.")]) -> None:
    """Build the nine tasks."""
    from evidence.mini_recipe import sources, tasks

    _start_logging()
    tasks.build(sources.Folder(work), out)


@app.command
def train(
    work: Work,
    minutes: Annotated[float, Parameter(help="Wall-clock minutes of training.")] = 60.0,
    threads: Annotated[int, Parameter(help="CPU threads.")] = 2,
    seed: Annotated[int, Parameter(help="Seed of weights, captions and augmentation.")] = 0,
    start_from: Annotated[Path | None, Parameter(help="Weights to start from, with half the learning rates.")] = None,
    variant: Annotated[Path | None, Parameter(help="JSON file of another model and mix of pictures.")] = None,
) -> None:
    """Pre-train on the pairs. Run it again to resume from the last checkpoint."""
    from safetensors.torch import load_file

    from evidence.mini_recipe import measure, pairs, train

    _start_logging()
    model_cfg = json.loads((measure.MINI / "mini.json").read_text(encoding="utf-8"))
    config = train.TrainConfig(minutes=minutes, threads=threads, seed=seed)
    if variant is not None:
        other = json.loads(variant.read_text(encoding="utf-8"))
        model_cfg, config = other["model"], dataclasses.replace(config, shares=other["shares"])
    if start_from is not None:
        config = config.going_on()
    start = load_file(start_from) if start_from else None
    train.Training(pairs.load(work / "pairs.npz"), model_cfg, config, work / "training", start).run()


@app.command
def measure(
    weights: Annotated[Path, Parameter(help="A safetensors file.")],
    tasks: Annotated[Path | None, Parameter(help="Folder of tasks; default: the shipped tasks.")] = None,
    task_list: Annotated[
        str, Parameter(name="--list", help="mini: the six tasks; mini-unseen: the other three.")
    ] = "mini",
) -> None:
    """Print zero-shot accuracy on the tasks of a list as a Markdown table."""
    from evidence.mini_recipe import measure

    scores = measure.zero_shot(measure.load_model(weights), tasks or measure.TASKS, task_list)
    Console(highlight=False, width=200).print(measure.table(scores), markup=False)


@app.command
def build(
    work: Work,
    out: Annotated[Path, Parameter(help="Folder for mini.safetensors, mini.json and tasks/.")],
    minutes: Annotated[float, Parameter(help="Wall-clock minutes of training.")] = 60.0,
    threads: Annotated[int, Parameter(help="CPU threads.")] = 2,
) -> None:
    """Build the tasks and pairs, pre-train, and print the scores on the shipped tasks."""
    from evidence.mini_recipe import measure as measuring

    tasks(work, out / "tasks")
    if not (work / "pairs.npz").exists():
        pairs(work)
    train(work, minutes, threads)
    for source in (work / "training" / "mini.safetensors", measuring.MINI / "mini.json"):
        (out / source.name).write_bytes(source.read_bytes())
    measure(out / "mini.safetensors")


def main() -> None:
    """Run the command line; an error of the recipe becomes one line and exit code 1."""
    try:
        command_line.start(app)
    except TrainerError as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
