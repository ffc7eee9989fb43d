"""Test what a server and the demo page expose: their listeners, requests from outsiders, and secrets in their output.

Run: python -m evidence.trust.exposure --out runs/trust/exposure.json
"""

from __future__ import annotations

import http.client
import ipaddress
import itertools
import json
import os
import random
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import psutil
import tritonclient.grpc
import tritonclient.http
from cyclopts import Parameter
from tritonclient.utils import InferenceServerException

from clipweld.client import ZeroShotClassifier
from clipweld.client._page import FILES, MAX_UPLOAD_BYTES
from clipweld.client.errors import ClientError
from clipweld.exporter.release.publish import release
from clipweld.exporter.serving.admin import HEADER, KEY_VARIABLE, admin_key
from clipweld.exporter.store.repository import Repository
from clipweld.trainer.base.backbone import load_backbone
from clipweld.trainer.tasks import sample
from evidence import command_line
from evidence.command_line import POSITIVE
from evidence.trust.record import Record

EXPORTER = (sys.executable, "-m", "clipweld.exporter")
CLIENT = (sys.executable, "-c", "from clipweld.client.cli import main; main()")
TIMEOUT_S = 120

# Every request of Triton's model control, shared memory, tracing and logging.
CONTROL: dict[str, Callable[[Any, dict[str, str]], object]] = {
    "index": lambda client, headers: client.get_model_repository_index(headers=headers),
    "load": lambda client, headers: client.load_model("clip_image", headers=headers),
    "load code": lambda client, headers: client.load_model(
        "own", headers=headers, config=CONFIG, files={"file:1/model.py": b"pass"}
    ),
    "unload": lambda client, headers: client.unload_model("clip_image", headers=headers),
    "shared memory": lambda client, headers: client.register_system_shared_memory("own", "/own", 8, headers=headers),
    "CUDA memory": lambda client, headers: client.register_cuda_shared_memory("own", b"QUJD", 0, 8, headers=headers),
    "shared memory regions": lambda client, headers: client.get_system_shared_memory_status(headers=headers),
    "unregister": lambda client, headers: client.unregister_system_shared_memory(headers=headers),
    "trace": lambda client, headers: client.update_trace_settings(
        settings={"trace_level": ["TENSORS"], "trace_file": "/tmp/own"}, headers=headers
    ),
    "trace settings": lambda client, headers: client.get_trace_settings(headers=headers),
    "log": lambda client, headers: client.update_log_settings({"log_file": "/tmp/own"}, headers=headers),
    "log settings": lambda client, headers: client.get_log_settings(headers=headers),
}
CONFIG = json.dumps({"backend": "python", "max_batch_size": 0})
UNLOAD = "/v2/repository/models/clip_card/unload"
SPELLINGS = (
    UNLOAD,
    f"{UNLOAD}/",
    f"{UNLOAD}?a=1",
    f"{UNLOAD}#a",
    f"{UNLOAD}%00",
    f"/{UNLOAD}",
    f"/.{UNLOAD}",
    f"http://a{UNLOAD}",
    UNLOAD.upper(),
    UNLOAD.replace("v2/", "v2//"),
    UNLOAD.replace("models/", "/models/"),
    UNLOAD.replace("v2", "%76%32"),
    UNLOAD.replace("models", "any/models"),
    UNLOAD.replace("card/", "card%2F"),
    UNLOAD.replace("card", "card/versions/1"),
    "/v2/repository/index",
    "/v2/repository/any/index",
    "/v2/models/clip_card/versions/1/unload",
    "/v2/models/clip_card/unload",
    "/v2/systemsharedmemory/status",
    "/v2/cudasharedmemory/status",
    "/v2/systemsharedmemory/region/a/register",
    "/v2/logging",
    "/v2/trace/setting",
    "/v2/models/clip_card/trace/setting",
    "/invocations",
    "/metrics",
)
STRANGERS = (
    {"Origin": "https://elsewhere.example"},
    {"Origin": "null"},
    {"Origin": "http://127.0.0.1"},
    {"Origin": "https://{host}"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Host": "elsewhere.example"},
    {"Host": "elsewhere.example:{port}"},
    {"Host": "localhost.elsewhere.example:{port}"},
    {"Host": ""},
)


def main(
    *,
    guesses: Annotated[
        int, Parameter(validator=POSITIVE, help="Random wrong keys to try on each request of model control.")
    ] = 20,
    uploads: Annotated[
        int, Parameter(validator=POSITIVE, help="Uploads that are too large or have a false length.")
    ] = 100,
    garbled: Annotated[int, Parameter(validator=POSITIVE, help="Number of damaged requests to the page.")] = 2000,
    seed: Annotated[int, Parameter(help="Seed of the sizes and keys.")] = 0,
    out: Annotated[Path, Parameter(help="JSON file for the figures.")] = Path("runs/trust/exposure.json"),
) -> None:
    """Start a server and a page in the usual way, and attack them."""
    draw = random.Random(seed)
    # A shell ignores SIGINT for background commands, and so would the processes that are started here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with Record(out) as record, tempfile.TemporaryDirectory(prefix="clipweld-exposure-") as folder:
        repository = Repository(Path(folder) / "models", "clip")
        release(load_backbone("mini"), [], repository, *sample(4))
        with serving(repository.path) as (server, urls), showing(record, urls[0]) as (page, page_url):
            record.figures["listeners"] = listeners(record, (server, page))
            control = knocked(record, urls, admin_key(repository.path), guesses, draw)
            record.figures["model control"] = control | spelled(record, urls[1])
            record.figures["page"] = (
                visited(record, page_url)
                | uploaded(record, page_url, uploads, draw)
                | garble(record, page_url, garbled, draw)
            )
        record.figures["secrets"] = told(record, repository.path)


@contextmanager
def serving(repository: Path) -> Iterator[tuple[psutil.Process, tuple[str, str]]]:
    """Run ``exporter serve`` on free ports; yield its process, and its addresses for gRPC and HTTP."""
    command = [*EXPORTER, "serve", "--repository", str(repository), "--port", "0", "--http-port", "0"]
    with _process(command) as process:
        grpc, http_url = re.findall(r"(?:grpc|http)://[\d.]+:\d+", process.stderr.readline())
        yield psutil.Process(process.pid), (grpc, http_url)


@contextmanager
def showing(record: Record, url: str) -> Iterator[tuple[psutil.Process, str]]:
    """Run ``client demo`` on a free port; yield its process and address.

    At the end it must exit with status 0 and must have written nothing to stderr.
    """
    with _process([*CLIENT, "demo", "--port", "0", "--no-browser", "--url", url]) as process:
        yield psutil.Process(process.pid), re.search(r"http://[\d.]+:\d+", process.stdout.readline())[0]
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=TIMEOUT_S)[1]
        if said or process.returncode:
            record.broken.append(f"page: ended with {process.returncode} and said {said[-2000:]!r}")


def listeners(record: Record, roots: tuple[psutil.Process, ...]) -> dict:
    """Find all sockets that the processes listen on, and try their ports at this machine's other addresses."""
    processes = [process for root in roots for process in (root, *root.children(recursive=True))]
    found = {
        (connection.laddr.ip, connection.laddr.port)
        for process in processes
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    found = {(ip.removeprefix("::ffff:"), port) for ip, port in found}  # IPv4 addresses in IPv6 notation
    others = {
        address.address.partition("%")[0]
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family in (socket.AF_INET, socket.AF_INET6)
    }
    others = {address for address in others if not ipaddress.ip_address(address).is_loopback}
    for ip, port in sorted(found):
        if not ipaddress.ip_address(ip).is_loopback:
            record.broken.append(f"listens on {ip}:{port}")
        for other in sorted(others):
            with suppress(OSError), socket.create_connection((other, port), timeout=2):
                record.broken.append(f"port {port} answers on {other}")
    if len(found) < 3:
        record.broken.append(
            f"expected gRPC, HTTP and the page, found listeners {sorted(found)}: the check sees nothing"
        )
    return {"processes": len(processes), "on loopback": len(found), "other addresses tried": len(others) * len(found)}


def knocked(record: Record, urls: tuple[str, str], key: str, guesses: int, draw: random.Random) -> dict:
    """Try model control without the key and with wrong keys, which must be refused, and then with the right key."""
    wrong = [None, "", key[:-1], key.swapcase(), f"{key}x"]
    wrong += ["".join(draw.choices("abcdefghijklmnop", k=len(key))) for _ in range(guesses)]
    refused = 0
    for url, binding in zip(urls, (tritonclient.grpc, tritonclient.http), strict=True):
        header = HEADER if binding is tritonclient.http else f"triton-grpc-protocol-{HEADER}"
        with binding.InferenceServerClient(url.partition("://")[2]) as stranger:
            for (name, ask), guess in itertools.product(CONTROL.items(), wrong):
                if _refused(record, f"{name} at {url} with key {guess!r}", ask, stranger, header, guess):
                    refused += 1
            if not stranger.is_model_ready("clip_image"):
                record.broken.append(f"{url}: a stranger unloaded clip_image")
            CONTROL["index"](stranger, {header: key})
    return {"asked": len(urls) * len(CONTROL) * len(wrong), "refused": refused}


def spelled(record: Record, url: str) -> dict:
    """Try model control over HTTP without a key, with every method and with odd spellings of its paths."""
    address = urlsplit(url)
    for path, method in itertools.product(SPELLINGS, ("GET", "POST", "PUT", "DELETE", "HEAD")):
        if (status := _send(address, method, path, {"Content-Length": "0"})) < 400:
            record.broken.append(f"{method} {path} without a key got {status}")
    if (status := _send(address, "GET", "/v2/models/clip_card/ready", {})) != 200:
        record.broken.append(f"a stranger unloaded clip_card: {status}")
    return {"spellings": 5 * len(SPELLINGS)}


def visited(record: Record, page: str) -> dict:
    """Request every path of the page with the headers of other sites' pages and with other host names."""
    address, refused, asked = urlsplit(page), 0, 0
    for path, method, headers in itertools.product((*FILES, "/state", "/answer"), ("GET", "POST", "HEAD"), STRANGERS):
        filled = {name: value.format(host=address.netloc, port=address.port) for name, value in headers.items()}
        status = _send(address, method, path, filled)
        asked += 1
        refused += status == 403
        if status != 403:
            record.broken.append(f"page: {method} {path} with {filled} got {status}")
    if (status := _send(address, "GET", "/", {})) != 200:
        record.broken.append(f"page: its own visitor got {status}")
    return {"strangers": asked, "refused": refused}


def uploaded(record: Record, page: str, uploads: int, draw: random.Random) -> dict:
    """Announce uploads that are too large or have a false length; they must be refused without being read."""
    address, refused = urlsplit(page), 0
    for _ in range(uploads):
        size = str(draw.choice([MAX_UPLOAD_BYTES + 1, draw.randrange(MAX_UPLOAD_BYTES + 1, 10**18), 10**30, -1]))
        status = _send(address, "POST", "/answer?label=a&label=b", {"Content-Length": size})
        refused += status in (411, 413)
        if status not in (411, 413):
            record.broken.append(f"page: an upload of {size} bytes got {status}")
    return {"uploads": uploads, "uploads refused": refused}


def garble(record: Record, page: str, count: int, draw: random.Random) -> dict:
    """Send requests with bytes changed, removed or inserted.

    They must be refused or left unanswered, and the page must keep working.
    """
    address = urlsplit(page)
    whole = (
        f"POST /answer?label=a&label=b HTTP/1.1\r\nHost: {address.netloc}\r\nOrigin: http://{address.netloc}\r\n"
        "Content-Type: image/png\r\nContent-Length: 9\r\n\r\nnot a png"
    ).encode()
    for number in range(count):
        request = bytearray(whole)
        for _ in range(draw.randrange(1, 8)):
            at = draw.randrange(len(request))
            request[at : at + draw.choice([0, 1, 1, 1, 30])] = draw.randbytes(draw.choice([0, 1, 1, 1, 30]))
        with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
            with suppress(ConnectionError):
                status = connection.recv(65536).split(b" ", 2)[1:2]
                if status in ([b"200"], [b"500"]):
                    record.broken.append(f"page: damaged request {number}, {bytes(request)!r}, got {status}")
    if (status := _send(address, "GET", "/", {})) != 200:
        record.broken.append(f"page: its own visitor got {status} after damaged requests")
    return {"damaged requests": count}


def told(record: Record, repository: Path) -> dict:
    """Look for secrets in all output of commands, also with ``--verbose``, and in errors and reprs."""
    key, token, password = (f"secret-{secrets.token_hex(8)}" for _ in range(3))
    environment = os.environ | {KEY_VARIABLE: key}
    said = []
    serve = [*EXPORTER, "serve", "--verbose", "--repository", str(repository), "--port", "0", "--"]
    for command in (
        [*serve, *EXPORTER, "promote", "1", "--repository", str(repository)],
        [*serve, *EXPORTER, "promote", "9", "--repository", str(repository)],
        [*serve, sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"],
        [*EXPORTER, "promote", "1", "--repository", str(repository), "--url", "127.0.0.1:9"],
        [*EXPORTER, "promote", "1", "--repository", str(repository), "--url", f"http://me:{password}@127.0.0.1:9"],
        [*EXPORTER, "promote", "1", "--repository", str(repository), "--url", f"me:{password}@127.0.0.1:9"],
        [*CLIENT, "tasks", "--url", f"http://me:{password}@127.0.0.1:9"],
        [*CLIENT, "tasks", "--url", f"grpc://me:{password}@127.0.0.1:nine"],
    ):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        said += [done.stdout, done.stderr]
    with serving(repository) as (_, urls):
        for url in (*urls, "127.0.0.1:9", "http://127.0.0.1:9"):
            for headers in ({"authorization": f"Bearer {token}"}, {"authorization": f"{token}\n"}):
                with suppress(ClientError):
                    try:
                        with ZeroShotClassifier(url, "another", retries=0, headers=headers) as clip:
                            said.append(repr((clip, vars(clip), clip._core._settings)))
                            clip.versions()
                    except ClientError as exc:
                        said += [str(exc), repr(exc), *map(str, (exc.__cause__, exc.__context__))]
                        raise
    for name, secret in {"admin key": key, "token": token, "password": password}.items():
        for text in said:
            if secret in text:
                at = text.index(secret)
                record.broken.append(f"{name} shown: {text[max(0, at - 100) : at]!r}")
    return {"outputs read": len(said), "characters": sum(map(len, said))}


def _refused(record: Record, what: str, ask: Callable, stranger: Any, header: str, guess: str | None) -> bool:
    try:
        ask(stranger, {} if guess is None else {header: guess})
    except InferenceServerException as exc:
        if "restricted" in str(exc):
            return True
        record.broken.append(f"{what}: not refused, but {exc}")
    else:
        record.broken.append(f"{what}: done")
    return False


def _send(address: Any, method: str, path: str, headers: dict[str, str]) -> int:
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=20)
    try:
        connection.putrequest(method, path, skip_host="Host" in headers)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        return connection.getresponse().status
    finally:
        connection.close()


@contextmanager
def _process(command: list[str]) -> Iterator[subprocess.Popen]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.communicate(timeout=TIMEOUT_S)


if __name__ == "__main__":
    command_line.run(main)
