"""Compare the exported towers with other ways to run the same CLIP, in turn, on this machine.

Run: python -m evidence.studies.speed --out runs/speed.json
"""

from __future__ import annotations

import json
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import onnxruntime
import open_clip
import torch
import torch.nn.functional as F
from cyclopts import Parameter
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from clipweld.exporter.graph.onnx_file import to_bytes
from clipweld.exporter.graph.precision import quantize
from clipweld.exporter.graph.towers import ImageTower
from clipweld.exporter.graph.trace import fill, trace_image_tower, trace_text_tower
from clipweld.trainer.base.backbone import Backbone, load_backbone
from clipweld.trainer.base.cls_block import cut_to_longest
from evidence import command_line
from evidence.command_line import POSITIVE

Run = Callable[[], object]
OURS = "clipweld"
PROMPT = "a photo of a cat"
IDLE_S = 0.3  # torch's threads spin for 0.2 s after their work, and would take a core from the next run


class OpenClipText(nn.Module):
    """open_clip's ``encode_text`` with normalised features."""

    def __init__(self, model: open_clip.CLIP) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the features of tokens: int64 (batch, context_length) -> float32 (batch, embed_dim)."""
        return F.normalize(self.model.encode_text(tokens), dim=-1)


def main(
    *,
    model: Annotated[str, Parameter(help="open_clip's name of the model.")] = "ViT-B-16",
    pretrained: Annotated[str, Parameter(help="Its weights; speed doesn't depend on them.")] = "random",
    batch_size: Annotated[int, Parameter(validator=POSITIVE)] = 8,
    rounds: Annotated[int, Parameter(validator=POSITIVE, help="Rounds; in each, everything is timed once.")] = 9,
    also: Annotated[
        list[str] | None, Parameter(help="NAME=FILE: another ONNX file of the image tower, which takes float32 pixels.")
    ] = None,
    out: Annotated[Path, Parameter(help="JSON file for the figures.")] = Path("runs/speed.json"),
) -> None:
    """Time the exported towers (also in int8 or fp16), a plain torch.onnx.export, and open_clip eager and compiled."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    backbone = load_backbone(model, pretrained)
    others = {name: Path(file) for name, _, file in (given.partition("=") for given in also or ())}
    figures = {"model": model, "batch_size": batch_size, "rounds": rounds, "device": _device(), "towers": {}}
    for tower in ("image", "text"):
        with tempfile.TemporaryDirectory(prefix="clipweld-speed-") as folder:
            runs, files = _contenders(backbone, tower, batch_size, Path(folder), others if tower == "image" else {})
            rows = _time(runs, rounds)
            for name, file in files.items():
                rows[name]["bytes"] = file.stat().st_size
        figures["towers"][tower] = rows
        _show(f"{model}, {tower} tower, batches of {batch_size}, {_device()}", rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _contenders(
    backbone: Backbone, tower: str, batch_size: int, folder: Path, others: dict[str, Path]
) -> tuple[dict[str, Run], dict[str, Path]]:
    """Return everything that is timed by name, ours first, and the ONNX files of those that have one."""
    model = open_clip.create_model(backbone.model_name).requires_grad_(False).eval()
    model.load_state_dict(backbone.model.state_dict())
    if tower == "image":
        trace, module = trace_image_tower, ImageTower(model, backbone.mean, backbone.std).eval()
        shape = (batch_size, backbone.image_size, backbone.image_size, 3)
        inputs = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.manual_seed(0))
    else:
        trace, module = trace_text_tower, OpenClipText(model).eval()
        inputs = backbone.tokenizer([PROMPT] * batch_size)
    weights = backbone.model.state_dict()
    files = {OURS: folder / "ours.onnx"}
    files[OURS].write_bytes(to_bytes(fill(trace(backbone), weights)))
    if _device() == "cuda":
        files[f"{OURS}, fp16"] = folder / "half.onnx"
        files[f"{OURS}, fp16"].write_bytes(to_bytes(fill(trace(backbone, torch.float16), weights)))
    elif tower == "image":
        files[f"{OURS}, int8"] = folder / "int8.onnx"
        files[f"{OURS}, int8"].write_bytes(to_bytes(quantize(files[OURS])))
    files["torch.onnx.export"] = folder / "plain.onnx"
    torch.onnx.export(module, (inputs,), files["torch.onnx.export"], dynamo=True, verbose=False, external_data=False)
    files |= others
    runs = {name: _in_onnx_runtime(file, inputs, backbone) for name, file in files.items()}
    if tower == "text":
        runs[f"{OURS}, cut to the prompt"] = _in_onnx_runtime(files[OURS], cut_to_longest(inputs), backbone)
    module, inputs = module.to(_device()), inputs.to(_device())
    runs["open_clip, eager"] = _in_torch(module, inputs)
    runs["open_clip, compiled"] = _in_torch(torch.compile(module), inputs)
    return runs, files


def _in_onnx_runtime(file: Path, inputs: Tensor, backbone: Backbone) -> Run:
    """Return a function that runs an ONNX file on the inputs, converted to the type and layout that the file takes."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    provider = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}[_device()]
    session = onnxruntime.InferenceSession(str(file), options, providers=[provider])
    (wanted,) = session.get_inputs()
    array = inputs.numpy()
    if wanted.type == "tensor(float)":  # the file expects pixels that are already scaled to 0..1
        array = np.ascontiguousarray(array.transpose(0, 3, 1, 2), np.float32) / 255
    array = array.astype({"tensor(int32)": np.int32, "tensor(int64)": np.int64}.get(wanted.type, array.dtype))
    return lambda: session.run(None, {wanted.name: array})


def _in_torch(module: nn.Module, inputs: Tensor) -> Run:
    @torch.inference_mode()
    def run() -> np.ndarray:
        return module(inputs).cpu().numpy()

    return run


def _time(runs: dict[str, Run], rounds: int) -> dict[str, dict]:
    """Time all runs in turn; return median seconds and ratios to ours.

    A ratio compares two runs of the same round, so that changes of the machine's speed cancel out.
    """
    for run in runs.values():  # warm-up: compilation, and slow first answers
        run()
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            time.sleep(IDLE_S)
            run()
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    ours = seconds[OURS]
    return {
        name: {
            "seconds": statistics.median(taken),
            "ratio": statistics.median(theirs / own for theirs, own in zip(taken, ours, strict=True)),
        }
        for name, taken in seconds.items()
    }


def _show(title: str, rows: dict[str, dict]) -> None:
    table = Table("", "ms", "times as long", "MB", title=title)
    for name, row in rows.items():
        size = f"{row['bytes'] / 1e6:.0f}" if "bytes" in row else ""
        table.add_row(name, f"{1000 * row['seconds']:.1f}", f"{row['ratio']:.2f}", size)
    Console().print(table)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    command_line.run(main)
