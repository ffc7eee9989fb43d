"""The adapter file, which holds one learned task.

It is a safetensors file. Its tensors are float32 and named by open_clip's module paths: ``<module>.lora_A``
(k_merge, d_in) and ``<module>.lora_B`` (d_out, k_merge) of the experts to merge, and ``<module>.inputs``.
The metadata entry ``clipweld`` holds JSON: all other fields of ``Adapter``, and the SHA-256 over both. Adapters are
content-addressed, like commits: each names its parents, the hashes of all adapters merged before it, in order.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import safetensors
import torch
from pydantic import AfterValidator, FailFast, Field, with_config
from torch import Tensor
from typing_extensions import TypedDict

from clipweld.trainer.adapters.folder import adapter_files, check_file, check_name
from clipweld.trainer.errors import AdapterCorrupt, AdapterError, BrokenChain, WrongBase
from clipweld.trainer.header import ENTRY, ForeignFile
from clipweld.trainer.schemas import STRICT, Count, Items, Percent, Setting, Sha256, Text, Texts, one_line, read_json
from clipweld.trainer.tensors import canonical, content_sha256, read_tensors, write_tensors
from clipweld.trainer.text import check_words, task_name

TENSOR = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*\.(lora_A|lora_B|inputs)")


When = Literal["before", "after", "before_classes", "after_classes"]
Distance = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


@with_config(STRICT)
class Moved(TypedDict):
    """How far things have moved that were not learned, and class names, which other tasks may share.

    Attributes:
        words_mean: by how much the logit of a common word fell against its own features before, mean over the words.
        words_p95: the same, 95th percentile.
        images_kl: KL divergence in nats of how words describe an image, before to after, mean over the task's images.
        names_mean: as ``words_mean``, over the task's class names.
    """

    words_mean: Distance
    words_p95: Distance
    images_kl: Distance
    names_mean: Distance


@with_config(STRICT)
class Coefficients(TypedDict):
    """The share of an update that is merged into each tower, from 0 to 1."""

    image: Share
    text: Share


@dataclass(frozen=True)
class Metadata:
    """The fields of an adapter besides its tensors; ``load_adapter`` accepts these types only.

    Attributes:
        base_fingerprint: SHA-256 of the base weights below the lineage (``Backbone.fingerprint``).
        parents: ``sha256`` of every adapter merged before this one, oldest first.
        scaling: factor of every expert, alpha / rank.
        accuracy: ``{"before": {task: percent}, "after": {task: percent}}`` on this and every earlier task, over images;
            in format 4 also ``before_classes`` and ``after_classes``, the means over classes.
        config: the resolved settings of the run.
        activation_counts: by layer, the votes for each expert of its pool in training, merged or not.
    """

    task: Annotated[str, AfterValidator(task_name)]
    class_names: Texts
    templates: Texts
    model_name: Text
    pretrained: Text
    base_fingerprint: Sha256
    parents: Annotated[tuple[Sha256, ...], FailFast()]
    scaling: Annotated[float, Field(gt=0)]
    seed: Count
    accuracy: dict[When, dict[Text, Percent]]
    config: dict[Text, Setting]
    activation_counts: dict[Text, Items[Count]]


@dataclass(frozen=True)
class Adapter(Metadata):
    """One learned task.

    Attributes:
        tensors: float32 ``<module>.lora_A (k_merge, d_in)`` and ``<module>.lora_B (d_out, k_merge)``, and
            ``<module>.inputs (directions, d_in)``, from which later tasks compute their drift loss
            (``method.drift``). Format 3 has inputs only if the task itself was trained with a drift loss.
        moved: how far things not learned have moved (``learning.movement``); None in format 3.
        coefficients: by tower, what was multiplied into ``lora_B`` after training (``learning.coefficients``); 1 in
            format 3.
    """

    tensors: dict[str, Tensor] = field(repr=False)
    moved: Moved | None = None
    coefficients: Coefficients = field(default_factory=lambda: Coefficients(image=1.0, text=1.0))

    def metadata(self) -> dict:
        """Return the format and all fields but the tensors, ready for JSON."""
        said = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "tensors"}
        if self.moved is None:
            del said["moved"], said["coefficients"]
            return {"format": 3, **said}
        return {"format": 4, **said}

    @cached_property
    def sha256(self) -> str:
        """SHA-256 over metadata and tensors: the adapter's identity."""
        return content_sha256(self.metadata(), self.tensors)

    def modules(self) -> list[str]:
        """Return the paths of the adapted layers, sorted."""
        return sorted(name.removesuffix(".lora_A") for name in self.tensors if name.endswith(".lora_A"))

    def experts(self, module: str) -> tuple[Tensor, Tensor]:
        """Return ``lora_A (k_merge, d_in)`` and ``lora_B (d_out, k_merge)`` of one layer."""
        return self.tensors[f"{module}.lora_A"], self.tensors[f"{module}.lora_B"]

    @property
    def num_parameters(self) -> int:
        """Number of values in the tensors."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    def __str__(self) -> str:
        return f"{self.task}@{self.sha256[:8]}"


def save_adapter(adapter: Adapter, path: Path) -> None:
    """Write the adapter file atomically."""
    write_tensors(path, adapter.tensors, {ENTRY: _seal(adapter)})


def check_readable(adapter: Adapter) -> None:
    """Check that ``load_adapter`` will accept the metadata.

    Raises:
        AdapterError: the metadata is too large to be read again.
    """
    try:
        read_json(FORMATS, _seal(adapter))
    except ValueError as exc:
        raise AdapterError(
            f"task {adapter.task!r}: its adapter could not be read again ({exc}); take fewer or shorter class names, "
            "or a lower rank"
        ) from exc


@dataclass(frozen=True)
class SealedMetadata(Metadata):
    """The metadata of a file: with its format, and the hash over metadata and tensors."""

    __pydantic_config__: ClassVar[Any] = STRICT

    moved: Moved
    coefficients: Coefficients
    format: Literal[4]
    sha256: Sha256


@dataclass(frozen=True)
class SealedMetadata3(Metadata):
    """The same of format 3, which lacks the fields ``moved`` and ``coefficients``."""

    __pydantic_config__: ClassVar[Any] = STRICT

    format: Literal[3]
    sha256: Sha256


FORMATS: dict[int, type[SealedMetadata] | type[SealedMetadata3]] = {3: SealedMetadata3, 4: SealedMetadata}


def load_adapter(path: Path | str) -> Adapter:
    """Read an adapter and verify its integrity.

    Raises:
        AdapterError: there is no such file, or it can't be read.
        AdapterCorrupt: it is not clipweld's safetensors file, its content doesn't match its SHA-256, or it holds what
            no fit writes: wrong types, class names or templates that make no task, tensors that are not finite.
    """
    path = Path(path)
    check_file(path)
    try:
        text, tensors = read_tensors(path)
        sealed = read_json(FORMATS, text)
        check_words(sealed.class_names, sealed.templates)
        _check_tensors(tensors)
    except ForeignFile as exc:
        raise AdapterCorrupt(
            f"adapter {path}: a safetensors file, but not one of clipweld's ({exc}); move it elsewhere, or restore the "
            "adapter"
        ) from exc
    except PermissionError as exc:
        raise AdapterError(f"adapter {path}: can't be read ({exc.strerror}); make it readable") from exc
    except (safetensors.SafetensorError, OSError, ValueError) as exc:
        raise AdapterCorrupt(
            f"adapter {path}: truncated or not an adapter ({one_line(str(exc))}); restore it or fit the task again"
        ) from exc
    kind = Adapter if isinstance(sealed, SealedMetadata) else Metadata
    said = {f.name: getattr(sealed, f.name) for f in fields(kind) if f.name != "tensors"}
    adapter = Adapter(**said, tensors=tensors)
    if adapter.sha256 != sealed.sha256:
        raise AdapterCorrupt(
            f"adapter {path}: content does not match its own SHA-256 {sealed.sha256[:8]}; it was altered: "
            "restore it or fit the task again"
        )
    return adapter


def load_lineage(source: Path | str | Sequence[Path | str], base_fingerprint: str) -> list[Adapter]:
    """Load adapters in the order they were learned, and check that they are one chain on one base.

    Args:
        source: a folder of adapters (a missing or empty one is the empty lineage), or the files themselves.
        base_fingerprint: that of the base weights to merge into.

    Raises:
        AdapterError: two files are copies of one adapter, or a file has an adapter's name but is none.
        WrongBase: an adapter was trained on other weights than those of ``base_fingerprint``.
        BrokenChain: an adapter is missing, was replaced, or lacks layers of the others, or two have the same parents.
    """
    files = adapter_files(Path(source)) if isinstance(source, (str, Path)) else map(Path, source)
    loaded = sorted(
        ((load_adapter(path), path) for path in files), key=lambda pair: (len(pair[0].parents), pair[0].task)
    )
    adapters = [adapter for adapter, _ in loaded]
    for adapter in adapters:
        if adapter.base_fingerprint != base_fingerprint:
            raise WrongBase(
                f"adapter {adapter.task!r} was trained on {adapter.model_name} ({adapter.pretrained}), base "
                f"{adapter.base_fingerprint[:8]}; these weights are {base_fingerprint[:8]}: "
                "give the same --model and --pretrained"
            )
        if odd := sorted(set(adapter.modules()) ^ set(adapters[0].modules())):
            raise BrokenChain(
                f"adapter {adapter.task!r}: one of it and {adapters[0].task!r} has no experts on {odd[0]}, expected "
                "the same layers in both; fit the later task again"
            )
    _check_side_by_side(loaded)
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


def check_place(path: Path, task: str) -> None:
    """Check that saving a task's adapter to a path would not overwrite another task's.

    Raises:
        AdapterError: another task's adapter is there; names it.
    """
    if os.path.lexists(path):
        check_name(path, load_adapter(path).task, task)


def check_unchanged(folder: Path, lineage: Sequence[Adapter]) -> None:
    """Check that a folder still holds exactly the adapters that a task was learned on top of.

    Raises:
        BrokenChain: names the adapters that were added or removed.
    """
    there = {adapter.sha256: f"{path} came" for path in adapter_files(folder) for adapter in [load_adapter(path)]}
    before = {adapter.sha256: f"{adapter} went" for adapter in lineage}
    if changes := [change for sha, change in (there | before).items() if (sha in there) != (sha in before)]:
        raise BrokenChain(f"adapters folder {folder} changed while the task was learned: {', '.join(changes)}")


def _check_side_by_side(loaded: Sequence[tuple[Adapter, Path]]) -> None:
    """Refuse copies and branches.

    Raises:
        AdapterError: two files are copies of one adapter.
        BrokenChain: two adapters have the same parents.
    """
    places: dict[str, Path] = {}
    branches: dict[tuple[str, ...], tuple[Adapter, Path]] = {}
    for adapter, path in loaded:
        if adapter.sha256 in places:
            raise AdapterError(
                f"adapters {places[adapter.sha256]} and {path} are copies of one, task {adapter.task!r}; remove one"
            )
        places[adapter.sha256] = path
    for adapter, path in loaded:
        first, its_path = branches.setdefault(adapter.parents, (adapter, path))
        if first is not adapter:
            on = f"the same {len(adapter.parents)} adapters" if adapter.parents else "the base alone"
            raise BrokenChain(
                f"adapters {its_path} ({first}) and {path} ({adapter}) are two branches, each learned on top of {on}; "
                "a folder holds one chain: move one branch to a folder of its own, or fit it again on top of the other"
            )


def _check_tensors(tensors: dict[str, Tensor]) -> None:
    """Check names, dtypes and shapes of the tensors, and that all values are finite.

    Raises:
        ValueError: names the first fault.
    """
    for name, tensor in tensors.items():
        if not TENSOR.fullmatch(name):
            raise ValueError(f"tensor {name!r}: unknown; expected <module>.lora_A, lora_B or inputs")
        if tensor.dtype != torch.float32 or tensor.ndim != 2 or not tensor.numel():
            raise ValueError(f"tensor {name}: {tensor.dtype} {tuple(tensor.shape)}, expected a float32 matrix")
        if not all(map(math.isfinite, torch.stack(tensor.aminmax()).tolist())):
            raise ValueError(f"tensor {name}: has numbers that are not finite")
    for module in {name.rpartition(".")[0] for name in tensors}:
        lora_A, lora_B, inputs = (tensors.get(f"{module}.{part}") for part in ("lora_A", "lora_B", "inputs"))  # noqa: N806
        if lora_A is None or lora_B is None or lora_A.shape[0] != lora_B.shape[1]:
            raise ValueError(f"layer {module}: lora_A and lora_B must both be there, of one rank")
        if inputs is not None and inputs.shape[1] != lora_A.shape[1]:
            raise ValueError(f"layer {module}: inputs and lora_A must be of one width")


def _seal(adapter: Adapter) -> str:
    return canonical({**adapter.metadata(), "sha256": adapter.sha256})
