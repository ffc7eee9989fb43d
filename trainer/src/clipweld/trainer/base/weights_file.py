"""Checkpoint files from untrusted sources: they are read as tensors, and no code in them is run."""

from __future__ import annotations

import re
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import open_clip
import torch
from open_clip.pretrained import get_pretrained_url
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint

from clipweld.trainer.base.file_kinds import FETCH, OTHER, kind_of, refusal
from clipweld.trainer.header import check_header
from clipweld.trainer.schemas import one_line, sha256_of

# SHA-256 of OpenAI's own TorchScript archives, from their addresses.
OPENAI_SHA256 = frozenset(
    found[1]
    for model, tag in open_clip.list_pretrained()
    if (found := re.search(r"/([0-9a-f]{64})/[^/]+\.pt$", get_pretrained_url(model, tag)))
)
# Entries of OpenAI's own files that are not weights.
OPENAI_EXTRAS = ("input_resolution", "context_length", "vocab_size")
# Names under which training programs save a model's weights.
ENTRIES = ("state_dict", "model_state_dict", "model", "module")
# Parts that wrappers (torch.compile, DataParallel, FSDP) add to the names of tensors, and prefixes of outer modules, as
# in Lightning checkpoints.
WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
OUTER = ("model", "clip", "clip_model", "net")
SAVE = "where they were made, save them alone: torch.save(model.state_dict(), FILE)"


@dataclass(frozen=True)
class Weights:
    """The content of a checkpoint.

    Attributes:
        tensors: floating-point tensors by name, without the names of wrappers.
        from_openai: whether the file is OpenAI's own or has its layout, so that it was trained with QuickGELU.
        notes: what users should know about how the names were read.
    """

    tensors: dict[str, Tensor]
    from_openai: bool
    notes: tuple[str, ...]


def read_weights(file: Path) -> Weights:
    """Read a checkpoint without running code in it, and with no more memory than the file's own size.

    Raises:
        WeightsError: it holds more than tensors, or has another library's layout; names it and the next step.
    """
    kind = kind_of(file)
    state: object
    if kind == "torchscript":
        state = _read_torchscript(file)
    elif kind == "safetensors":
        state = _read_safetensors(file)
    else:
        state = _read_torch(file, zipped=kind == "zip")
    state, notes = _entry(file, state)
    from_openai = kind == "torchscript" or all(name in state for name in OPENAI_EXTRAS)
    tensors, wrappers = _unwrapped(file, {name: state[name] for name in state if name not in OPENAI_EXTRAS})
    _check_tensors(file, tensors)
    _check_layout(file, tensors)
    if wrappers:
        notes.append(f"names of its tensors are read without {', '.join(f'{name}.' for name in wrappers)}")
    return Weights(tensors, from_openai, tuple(notes))


def _read_torchscript(file: Path) -> dict[str, Tensor]:
    if sha256_of(file) not in OPENAI_SHA256:
        raise refusal(file, "a TorchScript archive is a program, and this is none of OpenAI's own", OTHER)
    with warnings.catch_warnings():
        for deprecated in (DeprecationWarning, FutureWarning):  # which of them depends on torch's version
            warnings.simplefilter("ignore", deprecated)  # there is no other way to read these files
        return dict(torch.jit.load(file, map_location="cpu").state_dict())


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        check_header(file)
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as exc:
        raise refusal(file, f"it is safetensors, cut off or corrupted ({one_line(str(exc))})", FETCH) from exc


def _read_torch(file: Path, *, zipped: bool) -> object:
    if zipped:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
        packed = any(entry.compress_type for entry in entries)
        if packed or sum(entry.file_size for entry in entries) > file.stat().st_size:
            raise refusal(file, "its parts are compressed or overlap, which torch.save never does", OTHER)
    try:
        if file.suffix == ".safetensors":  # torch.load would go by the name
            with file.open("rb") as opened:
                return torch.load(opened, map_location="cpu", weights_only=True)
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except UnpicklingError as exc:
        raise refusal(file, f"it holds more than tensors{_objects(file, zipped)}", SAVE) from exc
    except Exception as exc:  # torch raises errors of any type for a corrupted file
        what = f"it is cut off, corrupted, or not torch.save's ({type(exc).__name__}: {one_line(str(exc))})"
        raise refusal(file, what, FETCH) from exc


def _objects(file: Path, zipped: bool) -> str:
    """Return the types of a checkpoint's non-tensor objects, if they can be listed without unpickling them."""
    try:
        names = sorted(get_unsafe_globals_in_checkpoint(str(file))) if zipped else []
    except Exception:  # as above: a pickle may be anything
        return ""
    return one_line(f": {', '.join(names[:3])}") if names else ""


def _entry(file: Path, state: object) -> tuple[dict, list[str]]:
    """Return the entry of a checkpoint that holds the weights, or all of it, and notes for users."""
    if not isinstance(state, dict):
        raise refusal(file, f"it holds a {type(state).__name__}, expected a dictionary of tensors", SAVE)
    found = [entry for entry in ENTRIES if isinstance(state.get(entry), dict)]
    if len(found) > 1:
        raise refusal(file, f"it holds weights twice, in {' and '.join(map(repr, found))}", SAVE)
    if not found:
        return state, []
    return state[found[0]], [] if found[0] == ENTRIES[0] else [f"its entry {found[0]!r} is read"]


def _unwrapped(file: Path, state: dict) -> tuple[dict, list[str]]:
    """Return the tensors by their names in the unwrapped model, and the names of the wrappers."""
    if odd := next((name for name in state if not isinstance(name, str)), None):
        raise refusal(file, f"it has an entry {one_line(repr(odd))}, expected tensors by their names", SAVE)
    wrappers = {part for name in state for part in name.split(".")[:-1] if part in WRAPPERS}
    plain = {".".join(part for part in name.split(".") if part not in wrappers): state[name] for name in state}
    while outer := next((o for o in OUTER if plain and all(name.startswith(f"{o}.") for name in plain)), None):
        wrappers.add(outer)
        plain = {name.removeprefix(f"{outer}."): tensor for name, tensor in plain.items()}
    if len(plain) < len(state):
        raise refusal(file, f"it holds tensors twice, with and without {', '.join(sorted(wrappers))}", SAVE)
    return plain, sorted(wrappers)


def _check_tensors(file: Path, state: dict[str, object]) -> None:
    """Refuse entries that are not tensors, and tensors that would take more memory than their file."""
    size = file.stat().st_size
    for name, tensor in state.items():
        where = f"{one_line(name)!r}"
        if not isinstance(tensor, Tensor):
            raise refusal(file, f"its entry {where} is of type {type(tensor).__name__}, expected a tensor", SAVE)
        if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.nbytes > size:
            raise refusal(file, f"tensor {where} {tuple(tensor.shape)} is larger than the file", OTHER)
        if not tensor.is_floating_point():
            raise refusal(file, f"tensor {where} is {tensor.dtype}, expected floating-point numbers", OTHER)


def _check_layout(file: Path, tensors: dict[str, Tensor]) -> None:
    """Refuse a checkpoint whose tensors have another library's names, and name the library."""
    if not tensors:
        raise refusal(file, "it holds no tensors", OTHER)
    if any(name.endswith((".lora_A", ".lora_B")) for name in tensors):
        raise refusal(file, "it is an adapter of clipweld", "adapters go into the folder of --adapters")
    if any(".lora_A." in name or ".lora_down." in name for name in tensors):
        raise refusal(file, "it is a LoRA, without the weights that it changes", OTHER)
    if any(name.startswith(("vision_model.", "text_model.")) for name in tensors):
        beside = file.with_name("open_clip_model.safetensors")
        step = (
            f"give {beside}" if beside.is_file() else "give open_clip's own file of these weights, or its tag for them"
        )
        raise refusal(file, "it is a checkpoint of transformers, whose tensors have other names and forms", step)
    if any(name.startswith(("visual.trunk.", "text.transformer.")) for name in tensors):
        raise refusal(file, "its towers are not open_clip's own ViT and text transformer", "give another model's")
