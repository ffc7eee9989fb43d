"""Answers to whole folders, in a file: written as they come, gone on with after an interruption.

What is done stands in ``OUT.part``, one JSON a line after a line that says what was asked. The file itself appears at
the end, whole.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from client._results import Classification
from client.errors import BadImage, ResultsError

COLUMNS = ("image", "rank", "label", "probability", "score", "version", "error")
ROWS_AT_ONCE = 10_000


class ResultsFile:
    """A file of answers in the making.

    Args:
        path: ``.csv`` and ``.parquet`` have a row for each label of each image, ``.jsonl`` a line for each image.
        question: what is asked of every image, as plain JSON types: an interrupted file is gone on with only if it is
            the same.

    Raises:
        ResultsError: another ending, a finished file, one of another question, or a place that can't be written.

    Attributes:
        done: images that the file has an answer to, or the reason why there is none.
        unreadable: how many of them are of the second kind.
    """

    def __init__(self, path: Path, question: dict[str, Any]) -> None:
        if path.suffix not in _WRITERS:
            raise ResultsError(f"results {path}: unknown ending; expected {', '.join(_WRITERS)}")
        if path.exists():
            raise ResultsError(f"results {path}: there already; remove it, or give another --out")
        if path.suffix == ".parquet":
            _pyarrow()
        self.path, self._part = path, path.with_name(f"{path.name}.part")
        self.done: set[str] = set()
        self.unreadable = 0
        header = {"clipweld results": 1, "question": question}
        try:
            self._file = self._opened(header)
        except OSError as exc:
            raise ResultsError(f"results {path}: cannot be written ({exc.strerror}); give another --out") from exc

    def __enter__(self) -> ResultsFile:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with suppress(OSError):  # what could not be written has been said
            self._file.close()

    def add(self, answer: Classification) -> None:
        """Keep an answer."""
        self._write(answer.to_dict())

    def add_unreadable(self, error: BadImage) -> None:
        """Keep why an image has no answer."""
        self.unreadable += 1
        self._write({"image": error.image, "error": str(error)})

    def finish(self) -> None:
        """Write the file itself, whole, and remove what it was made of."""
        staged = self.path.with_name(f".{self.path.name}.new")
        try:
            self._file.close()
            with self._part.open(encoding="utf-8") as lines:
                next(lines)
                _WRITERS[self.path.suffix]((json.loads(line) for line in lines), staged)
            os.replace(staged, self.path)
        except OSError as exc:
            staged.unlink(missing_ok=True)
            raise ResultsError(
                f"results {self.path}: cannot be written ({exc.strerror}); make room and ask again: all answers are in "
                f"{self._part}"
            ) from exc
        self._part.unlink()

    def _opened(self, header: dict[str, Any]) -> Any:
        if not self._part.exists():
            file = self._part.open("w", encoding="utf-8")
            file.write(json.dumps(header) + "\n")
            return file
        whole = 0
        with self._part.open("rb") as lines:
            for number, line in enumerate(lines):
                try:
                    row = json.loads(line) if line.endswith(b"\n") else None
                except ValueError as exc:
                    raise ResultsError(f"results {self._part}: line {number + 1} is damaged; remove the file") from exc
                if row is None:  # cut off in the middle of it
                    break
                if number == 0 and row != header:
                    raise ResultsError(
                        f"results {self._part}: begun with another question (labels, task, templates, top-k, model or "
                        "version); ask as before, remove it, or give another --out"
                    )
                if number:
                    self.done.add(row["image"])
                    self.unreadable += "error" in row
                whole += len(line)
        os.truncate(self._part, whole)
        file = self._part.open("a", encoding="utf-8")
        if whole == 0:
            file.write(json.dumps(header) + "\n")
        return file

    def _write(self, row: dict[str, Any]) -> None:
        self.done.add(row["image"])
        try:
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as exc:
            raise ResultsError(
                f"results {self._part}: cannot be written ({exc.strerror}); make room and ask again: it goes on there"
            ) from exc


def _rows(answers: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row for each label of each image, best first; one with the reason where there is no answer."""
    for answer in answers:
        if "error" in answer:
            yield {**dict.fromkeys(COLUMNS), "image": answer["image"], "error": answer["error"]}
        for rank, prediction in enumerate(answer.get("predictions", ()), 1):
            yield {"image": answer["image"], "rank": rank, **prediction, "version": answer["version"], "error": None}


def _write_jsonl(answers: Iterator[dict[str, Any]], path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)


def _write_csv(answers: Iterator[dict[str, Any]], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(_rows(answers))


def _write_parquet(answers: Iterator[dict[str, Any]], path: Path) -> None:
    arrow = _pyarrow()
    import pyarrow.parquet

    text, number, real = arrow.string(), arrow.int32(), arrow.float64()
    types = (text, number, text, real, real, number, text)
    schema = arrow.schema(list(zip(COLUMNS, types, strict=True)))
    rows = _rows(answers)
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        while some := list(itertools.islice(rows, ROWS_AT_ONCE)):
            writer.write_table(arrow.Table.from_pylist(some, schema))


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError as exc:
        raise ResultsError("results in Parquet need pyarrow; install it with: pip install 'clipweld[parquet]'") from exc
    return pyarrow


_WRITERS: dict[str, Callable[[Iterator[dict[str, Any]], Path], None]] = {
    ".csv": _write_csv,
    ".jsonl": _write_jsonl,
    ".parquet": _write_parquet,
}
