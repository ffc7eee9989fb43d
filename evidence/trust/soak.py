"""Run clients in several processes against a real Triton for a long time, and switch versions every few seconds.

No call may fail, no answer may be wrong, memory, threads and open files may not grow, and nothing may be left behind.

Run: python -m evidence.trust.soak --minutes 20
"""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Annotated

import psutil
from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console
from rich.progress import Progress
from scipy.stats import theilslopes

from clipweld.exporter.errors import ExporterError
from clipweld.exporter.serving.installation import SHARED_MEMORY
from clipweld.exporter.serving.switch import promote, rollback
from clipweld.exporter.serving.triton import serve
from clipweld.exporter.store.repository import Repository
from clipweld.trainer.base.backbone import load_backbone
from evidence import command_line
from evidence.trust.asking import keep
from evidence.trust.record import Record
from evidence.trust.served import known, pictures, write_versions

PROCESSES = 2
SWITCH_EVERY_S = 4.0
WARM_UP = 0.25  # fraction of the time in which allocators and caches fill; its samples don't count
FLAT_PERCENT_AN_HOUR = 5.0
FLAT_COUNT = 3  # threads or open files by which a process may grow until the end
KEPT_SAMPLES = 60


def main(
    *,
    minutes: Annotated[float, Parameter(validator=Number(gte=0.05), help="Duration in minutes.")] = 20,
    seed: Annotated[int, Parameter(help="Seed of the questions and switches.")] = 0,
    out: Annotated[Path, Parameter(help="JSON file for the figures.")] = Path("runs/trust/soak.json"),
) -> None:
    """Classify, switch versions, and measure memory, threads and files of the server and its clients."""
    with Record(out) as record, tempfile.TemporaryDirectory(prefix="clipweld-soak-") as folder:
        repository = write_versions(Path(folder), [1, 2])
        soak(repository, Path(folder), 60 * minutes, seed, record)


def soak(repository: Repository, folder: Path, seconds: float, seed: int, record: Record) -> None:
    """Serve a repository with at least three versions, run the test on the server, and record the figures."""
    before = set(psutil.Process().children(recursive=True))
    images, backbone = pictures(), load_backbone("mini")
    keep(folder, images, {version: known(repository, version, images, backbone) for version in repository.versions()})
    with _own_temporary_folder(folder) as temporary:
        log: deque[str] = deque(maxlen=20)
        with serve(repository.path, log=log.append) as server, ExitStack() as stack:
            urls = {"grpc": server.url, "http": server.http_url}
            asking = [
                stack.enter_context(_client(urls, folder, f"--seed {seed}, process {n}")) for n in range(PROCESSES)
            ]
            samples, switches = _watch(repository, server.url, server.process.pid, asking, seconds, seed, record)
            results = [_ended(process, record) for process in asking]
            if (status := server.process.poll()) is not None:
                record.broken.append(f"the server ended by itself with {status}: {' | '.join(log)}")
        left = [str(path) for path in temporary.iterdir()]
    left += [str(path) for path in _shared_memory(server.url)]
    started = set(psutil.Process().children(recursive=True)) - before
    left += [f"process {process.pid} {process.name()}" for process in started]
    if left:
        record.broken.append(f"left behind: {left}")
    ends: Counter[str] = Counter()
    for result in results:
        ends.update(result["ends"])
        record.broken += result["faults"]
    failed = {kind: count for kind, count in ends.items() if kind != "right"}
    if failed:
        record.broken.append(f"calls that failed: {failed}")
    record.figures |= {
        "seconds": round(seconds),
        "calls": ends.total(),
        "right": ends["right"],
        "failed_or_wrong": failed,
        "images": sum(result["images"] for result in results),
        "switches": switches,
        "left_behind": left,
        "growth": _growth(samples, record),
        "samples": samples[:: max(1, len(samples) // KEPT_SAMPLES)],
    }


def _watch(
    repository: Repository,
    url: str,
    server_pid: int,
    asking: Sequence[subprocess.Popen],
    seconds: float,
    seed: int,
    record: Record,
) -> tuple[list[dict], Counter[str]]:
    """Switch versions every few seconds, and measure server and clients after each switch.

    Returns:
        The measurements, and the number of switches by command.
    """
    draw, samples, switches = random.Random(f"{seed} switches"), [], Counter()
    newest = repository.versions()[-1]
    steps = itertools.cycle([("promote", newest - 1), ("promote", newest), ("rollback", None), ("promote", newest)])
    began = time.monotonic()
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("soaking", total=seconds)
        while (passed := time.monotonic() - began) < seconds:
            progress.update(task, completed=passed)
            command, version = next(steps)
            try:
                if command == "promote":
                    promote(repository, version, [url])
                else:
                    rollback(repository, [url])
            except ExporterError as exc:
                record.broken.append(f"switch {switches.total()}, {command}, after {passed:.0f} s: {exc}")
                return samples, switches
            switches[command] += 1
            time.sleep(draw.uniform(0.5, 1.5) * min(SWITCH_EVERY_S, seconds / 10))
            shared = sum(region.stat().st_size for region in _shared_memory(url)) / 1e6
            looked = {"server": _sizes(server_pid) | {"shared_mb": round(shared, 2)}}
            looked |= {f"client {number}": _sizes(process.pid) for number, process in enumerate(asking)}
            state = f"{repository.served} of {repository.standing()}"
            samples.append({"seconds": round(time.monotonic() - began, 1), "serves": state, **looked})
            for number, process in enumerate(asking):
                if process.poll() is not None:
                    record.broken.append(f"process {number} of clients ended by itself with {process.returncode}")
                    return samples, switches
    return samples, switches


def _shared_memory(url: str) -> Iterator[Path]:
    """Return the shared memory regions of a server that this process started."""
    return SHARED_MEMORY.glob(f"clipweld-{os.getpid()}-{url.rpartition(':')[2]}-*")


def _sizes(pid: int) -> dict[str, float]:
    """Count megabytes, threads, open files and processes of a process and its descendants.

    Memory is what a process has for itself, in RAM or swapped out. Shared memory is left out, because each process's
    share of it changes when others start or end.
    """
    total: Counter[str] = Counter()
    process = psutil.Process(pid)
    for member in [process, *process.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess), member.oneshot():  # a process that has just ended counts as nothing
            memory = member.memory_full_info()
            total["mb"] += (memory.uss + memory.swap) / 1e6
            total["threads"] += member.num_threads()
            total["files"] += member.num_fds()
            total["processes"] += 1
    return {name: round(value, 2) for name, value in total.items()}


def _growth(samples: Sequence[dict], record: Record) -> dict[str, dict]:
    """Return how memory, threads and files change over time, and record those that grow.

    Only samples in which the server has the same state are compared. Memory grows if the lower end of the 95% interval
    of its Theil-Sen slope is above FLAT_PERCENT_AN_HOUR percent of its median.
    """
    by_state: dict[str, list[dict]] = defaultdict(list)
    for sample in samples:
        by_state[sample["serves"]].append(sample)
    alike = max(by_state.values(), key=len)
    kept = [sample for sample in alike if sample["seconds"] >= WARM_UP * samples[-1]["seconds"]]
    if len(kept) < 4:
        return {}
    hours = [sample["seconds"] / 3600 for sample in kept]
    found = {}
    for who in ("server", *(f"client {number}" for number in range(PROCESSES))):
        for what in sorted(kept[0][who].keys() - {"processes"}):
            values = [sample[who][what] for sample in kept]
            slope, _, low, high = theilslopes(values, hours)
            level = median(values)
            row = {"median": level, "an_hour": slope, "low": low, "high": high, "samples": len(kept)}
            found[f"{who} {what}"] = {name: round(float(value), 2) for name, value in row.items()}
            least = level * FLAT_PERCENT_AN_HOUR / 100 if what.endswith("mb") else FLAT_COUNT / hours[-1]
            if low > least:
                record.broken.append(
                    f"{who}: {what} grow by {slope:.1f} an hour ({low:.1f} to {high:.1f}) from {level}"
                )
    return found


@contextmanager
def _client(urls: dict[str, str], folder: Path, seed: str) -> Iterator[subprocess.Popen]:
    # One heap: with one heap per thread, glibc keeps freed memory in each of them, and more of it over time.
    process = subprocess.Popen(
        [sys.executable, "-m", "evidence.trust.asking"],
        env=os.environ | {"MALLOC_ARENA_MAX": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    process.stdin.write(json.dumps({"urls": urls, "folder": str(folder), "seed": seed}) + "\n")
    process.stdin.flush()
    with process:
        try:
            yield process
        finally:
            process.kill()


def _ended(process: subprocess.Popen, record: Record) -> dict:
    """Return the outcomes that a process of clients prints at its end."""
    printed, _ = process.communicate(timeout=600)
    if process.returncode:
        record.broken.append(f"a process of clients ended with {process.returncode}")
        return {"ends": {}, "images": 0, "faults": []}
    return json.loads(printed)


@contextmanager
def _own_temporary_folder(folder: Path) -> Iterator[Path]:
    """Use a new folder for all temporary files, also in the processes that are started in this context."""
    own = folder / "tmp"
    own.mkdir()
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"], tempfile.tempdir = str(own), None
    try:
        yield own
    finally:
        os.environ.pop("TMPDIR")
        if before is not None:
            os.environ["TMPDIR"] = before
        tempfile.tempdir = None


if __name__ == "__main__":
    command_line.run(main)
