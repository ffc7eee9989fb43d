"""The exporter's exceptions.

ExporterError
├── UnsupportedModel        an architecture, tokenizer or resize mode that can't be served faithfully
├── ParityError
│   ├── AnswersDiffer       ONNX Runtime and PyTorch disagree
│   ├── NotFinite           a weight or an answer is NaN, infinite, or no unit vector
│   └── GraphsDiffer        merged and base differ in more than weights
├── GateClosed              a version is worse than the limits allow
├── RepositoryError
│   ├── RepositoryEmpty     nothing to serve
│   ├── RepositoryBusy      another exporter is writing
│   ├── OtherBase           the repository holds versions of other base weights
│   ├── ConfigChanged       a new config.pbtxt would differ from the existing one
│   ├── VersionMissing      the store has no such version
│   ├── StoreMissing        versions are served but their store is missing
│   ├── ForeignFiles        files that clipweld did not write are in the way
│   ├── VersionDamaged      a file differs from its manifest entry
│   └── NothingToRollBackTo no version was served earlier
├── CheckpointError         a checkpoint for another library can't be written
└── TritonError
    ├── ServerUnreachable   no model control answers at an address
    ├── PromotionFailed     a server could not load a version; the previous one is still served
    ├── TritonMissing       no tritonserver on this machine, or no Python that can run one
    ├── InstallationFailed  the server's environment could not be made
    ├── PortTaken           another process listens on a port
    ├── TritonFailed        Triton did not start, or exited
    ├── ModelNotLoaded      Triton refused to load a model
    └── CommandMissing      the command to run beside the server does not exist

Every message says what, which object, expected, got, and the next step, in one line.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clipweld.exporter.results import Accuracy, Agreement


class ExporterError(Exception):
    """Base class of all exporter errors."""


class UnsupportedModel(ExporterError):
    """An architecture, tokenizer or resize mode that can't be served faithfully."""


class ParityError(ExporterError):
    """A version that fails its numerical checks."""


class AnswersDiffer(ParityError):
    """ONNX Runtime and PyTorch disagree on real images and prompts."""


class NotFinite(ParityError):
    """A weight or an answer is NaN, infinite, or beyond its precision."""


class GraphsDiffer(ParityError):
    """Merged and base differ in more than the values of their weights."""


class GateClosed(ExporterError):
    """A version is worse than the limits allow.

    Attributes:
        accuracies, agreements: the measurements.
    """

    def __init__(self, message: str, accuracies: Sequence[Accuracy], agreements: Sequence[Agreement]) -> None:
        super().__init__(message, accuracies, agreements)  # pickle and copy call the class with args
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
    """The config.pbtxt of a new version would differ from the existing one."""


class VersionMissing(RepositoryError):
    """The store has no such version."""


class StoreMissing(RepositoryError):
    """Versions are served but their store is missing."""


class ForeignFiles(RepositoryError):
    """A file that clipweld did not write would be deleted, or served as a version."""


class VersionDamaged(RepositoryError):
    """A version's file is missing, or differs from its manifest entry."""


class NothingToRollBackTo(RepositoryError):
    """The current version is the first that was ever served."""


class CheckpointError(ExporterError):
    """A checkpoint for another library can't be written."""


class TritonError(ExporterError):
    """Base class of errors about servers."""


class ServerUnreachable(TritonError):
    """No model control answers at an address."""


class PromotionFailed(TritonError):
    """A server could not load a version; the previous one is still served."""


class TritonMissing(TritonError):
    """No tritonserver on this machine, or no Python that can run one."""


class InstallationFailed(TritonError):
    """The server's environment could not be made."""


class PortTaken(TritonError):
    """Another process listens on the port."""


class TritonFailed(TritonError):
    """Triton did not start, or exited."""


class ModelNotLoaded(TritonError):
    """Triton refused to load a model."""


class CommandMissing(TritonError):
    """The command to run beside the server does not exist."""
