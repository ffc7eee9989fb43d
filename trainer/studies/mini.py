"""Every method and ablation on the small CLIP's six tasks: the runs behind RESULTS.md.

Run: python -m trainer.studies.mini --out runs/results

Each run is a ``trainer sequence`` command that is printed as it starts; what is finished is not run again, what was
interrupted goes on. Settings are chosen on validation images (``search``), never on test images.
"""

from __future__ import annotations

import itertools
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from trainer.config import METHODS

SEEDS = (0, 1, 2)
ORDERS = (0, 1, 2)
RATES = {"lora": (2.5e-4, 5e-4, 1e-3, 2e-3, 5e-3), "finetune": (3e-5, 1e-4, 3e-4), "joint": (1e-4, 3e-4, 1e-3)}
POOL_SEARCH = {
    "router-learned": ("--router learned", SEEDS),
    "router-none": ("--router none", SEEDS),
    "router-block": ("--router learned --router-per block", SEEDS[:1]),
    "ago-sum": ("--router learned --ago sum", SEEDS[:1]),
    "lr-0.02": ("--router none --lr 0.02", SEEDS[:1]),
    "lr-0.005": ("--router none --lr 0.005", SEEDS[:1]),
}
ABLATIONS = {
    "no-drift": "--drift-weight 0",
    "no-anchors": "--anchor-weight 0",
    "router-learned": "--router learned",
    "published": "--router learned --ago sum --lr 0.002 --dropout 0.2 "
    "--drift-weight 0 --anchor-weight 0 --consolidate 0",
    "ago-sum": "--ago sum",
    "firmer": "--anchor-weight 4 --drift-weight 400",
    "firmer-longer": "--anchor-weight 4 --drift-weight 400 --iterations 300",
    "no-consolidation": "--consolidate 0",
    "k-merge-8": "--k-merge 8",
    "router-fixed": "--router fixed",
    "router-block": "--router learned --router-per block",
    "route-first": "--router learned --route-on first",
    "ago-mean": "--ago mean",
    "rank-6": "--rank 6 --k-active 4 --k-merge 2",
    "k-active-4": "--k-active 4",
}

Part = Literal["search", "methods", "ablations", "orders"]


@dataclass(frozen=True)
class Study:
    """Learn the six small tasks by every method, in several orders with several seeds."""

    out: Path = Path("runs/results")
    """Folder for all runs; 'trainer report' on its sub-folders draws them."""
    parts: tuple[Part, ...] = ("search", "methods", "ablations", "orders")
    """What to run."""
    jobs: int = 2
    """Runs at a time, each on one CPU core: twice the speed of one run on two cores."""


def main(study: Study) -> None:
    """Run all commands of the parts that were asked for."""
    runs = [command for part in study.parts for command in PARTS[part](study.out / FOLDERS.get(part, part))]
    console, lock = Console(stderr=True), threading.Lock()

    def run(command: str) -> None:
        with lock:
            console.print(f"$ {command}", soft_wrap=True, highlight=False)
        trainer = [sys.executable, "-m", "trainer", *shlex.split(command)[1:], "--resume"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(trainer, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{command}\n{done.stderr}")

    with ThreadPoolExecutor(study.jobs) as workers:
        list(workers.map(run, runs))


def search(out: Path) -> Iterator[str]:
    """Each baseline's learning rate and the pool's settings, on validation images, in one order."""
    for name, (flags, seeds) in POOL_SEARCH.items():
        for seed in seeds:
            yield _sequence(out / "pool" / f"{name}-seed-{seed}", "pool", seed, None, f"--validate {flags}")
    for method, rates in RATES.items():
        for lr in rates:
            yield _sequence(out / method / f"lr-{lr:g}", method, 0, None, f"--validate --lr {lr:g}")


def methods(out: Path) -> Iterator[str]:
    """All methods at their presets, each seed in an order of its own."""
    for seed, order in zip(SEEDS, ORDERS, strict=True):
        for method in METHODS:
            yield _sequence(out / method / f"order-{order}-seed-{seed}", method, seed, order)


def orders(out: Path) -> Iterator[str]:
    """The rest of every seed in every order; tasks learned at once have no order."""
    for seed, order in itertools.product(SEEDS, ORDERS):
        for method in ("pool", "lora", "finetune"):
            if SEEDS.index(seed) != ORDERS.index(order):
                yield _sequence(out / method / f"order-{order}-seed-{seed}", method, seed, order)


def ablations(out: Path) -> Iterator[str]:
    """One thing changed at a time: each seed in an order of its own."""
    for seed, order in zip(SEEDS, ORDERS, strict=True):
        for name, flags in ABLATIONS.items():
            yield _sequence(out / name / f"order-{order}-seed-{seed}", "pool", seed, order, flags)


def _sequence(out: Path, method: str, seed: int, order: int | None, flags: str = "") -> str:
    ordered = "" if order is None else f"--order-seed {order}"
    words = ["trainer sequence --model mini --tasks mini", f"--method {method} --seed {seed}", ordered, flags]
    return " ".join([*filter(None, words), f"--out {out}"])


FOLDERS = {"orders": "methods"}
PARTS = {"search": search, "methods": methods, "ablations": ablations, "orders": orders}

if __name__ == "__main__":
    main(tyro.cli(Study, prog="python -m trainer.studies.mini"))
