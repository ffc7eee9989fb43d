"""Measure the time and peak memory of ``exporter merge``, with and without a parent version to build on.

Run: python -m evidence.studies.release --out runs/release.json
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console
from rich.table import Table

from clipweld.trainer.adapters.adapter import Adapter, save_adapter
from clipweld.trainer.adapters.merge import STACKED
from clipweld.trainer.base.backbone import Backbone, load_backbone
from evidence import command_line
from evidence.command_line import POSITIVE

EXPERTS = 4  # experts per layer that a task keeps with the published settings


def main(
    *,
    model: Annotated[str, Parameter(help="open_clip's name of the model.")] = "ViT-B-16",
    pretrained: Annotated[str, Parameter(help="Its weights; cost doesn't depend on them.")] = "random",
    tasks: Annotated[
        int, Parameter(validator=Number(gte=2), help="Number of adapters, with random experts on every layer.")
    ] = 11,
    experts: Annotated[int, Parameter(validator=POSITIVE, help="Experts per layer in each adapter.")] = EXPERTS,
    out: Annotated[Path, Parameter(help="JSON file for the figures.")] = Path("runs/release.json"),
) -> None:
    """Time three merges: all adapters but the last into a new repository, all onto that, and all without a parent."""
    figures = {"model": model, "tasks": tasks, "experts": experts, "merges": {}}
    with tempfile.TemporaryDirectory(prefix="clipweld-release-") as folder:
        adapters, repository = Path(folder) / "adapters", Path(folder) / "model_repository"
        write_adapters(load_backbone(model, pretrained), tasks, experts, adapters)
        last = max(adapters.iterdir())
        resting = last.rename(Path(folder) / last.name)
        command = ["--model", model, "--pretrained", pretrained, "--adapters", adapters, "--repository", repository]
        rows = figures["merges"]
        rows[f"{tasks - 1} adapters, a new repository: base and version 2"] = _merge(command)
        resting.rename(last)
        rows[f"{tasks} adapters, on version 2"] = _merge(command)
        store = repository.with_name(f"{repository.name}.store") / "clip"
        built = {part: (store / "3" / part / "model.onnx").read_bytes() for part in ("image", "text", "card")}
        for version in ("2", "3"):
            shutil.rmtree(store / version)
        shutil.rmtree(repository)
        rows[f"{tasks} adapters, all merged anew"] = _merge(command)
        figures["same_bytes"] = all(
            (store / "2" / part / "model.onnx").read_bytes() == built[part] for part in ("image", "text")
        )
    table = Table("merge", "seconds", "peak GB", title=f"{model}, {tasks} adapters of {experts} experts a layer")
    for name, row in rows.items():
        table.add_row(name, f"{row['seconds']:.1f}", f"{row['peak_bytes'] / 1e9:.2f}")
    Console().print(table)
    same = "the same bytes" if figures["same_bytes"] else "OTHER BYTES"
    print(f"On a parent version and anew: {same}")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def write_adapters(backbone: Backbone, tasks: int, experts: int, folder: Path, spread: float = 0.01) -> None:
    """Write the adapter files of one lineage, with random experts on every layer of both towers.

    Args:
        tasks: number of adapters.
        experts: experts per layer in each adapter.
        spread: standard deviation of the entries of ``lora_A`` and ``lora_B``.
    """
    shapes = {}
    for name, weight in backbone.model.state_dict().items():
        block, _, _ = name.rpartition(".attn.in_proj_weight")
        if block:
            shapes |= {f"{block}.attn.{layer}": (weight.shape[0] // 3, weight.shape[1]) for layer in STACKED}
        elif name.endswith(("attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")):
            shapes[name.removesuffix(".weight")] = tuple(weight.shape)
    random, parents = torch.Generator().manual_seed(0), ()
    for number in range(tasks):
        tensors = {}
        for module, (d_out, d_in) in shapes.items():
            tensors[f"{module}.lora_A"] = torch.randn(experts, d_in, generator=random) * spread
            tensors[f"{module}.lora_B"] = torch.randn(d_out, experts, generator=random) * spread
        adapter = Adapter(
            task=f"task{number:02}",
            class_names=("cat", "dog"),
            templates=("a photo of a {}",),
            model_name=backbone.model_name,
            pretrained=backbone.pretrained,
            base_fingerprint=backbone.fingerprint,
            parents=parents,
            scaling=1.0,
            seed=0,
            accuracy={"before": {}, "after": {}},
            config={},
            activation_counts={},
            tensors=tensors,
        )
        save_adapter(adapter, folder / f"{adapter.task}.safetensors")
        parents = (*parents, adapter.sha256)


def _merge(arguments: list[str | Path]) -> dict[str, float]:
    """Run ``exporter merge`` in a process of its own, and return its seconds and peak memory."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "clipweld.exporter", "merge", "--to", "onnx", "--json", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    with process.stdout:
        answer = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(process.returncode)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "of_which_release": json.loads(answer)["seconds"], "peak_bytes": usage.ru_maxrss * 1024}


if __name__ == "__main__":
    command_line.run(main)
