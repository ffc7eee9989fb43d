"""Numbers and names as callers give them: taken where their meaning is plain, else refused by the argument's name.

Numbers may come as any type that is a number, numpy's and `decimal.Decimal` among them, or as text that spells one, as
they come from an environment's variable. A truth value is no number, and NaN is none either.
"""

from __future__ import annotations

import math
import operator
import sys
from decimal import Decimal
from numbers import Real
from typing import Any

from clipweld.client.errors import InvalidRequest

MOST_VERSIONS = 2**63 - 1
FOREVER_S = 1e8  # three years; what is longer is as good as without a limit, which all libraries below understand


def seconds(name: str, value: Any) -> float:
    """A time above 0; infinity, as None is, for one without a limit.

    Raises:
        InvalidRequest: it is something else.
    """
    number = math.inf if value is None else _number(value)
    if number is None or not number > 0:
        raise InvalidRequest(f"{name} is {shown(value)}; expected more than 0 seconds, or None for no limit")
    return math.inf if number > FOREVER_S else float(number)


def count(name: str, value: Any, least: int, most: float = math.inf) -> int:
    """A whole number; one without a limit is the largest there is.

    Raises:
        InvalidRequest: it is something else, below ``least`` or above ``most``.
    """
    number = _number(value)
    if number == math.inf == most:
        return sys.maxsize
    if number is None or number != number or not least <= number <= most or number != int(number):
        limits = f"{least} or more" if most == math.inf else f"{least} to {most:,}"
        raise InvalidRequest(f"{name} is {shown(value)}; expected a whole number, {limits}")
    return min(int(number), sys.maxsize)


def text(name: str, value: Any) -> str:
    """Text that can be sent.

    Raises:
        InvalidRequest: it is something else, or empty.
    """
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise InvalidRequest(f"{name} is {shown(value)}; expected text that can be printed")
    return str(value)


def model_name(value: Any) -> str:
    """The name of a model, which is a folder's on the server.

    Raises:
        InvalidRequest: it is something else.
    """
    name = text("model", value)
    if "/" in name or name in (".", ".."):
        raise InvalidRequest(f"model is {shown(value)}; expected a name without a slash")
    return name


def version_number(value: Any) -> int:
    """The number of a version.

    Raises:
        InvalidRequest: it is something else.
    """
    try:
        return count("version", value, 1, MOST_VERSIONS)
    except InvalidRequest as exc:
        raise InvalidRequest(f"{exc}, or 'latest'") from None


def shown(value: Any) -> str:
    """A value as a message quotes it: in one line, and short."""
    try:
        line = " ".join(repr(value).split())
    except Exception:  # of a caller's type, or a number with too many digits
        return f"of type {type(value).__name__}"
    return line if len(line) <= 60 else f"{line[:40]}... ({type(value).__name__})"


def _number(value: Any) -> int | float | None:
    """What a value says, as a number of Python's; None: no number."""
    if isinstance(value, bool) or type(value).__name__ == "bool_":  # numpy's
        return None
    try:
        return operator.index(value)
    except TypeError:
        pass
    if not isinstance(value, (Real, Decimal, str)) and getattr(value, "ndim", None) != 0:
        return None
    try:
        return int(value) if isinstance(value, str) else _float(value)
    except ValueError:
        pass
    try:
        return _float(value)
    except (TypeError, ValueError):
        return None


def _float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
