"""The adapter file: what a task leaves behind.

A safetensors file. Tensors, float32, by open_clip module path: ``<module>.lora_A (k_merge, d_in)`` and
``<module>.lora_B (d_out, k_merge)``, only the experts that are merged, and maybe ``<module>.inputs``. One metadata
entry, ``clipweld``, holds JSON: all that ``Adapter`` carries besides the tensors, and the SHA-256 over both. Adapters
are content-addressed like commits: each names its parents, the hashes of every adapter merged before it, in order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from trainer.errors import AdapterCorrupt, AdapterError, BrokenChain, WrongBase
from trainer.files import write_tensors

FORMAT = 3


@dataclass(frozen=True)
class Adapter:
    """One learned task.

    Attributes:
        base_fingerprint: SHA-256 of the base weights that the lineage stands on (``Backbone.fingerprint``).
        parents: ``sha256`` of every adapter merged before this one, oldest first.
        scaling: factor of every expert, alpha / rank.
        accuracy: ``{"before": {task: percent}, "after": {task: percent}}`` on this and every earlier task.
        config: the resolved settings of the run.
        activation_counts: by layer, the votes that each expert of its pool got in training, kept ones or not.
        tensors: float32 ``<module>.lora_A (k_merge, d_in)`` and ``<module>.lora_B (d_out, k_merge)``; where later tasks
            shall keep off this one's inputs, ``<module>.inputs (directions, d_in)`` (``trainer.moments``).
    """

    task: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    model_name: str
    pretrained: str
    base_fingerprint: str
    parents: tuple[str, ...]
    scaling: float
    seed: int
    accuracy: dict[str, dict[str, float]]
    config: dict
    activation_counts: dict[str, list[int]]
    tensors: dict[str, Tensor] = field(repr=False)

    def metadata(self) -> dict:
        """All fields but the tensors, ready for JSON."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "tensors"}

    @cached_property
    def sha256(self) -> str:
        """Hash over metadata and tensors: the adapter's identity."""
        digest = hashlib.sha256(_canonical({"format": FORMAT, **self.metadata()}))
        for name in sorted(self.tensors):
            tensor = self.tensors[name]
            digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()

    def modules(self) -> list[str]:
        """Paths of the adapted layers, sorted."""
        return sorted(name.removesuffix(".lora_A") for name in self.tensors if name.endswith(".lora_A"))

    def experts(self, module: str) -> tuple[Tensor, Tensor]:
        """``lora_A (k_merge, d_in)`` and ``lora_B (d_out, k_merge)`` of one layer."""
        return self.tensors[f"{module}.lora_A"], self.tensors[f"{module}.lora_B"]

    @property
    def num_parameters(self) -> int:
        """How many numbers the task leaves behind."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    def __str__(self) -> str:
        return f"{self.task}@{self.sha256[:8]}"


def save_adapter(adapter: Adapter, path: Path) -> None:
    """Write the file whole or not at all."""
    metadata = _canonical({"format": FORMAT, **adapter.metadata(), "sha256": adapter.sha256}).decode()
    write_tensors(path, adapter.tensors, {"clipweld": metadata})


def load_adapter(path: Path | str) -> Adapter:
    """Read an adapter and prove it whole.

    Raises:
        AdapterCorrupt: not a safetensors file of ours, or one bit differs from what was written.
    """
    path = Path(path)
    if not path.is_file():
        raise AdapterError(f"adapter {path}: no such file; trainer fit writes adapters")
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {})["clipweld"])
        tensors = load_file(path)
        claimed, version = metadata.pop("sha256"), metadata.pop("format")
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise AdapterCorrupt(
            f"adapter {path}: truncated or not an adapter ({exc}); restore it or fit the task again"
        ) from exc
    if version != FORMAT:
        raise AdapterCorrupt(f"adapter {path}: format {version!r}, this clipweld reads format {FORMAT}")
    try:
        for name in ("class_names", "templates", "parents"):
            metadata[name] = tuple(metadata[name])
        adapter = Adapter(**metadata, tensors=tensors)
        whole = adapter.sha256 == claimed and _paired(tensors)
    except (KeyError, TypeError) as exc:
        raise AdapterCorrupt(
            f"adapter {path}: its metadata is incomplete ({exc}); restore it or fit the task again"
        ) from exc
    if not whole:
        raise AdapterCorrupt(
            f"adapter {path}: content does not match its own SHA-256 {str(claimed)[:8]}; it was altered: "
            "restore it or fit the task again"
        )
    return adapter


def load_lineage(source: Path | str | Sequence[Path | str], base_fingerprint: str) -> list[Adapter]:
    """Adapters in the order they were learned, proven to be one chain on one base.

    Args:
        source: a folder of ``*.safetensors`` (an absent or empty one is the empty lineage), or the files themselves.

    Raises:
        WrongBase: trained on other weights than ``base_fingerprint``.
        BrokenChain: one is missing, was replaced, or two were learned side by side.
    """
    if isinstance(source, (str, Path)):
        source = sorted(Path(source).glob("*.safetensors"))
    adapters = sorted((load_adapter(path) for path in source), key=lambda a: (len(a.parents), a.task))
    for adapter in adapters:
        if adapter.base_fingerprint != base_fingerprint:
            raise WrongBase(
                f"adapter {adapter.task!r} was trained on {adapter.model_name} ({adapter.pretrained}), base "
                f"{adapter.base_fingerprint[:8]}; these weights are {base_fingerprint[:8]}: "
                "give the same --model and --pretrained"
            )
    names = {adapter.sha256: str(adapter) for adapter in adapters}
    for place, adapter in enumerate(adapters):
        found = tuple(a.sha256 for a in adapters[:place])
        if adapter.parents != found:
            expected = " > ".join(names.get(sha, sha[:8]) for sha in adapter.parents) or "the base alone"
            raise BrokenChain(
                f"adapter {adapter.task!r} was trained on top of: {expected}; found before it: "
                f"{' > '.join(names[sha] for sha in found) or 'the base alone'}; restore the missing adapter, "
                "or fit the later tasks again"
            )
    return adapters


def _paired(tensors: dict[str, Tensor]) -> bool:
    """Every lora_A has its lora_B, of one rank, and its inputs at most, of one width; all float32; nothing else."""
    modules = {name.rpartition(".")[0] for name in tensors}
    needed = {f"{module}.{part}" for module in modules for part in ("lora_A", "lora_B")}
    allowed = needed | {f"{module}.inputs" for module in modules}
    if not needed <= set(tensors) <= allowed:
        return False
    if any(tensor.dtype != torch.float32 or tensor.ndim != 2 for tensor in tensors.values()):
        return False
    widths_match = all(
        tensor.shape[1] == tensors[f"{name.removesuffix('.inputs')}.lora_A"].shape[1]
        for name, tensor in tensors.items()
        if name.endswith(".inputs")
    )
    return widths_match and all(
        tensors[f"{module}.lora_A"].shape[0] == tensors[f"{module}.lora_B"].shape[1] for module in modules
    )


def _canonical(value: dict) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
