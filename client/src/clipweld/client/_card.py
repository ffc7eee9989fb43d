"""The card of a served version: its description of itself, and a check that this client understands it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, TypeVar

from clipweld.client._images import INTERPOLATIONS, RESIZE_MODES
from clipweld.client._json import read_json
from clipweld.client.errors import ContractMismatch, UnknownTask

CARD_FORMAT = 1
MAX_BYTES = 4 << 20  # of a card; enough for the class names of hundreds of tasks
# Far beyond any CLIP: of an image, in pixels; of a text, in tokens, and of a feature.
MAX_SIDE, MAX_WIDTH = 8192, 1 << 16
MAX_LOGIT_SCALE = 1e6

_T = TypeVar("_T")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


@dataclass(frozen=True)
class Task:
    """One task that a served version has learned.

    Attributes:
        name: name of the task.
        class_names: its labels.
        templates: its prompts, each with one ``{}`` where the class name goes.
        accuracy_before: zero-shot accuracy before the task was learned, in percent; None if it was not measured.
        accuracy_after: accuracy after the task was learned, in percent; None if it was not measured.
        adapter_sha256: SHA-256 of the adapter that was trained on it.
    """

    name: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    accuracy_before: float | None
    accuracy_after: float | None
    adapter_sha256: str


@dataclass(frozen=True)
class Card:
    """The description of one served version.

    Attributes:
        model: common name of its three parts (image tower, text tower, card), such as "clip".
        version: common number of its three parts; 1 is the base CLIP.
        image_size: side of the square image that the model takes, in pixels.
        resize_mode: "shortest" (the shortest side is resized to ``image_size``, then the centre is cropped) or "squash"
            (both sides are resized to it).
        interpolation: "bicubic" or "bilinear".
        context_length: longest text, in tokens.
        tokenizer_sha256: SHA-256 of the vocabulary that the model was trained with.
        embed_dim: width of image and text features.
        logit_scale: factor by which cosines are multiplied before the softmax.
        base_model_name: open_clip's name of the base model.
        base_pretrained: open_clip's name of its weights.
        base_fingerprint: digest of its weights.
        tasks: the learned tasks, in the order in which they were learned.
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
        """Return the task of this name.

        Raises:
            UnknownTask: this version has not learned it; the message lists those that it has.
        """
        by_name = {task.name: task for task in self.tasks}
        if name not in by_name:
            raise UnknownTask(name, list(by_name), self.version)
        return by_name[name]


def read_card(text: bytes, where: str) -> Card:
    """Parse a card from JSON.

    Args:
        text: the JSON.
        where: what error messages call it.

    Raises:
        ContractMismatch: it is not JSON, too large or of another format, or a field is missing, of the wrong type or
            out of range.
    """
    try:
        fields = read_json(text, MAX_BYTES)
        card_format = _get(fields, "format", int)
        if card_format != CARD_FORMAT:
            raise ContractMismatch(
                f"card of {where} has format {card_format}, this client reads format {CARD_FORMAT}; "
                f"install the clipweld that the model was exported with"
            )
        return _card(fields)
    except KeyError as exc:
        raise ContractMismatch(f"card of {where} has no {exc.args[0]!r}; export the model again") from exc
    except (ValueError, TypeError, OverflowError, RecursionError) as exc:
        raise ContractMismatch(f"card of {where} cannot be read: {exc}; export the model again") from exc


def check_card(card: Card, tokenizer_sha256: str, where: str) -> None:
    """Refuse the card of a model to which this client would give wrong inputs.

    Raises:
        ContractMismatch: the model needs another tokenizer, or preprocessing that this client does not have.
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


def _card(fields: dict[str, Any]) -> Card:
    image, text, base = (_get(fields, name, dict) for name in ("image", "text", "base"))
    logit_scale = _get(fields, "logit_scale", float)
    if not 0 < logit_scale <= MAX_LOGIT_SCALE:  # true for NaN too
        raise ValueError(f"logit_scale is {logit_scale}, expected above 0, at most {MAX_LOGIT_SCALE:,}")
    return Card(
        model=_text(fields, "model"),
        version=_count(fields, "version", 2**63 - 1),
        image_size=_count(image, "size", MAX_SIDE),
        resize_mode=_text(image, "resize_mode"),
        interpolation=_text(image, "interpolation"),
        context_length=_count(text, "context_length", MAX_WIDTH),
        tokenizer_sha256=_text(text, "tokenizer_sha256"),
        embed_dim=_count(fields, "embed_dim", MAX_WIDTH),
        logit_scale=logit_scale,
        base_model_name=_text(base, "model_name"),
        base_pretrained=_text(base, "pretrained"),
        base_fingerprint=_text(base, "fingerprint"),
        tasks=tuple(map(_task, _get(fields, "tasks", list))),
    )


def _task(fields: Any) -> Task:
    accuracy = _get(fields, "accuracy", dict)
    templates = _texts(fields, "templates")
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"template {template!r} must hold exactly one {{}}")
    return Task(
        name=_text(fields, "name"),
        class_names=_texts(fields, "class_names"),
        templates=templates,
        accuracy_before=_percent(accuracy, "before"),
        accuracy_after=_percent(accuracy, "after"),
        adapter_sha256=_text(fields, "adapter_sha256"),
    )


def _get(fields: Any, name: str, kind: type[_T]) -> _T:
    """Return a value of exactly this type; whole numbers are accepted as floats."""
    if type(fields) is not dict:
        raise TypeError(f"a {type(fields).__name__} where {name!r} should be in an object")
    value = fields[name]
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise TypeError(f"{name!r} is a {type(value).__name__}, expected {kind.__name__}")
    return value


def _count(fields: Any, name: str, most: int) -> int:
    value = _get(fields, name, int)
    if not 1 <= value <= most:
        raise ValueError(f"{name!r} is out of range, expected 1 to {most:,}")
    return value


def _percent(fields: Any, name: str) -> float | None:
    if fields.get(name) is None:
        return None
    value = _get(fields, name, float)
    if not 0 <= value <= 100:
        raise ValueError(f"{name!r} is {value}, expected 0 to 100")
    return value


def _text(fields: Any, name: str) -> str:
    return _printable(_get(fields, name, str), name)


def _texts(fields: Any, name: str) -> tuple[str, ...]:
    texts = _get(fields, name, list)
    if not texts:
        raise ValueError(f"{name!r} is empty")
    return tuple(_printable(_get({name: text}, name, str), name) for text in texts)


def _printable(text: str, name: str) -> str:
    """Return text that is safe to print on a terminal, where labels end up; raise ValueError for other text."""
    if not text.strip() or _UNPRINTABLE.search(text):
        raise ValueError(f"{name!r} is blank or has control characters: {text[:100]!r}")
    return text
