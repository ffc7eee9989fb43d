"""Standard streams for the command lines, wherever they lead: to a file, a pipe, a full disk, or nowhere."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from rich.console import Console

from clipweld.trainer.errors import OutputError
from clipweld.trainer.os_errors import next_step

NARROWEST = 40  # columns


class _Output(io.TextIOWrapper):
    """Standard output whose failures can be distinguished from all others."""

    def write(self, text: str) -> int:
        with self._errors():
            return super().write(text)

    def flush(self) -> None:
        with self._errors():
            super().flush()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            _to_nowhere(self.fileno())
            self.fail(exc)

    def fail(self, exc: OSError) -> None:
        """Turn a failure into an error or an exit status."""
        if isinstance(exc, BrokenPipeError):  # the reader has closed the pipe
            raise SystemExit(1) from exc
        raise OutputError(
            f"standard output: can't be written ({exc.strerror}); {next_step(exc)}, or print elsewhere"
        ) from exc


class _Messages(_Output):
    """Standard error: a failure to write to it can't be reported, so the command continues."""

    def fail(self, exc: OSError) -> None:
        pass


@contextmanager
def messages() -> Iterator[None]:
    """Open closed standard streams on the null device, and ignore errors of standard error in the block.

    Without this, the next file that is opened would get the number of a closed stream, and what is printed would end up
    in that file.
    """
    before = sys.stdin, sys.stdout, sys.stderr
    for number in range(3):
        _open_if_closed(number)
    streams = [
        stream or os.fdopen(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False)
        for number, stream in enumerate(before)
    ]
    sys.stdin, sys.stdout, _ = streams
    _widen()
    try:
        with ExitStack() as stack:
            sys.stderr = _wrapped(_Messages, streams[2], stack)
            yield
    finally:
        sys.stdin, sys.stdout, sys.stderr = before


@contextmanager
def printing() -> Iterator[None]:
    """Report errors of standard output in the block, and escape characters that its encoding lacks.

    Raises:
        OutputError: standard output can't be written, for example because the disk is full.
    """
    before = sys.stdout
    try:
        with ExitStack() as stack:
            sys.stdout = _wrapped(_Output, before, stack)
            yield
    finally:
        sys.stdout = before


def print_json(value: Any, indent: int | None = None) -> None:
    """Print JSON, as ASCII if standard output can't encode it otherwise."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=indent)
    print(text)


def console() -> Console:
    """Return a console on standard output, which draws tables with the characters that its encoding has."""
    return Console(file=sys.stdout)


def _wrapped(kind: type[_Output], stream: Any, stack: ExitStack) -> Any:
    """Return a stream of class ``kind`` with the same destination, or ``stream`` itself if it has no buffer below it.

    Args:
        stack: flushes and detaches the new stream at its end.
    """
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    output = kind(
        stream.buffer,
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
    stack.callback(output.detach)
    stack.callback(output.flush)
    return output


def _open_if_closed(number: int) -> None:
    try:
        os.fstat(number)
    except OSError:
        os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one
        os.set_inheritable(number, True)


def _widen() -> None:
    """Set a width in which libraries can lay out help and tables: if it is a single column, some never finish."""
    if shutil.get_terminal_size().columns < NARROWEST or not os.environ.get("COLUMNS", "80").strip("0").isdigit():
        os.environ["COLUMNS"] = str(max(NARROWEST, shutil.get_terminal_size().columns))


def _to_nowhere(number: int) -> None:
    """Redirect a file descriptor to the null device, so that flushing what is still buffered can't fail again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)
