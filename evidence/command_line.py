"""The command line of a study: the parameters of its function are the flags, and its docstring is the help."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from cyclopts import App, CycloptsError, Parameter
from cyclopts.validators import Number

from clipweld.trainer.command_line import shown, wrong_usage

POSITIVE = Number(gte=1)


def application(description: str | None = None, *, consume_multiple: bool = False) -> App:
    """Return a command named after the module that was started: ``python -m evidence.studies.speed``."""
    module = sys.modules["__main__"].__spec__
    name = f"python -m {module.name.removesuffix('.__main__')}" if module else sys.argv[0]
    defaults = Parameter(negative="", consume_multiple=consume_multiple, allow_repeating=True, show_default=shown)
    return App(
        name=name, help=description, help_format="markdown", group_parameters="Options", version_flags=(),
        default_parameter=defaults,
    )  # fmt: skip


def start(app: App) -> Any:
    """Run a command line; wrong usage is one line on stderr and exit status 2."""
    args = sys.argv[1:]
    try:
        command, bound, _ = app.parse_args(args, exit_on_error=False, print_error=False)
        return command(*bound.args, **bound.kwargs)
    except CycloptsError as exc:
        raise wrong_usage(app, args, exc) from exc


def run(main: Callable[..., Any], *, consume_multiple: bool = False) -> Any:
    """Run one function as a command."""
    app = application(consume_multiple=consume_multiple)
    app.default(main)
    return start(app)
