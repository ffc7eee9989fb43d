"""Loading of weights into open_clip's models: open_clip downloads its tags, this module reads files."""

from __future__ import annotations

import difflib
import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import open_clip
import torch
from open_clip.pretrained import get_pretrained_cfg
from open_clip.transform import PreprocessCfg
from torch import Tensor, nn

from clipweld.trainer.base.file_kinds import refusal
from clipweld.trainer.base.model_names import WEIGHTS_SUFFIXES, find_weights
from clipweld.trainer.base.weights_config import NAME, check_config, preprocess_for, read_config
from clipweld.trainer.base.weights_file import Weights, read_weights
from clipweld.trainer.errors import UnsupportedModel, WeightsError
from clipweld.trainer.mini import FOLDER as MINI
from clipweld.trainer.schemas import one_line

ASSUMED = f"no preprocess_cfg in an {NAME} beside it, so images are prepared as for OpenAI's weights"
TOWERS = {"vision": asdict(open_clip.CLIPVisionCfg()), "text": asdict(open_clip.CLIPTextCfg())}

Shapes = dict[str, torch.Size]


@dataclass(frozen=True)
class Pretrained:
    """A model with its weights.

    Attributes:
        model: open_clip's module, configured with the preprocessing of its weights.
        name: the tag as open_clip writes it, or the file as it was given.
        notes: what users should know about how the weights were read.
    """

    model: open_clip.CLIP
    name: str
    notes: tuple[str, ...] = ()


def skeleton(model_name: str) -> nn.Module:
    """Return a model on the meta device, which takes neither time nor memory.

    Raises:
        UnsupportedModel: a tower is not open_clip's own.
    """
    config = open_clip.get_model_config(model_name)
    foreign = {"hf_model_name": config["text_cfg"], "timm_model_name": config["vision_cfg"], "multimodal_cfg": config}
    if config.get("custom_text") or any(name in where for name, where in foreign.items()):
        raise UnsupportedModel(
            f"model {model_name}: a tower is not open_clip's own ViT or text transformer; supported: such as ViT-B-32, "
            "ViT-B-16, ViT-L-14"
        )
    with torch.device("meta"):
        return open_clip.CLIP(**{name: value for name, value in config.items() if name != "custom_text"})


def build(model_name: str, pretrained: str, shapes: Shapes) -> Pretrained:
    """Build a model and load its weights.

    Args:
        pretrained: one of open_clip's tags, in any case; a file; or ``random``.
        shapes: the shapes of the model's tensors, by name.

    Raises:
        WeightsError: there is no such tag or file, no network to download it, or the weights don't fit.
    """
    if pretrained == "random":
        with _quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Pretrained(open_clip.create_model(model_name), pretrained)
    tags = {_plain(tag): tag for tag in open_clip.list_pretrained_tags_by_model(model_name)}
    if tag := tags.get(_plain(pretrained)):
        return Pretrained(_fetched(model_name, tag), tag)
    file = Path(pretrained).expanduser()
    if not os.path.lexists(file):
        raise _missing(model_name, pretrained, list(tags.values()))
    model, notes = _from_file(model_name, file, shapes)
    return Pretrained(model, pretrained, notes)


def _plain(tag: str) -> str:
    return tag.strip().lower().replace("-", "_")


def _fetched(model_name: str, tag: str) -> nn.Module:
    # OpenAI's weights were trained with QuickGELU. open_clip's tags say so, its model configurations don't.
    quick = get_pretrained_cfg(model_name, tag).get("quick_gelu", False)
    try:
        with _quiet():
            return open_clip.create_model(model_name, pretrained=tag, require_pretrained=True, force_quick_gelu=quick)
    except Exception as exc:  # open_clip raises RuntimeError, OSError, hub and pickle errors alike
        raise WeightsError(
            f"weights {tag!r} for {model_name} could not be loaded: {type(exc).__name__}: {one_line(str(exc))}; "
            f"{_by_hand(model_name, tag)}"
        ) from exc


def _by_hand(model_name: str, tag: str) -> str:
    """Return the advice how to get a tag's weights and preprocessing onto a machine without a network."""
    known = get_pretrained_cfg(model_name, tag)
    address = known.get("url") or f"open_clip_model.safetensors of https://huggingface.co/{known['hf_hub'].rstrip('/')}"
    quick = f"{model_name}-quickgelu"
    fits = quick if known.get("quick_gelu") and quick in open_clip.list_models() else model_name
    usual = asdict(PreprocessCfg())
    differs = {name: known[name] for name in usual if name in known and known[name] not in (usual[name], None)}
    beside = f"put beside it a file {NAME} with {json.dumps({'preprocess_cfg': differs})}, " if differs else ""
    return f"fetch {address} where there is a network, {beside}then give --model {fits} --pretrained FILE"


def _missing(model_name: str, pretrained: str, tags: list[str]) -> WeightsError:
    """Return the error for weights that are neither a tag nor a file."""
    said = f"weights {pretrained!r} for {model_name}: neither a known tag nor a file here"
    if "://" in pretrained and not find_weights(pretrained):
        return WeightsError(f"{said}; fetch it, and give the file")
    if os.sep in pretrained or pretrained.lower().endswith(WEIGHTS_SUFFIXES):
        folder = Path(pretrained).expanduser().parent
        names = [path.name for path in folder.iterdir()] if os.access(folder, os.R_OK | os.X_OK) else []
        if near := difflib.get_close_matches(Path(pretrained).name, names, n=1):
            return WeightsError(f"{said}; near it: {folder / near[0]}")
    if found := find_weights(pretrained):
        return WeightsError(f"{said}; give --model {found[0]} --pretrained {found[1]}")
    known = f"tags of {model_name}: {', '.join(tags)}; or" if tags else "give"
    return WeightsError(f"{said}; {known} a checkpoint file, or 'random'")


def _from_file(model_name: str, file: Path, shapes: Shapes) -> tuple[nn.Module, tuple[str, ...]]:
    weights = read_weights(file)
    config = read_config(file)
    check_config(config, model_name, file, weights.from_openai)
    tensors = _fitted(weights, shapes, model_name, file)
    size = open_clip.get_model_config(model_name)["vision_cfg"].get("image_size", 224)
    preprocess = preprocess_for(config, size, model_name, file)
    with _quiet():
        model = open_clip.create_model(model_name, force_preprocess_cfg=preprocess)
    model.load_state_dict(tensors)
    assumed = config.preprocess is None and not weights.from_openai and file.parent != MINI
    notes = (*weights.notes, *([ASSUMED] if assumed else []))
    return model, tuple(f"weights {file}: {note}" for note in notes)


def _fitted(weights: Weights, shapes: Shapes, model_name: str, file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file if their names and shapes are exactly the model's; nothing is cropped or resized.

    Raises:
        WeightsError: names the tensors that are missing, unknown, or of another shape.
    """
    tensors = dict(weights.tensors)
    for name in ("logit_scale", "logit_bias"):  # scalars, which some programs save with shape (1,)
        if name in tensors and tensors[name].numel() == 1 and name in shapes:
            tensors[name] = tensors[name].reshape(shapes[name])
    other = [name for name in shapes if name in tensors and tensors[name].shape != shapes[name]]
    faults = [
        (len(found), f"{len(found)} of {what} ({', '.join(map(one_line, found[:3]))})")
        for found, what in (
            ([name for name in tensors if name not in shapes], f"its tensors have no place in {model_name}"),
            ([name for name in shapes if name not in tensors], f"the tensors of {model_name} are missing in it"),
            ([f"{n} {tuple(tensors[n].shape)}, expected {tuple(shapes[n])}" for n in other], "its shapes differ"),
        )
    ]
    said = [text for count, text in faults if count]
    if not said:
        return tensors
    fits = [name for name in open_clip.list_models() if _fits(name, tensors)]
    step = f"it fits {' and '.join(fits[:2])}: give --model {fits[0]}" if fits else "give the model that it is of"
    raise refusal(file, "; ".join(said), step)


def _fits(model_name: str, tensors: dict[str, Tensor]) -> bool:
    """Whether the tensors have the sizes of a model's towers."""
    config = open_clip.get_model_config(model_name)
    image, text = ({**default, **config[f"{tower}_cfg"]} for tower, default in TOWERS.items())
    if not isinstance(image["image_size"], int) or not isinstance(image["layers"], int):
        return False
    tokens = (image["image_size"] // image["patch_size"]) ** 2 + 1
    sizes = {
        "visual.positional_embedding": (tokens, image["width"]),
        "visual.conv1.weight": (image["width"], 3, image["patch_size"], image["patch_size"]),
        "visual.proj": (image["width"], config["embed_dim"]),
        "positional_embedding": (text["context_length"], text["width"]),
        "token_embedding.weight": (text["vocab_size"], text["width"]),
    }
    layers = {f"visual.transformer.resblocks.{image['layers'] - 1}", f"transformer.resblocks.{text['layers'] - 1}"}
    deeper = {f"visual.transformer.resblocks.{image['layers']}", f"transformer.resblocks.{text['layers']}"}
    blocks = {name.partition(".attn")[0] for name in tensors}
    alike = all(name in tensors and tensors[name].shape == size for name, size in sizes.items())
    return alike and layers <= blocks and not deeper & blocks


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence libraries, whose warnings repeat our errors or what the caller asked for (random weights)."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
