"""Write files whole or not at all, and refuse early what could not be written later."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from clipweld.trainer.errors import OutputError, TrainerError
from clipweld.trainer.os_errors import cause, next_step


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside ``path`` to write to. The file replaces ``path`` if the block succeeds, else it is removed.

    A killed process leaves a single hidden file behind, which the next write to the same path overwrites.

    Raises:
        OutputError: it can't be written; ``path`` is unchanged.
    """
    staged = path.with_name(f".{path.name}.tmp")
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield staged
            with staged.open("rb") as written:
                os.fsync(written.fileno())
            staged.replace(path)
        except BaseException:
            with suppress(OSError):
                staged.unlink()
            raise


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's errors on writing to ``path`` into OutputError.

    Raises:
        OutputError: instead of any OSError.
    """
    try:
        yield
    except OSError as exc:
        raise OutputError(
            f"{path}: can't be written ({cause(exc, path)}); {next_step(exc)}, or give a place that can be written"
        ) from exc


def check_surroundings(arguments: Sequence[str]) -> None:
    """Refuse to start in surroundings where libraries would fail, each with its own traceback.

    Args:
        arguments: the command line; what follows ``--`` is for another program, and not checked.

    Raises:
        TrainerError: the working folder is gone, no folder for temporary files can be written, or a name is not valid
            UTF-8, which torch, ONNX Runtime and safetensors require.
    """
    try:
        here = os.getcwd()
    except FileNotFoundError as exc:
        raise TrainerError("the working folder has been deleted; change to another one") from exc
    try:
        tempfile.gettempdir()
    except FileNotFoundError as exc:
        raise TrainerError(
            "temporary files: no folder for them can be written, neither /tmp nor this one; set TMPDIR to one that can"
        ) from exc
    for text in (*itertools.takewhile(lambda argument: argument != "--", arguments), here):
        try:
            text.encode()
        except UnicodeEncodeError as exc:
            raise TrainerError(f"{text}: this name is not valid UTF-8; rename it") from exc


def check_writable(folder: Path) -> None:
    """Check now that a folder can be written, rather than fail after hours.

    Raises:
        OutputError: a small file can't be written to the folder, or to the one in which it would be created.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    with output_errors(folder), tempfile.TemporaryFile(dir=there) as file:
        file.write(b"-")
