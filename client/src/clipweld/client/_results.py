"""Results of the client's calls."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Prediction:
    """One label of one image.

    Attributes:
        label: the label, as the caller or the task spells it.
        probability: softmax over all labels of the call, in [0, 1].
        score: cosine between image and label features, in [-1, 1]; comparable between calls.
    """

    label: str
    probability: float
    score: float

    def __str__(self) -> str:
        return f"{self.label} {self.probability:.1%}"


@dataclass(frozen=True)
class Classification:
    """The best labels of one image, best first.

    Attributes:
        image: the image's path, or its place in the call, counted from 0.
        predictions: at most ``top_k`` labels, most probable first.
        version: the model version that both image and label features came from.

    Iterating over it yields its predictions.
    """

    image: str
    predictions: tuple[Prediction, ...]
    version: int

    @property
    def best(self) -> Prediction:
        """The most probable label."""
        return self.predictions[0]

    def __iter__(self) -> Iterator[Prediction]:
        return iter(self.predictions)

    def __str__(self) -> str:
        return ", ".join(map(str, self.predictions))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types: {"image", "version", "predictions": [{"label", "probability", "score"}, ...]}."""
        return {
            "image": self.image,
            "version": self.version,
            "predictions": [asdict(prediction) for prediction in self.predictions],
        }


@dataclass(frozen=True)
class ServerInfo:
    """The server at an address.

    Attributes:
        name: name of the server, such as "triton".
        version: version of the server.
        extensions: the extensions of the inference protocol that it supports.
    """

    name: str
    version: str
    extensions: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types: {"name", "version", "extensions"}."""
        return {"name": self.name, "version": self.version, "extensions": list(self.extensions)}
