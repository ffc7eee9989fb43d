"""The error for a missing package that one of clipweld's extras installs."""

from __future__ import annotations

from importlib.util import find_spec


def missing(exc: ModuleNotFoundError, extra: str) -> str:
    """One line: which package is not installed, and what installs it.

    Args:
        exc: what importing it raised.
        extra: the one that the command needs.

    Raises:
        ModuleNotFoundError: the same, where it is a bug: a module of clipweld's own, or of a package that is installed.
    """
    package = (exc.name or "").partition(".")[0]
    if package in ("", "clipweld") or find_spec(package) is not None:
        raise exc
    return f"{package} is not installed; install what this command needs: pip install 'clipweld[{extra}]'"
