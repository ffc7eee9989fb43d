"""A CLIP as transformers' files: weights under its names, configuration, image preprocessing and tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import open_clip
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import QuickGELU
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from clipweld.exporter.errors import UnsupportedModel
from clipweld.trainer.adapters.merge import STACKED
from clipweld.trainer.base.backbone import Backbone, transformer_blocks

# open_clip's tensor names -> transformers'. TRANSPOSED: those that transformers stores transposed.
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
# transformers' names for the tokens that begin and end a text; open_clip's are <start_of_text> and <end_of_text>.
START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def write_settings(backbone: Backbone, folder: Path) -> None:
    """Write configuration, preprocessing and tokenizer.

    Raises:
        UnsupportedModel: transformers' CLIP can't represent the tokenizer or the preprocessing.
    """
    contents = {"config": config(backbone), "preprocessor_config": preprocessing(backbone)}
    vocabulary, merges = _vocabulary(backbone)
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    contents["tokenizer_config"] = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": backbone.context_length,
        "do_lower_case": True,
        **special,
    }
    contents |= {"special_tokens_map": special, "vocab": vocabulary}
    for name, content in contents.items():
        text = json.dumps(content, indent=None if name == "vocab" else 2, ensure_ascii=False)
        (folder / f"{name}.json").write_text(f"{text}\n", encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    text = _tokenizer(vocabulary, merges).to_str()
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")


def renamed(weights: dict[str, Tensor], model_name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors under transformers' names: q, k and v split, projections transposed.

    Raises:
        UnsupportedModel: transformers' CLIP has no counterpart of a tensor.
    """
    for name, tensor in weights.items():
        if name in NAMES:
            yield NAMES[name], tensor.contiguous()
        elif name in TRANSPOSED:
            yield TRANSPOSED[name], tensor.T.contiguous()
        elif ".resblocks." in name:
            block, rest = layer_of(name)
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


def layer_of(name: str) -> tuple[str, str]:
    """Split open_clip's name of a layer or tensor into transformers' name of its block and the rest."""
    tower, _, rest = name.partition(".resblocks.")
    number, _, rest = rest.partition(".")
    return f"{TOWERS[tower]}.encoder.layers.{number}", rest


def _no_place(name: str, model_name: str) -> UnsupportedModel:
    return UnsupportedModel(f"model {model_name}: transformers' CLIP has no place for {name}; use --to open_clip")


def has_quick_gelu(backbone: Backbone) -> bool:
    """Whether the towers compute OpenAI's approximation of GELU."""
    return isinstance(transformer_blocks(backbone.model)[0].get_submodule("mlp.gelu"), QuickGELU)


def config(backbone: Backbone) -> dict:
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
            "pad_token_id": model.vocab_size - 1,
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


def preprocessing(backbone: Backbone) -> dict:
    """transformers' CLIPImageProcessor.

    Raises:
        UnsupportedModel: images are padded with a colour other than black.
    """
    size = backbone.image_size
    fill = open_clip.get_model_preprocess_cfg(backbone.model).get("fill_color", 0)
    if backbone.resize_mode == "longest" and fill:
        raise UnsupportedModel(
            f"model {backbone.model_name}: fills images up with colour {fill}, transformers' CLIP with 0; use --to "
            "open_clip"
        )
    sizes = {
        "shortest": {"shortest_edge": size},
        "squash": {"height": size, "width": size},
        "longest": {"max_height": size, "max_width": size},
    }
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": sizes[backbone.resize_mode],
        "resample": {"bilinear": 2, "bicubic": 3}[backbone.interpolation],
        "do_center_crop": backbone.resize_mode != "squash",
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(backbone.mean),
        "image_std": list(backbone.std),
    }


def _vocabulary(backbone: Backbone) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return token ids by token, and the BPE merges in order of priority.

    Raises:
        UnsupportedModel: the tokenizer is not CLIP's own.
    """
    tokenizer: Any = backbone.tokenizer  # open_clip has no types
    if type(tokenizer) is not SimpleTokenizer or tokenizer.clean_fn is not SimpleTokenizer().clean_fn:
        raise UnsupportedModel(
            f"model {backbone.model_name}: transformers' CLIP has no tokenizer such as its "
            f"{type(tokenizer).__name__}; use --to open_clip"
        )
    special = {tokenizer.sot_token_id: START, tokenizer.eot_token_id: END}
    vocabulary = {special.get(number, token): number for token, number in tokenizer.encoder.items()}
    return vocabulary, sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.get)


def _tokenizer(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """Build CLIP's tokenizer with the tokenizers library."""
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary, merges, continuing_subword_prefix="", end_of_word_suffix="</w>", fuse_unk=False, unk_token=END
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(
        (END, vocabulary[END]), (START, vocabulary[START]), trim_offsets=False, add_prefix_space=False
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (START, END)])
    return tokenizer
