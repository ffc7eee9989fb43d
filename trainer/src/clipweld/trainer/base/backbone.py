"""An open_clip model: its towers, preprocessing, tokenizer, and the fingerprint of its weights."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import open_clip
import torch
from open_clip.pretrained import get_pretrained_cfg
from open_clip.transform import PreprocessCfg
from open_clip.transformer import Attention, CustomResidualAttentionBlock, ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from clipweld.trainer.base.cls_block import cut_to_longest, encode_text, read_at_cls
from clipweld.trainer.base.model_names import find_model
from clipweld.trainer.base.pretrained import build, skeleton
from clipweld.trainer.errors import UnsupportedModel, WeightsError, WrongBase
from clipweld.trainer.finite import first_not_finite, unit
from clipweld.trainer.mini import FOLDER as MINI
from clipweld.trainer.preprocessing import preprocessing
from clipweld.trainer.text import prompt_of

if TYPE_CHECKING:
    from clipweld.trainer.adapters.adapter import Adapter

open_clip.add_model_config(MINI / "mini.json")

PREPROCESSING = "preprocessing"  # key in an adapter's config
# Default weights of the models whose default is not OpenAI's.
DEFAULT_PRETRAINED = {"mini": str(MINI / "mini.safetensors")}


@dataclass(frozen=True)
class Backbone:
    """A CLIP as open_clip builds it, in float32 and eval mode, with its preprocessing and tokenizer.

    Attributes:
        model: open_clip's own module, except for the image tower's last block (``cls_block``). Its weights may be
            replaced by merged ones, its layers never.
        preprocess: open_clip's transform, PIL image -> float32 tensor (3, image_size, image_size). Raises ValueError
            for images with more pixels than ``clipweld.trainer.preprocessing`` allows.
        tokenizer: open_clip's tokenizer, list of str -> int64 tensor (batch, context_length).
        fingerprint: SHA-256 of the base weights, independent of the file format.
        notes: what users should know about how the weights were read, one line each.
    """

    model_name: str
    pretrained: str
    model: open_clip.CLIP
    preprocess: Callable
    tokenizer: Callable
    fingerprint: str
    image_size: int
    context_length: int
    embed_dim: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize_mode: str
    interpolation: str
    notes: tuple[str, ...] = ()

    @property
    def preprocessing(self) -> str:
        """Description of the preprocessing, as adapters record it."""
        return _in_words(self.mean, self.std, self.interpolation, self.resize_mode)

    @property
    def own_preprocessing(self) -> dict[str, str]:
        """The entry that an adapter's config records; empty if the name of the weights implies the preprocessing."""
        usual = usual_preprocessing(self.model_name, self.pretrained)
        return {} if self.preprocessing == usual else {PREPROCESSING: self.preprocessing}

    @property
    def device(self) -> torch.device:
        """Device of the model's weights."""
        return self.model.logit_scale.device


def load_backbone(model_name: str, pretrained: str | None = None) -> Backbone:
    """Build an open_clip CLIP and load its weights.

    Args:
        model_name: a name that open_clip knows, or ``mini``, the small CLIP that ships with clipweld, in any spelling
            that ``clipweld.trainer.base.model_names.find_model`` accepts.
        pretrained: one of open_clip's tags, a local checkpoint file, or ``random`` (weights of seed 0, for speed
            measurements). None takes the model's default: the shipped weights for ``mini``, else ``openai``.

    Raises:
        UnknownModel: open_clip has no model of that name.
        UnsupportedModel: a tower is not open_clip's own transformer.
        WeightsError: there is no such tag or file, no network to download it, or the weights don't fit or aren't
            finite.
    """
    if pretrained is not None and not pretrained.strip():
        raise WeightsError(
            f"weights {pretrained!r} for {model_name}: no name; give a tag or a checkpoint file, or leave out "
            "--pretrained for the model's own"
        )
    model_name = find_model(model_name, open_clip.list_models())
    bare = skeleton(model_name)
    check_supported(bare, model_name)
    shapes = {name: tensor.shape for name, tensor in bare.state_dict().items()}
    built = build(model_name, pretrained or DEFAULT_PRETRAINED.get(model_name, "openai"), shapes)
    model, label = built.model, built.name if pretrained else Path(built.name).stem
    if (name := first_not_finite(model.state_dict())) is not None:
        raise WeightsError(
            f"weights {label!r} for {model_name}: {name} holds NaN or infinity, expected finite numbers; give another "
            "checkpoint with --pretrained FILE"
        )
    read_at_cls(model)
    transform = PreprocessCfg(**open_clip.get_model_preprocess_cfg(model))
    return Backbone(
        model_name=model_name,
        pretrained=label,
        model=model.requires_grad_(False).eval(),
        preprocess=preprocessing(transform),
        tokenizer=open_clip.get_tokenizer(model_name),
        fingerprint=fingerprint(model.state_dict()),
        image_size=transform.size[0] if isinstance(transform.size, (tuple, list)) else transform.size,
        context_length=model.context_length,
        embed_dim=model.visual.output_dim,
        mean=tuple(transform.mean),
        std=tuple(transform.std),
        resize_mode=transform.resize_mode,
        interpolation=transform.interpolation,
        notes=built.notes,
    )


def usual_preprocessing(model_name: str, pretrained: str) -> str:
    """Describe the preprocessing that a name of weights implies: that of the tag, else that of OpenAI's weights."""
    usual = asdict(PreprocessCfg()) | get_pretrained_cfg(model_name, pretrained)
    return _in_words(*(usual[name] for name in ("mean", "std", "interpolation", "resize_mode")))


def check_preprocessing(backbone: Backbone, lineage: Sequence[Adapter]) -> None:
    """Refuse adapters that were trained with another preprocessing than the backbone's.

    Raises:
        WrongBase: names both.
    """
    for adapter in lineage:
        usual = usual_preprocessing(adapter.model_name, adapter.pretrained)
        trained = adapter.config.get(PREPROCESSING, usual)
        if trained != backbone.preprocessing:
            raise WrongBase(
                f"adapter {adapter.task!r} was trained on images prepared with {trained}; these weights have "
                f"{backbone.preprocessing}: give the weights with the open_clip_config.json of training"
            )


def _in_words(mean: Sequence[float], std: Sequence[float], interpolation: str, resize_mode: str) -> str:
    numbers = (" ".join(f"{value:g}" for value in values) for values in (mean, std))
    return "mean {}, std {}, {}, {}".format(*numbers, interpolation, resize_mode)


def with_weights(backbone: Backbone, state_dict: dict[str, Tensor]) -> Backbone:
    """Return a copy of the backbone with other weights; ``fingerprint`` stays that of the base."""
    model = copy.deepcopy(backbone.model)
    model.load_state_dict(state_dict)
    return replace(backbone, model=model)


def check_supported(model: nn.Module, model_name: str) -> None:
    """Accept models whose towers are both open_clip's own transformers and use the features of one token.

    Raises:
        UnsupportedModel: names the difference.
    """
    supported = "supported: open_clip's own ViT and text transformer, such as ViT-B-32, ViT-B-16, ViT-L-14"
    if type(model) is not open_clip.CLIP:
        raise UnsupportedModel(f"model {model_name}: is a {type(model).__name__}, not a plain CLIP; {supported}")
    if not isinstance(model.visual, VisionTransformer):
        raise UnsupportedModel(f"model {model_name}: image tower is a {type(model.visual).__name__}; {supported}")
    if model.visual.attn_pool is not None or model.visual.pool_type != "tok" or model.text_pool_type != "argmax":
        raise UnsupportedModel(f"model {model_name}: a tower is not read at its [CLS] or EOT token; {supported}")
    if model.attn_mask is None or model.visual.output_tokens:
        raise UnsupportedModel(f"model {model_name}: text tower not causal, or image tower gives tokens; {supported}")
    for block in transformer_blocks(model):
        if not isinstance(block, (ResidualAttentionBlock, CustomResidualAttentionBlock)):
            raise UnsupportedModel(f"model {model_name}: has blocks of type {type(block).__name__}; {supported}")
        if isinstance(block.attn, Attention) and block.attn.scaled_cosine:
            raise UnsupportedModel(f"model {model_name}: has scaled cosine attention; {supported}")


def transformer_blocks(model: open_clip.CLIP) -> list[nn.Module]:
    """Return the residual blocks of the image tower, then those of the text tower."""
    return [*model.visual.transformer.resblocks, *model.transformer.resblocks]


def fingerprint(state_dict: dict[str, Tensor]) -> str:
    """Return the SHA-256 over names, shapes and float32 values of all weights, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        value = state_dict[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {tuple(value.shape)}\n".encode())
        digest.update(value.numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def encode_classes(backbone: Backbone, class_names: tuple[str, ...], templates: tuple[str, ...]) -> Tensor:
    """Return zero-shot classifier weights (num_classes, embed_dim), L2-normalised.

    CLIP's prompt ensembling: the mean of the normalised features of all templates, normalised again.

    Raises:
        NotFinite: the features of a prompt, or the mean over a class's templates, can't be normalised.
    """
    prompts = [prompt_of(template, name) for name in class_names for template in templates]
    chunks = backbone.tokenizer(prompts).to(backbone.device).split(256)
    features = torch.cat([encode_text(backbone.model, cut_to_longest(chunk)) for chunk in chunks])
    features = unit(features, [f"prompt {prompt!r}" for prompt in prompts])
    mean = features.view(len(class_names), len(templates), -1).mean(dim=1)
    return unit(mean, [f"class {name!r}" for name in class_names])
