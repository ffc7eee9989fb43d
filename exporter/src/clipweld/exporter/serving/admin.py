"""The administrator's key: only those who may write a repository may change what its servers serve.

Triton's model control accepts configurations and code with a plain POST, which any web page can make a browser on the
machine send. So every server of ours requires a key for it.
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
    """Return the key of a repository's servers: from the environment, else from its store; None if there is none.

    Raises:
        RepositoryError: the key can't be read.
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
    """Return the key for a new server: the existing one, else a new one that only its owner may read.

    If the store can't be written, nobody can switch versions either, and the key exists only while the server runs.
    """
    if (key := admin_key(repository)) is not None:
        return key
    key, store = secrets.token_urlsafe(32), store_of(repository)
    with suppress(OSError), tempfile.NamedTemporaryFile("w", dir=store, prefix=f".{KEY_FILE}.") as written:
        written.write(key)
        written.flush()
        # A link makes the whole key appear at once, and fails if another server started at the same moment made one.
        with suppress(FileExistsError):
            try:
                os.link(written.name, store / KEY_FILE)
            except OSError as exc:
                if exc.errno not in NO_LINK:
                    raise
                with os.fdopen(os.open(store / KEY_FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                    file.write(key)
        return admin_key(repository) or key
    return key
