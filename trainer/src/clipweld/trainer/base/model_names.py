"""Names of models as people write them. open_clip is imported only to explain an unknown name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path

from clipweld.trainer.errors import UnknownModel

SHIPPED = "mini"
WEIGHTS_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
# transformers' names of OpenAI's models, and open_clip's letters for their sizes.
_TRANSFORMERS = re.compile(r"clip-vit-(base|large)-patch(\d+)(-\d+)?")
_SIZES = {"base": "B", "large": "L"}


def find_model(name: str, known: Collection[str] | None = None) -> str:
    """Return the model of a name. Case and separators are ignored, so ViT-B/16 is ViT-B-16.

    Args:
        known: the existing models. None takes open_clip's own and ``mini``.

    Raises:
        UnknownModel: there is no model of this name; suggests what to give instead.
    """
    known = _known() if known is None else known
    if name in known:
        return name
    by_key = {_key(model): model for model in known}
    if _key(name) and _key(name) in by_key:
        return by_key[_key(name)]
    raise UnknownModel(f"model {name!r}: open_clip knows no model of this name; {_instead(name, by_key)}")


def _known() -> list[str]:
    """Return the names of all models from open_clip's files, because importing it takes seconds."""
    found = find_spec("open_clip")
    if found is None or found.submodule_search_locations is None:
        raise ModuleNotFoundError("no open_clip", name="open_clip")
    places = found.submodule_search_locations
    return [SHIPPED, *(file.stem for place in places for file in Path(place, "model_configs").glob("*.json"))]


def _key(name: str) -> str:
    """Return a name without case and separators. ViT-L/14@336px is OpenAI's name of ViT-L-14-336."""
    return re.sub(r"[\s/_@-]", "", name.lower().removesuffix("px"))


def _instead(name: str, by_key: dict[str, str]) -> str:
    """Return the advice for a name that no model has."""
    if not name.strip():
        return "give one, such as --model ViT-B-16, or leave out --model"
    if Path(name).is_file() or name.lower().endswith(WEIGHTS_SUFFIXES):
        return f"a file of weights goes to --pretrained {name}, beside the --model that they are of"
    if found := find_weights(name):
        model, tag = found
        return f"give --model {model} --pretrained {tag}"
    from open_clip import list_pretrained_models_by_tag

    if models := list_pretrained_models_by_tag(name):
        model = max(models, key=lambda model: (model.startswith("ViT"), -len(model)))
        return f"it is a tag of weights, for --pretrained, beside a --model such as {model}"
    near = [by_key[key] for key in difflib.get_close_matches(_key(name), by_key, n=3, cutoff=0.6)]
    hint = f"near names: {', '.join(near)}" if near else "some of its names: ViT-B-32, ViT-B-16, ViT-L-14"
    if re.match(r"[\w.-]+[:/]", name):
        return f"what lies on a hub or in a folder goes in by its file, --model NAME --pretrained FILE; {hint}"
    return hint


def find_weights(name: str) -> tuple[str, str] | None:
    """Return the model and tag behind one combined name, as hubs, transformers or open_clip's list write it."""
    from open_clip import list_pretrained
    from open_clip.pretrained import get_pretrained_cfg

    pairs = sorted(list_pretrained(), key=lambda pair: len(pair[0]))  # ViT-B-32 before ViT-B-32-quickgelu
    hub = re.sub(r"^(hf-hub:|(https?://)?(www\.)?huggingface\.co/)", "", name.strip(), flags=re.IGNORECASE)
    hub = hub.rstrip("/").lower()
    for model, tag in pairs:
        if hub == get_pretrained_cfg(model, tag).get("hf_hub", "").rstrip("/").lower() != "":
            return model, tag
    if found := _TRANSFORMERS.fullmatch(hub.removeprefix("openai/")):
        size, patch, resolution = found.groups(default="")
        return f"ViT-{_SIZES[size]}-{patch}{resolution}", "openai"
    key = _key(name.replace(":", ""))
    return next(((model, tag) for model, tag in pairs if key == _key(f"{model}{tag}")), None)
