"""The operating system's errors in words: the cause, the path concerned, and what to do, looked up by errno."""

from __future__ import annotations

import errno
import os
from pathlib import Path

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)

_STEPS = {
    **dict.fromkeys(NO_ROOM, "make room"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "have its owner allow it (ls -ld shows who that is)"),
    errno.EROFS: "its file system is mounted read-only: mount it for writing",
    errno.ENAMETOOLONG: "shorten the name",
    errno.EFBIG: "the file is larger than its file system or ulimit -f allows: raise that",
    errno.EXDEV: "it is on another file system, or in a lower layer of a container's image: copy it to one of its own",
    errno.EIO: "the disk failed: see the system's log (dmesg)",
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "too many files are open: raise ulimit -n"),
    **dict.fromkeys(
        (errno.EEXIST, errno.ENOTEMPTY, errno.EISDIR, errno.ENOTDIR), "something else has the name: move it away"
    ),
    **dict.fromkeys((errno.EBUSY, errno.ETXTBSY), "another process uses it: end that"),
    **dict.fromkeys((errno.ENOENT, errno.ESTALE), "it was moved or removed meanwhile: see who did that"),
    **dict.fromkeys((errno.ENODEV, errno.ENXIO, errno.ENOTCONN, errno.EHOSTDOWN), "mount its file system again"),
}


def cause(exc: OSError, place: Path | None = None) -> str:
    """Return the system's message, with the path that it is about unless that is ``place`` or close to it.

    Args:
        place: the path that the caller's own message names.
    """
    words = exc.strerror or str(exc)
    if not isinstance(exc.filename, (str, bytes, os.PathLike)):
        return words
    if exc.filename2 is not None:
        return f"{words}: {os.fsdecode(exc.filename)} -> {os.fsdecode(exc.filename2)}"
    path = Path(os.fsdecode(exc.filename))
    return words if place in (path, path.parent) or (place and place.parent == path.parent) else f"{words}: {path}"


def next_step(exc: OSError) -> str:
    """Return what the user can do about an error, in the imperative."""
    return _STEPS.get(exc.errno or 0, "find out why")
