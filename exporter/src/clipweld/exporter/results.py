"""Results of a version's checks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Parity:
    """How far ONNX Runtime is from PyTorch, over all batches.

    Attributes:
        image_max_abs, text_max_abs: largest absolute difference of one component of a unit vector.
        cosine_min: smallest cosine between the two features of one image or prompt.
        top1_agreement: share of images whose best prompt is the same, 0 to 1.
    """

    image_max_abs: float
    text_max_abs: float
    cosine_min: float
    top1_agreement: float

    @property
    def max_abs(self) -> float:
        """The larger of the two towers' differences."""
        return max(self.image_max_abs, self.text_max_abs)


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy on a task's test images among its own class names, in percent; None where unknown.

    Attributes:
        before: of the version served when this one was made; for a new task, just before it was learned.
        after: of this version.
        measured: ``training``: by the trainer, with these weights in float32; ``merge``: by the exporter, with the
            files of both versions.
    """

    task: str
    before: float | None
    after: float | None
    measured: str


@dataclass(frozen=True)
class Agreement:
    """How often a version's best label equals that of the merged weights in PyTorch, in float32.

    Attributes:
        top1: share of images, 0 to 1; a tie in PyTorch counts as agreement.
        images: number of images compared.
    """

    task: str
    top1: float
    images: int


@dataclass(frozen=True)
class Cast:
    """How far a version of lower precision is from PyTorch in float32.

    Attributes:
        parity: on the images and prompts used for every version.
        agreement: of best labels, per task, on labelled images.
    """

    parity: Parity
    agreement: list[Agreement]
