"""Schemas of a store's JSON, checked on reading because a repository may come from untrusted sources."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, with_config
from typing_extensions import TypedDict

from clipweld.exporter.config import MODEL_NAME, Precision
from clipweld.trainer.schemas import STRICT, Count, Items, Percent, Sha256, Text
from clipweld.trainer.text import task_name

MANIFEST_FORMAT, CARD_FORMAT = 1, 1

ModelName = Annotated[str, Field(pattern=rf"^{MODEL_NAME}\z")]
# A folder in a version, which means its ``model.onnx``, or the file of that model's external weights.
Part = Annotated[str, Field(pattern=r"^((fp32/)?(image|text|card)|(fp32/)?(image|text)/model\.onnx\.data)\z")]
TaskName = Annotated[str, AfterValidator(task_name)]
Version = Annotated[int, Field(ge=1, lt=2**63)]
Size = Annotated[int, Field(ge=1, lt=2**31)]


@with_config(STRICT)
class Adapted(TypedDict):
    task: TaskName
    sha256: Sha256


@with_config(STRICT)
class Accuracy(TypedDict):
    task: TaskName
    before: Percent | None
    after: Percent | None
    measured: Text


@with_config(STRICT)
class Parity(TypedDict):
    image_max_abs: float
    text_max_abs: float
    cosine_min: float
    top1_agreement: float


@with_config(STRICT)
class Agreement(TypedDict):
    task: TaskName
    top1: float
    images: Count


@with_config(STRICT)
class Cast(TypedDict):
    parity: Parity
    agreement: Items[Agreement]


@with_config(STRICT)
class Base(TypedDict):
    model_name: Text
    pretrained: Text
    fingerprint: Sha256


@with_config(STRICT)
class NamedBase(Base):
    architecture: Text


@with_config(STRICT)
class File(TypedDict):
    sha256: Sha256
    bytes: Count


@with_config(STRICT)
class Manifest(TypedDict):
    """``clipweld.exporter.store.manifest`` writes it."""

    format: Literal[MANIFEST_FORMAT]  # type: ignore[valid-type]  # pydantic reads the constant
    model: ModelName
    version: Version
    date: Text
    base: NamedBase
    lineage: Items[Adapted]
    accuracy: Items[Accuracy]
    forced: Items[Text]
    unmerged: bool
    precision: Literal[tuple(p.value for p in Precision)]  # type: ignore[valid-type]  # likewise
    opset: Count
    parity: Parity
    cast: Cast | None
    files: dict[Part, File]
    tools: dict[Text, Text]


@with_config(STRICT)
class History(TypedDict):
    """``clipweld.exporter.store.repository`` writes it."""

    now: Items[Version]
    next: Items[Version]


@with_config(STRICT)
class Image(TypedDict):
    size: Size
    resize_mode: Text
    interpolation: Text


@with_config(STRICT)
class Prompts(TypedDict):
    context_length: Size
    tokenizer_sha256: Sha256


@with_config(STRICT)
class Measured(TypedDict):
    before: Percent | None
    after: Percent | None


@with_config(STRICT)
class Task(TypedDict):
    name: TaskName
    class_names: Items[Text]
    templates: Items[Text]
    accuracy: Measured
    adapter_sha256: Sha256


@with_config(STRICT)
class Card(TypedDict):
    """``clipweld.exporter.store.card`` writes it."""

    format: Literal[CARD_FORMAT]  # type: ignore[valid-type]  # likewise
    model: ModelName
    version: Version
    image: Image
    text: Prompts
    embed_dim: Size
    logit_scale: float
    logit_bias: float | None
    base: Base
    tasks: Items[Task]
