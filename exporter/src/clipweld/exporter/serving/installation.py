"""Find a Triton on this machine: one with NVIDIA's ONNX Runtime backend, else that of the server's environment."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from clipweld.exporter.errors import TritonFailed
from clipweld.exporter.serving.isolation import PYTHON_ENVIRONMENT, absolute_entries
from clipweld.exporter.serving.server_environment import Interpreter, server_environment

SHARED_MEMORY = Path("/dev/shm")
SCRATCH = "backends-"
OUR_BACKEND = Path(__file__).parent / "backends" / "onnxruntime" / "model.py"


@dataclass(frozen=True)
class Installation:
    """A tritonserver that can serve ``backend: "onnxruntime"``.

    Attributes:
        binary: the tritonserver.
        backends: its ``--backend-directory``.
        description: which one it is, for people.
        folder: the temporary folder in which it works, so that nothing in the user's working folder is run.
        environment: variables that it needs in addition to those of this process.
        in_processes: whether every version runs in a separate process.
    """

    binary: Path
    backends: Path
    description: str
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    in_processes: bool = False

    @property
    def models(self) -> Path:
        """A link to the repository, used because Triton's Python backend passes paths through a shell, unquoted."""
        return self.folder / "models"

    @property
    def working_folder(self) -> Path:
        """An empty folder to start Triton in: the Python that it starts imports from its working folder."""
        return self.folder / "work"


@contextmanager
def installation(prefix: str) -> Iterator[Installation]:
    """Yield the Triton to use; what had to be assembled for it is removed at the end.

    Args:
        prefix: ``clipweld-...-``, with which the names of the server's temporary folder and shared memory begin.

    Raises:
        TritonMissing: there is none; the message says how to get one.
        TritonFailed: programs can't be run from the temporary folder.
    """
    binary = find_native()
    lay_out = partial(_native, binary) if binary else partial(_from_environment, server_environment())
    with _scratch(prefix) as folder:
        found = lay_out(folder)
        found.working_folder.mkdir()
        yield found


def _native(binary: Path, folder: Path) -> Installation:
    backends = _backends_of(binary)
    assert backends is not None  # find_native returns only those that have them
    return Installation(binary, backends, f"{binary} with NVIDIA's onnxruntime backend", folder)


def _from_environment(python: Interpreter, folder: Path) -> Installation:
    if os.statvfs(folder).f_flag & os.ST_NOEXEC:
        raise TritonFailed(
            f"temporary folder {folder.parent}: its file system is mounted noexec, and Triton's processes are started "
            "from there; set TMPDIR to a folder of another one"
        )
    assemble_backends(python, folder)
    libraries = [str(python.packages / "nvidia_pytriton.libs"), *_given("LD_LIBRARY_PATH")]
    if python.library:  # few systems have it on the search path of libraries
        # Only that file: its folder may contain other libraries that Triton must not load, as conda's does.
        (folder / "lib").mkdir()
        (folder / "lib" / python.library.name).symlink_to(python.library)
        libraries.insert(1, str(folder / "lib"))
    return Installation(
        binary=tritonserver_folder(python) / "bin" / "tritonserver",
        backends=folder,
        description="the nvidia-pytriton package's tritonserver with clipweld's Python-based onnxruntime backend",
        folder=folder,
        # The backend's processes run the first python3 on PATH, which must be the one that has onnxruntime.
        environment={
            "LD_LIBRARY_PATH": os.pathsep.join(libraries),
            "PATH": os.pathsep.join([str(python.executable.parent), *_given("PATH")]),
            **PYTHON_ENVIRONMENT,
        },
        in_processes=True,
    )


def tritonserver_folder(python: Interpreter) -> Path:
    """Return the folder in which the nvidia-pytriton package has Triton."""
    return python.packages / "pytriton" / "tritonserver"


def _given(variable: str) -> list[str]:
    return absolute_entries(os.environ.get(variable, ""))


def find_native() -> Path | None:
    """Return a tritonserver on PATH that has NVIDIA's own ONNX Runtime backend, as in NVIDIA's container."""
    found = shutil.which("tritonserver")
    binary = Path(os.path.abspath(found)) if found else None
    return binary if binary and _backends_of(binary) else None


def _backends_of(binary: Path) -> Path | None:
    for prefix in (binary.resolve().parents[1], Path("/opt/tritonserver")):
        if (prefix / "backends" / "onnxruntime" / "libtriton_onnxruntime.so").is_file():
            return prefix / "backends"
    return None


def assemble_backends(python: Interpreter, folder: Path) -> None:
    """Assemble a backend directory: Triton's Python backend with the stub for a Python, and our onnxruntime backend.

    Args:
        python: of the server's environment.
        folder: an empty folder.
    """
    package = tritonserver_folder(python)
    stub = package / "python_backend_stubs" / python.version / "triton_python_backend_stub"
    for backend in ("python", "onnxruntime"):
        (folder / backend).mkdir()
    # Copies (3 MB), as Triton refuses a library that is a link to a file outside the backend directory.
    for file in (*(package / "backends" / "python").glob("*triton_python*"), stub):
        shutil.copy(file, folder / "python")
    shutil.copy(OUR_BACKEND, folder / "onnxruntime" / "model.py")


@contextmanager
def _scratch(prefix: str) -> Iterator[Path]:
    """Yield a temporary folder that is locked while in use; remove unlocked ones, whose servers have been killed."""
    for stale in Path(tempfile.gettempdir()).glob(f"clipweld-*-{SCRATCH}*"):
        with suppress(OSError), _locked(stale, fcntl.LOCK_EX | fcntl.LOCK_NB):
            if stale.stat().st_uid == os.getuid():
                _kill_users(stale)
                remove_shared_memory(stale.name.rpartition(SCRATCH)[0])
                shutil.rmtree(stale)
    with ExitStack() as stack:
        yield _claimed(prefix, stack)


def _claimed(prefix: str, stack: ExitStack) -> Path:
    """Return a new, locked folder."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f"{prefix}{SCRATCH}"))
        with suppress(FileNotFoundError):  # before it was locked, another server took it for an abandoned one
            stack.enter_context(_locked(folder, fcntl.LOCK_EX))
            if folder.exists():
                stack.callback(shutil.rmtree, folder, ignore_errors=True)
                return folder


def served_on_port(port: int) -> Path | None:
    """Return the repository that a server of ours serves on a gRPC port of this machine, by the link in its folder."""
    for folder in Path(tempfile.gettempdir()).glob(f"clipweld-*-{port}-{SCRATCH}*"):
        try:
            with _locked(folder, fcntl.LOCK_SH | fcntl.LOCK_NB):
                continue  # not locked: its server was killed
        except BlockingIOError:
            with suppress(OSError):
                place = (folder / "models").readlink()
                return None if place.parent == folder else place
        except OSError:
            continue
    return None


def remove_shared_memory(prefix: str) -> None:
    """Remove the shared memory that a Triton which has ended left behind."""
    for region in SHARED_MEMORY.glob(f"{prefix}*"):
        region.unlink(missing_ok=True)


def _kill_users(folder: Path) -> None:
    """Kill a Triton of this folder and its processes, which it leaves behind if it is stopped while it loads."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            program = (process / "cmdline").read_bytes().split(b"\0")[0]
            if program.startswith(os.fsencode(folder) + b"/") or folder in (process / "cwd").readlink().parents:
                os.kill(int(process.name), signal.SIGKILL)


@contextmanager
def _locked(folder: Path, how: int) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, how)
        yield
    finally:
        os.close(descriptor)
