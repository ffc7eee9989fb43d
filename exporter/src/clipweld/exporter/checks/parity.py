"""Compare ONNX Runtime with PyTorch on real images and prompts, and merged with base graphs node by node."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from onnx import ModelProto
from PIL import Image
from torch import Tensor

from clipweld.exporter.config import UNIT_TOLERANCE
from clipweld.exporter.errors import AnswersDiffer, GraphsDiffer, NotFinite
from clipweld.exporter.results import Parity
from clipweld.trainer.base.backbone import Backbone

BATCHES = (1, 3, 8)
FEW = 4  # batches of each smaller size: errors there are systematic, so a few batches show them
MAX_ABS = 1e-4  # per component of unit vectors; float32 towers agree to about 1e-6
COSINE_MIN = 0.9999
# A different top-1 counts as agreement if PyTorch's scores of both labels differ by at most this: a tie.
TIE = 1e-5


@torch.no_grad()
def measure_parity(
    backbone: Backbone, image_file: Path, text_file: Path, images: Sequence[Image.Image], prompts: Sequence[str]
) -> Parity:
    """Compare two tower files with open_clip's own ``encode_image`` and ``encode_text``.

    Args:
        backbone: holds the weights that the files should hold.
        images: at least one; all in batches of 8, some in batches of 1 and 3.
        prompts: at least two; texts go to ONNX cut to the longest of their batch, to PyTorch in full.

    Raises:
        NotFinite: a feature is not a unit vector, or NaN; the message says which.
    """
    pixels = torch.stack([backbone.preprocess(image.convert("RGB")) for image in images])
    tokens = backbone.tokenizer(list(prompts))
    want_image = backbone.model.encode_image(pixels, normalize=True).numpy()
    want_text = backbone.model.encode_text(tokens, normalize=True).numpy()
    got_image = _run_batches(image_file, to_uint8(pixels, backbone.mean, backbone.std))
    got_text = _run_batches(text_file, tokens.to(torch.int32).numpy(), cut=True)
    for what, want, got in (("image", want_image, got_image), ("prompt", want_text, got_text)):
        check_unit(want, f"{what}s in PyTorch")
        for size, features in zip(BATCHES, got, strict=True):
            check_unit(features, f"{what}s in ONNX Runtime, in batches of {size}")
    pairs = [(want_image, got_image), (want_text, got_text)]
    scores = want_image @ want_text.T
    rows = np.arange(len(scores))
    best, chosen = scores.argmax(axis=1), (got_image[-1] @ got_text[-1].T).argmax(axis=1)
    return Parity(
        image_max_abs=max(float(np.abs(want_image[: len(got)] - got).max()) for got in got_image),
        text_max_abs=max(float(np.abs(want_text[: len(got)] - got).max()) for got in got_text),
        cosine_min=min(float((want[: len(got)] * got).sum(axis=1).min()) for want, gots in pairs for got in gots),
        top1_agreement=float((scores[rows, best] - scores[rows, chosen] <= TIE).mean()),
    )


def check_unit(features: np.ndarray, of: str) -> None:
    """Refuse features float32 (batch, embed_dim) that are not all of length one, or NaN.

    Args:
        of: what the rows are, for the message.

    Raises:
        NotFinite: names the first such row.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # refused below
        lengths = np.linalg.norm(features, axis=1)
        usable = np.abs(lengths - 1) <= UNIT_TOLERANCE  # false for NaN
    if not usable.all():
        row = int(np.flatnonzero(~usable)[0])
        raise NotFinite(
            f"features of {of}: expected length 1, got {lengths[row]:g} for number {row} of {len(features)}; "
            "merge with --precision fp32, or learn the task again with a lower --lr"
        )


def check_parity(parity: Parity, version: str) -> None:
    """Refuse a version whose answers are not PyTorch's.

    Raises:
        AnswersDiffer: says by how much.
    """
    # Written as a positive condition, so that NaN fails.
    if (
        parity.image_max_abs <= MAX_ABS
        and parity.text_max_abs <= MAX_ABS
        and parity.cosine_min >= COSINE_MIN
        and parity.top1_agreement == 1
    ):
        return
    raise AnswersDiffer(
        f"{version}: ONNX Runtime and PyTorch disagree: image {parity.image_max_abs:.1e} and text "
        f"{parity.text_max_abs:.1e} apart (allowed {MAX_ABS:.0e}), cosine {parity.cosine_min:.6f}, top-1 agreement "
        f"{parity.top1_agreement:.1%}; nothing was written: try another onnxruntime or torch"
    )


def check_cast(parity: Parity, recorded: Parity, version: str) -> None:
    """Refuse a version of lower precision that is further from PyTorch than when it was made.

    Twice as far is allowed: CPUs differ in how they round.

    Raises:
        AnswersDiffer: says by how much.
    """
    for tower in ("image_max_abs", "text_max_abs"):
        now, then = getattr(parity, tower), getattr(recorded, tower)
        if not now <= 2 * then + MAX_ABS:
            raise AnswersDiffer(
                f"{version}: {tower.partition('_')[0]} features are {now:.1e} from PyTorch, {then:.1e} when it was "
                "made; was that on another kind of CPU, or with another onnxruntime?"
            )


def check_same_graph(base: ModelProto, merged: ModelProto, tower: str) -> None:
    """Require that merged equals base node by node; only the values of weights may differ.

    Raises:
        GraphsDiffer: names the first difference.
    """
    for what, of in (
        ("IR version and opset", _versions),
        ("inputs", lambda m: [v.SerializeToString(deterministic=True) for v in m.graph.input]),
        ("outputs", lambda m: [v.SerializeToString(deterministic=True) for v in m.graph.output]),
        ("nodes", lambda m: [n.SerializeToString(deterministic=True) for n in m.graph.node]),
        ("weights' names, shapes and types", lambda m: [(t.name, *t.dims, t.data_type) for t in m.graph.initializer]),
    ):
        ours, theirs = of(merged), of(base)
        if ours != theirs:
            place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(theirs))
            raise GraphsDiffer(
                f"{tower}: merged and base differ in their {what}, {len(ours)} against {len(theirs)}, first at "
                f"{place}; was the base exported by another torch? merge into a new repository"
            )


def to_uint8(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Undo the normalisation: float (batch, 3, size, size) -> the uint8 (batch, size, size, 3) it came from."""
    scale, shift = (torch.tensor(v).view(1, -1, 1, 1) for v in (std, mean))
    return ((pixels * scale + shift) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def _versions(model: ModelProto) -> list:
    return [model.ir_version, *((o.domain, o.version) for o in model.opset_import)]


def _run_batches(file: Path, inputs: np.ndarray, *, cut: bool = False) -> list[np.ndarray]:
    """Run all rows in batches of the largest size, and a few batches of each smaller size."""
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    results = []
    for size in BATCHES:
        rows = []
        count = len(inputs) if size == max(BATCHES) else min(len(inputs), FEW * size)
        for start in range(0, count, size):
            # The last batch is padded with rows from the start, so that it has exactly this size.
            batch = np.take(inputs, range(start, start + size), axis=0, mode="wrap")
            if cut:
                batch = batch[:, : int(batch.argmax(axis=1).max()) + 1]
            rows.append(session.run(None, {name: batch})[0])
        results.append(np.concatenate(rows)[:count])
    return results
