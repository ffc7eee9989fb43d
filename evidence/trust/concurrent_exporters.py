"""Start pairs of exporters at once on one repository and its server: both take turns, or one is refused.

Run: python -m evidence.trust.concurrent_exporters --pairs 50
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.progress import track

from clipweld.client import ZeroShotClassifier
from clipweld.exporter.errors import ExporterError
from clipweld.exporter.serving.triton import serve
from clipweld.exporter.store.manifest import check_files
from clipweld.exporter.store.repository import KINDS, Repository
from evidence import command_line
from evidence.command_line import POSITIVE
from evidence.trust.record import Record
from evidence.trust.served import write_versions

TIMEOUT_S = 900  # enough on a busy machine
BUSY = "another exporter is writing to it; wait until it has finished"


def main(
    *,
    pairs: Annotated[int, Parameter(validator=POSITIVE, help="Number of pairs to start.")] = 50,
    seed: Annotated[int, Parameter(help="Seed of the commands and times.")] = 0,
    out: Annotated[Path, Parameter(help="JSON file for the figures.")] = Path("runs/trust/concurrent_exporters.json"),
) -> None:
    """Start two of merge, promote, rollback and prune at once, and check their output and the repository."""
    with Record(out) as record, tempfile.TemporaryDirectory(prefix="clipweld-concurrent-") as folder:
        repository = write_versions(Path(folder), [1, 2])
        with serve(repository.path) as server:
            for number in track(range(pairs), "pairs", console=Console(stderr=True)):
                draw = random.Random(f"{seed} {number}")
                start(repository, server.url, draw, f"--seed {seed}, pair {number}", record)
        if not record.figures.get("told to wait"):
            record.broken.append("no two met: nothing was tested")


def start(repository: Repository, url: str, draw: random.Random, which: str, record: Record) -> None:
    """Start one pair of commands, and record how they ended and what is wrong afterwards."""
    commands = [_command(repository, url, draw) for _ in range(2)]
    running = []
    for command in commands:
        running.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
        time.sleep(draw.uniform(0, 0.3))
    counts = Counter(record.figures)
    counts["pairs"] += 1
    for command, process in zip(commands, running, strict=True):
        what = f"{which}: exporter {' '.join(command[3:])}"
        try:
            _, said = process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            record.broken.append(f"{what} did not end within {TIMEOUT_S} s")
            continue
        if process.returncode == 0:
            counts["done"] += 1
        elif process.returncode == 1 and said.startswith("exporter: ") and said.count("\n") == 1:
            counts["told to wait" if BUSY in said else "refused for another reason"] += 1
        else:
            record.broken.append(f"{what} ended with {process.returncode} and said {said!r}")
    record.figures |= counts
    record.broken += [f"{which}: {fault}" for fault in faults(repository, url)]


def faults(repository: Repository, url: str) -> list[str]:
    """Return what is wrong with a repository and its server, while no exporter writes to it."""
    found = []
    for version in repository.versions():
        try:
            check_files(repository, version)
        except ExporterError as exc:
            found.append(str(exc))
    standing = repository.standing()
    for kind in KINDS:
        there = sorted(int(path.name) for path in repository.model(kind).iterdir() if path.is_dir())
        if there != standing:
            found.append(f"{repository.model(kind)} has versions {there}, of which {standing} stand")
    strays = [path.name for path in repository.path.parent.glob(f".{repository.path.name}.*")]
    if strays:
        found.append(f"left behind: {strays}")
    with ZeroShotClassifier(url) as clip:
        if clip.versions() != standing:
            found.append(f"the server has versions {clip.versions()}, the repository {standing}")
    return found


def _command(repository: Repository, url: str, draw: random.Random) -> list[str]:
    commands = {
        "merge": ["--to", "onnx", "--model", "mini", "--adapters", str(repository.path.parent / "adapters-2")],
        "promote": [str(draw.choice(repository.versions())), "--url", url],
        "rollback": ["--url", url],
        "prune": ["--keep", "2"],
    }
    name = draw.choices(list(commands), weights=[1, 2, 2, 1])[0]
    return [sys.executable, "-m", "clipweld.exporter", name, *commands[name], "--repository", str(repository.path)]


if __name__ == "__main__":
    command_line.run(main)
