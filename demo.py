"""The main job, end to end, on the small CLIP that ships: learn three tasks, merge, serve, ask, compare speeds.

Runs the very commands a user would type, and keeps everything below ``runs/demo``.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

RUN = Path("runs/demo")
TASKS = ("digits", "fashion", "flags")
KEPT = ("emoji", "clipart")
BENCH_REQUESTS = 500
console = Console()


def main() -> None:
    """Learn, merge, serve and ask; then say what came out of it."""
    started = time.perf_counter()
    shutil.rmtree(RUN, ignore_errors=True)
    run(f"trainer sequence --model mini --tasks {' '.join(TASKS)} --watch {' '.join(KEPT)} --out {RUN}")
    run(f"exporter merge --to onnx --model mini --adapters {RUN}/adapters --repository {RUN}/model_repository")
    run(f"exporter serve --repository {RUN}/model_repository --port 0 -- python demo.py ask")
    summary = summarise(time.perf_counter() - started)
    (RUN / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    show(summary)


def run(command: str) -> None:
    """Show a command and run it; its failure is ours. The commands installed beside this Python come first."""
    console.print(f"\n[bold]$ {command}", soft_wrap=True, highlight=False)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(shlex.split(command), env={**os.environ, "PATH": path}, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def ask() -> None:
    """Runs beside the server: send every test image through the client, then compare base and merged."""
    from clipweld.client import ZeroShotClassifier
    from clipweld.trainer.tasks import load_task

    served = {}
    with ZeroShotClassifier(os.environ["CLIPWELD_URL"]) as classifier:
        for name in TASKS:
            task = load_task(name)
            images, labels = zip(*task.load("test"), strict=True)
            answers = classifier.classify(images, task=name, top_k=1)
            right = sum(a.best.label == task.class_names[y] for a, y in zip(answers, labels, strict=True))
            served[name] = round(100 * right / len(labels), 2)
            console.print(f"asked the server about {len(labels):,} images of {name}: {served[name]:.1f}% right")
    bench = subprocess.run(
        ["client", "bench", "--versions", "1,2", "--requests", str(BENCH_REQUESTS), "--json"],
        stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    answers = {"served": served, "bench": json.loads(bench.stdout)}
    (RUN / "served.json").write_text(json.dumps(answers, indent=2) + "\n", encoding="utf-8")


def summarise(seconds: float) -> dict:
    """What the run showed; accuracies in percent."""
    learned = json.loads((RUN / "sequence.json").read_text(encoding="utf-8"))["results"]["task"]
    answers = json.loads((RUN / "served.json").read_text(encoding="utf-8"))
    before = dict(zip(learned["tested"], learned["zero_shot"], strict=True))
    after = dict(zip(learned["tested"], learned["matrix"][-1], strict=True))
    return {
        "tasks": list(TASKS),
        "zero_shot": {name: before[name] for name in TASKS},
        "after": {name: after[name] for name in TASKS},
        "served": answers["served"],
        "kept": {name: {"before": before[name], "after": after[name]} for name in KEPT},
        "transfer": learned["transfer"],
        "average": learned["average"],
        "last": learned["last"],
        "overhead_ratio": round(answers["bench"]["ratio_p50"], 4),
        "trainable_parameters": learned["trainable_parameters"],
        "seconds": round(seconds, 1),
    }


def show(summary: dict) -> None:
    """The one table, and what to type next."""
    table = Table("task", title="Right answers on test images, %", caption_justify="left")
    for column in ("zero-shot", "after learning", "answered by the server"):
        table.add_column(column, justify="right")
    for name in summary["tasks"]:
        table.add_row(name, *(f"{summary[key][name]:.1f}" for key in ("zero_shot", "after", "served")))
    table.add_section()
    for name, accuracy in summary["kept"].items():
        table.add_row(f"{name}, not learned", f"{accuracy['before']:.1f}", f"{accuracy['after']:.1f}", "")
    console.print()
    console.print(table)
    console.print(
        f"Overhead: the merged model takes {summary['overhead_ratio']:.3f} times the time of the base "
        f"(median over {BENCH_REQUESTS} pairs of requests).\n"
        f"{summary['trainable_parameters']:,} numbers trained a task; {summary['seconds']:.0f} s in all. "
        f"Everything is in {RUN}.\n\n"
        "Next, on images of your own (FOLDER/train/CLASS/*, FOLDER/test/CLASS/*):\n"
        "  source .venv/bin/activate\n"
        "  trainer fit --model mini --task FOLDER\n"
        "  exporter merge --to onnx --model mini\n"
        "  exporter serve -- client classify IMAGE --task NAME   (NAME: the folder's own)\n"
        "and with the real CLIP, where its weights can be downloaded: leave out --model mini.",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    ask() if sys.argv[1:] == ["ask"] else main()
