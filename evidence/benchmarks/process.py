"""The process that a contender runs in: the parent's side and the child's side, which exchange JSON lines.

Like `evidence.benchmarks.contenders`, this module imports little, because its imports count towards the start time of
every contender.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from evidence.benchmarks.contenders import Bundle, Contender

CALLS = 8  # at most, in one turn: enough for a median with batches of one
# Run on the CPU, without downloads of files that are already here, and without usage reports.
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}


class Failed(Exception):
    """A contender's process ended or never answered; the message is the last line that it wrote."""


class Worker:
    """A contender in a process of its own.

    Attributes:
        start: ``server_seconds`` from a fresh process to a ready server (None without a server), and
            ``client_seconds`` from there (without a server: from the fresh process) to the first answer.
    """

    def __init__(self, contender: type[Contender], folder: Path) -> None:
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        began = time.time()
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "evidence.benchmarks.process",
                f"{contender.__module__}:{contender.__qualname__}",
                str(folder),
            ],
            env=os.environ | ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        try:
            told = self._read()
        except Failed:
            self.close()
            raise
        ready = told["ready"] or began
        server = ready - began if told["ready"] else None
        self.start = {"server_seconds": server, "client_seconds": told["answered"] - ready}

    def take_turn(self, batch_size: int) -> dict:
        """Let it classify up to ``CALLS`` batches; return seconds per call, all probabilities, and peak memory."""
        try:
            self._process.stdin.write(json.dumps({"batch_size": batch_size}) + "\n")
            self._process.stdin.flush()
        except OSError:
            pass  # the process has ended; _read raises its last line
        return self._read()

    def close(self) -> None:
        """Close its stdin, after which it stops its server and ends; kill it if it does not end within 60 s."""
        try:
            self._process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        self._log.close()

    def _read(self) -> dict:
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._process.wait()
        self._log.seek(0)
        raise Failed(([line.strip() for line in self._log if line.strip()] or ["it wrote nothing"])[-1])


def find_contender(name: str) -> type[Contender]:
    """Return the class that ``MODULE:CLASS`` names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def peak_bytes(pid: int) -> int:
    """Return the peak resident memory of a process, as counted by the kernel; 0 if the process has ended."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)
    return 0


def _tree(pid: int) -> Iterator[int]:
    """Yield the ids of a process and of its descendants that are still running."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in children.read_text(encoding="utf-8").split():
                yield from _tree(int(child))


def _answer(name: str, folder: Path) -> None:
    """Start a contender, report the time of its first answer, then classify batches of images on request."""
    channel = os.fdopen(os.dup(1), "w")  # replies go to the real stdout; what libraries print goes to stderr
    os.dup2(2, 1)
    bundle = Bundle.load(folder)
    contender = find_contender(name)(bundle, folder)
    with contextlib.closing(contender):
        servers = contender.serve()
        ready = time.time()
        contender.start()
        contender.classify(bundle.images[:1])
        print(json.dumps({"ready": ready if servers else None, "answered": time.time()}), file=channel, flush=True)
        for line in sys.stdin:
            batch_size = json.loads(line)["batch_size"]
            contender.classify(bundle.images[:1])  # warms up threads and caches; not timed
            seconds, answers = [], []
            for first in range(0, len(bundle.images), batch_size)[:CALLS]:
                began = time.perf_counter()
                answers.append(contender.classify(bundle.images[first : first + batch_size]))
                seconds.append(time.perf_counter() - began)
            turn = {
                "seconds": seconds,
                "probabilities": np.concatenate(answers).tolist(),
                "peak_bytes": peak_bytes(os.getpid()),
                "server_peak_bytes": sum(peak_bytes(pid) for server in servers for pid in _tree(server)),
            }
            print(json.dumps(turn), file=channel, flush=True)


if __name__ == "__main__":
    _answer(sys.argv[1], Path(sys.argv[2]))
