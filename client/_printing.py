"""What the command line prints."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from client.errors import ResultsError


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
            raise ResultsError(
                f"standard output: cannot be written ({exc.strerror}); make room where it goes, or print elsewhere"
            ) from exc


@contextmanager
def printing() -> Iterator[None]:
    """Have all that the block prints arrive where standard output goes.

    Raises:
        ResultsError: it can't be written there, to a full disk for example.
    """
    before = cast(io.TextIOWrapper, sys.stdout)
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


def say(text: str) -> None:
    """A line for people, beside the answers."""
    print(f"client: {text}", file=sys.stderr)


def print_json(value: Any) -> None:
    """A value for programs."""
    print(json.dumps(value, indent=2, ensure_ascii=False))
