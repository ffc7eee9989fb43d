"""JSON that anyone may have written: read by a schema, or refused in one line before it costs memory."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Hashable
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

from pydantic import AfterValidator, ConfigDict, FailFast, Field, TypeAdapter, ValidationError
from pydantic_core import from_json

MAX_BYTES = 2 << 20  # twenty thousand class names and more
MAX_VALUES = 100_000  # a list of one number costs fifty times its three bytes
MAX_NAMES = 5_000  # of one object: layers, tasks
MAX_ERRORS = 100  # pydantic describes each in a kilobyte
LONGEST = 300  # characters of a foreign text in a message

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

Record = TypeVar("Record")
Item = TypeVar("Item")


def printable(text: str) -> str:
    """Text of one line that a terminal shows as it is.

    Raises:
        ValueError: blank, or with line breaks or control characters.
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


def read_json(kind: type[Record], text: str | bytes) -> Record:
    """What JSON says, every type and bound checked.

    Args:
        kind: the schema: a dataclass or TypedDict with STRICT, or a plain type.

    Raises:
        ValueError: larger than MAX_BYTES, of more than MAX_VALUES, not JSON, with more than MAX_NAMES in one object, or
            not of this kind; one line says where.
    """
    if len(text) > MAX_BYTES:
        raise ValueError(f"JSON of {len(text):,} bytes, at most {MAX_BYTES:,} are read")
    text = text.encode() if isinstance(text, str) else text
    if (values := sum(map(text.count, (b",", b"[", b"{")))) > MAX_VALUES:
        raise ValueError(f"JSON of {values:,} values, at most {MAX_VALUES:,} are read")
    value = from_json(text)
    if (names := _widest(value)) > MAX_NAMES:
        raise ValueError(f"an object of {names:,} names, at most {MAX_NAMES:,} are read")
    _check_fields(kind, value)  # first: each error of pydantic's takes a kilobyte, and it collects them all
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
        OSError: it can't be read, or is no regular file.
        ValueError: as of ``read_json``.
    """
    if not path.is_file():
        raise FileNotFoundError(2, "not a regular file" if path.exists() else "no such file", str(path))
    with path.open("rb") as file:
        return read_json(kind, file.read(MAX_BYTES + 1))


def _check_fields(kind: Any, value: Any) -> None:
    known = {f.name for f in fields(kind)} if is_dataclass(kind) else set(getattr(kind, "__annotations__", ()))
    if known and not (isinstance(value, dict) and value.keys() == known):
        got = value.keys() if isinstance(value, dict) else set()
        lacks, has = (", ".join(map(repr, sorted(names)[:3])) or "nothing" for names in (known - got, got - known))
        raise ValueError(one_line(f"its fields are not those of this clipweld's format: it lacks {lacks}, has {has}"))


def _widest(value: Any) -> int:
    """How many names the largest object in it has."""
    if isinstance(value, dict):
        return max(len(value), _widest(list(value.values())))
    return max(map(_widest, value), default=0) if isinstance(value, list) else 0


@cache
def _schema(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def one_line(text: str) -> str:
    """Shorten a foreign text, such as an error that quotes a file, to fit into one line of ours."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return line if len(line) <= LONGEST else f"{line[:LONGEST]} ..."


def sha256_of(file: Path) -> str:
    """SHA-256 of a file's content, as records name it."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
