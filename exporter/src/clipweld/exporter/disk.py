"""Durable file operations: flushed, tolerant of limited file systems, with errors raised as ``RepositoryError``."""

from __future__ import annotations

import errno
import filecmp
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from clipweld.exporter.errors import RepositoryError
from clipweld.trainer.os_errors import cause, next_step

# Errors of link() after which a copy is still possible: the file system has no hard links (exFAT, many network and FUSE
# ones), the kernel reserves them for the file's owner (fs.protected_hardlinks), source and target are on different file
# systems, or the file has too many links.
NO_LINK = (
    errno.EPERM, errno.EACCES, errno.EXDEV, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL,
)  # fmt: skip
MARK = ".clipweld"  # marks a staging folder: its content is clipweld's and may be deleted
INCOMING = "-incoming-"


@contextmanager
def changing(place: Path) -> Iterator[None]:
    """Turn an OSError raised in the block into a RepositoryError.

    Raises:
        RepositoryError: for any OSError.
    """
    try:
        yield
    except OSError as exc:
        raise RepositoryError(
            f"{place}: can't be written ({cause(exc, place)}); {next_step(exc)}, and run it again"
        ) from exc


def write(file: Path, content: bytes) -> None:
    """Write a file and flush it to disk; create its folder if necessary.

    Raises:
        RepositoryError: it can't be written.
    """
    with changing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())


def link_or_copy(source: Path, target: Path) -> None:
    """Create a hard link, or a flushed copy where links are not possible.

    Raises:
        OSError: neither is possible.
    """
    try:
        os.link(source, target)
    except OSError as exc:
        if exc.errno not in NO_LINK:
            raise
        copy(source, target)


def copy(source: Path | str, target: Path | str) -> None:
    """Copy a regular file and flush it to disk.

    Raises:
        OSError: it can't be copied, or ``target`` exists.
    """
    with open(source, "rb") as read, open(target, "xb") as written:
        shutil.copyfileobj(read, written, 1 << 20)
        written.flush()
        os.fsync(written.fileno())


def move_into(folder: Path, target: Path) -> None:
    """Move a complete folder to its final name atomically; copy it first if that is on another file system.

    Raises:
        OSError: it can't be moved; ``target`` does not exist, or is the non-empty folder that existed before.
    """
    try:
        os.rename(folder, target)
    except OSError as exc:
        if exc.errno != errno.EXDEV:
            raise
        # Copied beside the target first: a rename within one file system is atomic, a copy is not.
        incoming = new_staging(target.parent, f".{target.name}{INCOMING}")
        try:
            shutil.copytree(folder, incoming / target.name, copy_function=copy)
            os.rename(incoming / target.name, target)
        finally:
            remove_staging(incoming)
        shutil.rmtree(folder, ignore_errors=True)


def new_staging(parent: Path, prefix: str) -> Path:
    """Create an empty staging folder, which ``is_staging`` recognises even after the process was killed.

    Raises:
        OSError: it can't be created.
    """
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    (folder / MARK).touch()
    return folder


def is_staging(folder: Path) -> bool:
    """Whether ``new_staging`` made a folder; an empty one counts, for a kill may come before the mark is written."""
    with suppress(OSError):  # another user's
        return folder.is_dir() and not folder.is_symlink() and (is_regular(folder / MARK) or not any(folder.iterdir()))
    return False


def remove_staging(folder: Path) -> None:
    """Delete a staging folder as far as possible; its mark last, so that ``is_staging`` holds after a kill."""
    with suppress(OSError):
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != MARK:
                path.unlink()
        (folder / MARK).unlink(missing_ok=True)
        folder.rmdir()


def flush(folder: Path) -> None:
    """Make renames in a folder survive a power cut, where the file system supports that: fsync the folder itself."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def others(folder: Path, known: Collection[str]) -> list[Path]:
    """Return all entries but the regular files of these relative names and their folders. Follows no symbolic link."""
    folders = {parent.as_posix() for name in known for parent in PurePosixPath(name).parents}

    def walk(place: Path) -> Iterator[Path]:
        for path in sorted(place.iterdir()):
            name = path.relative_to(folder).as_posix()
            if name in folders and path.is_dir() and not path.is_symlink():
                yield from walk(path)
            elif not (name in known and is_regular(path)):
                yield path

    return list(walk(folder)) if folder.is_dir() and not folder.is_symlink() else []


def unlike(folder: Path, sources: Mapping[str, Path]) -> list[Path]:
    """Return the first entry that is neither a hard link to nor a copy of the source of its name, if there is one.

    Args:
        sources: by relative name; files missing from the folder are not reported.
    """
    found = others(folder, sources)
    for name, source in sources.items():
        file = folder / name
        if not found and is_regular(file) and not _same(file, source):
            found.append(file)
    return found[:1]


def is_regular(file: Path) -> bool:
    """Whether a path is a regular file, not a symbolic link to one."""
    return file.is_file() and not file.is_symlink()


def _same(file: Path, other: Path) -> bool:
    return is_regular(other) and (file.samefile(other) or filecmp.cmp(file, other, shallow=False))
