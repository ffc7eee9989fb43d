"""The folder that adapters are kept in: which of its files are adapters, and one writer at a time."""

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
    """Prove that a folder that was named to be read is there: a slip would have the base alone taken for its adapters.

    Raises:
        AdapterError: says what is there instead.
    """
    if not folder.is_dir():
        found = "not a folder" if os.path.lexists(folder) else "no such folder"
        raise AdapterError(f"adapters folder {folder}: {found}; give the one that trainer fit wrote to")


def adapter_files(folder: Path) -> list[Path]:
    """The adapters of a folder, by name: what ends in ``.safetensors``, in capitals too, and isn't hidden.

    Returns:
        their paths; none of an absent folder.

    Raises:
        AdapterError: the folder can't be read, or what is called like an adapter is none: a folder, a broken link.
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
    """Refuse to learn a task into a folder that has no place for its adapter. Reads headers alone, without torch.

    Raises:
        TaskAlreadyLearned: the folder has an adapter of the task.
        AdapterError: another task's adapter has the name that this one's would get.
    """
    learned = {path: _task_of(path) for path in adapter_files(folder)}
    # With unfinished training beside it, ``learn_into`` proves the adapter whole, removes that, and says the same.
    if not (folder / f".{task}.unfinished").exists():
        check_new(task, learned.values())
    path = folder / f"{task}{SUFFIX}"
    if other := learned.get(path):
        check_name(path, other, task)


def check_new(task: str, learned: Iterable[str | None]) -> None:
    """Prove that a task is none of those that were learned before.

    Raises:
        TaskAlreadyLearned: it is.
    """
    if task in learned:
        raise TaskAlreadyLearned(
            f"task {task!r} was learned already; give another --adapters folder, or remove its adapter and those "
            "learned after it"
        )


def check_name(path: Path, other: str, task: str) -> None:
    """Prove that a file may be replaced by the adapter of a task.

    Args:
        other: the task whose adapter it is.

    Raises:
        AdapterError: that is another task.
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
    """Raises:
    AdapterError: there is no regular file; says what is there.
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
    """Keep other commands that write to a folder out of it until the block ends.

    The folder is made where it is absent, and removed again if the block left nothing there. The lock is the system's:
    it ends with the process, whatever ends that.

    Raises:
        FolderBusy: another command holds it.
        OutputError: it can't be made.
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
            pass  # some network file systems have no locks; adapters are compared again before one is saved
        yield
    finally:
        os.close(lock)
        if made:
            with suppress(OSError):
                folder.rmdir()
