"""Supervise a running Triton: reload versions whose process died and, if requested, restart Triton itself.

With the Python-based backend every version has a process of its own. One that is killed, as the kernel does when memory
runs out, is not restarted: Triton still reports its version as ready, and every request to it fails.
"""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Protocol

from clipweld.exporter.errors import ModelNotLoaded, TritonFailed
from clipweld.exporter.serving.control import Control
from clipweld.exporter.serving.reload import Reloader

LOOK_EVERY_S = 0.1
LIST_EVERY_S = 2.0  # a listing takes milliseconds, because Triton has hundreds of threads
RELOADS = RESTARTS = 2  # of one version, and of Triton, within:
WITHIN_S = 600.0
PAUSE_S = 1.0  # before a failed load is retried

Version = tuple[str, str]  # model and number, as Triton names them


class Served(Protocol):
    """The supervised tritonserver; a restart replaces its process."""

    @property
    def process(self) -> subprocess.Popen:
        """The current process."""


class Watch(threading.Thread):
    """A thread that supervises Triton until it is stopped or gives up.

    Args:
        triton: a server.
        repository: what it serves.
        link: the path by which Triton reaches the repository; None if versions have no processes of their own.
        restart: starts another Triton and returns once it is ready; None to give up instead.
        report: called with a line when something happens.

    Attributes:
        failure: why it gave up.
        over: set when the thread ends, for either reason.
    """

    def __init__(
        self,
        triton: Served,
        repository: Path,
        link: Path | None,
        control: Control,
        restart: Callable[[], None] | None,
        report: Callable[[str], None],
    ) -> None:
        super().__init__(name="triton-watch", daemon=True)
        self.failure: Exception | None = None
        self.over = threading.Event()
        self._triton, self._repository, self._control = triton, repository, control
        self._restart, self._report = restart, report
        self._reloader = None if link is None else Reloader(repository, link, control)
        self._past: defaultdict[Version | None, deque[float]] = defaultdict(deque)

    @property
    def reason(self) -> Exception:
        """The failure of a watch that gave up."""
        assert self.failure is not None  # only ``serve`` sets ``over`` without one, once its block is left
        return self.failure

    def run(self) -> None:
        """Check several times per second."""
        known: dict[int, Version | int] | None = None  # None: look at once
        list_again, reloader = 0.0, self._reloader
        try:
            while not self.over.wait(LOOK_EVERY_S):
                if (status := self._triton.process.poll()) is not None:
                    self._start_another(f"Triton ended by itself with {in_words(status)}")
                    known = None
                elif reloader and (known is None or time.monotonic() > list_again or _has_ended(known)):
                    processes = processes_of(self._triton.process.pid, reloader.link)
                    list_again = time.monotonic() + LIST_EVERY_S
                    if processes != known:
                        known = processes if self._mend(reloader, processes) else None
        except Exception as exc:  # bugs too: the thread that waits for ``over`` raises it
            self.failure = exc
        finally:
            self.over.set()

    def _mend(self, reloader: Reloader, processes: dict[int, Version | int]) -> bool:
        """Reload versions that lost a process; False if another look is needed."""
        try:
            lost, ended = self._lost(processes), [entry for entry in processes.values() if isinstance(entry, int)]
            # If none is listed as ended, the listing may be incomplete: /proc is not read atomically. So look twice.
            if lost and not ended and not self.over.wait(LOOK_EVERY_S):
                processes = processes_of(self._triton.process.pid, reloader.link)
                lost &= self._lost(processes)
            for version in sorted(lost):
                self._reload(reloader, version, [entry for entry in processes.values() if isinstance(entry, int)])
        except (OSError, HTTPException):
            return False
        return not lost

    def _lost(self, processes: dict[int, Version | int]) -> set[Version]:
        """Return versions that Triton reports as ready, but that have fewer processes than configured."""
        living, lost = Counter(processes.values()), set()
        for model in _names(self._repository):
            ready = self._control.ready_versions(model)
            wanted = self._control.processes(model) if ready else 0
            lost |= {(model, version) for version in ready if living[model, version] < wanted}
        return lost

    def _reload(self, reloader: Reloader, version: Version, statuses: Iterable[int]) -> None:
        model, number = version
        ends = sorted({in_words(status) for status in statuses if status})
        reason, dropped = " ".join(("its process ended", *(["with", " or ".join(ends)] if ends else ()))), False
        while self._may_try(version):
            self._report(f"{model} version {number}: {reason}; loading it again")
            began = time.monotonic()
            try:
                if not dropped:
                    reloader.drop(model, number)
                    dropped = True
                reloader.load(model)
                self._report(f"{model} version {number}: loaded again after {time.monotonic() - began:.1f} s")
                return
            except (ModelNotLoaded, OSError, HTTPException) as exc:
                if self._triton.process.poll() is not None or self.over.wait(PAUSE_S):
                    return
                reason = f"can't be loaded ({exc})"
        raise TritonFailed(
            f"{model} version {number}: {reason}, and {RELOADS} times before within {WITHIN_S / 60:.0f} minutes; "
            "the kernel kills what memory runs out for: serve fewer versions, or with more memory"
        )

    def _start_another(self, reason: str) -> None:
        if self._restart is None:
            raise TritonFailed(
                f"{reason}; exporter serve -v shows its log, and exporter serve --restart starts another one"
            )
        if not self._may_try(None):
            raise TritonFailed(f"{reason}, and {RESTARTS} times before within {WITHIN_S / 60:.0f} minutes; see -v")
        self._report(f"{reason}; starting another one")
        self._restart()
        self._report("Triton is ready again")

    def _may_try(self, what: Version | None) -> bool:
        now, past = time.monotonic(), self._past[what]
        while past and past[0] < now - WITHIN_S:
            past.popleft()
        past.append(now)
        return len(past) <= (RESTARTS if what is None else RELOADS)


def processes_of(pid: int, link: Path) -> dict[int, Version | int]:
    """Map the pid of each of Triton's Python processes to the version it serves, or to its exit status.

    Args:
        pid: of tritonserver.
        link: the path by which Triton reaches the repository; the processes' arguments are below it.
    """
    found: dict[int, Version | int] = {}
    for children in Path("/proc").glob(f"{pid}/task/*/children"):
        with suppress(OSError):
            for child in map(int, children.read_text(encoding="ascii").split()):
                with suppress(OSError):
                    if (entry := _read_process(child, link)) is not None:
                        found[child] = entry
    return found


def in_words(status: int) -> str:
    """Describe an exit status as subprocess reports it."""
    if status >= 0:
        return f"status {status}"
    with suppress(ValueError):
        return f"signal {-status} ({signal.Signals(-status).name})"
    return f"signal {-status}"


def _read_process(pid: int, link: Path) -> Version | int | None:
    state, *numbers = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    if state in "ZX":
        status = int(numbers[-1])  # in wait()'s encoding; other users read 0
        return -(status & 0x7F) or status >> 8
    arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    with suppress(IndexError, ValueError):
        model, number, *_ = Path(arguments[1]).relative_to(link).parts
        return model, number
    return None


def _has_ended(processes: dict[int, Version | int]) -> bool:
    """Whether a process that was alive when listed has ended."""
    return any(isinstance(entry, tuple) and _state(pid) in "ZX" for pid, entry in processes.items())


def _state(pid: int) -> str:
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
    return "X"


def _names(repository: Path) -> list[str]:
    with suppress(OSError):
        return sorted(entry.name for entry in repository.iterdir() if entry.is_dir())
    return []
