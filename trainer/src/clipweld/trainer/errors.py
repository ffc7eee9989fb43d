"""The trainer's errors.

TrainerError
├── ConfigError             settings that contradict each other; names all of them at once
├── ModelError
│   ├── UnknownModel        no open_clip model of this name
│   ├── UnsupportedModel    an architecture whose layers take no expert pools
│   └── WeightsError        the weights can't be found or read, or don't fit the model
├── TaskError
│   ├── UnknownTask         no task of this name
│   ├── TaskDataMissing     the task is known, its images are not here
│   ├── TaskInvalid         the images are here but make no classification task
│   ├── TaskAlreadyLearned  an adapter of this task is in the lineage
│   └── UnreadableImage
├── CheckpointError         interrupted training that can't be resumed
├── NotFinite               NaN or infinity in weights, features or a loss
├── AdapterError
│   ├── AdapterCorrupt      truncated, tampered with, or not an adapter
│   ├── WrongBase           trained on other base weights
│   └── BrokenChain         trained on top of other adapters
├── ReportError             no runs to report on, or a record that can't be read
├── FolderBusy              another command writes to the folder
├── OutputError             a file that can't be written
└── BenchError              two training steps to compare don't compute the same

Every message is one line: what went wrong, with which object, what was expected, what was found, and the next step.
"""


class TrainerError(Exception):
    """Base of every error that a user of the trainer can meet."""


class ConfigError(TrainerError):
    """Settings that contradict each other."""


class ModelError(TrainerError):
    """The backbone can't be loaded."""


class UnknownModel(ModelError):
    """No open_clip model of this name."""


class UnsupportedModel(ModelError):
    """An architecture whose layers take no expert pools."""


class WeightsError(ModelError):
    """The weights can't be found or read, or don't fit the model."""


class TaskError(TrainerError):
    """The task can't be used."""


class UnknownTask(TaskError):
    """No task of this name."""


class TaskDataMissing(TaskError):
    """The task is known, its images are not here."""


class TaskInvalid(TaskError):
    """The images are here but make no classification task."""


class TaskAlreadyLearned(TaskError):
    """An adapter of this task is in the lineage."""


class UnreadableImage(TaskError):
    """An image file that can't be decoded."""


class CheckpointError(TrainerError):
    """Interrupted training that can't be resumed."""


class NotFinite(TrainerError):
    """NaN or infinity in weights, features or a loss."""


class AdapterError(TrainerError):
    """The adapter can't be used."""


class AdapterCorrupt(AdapterError):
    """Truncated, tampered with, or not an adapter."""


class WrongBase(AdapterError):
    """Trained on other base weights."""


class BrokenChain(AdapterError):
    """Trained on top of other adapters than those found."""


class ReportError(TrainerError):
    """No runs to report on, or a record that can't be read."""


class FolderBusy(TrainerError):
    """Another command writes to the folder."""


class OutputError(TrainerError):
    """A file that can't be written."""


class BenchError(TrainerError):
    """Two training steps to compare don't compute the same."""
