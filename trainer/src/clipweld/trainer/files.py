"""Files that appear whole or not at all."""

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
    """A file beside ``path`` to write to: it takes the place of ``path`` when the block ends well, else it is removed.

    What a killed process leaves behind is one hidden file, which the next write of the same path overwrites.

    Raises:
        OutputError: it can't be written; ``path`` is what it was.
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
    """What the operating system has against writing to ``path``, as an error of ours.

    Raises:
        OutputError: in place of any OSError.
    """
    try:
        yield
    except OSError as exc:
        raise OutputError(
            f"{path}: can't be written ({cause(exc, path)}); {next_step(exc)}, or give a place that can be written"
        ) from exc


def check_surroundings(arguments: Sequence[str]) -> None:
    """Refuse to start where the libraries below would fail, each with a traceback of its own.

    Args:
        arguments: of the command line; what follows ``--`` is another program's.

    Raises:
        TrainerError: the working folder is gone, there is nowhere for temporary files, or a name is not UTF-8, which
            is all that torch, ONNX Runtime and safetensors take.
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
    """Refuse now what could not be written after hours.

    Raises:
        OutputError: not even a small file can be written to the folder, or where it would be made.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    with output_errors(folder), tempfile.TemporaryFile(dir=there) as file:
        file.write(b"-")
