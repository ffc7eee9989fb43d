"""Read damaged and hostile images with client and trainer, then pass some of them to the real commands.

Run: python -m evidence.trust.images --out runs/trust/images.json

Each file must either be refused by both packages, in one line that names it, or be read by both as the same pixels.
Undamaged files must be read, except 32-bit grey. Workers are separate processes: a file that makes one end, hang or use
too much memory is reported by its number and kept. Only damaged fax files may be read differently, and are counted
separately, because libtiff leaves undecoded rows as they were in memory.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil
import torch
from cyclopts import Parameter
from cyclopts.validators import Number
from open_clip.transform import PreprocessCfg
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from clipweld.client._images import preprocess
from clipweld.client.errors import BadImage
from clipweld.exporter.release.publish import release
from clipweld.exporter.serving.triton import serve
from clipweld.exporter.store.repository import Repository
from clipweld.trainer.base.backbone import load_backbone
from clipweld.trainer.errors import UnreadableImage
from clipweld.trainer.preprocessing import open_image, preprocessing
from clipweld.trainer.tasks import Images, sample
from evidence import command_line
from evidence.command_line import POSITIVE
from evidence.trust.image_damage import mutated
from evidence.trust.pictures import ENDINGS, LARGE, of_unknown_range, saved, seeds
from evidence.trust.record import Record

TIME_S = 60.0  # CPU time in which both packages must read one file; the largest files take a few seconds
HANG_S = 900.0  # without an answer for this long, a worker counts as hanging, even on a busy machine
MEMORY_BYTES = 2 << 30  # limit for one file at a time
VERDICTS = ("read", "refused", "unsteady")
CLIENT = (sys.executable, "-c", "from clipweld.client.cli import main; main()")
TRAINER = (sys.executable, "-m", "clipweld.trainer")


def main(
    *,
    files: Annotated[int, Parameter(validator=POSITIVE, help="Number of damaged files.")] = 10_000,
    commands: Annotated[
        int, Parameter(validator=Number(gte=2), help="How many of the files to pass to the commands.")
    ] = 300,
    workers: Annotated[int, Parameter(validator=POSITIVE, help="Number of processes.")] = os.cpu_count() or 1,
    seed: Annotated[int, Parameter(help="Seed of the damage.")] = 0,
    out: Annotated[
        Path, Parameter(help="JSON file for the figures; files that break a promise are kept beside it.")
    ] = Path("runs/trust/images.json"),
) -> None:
    """Read undamaged and damaged files with client and trainer, then pass some to the commands."""
    numbers = range(-len(LARGE) - len(seeds(sample(60)[0])), files)
    with Record(out) as record:
        record.figures["files"] = read_all(record, numbers, workers, seed, out.with_suffix(""))
        record.figures["commands"] = through_commands(record, commands, seed)


def read_all(record: Record, numbers: Iterable[int], workers: int, seed: int, kept: Path) -> dict:
    """Read all files by number, each in one of the workers, and return the figures.

    Args:
        kept: folder for the files for which a promise is broken.
    """
    todo, found, made = deque(numbers), [], seeds(sample(60)[0])
    with Progress(console=Console(stderr=True)) as progress, ThreadPoolExecutor(workers) as pool:
        bar = progress.add_task("files", total=len(todo))

        def employ(_: int) -> None:
            for row in _rows(todo, seed):
                found.append(row)
                progress.advance(bar)

        list(pool.map(employ, range(workers)))
    found.sort(key=lambda row: row["number"])
    for row in found:
        if -len(made) <= row["number"] < 0:
            expected = "refused" if of_unknown_range(made[-1 - row["number"]][1]) else "read"
            if row["verdict"] != expected:
                row["problems"].append(f"{row['verdict']}, though whole")
        for problem in row["problems"]:
            kind, how, data = file_of(row["number"], seed, made)
            kept.mkdir(parents=True, exist_ok=True)
            path = kept / f"{seed}-{row['number']}.{_ending(kind)}"
            path.write_bytes(data)
            record.broken.append(f"file {row['number']} of seed {seed} ({kind}, {how}; kept as {path}): {problem}")
    counts = Counter((row["kind"], row["verdict"]) for row in found)
    return {
        **{verdict: sum(row["verdict"] == verdict for row in found) for verdict in VERDICTS},
        "whole files read": sum(row["number"] < 0 and row["verdict"] == "read" for row in found),
        "by format": {
            kind: {verdict: counts[kind, verdict] for verdict in VERDICTS if counts[kind, verdict]}
            for kind in sorted({row["kind"] for row in found})
        },
        "refused because of": dict(Counter(row["cause"] for row in found if row["cause"]).most_common()),
        "slowest_s": round(max(row["seconds"] for row in found), 2),
        "most_memory_mb": round(max(row["memory"] for row in found) / 1e6),
    }


def _rows(todo: deque[int], seed: int) -> Iterator[dict]:
    """Yield the findings for each file; a worker that ends or hangs is replaced."""
    spawn = multiprocessing.get_context("spawn")
    while todo:
        ours, theirs = spawn.Pipe()
        worker = spawn.Process(target=_work, args=(theirs, seed), daemon=True)
        worker.start()
        theirs.close()
        ours.recv()  # wait until it has imported everything
        try:
            while todo:
                row = {"number": todo.popleft(), "kind": "?", "verdict": "none", "cause": "", "seconds": 0, "memory": 0}
                ours.send(row["number"])
                if not ours.poll(HANG_S):
                    yield row | {"problems": [f"no answer within {HANG_S:.0f} s"]}
                    break
                try:
                    yield row | ours.recv()
                except EOFError:
                    worker.join()
                    yield row | {"problems": [f"the process ended, status {worker.exitcode}"]}
                    break
        finally:
            worker.kill()
            worker.join()
            ours.close()


def _work(parent: Connection, seed: int) -> None:
    """Run a worker: make and read the files whose numbers the parent sends, and send back the findings."""
    torch.set_num_threads(1)
    made = seeds(sample(60)[0])
    with tempfile.TemporaryDirectory(prefix="clipweld-images-") as folder:
        parent.send("ready")
        while True:
            try:
                number = parent.recv()
            except EOFError:
                return
            draw = random.Random(f"reading {seed}/{number}")
            kind, _, data = file_of(number, seed, made)
            path = Path(folder) / f"it.{_ending(kind)}"
            path.write_bytes(data)
            del data
            parent.send({"kind": kind, **judge(path, draw, whole=number < 0)})


def file_of(number: int, seed: int, made: list[tuple[str, bytes]]) -> tuple[str, str, bytes]:
    """Return the format, the changes and the bytes of a file by its number.

    Files with negative numbers are undamaged; those with the lowest numbers are large.
    """
    if number >= 0:
        return mutated(made, random.Random(f"{seed}/{number}"))
    place = -1 - number
    if place < len(made):
        return made[place][0], "whole", made[place][1]
    kind, mode, size, settings = LARGE[place - len(made)]
    return kind, f"{mode} {size[0]} x {size[1]}", saved(Image.new(mode, size), kind, **settings)


def judge(path: Path, draw: random.Random, *, whole: bool = False) -> dict:
    """Read one file with client and trainer, with preprocessing settings drawn at random, and return the findings."""
    config = PreprocessCfg(
        size=draw.choice((64, 224, 336)),
        resize_mode=draw.choice(("shortest", "squash")),
        interpolation=draw.choice(("bicubic", "bilinear")),
    )
    transform = preprocessing(config)
    settings = {"size": config.size, "resize_mode": config.resize_mode, "interpolation": config.interpolation}
    images = Images([0], open=lambda index: open_image(path), name_of=lambda index: str(path))
    before = _restart_peak()
    began = time.process_time()
    problems, answers, causes = [], [], []
    with warnings.catch_warnings():
        warnings.simplefilter(draw.choice(("error", "ignore")))
        for room, read, refusal in (
            ("client", lambda: preprocess(path, str(path), **settings), BadImage),
            ("trainer", lambda: images.pixels(0, transform), UnreadableImage),
        ):
            try:
                answers.append(read())
            except refusal as exc:
                answers.append(None)
                causes.append(type(exc.__cause__).__name__ if exc.__cause__ else "limits")
                if "\n" in str(exc) or str(path) not in str(exc):
                    problems.append(f"{room}: not one line that names the file: {exc}")
                if isinstance(exc.__cause__, MemoryError):
                    problems.append(f"{room}: ran out of memory")
            except BaseException as exc:  # any other error is a broken promise
                answers.append(None)
                problems.append(f"{room}: {type(exc).__name__}: {exc}")
    seconds, memory = time.process_time() - began, _peak() - before
    verdict = "refused" if answers[0] is None else "read"
    if found := _disagreements(*answers, config.size, transform):
        if not whole and _is_fax(path):
            verdict = "unsteady"
        else:
            problems += found
    if seconds > TIME_S:
        problems.append(f"took {seconds:.0f} s")
    if memory > MEMORY_BYTES:
        problems.append(f"took {memory / 1e6:,.0f} MB")
    return {
        "verdict": verdict,
        "cause": causes[0] if causes else "",
        "seconds": seconds,
        "memory": memory,
        "problems": problems,
    }


def _disagreements(ours: np.ndarray | None, theirs: torch.Tensor | None, size: int, transform) -> list[str]:
    """Return how the client's and the trainer's pixels disagree, if they do."""
    if ours is None or theirs is None:
        both = ours is None and theirs is None
        return [] if both else [f"refused by the {'client' if ours is None else 'trainer'} alone"]
    if ours.dtype != np.uint8 or ours.shape != (size, size, 3):
        return [f"client: {ours.dtype} {ours.shape}"]
    if theirs.dtype != torch.float32 or theirs.shape != (3, size, size) or not theirs.isfinite().all():
        return [f"trainer: {theirs.dtype} {tuple(theirs.shape)}, finite: {bool(theirs.isfinite().all())}"]
    *_, to_tensor, normalize = transform.transforms
    return [] if torch.equal(normalize(to_tensor(ours)), theirs) else ["client and trainer read other pixels"]


def _is_fax(path: Path) -> bool:
    """Return whether it is a TIFF with fax compression; if damaged, libtiff leaves rows as they were in memory."""
    with Image.open(path) as image:
        return image.info.get("compression") in ("group3", "group4", "tiff_ccitt")


def _restart_peak() -> int:
    """Reset the peak memory of this process (proc(5), clear_refs), and return the bytes in use."""
    Path("/proc/self/clear_refs").write_text("5")
    return psutil.Process().memory_info().rss


def _peak() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def through_commands(record: Record, files: int, seed: int) -> dict:
    """Pass some of the files to ``client classify`` as a folder and to ``trainer fit`` as a task."""
    mini = load_backbone("mini")
    settings = {"size": mini.image_size, "resize_mode": mini.resize_mode, "interpolation": mini.interpolation}
    made = seeds(sample(60)[0])
    with tempfile.TemporaryDirectory(prefix="clipweld-images-") as name:
        folder, bad = Path(name), set()
        for number in range(files):  # all are named .jpg, because torchvision ignores some other endings
            split = ("train", "test")[number % 2]
            path = folder / "task" / split / f"class {number // 2 % 2}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file_of(number, seed, made)[2])
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    preprocess(path, str(path), **settings)
            except BadImage:
                bad.add(str(path))
        figures = {"files": files, "unreadable": len(bad)}
        release(mini, [], Repository(folder / "models", "clip"), *sample(4))
        with serve(folder / "models") as server:
            _classified(record, folder, server.url, bad, files)
        _learned(record, folder, bad)
    return figures


def _classified(record: Record, folder: Path, url: str, bad: set[str], files: int) -> None:
    out = folder / "answers.jsonl"
    done = _run(CLIENT, "classify", folder / "task", "--labels", "a, b", "--url", url, "--out", out, "--json")
    if done.returncode:
        record.broken.append(f"client classify: status {done.returncode}, {done.stderr[-1000:]!r}")
        return
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    refused = {answer["image"] for answer in answers if answer.get("error")}
    if len(answers) != files or refused != bad:
        record.broken.append(f"client classify: {len(answers)} answers, other refusals at {sorted(refused ^ bad)[:5]}")
    if "Traceback" in done.stderr:
        record.broken.append(f"client classify: {done.stderr[-1000:]!r}")


def _learned(record: Record, folder: Path, bad: set[str]) -> None:
    fit = ("fit", "--model", "mini", "--task", folder / "task", "--adapters", folder / "adapters", "--shots", 0)
    fit = (*fit, "--iterations", 3, "--batch-size", 8)
    done = _run(TRAINER, *fit, "--skip-unreadable", "--json")
    told = [line for line in done.stderr.splitlines() if "skipped:" in line]
    skipped = {line.partition("skipped: image ")[2].partition(" can't be read")[0] for line in told}
    if done.returncode or skipped != bad:
        record.broken.append(
            f"trainer fit --skip-unreadable: status {done.returncode}, others skipped: {sorted(skipped ^ bad)[:5]}, "
            f"{done.stderr[-1000:]!r}"
        )
    done = _run(TRAINER, *fit, "--name", "again")
    said = [line for line in done.stderr.splitlines() if "can't be read" in line]
    if bad and (done.returncode != 1 or len(said) != 1 or "Traceback" in done.stderr):
        record.broken.append(f"trainer fit: status {done.returncode}, {done.stderr[-1000:]!r}")


def _run(*command: object) -> subprocess.CompletedProcess:
    words = [str(word) for part in command for word in (part if isinstance(part, tuple) else (part,))]
    return subprocess.run(words, capture_output=True, text=True, timeout=600, check=False)


def _ending(kind: str) -> str:
    return ENDINGS.get(kind, kind.lower())


if __name__ == "__main__":
    command_line.run(main)
