"""The folder of adapters: which of its files are adapters, and a lock for its only writer."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from clipweld.trainer.errors import AdapterError, FolderBusy, TaskAlreadyLearned
from clipweld.trainer.files import output_errors
from clipweld.trainer.header import read_claims
from clipweld.trainer.schemas import printable

SUFFIX = ".safetensors"


def check_named(folder: Path) -> None:
    """Check that a folder to read exists, because a typo would otherwise give the base without adapters.

    Raises:
        AdapterError: there is no such folder.
    """
    if not folder.is_dir():
        found = "not a folder" if os.path.lexists(folder) else "no such folder"
        raise AdapterError(f"adapters folder {folder}: {found}; give the one that trainer fit wrote to")


def adapter_files(folder: Path) -> list[Path]:
    """List the adapters of a folder: all files ending in ``.safetensors``, in any case, that aren't hidden.

    Returns:
        their paths, sorted; an empty list for a missing folder.

    Raises:
        AdapterError: the folder can't be read, or something with an adapter's name is no file, but a folder or a broken
            link.
    """
    try:
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() == SUFFIX and path.name[0] != ".")
    except FileNotFoundError:
        return []
    except OSError as exc:
        raise AdapterError(f"adapters folder {folder}: can't be read ({exc.strerror}); give a folder that can") from exc
    for path in files:
        check_file(path)
    return files


def check_free(folder: Path, task: str) -> None:
    """Check that a task can be learned into a folder. Only headers are read, without torch.

    Raises:
        TaskAlreadyLearned: the folder has an adapter of the task.
        AdapterError: another task's adapter has the file name of this one's.
    """
    learned = {path: _task_of(path) for path in adapter_files(folder)}
    # If there is unfinished training too, ``learn_into`` first verifies the adapter and removes the checkpoint, then
    # raises the same error.
    if not (folder / f".{task}.unfinished").exists():
        check_new(task, learned.values())
    path = folder / f"{task}{SUFFIX}"
    if other := learned.get(path):
        check_name(path, other, task)


def check_new(task: str, learned: Iterable[str | None]) -> None:
    """Check that a task has not been learned before.

    Raises:
        TaskAlreadyLearned: it has.
    """
    if task in learned:
        raise TaskAlreadyLearned(
            f"task {task!r} was learned already; give another --adapters folder, or remove its adapter and those "
            "learned after it"
        )


def check_name(path: Path, other: str, task: str) -> None:
    """Check that a file may be replaced by the adapter of a task.

    Args:
        path: the file.
        other: the task of the adapter in it.
        task: the task of the new adapter.

    Raises:
        AdapterError: they are different tasks.
    """
    if other != task:
        raise AdapterError(
            f"adapter {path}: is that of task {other!r}, and that of {task!r} would take its place; rename the file "
            f"(to {other}{SUFFIX}), or learn {task!r} under another name"
        )


def _task_of(path: Path) -> str | None:
    try:
        return printable((read_claims(path) or {})["task"])
    except (KeyError, TypeError, ValueError):
        return None


def check_file(path: Path) -> None:
    """Check that a path is a regular file.

    Raises:
        AdapterError: it is not; says what is there.
    """
    if path.is_file():
        return
    if path.is_symlink():
        found = f"is a link to {os.readlink(path)}, which is no file here; restore that, or remove the link"
    elif path.is_dir():
        found = "is a folder, expected a file; move it elsewhere"
    elif path.exists():
        found = "is not a regular file; move it elsewhere"
    else:
        found = "no such file; trainer fit writes adapters"
    raise AdapterError(f"adapter {path}: {found}")


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Lock a folder against other commands that write to it until the block ends.

    A missing folder is created, and removed again if the block leaves it empty. The operating system releases the lock
    when the process ends, even if it is killed.

    Raises:
        FolderBusy: another command holds the lock.
        OutputError: the folder can't be created.
    """
    made = not folder.is_dir()
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise FolderBusy(
                f"{folder}: another trainer is learning into it; wait until it has finished, or give another folder"
            ) from exc
        except OSError:
            pass  # some network file systems have no locks; ``check_unchanged`` runs before an adapter is saved
        yield
    finally:
        os.close(lock)
        if made:
            with suppress(OSError):
                folder.rmdir()
