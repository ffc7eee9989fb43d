"""Kill -9 at random moments of the real commands: what is left loads, verifies, and the next run cleans up.

Run: python -m exporter.studies.killed --points 50
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from exporter.studies.release import EXPERTS, write_adapters
from exporter.triton import serve
from trainer.backbone import load_backbone

EXPORTER = (sys.executable, "-m", "exporter")


def main(
    model: Annotated[str, typer.Option(help="open_clip's name of the model, or mini.")] = "mini",
    points: Annotated[int, typer.Option(min=2, help="Kills: half in merges, half in promotions.")] = 50,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("runs/killed.json"),
) -> None:
    """Kill merges, and promotions on a running server; then serve, verify, and run the same command to its end."""
    moments, kills = random.Random(seed), []
    with tempfile.TemporaryDirectory(prefix="clipweld-killed-") as folder:
        adapters, template = Path(folder) / "adapters", Path(folder) / "template"
        write_adapters(load_backbone(model), 2, EXPERTS, adapters)
        merge = ["merge", "--to", "onnx", "--model", model, "--adapters", adapters]
        for _ in range(2):  # versions 1 and 2 stand, 3 rests
            _run(*merge, "--repository", template / "model_repository")
        for number in track(range(points), "kills", console=Console(stderr=True)):
            copy = Path(folder) / "copy"
            shutil.copytree(template, copy, copy_function=os.link)
            repository = copy / "model_repository"
            if number % 2:
                kills.append({"command": "merge", **_kill([*merge, "--repository", repository], repository, moments)})
            else:
                with serve(repository) as server:
                    command = ["promote", 3, "--repository", repository, "--url", server.url]
                    kills.append({"command": "promote", **_kill(command, repository, moments)})
            shutil.rmtree(copy)
    counts = Counter((kill["command"], kill["found"]) for kill in kills)
    figures = [{"command": command, "found": found, "times": n} for (command, found), n in sorted(counts.items())]
    Console().print_json(data=figures)
    print(f"{len(kills)} kills: what was left loaded, was verified, and the next run came to its end and cleaned up")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"model": model, "seed": seed, "figures": figures, "kills": kills}, indent=2) + "\n")


def _kill(command: list[object], repository: Path, moments: random.Random) -> dict:
    """Run to the end once, to see how long it takes; undo that; then once more, killed on the way.

    Raises:
        RuntimeError: what was left is not whole.
    """
    began = time.perf_counter()
    _run(*command)
    took = time.perf_counter() - began
    if command[0] == "promote":
        _run("rollback", *command[2:])
    before = _tree(repository.parent)
    process = subprocess.Popen([*EXPORTER, *map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after_s = moments.uniform(0.4, 1) * took  # before that, Python is still importing
    time.sleep(after_s)
    ended = process.poll() is not None
    process.kill()
    process.wait()
    found = "the end" if ended else "changes on disk" if _tree(repository.parent) != before else "nothing changed yet"
    _run("verify", "--repository", repository)
    _run("serve", "--repository", repository, "--port", 0, "--", "true")
    _run(*command)
    _run("verify", "--repository", repository)
    left = {path.name for path in repository.parent.iterdir()} - {repository.name, f"{repository.name}.store"}
    if left:
        raise RuntimeError(f"{command[0]} killed after {after_s:.2f} s of {took:.2f}: {sorted(left)} is left for good")
    return {"after_s": round(after_s, 3), "of_s": round(took, 3), "found": found}


def _tree(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def _run(*arguments: object) -> None:
    done = subprocess.run([*EXPORTER, *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"exporter {' '.join(map(str, arguments))} failed: {done.stderr}")


if __name__ == "__main__":
    typer.run(main)
