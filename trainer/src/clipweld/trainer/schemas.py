"""Read untrusted JSON by a schema, or refuse it with a one-line error before it takes much memory."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Hashable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

from pydantic import AfterValidator, ConfigDict, FailFast, Field, TypeAdapter, ValidationError
from pydantic_core import from_json

MAX_BYTES = 2 << 20  # enough for more than twenty thousand class names
MAX_VALUES = 100_000  # in memory, a list of one number takes fifty times its three bytes
MAX_NAMES = 5_000  # of one object, such as of layers or tasks
MAX_ERRORS = 100  # pydantic's description of each takes a kilobyte
LONGEST = 300  # characters of a quoted text in a message

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

Record = TypeVar("Record")
Item = TypeVar("Item")


def printable(text: str) -> str:
    """Return the text, if it is a single line that a terminal shows as it is.

    Raises:
        ValueError: it is blank, or has line breaks or control characters.
    """
    if not text.strip() or re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", text):
        raise ValueError("text must be one line, not blank, without control characters")
    return text


Text = Annotated[str, AfterValidator(printable)]
Items = Annotated[list[Item], FailFast()]
Texts = Annotated[tuple[Text, ...], FailFast()]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}\z")]
Percent = Annotated[float, Field(ge=0, le=100)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Json = dict[str, Any]
Setting = None | bool | int | float | Text


def read_json(kind: type[Record] | Mapping[int, type[Record]], text: str | bytes) -> Record:
    """Parse JSON, and check every type and bound.

    Args:
        kind: the schema: a dataclass or TypedDict with STRICT, or a plain type; or one for each value of the JSON's
            ``format``.

    Raises:
        ValueError: it has more than MAX_BYTES or MAX_VALUES, is not JSON, has an object with more than MAX_NAMES, or
            doesn't match the schema; the message is one line that says where.
    """
    if len(text) > MAX_BYTES:
        raise ValueError(f"JSON of {len(text):,} bytes, at most {MAX_BYTES:,} are read")
    text = text.encode() if isinstance(text, str) else text
    if (values := sum(map(text.count, (b",", b"[", b"{")))) > MAX_VALUES:
        raise ValueError(f"JSON of {values:,} values, at most {MAX_VALUES:,} are read")
    value = from_json(text)
    if (names := _widest(value)) > MAX_NAMES:
        raise ValueError(f"an object of {names:,} names, at most {MAX_NAMES:,} are read")
    if isinstance(kind, Mapping):
        kind = _by_format(kind, value)
    _check_fields(kind, value)  # first, because pydantic would collect an error of a kilobyte per field
    schema: TypeAdapter[Record] = _schema(cast("Hashable", kind))
    try:
        return schema.validate_json(text)
    except ValidationError as exc:
        reason = f"{exc.error_count():,} values are not what they should be"
        if exc.error_count() <= MAX_ERRORS:
            first = exc.errors(include_url=False, include_context=False, include_input=False)[0]
            reason = ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))
    raise ValueError(one_line(reason))


def read_json_file(kind: type[Record], path: Path) -> Record:
    """Read a file as ``read_json`` reads text.

    Raises:
        OSError: it can't be read, or is not a regular file.
        ValueError: as for ``read_json``.
    """
    if not path.is_file():
        raise FileNotFoundError(2, "not a regular file" if path.exists() else "no such file", str(path))
    with path.open("rb") as file:
        return read_json(kind, file.read(MAX_BYTES + 1))


def _by_format(kinds: Mapping[int, type[Record]], value: Any) -> type[Record]:
    number = value.get("format") if isinstance(value, dict) else None
    if type(number) is not int or number not in kinds:
        raise ValueError(
            one_line(
                f"format {number!r}; this clipweld reads {' and '.join(map(str, kinds))}, later ones may read more"
            )
        )
    return kinds[number]


def _check_fields(kind: Any, value: Any) -> None:
    known = {f.name for f in fields(kind)} if is_dataclass(kind) else set(getattr(kind, "__annotations__", ()))
    if known and not (isinstance(value, dict) and value.keys() == known):
        got = value.keys() if isinstance(value, dict) else set()
        lacks, has = (", ".join(map(repr, sorted(names)[:3])) or "nothing" for names in (known - got, got - known))
        raise ValueError(one_line(f"its fields are not those of this clipweld's format: it lacks {lacks}, has {has}"))


def _widest(value: Any) -> int:
    """Return the number of names in the largest object within a value."""
    if isinstance(value, dict):
        return max(len(value), _widest(list(value.values())))
    return max(map(_widest, value), default=0) if isinstance(value, list) else 0


@cache
def _schema(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def one_line(text: str) -> str:
    """Return a text from elsewhere, such as an error that quotes a file, as one short printable line."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return line if len(line) <= LONGEST else f"{line[:LONGEST]} ..."


def sha256_of(file: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
