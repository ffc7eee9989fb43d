"""The server's Python environment: Triton, its Python backend, ONNX Runtime, and the old numpy that they need.

It lies in a folder of the environment that clipweld is installed in, and goes with it. Neither can import anything of
the other, so the server's pins hold nothing back, and its Python may be another.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from clipweld.exporter.errors import InstallationFailed, TritonMissing
from clipweld.trainer.schemas import one_line

FOLDER = Path(sys.prefix) / "clipweld-server"
REQUIREMENTS = Path(__file__).parent / "server-cpu.txt"
CUDA_REQUIREMENTS = Path(__file__).parent / "server-cuda.txt"
INTERPRETER = Path(__file__).parent / "interpreter.py"
INSTALLED = "installed.txt"  # a copy of the requirements that an environment was made from; written last
# Triton's Python backend needs numpy 1, which has no wheels for newer versions of Python.
VERSIONS = ("3.12", "3.11", "3.10")
WITHOUT_CUDA = ("3.10",)  # the last ONNX Runtime for it wants an older CUDA than all others
COMMAND = "exporter install-server"


@dataclass(frozen=True)
class Interpreter:
    """A Python that can run a server.

    Attributes:
        executable: its absolute path.
        version: such as 3.12.
        packages: the folder of its packages.
        library: its shared library; None if the system's is on the search path of libraries.
    """

    executable: Path
    version: str
    packages: Path
    library: Path | None


def server_environment() -> Interpreter:
    """Return the Python of the server's environment.

    Raises:
        TritonMissing: there is no such environment, or another release of clipweld made it.
    """
    executable = FOLDER / "bin" / "python3"
    if not executable.is_file():
        raise TritonMissing(
            "no Triton here: neither a tritonserver with an onnxruntime backend on PATH nor one in an environment of "
            f"its own; make that with: {COMMAND}"
        )
    if has_cuda() is None:
        raise TritonMissing(f"{FOLDER}: made for another release of clipweld; make it anew with: {COMMAND}")
    return ask(executable)


def has_cuda() -> bool | None:
    """Return whether the environment has CUDA's libraries; None if there is none that this release made."""
    try:
        found = (FOLDER / INSTALLED).read_bytes()
    except OSError:
        return None
    return next((cuda for cuda in (False, True) if found == requirements(cuda=cuda).read_bytes()), None)


def requirements(*, cuda: bool) -> Path:
    """Return the file of pinned and hashed requirements, for machines with or without a GPU."""
    return CUDA_REQUIREMENTS if cuda else REQUIREMENTS


def ask(executable: Path | str) -> Interpreter:
    """Return a Python's own word on itself.

    Raises:
        TritonMissing: it can't be run, or has no shared library, which Triton needs.
    """
    command = [str(executable), "-I", str(INTERPRETER)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        facts = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as exc:
        raise TritonMissing(f"{executable}: not a Python that can be run ({_last_line(exc)})") from exc
    version = facts["version"]
    if facts["library"] is None and not facts["system_has_library"]:
        raise TritonMissing(
            f"libpython{version}.so.1.0: Triton needs the shared library of {executable}, and neither {facts['base']}/"
            f"lib nor the system has it; install the system's libpython{version}, or name a Python that was built with "
            f"--enable-shared: {COMMAND} --python PATH"
        )
    library = None if facts["library"] is None else Path(facts["library"])
    return Interpreter(Path(os.path.abspath(executable)), version, Path(facts["packages"]), library)


def choose_python(given: str | None, *, cuda: bool) -> Interpreter:
    """Return the Python to make the environment with: the given one, else this one, else the newest on PATH.

    Raises:
        TritonMissing: the given one can't run a server, or none was found.
    """
    versions = [version for version in VERSIONS if version not in WITHOUT_CUDA] if cuda else VERSIONS
    wanted = f"a server {'with CUDA ' if cuda else ''}runs on Python {', '.join(versions)}"
    if given is not None:
        found = ask(shutil.which(given) or given)
        if found.version not in versions:
            raise TritonMissing(f"--python {given} is Python {found.version}; {wanted}")
        return found
    reasons = []
    for executable in (sys.executable, *filter(None, (shutil.which(f"python{version}") for version in versions))):
        try:
            found = ask(executable)
        except TritonMissing as exc:
            reasons.append(str(exc))
            continue
        if found.version in versions:
            return found
        reasons.append(f"{executable} is Python {found.version}")
    raise TritonMissing(f"{wanted}; here {'; '.join(reasons)}; install one, and name it: {COMMAND} --python PATH")


def install(python: Interpreter, wheels: Path | None, *, cuda: bool) -> Interpreter:
    """Make the server's environment, or make it anew, and return its Python.

    The environment is complete before it gets its name, and until then an older one stays.

    Args:
        python: from ``choose_python``.
        wheels: a folder with all wheels, which then come from nowhere else.
        cuda: whether to add CUDA's libraries.

    Raises:
        InstallationFailed: a package is not to be had, has another hash, or can't be written; or another process is
            installing.
    """
    new = FOLDER.with_name(f"{FOLDER.name}.new")
    executable = str(new / "bin" / "python3")
    source = ["--no-index", "--find-links", str(wheels)] if wheels else []
    pip = [executable, "-I", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]
    pip += ["--no-deps", "--only-binary", ":all:", "--require-hashes", *source]
    with _alone(new):
        _run([str(python.executable), "-I", "-m", "venv", str(new)])
        own_settings = Path(sys.prefix) / "pip.conf"  # such as a company's index
        if own_settings.is_file():
            shutil.copy(own_settings, new)
        _run([*pip, "--requirement", str(requirements(cuda=cuda))])
        _run([executable, "-I", "-c", "import numpy, onnxruntime"])
        shutil.copy(requirements(cuda=cuda), new / INSTALLED)
        shutil.rmtree(FOLDER, ignore_errors=True)
        new.rename(FOLDER)
    return server_environment()


@contextmanager
def _alone(new: Path) -> Iterator[None]:
    """Hold a lock while the environment is made in ``new``, and remove what is left of it."""
    try:
        new.mkdir(exist_ok=True)
        descriptor = os.open(new, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as exc:
        raise InstallationFailed(
            f"{new}: {(exc.strerror or str(exc)).lower()}; the server's environment lies in the one that clipweld is "
            "installed in: run this as the user who may install packages there, or in a virtual environment"
        ) from exc
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise InstallationFailed(f"{new}: another {COMMAND} is at work; wait until it has ended") from exc
        for left in new.iterdir():  # by one that was killed
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        try:
            yield
        finally:
            shutil.rmtree(new, ignore_errors=True)
    finally:
        os.close(descriptor)


def _run(command: Sequence[str]) -> None:
    try:
        subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError) as exc:
        raise InstallationFailed(f"the server's environment could not be made: {_last_line(exc)}") from exc


def _last_line(exc: Exception) -> str:
    """Return what a program said at its end: pip's errors, or its last line."""
    said = (getattr(exc, "stderr", None) or getattr(exc, "stdout", None) or str(exc)).strip().splitlines() or [str(exc)]
    errors = [line.removeprefix("ERROR: ") for line in said if line.startswith("ERROR: ")]
    return one_line(" ".join(errors or said[-1:]))
