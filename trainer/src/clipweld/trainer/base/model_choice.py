"""The choice of a command's model and weights: those that were given, else those of the adapters.

Only the headers of adapters are read, without torch, so that contradictions are refused before anything slow.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from clipweld.trainer.adapters.folder import adapter_files
from clipweld.trainer.base.model_names import SHIPPED, find_model
from clipweld.trainer.errors import WrongBase
from clipweld.trainer.header import read_claims
from clipweld.trainer.schemas import printable

DEFAULT_MODEL = "ViT-B-16"
QUICK = "-quickgelu"  # suffix of an architecture's second name, for the same weights


@dataclass(frozen=True)
class _Base:
    """The model and weights that an adapter claims to be trained on."""

    task: str
    model_name: str
    pretrained: str
    base_fingerprint: str

    @property
    def architecture(self) -> str:
        return self.model_name.removesuffix(QUICK)

    def __str__(self) -> str:
        return f"{self.task!r} is of {self.model_name} ({self.pretrained}, base {self.base_fingerprint[:8]})"


def choose_model(given: str | None, adapters: Path | None = None) -> str:
    """Return open_clip's name of the model to load.

    Args:
        given: the name that the user gave, as ``find_model`` accepts it. None takes the adapters' model, else the
            default.
        adapters: a folder of adapters. None and a folder without adapters have no effect.

    Raises:
        AdapterError: a file has an adapter's name but is none (``adapter_files``).
        UnknownModel: there is no model of this name.
        WrongBase: the adapters belong to two models, or to another one than was given.
    """
    named = None if given is None else find_model(given)
    base = _base(adapters)
    if base is None:
        return named or DEFAULT_MODEL
    if named is not None and named.removesuffix(QUICK) != base.architecture:
        raise WrongBase(
            f"adapters in {adapters}: {base}, --model says {named}; leave out --model, or give the adapters of {named} "
            "with --adapters"
        )
    return named or find_model(base.model_name)


def choose_weights(given: str | None, model_name: str, adapters: Path | None = None) -> str | None:
    """Return the weights to load, as ``clipweld.trainer.base.backbone.load_backbone`` accepts them.

    Args:
        given: the weights that the user gave. None takes those of the adapters, or the model's default.

    Raises:
        WrongBase: the adapters were trained on weights from a file, and no file was given.
    """
    base = _base(adapters)
    if given is not None or base is None or base.pretrained == model_name == SHIPPED:
        return given
    from open_clip import list_pretrained_tags_by_model

    if base.pretrained in ("random", *list_pretrained_tags_by_model(model_name)):
        return base.pretrained
    # An adapter may come from an untrusted source, so a path in it is never opened.
    raise WrongBase(f"adapters in {adapters}: {base}, weights from a file; give that file with --pretrained FILE")


def _base(adapters: Path | None) -> _Base | None:
    """Return the common base of the adapters in a folder. ``load_lineage`` reports those that can't be read."""
    found = [base for path in _files(adapters) if (base := _read(path))]
    for other in found[1:]:
        if (other.architecture, other.base_fingerprint) != (found[0].architecture, found[0].base_fingerprint):
            raise WrongBase(f"adapters in {adapters}: {found[0]}, {other}; keep adapters of one model in one folder")
    return found[0] if found else None


def _files(folder: Path | None) -> list[Path]:
    return [] if folder is None else adapter_files(folder)


def _read(path: Path) -> _Base | None:
    claims = read_claims(path) or {}
    try:
        return _Base(*(printable(claims[name]) for name in ("task", "model_name", "pretrained", "base_fingerprint")))
    except (KeyError, TypeError, ValueError):
        return None
