"""The folder of a run: its files, and the record that decides whether a run may be resumed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from clipweld.trainer.config import LABEL_SPACES, MEASURED, LabelSpace
from clipweld.trainer.errors import CheckpointError
from clipweld.trainer.files import replacing
from clipweld.trainer.learning.checkpoint import differences
from clipweld.trainer.learning.evaluate import Accuracies
from clipweld.trainer.schemas import STRICT, Count, Items, Percent, Setting, Sha256, Text, one_line, read_json_file
from clipweld.trainer.sequence.methods import Learned

FINISHED, PROGRESS = "sequence.json", "progress.json"
LEFT_BEHIND = (FINISHED, PROGRESS, "unfinished.safetensors", "adapters", "weights")


@dataclass(frozen=True)
class SequenceResult:
    """How learning ``tasks`` one after another changed the accuracy on ``tested``, in percent.

    Attributes:
        tasks: the learned tasks, in this order.
        tested: columns of the matrix: the learned tasks, then those that were only watched.
        label_space: whether images are classified among the class names of their own task, or of all tested tasks.
        zero_shot: accuracies before anything was learned.
        matrix: row i is the accuracy on every tested task after learning task i; one row if all are learned at once.
        images: number of test images of every tested task.
        class_zero_shot, class_matrix: the same as ``zero_shot`` and ``matrix``, as means over classes. They and
            ``images`` are empty in records of earlier versions.
        transfer, average, last, forgetting: measures over the learned tasks; None if a single row doesn't define them.
    """

    __pydantic_config__: ClassVar[Any] = STRICT

    method: Text
    tasks: Items[Text]
    tested: Items[Text]
    label_space: LabelSpace
    seed: int
    zero_shot: Items[Percent]
    matrix: Items[Items[Percent]]
    transfer: float | None
    average: float
    last: float
    forgetting: float | None
    trainable_parameters: int
    kept_parameters: int
    seconds_per_task: Items[float]
    images: Items[Count] = field(default_factory=list)
    class_zero_shot: Items[Percent] = field(default_factory=list)
    class_matrix: Items[Items[Percent]] = field(default_factory=list)


@dataclass(frozen=True)
class Identity:
    """The identity of a run, which is resumed only if all of this is equal.

    This trainer writes one of its own methods to ``method``, but reports also accept records of other methods.
    """

    __pydantic_config__: ClassVar[Any] = STRICT

    model: Text
    pretrained: Text
    base_fingerprint: Sha256
    method: Text
    tasks: Items[Text]
    watch: Items[Text]
    sources: Items[Text]
    order_seed: int | None
    devices: Count
    precision: Text | None
    config: dict[Text, Setting]


@dataclass(frozen=True)
class Progress(Identity):
    """``progress.json``: a run that isn't finished, with the class names and templates of all its tasks."""

    class_names: dict[Text, Items[Text]]
    templates: dict[Text, Items[Text]]
    zero_shot: Accuracies
    stages: Items[Learned]


@dataclass(frozen=True)
class Finished(Identity):
    """``sequence.json``: a finished run."""

    results: dict[LabelSpace, SequenceResult]


Found = TypeVar("Found", bound=Identity)


def read_record(path: Path, kind: type[Found], wanted: dict[str, Any]) -> Found:
    """Read a run's record.

    Args:
        wanted: the values that the record's fields must have.

    Raises:
        CheckpointError: it can't be read, is incomplete, or belongs to another run.
    """
    try:
        found = read_json_file(kind, path)
        faults = differences({name: getattr(found, name) for name in wanted}, wanted)
        if not faults:
            _check_whole(found)
    except (OSError, ValueError) as exc:
        raise CheckpointError(
            f"{path}: not the record of a run ({one_line(str(exc))}); remove the folder, or give another --out"
        ) from exc
    if faults:
        raise CheckpointError(
            f"{path}: is of a run with {one_line('; '.join(faults))}; give the same settings, or another --out"
        )
    return found


def _check_whole(found: Identity) -> None:
    """Check that a record is complete.

    Raises:
        ValueError: the accuracies of a label space or a task are missing, or there are more stages than the run has.
    """
    if isinstance(found, Finished) and found.results.keys() != set(LABEL_SPACES):
        raise ValueError(f"its results are not of {' and '.join(LABEL_SPACES)}")
    if isinstance(found, Progress):
        tested = {*found.tasks, *found.watch}
        for accuracies in (found.zero_shot, *(stage.accuracies for stage in found.stages)):
            if accuracies.keys() != set(MEASURED) or any(own.keys() != tested for own in accuracies.values()):
                raise ValueError("its accuracies are not those of all tasks in both label spaces")
        if len(found.stages) > (1 if found.method == "joint" else len(found.tasks)):
            raise ValueError(f"{len(found.stages)} stages of {len(found.tasks)} tasks")


def write_record(path: Path, record: Identity) -> None:
    with replacing(path) as staged:
        staged.write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="utf-8")
