"""Validation of numbers and names from callers: accepted if their meaning is plain, else refused.

Numbers may be of any numeric type, including NumPy's and `decimal.Decimal`, or text that spells one, as environment
variables do. Booleans and NaN are not numbers.
"""

from __future__ import annotations

import math
import operator
import sys
from decimal import Decimal
from numbers import Real
from typing import Any

import numpy as np

from clipweld.client.errors import InvalidRequest

MOST_VERSIONS = 2**63 - 1
FOREVER_S = 1e8  # three years; anything longer counts as no limit, which all libraries below understand


def seconds(name: str, value: Any) -> float:
    """Return a time limit in seconds, above 0; None and what exceeds ``FOREVER_S`` become infinity.

    Raises:
        InvalidRequest: it is not a number above 0.
    """
    number = math.inf if value is None else _number(value)
    if number is None or not number > 0:
        raise InvalidRequest(f"{name} is {shown(value)}; expected more than 0 seconds, or None for no limit")
    return math.inf if number > FOREVER_S else float(number)


def count(name: str, value: Any, least: int, most: float = math.inf) -> int:
    """Return a whole number, reduced to ``sys.maxsize`` if it is larger; so is infinity, if there is no upper limit.

    Raises:
        InvalidRequest: it is not a whole number, or is below ``least`` or above ``most``.
    """
    number = _number(value)
    if number == math.inf == most:
        return sys.maxsize
    if number is None or number != number or not least <= number <= most or number != int(number):
        limits = f"{least} or more" if most == math.inf else f"{least} to {most:,}"
        raise InvalidRequest(f"{name} is {shown(value)}; expected a whole number, {limits}")
    return min(int(number), sys.maxsize)


def text(name: str, value: Any) -> str:
    """Return text that can be sent.

    Raises:
        InvalidRequest: it is not text, or is blank or not printable.
    """
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise InvalidRequest(f"{name} is {shown(value)}; expected text that can be printed")
    return str(value)


def model_name(value: Any) -> str:
    """Return the name of a model, which is also the name of a folder on the server.

    Raises:
        InvalidRequest: it can't be one.
    """
    name = text("model", value)
    if "/" in name or name in (".", ".."):
        raise InvalidRequest(f"model is {shown(value)}; expected a name without a slash")
    return name


def version_number(value: Any) -> int:
    """Return the number of a version.

    Raises:
        InvalidRequest: it is not a whole number from 1 to ``MOST_VERSIONS``.
    """
    try:
        return count("version", value, 1, MOST_VERSIONS)
    except InvalidRequest as exc:
        raise InvalidRequest(f"{exc}, or 'latest'") from None


def shown(value: Any) -> str:
    """Return a value as messages quote it: short, and on one line."""
    try:
        line = " ".join(repr(value).split())
    except Exception:  # a caller's type may raise anything, and Python refuses to print integers of too many digits
        return f"of type {type(value).__name__}"
    return line if len(line) <= 60 else f"{line[:40]}... ({type(value).__name__})"


def _number(value: Any) -> int | float | None:
    """Return a value as one of Python's numbers; None if it is not a number."""
    if isinstance(value, (bool, np.bool_)):
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
