"""Run every command that writes on full, nearly full and read-only disks.

Each command runs on disks with no free space, with as much as it needs, and with amounts in between, in bytes and in
number of files, so that it fails at every place where it can. Then the disk is enlarged and the command runs again.

Run: python -m evidence.trust.disks --out runs/trust/disks.json
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import xml.etree.ElementTree
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import pyarrow.parquet
from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console
from rich.progress import track

from clipweld.client import ZeroShotClassifier
from clipweld.exporter.serving.admin import KEY_FILE
from clipweld.exporter.serving.triton import serve
from clipweld.trainer.tasks import load_task, sample
from evidence import command_line
from evidence.trust.record import Record

PAGE = 4096  # bytes; a tmpfs allocates whole pages
ROOM = 1 << 30
TIMEOUT_S = 600
FILLER = "filler"
ITERATIONS = 4
TASKS = ("digits", "fashion")
LABELS = "cat,dog,digit,letter"
# Fields that describe the run and not its result, so they may differ between two equal runs.
OF_THE_RUN = {"date", "seconds", "seconds_per_task", "probability", "score"}
HEAVY = (
    "torch",
    "onnxruntime",
    "open_clip",
    "lightning_fabric",
    "matplotlib.figure",
    "clipweld.trainer.learning.fit",
    "clipweld.trainer.report",
)

LEARN = ("--model", "mini", "--iterations", str(ITERATIONS), "--shots", "4", "--accelerator", "cpu")


@dataclass(frozen=True)
class Case:
    """A command and the disk that it writes to.

    Attributes:
        name: the command with its main arguments.
        command: module and arguments; ``{disk}``, ``{url}``, ``{images}`` and the names in ``TASKS`` are filled in.
        before: the initial content of the disk, a key of ``TEMPLATES``; None for an empty disk.
        kept: patterns of files that the command may leave or change when it fails: files to resume from, or the history
            of a version that was about to be served.
        serves: whether a server runs on the disk's model repository.
        temporary: whether temporary files are written to the disk too.
        slow: whether only a third of the sizes are tried, because each run takes minutes.
    """

    name: str
    command: tuple[str, ...]
    before: str | None = None
    kept: tuple[str, ...] = ()
    serves: bool = False
    temporary: bool = False
    slow: bool = False


@dataclass(frozen=True)
class Done:
    """The exit status of a command, and its output on stderr."""

    status: int
    said: str


def merge(to: str, *more: str) -> tuple[str, ...]:
    """Return an ``exporter merge`` of the adapters on the disk."""
    return ("exporter", "merge", "--to", to, "--model", "mini", "--adapters", "{disk}/adapters", *more)


def classify(name: str) -> Case:
    """Return a case of ``client classify`` that writes to a file of that name."""
    command = ("client", "classify", "{images}", "--labels", LABELS, "--url", "{url}", "--out", f"{{disk}}/{name}")
    return Case(f"client classify --out {name}", command, kept=(f"{name}.part",))


REPOSITORY = ("--repository", "{disk}/model_repository")
BENCH = ("client", "bench", "--versions", "1,2", "--requests", "2", "--url", "{url}")
CASES = (
    Case(
        "trainer fit",
        ("trainer", "fit", "--task", "{fashion}", *LEARN, "--adapters", "{disk}/adapters", "--resume"),
        before="adapters",
        kept=("adapters/.fashion.unfinished",),
    ),
    Case(
        "trainer sequence",
        ("trainer", "sequence", "--tasks", "{digits}", "{fashion}", *LEARN, "--out", "{disk}/run", "--resume"),
        kept=("run/adapters/*.safetensors", "run/progress.json", "run/unfinished.safetensors"),
    ),
    Case(
        "trainer sequence --method finetune",
        (
            *("trainer", "sequence", "--tasks", "{digits}", "{fashion}", "--method", "finetune", *LEARN),
            *("--out", "{disk}/run", "--resume"),
        ),
        kept=("run/weights/*.safetensors", "run/progress.json", "run/unfinished.safetensors"),
    ),
    Case("trainer report", ("trainer", "report", "{disk}/run"), before="run"),
    Case("trainer report, again", ("trainer", "report", "{disk}/run"), before="reported"),
    Case("exporter merge, the first", merge("onnx", *REPOSITORY), before="adapters", slow=True),
    Case("exporter merge", merge("onnx", *REPOSITORY), before="released"),
    Case(
        "exporter merge --precision int8",
        merge("onnx", *REPOSITORY, "--precision", "int8"),
        before="released",
        temporary=True,
    ),
    Case("exporter merge --unmerged", merge("onnx", *REPOSITORY, "--unmerged"), before="unmerged"),
    *(
        Case(f"exporter merge --to {to}", merge(to, "--out", f"{{disk}}/{out}"), before="adapters")
        for to, out in (("open_clip", "merged.safetensors"), ("transformers", "merged"), ("peft", "lora"))
    ),
    Case(
        "exporter promote",
        ("exporter", "promote", "3", *REPOSITORY, "--url", "{url}"),
        before="released",
        kept=("model_repository.store/clip/history.json",),
        serves=True,
    ),
    Case("exporter prune", ("exporter", "prune", "--keep", "1", *REPOSITORY), before="prunable"),
    *map(classify, ("answers.jsonl", "answers.csv", "answers.parquet")),
    Case("client bench --figure", (*BENCH, "--figure", "{disk}/overhead.svg"), before="figure"),
)
# Initial contents of disks: the content that each one builds on, and the commands that add to it.
MERGE = merge("onnx", *REPOSITORY)
TEMPLATES = {
    "adapters": (None, [("trainer", "fit", "--task", "{digits}", *LEARN, "--adapters", "{disk}/adapters")]),
    "released": ("adapters", [MERGE, MERGE]),
    "prunable": ("released", [MERGE, MERGE]),
    "unmerged": ("released", [(*MERGE, "--unmerged")]),
    "run": (None, [("trainer", "sequence", "--tasks", "{digits}", "{fashion}", *LEARN, "--out", "{disk}/run")]),
    "reported": ("run", [("trainer", "report", "{disk}/run")]),
    "figure": (None, [(*BENCH, "--figure", "{disk}/overhead.svg")]),
}
# Commands whose stdout goes to a full disk.
PRINTED = (
    ("trainer", "tasks"),
    ("trainer", "tasks", "--json"),
    ("trainer", "fit", "--task", "{fashion}", *LEARN, "--adapters", "{disk}/adapters", "--json"),
    ("trainer", "sequence", "--tasks", "{digits}", *LEARN, "--out", "{disk}/run", "--json"),
    ("trainer", "--help"),
    ("exporter", "versions", *REPOSITORY),
    ("exporter", "versions", *REPOSITORY, "--json"),
    ("exporter", "verify", *REPOSITORY),
    ("exporter", "prune", *REPOSITORY, "--keep", "1", "--json"),
    ("exporter", "promote", "3", *REPOSITORY),
    ("exporter", "--help"),
    ("client", "classify", "{images}", "--labels", LABELS, "--url", "{url}"),
    ("client", "classify", "{images}", "--labels", LABELS, "--url", "{url}", "--json"),
    ("client", "tasks", "--url", "{url}"),
    ("client", "versions", "--url", "{url}", "--json"),
    (*BENCH, "--json"),
    ("client", "--help"),
)


def main(
    *,
    levels: Annotated[
        int, Parameter(validator=Number(gte=2), help="Disk sizes to try per command, in bytes and in files.")
    ] = 25,
    only: Annotated[str, Parameter(help="Run only cases whose name contains this.")] = "",
    out: Annotated[Path, Parameter(help="JSON file for the figures.")] = Path("runs/trust/disks.json"),
) -> None:
    """Run every command on full, nearly full and read-only disks, and once more after space was made."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with Record(out) as record, tempfile.TemporaryDirectory(prefix="clipweld-disks-") as folder:
        try:
            with mounted(Path(folder) / "disk"):
                pass
        except PermissionError as exc:
            print(f"disks: {exc}", file=sys.stderr)
            raise SystemExit(2) from exc
        with Rig(Path(folder), record) as rig:
            cases = [case for case in CASES if only in case.name]
            for case in cases:
                record.figures[case.name] = rig.sweep(case, levels)
            record.figures["printing"] = rig.print_all([one for one in PRINTED if only in " ".join(one)])
            record.figures["runs"] = rig.runs


@contextmanager
def mounted(disk: Path) -> Iterator[Path]:
    """Mount an empty tmpfs of 1 GiB at a folder, and unmount it at the end.

    Raises:
        PermissionError: this process is not allowed to mount.
    """
    disk.mkdir(exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", disk], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise PermissionError(f"no disk can be mounted here ({done.stderr.splitlines()[0]}); run as root")
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)


def remount(disk: Path, options: str) -> None:
    """Make a disk smaller, larger or read-only."""
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)


def used(disk: Path) -> dict[str, int]:
    """Return how much of a disk is used, in bytes ("size") and in files ("nr_inodes")."""
    now = os.statvfs(disk)
    return {"size": (now.f_blocks - now.f_bfree) * now.f_frsize, "nr_inodes": now.f_files - now.f_ffree}


def spread(needs: int, step: int, levels: int) -> list[int]:
    """Return amounts from 0 to ``needs`` in multiples of ``step``.

    If there are more than ``levels`` of them, about ``levels`` are chosen: half evenly spaced, half doubling.
    """
    top, half = -(-needs // step), (levels - 1) // 2
    if top < levels:
        return [step * amount for amount in range(top + 1)]
    even = (top * place // (levels - 1 - half) for place in range(levels - half))
    doubling = (min(top, 2**place) for place in range(half))
    return [step * amount for amount in sorted({*even, *doubling})]


class Rig:
    """Runs commands on small disks, and compares the files that they leave with those of an undisturbed run.

    Args:
        folder: an empty folder for the disks and their initial contents.
        record: where broken promises are reported.

    Attributes:
        runs: number of commands run on a limited or read-only disk, or once more after that.
    """

    def __init__(self, folder: Path, record: Record) -> None:
        self._folder, self._record = folder, record
        self._disk, self._images, self._templates = folder / "disk", folder / "images", folder / "templates"
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(HEAVY))
        self._stack = ExitStack()
        self.runs = 0
        self._images.mkdir()
        for number, image in enumerate(sample(12)[0]):
            image.save(self._images / f"{number:02}.png")
        for name in TASKS:
            write_task(name, folder / "tasks" / name)

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @cached_property
    def url(self) -> str:
        """URL of a server whose repository is not on a small disk."""
        return self._stack.enter_context(serve(self._template("released") / "model_repository")).url

    def sweep(self, case: Case, levels: int) -> dict:
        """Run a case undisturbed, then with each amount of free space, then on a read-only disk."""
        with self._laid(case) as url:
            begun = used(self._disk)
            with peak(self._disk) as most:
                done = self.run(case.command, url, case.temporary)
            if done.status:
                raise RuntimeError(f"{case.name}, undisturbed, failed: {done.said}")
            wanted = contents(self._disk, of_the_run=False)
        levels = max(2, levels // 3) if case.slow else levels
        ended: Counter[str] = Counter()
        enough = {}
        for what, step in {"size": PAGE, "nr_inodes": 1}.items():
            free = most[what] - begun[what]  # may be too little, since a short-lived file can escape `peak`
            while (end := self._disturbed(case, wanted, what, free)) == "refused" and free < ROOM:
                ended[end] += 1
                free = 2 * free + step
            enough[what] = free
            ended[end] += 1
            for less in track(spread(free, step, levels)[:-1], f"{case.name}: {what}", console=Console(stderr=True)):
                ended[self._disturbed(case, wanted, what, less)] += 1
        if self._disturbed(case, wanted, "ro", 0) != "refused":
            self._record.broken.append(f"{case.name} on a read-only disk: ended well, so nothing was tried")
        if not ended["came through"]:
            self._record.broken.append(f"{case.name}: no disk was large enough")
        if not ended["refused"] and case.name != "exporter prune":
            self._record.broken.append(f"{case.name}: no disk was too small, so nothing was tried")
        return {"bytes enough": enough["size"], "files enough": enough["nr_inodes"], "read-only": 1, **ended}

    def print_all(self, commands: Sequence[Sequence[str]]) -> int:
        """Run commands whose stdout goes to a full disk, and return how many there were."""
        for command in commands:
            program, *arguments = command
            script = [sys.executable, "-c", f"from clipweld.{program}.cli import main; main()"]
            with self._laid(Case("", tuple(command), "prunable")) as url, open("/dev/full", "w") as full:
                script += self._filled(arguments, url)
                done = subprocess.run(script, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
            self._check_said(f"{' '.join(command)} > /dev/full", Done(done.returncode, done.stderr), program, "")
            self.runs += 1
        return len(commands)

    def run(self, command: Sequence[str], url: str | None = None, temporary: bool = False) -> Done:
        """Run a command to its end, in a forked process that has already imported the heavy modules."""
        said = self._folder / "said"
        arguments = [command[0], *self._filled(command[1:], url)]
        process = self._context.Process(target=_main, args=(arguments, self._disk if temporary else None, said))
        process.start()
        process.join(TIMEOUT_S)
        if process.exitcode is None:
            process.kill()
            process.join()
        return Done(process.exitcode, said.read_text(encoding="utf-8"))

    def _disturbed(self, case: Case, wanted: dict[str, str], what: str, free: int) -> str:
        """Run a case on a limited or read-only disk, and again with enough space if that failed.

        Args:
            wanted: the ``contents`` that an undisturbed run leaves.
            what: "size" (bytes), "nr_inodes" (files) or "ro" (read-only).
            free: how much of it is free.

        Returns:
            How the first run ended: "came through" or "refused".
        """
        name = f"{case.name} on a read-only disk" if what == "ro" else f"{case.name} with {what} {free} free"
        broken = self._record.broken
        with self._laid(case) as url:
            before, versions = contents(self._disk), asked(url, self._images)
            remount(self._disk, "ro" if what == "ro" else f"{what}={used(self._disk)[what] + free}")
            done = self.run(case.command, url, case.temporary)
            self.runs += 1
            if done.status:
                self._check_said(name, done, case.command[0], str(self._disk))
                after = contents(self._disk)
                changed = sorted(
                    path
                    for path in before.keys() | after.keys()
                    if before.get(path) != after.get(path) and not any(fnmatch(path, kept) for kept in case.kept)
                )
                if changed:
                    broken.append(f"{name}: failed and left other files than before: {', '.join(changed)}")
                if asked(url, self._images) != versions:
                    broken.append(f"{name}: failed, and another version is served")
            elif contents(self._disk, of_the_run=False) != wanted:
                broken.append(f"{name}: ended well with {differing(wanted, contents(self._disk, of_the_run=False))}")
            remount(self._disk, f"rw,size={ROOM},nr_inodes={ROOM}")
            if done.status:
                again = self.run(case.command, url, case.temporary)
                self.runs += 1
                if again.status:
                    broken.append(f"{name}: with room made, the same command failed: {again.said[-500:]!r}")
                elif contents(self._disk, of_the_run=False) != wanted:
                    different = differing(wanted, contents(self._disk, of_the_run=False))
                    broken.append(f"{name}: with room made, it ended with {different}")
        return "refused" if done.status else "came through"

    def _check_said(self, name: str, done: Done, program: str, place: str) -> None:
        lines = [line for line in done.said.splitlines() if line.strip()]
        ours = [line for line in lines if line.startswith(f"{program}: ")]
        whole = done.status == 1 and len(ours) == 1 and lines[-1] == ours[0] and place in ours[0]
        if not whole or "Traceback" in done.said:
            self._record.broken.append(f"{name}: ended with {done.status} and said {done.said[-1500:]!r}")

    @contextmanager
    def _laid(self, case: Case) -> Iterator[str | None]:
        """Prepare the disk for a case, and yield the URL of the server that it uses, or None."""
        needs_server = any("{url}" in part for part in case.command)
        url = self.url if needs_server and not case.serves else None
        template = self._template(case.before) if case.before else None
        with mounted(self._disk), ExitStack() as stack:
            (self._disk / FILLER).write_bytes(b"\0" * PAGE)  # for tmpfs, size=0 means no limit
            if template:
                subprocess.run(["cp", "-a", f"{template}/.", self._disk], check=True)
            if case.serves:
                url = stack.enter_context(serve(self._disk / "model_repository")).url
            yield url

    def _template(self, name: str) -> Path:
        """Return a folder with an initial content, which the commands in ``TEMPLATES`` make on first use."""
        folder = self._templates / name
        if not folder.exists():
            parent, commands = TEMPLATES[name]
            beginning = self._template(parent) if parent else None
            needs_server = any("{url}" in part for command in commands for part in command)
            url = self.url if needs_server else None
            with mounted(self._disk):
                if beginning:
                    subprocess.run(["cp", "-a", f"{beginning}/.", self._disk], check=True)
                for command in commands:
                    if (done := self.run(command, url)).status:
                        raise RuntimeError(f"{' '.join(command)} failed: {done.said}")
                folder.mkdir(parents=True)
                subprocess.run(["cp", "-a", f"{self._disk}/.", folder], check=True)
        return folder

    def _filled(self, arguments: Sequence[str], url: str | None) -> list[str]:
        tasks = {name: self._folder / "tasks" / name for name in TASKS}
        places = {"disk": self._disk, "images": self._images, "url": url, **tasks}
        return [argument.format(**places) for argument in arguments]


def write_task(name: str, folder: Path) -> None:
    """Write a few images of a shipped task as a folder that commands accept as a task."""
    task = load_task(name)
    for split in ("train", "test"):
        images = task.load(split)
        for label, class_name in enumerate(task.class_names[:3]):
            of_class = folder / split / class_name
            of_class.mkdir(parents=True)
            for index in [index for index, found in enumerate(images.labels) if found == label][:4]:
                images[index][0].save(of_class / f"{index}.png")


def _main(arguments: Sequence[str], temporary: Path | None, said: Path) -> None:
    """Run a console script in this process. Training saves after every step, instead of every few seconds."""
    from clipweld.trainer.learning import checkpoint

    checkpoint.SAVE_EVERY_S = checkpoint.SHARE = 0
    tempfile.tempdir = temporary and str(temporary)
    with said.open("wb") as file, open(os.devnull, "wb") as nothing:
        os.dup2(file.fileno(), 2)
        os.dup2(nothing.fileno(), 1)
    sys.argv = list(arguments)
    import_module(f"clipweld.{arguments[0]}.cli").main()


@contextmanager
def peak(disk: Path) -> Iterator[dict[str, int]]:
    """Yield a dictionary that holds the peak of ``used`` while the block runs."""
    most, ended = used(disk), threading.Event()

    def watch() -> None:
        while not ended.is_set():
            for what, now in used(disk).items():
                most[what] = max(most[what], now)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield most
    finally:
        ended.set()
        watcher.join()


def asked(url: str | None, images: Path) -> int | None:
    """Return the version that a server answers with, or None without a server."""
    if url is None:
        return None
    with ZeroShotClassifier(url) as classifier:
        return next(iter(classifier.classify([min(images.iterdir())], labels=LABELS.split(",")))).version


def contents(disk: Path, *, of_the_run: bool = True) -> dict[str, str]:
    """Return the hashes of all files by path, together with the folders of the model repository.

    Args:
        of_the_run: whether to include fields that differ from run to run, such as dates.
    """
    found = {}
    for path in sorted(disk.rglob("*")):
        name = str(path.relative_to(disk))
        if path.is_dir():
            if name.startswith("model_repository/"):
                found[name] = "folder"
        elif path.name not in (FILLER, KEY_FILE):
            content = path.read_bytes() if of_the_run else lasting(path)
            found[name] = hashlib.sha256(content).hexdigest()
    return found


def lasting(path: Path) -> bytes:
    """Return the part of a file that is the same in two equal runs; a damaged file fails to parse."""
    if path.suffix == ".svg":
        return xml.etree.ElementTree.parse(path).getroot().tag.encode()
    if path.suffix == ".parquet":
        rows = pyarrow.parquet.read_table(io.BytesIO(path.read_bytes())).to_pylist()  # from a path, it stays open
    elif path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as lines:
            rows = list(csv.DictReader(lines))
    elif path.suffix == ".jsonl":
        rows = list(map(json.loads, path.read_text(encoding="utf-8").splitlines()))
    elif path.suffix == ".json":
        rows = json.loads(path.read_text(encoding="utf-8"))
    else:
        return path.read_bytes()
    return json.dumps(_without(rows)).encode()


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without(inner) for name, inner in value.items() if name not in OF_THE_RUN}
    return list(map(_without, value)) if isinstance(value, list) else value


def differing(wanted: dict[str, str], found: dict[str, str]) -> str:
    """Describe which files differ from those of an undisturbed run."""
    paths = sorted(path for path in wanted.keys() | found.keys() if wanted.get(path) != found.get(path))
    return f"other files than an undisturbed one: {', '.join(paths)}"


if __name__ == "__main__":
    command_line.run(main)
