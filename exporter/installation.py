"""Find a Triton on this machine: one with NVIDIA's ONNX Runtime backend, else the nvidia-pytriton package's."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from exporter.errors import TritonMissing

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
        environment: variables it needs beside those of this process.
        link: where it has to find the repository: its Python backend passes paths through a shell, unquoted.
    """

    binary: Path
    backends: Path
    description: str
    environment: dict[str, str] = field(default_factory=dict)
    link: Path | None = None


@contextmanager
def installation(prefix: str) -> Iterator[Installation]:
    """The Triton to use; what had to be assembled for it is removed at the end.

    Args:
        prefix: of the names of what a server has for itself, ``clipweld-...-``: temporary folder and shared memory.

    Raises:
        TritonMissing: there is none; says how to get one.
    """
    native = find_native()
    if native is not None:
        yield native
        return
    package = _pytriton()
    with _scratch(prefix) as folder:
        assemble_backends(package, folder)
        libraries = [str(package.parents[1] / "nvidia_pytriton.libs"), os.environ.get("LD_LIBRARY_PATH", "")]
        path = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
        yield Installation(
            binary=package / "bin" / "tritonserver",
            backends=folder,
            description="the nvidia-pytriton package's tritonserver with clipweld's Python-based onnxruntime backend",
            # The backend's processes take the first python3 on PATH: it must be the one that has onnxruntime.
            environment={
                "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries)),
                "PATH": os.pathsep.join(filter(None, path)),
            },
            link=folder / "models",
        )


def find_native() -> Installation | None:
    """A tritonserver on PATH that has NVIDIA's own ONNX Runtime backend, as in NVIDIA's container."""
    binary = shutil.which("tritonserver")
    if binary is None:
        return None
    for prefix in (Path(binary).resolve().parents[1], Path("/opt/tritonserver")):
        if (prefix / "backends" / "onnxruntime" / "libtriton_onnxruntime.so").is_file():
            backends = prefix / "backends"
            return Installation(Path(binary), backends, f"{binary} with NVIDIA's onnxruntime backend")
    return None


def assemble_backends(package: Path, folder: Path) -> None:
    """Lay out a backend directory: Triton's Python backend with the stub of this Python, and our onnxruntime backend.

    Args:
        package: pytriton's ``tritonserver`` folder.
        folder: an empty folder.

    Raises:
        TritonMissing: the package has no stub for this Python.
    """
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = package / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        known = sorted(p.name for p in stub.parents[1].glob("*"))
        raise TritonMissing(
            f"nvidia-pytriton has no Triton stub for Python {version}, only for {', '.join(known)}; "
            "run clipweld with one of these"
        )
    python, onnxruntime = folder / "python", folder / "onnxruntime"
    python.mkdir()
    onnxruntime.mkdir()
    # Copies (3 MB): Triton refuses a library that a link leads out of the backend directory.
    for file in (*(package / "backends" / "python").glob("*triton_python*"), stub):
        shutil.copy(file, python)
    shutil.copy(OUR_BACKEND, onnxruntime / "model.py")


@contextmanager
def _scratch(prefix: str) -> Iterator[Path]:
    """A temporary folder, locked while it is in use; one without a lock is of a server whose process was killed."""
    for stale in Path(tempfile.gettempdir()).glob(f"clipweld-*-{SCRATCH}*"):
        with suppress(OSError), _locked(stale, fcntl.LOCK_EX | fcntl.LOCK_NB):
            if stale.stat().st_uid == os.getuid():
                _kill_users(stale)
                remove_shared_memory(stale.name.rpartition(SCRATCH)[0])
                shutil.rmtree(stale)
    with ExitStack() as stack:
        yield _claimed(prefix, stack)


def _claimed(prefix: str, stack: ExitStack) -> Path:
    """A new folder, locked."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f"{prefix}{SCRATCH}"))
        with suppress(FileNotFoundError):  # before it had its lock, another server took it for one that was left
            stack.enter_context(_locked(folder, fcntl.LOCK_EX))
            if folder.exists():
                stack.callback(shutil.rmtree, folder, ignore_errors=True)
                return folder


def remove_shared_memory(prefix: str) -> None:
    """Remove what a Triton that has ended left there."""
    for region in SHARED_MEMORY.glob(f"{prefix}*"):
        region.unlink(missing_ok=True)


def _kill_users(backends: Path) -> None:
    """Kill a Triton with these backends, and its processes: told to end while it loads, it leaves them behind."""
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            arguments = line.read_bytes().split(b"\0")
            program, folder = arguments[0], os.fsencode(backends)
            if program.startswith(folder + b"/") or b"--backend-directory=" + folder in arguments:
                os.kill(int(line.parent.name), signal.SIGKILL)


@contextmanager
def _locked(folder: Path, how: int) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, how)
        yield
    finally:
        os.close(descriptor)


def _pytriton() -> Path:
    spec = importlib.util.find_spec("pytriton")
    package = Path(spec.origin).parent / "tritonserver" if spec and spec.origin else None
    if package is None or not (package / "bin" / "tritonserver").is_file():
        raise TritonMissing(
            "no Triton here: neither a tritonserver with an onnxruntime backend on PATH nor the nvidia-pytriton "
            "package; pip install nvidia-pytriton"
        )
    return package
