"""Advice on errors of the operating system, by their number."""

from __future__ import annotations

import errno

_STEPS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "have its owner allow it (ls -ld shows who that is)"),
    errno.EROFS: "its file system is mounted read-only: mount it for writing",
    errno.ENAMETOOLONG: "shorten the name",
    errno.EFBIG: "the file is larger than its file system or ulimit -f allows: raise that",
    errno.EIO: "the disk failed: see the system's log (dmesg)",
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "too many files are open: raise ulimit -n"),
    **dict.fromkeys((errno.ENOENT, errno.ESTALE), "it was moved or removed meanwhile: see who did that"),
}


def next_step(exc: OSError) -> str:
    """Return what would help, in the imperative: more room only if that is what is missing."""
    return _STEPS.get(exc.errno or 0, "find out why")
