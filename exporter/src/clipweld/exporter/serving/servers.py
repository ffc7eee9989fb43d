"""The search for running servers of a repository: by the addresses that they left in its store, and on one port."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path

from clipweld.exporter.errors import ServerUnreachable
from clipweld.exporter.serving.announcement import FOLDER, Announcement, announcements, this_network
from clipweld.exporter.serving.connection import Connection
from clipweld.exporter.serving.control import Control
from clipweld.exporter.serving.installation import served_on_port
from clipweld.exporter.store.repository import Repository, store_of

DEFAULT_SERVER = "127.0.0.1:8001"
PROBE_TIMEOUT_S = 3.0


@dataclass(frozen=True)
class Found:
    """The outcome of a search.

    Attributes:
        urls: URLs of running servers of the repository.
        looked: where there was none, each in words; empty if addresses were given.
        out_of_reach: other servers, each in words: they run elsewhere, or are not ready.
        offline: whether the search was skipped on request.
    """

    urls: list[str]
    looked: list[str]
    out_of_reach: list[str] = field(default_factory=list)
    offline: bool = False

    @property
    def nowhere(self) -> str:
        """Why no server was found, in words."""
        if self.out_of_reach:
            return "no server of it could be asked"
        if self.offline:
            return "no server was looked for: --offline"
        return f"no server of it was found: {', '.join(self.looked)}"

    def all_reached(self) -> Found:
        """Return this outcome if every running server can be reached.

        Raises:
            ServerUnreachable: a running server can't be reached, and so would not be switched.
        """
        for reason in self.out_of_reach:
            raise ServerUnreachable(reason)
        return self


def find_servers(repositories: Sequence[Repository], wait_s: float = 0) -> Found:
    """Find the running servers of a repository: those that have announced themselves, and one at DEFAULT_SERVER.

    Args:
        repositories: the models of one model repository.
        wait_s: how long to wait for a server that has just been started, in seconds.
    """
    path = repositories[0].path
    urls, out_of_reach, network = [], [], this_network()
    for entry in announcements(path):
        who = f"process {entry['pid']} on {entry['host']}, since {entry['started']}"
        if entry["network"] != network:
            out_of_reach.append(
                f"a server of {path} runs on another machine or in a container ({who}): run this there, name an "
                "address with --url, or give --offline for the files alone"
            )
        elif _is_ready(path, entry, wait_s):
            urls.append(entry["url"])
        elif entry in announcements(path):
            out_of_reach.append(
                f"server {entry['url']} ({who}): runs and is not ready; is it still loading? try again, or give "
                "--offline for the files alone"
            )
    looked = [] if urls or out_of_reach else [f"none has left its address in {store_of(path) / FOLDER}"]
    if DEFAULT_SERVER not in {url.rpartition("/")[2] for url in urls}:
        nothing = _look_at_default(repositories)
        urls += [] if nothing else [f"grpc://{DEFAULT_SERVER}"]
        looked += [nothing] if nothing else []
    return Found(urls, [] if urls else looked, out_of_reach)


def _is_ready(repository: Path, entry: Announcement, wait_s: float) -> bool:
    """Return whether a server is ready, or becomes ready in time."""
    control, deadline = Control(entry["http_url"], "", PROBE_TIMEOUT_S), time.monotonic() + wait_s
    while entry in announcements(repository):
        with suppress(OSError, HTTPException):
            if control.is_ready():
                return True
        if time.monotonic() >= deadline:
            break
        time.sleep(0.1)
    return False


def _look_at_default(repositories: Sequence[Repository]) -> str | None:
    """Return why DEFAULT_SERVER is not a server of a repository; None if it is one."""
    host, _, port = DEFAULT_SERVER.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=PROBE_TIMEOUT_S).close()
    except OSError:
        return f"nothing listens at {DEFAULT_SERVER}"
    path = repositories[0].path.resolve()
    if (other := served_on_port(int(port))) is not None and other != path:
        return f"{DEFAULT_SERVER} serves another repository, {other}"
    try:
        with Connection(DEFAULT_SERVER, PROBE_TIMEOUT_S) as connection:
            if any(connection.serves(repository) for repository in repositories):
                return None
    except ServerUnreachable:
        return f"what listens at {DEFAULT_SERVER} is no Triton"
    return f"the Triton at {DEFAULT_SERVER} serves another repository"
