"""Output of the command line, wherever its streams lead: to a file, a pipe, a full disk or nowhere."""

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

from clipweld.client._os_errors import next_step
from clipweld.client.errors import ResultsError

NARROWEST = 40  # columns


class _Output(io.TextIOWrapper):
    """Standard output, with failures that can be distinguished from all others."""

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
        if isinstance(exc, BrokenPipeError):  # the reader has read enough
            raise SystemExit(1) from exc
        raise ResultsError(
            f"standard output: cannot be written ({exc.strerror}); {next_step(exc)}, or print elsewhere"
        ) from exc


class _Messages(_Output):
    """Standard error: a failure to write to it can't be reported, so the command continues."""

    def fail(self, exc: OSError) -> None:
        pass


@contextmanager
def messages() -> Iterator[None]:
    """Connect closed standard streams to the null device, and ignore failures of standard error, during the block.

    The next file to be opened would get the number of a closed stream, and what is printed would end up in that file.
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
    """Make sure that all that the block prints is written; characters that the encoding lacks are escaped.

    Raises:
        ResultsError: it can't be written, for example to a full disk.
    """
    before = sys.stdout
    try:
        with ExitStack() as stack:
            sys.stdout = _wrapped(_Output, before, stack)
            yield
    finally:
        sys.stdout = before


def say(text: str) -> None:
    """Print a line for people to standard error, apart from the answers."""
    print(f"client: {text}", file=sys.stderr)


def print_json(value: Any) -> None:
    """Print JSON for programs, escaped if standard output can't encode it."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=2)
    print(text)


def console() -> Console:
    """Return standard output for tables, which are drawn with the characters that it can encode."""
    return Console(file=sys.stdout)


def _wrapped(kind: type[_Output], stream: Any, stack: ExitStack) -> Any:
    """Return a stream of another kind onto the same file; return streams that are not the system's as they are."""
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
        os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one: lower ones were opened before
        os.set_inheritable(number, True)


def _widen() -> None:
    """Set a width in which libraries can lay out help and tables: in one column, some never finish."""
    if shutil.get_terminal_size().columns < NARROWEST or not os.environ.get("COLUMNS", "80").strip("0").isdigit():
        os.environ["COLUMNS"] = str(max(NARROWEST, shutil.get_terminal_size().columns))


def _to_nowhere(number: int) -> None:
    """Connect a stream to the null device, where what is still buffered can go."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)
