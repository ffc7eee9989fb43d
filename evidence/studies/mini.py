"""Run every method and ablation on the small CLIP's six tasks: the runs behind RESULTS.md.

Run: python -m evidence.studies.mini --out runs/results

Each run is a ``trainer sequence`` command, which is printed when it starts. Finished runs are not repeated, and
interrupted runs are resumed. Settings are chosen on validation images (``search``), never on test images.
"""

from __future__ import annotations

import itertools
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from rich.console import Console

from clipweld.trainer.config import METHODS, Method
from evidence import command_line
from evidence.studies.tables import table

SEEDS = (0, 1, 2)
ORDERS = (0, 1, 2)
Length = Literal["long", "short"]
# Flags added to the preset, by length of the runs. Short runs have a third of the steps, and settings that suit them.
LENGTHS: dict[Length, dict[Method, str]] = {
    "long": dict.fromkeys(METHODS, ""),
    "short": {
        "pool": "--iterations 100 --anchor-weight 1 --drift-weight 100",
        "lora": "--iterations 100 --lr 0.0005",
        "finetune": "--iterations 100",
        "joint": "--iterations 100",
    },
}
RATES: dict[Length, dict[Method, tuple[float, ...]]] = {
    "long": {"lora": (1.25e-4, 2.5e-4, 5e-4), "finetune": (3e-5, 1e-4, 3e-4), "joint": (1e-4, 3e-4)},
    "short": {
        "lora": (2.5e-4, 5e-4, 1e-3, 2e-3, 5e-3),
        "finetune": (3e-5, 1e-4, 3e-4),
        "joint": (1e-4, 3e-4, 1e-3),
    },
}
# Variants of the pool: the flags, and the seeds of the runs.
POOL_SEARCH: dict[Length, dict[str, tuple[str, tuple[int, ...]]]] = {
    "long": {
        "preset": ("", SEEDS[:1]),
        "drift-400": ("--drift-weight 400", SEEDS[:1]),
        "drift-6400": ("--drift-weight 6400", SEEDS[:1]),
        "anchor-8-drift-800": ("--anchor-weight 8 --drift-weight 800", SEEDS[:1]),
        "anchor-16": ("--anchor-weight 16", SEEDS[:1]),
        "drift-400-lr-0.02": ("--drift-weight 400 --lr 0.02", SEEDS[:1]),
    },
    "short": {
        "router-none": ("--router none", SEEDS),
        "router-learned": ("--router learned", SEEDS),
        "lr-0.02": ("--lr 0.02", SEEDS[:1]),
    },
}
# Flags of each ablation, which change one thing at a time.
ABLATIONS: dict[Length, dict[str, str]] = {
    "long": {
        "no-drift": "--drift-weight 0",
        "no-anchors": "--anchor-weight 0",
        "no-router": "--router none",
        "no-ago": "--ago off",
        "no-consolidation": "--consolidate 0",
        "drift-400": "--drift-weight 400",
        "anchor-16": "--anchor-weight 16",
    },
    "short": {
        "no-drift": "--drift-weight 0",
        "no-anchors": "--anchor-weight 0",
        "firmer": "--anchor-weight 4 --drift-weight 400",
        "published": "--router learned --ago sum --lr 0.002 --dropout 0.2 "
        "--drift-weight 0 --anchor-weight 0 --consolidate 0",
        "ago-sum": "--ago sum",
        "ago-mean": "--ago mean",
        "no-consolidation": "--consolidate 0",
        "k-merge-8": "--k-merge 8",
        "k-active-4": "--k-active 4",
        "rank-6": "--rank 6 --k-active 4 --k-merge 2",
        "router-learned": "--router learned",
        "router-fixed": "--router fixed",
        "router-block": "--router learned --router-per block",
        "route-first": "--router learned --route-on first",
    },
}

# What earns the gain: the losses without the pool, the pool without the losses, the default of all other models, the
# paper's settings, and how many experts are kept.
ATTRIBUTION: dict[str, tuple[Method, str]] = {
    "lora-both-losses": ("lora", "--lr 0.01 --anchor-weight 4 --drift-weight 1600"),
    "pool-no-losses": ("pool", "--anchor-weight 0 --drift-weight 0"),
    "no-router-no-ago": ("pool", "--router none --ago off"),
    "default-of-other-models": ("pool", "--lr 0.002 --dropout 0.2 --iterations 500"),
    "published": ("pool", "--published --shots 16 --iterations 300"),
    "coefficients": ("pool", "--coefficients chosen"),
    "k-merge-6": ("pool", "--k-merge 6"),
    "k-merge-8": ("pool", "--k-merge 8"),
    "k-merge-12": ("pool", "--k-active 12 --k-merge 12"),
}

Part = Literal["search", "methods", "ablations", "orders", "attribution", "unseen"]


@dataclass(frozen=True, kw_only=True)
class Study:
    """Learn the six small tasks with every method, in several orders and with several seeds."""

    out: Path = Path("runs/results")
    """Folder for all runs; run 'trainer report' on its sub-folders to draw them."""
    lengths: tuple[Length, ...] = ("long", "short")
    """The presets' 300 steps per task (long), or a third of them (short)."""
    parts: tuple[Part, ...] = ("search", "methods", "ablations", "orders", "attribution", "unseen")
    """Which parts of the study to run."""
    quick: bool = False
    """Run every method once, with the presets' steps, and print the table: half an hour on two cores."""
    jobs: int = 2
    """Number of runs at a time, each on one CPU core: twice as fast as one run on two cores."""


def main(study: Annotated[Study, Parameter(name="*")] = Study()) -> None:
    """Run all commands of the chosen parts."""
    quick = study.out / "quick"
    if study.quick:
        runs = [_sequence(quick / method, "long", method, SEEDS[0], ORDERS[0]) for method in METHODS]
    else:
        runs = [
            command
            for length in study.lengths
            for part in study.parts
            for command in PARTS[part](study.out / length / FOLDERS.get(part, part), length)
        ]
    console, lock = Console(stderr=True), threading.Lock()

    def run(command: str) -> None:
        with lock:
            console.print(f"$ {command}", soft_wrap=True, highlight=False)
        trainer = [sys.executable, "-m", "clipweld.trainer", *shlex.split(command)[1:], "--resume"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(trainer, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{command}\n{done.stderr}")

    with ThreadPoolExecutor(study.jobs) as workers:
        list(workers.map(run, runs))
    if study.quick:
        print("\n".join(table([quick], "task")))


def search(out: Path, length: Length) -> Iterator[str]:
    """Yield the runs, on validation images and in one order, that choose learning rates and the pool's settings."""
    for name, (flags, seeds) in POOL_SEARCH[length].items():
        for seed in seeds:
            yield _sequence(out / "pool" / f"{name}-seed-{seed}", length, "pool", seed, None, f"--validate {flags}")
    for method, rates in RATES[length].items():
        for lr in rates:
            yield _sequence(out / method / f"lr-{lr:g}", length, method, 0, None, f"--validate --lr {lr:g}")


def methods(out: Path, length: Length) -> Iterator[str]:
    """Yield a run of every method for each seed, in a different order of tasks for each."""
    for seed, order in zip(SEEDS, ORDERS, strict=True):
        for method in METHODS:
            yield _sequence(out / method / f"order-{order}-seed-{seed}", length, method, seed, order)


def orders(out: Path, length: Length) -> Iterator[str]:
    """Yield the remaining combinations of seed and order, except for ``joint``, which learns all tasks at once."""
    for seed, order in itertools.product(SEEDS, ORDERS):
        for method in ("pool", "lora", "finetune"):
            if SEEDS.index(seed) != ORDERS.index(order):
                yield _sequence(out / method / f"order-{order}-seed-{seed}", length, method, seed, order)


def ablations(out: Path, length: Length) -> Iterator[str]:
    """Yield a run of every ablation for each seed, in a different order of tasks for each."""
    yield from _variants(out, length, {name: ("pool", flags) for name, flags in ABLATIONS[length].items()})


def unseen(out: Path, length: Length) -> Iterator[str]:
    """Yield runs on the three tasks that no setting was chosen on, while the six are watched."""
    compared = {"pool": ("pool", ""), "lora-both-losses": ATTRIBUTION["lora-both-losses"], "lora": ("lora", "")}
    if length == "long":
        for command in _variants(out, length, compared):
            yield command.replace("--tasks mini ", "--tasks mini-unseen --watch mini ")


def _sequence(out: Path, length: Length, method: Method, seed: int, order: int | None, flags: str = "") -> str:
    """Return one command line.

    A run's own ``flags`` come after those of its length, because the last one counts if a flag is given twice.
    """
    ordered = "" if order is None else f"--order-seed {order}"
    words = [f"trainer sequence --model mini --tasks mini --method {method} --seed {seed}", ordered]
    return " ".join([*filter(None, (*words, LENGTHS[length][method], flags)), f"--out {out}"])


def attribution(out: Path, length: Length) -> Iterator[str]:
    """Yield the runs that show what earns the gain, each seed in a different order of tasks."""
    if length == "long":
        yield from _variants(out, length, ATTRIBUTION)


def _variants(out: Path, length: Length, variants: Mapping[str, tuple[Method, str]]) -> Iterator[str]:
    for seed, order in zip(SEEDS, ORDERS, strict=True):
        for name, (method, flags) in variants.items():
            yield _sequence(out / name / f"order-{order}-seed-{seed}", length, method, seed, order, flags)


FOLDERS = {"orders": "methods"}
PARTS = {
    "search": search,
    "methods": methods,
    "ablations": ablations,
    "orders": orders,
    "attribution": attribution,
    "unseen": unseen,
}

if __name__ == "__main__":
    command_line.run(main, consume_multiple=True)
