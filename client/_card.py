"""The card: what a served version says about itself, and whether this client understands it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from client._images import INTERPOLATIONS, RESIZE_MODES
from client.errors import ContractMismatch, UnknownTask

CARD_FORMAT = 1


@dataclass(frozen=True)
class Task:
    """One task that a served version has learned.

    Attributes:
        name: name of the task.
        class_names: its labels.
        templates: its prompts, with ``{}`` where the class name goes.
        accuracy_before: zero-shot accuracy before the task was learned, in percent, None where it was not measured.
        accuracy_after: the same, after.
        adapter_sha256: which adapter taught it.
    """

    name: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    accuracy_before: float | None
    accuracy_after: float | None
    adapter_sha256: str


@dataclass(frozen=True)
class Card:
    """What one served version is.

    Attributes:
        model: name that all three parts share, such as "clip".
        version: number that all three parts share; 1 is the base CLIP.
        image_size: side of the square image that the model takes, in pixels.
        resize_mode: "shortest" or "squash".
        interpolation: "bicubic" or "bilinear".
        context_length: longest text, in tokens.
        tokenizer_sha256: digest of the vocabulary that the model was trained with.
        embed_dim: width of the features.
        logit_scale: what cosines are multiplied with before the softmax.
        base_model_name: open_clip's name of the base model.
        base_pretrained: open_clip's name of its weights.
        base_fingerprint: digest of its weights.
        tasks: what was learned on top of the base, in order.
    """

    model: str
    version: int
    image_size: int
    resize_mode: str
    interpolation: str
    context_length: int
    tokenizer_sha256: str
    embed_dim: int
    logit_scale: float
    base_model_name: str
    base_pretrained: str
    base_fingerprint: str
    tasks: tuple[Task, ...]

    def task(self, name: str) -> Task:
        """The task of that name.

        Raises:
            UnknownTask: this version has not learned it; says which ones it has.
        """
        by_name = {task.name: task for task in self.tasks}
        if name not in by_name:
            raise UnknownTask(name, list(by_name), self.version)
        return by_name[name]


def read_card(text: str | bytes, where: str) -> Card:
    """Read a card from JSON.

    Args:
        text: the JSON.
        where: what error messages call it.

    Raises:
        ContractMismatch: not JSON, another format, or something missing.
    """
    try:
        fields = json.loads(text)
        card_format = fields["format"]
        if card_format != CARD_FORMAT:
            raise ContractMismatch(
                f"card of {where} has format {card_format}, this client reads format {CARD_FORMAT}; "
                f"install the clipweld that the model was exported with"
            )
        return _card(fields)
    except KeyError as exc:
        raise ContractMismatch(f"card of {where} has no {exc.args[0]!r}; export the model again") from exc
    except (ValueError, TypeError) as exc:
        raise ContractMismatch(f"card of {where} cannot be read: {exc}; export the model again") from exc


def check_card(card: Card, tokenizer_sha256: str, where: str) -> None:
    """Refuse a card whose model this client would feed wrongly.

    Raises:
        ContractMismatch: other tokenizer, or preprocessing that this client does not have.
    """
    for what, got, known in (
        ("resize mode", card.resize_mode, RESIZE_MODES),
        ("interpolation", card.interpolation, tuple(INTERPOLATIONS)),
        ("tokenizer sha256", card.tokenizer_sha256, (tokenizer_sha256,)),
    ):
        if got not in known:
            raise ContractMismatch(
                f"{where} needs {what} {got!r}, this client has {' and '.join(map(repr, known))}; "
                f"install the clipweld that the model was exported with"
            )


def _card(fields: Mapping[str, Any]) -> Card:
    image, text, base = fields["image"], fields["text"], fields["base"]
    return Card(
        model=fields["model"],
        version=int(fields["version"]),
        image_size=int(image["size"]),
        resize_mode=image["resize_mode"],
        interpolation=image["interpolation"],
        context_length=int(text["context_length"]),
        tokenizer_sha256=text["tokenizer_sha256"],
        embed_dim=int(fields["embed_dim"]),
        logit_scale=float(fields["logit_scale"]),
        base_model_name=base["model_name"],
        base_pretrained=base["pretrained"],
        base_fingerprint=base["fingerprint"],
        tasks=tuple(map(_task, fields["tasks"])),
    )


def _task(fields: Mapping[str, Any]) -> Task:
    accuracy = fields["accuracy"] or {}
    return Task(
        name=fields["name"],
        class_names=tuple(fields["class_names"]),
        templates=tuple(fields["templates"]),
        accuracy_before=accuracy.get("before"),
        accuracy_after=accuracy.get("after"),
        adapter_sha256=fields["adapter_sha256"],
    )
