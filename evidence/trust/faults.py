"""Break a real Triton in every way that can be arranged, while real clients send requests without pause.

No answer may be wrong, every error must be a ClientError, no call may be overdue, and every client has to recover by
itself.

Run: python -m evidence.trust.faults --requests 10000
"""

from __future__ import annotations

import os
import shutil
import signal
import ssl
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import trustme
from cyclopts import Parameter
from rich.console import Console
from rich.progress import track

from clipweld.client import TLS
from clipweld.exporter.serving.triton import RunningTriton, serve
from clipweld.exporter.store.repository import CONFIG_FILE, Repository
from clipweld.trainer.base.backbone import load_backbone
from evidence import command_line
from evidence.command_line import POSITIVE
from evidence.trust.load import Load, Truth
from evidence.trust.proxy import Pass, closed, flipped, garbled, proxied, silent, slow, truncated
from evidence.trust.record import Record
from evidence.trust.served import distance, known, pictures, write_versions
from evidence.trust.tamper import Tampering, tampered_grpc, tampered_http

RECOVERY_S = 15.0
ROUNDS = 2
QUEUE = "dynamic_batching { default_queue_policy { max_queue_size: 1 } }"


class Triton:
    """A Triton that can be killed and restarted on the same ports."""

    def __init__(self, repository: Path) -> None:
        self.repository, self._ports, self._stack = repository, (0, 0), ExitStack()
        self._said: deque[str] = deque(maxlen=4)
        self.start()

    def start(self) -> None:
        """Start the server and return when it is ready."""
        port, http_port = self._ports
        self.server: RunningTriton = self._stack.enter_context(
            serve(self.repository, port=port, http_port=http_port, log=self._said.append)
        )
        self._ports = tuple(int(url.rpartition(":")[2]) for url in (self.server.url, self.server.http_url))

    def kill(self) -> None:
        """Send SIGKILL to the server and all its backends, and clean up what they leave, as before any restart."""
        with suppress(ProcessLookupError):
            os.killpg(self.server.process.pid, signal.SIGKILL)
        self._stack.close()

    def revive(self) -> str:
        """Restart the server if it has ended by itself, and return how it ended; return "" if it is running."""
        status = self.server.process.poll()
        if status is None:
            return ""
        self.kill()
        self.start()
        return f"status {status}, {' '.join(self._said)}"

    def close(self) -> None:
        self._stack.close()

    @property
    def ports(self) -> dict[str, int]:
        return dict(zip(("grpc", "http"), self._ports, strict=True))


@dataclass(frozen=True)
class Fault:
    """One kind of fault.

    Attributes:
        triton: the server.
        urls: URLs of the server, or of the proxy in front of it, by protocol.
        begin, end: functions that start and end the fault.
        seconds: how long the fault lasts each time.
        tls: for clients, if the URLs are encrypted.
    """

    triton: Triton
    urls: dict[str, str]
    begin: Callable[[], object]
    end: Callable[[], object]
    seconds: float = 1.0
    tls: TLS | None = None


@dataclass(frozen=True)
class Bench:
    """What all faults have in common.

    Attributes:
        repository: has the base as version 1 and a merged version 2.
        other: has the same version numbers, but a different version 2.
        folder: for further files.
        truth: the correct answers at each time.
        truths: the correct answers of ``repository`` and of ``other``, by version.
        pictures: the images that clients send.
        seed: of everything random.
    """

    repository: Repository
    other: Repository
    folder: Path
    truth: Truth
    truths: tuple[dict, dict]
    pictures: list
    seed: int


def main(
    *,
    requests: Annotated[int, Parameter(validator=POSITIVE, help="Least number of calls in total.")] = 10_000,
    seed: Annotated[int, Parameter(help="Seed of the questions and faults.")] = 0,
    out: Annotated[Path, Parameter(help="JSON file for the figures.")] = Path("runs/trust/faults.json"),
) -> None:
    """Break a server in each way in turn, and check every call that clients make meanwhile."""
    with Record(out) as record, tempfile.TemporaryDirectory(prefix="clipweld-faults-") as folder:
        repository, other = (
            write_versions(Path(folder), [count], name) for count, name in ((1, "models"), (2, "other"))
        )
        put_to_the_test(repository, other, Path(folder), requests, seed, record)


def put_to_the_test(
    repository: Repository, other: Repository, folder: Path, requests: int, seed: int, record: Record
) -> None:
    """Cause all faults, one after the other, and record the figures."""
    images, backbone = pictures(), load_backbone("mini")
    truths = tuple({v: known(r, v, images, backbone) for v in r.versions()} for r in (repository, other))
    alike = [[first, second] for first, second in zip(*(truth.values() for truth in truths), strict=True)][1:]
    record.figures["scores_of_versions_differ_by"] = min(map(distance, [truths[0].values(), *alike]))
    bench = Bench(repository, other, folder, Truth(truths[0]), truths, images, seed)
    total: Counter[str] = Counter()
    rows: dict[str, dict] = {}
    for name, open_fault in track(FAULTS.items(), "faults", console=Console(stderr=True)):
        with open_fault(bench) as fault:
            rows[name], broken = _break(name, fault, bench, requests // len(FAULTS))
        record.broken += broken
        total.update(rows[name]["calls"])
    left = sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("clipweld"))
    if left:
        record.broken.append(f"threads of closed clients are left: {left}")
    record.figures |= {
        "calls": total.total(),
        "right": total["right"],
        "failures": {kind: count for kind, count in sorted(total.items()) if kind[0].isupper()},
        **{kind: total[kind] for kind in ("wrong", "foreign", "overdue")},
        "recovery_s_max": max(row["recovery_s_max"] for row in rows.values()),
        "server_ended_by_itself": sum(len(row["server_ended_by_itself"]) for row in rows.values()),
        "faults": rows,
    }


def _break(name: str, fault: Fault, bench: Bench, calls: int) -> tuple[dict, list[str]]:
    """Repeat one fault until there were enough calls; return the figures and the broken promises."""
    recoveries: list[float] = []
    broken: list[str] = []
    deaths: list[str] = []
    with Load(fault.urls, bench.pictures, bench.truth, f"--seed {bench.seed}, {name}", fault.tls) as load:
        if load.wait_until_right(time.monotonic(), RECOVERY_S) is None:
            broken.append(f"{name}: not every client answers before anything is broken: {dict(load.ends)}")
        while not broken and (load.ends.total() < calls or len(recoveries) < ROUNDS):
            fault.begin()
            time.sleep(fault.seconds)
            fault.end()
            recovered_s = load.wait_until_right(time.monotonic(), RECOVERY_S)
            if recovered_s is None and (death := fault.triton.revive()):
                deaths.append(death)
                recovered_s = load.wait_until_right(time.monotonic(), RECOVERY_S)
            if recovered_s is None:
                broken.append(f"{name}, time {len(recoveries) + 1}: not every client answers {RECOVERY_S:g} s later")
            else:
                recoveries.append(recovered_s)
    row = {
        "calls": dict(sorted(load.ends.items())),
        "images": load.images,
        "stalled_s": round(load.stalled_s, 2),
        "times": len(recoveries),
        "recovery_s_median": round(median(recoveries), 3) if recoveries else None,
        "recovery_s_max": round(max(recoveries, default=RECOVERY_S), 3),
        "server_ended_by_itself": deaths,
    }
    return row, broken + load.faults


@contextmanager
def _server(repository: Path) -> Iterator[Triton]:
    triton = Triton(repository)
    try:
        yield triton
    finally:
        triton.close()


def _urls(ports: dict[str, int], encrypted: str = "") -> dict[str, str]:
    return {name: f"{name}{encrypted}://127.0.0.1:{port}" for name, port in ports.items()}


@contextmanager
def _killed(bench: Bench) -> Iterator[Fault]:
    with _server(bench.repository.path) as triton:
        yield Fault(triton, _urls(triton.ports), triton.kill, triton.start)


@contextmanager
def _restored(bench: Bench) -> Iterator[Fault]:
    """Kill the server and restart it with another repository, whose version 2 is a different one."""
    with _server(bench.repository.path) as triton:

        def kill() -> None:
            triton.kill()
            swapped = triton.repository == bench.repository.path
            triton.repository = (bench.other if swapped else bench.repository).path
            bench.truth.change(bench.truths[swapped])

        yield Fault(triton, _urls(triton.ports), kill, triton.start, seconds=0.2)
        bench.truth.change(bench.truths[0])


@contextmanager
def _stopped(bench: Bench) -> Iterator[Fault]:
    """Stop tritonserver with SIGSTOP, then continue it.

    Its Python backends are not stopped: otherwise Triton 2.51 sometimes aborts when it continues.
    """
    with _server(bench.repository.path) as triton:
        process = triton.server.process
        stop, go_on = (lambda number=number: process.send_signal(number) for number in (signal.SIGSTOP, signal.SIGCONT))
        yield Fault(triton, _urls(triton.ports), stop, go_on, seconds=4)


def _through(passing: Pass, seconds: float = 2.0) -> Callable[[Bench], object]:
    """Return a fault in which clients connect through a proxy that damages or delays answers."""

    @contextmanager
    def opened(bench: Bench) -> Iterator[Fault]:
        with ExitStack() as stack:
            triton = stack.enter_context(_server(bench.repository.path))
            proxies = {n: stack.enter_context(proxied(p, f"{bench.seed} {n}")) for n, p in triton.ports.items()}

            def treat(fault: Pass | None) -> None:
                for proxy in proxies.values():
                    proxy.fault = fault

            ports = {name: proxy.port for name, proxy in proxies.items()}
            yield Fault(triton, _urls(ports), lambda: treat(passing), lambda: treat(None), seconds)

    return opened


@contextmanager
def _flipped(bench: Bench) -> Iterator[Fault]:
    """Flip bits anywhere in the data that TLS protects.

    The proxy that flips bits is in front of the proxy that terminates TLS.
    """
    authority = trustme.CA()
    ca = bench.folder / "ca.pem"
    authority.cert_pem.write_to_path(ca)
    with ExitStack() as stack:
        triton = stack.enter_context(_server(bench.repository.path))
        flipping = {}
        for name, port in triton.ports.items():
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            authority.issue_cert("127.0.0.1").configure_cert(context)
            if name == "grpc":
                context.set_alpn_protocols(["h2"])
            ending = stack.enter_context(proxied(port, "", context))
            flipping[name] = stack.enter_context(proxied(ending.port, f"{bench.seed} {name}"))

        def treat(fault: Pass | None) -> None:
            for proxy in flipping.values():
                proxy.fault = fault

        ports = {name: proxy.port for name, proxy in flipping.items()}
        yield Fault(triton, _urls(ports, "s"), lambda: treat(flipped), lambda: treat(None), 2.0, TLS(ca=ca))


@contextmanager
def _tampered(bench: Bench) -> Iterator[Fault]:
    tampering = Tampering(bench.seed)
    with (
        _server(bench.repository.path) as triton,
        tampered_grpc(triton.ports["grpc"], tampering) as grpc_port,
        tampered_http(triton.ports["http"], tampering) as http_port,
    ):

        def treat(rate: float) -> None:
            tampering.rate = rate

        yield Fault(
            triton, _urls({"grpc": grpc_port, "http": http_port}), lambda: treat(0.3), lambda: treat(0), seconds=3
        )


@contextmanager
def _busy(bench: Bench) -> Iterator[Fault]:
    """Limit the queue to one request, and add many more clients."""
    models = bench.folder / "busy"
    shutil.copytree(bench.repository.path, models, dirs_exist_ok=True)
    for config in models.glob(f"*/{CONFIG_FILE}"):
        config.write_text(config.read_text().replace("dynamic_batching { }", QUEUE))
    with _server(models) as triton:
        urls = _urls(triton.ports)
        crowd = Load(urls, bench.pictures, bench.truth, f"--seed {bench.seed}, the crowd", workers=6)
        yield Fault(triton, urls, crowd.__enter__, lambda: crowd.__exit__(None, None, None), seconds=3)


FAULTS: dict[str, Callable[[Bench], object]] = {
    "killed": _killed,
    "restored with other files": _restored,
    "stopped": _stopped,
    "slow": _through(slow),
    "closed": _through(closed),
    "truncated": _through(truncated),
    "garbled": _through(garbled),
    "silent": _through(silent, 1.5),
    "flipped bits under TLS": _flipped,
    "tampered": _tampered,
    "out of queue": _busy,
}


if __name__ == "__main__":
    command_line.run(main)
