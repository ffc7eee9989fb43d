"""Compare clipweld with other libraries: the same CLIP, images and labels, in turn, on this machine's CPU.

Run: python -m evidence.benchmarks.compare --out runs/compare.json
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import numpy as np
from cyclopts import Parameter
from rich.console import Console
from rich.progress import track
from rich.table import Table

from evidence import command_line
from evidence.benchmarks.contenders import CONTENDERS, INFINITY_VARIABLE, Clipweld, Contender, OpenClip
from evidence.benchmarks.process import Failed, Worker, find_contender
from evidence.benchmarks.table import HEADINGS, rows
from evidence.command_line import POSITIVE

# Ratios are relative to OURS. The answers of REFERENCE count as correct: open_clip is the reference code for CLIP.
OURS, REFERENCE = Clipweld.title, OpenClip.title
TOLERANCE = 0.005  # in probability: noise of two grey levels changes one by 0.001, a mirrored image by 0.02
IDLE_S = 0.3  # torch's threads spin for 0.2 s after their work, and would take a core from the next contender
FASTER = {"pytorch": 1.0, "server": 1.5}  # the required margin: the other's time divided by clipweld's
console = Console(stderr=True)


def main(
    *,
    model: Annotated[list[str] | None, Parameter(help="open_clip's names. [default: ViT-B-32 ViT-B-16]")] = None,
    pretrained: Annotated[str, Parameter(help="Their weights; speed doesn't depend on them.")] = "random",
    batch_size: Annotated[
        list[int] | None, Parameter(validator=POSITIVE, help="Images per call. [default: 1 32]")
    ] = None,
    images: Annotated[int, Parameter(validator=POSITIVE, help="Number of images; a turn has at most 8 calls.")] = 32,
    rounds: Annotated[int, Parameter(validator=POSITIVE, help="Rounds; in each, every contender has a turn.")] = 7,
    starts: Annotated[
        int, Parameter(validator=POSITIVE, help="How often each contender is started; the median counts.")
    ] = 3,
    infinity: Annotated[Path | None, Parameter(help="Path of infinity_emb, if it is not on PATH.")] = None,
    also: Annotated[list[str] | None, Parameter(help="MODULE:CLASS: one more contender.")] = None,
    out: Annotated[Path, Parameter(help="JSON file for the figures.")] = Path("runs/compare.json"),
    as_json: Annotated[bool, Parameter(name="--json", help="Print the figures as JSON instead of tables.")] = False,
) -> None:
    """Time every contender that is installed; exit with status 1 if one fails or gives different answers."""
    if infinity:
        os.environ[INFINITY_VARIABLE] = str(infinity.resolve())
    sizes = sorted(set(batch_size or (1, 32)))  # ascending, because a process's peak memory never falls
    known = (*CONTENDERS, *map(find_contender, also or ()))
    missing = {contender.title: why for contender in known if (why := contender.missing())}
    here = [contender for contender in known if contender.title not in missing]
    figures = {"pretrained": pretrained, "images": images, "rounds": rounds, "starts": starts, "cores": os.cpu_count()}
    figures |= {"versions": _versions(), "missing": missing, "models": {}}
    for name in model or ("ViT-B-32", "ViT-B-16"):
        with tempfile.TemporaryDirectory(prefix="clipweld-compare-") as folder:
            console.print(f"{name}: exporting")
            _export(name, pretrained, images, Path(folder))
            figures["models"][name] = _compare(name, here, Path(folder), sizes, rounds, starts)
    figures["goals"] = _goals(figures["models"], here)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2)) if as_json else _show(figures)
    every = [c for measured in figures["models"].values() for c in measured.values()]
    if any("failed" in c or any("wrong" in batch for batch in c["batches"].values()) for c in every):
        raise SystemExit(1)


def _export(name: str, pretrained: str, images: int, folder: Path) -> None:
    """Write the model in every format, in a separate process, so that its memory is free for the contenders."""
    command = [sys.executable, "-m", "evidence.benchmarks.bundle", name, pretrained, str(images), str(folder)]
    if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
        raise SystemExit(1)


def _compare(
    name: str, contenders: list[type[Contender]], folder: Path, sizes: list[int], rounds: int, starts: int
) -> dict[str, dict]:
    """Start all contenders, let them take turns, and return the figures by title."""
    measured: dict[str, dict] = {}
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for contender in track(contenders, f"{name}: starting", console=console, transient=True):
            measured[contender.title] = row = {"kind": contender.kind, "start": None, "batches": {}}
            try:
                taken = []
                for left in reversed(range(starts)):
                    worker = Worker(contender, folder)
                    taken.append(worker.start)
                    if left:
                        worker.close()
                stack.callback(worker.close)
                workers[contender.title] = worker
                row["start"] = {key: _median([start[key] for start in taken]) for key in taken[0]}
            except Failed as exc:
                row["failed"] = str(exc)
        for size in sizes:
            for title, found in _take_turns(workers, size, rounds, f"{name}, batches of {size}").items():
                if "failed" in found:
                    measured[title] |= found
                else:
                    measured[title]["batches"][str(size)] = found
    return measured


def _take_turns(workers: dict[str, Worker], batch_size: int, rounds: int, title: str) -> dict[str, dict]:
    """Return the figures of all contenders, by title.

    A contender that gives different answers is not timed any further; one that fails is removed from ``workers``.
    """
    turns: dict[str, list[dict]] = {name: [] for name in workers}
    answers: dict[str, np.ndarray] = {}
    found: dict[str, dict] = {}
    # Round 0 is not timed: it compiles models, and its answers are compared before any timing.
    for number in track(range(rounds + 1), title, console=console, transient=True):
        for name in [name for name in workers if name not in found]:
            time.sleep(IDLE_S)
            try:
                turn = workers[name].take_turn(batch_size)
            except Failed as exc:
                found[name] = {"failed": str(exc)}
                continue
            answers[name] = np.array(turn.pop("probabilities"))
            if number:
                turns[name].append(turn)
        for name in [name for name in answers if name not in found and REFERENCE in answers]:
            if difference := find_difference(answers[name], answers[REFERENCE]):
                found[name] = {"wrong": difference}
    for name in [name for name, row in found.items() if "failed" in row]:
        workers.pop(name)
    sums = {name: [sum(turn["seconds"]) for turn in taken] for name, taken in turns.items() if name not in found}
    for name, seconds in sums.items():
        pairs = zip(seconds, sums.get(OURS, []), strict=False)
        calls = [second for turn in turns[name] for second in turn["seconds"]]
        found[name] = {
            "images_per_second": len(answers[name]) / statistics.median(seconds),
            "p50_seconds": statistics.median(calls),
            "ratio": statistics.median(theirs / ours for theirs, ours in pairs) if OURS in sums else None,
            "peak_bytes": turns[name][-1]["peak_bytes"],
            "server_peak_bytes": turns[name][-1]["server_peak_bytes"],
            "furthest_off": float(abs(answers[name] - answers[REFERENCE]).max()) if REFERENCE in answers else None,
            "calls_seconds": calls,
        }
    return found


def find_difference(found: np.ndarray, expected: np.ndarray) -> str | None:
    """Describe how two arrays of probabilities differ by more than ``TOLERANCE``; return None if they don't.

    Within the tolerance, the best label can differ only where two labels are nearly tied.

    Args:
        found, expected: (num_images, num_labels).
    """
    if found.shape != expected.shape:
        return f"answers of shape {found.shape}, expected {expected.shape}"
    off = abs(found - expected)
    if np.isfinite(off).all() and off.max() <= TOLERANCE:
        return None
    others = int((found.argmax(axis=1) != expected.argmax(axis=1)).sum())
    return f"another label on {others} of {len(found)} images, probabilities up to {off.max():.3f} off"


def _goals(models: dict[str, dict], contenders: list[type[Contender]]) -> list[dict]:
    """Return the required margin over each contender on this machine, and whether clipweld reached it."""
    rows = []
    for kind, factor in FASTER.items():
        for name, measured in models.items():
            for title in (c.title for c in contenders if c.kind == kind and c.title != OURS):
                for size, found in measured[title]["batches"].items():
                    if found.get("ratio"):
                        reached = found["ratio"] >= factor
                        asked = {"model": name, "batch_size": int(size), "than": title, "times": factor}
                        rows.append(asked | {"measured": found["ratio"], "reached": reached})
    return rows


def _show(figures: dict) -> None:
    terminal = Console()
    for name, measured in figures["models"].items():
        table = Table(*HEADINGS, title=f"{name} on {figures['cores']} CPU cores", caption_justify="left")
        for row in rows(measured):
            table.add_row(*row)
        table.caption = "first answer and memory of a server: of its client + its own. Ratios: medians over rounds."
        terminal.print(table)
    for title, why in figures["missing"].items():
        terminal.print(f"left out: {title}: {why}", highlight=False, soft_wrap=True)
    for goal in figures["goals"]:
        if not goal["reached"]:
            terminal.print(
                f"asked and not reached: {goal['model']}, batches of {goal['batch_size']}: {goal['than']} takes "
                f"{goal['measured']:.2f} times as long; more than {goal['times']:g} was asked",
                highlight=False,
                soft_wrap=True,
            )


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    known = {}
    for package in ("torch", "open_clip_torch", "transformers", "onnxruntime-gpu", "nvidia-pytriton"):
        try:
            known[package] = version(package)
        except PackageNotFoundError:
            continue
    return known


def _median(values: list[float | None]) -> float | None:
    return None if None in values else statistics.median(values)


if __name__ == "__main__":
    command_line.run(main)
