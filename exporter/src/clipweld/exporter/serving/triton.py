"""Run a local Triton on a model repository, on loopback only, and leave nothing behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from clipweld.exporter.errors import CommandMissing, PortTaken
from clipweld.exporter.serving.admin import HEADER, RESTRICTED, new_admin_key
from clipweld.exporter.serving.announcement import announced
from clipweld.exporter.serving.control import Control
from clipweld.exporter.serving.installation import Installation, installation, remove_shared_memory
from clipweld.exporter.serving.process import STOP_TIMEOUT_S, Triton
from clipweld.exporter.serving.watch import LOOK_EVERY_S, Watch

HOST = "127.0.0.1"


class RunningTriton:
    """A supervised Triton: versions whose process dies are reloaded.

    Attributes:
        url: ``grpc://127.0.0.1:PORT``.
        http_url: ``http://127.0.0.1:PORT``.
        description: which Triton and which backend.
        watch: the thread that supervises it.
    """

    watch: Watch

    def __init__(self, url: str, http_url: str, description: str, start: Callable[[], Triton]) -> None:
        self.url, self.http_url, self.description = url, http_url, description
        self._start, self._lock, self._stopped = start, threading.Lock(), False
        self._triton = start()

    @property
    def process(self) -> subprocess.Popen:
        """The tritonserver, leader of its own process group; a new one after a restart."""
        return self._triton.process

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables for a command run beside the server."""
        return {"CLIPWELD_URL": self.url, "CLIPWELD_HTTP_URL": self.http_url}

    def wait_until_ready(self, control: Control, timeout_s: float) -> None:
        """Return once everything is loaded.

        Raises:
            TritonFailed: it ended, or takes too long.
        """
        self._triton.wait_until_ready(control, timeout_s)

    def start_another(self) -> None:
        """Replace a Triton that ended, unless ``stop`` was called meanwhile from another thread."""
        with self._lock:
            if not self._stopped:
                self._triton.stop()
                self._triton = self._start()

    def stop(self) -> None:
        """End it for good."""
        with self._lock:
            self._stopped = True
            self._triton.stop()


@contextmanager
def serve(
    repository: Path,
    *,
    port: int = 0,
    http_port: int = 0,
    timeout_s: float = 120.0,
    restart: bool = False,
    log: Callable[[str], None] = lambda line: None,
    report: Callable[[str], None] = lambda line: None,
) -> Iterator[RunningTriton]:
    """Serve all models of a repository until the block is left.

    Args:
        repository: a folder of models with at least one version.
        port, http_port: of gRPC and HTTP; 0 takes a free one.
        timeout_s: how long loading may take.
        restart: whether Triton is restarted if it ends by itself.
        log: called with each line that Triton writes, from another thread.
        report: likewise, called with a line when a version is reloaded or Triton restarted.

    Raises:
        PortTaken: names the port.
        TritonMissing: no tritonserver here.
        TritonFailed: a model failed to load (in Triton's own words), or loading took too long.
    """
    port, http_port = _claim_ports(port, http_port)
    url, http_url = f"grpc://{HOST}:{port}", f"http://{HOST}:{http_port}"
    prefix = f"clipweld-{os.getpid()}-{port}-"
    with contextlib.ExitStack() as stack:
        found = stack.enter_context(installation(prefix))
        found.models.symlink_to(repository.resolve())
        hidden = stack.enter_context(announced(repository, url, http_url))
        if hidden:
            report(f"other commands find this server by its address alone, as --url: it can't be left in {hidden}")
        key = new_admin_key(repository)
        arguments = _arguments(found, repository, port, http_port, prefix, key)
        control = Control(http_url, key, timeout_s)

        def start() -> Triton:
            remove_shared_memory(prefix)
            return Triton(found, arguments, log)

        def start_another() -> None:
            server.start_another()
            server.wait_until_ready(control, timeout_s)

        server = RunningTriton(url, http_url, found.description, start)
        link = found.models if found.in_processes else None
        server.watch = Watch(server, repository, link, control, start_another if restart else None, report)
        try:
            server.wait_until_ready(control, timeout_s)
            server.watch.start()
            yield server
        finally:
            server.watch.over.set()
            server.stop()
            if server.watch.ident is not None:
                server.watch.join()
            remove_shared_memory(prefix)


def run_beside(server: RunningTriton, command: Sequence[str]) -> int:
    """Run a command that finds the server in ``CLIPWELD_URL`` and ``CLIPWELD_HTTP_URL``.

    Returns:
        its exit status; 128 + N if signal N ended it.

    Raises:
        TritonFailed: the server is gone for good; the command is ended.
    """
    process = subprocess.Popen(command, env=os.environ | server.environment)
    try:
        while not server.watch.over.is_set():
            # Ctrl-C reaches the command too, which is in our process group; whether it ends is its own decision.
            with contextlib.suppress(KeyboardInterrupt, subprocess.TimeoutExpired):
                status = process.wait(LOOK_EVERY_S)
                return status if status >= 0 else 128 - status
        raise server.watch.reason
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def find_command(command: Sequence[str]) -> None:
    """Refuse a command that can't be run, before a server is started for it.

    Raises:
        CommandMissing: no such program.
    """
    if shutil.which(command[0]) is None:
        raise CommandMissing(f"command {command[0]!r}: no such program; give one after --")


def wait_until_stopped(server: RunningTriton) -> None:
    """Block until interrupted.

    Raises:
        TritonFailed: the server is gone for good.
    """
    server.watch.over.wait()
    raise server.watch.reason


def _arguments(found: Installation, repository: Path, port: int, http_port: int, prefix: str, key: str) -> list[str]:
    return [
        f"--model-repository={found.models if found.in_processes else repository.resolve()}",
        f"--backend-directory={found.backends}",
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
        *_restrictions(key),
    ]


def _restrictions(key: str) -> list[str]:
    """Flags that make Triton require the administrator's key."""
    flags = ("--grpc-restricted-protocol", "--http-restricted-api")
    return [f"{flag}={RESTRICTED}:{HEADER}={key}" for flag in flags]


def _claim_ports(*ports: int) -> list[int]:
    """Replace zeros by distinct free ports, and check that the others are free."""
    with contextlib.ExitStack() as stack:
        claimed = []
        for port in ports:
            held = stack.enter_context(socket.socket())
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                held.bind((HOST, port))
            except OSError as exc:
                raise PortTaken(
                    f"port {port} on {HOST}: {(exc.strerror or str(exc)).lower()}; give another, or 0 for a free one"
                ) from exc
            claimed.append(held.getsockname()[1])
        return claimed
