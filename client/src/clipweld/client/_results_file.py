"""Answers to whole folders, written to a file as they arrive, and resumed after an interruption.

Finished answers are in ``OUT.part``: one line with the question, then one line of JSON per image. The file itself
appears at the end, complete.
"""

from __future__ import annotations

import csv
import fcntl
import functools
import itertools
import json
import math
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from clipweld.client._images import is_url, name_of
from clipweld.client._json import read_json
from clipweld.client._os_errors import next_step
from clipweld.client._results import Classification
from clipweld.client.errors import BadImage, ResultsError

# File names need not be UTF-8. What isn't becomes an escape, which JSON reads back.
AS_ESCAPES = "backslashreplace"
MAX_LINE = 16 << 20  # bytes
COLUMNS = ("image", "rank", "label", "probability", "score", "version", "error")
ROWS_AT_ONCE = 10_000


class ResultsFile:
    """A file of answers while it is being written.

    Args:
        path: ``.csv`` and ``.parquet`` get one row per image and label, ``.jsonl`` one line per image.
        question: what is asked about every image, as plain JSON types. An interrupted file is resumed only if its
            question is the same.

    Raises:
        ResultsError: the ending is unknown, the file is finished already, has another question or is being written by
            another process, or it can't be written.

    Attributes:
        done: names of the images for which the file has an answer, or the reason why there is none.
        unreadable: how many of them have no answer.
    """

    def __init__(self, path: Path, question: dict[str, Any]) -> None:
        check_ending(path)
        self.path, self._part = path, path.with_name(f"{path.name}.part")
        self._check_absent()
        if path.suffix == ".parquet":
            _pyarrow()
        self.done: set[str] = set()
        self._places: set[str] = set()
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
        with suppress(OSError):  # a failure to write has been reported before
            self._file.close()

    def has(self, image: str) -> bool:
        """Whether the file has this image already, however its folder was spelled."""
        return place_of(name_of(image, 0)) in self._places

    def add(self, answer: Classification) -> None:
        """Write an answer."""
        self._write(answer.to_dict())

    def add_unreadable(self, error: BadImage) -> None:
        """Write why an image has no answer."""
        self.unreadable += 1
        self._write({"image": error.image, "error": str(error)})

    def finish(self) -> None:
        """Write the file itself, complete, and remove ``OUT.part``."""
        try:
            self._file.flush()  # not closed, which would release the lock to another process
            with replacing(self.path) as staged, self._part.open(encoding="utf-8") as lines:
                next(lines)
                _WRITERS[self.path.suffix](map(_answer, lines), staged)
            self._part.unlink()
            self._file.close()
        except OSError as exc:
            raise ResultsError(
                f"results {self.path}: cannot be written ({exc.strerror or exc}); {next_step(exc)}, and ask again: all "
                f"answers are in {self._part}"
            ) from exc

    def _check_absent(self) -> None:
        if os.path.lexists(self.path):
            raise ResultsError(f"results {self.path}: there already; remove it, or give another --out")

    def _opened(self, header: dict[str, Any]) -> IO[str]:
        """Open ``OUT.part``, locked against other processes and cut after its last complete line."""
        if os.path.lexists(self._part) and not stat.S_ISREG(self._part.lstat().st_mode):
            raise ResultsError(f"results {self._part}: not a regular file; remove it, or give another --out")
        file = self._part.open("a", encoding="utf-8", errors=AS_ESCAPES)
        try:
            self._hold(file)
            whole = self._read(header)
            os.truncate(self._part, whole)
            if whole == 0:
                file.write(json.dumps(header) + "\n")
                file.flush()
        except BaseException:
            file.close()
            raise
        return file

    def _hold(self, file: IO[str]) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise ResultsError(
                f"results {self._part}: another client is writing it; wait until it has finished, or give another --out"
            ) from exc
        except OSError as exc:
            raise ResultsError(
                f"results {self._part}: its file system can't lock it ({exc.strerror}), and two clients at once would "
                "ruin it; give an --out on one that can, such as a local disk"
            ) from exc
        self._check_absent()  # again, now that we hold the lock: another process may just have finished
        if not self._part.exists() or not os.path.samestat(os.fstat(file.fileno()), self._part.stat()):
            raise ResultsError(f"results {self._part}: another client was writing it just now; ask again")

    def _read(self, header: dict[str, Any]) -> int:
        """Read the finished answers, and return the size of all complete lines in bytes."""
        whole = number = 0
        with self._part.open("rb") as lines:
            while line := lines.readline(MAX_LINE):
                if not line.endswith(b"\n") and len(line) < MAX_LINE:  # the last line, cut off by an interruption
                    break
                try:
                    row = read_json(line, MAX_LINE)
                    if number:
                        _check_row(row)
                except (ValueError, RecursionError) as exc:
                    raise ResultsError(f"results {self._part}: line {number + 1} is damaged; remove the file") from exc
                if number == 0 and row != header:
                    raise ResultsError(
                        f"results {self._part}: begun with another question (labels, task, templates, top-k, model or "
                        "version); ask as before, remove it, or give another --out"
                    )
                if number:
                    self.done.add(row["image"])
                    self._places.add(row.get("path") or place_of(row["image"]))
                    self.unreadable += "error" in row
                whole, number = whole + len(line), number + 1
        return whole

    def _write(self, row: dict[str, Any]) -> None:
        path = place_of(row["image"])
        self.done.add(row["image"])
        self._places.add(path)
        try:
            self._file.write(json.dumps(row | {"path": path}, ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as exc:
            raise ResultsError(
                f"results {self._part}: cannot be written ({exc.strerror}); {next_step(exc)}, and ask again: it goes "
                "on there"
            ) from exc


def check_ending(path: Path) -> None:
    """Raises:
    ResultsError: results can't be written to files of this ending.
    """
    if path.suffix not in _WRITERS:
        raise ResultsError(f"results {path}: unknown ending; expected {', '.join(_WRITERS)}")


def place_of(image: str) -> str:
    """Return what identifies an image, however its folder is spelled: the folder's real path and the image's name.

    The name itself is not resolved if it is a link: two names in one folder are two images.
    """
    if is_url(image):
        return image
    folder, name = os.path.split(image)
    return os.path.join(_real_path(os.getcwd(), folder), name)


@functools.lru_cache(maxsize=1024)
def _real_path(working_folder: str, folder: str) -> str:
    return os.path.realpath(os.path.join(working_folder, folder))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a file beside ``path`` to write to: it replaces ``path`` if the block succeeds, else it is removed.

    Raises:
        OSError: it can't be written; ``path`` is unchanged.
    """
    staged = path.with_name(f".{path.name}.new")
    try:
        yield staged
        os.replace(staged, path)
    except BaseException:
        with suppress(OSError):
            staged.unlink()
        raise


def _answer(line: str) -> dict[str, Any]:
    row: dict[str, Any] = json.loads(line)
    row.pop("path", None)  # only needed for resuming
    return row


def _check_row(row: Any) -> None:
    """Raises:
    ValueError: the row is not what ``add`` or ``add_unreadable`` writes. Older files have rows without a path.
    """
    keys = row.keys() - {"path"} if type(row) is dict and type(row.get("path", "")) is str else set()
    if keys == {"image", "error"}:
        kinds = all(type(value) is str for value in row.values())
    elif keys == {"image", "version", "predictions"}:
        kinds = (
            (type(row["image"]), type(row["version"]), type(row["predictions"])) == (str, int, list)
            and 0 < row["version"] < 2**31
            and all(map(_is_prediction, row["predictions"]))
        )
    else:
        kinds = False
    if not kinds:
        raise ValueError("not an answer")


def _is_prediction(found: Any) -> bool:
    if type(found) is not dict or found.keys() != {"label", "probability", "score"}:
        return False
    numbers = (found["probability"], found["score"])
    return type(found["label"]) is str and all(type(n) is float and math.isfinite(n) for n in numbers)


def _rows(answers: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield one row per image and label, best first; one row with the reason for an image without an answer."""
    for answer in answers:
        if "error" in answer:
            yield {**dict.fromkeys(COLUMNS), "image": answer["image"], "error": answer["error"]}
        for rank, prediction in enumerate(answer.get("predictions", ()), 1):
            yield {"image": answer["image"], "rank": rank, **prediction, "version": answer["version"], "error": None}


def _write_jsonl(answers: Iterator[dict[str, Any]], path: Path) -> None:
    with path.open("w", encoding="utf-8", errors=AS_ESCAPES) as file:
        file.writelines(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)


def _write_csv(answers: Iterator[dict[str, Any]], path: Path) -> None:
    with path.open("w", encoding="utf-8", errors=AS_ESCAPES, newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(_rows(answers))


def _write_parquet(answers: Iterator[dict[str, Any]], path: Path) -> None:
    arrow = _pyarrow()
    import pyarrow.parquet

    text, number, real = arrow.string(), arrow.int32(), arrow.float64()
    types = (text, number, text, real, real, number, text)
    schema = arrow.schema(list(zip(COLUMNS, types, strict=True)))
    rows = ({name: _escaped(value) for name, value in row.items()} for row in _rows(answers))
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        while some := list(itertools.islice(rows, ROWS_AT_ONCE)):
            writer.write_table(arrow.Table.from_pylist(some, schema))


def _escaped(value: Any) -> Any:
    return value.encode(errors=AS_ESCAPES).decode() if isinstance(value, str) else value


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
