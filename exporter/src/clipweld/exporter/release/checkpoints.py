"""Checkpoints for other libraries: merged weights for open_clip and transformers, unmerged adapters for PEFT."""

from __future__ import annotations

import copy
import json
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import open_clip
import torch
from open_clip.transform import PreprocessCfg
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from clipweld.exporter.errors import CheckpointError
from clipweld.exporter.release.out import check_free
from clipweld.exporter.release.transformers_files import LAYERS, has_quick_gelu, layer_of, renamed, write_settings
from clipweld.trainer.adapters.adapter import Adapter
from clipweld.trainer.adapters.merge import merge
from clipweld.trainer.base.backbone import Backbone
from clipweld.trainer.os_errors import next_step

# The names by which open_clip finds weights and their configuration in a folder.
OPEN_CLIP_WEIGHTS, OPEN_CLIP_CONFIG = "open_clip_model.safetensors", "open_clip_config.json"
OPEN_CLIP_MODELS = Path(open_clip.__file__).parent / "model_configs"
SPELLED_OUT = "ViT-B-32"  # open_clip needs some model name, even when every setting is given
PEFT_BASE = "base"
TORCH = {"format": "pt"}  # transformers requires it


def save(target: str, backbone: Backbone, adapters: Sequence[Adapter], out: Path) -> tuple[str, str]:
    """Write a checkpoint for ``open_clip``, ``transformers`` or ``peft``.

    Returns:
        the model's name there, and a Python statement that loads the model with its preprocessing and tokenizer.

    Raises:
        UnsupportedModel, CheckpointError: as of the functions below.
    """
    if target == "open_clip":
        name = save_open_clip(backbone, adapters, out)
        return name, _load_open_clip(backbone, name, out)
    where = repr(str(out))
    if target == "transformers":
        save_transformers(backbone, adapters, out)
        step = f"classify = transformers.pipeline('zero-shot-image-classification', model={where})"
        return backbone.model_name, f"import transformers; {step}"
    save_peft(backbone, adapters, out)
    base = repr(str(out / PEFT_BASE))
    step = (
        f"model = peft.PeftModel.from_pretrained(transformers.CLIPModel.from_pretrained({base}), {where}); "
        f"processor = transformers.CLIPProcessor.from_pretrained({base})"
    )
    return backbone.model_name, f"import peft, transformers; {step}"


def save_open_clip(backbone: Backbone, adapters: Sequence[Adapter], out: Path) -> str:
    """Write merged weights for open_clip.

    A folder that ``open_clip.create_model_and_transforms("local-dir:OUT")`` loads, with its architecture and
    preprocessing; or, where ``out`` ends in ``.safetensors``, the weights alone.

    Returns:
        the name to load them by: weights trained with QuickGELU need the configuration that has it.

    Raises:
        CheckpointError: it can't be written, or is there already.
    """
    weights = {name: tensor.contiguous() for name, tensor in merge(backbone.model.state_dict(), adapters).items()}
    with _staged(out) as staged:
        file = staged
        if out.suffix != ".safetensors":
            staged.mkdir()
            file = staged / OPEN_CLIP_WEIGHTS
            config = {
                "model_cfg": _model_config(backbone),
                "preprocess_cfg": open_clip.get_model_preprocess_cfg(backbone.model),
            }
            (staged / OPEN_CLIP_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _save(weights, file, None)
        # Proves that open_clip accepts every tensor in the file.
        open_clip.load_checkpoint(copy.deepcopy(backbone.model), str(file), strict=True)
    return architecture(backbone)


def architecture(backbone: Backbone) -> str:
    """Return open_clip's name of this architecture: weights with QuickGELU may need the ``-quickgelu`` variant."""
    configured = open_clip.get_model_config(backbone.model_name) or {}
    named_for_it = configured.get("quick_gelu", False) or not has_quick_gelu(backbone)
    return backbone.model_name if named_for_it else f"{backbone.model_name}-quickgelu"


def save_transformers(backbone: Backbone, adapters: Sequence[Adapter], out: Path) -> None:
    """Write merged weights as a folder that transformers loads, by ``pipeline`` and by ``from_pretrained``.

    Weights, configuration, image preprocessing and tokenizer.

    Raises:
        UnsupportedModel: the model has a part that transformers' CLIP lacks.
        CheckpointError: the folder can't be written, or is not empty.
    """
    tensors = dict(renamed(merge(backbone.model.state_dict(), adapters), backbone.model_name))
    with _staged(out) as folder:
        _write_transformers(backbone, tensors, folder)


def save_peft(backbone: Backbone, adapters: Sequence[Adapter], out: Path) -> None:
    """Write all adapters as one PEFT LoRA, with the base as a transformers folder inside it.

    Concatenated, the adapters are exactly one LoRA whose rank is the sum of theirs; the scaling is multiplied into
    lora_B. Load it with ``peft.PeftModel.from_pretrained(base, out)``, where ``base`` is the model in ``out/base``, or
    the published CLIP with the same weights.

    Raises:
        UnsupportedModel: as of ``save_transformers``.
        CheckpointError: there are no adapters, or the folder can't be written or is not empty.
    """
    if not adapters:
        raise CheckpointError("peft: no adapters to write; give the folder of 'trainer fit' with --adapters")
    base = dict(renamed(backbone.model.state_dict(), backbone.model_name))
    tensors: dict[str, Tensor] = {}
    targets = []
    for module in adapters[0].modules():
        lora_A, lora_B = zip(*(adapter.experts(module) for adapter in adapters), strict=True)  # noqa: N806
        scaled = [adapter.scaling * columns for adapter, columns in zip(adapters, lora_B, strict=True)]
        block, layer = layer_of(module)
        targets.append(f"{block}.{LAYERS[layer]}")
        name = f"base_model.model.{targets[-1]}"
        tensors |= {f"{name}.lora_A.weight": torch.cat(lora_A), f"{name}.lora_B.weight": torch.cat(scaled, dim=1)}
    rank = len(tensors[f"{name}.lora_A.weight"])
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(out.absolute() / PEFT_BASE),
        "r": rank,
        "lora_alpha": rank,
        "target_modules": targets,
        "inference_mode": True,
    }
    with _staged(out) as folder:
        folder.mkdir()
        _save(tensors, folder / "adapter_model.safetensors", TORCH)
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _write_transformers(backbone, base, folder / PEFT_BASE)


def _write_transformers(backbone: Backbone, tensors: dict[str, Tensor], folder: Path) -> None:
    folder.mkdir()
    write_settings(backbone, folder)
    _save(tensors, folder / "model.safetensors", TORCH)


def _save(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str] | None) -> None:
    """Write safetensors with the umask's mode; ``save_file`` alone may make them readable by their owner only."""
    file.touch()
    mode = stat.S_IMODE(file.stat().st_mode)
    save_file(tensors, file, metadata)
    file.chmod(mode)


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """Yield a temporary path that is renamed to ``out`` at the end, so that no partial file or folder remains."""
    whole = out.absolute()
    try:
        there = next(place for place in whole.parents if place.exists())
        with tempfile.TemporaryDirectory(dir=there, prefix=f".{whole.name}.") as staging:
            yield Path(staging) / whole.name
            whole.parent.mkdir(parents=True, exist_ok=True)
            check_free(out)
            (Path(staging) / whole.name).rename(whole)
    except (OSError, SafetensorError) as exc:  # safetensors wraps some OSErrors
        why = getattr(exc, "strerror", None) or exc
        step = next_step(exc) if isinstance(exc, OSError) else "make room"
        raise CheckpointError(f"checkpoint {out}: can't be written ({why}); {step}, or give another --out") from exc


def _model_config(backbone: Backbone) -> dict:
    """Return the architecture as an open_clip model configuration."""
    config: dict = open_clip.get_model_config(backbone.model_name)
    return config | ({"quick_gelu": True} if has_quick_gelu(backbone) else {})


def _load_open_clip(backbone: Backbone, name: str, out: Path) -> str:
    """Return the Python statement that loads what ``save_open_clip`` wrote, with preprocessing and tokenizer."""
    if out.suffix != ".safetensors":
        model = tokenizer = repr(f"local-dir:{out}")
    else:
        usual, has = asdict(PreprocessCfg()), open_clip.get_model_preprocess_cfg(backbone.model)
        names = ("mean", "std", "interpolation", "resize_mode")
        differs = {f"image_{key}": has[key] for key in names if key in has and has[key] != usual[key]}
        known = (OPEN_CLIP_MODELS / f"{name}.json").is_file()
        # If open_clip has no configuration of that name, every setting is given.
        settings = differs if known else {**_model_config(backbone), **differs}
        shown = [repr(name if known else SPELLED_OUT), f"pretrained={str(out)!r}"]
        model = ", ".join([*shown, *(f"{key}={value!r}" for key, value in settings.items())])
        tokenizer = repr(name) if known else f"{SPELLED_OUT!r}, context_length={backbone.context_length}"
    return (
        f"import open_clip; model, _, preprocess = open_clip.create_model_and_transforms({model}); "
        f"tokenizer = open_clip.get_tokenizer({tokenizer})"
    )
