"""The announcement of a running server: its address, in its repository's store, while it runs.

The server keeps the file locked. A file without a lock belongs to a server whose process was killed, and is removed.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pydantic import Field, with_config
from typing_extensions import TypedDict

from clipweld.exporter.store.layout import store_of
from clipweld.trainer.schemas import STRICT, Count, Text, read_json

FOLDER = ".servers"  # the dot makes it differ from the name of any model
MAX_BYTES = 10_000


@with_config(STRICT)
class Announcement(TypedDict):
    """What a running server writes to the store."""

    # On loopback only, because the administrator's key is sent there.
    url: Annotated[str, Field(pattern=r"^grpc://127\.0\.0\.1:[0-9]{1,5}\z")]
    http_url: Annotated[str, Field(pattern=r"^http://127\.0\.0\.1:[0-9]{1,5}\z")]
    pid: Count
    started: Text
    host: Text
    repository: str
    network: Text  # identifies the machine or container: its loopback can't be reached from others


@contextmanager
def announced(repository: Path, url: str, http_url: str) -> Iterator[str | None]:
    """Let others find a server while the block runs; yield None, or the reason why they can't."""
    entry: Announcement = {
        "url": url,
        "http_url": http_url,
        "pid": os.getpid(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname() or "unknown",
        "repository": str(repository.resolve()),
        "network": this_network(),
    }
    announcements(repository)  # removes those of killed servers
    with ExitStack() as stack:
        reason = None
        try:
            stack.callback(_remove, *_write(store_of(repository), entry))
        except OSError as exc:
            reason = f"{store_of(repository)}: {(exc.strerror or str(exc)).lower()}"
        yield reason


def announcements(repository: Path) -> list[Announcement]:
    """Return the announcements of a repository's running servers, the newest last."""
    found = []
    folder = store_of(repository) / FOLDER
    with suppress(OSError):
        for file in folder.iterdir() if not folder.is_symlink() else ():
            if file.name.endswith(".json") and (entry := _read(file)) is not None and _is_of(entry, repository):
                found.append(entry)
    return sorted(found, key=lambda entry: entry["started"])


def _is_of(entry: Announcement, repository: Path) -> bool:
    """Whether a server is one of this repository: a copy of its store by hard links has the same locked files."""
    try:
        return entry["network"] != this_network() or os.path.samefile(entry["repository"], repository)
    except (OSError, ValueError):
        return False


def this_network() -> str:
    """Return an identifier of this machine or container, within which its loopback can be reached."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.stat('/proc/self/ns/net').st_ino}"
    return socket.gethostname() or "unknown"


def _write(store: Path, entry: Announcement) -> tuple[int, Path]:
    """Write and lock a new file. The store must exist: without one, nothing can be switched."""
    folder = store / FOLDER
    with suppress(FileExistsError):
        folder.mkdir()
    descriptor, temporary = tempfile.mkstemp(prefix=".", dir=folder)
    try:
        os.fchmod(descriptor, 0o644)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(descriptor, json.dumps(entry).encode())
        file = folder / f"{entry['pid']}-{entry['url'].rpartition(':')[2]}.json"
        os.replace(temporary, file)
    except BaseException:
        _remove(descriptor, Path(temporary))
        raise
    return descriptor, file


def _remove(descriptor: int, file: Path) -> None:
    with suppress(OSError):
        file.unlink()
    with suppress(OSError):
        file.parent.rmdir()  # fails if other servers have files in it
    os.close(descriptor)


def _read(file: Path) -> Announcement | None:
    """Read the announcement of a running server; remove that of one that has ended, and return None."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            with suppress(ValueError):
                return read_json(Announcement, os.read(descriptor, MAX_BYTES))
            return None
        with suppress(OSError):
            file.unlink()
        return None
    except OSError:  # the file system has no locks
        return None
    finally:
        os.close(descriptor)
