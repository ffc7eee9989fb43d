"""The readers of untrusted files, each with valid files to corrupt."""

from evidence.trust.readers.adapters import Adapters, Names, tiny_adapter
from evidence.trust.readers.reader import REFUSALS, OtherMeaning, Reader, reader
from evidence.trust.readers.repositories import Cards, Histories, Manifests, Models
from evidence.trust.readers.results import Results
from evidence.trust.readers.training import Checkpoints, Folders, Runs, Weights

READERS: dict[str, type[Reader]] = {
    "adapters": Adapters, "manifests": Manifests, "histories": Histories, "cards": Cards, "models": Models,
    "names": Names, "checkpoints": Checkpoints, "runs": Runs, "results": Results, "weights": Weights,
    "folders": Folders,
}  # fmt: skip

__all__ = [
    "READERS", "REFUSALS", "Adapters", "Folders", "Manifests", "Models", "OtherMeaning", "Reader", "reader",
    "tiny_adapter",
]  # fmt: skip
