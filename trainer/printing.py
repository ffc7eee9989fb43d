"""What the command lines print."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from trainer.errors import OutputError
from trainer.os_errors import next_step


class _Output(io.TextIOWrapper):
    """Standard output whose failures can be told from all others."""

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
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())  # for what is still buffered
            if isinstance(exc, BrokenPipeError):  # whoever read it has read enough
                raise SystemExit(1) from exc
            raise OutputError(
                f"standard output: can't be written ({exc.strerror}); {next_step(exc)}, or print elsewhere"
            ) from exc


@contextmanager
def printing() -> Iterator[None]:
    """Have all that the block prints arrive where standard output goes.

    Raises:
        OutputError: it can't be written there, to a full disk for example.
    """
    before = sys.stdout
    sys.stdout = output = _Output(
        before.buffer,
        encoding=before.encoding,
        errors=before.errors,
        line_buffering=before.line_buffering,
        write_through=before.write_through,
    )
    try:
        yield
    finally:
        try:
            output.flush()
        finally:
            sys.stdout = before
            output.detach()
