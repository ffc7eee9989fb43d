"""For other programs: merged weights for open_clip and transformers, unmerged adapters for PEFT."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import open_clip
import torch
from open_clip.transformer import QuickGELU
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from exporter.errors import CheckpointError, UnsupportedModel
from trainer.adapter import Adapter
from trainer.backbone import Backbone, configured_quick_gelu, transformer_blocks
from trainer.merge import STACKED, merge

# open_clip's names of single tensors -> transformers'; those that transformers keeps transposed.
NAMES = {
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
# The same for the layers of a block.
LAYERS = {
    **{f"attn.{name}": f"self_attn.{name}" for name in STACKED},
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
TOWERS = {"visual.transformer": "vision_model", "transformer": "text_model"}


def save(target: str, backbone: Backbone, adapters: Sequence[Adapter], out: Path) -> tuple[str, str]:
    """Write for another library: ``open_clip``, ``transformers`` or ``peft``.

    Returns:
        the model's name there, and the Python that loads it.
    """
    if target == "open_clip":
        name = save_open_clip(backbone, adapters, out)
        return name, f"open_clip.create_model({name!r}, pretrained={str(out)!r})"
    if target == "transformers":
        save_transformers(backbone, adapters, out)
        return backbone.model_name, f"transformers.CLIPModel.from_pretrained({str(out)!r})"
    save_peft(backbone, adapters, out)
    step = f"peft.PeftModel.from_pretrained(clip, {str(out)!r}), clip being the base in transformers"
    return backbone.model_name, step


def save_open_clip(backbone: Backbone, adapters: Sequence[Adapter], out: Path) -> str:
    """Write merged weights as safetensors that ``open_clip.create_model(name, pretrained=out)`` loads.

    Returns:
        the name to load them by: weights trained with QuickGELU need the configuration that has it.

    Raises:
        CheckpointError: the file can't be written.
    """
    weights = merge(backbone.model.state_dict(), adapters)
    with _staged(out) as staged:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, staged)
    # Proves that open_clip takes every tensor of it.
    open_clip.load_checkpoint(copy.deepcopy(backbone.model), str(out), strict=True)
    return architecture(backbone)


def architecture(backbone: Backbone) -> str:
    """The name by which open_clip builds this very model: QuickGELU may need another than the one that was given."""
    named_for_it = configured_quick_gelu(backbone.model_name) or not has_quick_gelu(backbone)
    return backbone.model_name if named_for_it else f"{backbone.model_name}-quickgelu"


def save_transformers(backbone: Backbone, adapters: Sequence[Adapter], out: Path) -> None:
    """Write merged weights as a folder that ``transformers.CLIPModel.from_pretrained(out)`` loads.

    Weights, configuration and image preprocessing; the tokenizer is CLIP's, which every published CLIP carries.

    Raises:
        UnsupportedModel: the model has something that transformers' CLIP has no place for.
        CheckpointError: the folder can't be written, or holds something already.
    """
    tensors = dict(_renamed(merge(backbone.model.state_dict(), adapters), backbone.model_name))
    with _staged(out) as folder:
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        for name, content in (("config", _config(backbone)), ("preprocessor_config", _preprocessing(backbone))):
            (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save_peft(backbone: Backbone, adapters: Sequence[Adapter], out: Path) -> None:
    """Write all adapters as one PEFT LoRA for the base weights in ``transformers.CLIPModel``.

    Side by side they are a LoRA of their ranks' sum, exactly; their scaling is in its lora_B. Load it with
    ``peft.PeftModel.from_pretrained(base, out)``, where ``base`` is what ``save_transformers`` writes without adapters,
    or the published CLIP whose weights the base has.

    Raises:
        CheckpointError: there are no adapters, the folder can't be written, or it holds something already.
    """
    if not adapters:
        raise CheckpointError("peft: no adapters to write; give the folder of 'trainer fit' with --adapters")
    tensors, targets = {}, []
    for module in adapters[0].modules():
        lora_A, lora_B = zip(*(adapter.experts(module) for adapter in adapters), strict=True)  # noqa: N806
        scaled = [adapter.scaling * columns for adapter, columns in zip(adapters, lora_B, strict=True)]
        block, layer = _layer(module)
        targets.append(f"{block}.{LAYERS[layer]}")
        name = f"base_model.model.{targets[-1]}"
        tensors |= {f"{name}.lora_A.weight": torch.cat(lora_A), f"{name}.lora_B.weight": torch.cat(scaled, dim=1)}
    rank = len(tensors[f"{name}.lora_A.weight"])
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": targets,
        "inference_mode": True,
    }
    with _staged(out) as folder:
        folder.mkdir()
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """Where to write what takes the place of ``out`` when all of it is there: a file, or a folder where none is yet."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as staging:
            yield Path(staging) / out.name
            (Path(staging) / out.name).replace(out)
    except (OSError, SafetensorError) as exc:  # the latter for what the former says elsewhere
        why = getattr(exc, "strerror", None) or exc
        raise CheckpointError(f"checkpoint {out}: can't be written ({why}); make room, or give another --out") from exc


def has_quick_gelu(backbone: Backbone) -> bool:
    """Whether the towers compute OpenAI's approximation of GELU."""
    return isinstance(transformer_blocks(backbone.model)[0].mlp.gelu, QuickGELU)


def _renamed(weights: dict[str, Tensor], model_name: str) -> Iterator[tuple[str, Tensor]]:
    """open_clip's tensors as transformers' CLIP has them: q, k and v apart, projections transposed."""
    for name, tensor in weights.items():
        if name in NAMES:
            yield NAMES[name], tensor.contiguous()
        elif name in TRANSPOSED:
            yield TRANSPOSED[name], tensor.T.contiguous()
        elif ".resblocks." in name:
            block, rest = _layer(name)
            layer, _, kind = rest.rpartition(".")
            if rest in ("attn.in_proj_weight", "attn.in_proj_bias"):
                for projection, part in zip(STACKED, tensor.chunk(len(STACKED)), strict=True):
                    yield f"{block}.self_attn.{projection}.{kind.removeprefix('in_proj_')}", part.contiguous()
            elif layer in LAYERS:
                yield f"{block}.{LAYERS[layer]}.{kind}", tensor.contiguous()
            else:
                raise _no_place(name, model_name)
        else:
            raise _no_place(name, model_name)


def _layer(name: str) -> tuple[str, str]:
    """transformers' name of the block that something of open_clip's is in, and what that is called there."""
    tower, _, rest = name.partition(".resblocks.")
    number, _, rest = rest.partition(".")
    return f"{TOWERS[tower]}.encoder.layers.{number}", rest


def _no_place(name: str, model_name: str) -> UnsupportedModel:
    return UnsupportedModel(f"model {model_name}: transformers' CLIP has no place for {name}; use --to open_clip")


def _config(backbone: Backbone) -> dict:
    """transformers' CLIPConfig."""
    model = backbone.model
    shared = {
        "hidden_act": "quick_gelu" if has_quick_gelu(backbone) else "gelu",
        "layer_norm_eps": model.ln_final.eps,
        "projection_dim": backbone.embed_dim,
    }
    image, text = model.visual.transformer, model.transformer
    return {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "projection_dim": backbone.embed_dim,
        "vision_config": {
            "model_type": "clip_vision_model",
            "image_size": backbone.image_size,
            "patch_size": model.visual.conv1.kernel_size[0],
            **_sizes(image.resblocks),
            **shared,
        },
        "text_config": {
            "model_type": "clip_text_model",
            "vocab_size": model.vocab_size,
            "max_position_embeddings": backbone.context_length,
            "bos_token_id": model.vocab_size - 2,
            "eos_token_id": model.vocab_size - 1,
            "pad_token_id": 0,
            **_sizes(text.resblocks),
            **shared,
        },
    }


def _sizes(blocks: Sequence) -> dict:
    return {
        "hidden_size": blocks[0].mlp.c_fc.in_features,
        "intermediate_size": blocks[0].mlp.c_fc.out_features,
        "num_attention_heads": blocks[0].attn.num_heads,
        "num_hidden_layers": len(blocks),
    }


def _preprocessing(backbone: Backbone) -> dict:
    """transformers' CLIPImageProcessor."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": backbone.image_size},
        "resample": {"bilinear": 2, "bicubic": 3}[backbone.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": backbone.image_size, "width": backbone.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(backbone.mean),
        "image_std": list(backbone.std),
    }
