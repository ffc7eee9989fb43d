"""What the command lines of trainer and exporter have in common: help, lists, completion, usage errors."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from enum import Enum
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Group, Parameter

from clipweld.trainer import __version__

Given = Annotated[frozenset[str], Parameter(parse=False)]


def application(name: str, description: str, consume_multiple: bool = False) -> App:
    """Return a command with subcommands, ``--version``, and ``--install-completion`` for bash, zsh and fish.

    Args:
        name: name of the console script.
        description: text for its help: a sentence and an example.
        consume_multiple: whether a list takes several values (``--tasks a b``); a repeated flag always adds to its
            list. Not for subcommands with positional lists, whose values a flag before them would take.
    """
    app = App(
        name=name,
        help=description,
        help_format="markdown",
        group_parameters=Group("Options", sort_key=0),  # before the groups of rare flags
        version=f"clipweld {__version__}",
        default_parameter=Parameter(
            negative="",
            consume_multiple=consume_multiple,
            allow_repeating=True,  # the last value counts, so a script can append flags to a command
            show_default=shown,
        ),
    )
    app.register_install_completion_command()
    app["--install-completion"].group = app["--version"].group
    return app


def run(app: App, args: Sequence[str]) -> Any:
    """Run the subcommand of a command line and return its result; None after help.

    A subcommand that must distinguish a default from the same value on the command line declares ``given: Given``, and
    receives the names of the parameters that were on the command line.

    Raises:
        SystemExit: with status 2, after one line on stderr, if the command line is not valid.
    """
    try:
        if not args:
            app.help_print()
            raise SystemExit(2)
        command, bound, ours = app.parse_args(args, exit_on_error=False, print_error=False)
        if "given" in ours:
            bound.arguments["given"] = frozenset(bound.arguments)
        return command(*bound.args, **bound.kwargs)
    except CycloptsError as exc:
        raise wrong_usage(app, args, exc) from exc


def wrong_usage(app: App, args: Sequence[str], exc: CycloptsError) -> SystemExit:
    """Print what is wrong with a command line, and return the exit with status 2."""
    command = " ".join([*app.name, *(name for name in app.parse_commands(args)[0] if not name.startswith("-"))])
    print(f"{app.name[0]}: {' '.join(str(exc).split())} See {command} --help", file=sys.stderr)
    return SystemExit(2)


class WrongUsage(CycloptsError):
    """Arguments that can't be combined."""

    def __init__(self, message: str) -> None:
        super().__init__(msg=message)


def shown(default: Any) -> Any:
    """Return a default as help shows it; None if it says nothing, such as False."""
    if default is None or default is False or default == ():
        return None
    if isinstance(default, Enum):
        return default.value
    return f"{default:g}" if isinstance(default, float) else default
