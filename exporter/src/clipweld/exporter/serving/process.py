"""The tritonserver process: started in a folder of its own, logged, and stopped with all its child processes."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from http.client import HTTPException

from clipweld.exporter.errors import TritonFailed
from clipweld.exporter.serving.control import Control
from clipweld.exporter.serving.installation import Installation
from clipweld.exporter.serving.isolation import isolated_environment, stack_limits

STOP_TIMEOUT_S = 15.0
PR_SET_PDEATHSIG = 1


class Triton:
    """One tritonserver process.

    Args:
        found: the installation to start.
        arguments: of the command line, without the program.
        log: called with each line of its output, from another thread.

    Attributes:
        process: the leader of its own process group.
    """

    def __init__(self, found: Installation, arguments: Sequence[str], log: Callable[[str], None]) -> None:
        self.process = subprocess.Popen(
            [str(found.binary), *arguments],
            cwd=found.working_folder,
            env=isolated_environment(os.environ) | found.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # keeps Ctrl-C from Triton, and lets killpg reach all its processes
            preexec_fn=_prepare(),
        )
        assert self.process.stdout is not None  # a pipe
        self._output = self.process.stdout
        self._lines: deque[str] = deque(maxlen=2000)
        self._reader = threading.Thread(target=self._read, args=(log,), daemon=True)
        self._reader.start()

    def wait_until_ready(self, control: Control, timeout_s: float) -> None:
        """Return once everything is loaded.

        Raises:
            TritonFailed: it exited (with the reason from its log), or takes too long.
        """
        deadline = time.monotonic() + timeout_s
        while self.process.poll() is None:
            with suppress(OSError, HTTPException):  # nobody listens yet
                if control.is_ready():
                    return
            if time.monotonic() > deadline:
                raise TritonFailed(
                    f"Triton was not ready within {timeout_s:g} s; give it longer with --timeout, or see its log with "
                    "-v"
                )
            time.sleep(0.05)
        self._reader.join(timeout=STOP_TIMEOUT_S)
        raise TritonFailed(f"Triton did not start: {_reason(list(self._lines))}")

    def stop(self) -> None:
        """Stop it and all processes it started."""
        if self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_TIMEOUT_S)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join(timeout=STOP_TIMEOUT_S)
        self._output.close()

    def _read(self, log: Callable[[str], None]) -> None:
        for line in self._output:
            self._lines.append(line.rstrip("\n"))
            log(line.rstrip("\n"))


def _prepare() -> Callable[[], None] | None:
    """Return a preexec_fn: the kernel stops Triton if this process is killed, and its threads get large stacks."""
    if not sys.platform.startswith("linux"):
        return None
    # Looked up before the fork: afterwards a lock held by another thread, as of the import system, could deadlock.
    prctl, limits = ctypes.CDLL(None).prctl, stack_limits()

    def prepare() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        resource.setrlimit(resource.RLIMIT_STACK, limits)

    return prepare


def _reason(lines: list[str]) -> str:
    """Return Triton's reason in one line: the first model that failed, else the last error, else the last line."""
    errors = [re.sub(r"^[EF]\d{4} [\d:.]+ \d+ \S+\] ", "", line) for line in lines if re.match(r"[EF]\d{4} ", line)]
    failed = [line for line in errors if "failed to load" in line]
    text = (failed or errors[-1:] or lines[-1:] or ["it wrote nothing"])[0]
    return " ".join(text.strip('"').split())
