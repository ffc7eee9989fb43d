"""Isolation of a server from the user's files: the environment in which it is started.

Triton's Python processes import from the folder in which they are started and from the folders in ``PYTHON*``
variables, and a ``json.py`` there would replace Python's own. So a server works in a separate folder, without those
variables.
"""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Mapping
from pathlib import Path

DROPPED = re.compile(r"PYTHON\w*|BASH_ENV|ENV|BASH_FUNC_.*|SHELLOPTS|BASHOPTS")
PATHS = ("PATH", "LD_LIBRARY_PATH")
# Of the server's own Python: no packages of the user's home folder, none of the working folder, and UTF-8.
PYTHON_ENVIRONMENT = {"PYTHONNOUSERSITE": "1", "PYTHONSAFEPATH": "1", "PYTHONUTF8": "1"}
# Triton's HTTP server puts a form-encoded body twice on its thread's stack. With a stack of 8 MB, the largest body that
# it accepts, 64 MB, would crash it.
STACK = 160 << 20


def isolated_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without relative paths, and without variables that make Python or a shell run files."""
    kept = {name: value for name, value in environment.items() if not DROPPED.fullmatch(name)}
    paths = {name: os.pathsep.join(absolute_entries(kept.pop(name, ""))) for name in PATHS}
    return kept | {name: path for name, path in paths.items() if path}


def absolute_entries(path: str) -> list[str]:
    """Return the absolute folders of a search path; an empty entry would mean the working folder."""
    return [entry for entry in path.split(os.pathsep) if os.path.isabs(entry)]


def stack_limits() -> tuple[int, int]:
    """Return the limits, soft and hard, that give a server's threads large enough stacks, if memory allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    unlimited = resource.RLIM_INFINITY
    wanted = STACK if hard == unlimited else min(STACK, hard)
    enough = soft != unlimited and soft >= wanted  # without a limit, threads get 2 MB
    return (soft, hard) if enough or _memory_is_promised() else (wanted, hard)


def _memory_is_promised() -> bool:
    """Whether the stacks of all threads count as used memory, although little of them is ever used."""
    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        return True
    try:
        return Path("/proc/sys/vm/overcommit_memory").read_text(encoding="ascii").strip() == "2"
    except OSError:
        return False
