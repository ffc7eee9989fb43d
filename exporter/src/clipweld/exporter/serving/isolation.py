"""Isolation of a server from the user's files: the environment and the search path with which it is started.

Triton's Python processes import from the folder in which they are started and from the folders in ``PYTHON*``
variables, and a ``json.py`` there would replace Python's own. So a server works in a separate folder, and its Python
searches the folders where onnxruntime and numpy are installed after all others.
"""

from __future__ import annotations

import os
import re
import resource
import sys
from collections.abc import Iterable, Mapping
from importlib.machinery import PathFinder
from pathlib import Path

from clipweld.exporter.errors import TritonMissing

PACKAGES = ("numpy", "onnxruntime")
DROPPED = re.compile(r"PYTHON\w*|BASH_ENV|ENV|BASH_FUNC_.*|SHELLOPTS|BASHOPTS")
PATHS = ("PATH", "LD_LIBRARY_PATH")
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


def python_environment(folder: Path) -> dict[str, str]:
    """Return variables that let a Python find the packages it needs, but no file of the user's before its own.

    Args:
        folder: an empty folder, in which a ``sitecustomize.py`` is written that adds the packages to the path.

    Raises:
        TritonMissing: a package is not installed.
    """
    # Python runs this file when it starts. In PYTHONPATH itself, the packages would come before the standard library.
    (folder / "sitecustomize.py").write_text(
        f"import sys\nsys.path += {package_folders(PACKAGES)!r}\n", encoding="utf-8", errors="surrogateescape"
    )
    return {"PYTHONPATH": str(folder), "PYTHONNOUSERSITE": "1", "PYTHONSAFEPATH": "1", "PYTHONUTF8": "1"}


def package_folders(names: Iterable[str]) -> list[str]:
    """Return the folders in which packages are installed; folders in PYTHONPATH are searched last.

    Raises:
        TritonMissing: a package is not installed, or only in the working folder.
    """
    given = [os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    first = sys.path[:1] if not _starts_safely() else []  # the folder of the script, or the working folder
    installed = [entry for entry in sys.path if os.path.isabs(entry) and entry not in (*given, *first)]
    elsewhere = [entry for entry in given if not _same_folder(entry, os.getcwd())]
    return list(dict.fromkeys(_folder_of(name, [*installed, *elsewhere]) for name in names))


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


def _folder_of(name: str, entries: Iterable[str]) -> str:
    for entry in entries:
        spec = PathFinder.find_spec(name, [entry])
        if spec is not None and spec.origin is not None and spec.submodule_search_locations:
            return str(Path(spec.origin).parents[1])
    raise TritonMissing(
        f"package {name}: not installed where a server looks for it, which is not the working folder; "
        "pip install 'clipweld[serve]'"
    )


def _starts_safely() -> bool:
    return bool(getattr(sys.flags, "safe_path", False))  # from Python 3.11 on


def _same_folder(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False
