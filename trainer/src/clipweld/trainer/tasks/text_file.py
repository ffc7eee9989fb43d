"""Read short text files that people write by hand, one entry per line, as editors on any system save them."""

from __future__ import annotations

import codecs
import unicodedata
from pathlib import Path

from clipweld.trainer.errors import TaskInvalid
from clipweld.trainer.schemas import MAX_BYTES, one_line, printable

# Byte order marks. UTF-32's begins with UTF-16's, so it is tried first.
MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


def read_lines(path: Path) -> tuple[str, ...]:
    """Return the lines of an optional text file that aren't blank, stripped, in Unicode's composed form (NFC).

    The encoding is UTF-8, unless a byte order mark says otherwise. The line ends of any system are accepted.

    Returns:
        the lines; none if there is no such file.

    Raises:
        TaskInvalid: it is not a text file of at most MAX_BYTES, has no lines, or a line isn't printable.
    """
    if not path.exists() and not path.is_symlink():
        return ()
    if not path.is_file() or path.stat().st_size > MAX_BYTES:
        raise TaskInvalid(f"{path}: not a regular file of at most {MAX_BYTES:,} bytes; give one line of text each")
    try:
        text = _decode(path.read_bytes())
    except OSError as exc:
        raise TaskInvalid(f"{path}: can't be read ({exc.strerror}); make it readable") from exc
    except UnicodeDecodeError as exc:
        number = exc.object[: exc.start].count(b"\n") + 1
        raise TaskInvalid(
            f"{path}: line {number} is not {exc.encoding.upper()} ({exc.object[exc.start : exc.end]!r}); save it as "
            "UTF-8"
        ) from exc
    lines = tuple(unicodedata.normalize("NFC", line.strip()) for line in text.splitlines() if line.strip())
    if not lines:
        raise TaskInvalid(f"{path}: no line in it; write one entry a line, or remove the file")
    for number, line in enumerate(lines, start=1):
        try:
            printable(line)
        except ValueError as exc:
            raise TaskInvalid(f"{path}: entry {number} ({one_line(line)!r}): {exc}") from exc
    return lines


def _decode(content: bytes) -> str:
    """Return the text of a file, without byte order marks (joined files have several) and DOS's end of file (Ctrl-Z).

    Raises:
        UnicodeDecodeError: it is not in the encoding of its byte order mark, or not in UTF-8 if it has none.
    """
    encoding = next((encoding for mark, encoding in MARKS.items() if content.startswith(mark)), "utf-8")
    return content.decode(encoding).replace("\ufeff", "").rstrip("\x1a")
