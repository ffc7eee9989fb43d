"""The error for a missing package that one of clipweld's extras installs."""

from __future__ import annotations

from importlib.util import find_spec


def missing(exc: ModuleNotFoundError, extra: str) -> str:
    """Return one line that says which package is not installed, and how to install it.

    Args:
        exc: the error from importing the package.
        extra: the extra that the command needs.

    Raises:
        ModuleNotFoundError: ``exc`` itself, if it is a bug: the module belongs to clipweld or to an installed package.
    """
    package = (exc.name or "").partition(".")[0]
    if package in ("", "clipweld") or find_spec(package) is not None:
        raise exc
    return f"{package} is not installed; install what this command needs: pip install 'clipweld[{extra}]'"
