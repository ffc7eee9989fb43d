"""What can go wrong between adapters and a served model, as one family.

ExporterError
├── UnsupportedModel        an architecture, tokenizer or resize mode that can't be served faithfully
├── ParityError
│   ├── AnswersDiffer       ONNX Runtime and PyTorch disagree
│   ├── NotFinite           a weight or an answer is NaN, infinite, or no unit vector
│   └── GraphsDiffer        merged and base differ in more than weights
├── GateClosed              a version is worse than was allowed
├── RepositoryError
│   ├── RepositoryEmpty     nothing to serve
│   ├── RepositoryBusy      another exporter is writing
│   ├── OtherBase           versions of other base weights are there
│   ├── ConfigChanged       a new config.pbtxt would differ from the one there
│   ├── VersionMissing      the store has no such version
│   ├── StoreMissing        versions are served and their store is not there
│   ├── ForeignFiles        what clipweld did not write is in the way
│   ├── VersionDamaged      a file is not what the manifest says
│   └── NothingToRollBackTo no version was served before
├── CheckpointError         nothing to write for another library, or no place to
└── TritonError
    ├── ServerUnreachable   no model control at an address
    ├── PromotionFailed     a server could not load a version; it serves what it served
    ├── TritonMissing       no tritonserver here
    ├── PortTaken
    ├── TritonFailed        did not start, or died
    ├── ModelNotLoaded      Triton's reason for not loading a model
    └── CommandMissing      the command to run beside it does not exist

Every message says what, which object, expected, got, and the next step, in one line.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clipweld.exporter.results import Accuracy, Agreement


class ExporterError(Exception):
    """Base of every error that a user of the exporter can meet."""


class UnsupportedModel(ExporterError):
    """An architecture, tokenizer or resize mode that can't be served faithfully."""


class ParityError(ExporterError):
    """A version that must not count."""


class AnswersDiffer(ParityError):
    """ONNX Runtime and PyTorch disagree on real images and prompts."""


class NotFinite(ParityError):
    """A weight or an answer is NaN, infinite, or beyond its precision."""


class GraphsDiffer(ParityError):
    """Merged and base differ in more than the values of their weights."""


class GateClosed(ExporterError):
    """A version is worse than was allowed.

    Attributes:
        accuracies, agreements: what was measured, for a table.
    """

    def __init__(self, message: str, accuracies: Sequence[Accuracy], agreements: Sequence[Agreement]) -> None:
        super().__init__(message, accuracies, agreements)  # as a copy, or another process, makes it again
        self.accuracies, self.agreements = accuracies, agreements

    def __str__(self) -> str:
        return str(self.args[0])


class RepositoryError(ExporterError):
    """The model repository can't be used."""


class RepositoryEmpty(RepositoryError):
    """No version to serve."""


class RepositoryBusy(RepositoryError):
    """Another exporter is writing to it."""


class OtherBase(RepositoryError):
    """Its version 1 holds other base weights."""


class ConfigChanged(RepositoryError):
    """The config.pbtxt of a new version would differ from the one there."""


class VersionMissing(RepositoryError):
    """The store has no such version."""


class StoreMissing(RepositoryError):
    """Versions are served and their store is not there."""


class ForeignFiles(RepositoryError):
    """Something that clipweld did not write is in the way: it would be deleted, or be served for a version."""


class VersionDamaged(RepositoryError):
    """A version's file is missing, or not what its manifest says."""


class NothingToRollBackTo(RepositoryError):
    """The version served now is the first that was."""


class CheckpointError(ExporterError):
    """The open_clip checkpoint can't be written."""


class TritonError(ExporterError):
    """No server."""


class ServerUnreachable(TritonError):
    """No model control answers at an address."""


class PromotionFailed(TritonError):
    """A server could not load a version; it serves what it served before."""


class TritonMissing(TritonError):
    """No tritonserver here."""


class PortTaken(TritonError):
    """Another process listens there."""


class TritonFailed(TritonError):
    """Triton did not start, or died."""


class ModelNotLoaded(TritonError):
    """Triton's reason for not loading a model."""


class CommandMissing(TritonError):
    """The command to run beside the server does not exist."""
