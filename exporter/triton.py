"""Run a local Triton on a model repository, on loopback only, and leave nothing behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from exporter.admin import HEADER, RESTRICTED, new_admin_key
from exporter.errors import CommandMissing, PortTaken, TritonFailed
from exporter.installation import Installation, installation, remove_shared_memory
from exporter.isolation import isolated_environment, stack_limits

HOST = "127.0.0.1"
STOP_TIMEOUT_S = 15.0
PR_SET_PDEATHSIG = 1
DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy has no way to our loopback


@dataclass(frozen=True)
class Server:
    """A Triton that is ready.

    Attributes:
        url: ``grpc://127.0.0.1:PORT``.
        http_url: ``http://127.0.0.1:PORT``.
        process: tritonserver, the leader of its own process group.
        description: which Triton and which backend.
    """

    url: str
    http_url: str
    process: subprocess.Popen
    description: str

    @property
    def environment(self) -> dict[str, str]:
        """What a command run beside the server is told."""
        return {"CLIPWELD_URL": self.url, "CLIPWELD_HTTP_URL": self.http_url}


@contextmanager
def serve(
    repository: Path,
    *,
    port: int = 0,
    http_port: int = 0,
    timeout_s: float = 120.0,
    log: Callable[[str], None] = lambda line: None,
) -> Iterator[Server]:
    """Serve all models of a repository until the block is left.

    Args:
        repository: a folder of models with at least one version.
        port, http_port: of gRPC and HTTP; 0 takes a free one.
        timeout_s: how long loading may take.
        log: called with each line that Triton writes, from another thread.

    Raises:
        PortTaken: names the port.
        TritonMissing: no tritonserver here.
        TritonFailed: a model failed to load (in Triton's own words), or loading took too long.
    """
    port, http_port = _claim_ports(port, http_port)
    prefix = f"clipweld-{os.getpid()}-{port}-"
    with installation(prefix) as triton:
        process = _start(triton, _arguments(triton, repository, port, http_port, prefix))
        lines: deque[str] = deque(maxlen=2000)
        reader = threading.Thread(target=_read, args=(process, lines, log), daemon=True)
        reader.start()
        try:
            _wait_until_ready(process, f"http://{HOST}:{http_port}", timeout_s, reader, lines)
            yield Server(f"grpc://{HOST}:{port}", f"http://{HOST}:{http_port}", process, triton.description)
        finally:
            _stop(process)
            reader.join(timeout=STOP_TIMEOUT_S)
            process.stdout.close()
            remove_shared_memory(prefix)


def run_beside(server: Server, command: Sequence[str]) -> int:
    """Run a command that finds the server in ``CLIPWELD_URL`` and ``CLIPWELD_HTTP_URL``.

    Returns:
        its exit status; 128 + N where signal N ended it.
    """
    process = subprocess.Popen(command, env=os.environ | server.environment)
    try:
        while True:
            # Ctrl-C reaches the command too, being in our process group: what it makes of it is its own affair.
            with contextlib.suppress(KeyboardInterrupt):
                status = process.wait()
                return status if status >= 0 else 128 - status
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def find_command(command: Sequence[str]) -> None:
    """Refuse a command that can't be run, before a server is started for it.

    Raises:
        CommandMissing: no such program.
    """
    if shutil.which(command[0]) is None:
        raise CommandMissing(f"command {command[0]!r}: no such program; give one after --")


def wait_until_stopped(server: Server) -> None:
    """Return never, unless interrupted.

    Raises:
        TritonFailed: Triton ended by itself.
    """
    status = server.process.wait()
    raise TritonFailed(f"Triton at {server.url} ended by itself with status {status}; exporter serve -v shows its log")


def _arguments(triton: Installation, repository: Path, port: int, http_port: int, prefix: str) -> list[str]:
    place = repository.resolve()
    triton.models.symlink_to(place)
    return [
        str(triton.binary),
        f"--model-repository={triton.models if triton.in_processes else place}",
        f"--backend-directory={triton.backends}",
        # Explicit, so that versions can be switched later; * loads everything at the start.
        "--model-control-mode=explicit",
        "--load-model=*",
        "--disable-auto-complete-config",
        # Strict would mean "not ready" while any version loads, and for good after one that failed to. Nothing is lost:
        # ports open once everything is loaded, and what can't be loaded at the start ends the server.
        "--strict-readiness=false",
        "--allow-metrics=false",
        # Triton's own default is every interface.
        f"--http-address={HOST}",
        f"--http-port={http_port}",
        f"--grpc-address={HOST}",
        f"--grpc-port={port}",
        "--exit-timeout-secs=10",
        f"--backend-config=python,shm-region-prefix-name={prefix}",
        *_restrictions(new_admin_key(repository)),
    ]


def _restrictions(key: str) -> list[str]:
    """What wants the administrator's key."""
    flags = ("--grpc-restricted-protocol", "--http-restricted-api")
    return [f"{flag}={RESTRICTED}:{HEADER}={key}" for flag in flags]


def _start(triton: Installation, arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        arguments,
        cwd=triton.working_folder,
        env=isolated_environment(os.environ) | triton.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C reaches us alone, and one signal reaches all of its processes
        preexec_fn=_prepare(),
    )


def _prepare() -> Callable[[], None] | None:
    """Have the kernel stop Triton when this process is killed and can't do it itself, and give its threads room."""
    if not sys.platform.startswith("linux"):
        return None
    # Looked up here: after the fork only the calls themselves are safe.
    prctl, limits = ctypes.CDLL(None).prctl, stack_limits()

    def prepare() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        resource.setrlimit(resource.RLIMIT_STACK, limits)

    return prepare


def _read(process: subprocess.Popen, lines: deque[str], log: Callable[[str], None]) -> None:
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        log(line.rstrip("\n"))


def _wait_until_ready(
    process: subprocess.Popen, http_url: str, timeout_s: float, reader: threading.Thread, lines: deque[str]
) -> None:
    deadline = time.monotonic() + timeout_s
    while process.poll() is None:
        # A connection that is refused, or a 400 while models load: both mean not yet.
        with (
            contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError),
            DIRECTLY.open(f"{http_url}/v2/health/ready", timeout=5) as response,
        ):
            if response.status == 200:
                return
        if time.monotonic() > deadline:
            raise TritonFailed(
                f"Triton was not ready within {timeout_s:g} s; give it longer with --timeout, or see its log with -v"
            )
        time.sleep(0.05)
    reader.join(timeout=STOP_TIMEOUT_S)
    raise TritonFailed(f"Triton did not start: {_reason(list(lines))}")


def _reason(lines: list[str]) -> str:
    """Triton's own words, in one line: the first model that failed, else its last error, else its last line."""
    errors = [re.sub(r"^[EF]\d{4} [\d:.]+ \d+ \S+\] ", "", line) for line in lines if re.match(r"[EF]\d{4} ", line)]
    failed = [line for line in errors if "failed to load" in line]
    text = (failed or errors[-1:] or lines[-1:] or ["it wrote nothing"])[0]
    return " ".join(text.strip('"').split())


def _stop(process: subprocess.Popen) -> None:
    """End tritonserver and everything it started."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _claim_ports(*ports: int) -> list[int]:
    """Free ports in place of zeros, all different; others proven free."""
    with contextlib.ExitStack() as stack:
        claimed = []
        for port in ports:
            held = stack.enter_context(socket.socket())
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                held.bind((HOST, port))
            except OSError as exc:
                raise PortTaken(
                    f"port {port} on {HOST}: {exc.strerror.lower()}; give another, or 0 for a free one"
                ) from exc
            claimed.append(held.getsockname()[1])
        return claimed
