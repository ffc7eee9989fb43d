"""Tasks that can be learned: the small shipped ones, the eleven of MTIL, and any folder of images."""

from __future__ import annotations

import difflib
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from clipweld.trainer.errors import ConfigError, TaskDataMissing, TaskError, TaskInvalid, UnknownTask
from clipweld.trainer.schemas import one_line
from clipweld.trainer.tasks import folder, shipped
from clipweld.trainer.tasks.lists import LISTS, MTIL
from clipweld.trainer.tasks.prompts import check_prompts
from clipweld.trainer.tasks.split import untouched, validation
from clipweld.trainer.tasks.summary import Summary, summarise
from clipweld.trainer.tasks.task import Images, Task, skip_unreadable

if TYPE_CHECKING:
    from clipweld.trainer.adapters.adapter import Adapter

__all__ = [
    "Availability",
    "Images",
    "Summary",
    "Task",
    "as_learned",
    "catalogue",
    "check_distinct",
    "check_prompts",
    "find_learned",
    "load_task",
    "load_tasks",
    "sample",
    "shipped_tasks",
    "skip_unreadable",
    "summarise",
    "task_lists",
    "untouched",
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
    """Load a task by its name, or from a folder of images.

    Args:
        name: a shipped task, one of MTIL's, or the path of a folder (an existing folder, or a text with a path
            separator); ``NAME=FOLDER`` loads a folder under another name.
        data: folder that holds MTIL's data sets.
        download: whether to download a missing data set, if torchvision still can.
        rename: name for the task of a folder; by default the folder's.
        templates: prompt templates for the task of a folder.

    Raises:
        UnknownTask: there is no such task or folder; the message lists similar names.
        TaskInvalid: the folder doesn't make a valid task, or ``rename`` or ``templates`` was given for a named task.
        TaskDataMissing: the task is known but its images are missing, or there is no such folder.
    """
    if name in (*shipped.names(), *MTIL):
        if rename is not None or templates:
            raise TaskInvalid(
                f"task {name!r}: its name and templates are its own; --name and --template are for folders"
            )
        return shipped.load(name) if name in shipped.names() else _benchmark(name, data, download)
    if name and (os.path.isdir(name) or (os.sep in name and "=" not in name)):
        return folder.load(Path(name), rename, templates)
    new_name, equals, place = name.partition("=")
    if equals and new_name and place:
        if rename is not None:
            raise TaskInvalid(
                f"task folder {one_line(place)}: named both {one_line(new_name)!r} and {rename!r}; name it once"
            )
        return folder.load(Path(place), new_name, templates)
    known = (*shipped.names(), *MTIL)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    what = f"{name!r} is a file, no task" if os.path.isfile(name) else f"unknown task {one_line(name)!r}"
    raise UnknownTask(
        f"{what}; {'near names: ' + ', '.join(near) if near else 'known: ' + ', '.join(known)}; "
        "or give the path of a folder of images"
    )


def _benchmark(name: str, data: Path, download: bool) -> Task:
    """Load one of MTIL's tasks.

    Raises:
        TaskDataMissing: the data set is missing; the message says how to get it, or how to load a folder here that has
            the same name.
    """
    from clipweld.trainer.tasks import mtil  # imports torchvision, and with it torch

    try:
        return mtil.load(name, data, download)
    except TaskDataMissing as exc:
        if not os.path.isdir(name):
            raise
        raise TaskDataMissing(f"{exc}; for the folder of that name here give .{os.sep}{name}") from exc


def find_learned(adapter: Adapter, data: Path = DATA) -> Task | None:
    """Return the task that an adapter learned, if its images can be found; an adapter records the path of a folder.

    The adapter may be untrusted: the images in the folder that it names are listed only if the folder's class names are
    the adapter's.
    """
    source, known = adapter.config.get("source"), {*shipped.names(), *MTIL}
    for reference in filter(None, (source if isinstance(source, str) else None, adapter.task)):
        try:
            if reference in known:
                task = load_task(reference, data)
            elif os.path.isdir(reference) and folder.class_names(Path(reference)) == adapter.class_names:
                task = folder.load(Path(reference), adapter.task, adapter.templates)
            else:
                continue
        except (TaskError, OSError, ValueError):  # the last two: the reference is not a valid path
            continue
        if task.class_names == adapter.class_names:
            return task
    return None


def as_learned(task: Task, lineage: Sequence[Adapter]) -> Task:
    """Return the task with the templates that it was learned with, if the lineage has it: they are served, too."""
    for adapter in lineage:
        if (adapter.task, adapter.class_names) == (task.name, task.class_names):
            return replace(task, templates=adapter.templates)
    return task


def load_tasks(names: Sequence[str], data: Path = DATA, *, download: bool = False) -> list[Task]:
    """Load the tasks of several names; the name of a list of tasks expands to all of its tasks, in their order.

    Raises:
        ConfigError: two tasks have the same name.
    """
    single = [name for given in names for name in task_lists().get(given, (given,))]
    tasks = [load_task(name, data, download=download) for name in single]
    check_distinct(tasks)
    return tasks


def check_distinct(tasks: Sequence[Task]) -> None:
    """Check that all names differ, because results are stored by name.

    Raises:
        ConfigError: two tasks have the same name; lists all tasks, and the sources of the two.
    """
    sources = defaultdict(list)
    for task in tasks:
        sources[task.name].append(task.source)
    for name, own in sources.items():
        if len(own) > 1:
            raise ConfigError(
                f"a task is listed twice in: {' '.join(task.name for task in tasks)}; {name!r} is "
                f"{' and '.join(own)}: name each once; a folder of images gets another name as NAME=FOLDER"
            )


def shipped_tasks() -> list[Task]:
    """Load the six small tasks of the list ``mini``, which need no download."""
    return [shipped.load(name) for name in shipped.lists()["mini"]]


def task_lists() -> dict[str, tuple[str, ...]]:
    """Return the lists of tasks by name: ``mini`` and ``mini-unseen``, MTIL's two orders, and X-TAIL's tasks."""
    return {**shipped.lists(), **LISTS}


@dataclass(frozen=True)
class Availability:
    """Whether a task can be learned here.

    Attributes:
        classes, train, test: numbers of classes and of images in each split; 0 if data is missing.
        source: where the images come from, or where they are expected.
        missing: how to get the missing data; empty if nothing is missing.
    """

    name: str
    classes: int
    train: int
    test: int
    source: str
    missing: str


def catalogue(data: Path = DATA) -> list[Availability]:
    """Return all known tasks, whether or not they can be learned here."""
    return [_availability(name, data) for name in (*shipped.names(), *MTIL)]


def _availability(name: str, data: Path) -> Availability:
    try:
        task = load_task(name, data)
    except TaskDataMissing:
        from clipweld.trainer.tasks import mtil

        step = "provide the folder, its download is dead" if mtil.SOURCES[name].dead else "--download fetches it"
        return Availability(name, 0, 0, 0, str(data / mtil.SOURCES[name].folder), step)
    return Availability(name, len(task.class_names), len(task.load("train")), len(task.load("test")), task.source, "")


def sample(count: int) -> tuple[list[Image.Image], list[str]]:
    """Return ``count`` test images, from ``mini``'s tasks in turn, and prompts of all their classes, for checks."""
    tasks = shipped_tasks()
    tests = [task.load("test") for task in tasks]
    images = [tests[i % len(tests)][(i // len(tests)) * 7 % len(tests[i % len(tests)])][0] for i in range(count)]
    prompts = [prompt for task in tasks for prompt in task.prompts()]
    return images, prompts
