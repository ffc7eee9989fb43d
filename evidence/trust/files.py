"""Read untrusted files, damaged or malicious: each must be read correctly, or be refused in one line.

Run: python -m evidence.trust.files
"""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console
from rich.progress import Progress

from evidence import command_line
from evidence.command_line import POSITIVE
from evidence.trust.record import Record

SECONDS = 30.0  # limit per file; a reader that hangs outside of Python is killed after three times this and a minute
EXTRA_BYTES = 64 << 20  # memory allowed beyond twice the file's size
LONGEST = 2000  # characters in the message of a refusal
KEPT_BYTES = 64 << 20  # larger files are not kept
PROGRAMS = (
    "pickle.find_class",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
)
SYSTEM = ("/proc/self", "/sys", "/usr/share")  # read by libraries
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate")


class TooLong(Exception):
    """Reading one file took longer than ``SECONDS``."""


class Escaped(BaseException):
    """A reader tried to run a program, or to open or change something outside the allowed folders."""


@dataclass
class Job:
    """Corrupted files of one kind for one process: those numbered ``range(first, count, step)``."""

    kind: str
    first: int
    step: int
    count: int

    def __len__(self) -> int:
        return len(range(self.first, self.count, self.step))


@dataclass
class Found:
    """The findings of all processes. Each writes its own to a log, line by line, because it may be killed at any time.

    Attributes:
        outcomes: by kind, how often files were accepted, or refused with which error.
        broken: descriptions of broken promises.
        extra_bytes: by kind, the most memory used beyond twice the file's size.
        seconds: by kind, the longest time for one file.
    """

    outcomes: dict[str, Counter] = field(default_factory=lambda: defaultdict(Counter))
    broken: list[str] = field(default_factory=list)
    extra_bytes: Counter = field(default_factory=Counter)
    seconds: Counter = field(default_factory=Counter)

    def read(self, log: Path) -> None:
        """Add the findings in the log of one process."""
        for line in log.read_text(encoding="utf-8").splitlines():
            kind, outcome, extra, seconds, reason = line.split("\t")
            self.outcomes[kind][outcome] += 1
            self.extra_bytes[kind] = max(self.extra_bytes[kind], int(extra))
            self.seconds[kind] = max(self.seconds[kind], float(seconds))
            if reason:
                self.broken.append(reason)


def main(
    *,
    adapters: Annotated[int, Parameter(validator=Number(gte=0), help="Number of adapter files.")] = 100_000,
    manifests: Annotated[int, Parameter(validator=Number(gte=0), help="Number of manifests.")] = 20_000,
    others: Annotated[
        int, Parameter(validator=Number(gte=0), help="Files of each other kind; a tenth of this for weights.")
    ] = 2_000,
    atheris: Annotated[
        int, Parameter(validator=Number(gte=0), help="Files made by atheris, guided by coverage.")
    ] = 100_000,
    seed: Annotated[int, Parameter(help="Seed, which with its number determines each file.")] = 0,
    processes: Annotated[int, Parameter(validator=POSITIVE, help="Processes at a time.")] = 2,
    out: Annotated[Path, Parameter(help="JSON file for the figures.")] = Path("runs/trust/files.json"),
) -> None:
    """Corrupt files of every kind that may be untrusted, and read each with the code that clipweld uses."""
    kept = out.with_suffix("")
    kinds = ("histories", "cards", "models", "names", "checkpoints", "runs", "results", "folders")
    counts = {"adapters": adapters, "manifests": manifests, **dict.fromkeys(kinds, others), "weights": others // 10}
    with Record(out) as record:
        found = spoil_and_read(counts, seed, processes, kept)
        record.figures = {
            "files": sum(sum(outcomes.values()) for outcomes in found.outcomes.values()),
            "by_kind": {
                kind: {
                    "outcomes": dict(found.outcomes[kind].most_common()),
                    "extra_mb": round(found.extra_bytes[kind] / 1e6, 1),
                    "longest_s": round(found.seconds[kind], 3),
                }
                for kind in counts
            },
            "memory_allowed": f"twice the file's size and {EXTRA_BYTES >> 20} MiB",
        }
        record.broken += found.broken
        if atheris:
            record.figures["atheris"], broken = guided(atheris, seed, kept)
            record.broken += broken


def spoil_and_read(counts: dict[str, int], seed: int, processes: int, kept: Path) -> Found:
    """Read corrupted files in separate processes; a process that dies or hangs is reported and replaced.

    Args:
        counts: number of files by kind.
        seed: of the corruption.
        processes: how many run at a time.
        kept: folder for the files for which a promise is broken.
    """
    found = Found()
    with tempfile.TemporaryDirectory(prefix="clipweld-files-") as folder, _progress(sum(counts.values())) as progress:
        threads = [
            threading.Thread(
                target=_attend,
                args=(
                    [Job(kind, place, processes, count) for kind, count in counts.items()],
                    seed, Path(folder) / str(place), kept, progress, found,
                ),
            )
            for place in range(processes)
        ]  # fmt: skip
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return found


def _attend(jobs: list[Job], seed: int, folder: Path, kept: Path, progress: Counter, found: Found) -> None:
    """Run one process after another until all jobs are done."""
    context = multiprocessing.get_context("spawn")
    folder.mkdir()
    log = folder / "log"
    log.touch()
    place, number = context.Value("q", 0), context.Value("q", jobs[0].first)
    while place.value < len(jobs):
        worker = context.Process(target=work, args=(jobs, seed, place, number, folder / "files", log, kept))
        worker.start()
        at, since = (place.value, number.value), time.monotonic()
        while worker.is_alive():
            worker.join(0.5)
            progress[folder] = sum(len(job) for job in jobs[: place.value]) + number.value // jobs[0].step
            if (now := (place.value, number.value)) != at:
                at, since = now, time.monotonic()
            elif time.monotonic() - since > 3 * SECONDS + 60:  # a minute for the start of the process
                worker.kill()
        if worker.exitcode:
            job = jobs[place.value]
            what = f"the process ended with {worker.exitcode}"
            with log.open("a", encoding="utf-8") as lines:
                lines.write(f"{job.kind}\tdied\t0\t0\t{job.kind} {number.value} of seed {seed}: {what}\n")
            number.value += job.step
            if number.value >= job.count:
                place.value += 1
                number.value = job.first
    found.read(log)


def work(
    jobs: list[Job], seed: int, place: Synchronized, number: Synchronized, folder: Path, log: Path, kept: Path
) -> None:
    """Do the jobs in this process, starting at a place in ``jobs`` and a file number, and log each outcome."""
    import torch

    from evidence.trust.readers import READERS, reader

    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _too_long)
    guard, parent = Guard(folder), multiprocessing.parent_process()
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    with log.open("a", encoding="utf-8", buffering=1) as lines:
        while place.value < len(jobs):
            job = jobs[place.value]
            with reader(READERS[job.kind], folder / f"{job.kind}-{number.value}") as one:
                while number.value < job.count:
                    if not parent.is_alive():
                        return
                    lines.write("\t".join((job.kind, *_case(one, job.kind, seed, number.value, guard, kept))) + "\n")
                    number.value += job.step
            place.value += 1
            number.value = job.first


def _case(one, kind: str, seed: int, number: int, guard: Guard, kept: Path) -> tuple[str, str, str, str]:
    """Read one file; return its outcome, memory beyond twice its size, seconds, and the broken promise or ""."""
    from evidence.trust.readers import REFUSALS, OtherMeaning

    size = one.spoil(random.Random(f"{seed} {kind} {number}"))
    broken, began = "", time.monotonic()
    with _limits(size) as memory:
        try:
            with guard:
                one.read()
            outcome = "accepted"
        except REFUSALS as exc:
            outcome = type(exc).__name__
            if len(str(exc)) > LONGEST:
                broken = f"a message of {len(str(exc)):,} characters"
        except OtherMeaning as exc:
            outcome, broken = "other meaning", str(exc)
        except BaseException as exc:  # any other error is a broken promise
            outcome, broken = "broken", f"{type(exc).__name__}: {str(exc)[:200]}"
    extra = max(0, memory[0] - 2 * size)
    if extra > EXTRA_BYTES:
        broken = broken or f"took {extra >> 20} MiB beyond twice its {size:,} bytes"
    if broken:
        broken = f"{kind} {number} of seed {seed}: {' '.join(broken.split())}"
        _keep(one.folder, kept / f"{kind}-{number}")
    return outcome, str(extra), f"{time.monotonic() - began:.3f}", broken.encode(errors="replace").decode()


@contextmanager
def _limits(size: int) -> Iterator[list[int]]:
    """Limit time and address space for one file; at the end, the yielded list holds the peak growth in bytes."""
    before, grew = _memory("VmRSS"), [0]
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, VmHWM
    space = 2 * size + 4 * EXTRA_BYTES + _memory("VmSize")
    resource.setrlimit(resource.RLIMIT_AS, (space, resource.RLIM_INFINITY))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield grew
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        grew[0] = _memory("VmHWM") - before


class Guard:
    """A context in which opening or changing other files, or running programs, from Python raises ``Escaped``.

    Args:
        folder: the folder that may be changed; it may also be read, as may the folders of Python and its libraries.
    """

    def __init__(self, folder: Path) -> None:
        self._on = False
        self._others: set[int | None] = set()
        self._folder = os.path.realpath(folder)
        libraries = {*sys.path, sys.prefix, sys.base_prefix, str(Path(__file__).parents[2]), *SYSTEM}
        self._free = tuple(os.path.realpath(path) for path in (folder, *libraries) if path)
        sys.addaudithook(self._see)

    def __enter__(self) -> None:
        # Threads that are already running don't belong to the reader; threads that it starts are watched.
        self._others = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}
        self._on = True

    def __exit__(self, *_: object) -> None:
        self._on = False

    def _see(self, event: str, arguments: tuple) -> None:
        if not self._on or threading.get_ident() in self._others:
            return
        if event in PROGRAMS:
            raise Escaped(f"{event} {arguments!r:.100}")
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            path = os.path.realpath(arguments[0])
            writes = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            free = (self._folder,) if writes else self._free
            if not _inside(path, free) and path != os.devnull:
                raise Escaped(f"open {path:.200}")
        if event in CHANGES:
            for path in arguments[:2]:
                if isinstance(path, (str, bytes)):
                    parent, name = os.path.split(os.path.abspath(os.fsdecode(path)))
                    if not _inside(os.path.join(os.path.realpath(parent), name), (self._folder,)):
                        raise Escaped(f"{event} {path!r:.200}")


def _inside(path: str | bytes, folders: Iterable[str]) -> bool:
    return any(Path(os.fsdecode(path)).is_relative_to(folder) for folder in folders)


def guided(runs: int, seed: int, kept: Path) -> tuple[dict, list[str]]:
    """Run coverage-guided fuzzing of adapters and manifests, ``evidence.trust.guided``, in a process of its own."""
    kept.mkdir(parents=True, exist_ok=True)
    counts = kept / "atheris.txt"
    command = [
        sys.executable,
        "-m",
        "evidence.trust.guided",
        counts,
        f"-runs={runs}",
        f"-seed={seed + 1}",
        "-timeout=10",
    ]
    limits = ["-rss_limit_mb=4096", "-max_len=8192", f"-artifact_prefix={kept}/", "-print_final_stats=1"]
    done = subprocess.run([*map(str, command), *limits], capture_output=True, text=True, errors="replace", check=False)
    outcomes: Counter = Counter()
    with suppress(FileNotFoundError):
        for line in counts.read_text(encoding="utf-8").splitlines():
            name, count = line.split()
            outcomes[name] = int(count)
    figures = {"files": outcomes.total(), "outcomes": dict(outcomes.most_common())}
    last = " ".join(done.stderr.split())[-500:]
    return figures, [f"atheris of seed {seed + 1}: {last}"] if done.returncode or outcomes.total() < runs else []


def _memory(what: str) -> int:
    """Return a memory figure of this process in bytes: ``VmRSS``, ``VmHWM`` (the peak of VmRSS) or ``VmSize``."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(f"{what}:")) * 1024


def _too_long(*_: object) -> None:
    raise TooLong(f"more than {SECONDS:g} s")


def _keep(folder: Path, target: Path) -> None:
    """Copy the files that broke a promise, except pipes and very large files, which the seed can recreate."""

    def left_out(where: str, names: list[str]) -> list[str]:
        found = [(name, os.lstat(os.path.join(where, name))) for name in names]
        return [
            name
            for name, status in found
            if stat.S_ISFIFO(status.st_mode) or (stat.S_ISREG(status.st_mode) and status.st_size > KEPT_BYTES)
        ]

    with suppress(OSError, shutil.Error):
        shutil.copytree(folder, target, symlinks=True, ignore=left_out, dirs_exist_ok=True)


@contextmanager
def _progress(total: int) -> Iterator[Counter]:
    """Show a progress bar on stderr for all processes together."""
    done, over = Counter(), threading.Event()

    def show() -> None:
        with Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task("files", total=total)
            while not over.wait(0.5):
                bar.update(task, completed=done.total())

    shown = threading.Thread(target=show)
    shown.start()
    try:
        yield done
    finally:
        over.set()
        shown.join()


if __name__ == "__main__":
    command_line.run(main)
