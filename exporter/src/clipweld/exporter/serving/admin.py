"""Who may change what a server serves: whoever may write the repository that it serves from.

Triton's model control takes configurations and code along with a model's name, by a plain POST that any web page can
make a browser on the machine send. So no server of ours is without a key for it.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path

from clipweld.exporter.disk import NO_LINK
from clipweld.exporter.errors import RepositoryError
from clipweld.exporter.store.repository import store_of

KEY_VARIABLE = "CLIPWELD_ADMIN_KEY"
KEY_FILE = "admin-key"
HEADER = "clipweld-admin-key"
RESTRICTED = "model-repository,shared-memory,trace,logging"


def admin_key(repository: Path) -> str | None:
    """The key that servers of a repository want: the environment's, else the one in its store; None where none is.

    Raises:
        RepositoryError: the key is not for us to read.
    """
    if key := os.environ.get(KEY_VARIABLE):
        return key
    file = store_of(repository) / KEY_FILE
    try:
        return file.read_text(encoding="ascii").strip() or None
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is no key"
        raise RepositoryError(f"key {file}: {reason}; ask its owner, or set {KEY_VARIABLE}") from exc


def new_admin_key(repository: Path) -> str:
    """The key for a server that is started: the one that is there, else a new one, which only its owner may read.

    Where the store can't be written nobody can switch versions either, and the key is forgotten with the server.
    """
    if (key := admin_key(repository)) is not None:
        return key
    key, store = secrets.token_urlsafe(32), store_of(repository)
    with suppress(OSError), tempfile.NamedTemporaryFile("w", dir=store, prefix=f".{KEY_FILE}.") as written:
        written.write(key)
        written.flush()
        with suppress(FileExistsError):  # another server was started at the same moment
            try:
                os.link(written.name, store / KEY_FILE)
            except OSError as exc:
                if exc.errno not in NO_LINK:
                    raise
                with os.fdopen(os.open(store / KEY_FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                    file.write(key)
        return admin_key(repository) or key
    return key
