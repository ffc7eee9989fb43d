"""Look after a running Triton: load again what its processes lose, and start another one where that is wanted.

With the Python-based backend every version has a process of its own. One that is killed, as the kernel does when memory
runs out, never comes back by itself: Triton goes on calling its version ready, and every request to it fails.
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
LIST_EVERY_S = 2.0  # takes milliseconds, for Triton has hundreds of threads
RELOADS = RESTARTS = 2  # of one version, and of Triton, within:
WITHIN_S = 600.0
PAUSE_S = 1.0  # before what failed to load is tried once more

Version = tuple[str, str]  # model and number, as Triton names them


class Served(Protocol):
    """What is looked after: a tritonserver, another one after each restart."""

    @property
    def process(self) -> subprocess.Popen:
        """The one that runs."""


class Watch(threading.Thread):
    """Runs until it is stopped, or has to give up.

    Args:
        triton: a server.
        repository: what it serves.
        link: what it takes for the repository; None where versions have no processes of their own.
        restart: starts another Triton, and returns once it is ready; None where it is not to be.
        report: called with a line when something happens.

    Attributes:
        failure: why it gave up.
        over: set at the end, whichever it is.
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
        """Look, several times a second."""
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
        except Exception as exc:  # a bug, too, ends the server; who waits for it raises this
            self.failure = exc
        finally:
            self.over.set()

    def _mend(self, reloader: Reloader, processes: dict[int, Version | int]) -> bool:
        """Load again what has lost a process; whether Triton was there to be asked."""
        try:
            lost, ended = self._lost(processes), [entry for entry in processes.values() if isinstance(entry, int)]
            # Without one that has ended, the list may have lacked some: the kernel makes it while they come and go.
            if lost and not ended and not self.over.wait(LOOK_EVERY_S):
                processes = processes_of(self._triton.process.pid, reloader.link)
                lost &= self._lost(processes)
            for version in sorted(lost):
                self._reload(reloader, version, [entry for entry in processes.values() if isinstance(entry, int)])
        except (OSError, HTTPException):
            return False
        return not lost

    def _lost(self, processes: dict[int, Version | int]) -> set[Version]:
        """Versions that Triton calls ready, with fewer processes than they should have."""
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
    """Triton's Python processes: which version each of them serves, or the status of one that has ended.

    Args:
        pid: of tritonserver.
        link: where Triton finds the repository: the processes are started with paths below it.
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
    """A process's status as subprocess gives it."""
    if status >= 0:
        return f"status {status}"
    with suppress(ValueError):
        return f"signal {-status} ({signal.Signals(-status).name})"
    return f"signal {-status}"


def _read_process(pid: int, link: Path) -> Version | int | None:
    state, *numbers = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    if state in "ZX":
        status = int(numbers[-1])  # as wait has it; the kernel hides it, as 0, from other users
        return -(status & 0x7F) or status >> 8
    arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    with suppress(IndexError, ValueError):
        model, number, *_ = Path(arguments[1]).relative_to(link).parts
        return model, number
    return None


def _has_ended(processes: dict[int, Version | int]) -> bool:
    """Whether one that lived when it was listed does no more."""
    return any(isinstance(entry, tuple) and _state(pid) in "ZX" for pid, entry in processes.items())


def _state(pid: int) -> str:
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
    return "X"


def _names(repository: Path) -> list[str]:
    with suppress(OSError):
        return sorted(entry.name for entry in repository.iterdir() if entry.is_dir())
    return []
