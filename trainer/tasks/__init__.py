"""What can be learned: the small tasks that ship, the eleven of MTIL, and a user's own folder of images."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from trainer.errors import TaskDataMissing, TaskError, UnknownTask
from trainer.tasks import folder, shipped
from trainer.tasks.lists import LISTS, MTIL
from trainer.tasks.split import validation
from trainer.tasks.task import Images, Task, skip_unreadable

if TYPE_CHECKING:
    from trainer.adapter import Adapter

__all__ = [
    "Availability",
    "Images",
    "Task",
    "catalogue",
    "find_learned",
    "load_task",
    "load_tasks",
    "sample",
    "shipped_tasks",
    "skip_unreadable",
    "task_lists",
    "validation",
]

DATA = Path("data")


def load_task(
    name: str,
    data: Path = DATA,
    *,
    download: bool = False,
    rename: str | None = None,
    templates: tuple[str, ...] = (),
) -> Task:
    """The task of a name, or of a folder of images.

    Args:
        name: a shipped task, one of MTIL's, or the path of a folder (anything with a separator, or a folder here).
        data: where MTIL's data sets lie.
        download: fetch what is missing, where torchvision still can.
        rename, templates: what to call a folder's task, and its prompts.

    Raises:
        UnknownTask: neither a name nor a folder; gives near names.
        TaskDataMissing: known, but its images are not here.
    """
    if name in shipped.names():
        return shipped.load(name)
    if name in MTIL:
        from trainer.tasks import mtil  # and torchvision, which imports torch

        return mtil.load(name, data, download)
    if Path(name).is_dir() or os.sep in name:
        return folder.load(Path(name), rename, templates)
    known = (*shipped.names(), *MTIL)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    raise UnknownTask(
        f"unknown task {name!r}; {'near names: ' + ', '.join(near) if near else 'known: ' + ', '.join(known)}; "
        "or give the path of a folder of images"
    )


def find_learned(adapter: Adapter, data: Path = DATA) -> Task | None:
    """The task of an adapter, if its images are still to be found; a folder's task remembers its folder.

    The adapter may come from anyone: below the folder that it names nothing is looked at unless the class folders there
    are its own.
    """
    source, known = adapter.config.get("source"), {*shipped.names(), *MTIL}
    for reference in filter(None, (source if isinstance(source, str) else None, adapter.task)):
        try:
            is_folder = reference not in known and Path(reference).is_dir()
            if is_folder and folder.class_names(Path(reference)) != adapter.class_names:
                continue
            task = load_task(reference, data, rename=adapter.task, templates=adapter.templates)
        except (TaskError, OSError, ValueError):  # a name that no folder can have raises the last two
            continue
        if task.class_names == adapter.class_names:
            return task
    return None


def load_tasks(names: Sequence[str], data: Path = DATA, *, download: bool = False) -> list[Task]:
    """The tasks of several names; the name of a list of tasks stands for all of its tasks, in their order."""
    single = [name for given in names for name in task_lists().get(given, (given,))]
    return [load_task(name, data, download=download) for name in single]


def shipped_tasks() -> list[Task]:
    """The small ones that need no download."""
    return [shipped.load(name) for name in shipped.names()]


def task_lists() -> dict[str, tuple[str, ...]]:
    """Names that stand for several tasks: ``mini``, the shipped ones; MTIL's two orders, and X-TAIL's."""
    return {"mini": shipped.names(), **LISTS}


@dataclass(frozen=True)
class Availability:
    """Whether a task can be learned here: ``missing`` says what is not, and how to get it; it is empty when all is."""

    name: str
    classes: int
    train: int
    test: int
    source: str
    missing: str


def catalogue(data: Path = DATA) -> list[Availability]:
    """Every known task, learnable here or not."""
    return [_availability(name, data) for name in (*shipped.names(), *MTIL)]


def _availability(name: str, data: Path) -> Availability:
    try:
        task = load_task(name, data)
    except TaskDataMissing:
        from trainer.tasks import mtil

        step = "provide the folder, its download is dead" if mtil.SOURCES[name].dead else "--download fetches it"
        return Availability(name, 0, 0, 0, str(data / mtil.SOURCES[name].folder), step)
    return Availability(name, len(task.class_names), len(task.load("train")), len(task.load("test")), task.source, "")


def sample(count: int) -> tuple[list[Image.Image], list[str]]:
    """Real images of the shipped tasks, in turn, and prompts of all their classes: what a check can run on."""
    tasks = shipped_tasks()
    tests = [task.load("test") for task in tasks]
    images = [tests[i % len(tests)][(i // len(tests)) * 7 % len(tests[i % len(tests)])][0] for i in range(count)]
    prompts = [prompt for task in tasks for prompt in task.prompts()]
    return images, prompts
