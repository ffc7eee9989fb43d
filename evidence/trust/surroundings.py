"""Run clipweld with a real server in surroundings that may harm it, as on other people's machines.

These are their working folder, their proxies, files that they put beside ours, processes that the kernel kills,
programs that end in the middle of a call, and forks.

Run: python -m evidence.trust.surroundings --rounds 10
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from clipweld.client import ZeroShotClassifier
from clipweld.client.errors import ClientError
from clipweld.exporter.errors import TritonFailed
from clipweld.exporter.serving.triton import serve
from clipweld.exporter.store.repository import KINDS, Repository
from clipweld.trainer.tasks import sample
from evidence import command_line
from evidence.command_line import POSITIVE
from evidence.trust.record import Record
from evidence.trust.served import write_versions

TIMEOUT_S = 300  # enough on a busy machine
LABELS = ("cat", "dog")
PACKAGES = ("numpy", "onnxruntime", "triton_python_backend_utils", "sitecustomize", "usercustomize", "google")
PROXIES = ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
COMMANDS = (("promote", "1"), ("promote", "2"), ("rollback",), ("prune", "--keep", "1"), ("versions",))
# Programs that end before they have read all answers: the code, the exit status, and the end of stderr.
ENDINGS = {
    "held by a global name": ("answers = classify()\nnext(answers)", 0, ""),
    "an error of the program's own": ("for answer in classify():\n    raise RuntimeError('own')", 1, "own"),
    "sys.exit": ("for answer in classify():\n    sys.exit(3)", 3, ""),
    "zip": ("for _ in zip(classify(), range(3)): pass", 0, ""),
    "closed under it": ("answers = classify()\nnext(answers)\nclip.close()", 0, ""),
    "held in a thread": (
        "threading.Thread(target=lambda: held.append(next(classify()))).start()\ntime.sleep(1)",
        0,
        "",
    ),
}
PROGRAM = """
import sys, threading, time
from clipweld.client import ZeroShotClassifier
clip, held = ZeroShotClassifier(sys.argv[1]), []
def classify(): return clip.classify([sys.argv[2]] * 1000, labels=["cat", "dog"])
"""


def main(
    *,
    rounds: Annotated[int, Parameter(validator=POSITIVE, help="How often each check is repeated.")] = 10,
    seed: Annotated[int, Parameter(help="Seed of the files and of the processes to kill.")] = 0,
    out: Annotated[Path, Parameter(help="JSON file for the figures.")] = Path("runs/trust/surroundings.json"),
) -> None:
    """Run clipweld in all these surroundings."""
    with Record(out) as record, tempfile.TemporaryDirectory(prefix="clipweld-surroundings-") as folder:
        place = Path(folder)
        image = place / "image.png"
        sample(1)[0][0].save(image)
        repository = write_versions(place, [1])
        console = Console(stderr=True)
        with console.status("working folder"):
            record.figures["working folder"] = in_a_working_folder(repository.path, image, record.broken)
        with serve(repository.path) as server:
            urls = (server.url, server.http_url)
            with console.status("proxies"):
                record.figures["proxies"] = behind_a_proxy(repository.path, urls, image, record.broken)
            with console.status("endings"):
                record.figures["endings"] = endings(urls, image, rounds, record.broken)
            with console.status("forks"):
                record.figures["forks"] = forks(urls, image, rounds, record.broken)
        with console.status("killed processes"):
            record.figures["killed"] = killed(repository.path, image, rounds, seed, record.broken)
        with console.status("foreign files"):
            record.figures["foreign"] = foreign(repository, place, rounds, seed, record.broken)


def in_a_working_folder(models: Path, image: Path, broken: list[str]) -> dict[str, int]:
    """Serve and classify in a folder with a file named like each module of the standard library; none may be run."""
    with tempfile.TemporaryDirectory(prefix="clipweld-hostile-") as name:
        folder = Path(name)
        modules = sorted({*filter(str.isidentifier, sys.stdlib_module_names), *PACKAGES})
        for module in modules:
            (folder / f"{module}.py").write_text(f"open({str(folder / 'RAN')!r}, 'a').write({module!r} + ' ')\n")
        for variables in ({}, {"PYTHONPATH": str(folder)}):
            # PYTHONPATH makes the exporter itself import from there; its server must not.
            with _working_in(folder), _environment(variables), serve(models) as server:
                _answer(server.url, image)
        ran = (folder / "RAN").read_text().split() if (folder / "RAN").exists() else []
        broken += [f"working folder: {module}.py was run" for module in sorted(set(ran))]
        return {"modules": len(modules), "run": len(set(ran)), "servers": 2}


def behind_a_proxy(models: Path, urls: tuple[str, str], image: Path, broken: list[str]) -> dict[str, int]:
    """Run commands that connect to this machine, with every proxy variable set to a proxy that refuses all requests."""
    with _proxy() as (address, asked):
        environment = dict.fromkeys(PROXIES, address)
        commands = [("exporter", "serve", "--port", "0", "--repository", str(models), "--", "client", "versions")]
        for url in urls:
            commands.append(("client", "classify", str(image), "--labels", ",".join(LABELS), "--url", url))
            commands.append(("exporter", "promote", "2", "--repository", str(models), "--url", url))
        for command in commands:
            done = _run(command, environment)
            if done.returncode:
                broken.append(f"proxies: {' '.join(command[:2])} ended with {done.returncode}: {done.stderr.strip()}")
        broken += [f"proxies: asked for {what}" for what in asked]
        return {"commands": len(commands), "requests to the proxy": len(asked)}


def endings(urls: tuple[str, str], image: Path, rounds: int, broken: list[str]) -> dict[str, int]:
    """Run programs that end in the middle of a call."""
    programs = 0
    for _ in range(max(1, rounds // 5)):
        for what, (lines, status, last) in ENDINGS.items():
            for url in urls:
                programs += 1
                try:
                    done = subprocess.run(
                        [sys.executable, "-c", PROGRAM + lines, url, str(image)],
                        capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
                    )  # fmt: skip
                except subprocess.TimeoutExpired:
                    broken.append(f"endings: {what}, {url}: still runs after {TIMEOUT_S} s")
                    continue
                said = done.stderr.strip()
                if done.returncode != status or not said.endswith(last) or (said and not last):
                    broken.append(f"endings: {what}, {url}: status {done.returncode}, said {said!r}")
    return {"programs": programs, "kinds": len(ENDINGS)}


def forks(urls: tuple[str, str], image: Path, rounds: int, broken: list[str]) -> dict[str, int]:
    """Use a classifier in forked children and in their parent, which created it before the fork."""
    program = PROGRAM + (
        "import multiprocessing\n"
        "def ask(queue=None):\n"
        "    answer = str(next(clip.classify(sys.argv[2], labels=['cat', 'dog'], deadline_s=60)))\n"
        "    return answer if queue is None else queue.put(answer)\n"
        "context = multiprocessing.get_context('fork')\n"
        "queue, before = context.Queue(), ask()\n"
        "children = [context.Process(target=ask, args=(queue,)) for _ in range(2)]\n"
        "for child in children: child.start()\n"
        "assert [queue.get(timeout=120) for _ in children] == [before] * 2 and ask() == before\n"
        "for child in children: child.join()\n"
    )
    children = 0
    for number in range(rounds):
        for url in urls:
            children += 2
            done = subprocess.run(
                [sys.executable, "-c", program, url, str(image)],
                capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
            )  # fmt: skip
            if done.returncode:
                broken.append(f"forks: round {number}, {url}: {done.stderr.strip()[-300:]}")
    return {"children": children}


def killed(models: Path, image: Path, rounds: int, seed: int, broken: list[str]) -> dict[str, float]:
    """Send SIGKILL to a process of an active version; the server must answer again within ``TIMEOUT_S``."""
    draw, longest, kills = random.Random(seed), 0.0, 0
    while kills < rounds:
        with contextlib.suppress(TritonFailed), serve(models, port=0) as server:
            _answer(server.url, image)
            for _ in range(min(2, rounds - kills)):  # more in such a short time end the server, by design
                victims = _processes(server.process.pid, "clip_image")
                os.kill(draw.choice(victims), signal.SIGKILL)
                began, kills = time.monotonic(), kills + 1
                if not _answers_again(server.url, image):
                    broken.append(f"killed processes: kill {kills}, --seed {seed}: no answer after {TIMEOUT_S} s")
                longest = max(longest, time.monotonic() - began)
    return {"kills": kills, "longest_s": round(longest, 1)}


def foreign(repository: Repository, place: Path, rounds: int, seed: int, broken: list[str]) -> dict[str, int]:
    """Put foreign files and folders into a repository and its store; they must still exist after every command."""
    placed = commands = 0
    for number in range(rounds):
        draw = random.Random(f"{seed} {number}")
        with tempfile.TemporaryDirectory(dir=place) as name:
            copy = Path(name) / "models"
            for folder in (repository.path, repository.store.parent):
                shutil.copytree(folder, Path(name) / folder.name)
            before = {path: _hash(path) for path in _put(copy, draw)}
            placed += len(before)
            for command in draw.sample(COMMANDS, len(COMMANDS)):
                commands += 1
                done = _run(("exporter", *command, "--repository", str(copy)), {})
                if done.returncode not in (0, 1) or "Traceback" in done.stderr:
                    broken.append(f"foreign files: round {number}, {command[0]}: {done.stderr.strip()[-300:]}")
                lost = [str(path.relative_to(name)) for path, digest in before.items() if _hash(path) != digest]
                broken += [
                    f"foreign files: --seed {seed}, round {number}, {command[0]}: {gone} is gone" for gone in lost
                ]
                before = {path: digest for path, digest in before.items() if _hash(path) == digest}
    return {"placed": placed, "commands": commands}


def _put(models: Path, draw: random.Random) -> list[Path]:
    """Write foreign files to some places in a repository and its store, and return their paths."""
    store = models.with_name(f"{models.name}.store") / "clip"
    kinds, version = draw.sample(KINDS, draw.randint(1, 3)), str(draw.choice((3, 9, 1234)))
    places = [
        *(models / f"clip_{kind}" / version / "model.onnx" for kind in kinds),
        models / "mine" / "notes.txt",
        models / f"clip_{draw.choice(KINDS)}" / "labels.txt",
        models.with_name(f".{models.name}.staging-mine") / "file",
        store / "backup" / "model.onnx",
        store / str(draw.choice((1, 2))) / "notes.txt",
    ]
    chosen = draw.sample(places, draw.randint(1, len(places)))
    for path in chosen:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(draw.randbytes(64))
    return chosen


def _hash(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _run(command: tuple[str, ...], environment: dict[str, str]) -> subprocess.CompletedProcess:
    """Run one of our commands, as installed beside this Python, without the proxy variables of this environment."""
    folder = Path(sys.executable).parent
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    plain = {name: value for name, value in os.environ.items() if name.lower() not in (*PROXIES, "no_proxy")}
    return subprocess.run(
        [folder / command[0], *command[1:]],
        env=plain | {"PATH": path} | environment, capture_output=True, text=True, check=False, timeout=TIMEOUT_S,
    )  # fmt: skip


def _answer(url: str, image: Path) -> str:
    with ZeroShotClassifier(url) as clip:
        return next(clip.classify(image, labels=LABELS)).best.label


def _answers_again(url: str, image: Path) -> bool:
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(ClientError), ZeroShotClassifier(url, timeout_s=5, retries=0) as clip:
            next(clip.classify(image, labels=LABELS))
            return True
        time.sleep(0.1)
    return False


def _processes(triton: int, model: str) -> list[int]:
    """Return the ids of Triton's processes for the versions of a model."""
    found = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            parent = int((line.parent / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
            if parent == triton and f"/{model}/".encode() in line.read_bytes():
                found.append(int(line.parent.name))
    return found


@contextlib.contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _proxy() -> Iterator[tuple[str, list[str]]]:
    """Run a proxy that refuses every request; yield its address and the list of requests that it gets."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(f"{self.command} {self.path}")
            self.send_error(403)

        do_POST = do_CONNECT = do_GET  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()


if __name__ == "__main__":
    command_line.run(main)
