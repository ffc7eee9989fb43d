"""Kill every command that writes with SIGKILL at random moments: files stay whole, and the next run ends the same.

Each case runs a command in a folder of its own, and kills it with all its processes one to three times before it may
finish. After each kill, every file must be as it was, as an undisturbed run leaves it, or known to be unfinished. After
the end, the folder must equal that of the undisturbed run byte for byte, except for times, and hold nothing else.

Run: python -m evidence.trust.kills --out runs/trust/kills.json
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any

import psutil
from cyclopts import Parameter
from rich.console import Console
from rich.progress import Progress

from clipweld.exporter.serving.installation import SHARED_MEMORY
from clipweld.trainer.command_line import WrongUsage
from evidence import command_line
from evidence.command_line import POSITIVE
from evidence.trust.record import Record
from evidence.trust.stage import Command, environment, stage

AT_ONCE = 2
MOST_KILLS = 3  # per case
STARTING = 0.15  # fraction of the kills that come before a command's first change to the disk
LATE = 1.1  # the other kills come until a little after the last change: 1.1 times the usual time
POLL_S = 0.002
TIMEOUT_S = 300
ENDING_S = 20  # in which a server must end after the process that started it was killed
OF_THE_RUN = {"date", "seconds", "seconds_per_task"}
# An image's score changes by about 3e-8 with its place in a batch, and a resumed run forms other batches.
SCORE = re.compile(rb"-?\d+\.\d+(e-?\d+)?")
DECIMALS = 3


@dataclass(frozen=True)
class Undisturbed:
    """A run of a command without kills.

    Attributes:
        before, end: the ``content`` of the folder before and after the run.
        starting_s, working_s: seconds until its first change to the disk, and from there to its last.
    """

    before: dict[str, str]
    end: dict[str, str]
    starting_s: float
    working_s: float


@dataclass
class Case:
    """The outcome of one case.

    Attributes:
        kills: when each kill came, and what it left.
        faults: descriptions of broken promises.
    """

    kills: list[dict[str, Any]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def main(
    *,
    kills: Annotated[int, Parameter(validator=POSITIVE, help="Least number of kills per command.")] = 34,
    only: Annotated[list[str] | None, Parameter(help="A command to kill; may be repeated. Default: all.")] = None,
    seed: Annotated[int, Parameter(help="Seed of the times of kills.")] = 0,
    out: Annotated[Path, Parameter(help="JSON file for the figures.")] = Path("runs/trust/kills.json"),
) -> None:
    """Kill fit, sequence, merge, promote on a running server, prune, classify with --out, and serve."""
    with (
        Record(out) as record,
        tempfile.TemporaryDirectory(prefix="clipweld-kills-") as folder,
        stage(Path(folder)) as commands,
    ):
        if unknown := set(only or ()) - {command.name for command in commands}:
            known = ", ".join(command.name for command in commands)
            raise WrongUsage(f"{', '.join(sorted(unknown))}: expected some of: {known}")
        wanted = [command for command in commands if not only or command.name in only]
        study(wanted, kills, seed, Path(folder) / "cases", record, out.with_suffix(""))


def study(commands: Sequence[Command], kills: int, seed: int, folder: Path, record: Record, kept: Path) -> None:
    """Kill each command at least ``kills`` times.

    Args:
        folder: for the cases; what they leave is removed.
        record: receives figures and faults.
        kept: keeps the folders of cases with faults, and ``kills.jsonl`` with one line per kill.
    """
    kills_in_all = 0
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    with Progress(console=Console(stderr=True)) as progress, (kept / "kills.jsonl").open("w", buffering=1) as lines:
        for command in commands:
            bar = progress.add_task(command.name, total=kills)
            undisturbed = left_alone(command, command.shared or folder / "undisturbed")
            at_once = 1 if command.shared else AT_ONCE
            numbers, found, faults = itertools.count(), [], 0
            with ThreadPoolExecutor(at_once) as pool:
                while len(found) < kills:
                    some = list(itertools.islice(numbers, at_once))
                    cases = pool.map(lambda number: kill(command, number, undisturbed, seed, folder), some)  # noqa: B023
                    for number, case in zip(some, cases, strict=True):
                        own = command.shared or folder / f"{number}"
                        faults += bool(case.faults)
                        for fault in case.faults:
                            record.broken.append(f"{command.name}, --seed {seed}, case {number}: {fault}")
                            progress.console.print(record.broken[-1], markup=False, soft_wrap=True)
                        if case.faults:
                            shutil.copytree(own, kept / f"{command.name.replace(' ', '-')}-{number}", symlinks=True)
                        if not command.shared:
                            shutil.rmtree(own)
                        new = [{"command": command.name, "case": number, **each} for each in case.kills]
                        lines.writelines(json.dumps(each) + "\n" for each in new)
                        found += new
                    progress.update(bar, completed=len(found))
            kills_in_all += len(found)
            record.figures[command.name] = _figures(found, next(numbers), faults)
    record.figures["kills"] = kills_in_all


def _figures(kills: list[dict[str, Any]], cases: int, faults: int) -> dict[str, Any]:
    return {
        "kills": len(kills),
        "cases": cases,
        "cases killed more than once": sum(each["kill"] == 2 for each in kills),
        "of runs that went on after a kill": sum(each["kill"] > 1 for each in kills),
        "found": dict(sorted(Counter(each["found"] for each in kills).items())),
        "cases with faults": faults,
    }


def left_alone(command: Command, folder: Path) -> Undisturbed:
    """Run a command to its end twice and time the second run, for which files are in the page cache, as in later runs.

    Raises:
        RuntimeError: the command fails without being killed, or the two runs differ.
    """
    ends = []
    for _ in range(2):
        _fresh(command, folder)
        before = content(folder)
        began = time.monotonic()
        process = _start(command.run, folder)
        _wait_for_change(folder, process)
        first = last = time.monotonic()
        while process.poll() is None:
            _wait_for_change(folder, process)
            last = last if process.poll() is not None else time.monotonic()
        _, said = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{command.name} fails when left alone: {said}")
        ends.append(content(folder))
    if faults := differences(*ends):
        raise RuntimeError(f"{command.name} ends differently when left alone twice: {'; '.join(faults)}")
    if command.proof:
        process = _start(command.proof, folder)
        _, said = process.communicate(timeout=TIMEOUT_S)
        if process.returncode:
            raise RuntimeError(f"what {command.name} leaves is not in order: {said}")
    return Undisturbed(before, ends[-1], first - began, last - first)


def kill(command: Command, number: int, undisturbed: Undisturbed, seed: int, folder: Path) -> Case:
    """Run one case: kill the command up to ``MOST_KILLS`` times and check the folder each time, then let it finish."""
    draw, case = random.Random(f"{seed} {command.name} {number}"), Case()
    own, started = command.shared or folder / f"{number}", []
    _fresh(command, own)
    arguments, found = command.run, undisturbed.before
    for place in range(1, draw.randint(1, MOST_KILLS) + 1):
        process = _start(arguments, own)
        started.append(process.pid)
        if draw.random() < STARTING:
            moment = {"when": "starting", "after_s": draw.uniform(0, undisturbed.starting_s)}
        else:
            moment = {"when": "at work", "after_s": draw.uniform(0, LATE * undisturbed.working_s)}
            _wait_for_change(own, process)
        with suppress(subprocess.TimeoutExpired):
            process.wait(moment["after_s"])
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        _, said = process.communicate()
        if process.returncode != -signal.SIGKILL:
            if process.returncode:
                case.faults.append(f"run {place} ended by itself with {process.returncode}: {said}")
            break
        earlier, found = found, content(own)
        case.faults += [f"after kill {place}: {fault}" for fault in strange(command, found, undisturbed)]
        finished = found == undisturbed.end or command.done in found
        kind = "all of it" if finished else "half of it" if found != earlier else "nothing new"
        case.kills.append({"kill": place, **moment, "found": kind})
        arguments = (*command.run, *command.on)
        if command.done in found:
            break
    if process.returncode == -signal.SIGKILL:
        _to_the_end(command, arguments, own, found, case)
    case.faults += [f"at the end: {fault}" for fault in differences(content(own), undisturbed.end)]
    case.faults += [f"at the end: {fault}" for fault in strays(own, started)]
    return case


def _to_the_end(command: Command, arguments: Sequence[str], own: Path, found: dict[str, str], case: Case) -> None:
    done = command.done in found
    process = _start(command.after if done and command.after else arguments, own)
    _, said = process.communicate(timeout=TIMEOUT_S)
    refused = done and command.refusal
    if process.returncode != (1 if refused else 0) or (refused and command.refusal not in said):
        case.faults.append(f"the last run ended with {process.returncode}: {said}")


def strange(command: Command, found: dict[str, str], undisturbed: Undisturbed) -> list[str]:
    """Return what a kill must not leave: files that are missing, or neither whole nor known to be unfinished."""
    before, end = undisturbed.before, undisturbed.end
    faults = [
        f"{name} is neither as it was, nor as it is at the end, nor known to be unfinished"
        for name, digest in found.items()
        if digest not in (before.get(name), end.get(name))
        and not any(fnmatch(name, pattern) for pattern in command.unfinished)
    ]
    faults += [f"{name} is gone" for name in before.keys() & end.keys() if name not in found]
    versions = [name for name in found if re.search(r"/[0-9]+$", name) and ".staging-" not in name]
    faults += [
        f"{version} lacks {name}"
        for version in versions
        for name in before.keys() | end.keys()
        if name.startswith(f"{version}/") and name not in found
    ]
    return sorted(faults)


def differences(found: dict[str, str], end: dict[str, str]) -> list[str]:
    """Return how a folder differs from that of an undisturbed run."""
    faults = [f"{name} is left for good" for name in found.keys() - end.keys()]
    faults += [f"{name} is missing" for name in end.keys() - found.keys()]
    faults += [
        f"{name} is another than that of an undisturbed run"
        for name in found.keys() & end.keys()
        if found[name] != end[name]
    ]
    return sorted(faults)


def strays(folder: Path, started: Sequence[int]) -> list[str]:
    """Return the processes and shared memory that outlive a case.

    A server whose parent was killed has ``ENDING_S`` to end.

    Args:
        started: ids of the processes that were killed.
    """
    deadline = time.monotonic() + ENDING_S
    while True:
        processes = [f"process {process.pid} lives on: {process.name()}" for process in _processes(folder)]
        regions = [region for pid in started for region in SHARED_MEMORY.glob(f"clipweld-{pid}-*")]
        left = processes + [f"shared memory {region.name} is left for good" for region in regions]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)


def _processes(folder: Path) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("TMPDIR") == str(folder / "tmp") and process.status() != psutil.STATUS_ZOMBIE:
                yield process


def content(folder: Path) -> dict[str, str]:
    """Return SHA-256 hashes of all files by path, where JSON is hashed without times; for folders the hash is ""."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            found[name] = ""
            continue
        with suppress(FileNotFoundError):  # a server that is about to end removes files
            raw = path.read_bytes()
            if path.suffix == ".csv":
                raw = SCORE.sub(_rounded, raw)
            if path.suffix == ".json":
                with suppress(ValueError):
                    raw = json.dumps(_timeless(json.loads(raw))).encode()
            found[name] = hashlib.sha256(raw).hexdigest()
    return found


def _rounded(score: re.Match[bytes]) -> bytes:
    return f"{float(score[0]):.{DECIMALS}f}".encode()


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _timeless(inner) for name, inner in value.items() if name not in OF_THE_RUN}
    return [_timeless(inner) for inner in value] if isinstance(value, list) else value


def _fresh(command: Command, folder: Path) -> None:
    if not command.shared:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tmp").mkdir(exist_ok=True)
    command.prepare(folder)


def _start(arguments: Sequence[str], folder: Path) -> subprocess.Popen:
    """Start a command as the leader of a new process group, with its stderr piped."""
    return subprocess.Popen(
        [sys.executable, *(argument.replace("{folder}", str(folder)) for argument in arguments)],
        env=environment(folder),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _wait_for_change(folder: Path, process: subprocess.Popen) -> None:
    """Wait until a command changes something on the disk, or ends."""
    before = _glance(folder)
    while process.poll() is None and _glance(folder) == before:
        time.sleep(POLL_S)


def _glance(folder: Path) -> list[tuple[str, int]]:
    found = []
    for root, _, names in os.walk(folder):
        with suppress(FileNotFoundError):
            found += [(path, os.stat(path).st_mtime_ns) for path in (root, *(os.path.join(root, n) for n in names))]
    return found


if __name__ == "__main__":
    command_line.run(main)
