"""Learning a task into a folder of adapters, without losing any that others save there meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lightning_fabric import Fabric

from clipweld.trainer.adapters.adapter import Adapter, check_place, check_unchanged, save_adapter
from clipweld.trainer.adapters.folder import SUFFIX
from clipweld.trainer.base.backbone import Backbone
from clipweld.trainer.config import TrainConfig
from clipweld.trainer.errors import AdapterError
from clipweld.trainer.files import check_writable, output_errors
from clipweld.trainer.learning.fit import Fitted, Step, fit
from clipweld.trainer.tasks import Task


def adapter_path(folder: Path, task: str) -> Path:
    """Return the path of a task's adapter."""
    return folder / f"{task}{SUFFIX}"


def learn_into(
    folder: Path,
    task: Task,
    base: Backbone,
    lineage: Sequence[Adapter],
    config: TrainConfig,
    *,
    test_on: Sequence[Task],
    fabric: Fabric,
    resume: bool,
    on_step: Callable[[Step], None],
) -> Fitted:
    """Learn a task on top of a folder's adapters, and save its adapter there.

    Unfinished training is saved as ``.<task>.unfinished`` in the folder.

    Args:
        folder: the folder of adapters, locked by the caller (``clipweld.trainer.adapters.folder.held``).
        task: the task to learn.
        base: the base model, on the fabric's device.
        lineage: the folder's adapters, from ``load_lineage``.
        config: the training settings.
        test_on, fabric, resume, on_step: as for ``fit``; only the fabric's first process writes.

    Raises:
        AdapterError: another task's adapter has the file's name; or the folder changed during training, and the new
            adapter is saved there as a hidden file.
        OutputError: the folder can't be written to.
        Others: those of ``fit``.
    """
    path, unfinished = adapter_path(folder, task.name), folder / f".{task.name}.unfinished"
    check_place(path, task.name)
    check_writable(folder)
    if path.is_file():  # a valid one: training was killed before it removed its checkpoint
        unfinished.unlink(missing_ok=True)
    fitted = fit(
        task, base, lineage, config, test_on=test_on, fabric=fabric, unfinished=unfinished, resume=resume,
        on_step=on_step,
    )  # fmt: skip
    if fabric.is_global_zero:
        _check_or_keep_aside(folder, lineage, fitted.adapter)
        save_adapter(fitted.adapter, path)
        with output_errors(unfinished):
            unfinished.unlink(missing_ok=True)
    return fitted


def _check_or_keep_aside(folder: Path, lineage: Sequence[Adapter], adapter: Adapter) -> None:
    """Check that the folder has not changed; otherwise save the adapter as a hidden file, which no command reads.

    Raises:
        AdapterError: the folder no longer holds the adapters that the new one was learned on top of.
    """
    try:
        check_unchanged(folder, lineage)
    except AdapterError as exc:
        aside = folder / f".{adapter.task}{SUFFIX}"
        save_adapter(adapter, aside)
        raise type(exc)(
            f"{exc}; the new adapter is kept as {aside}: put the folder right and rename it to {adapter.task}{SUFFIX}, "
            f"or fit {adapter.task!r} again"
        ) from exc
