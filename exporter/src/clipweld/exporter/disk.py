"""Changes to a disk: flushed, on file systems as they are, and with errors of ours."""

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

# What link() answers where there are no hard links (exFAT, many network and FUSE file systems), where the kernel keeps
# them to a file's owner, between file systems, and where a file has too many: a copy is still possible there.
NO_LINK = (
    errno.EPERM, errno.EACCES, errno.EXDEV, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL,
)  # fmt: skip
MARK = ".clipweld"  # a file in every folder that holds what is not there yet, or no more: what is in it is clipweld's
INCOMING = "-incoming-"


@contextmanager
def changing(place: Path) -> Iterator[None]:
    """What the operating system has against a change, as an error of ours.

    Raises:
        RepositoryError: in place of any OSError.
    """
    try:
        yield
    except OSError as exc:
        raise RepositoryError(
            f"{place}: can't be written ({cause(exc, place)}); {next_step(exc)}, and run it again"
        ) from exc


def write(file: Path, content: bytes) -> None:
    """Write a file, in a folder that is made if need be, and flush it to disk.

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
    """A second name of a file's content: a hard link, or a flushed copy where there can be none.

    Raises:
        OSError: neither.
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
        OSError: it can't be.
    """
    with open(source, "rb") as read, open(target, "xb") as written:
        shutil.copyfileobj(read, written, 1 << 20)
        written.flush()
        os.fsync(written.fileno())


def move_into(folder: Path, target: Path) -> None:
    """Give a folder that nobody reads yet its final name, in whole; by a copy where that is on another file system.

    Raises:
        OSError: it can't be; there is no ``target``, or there was one with something in it.
    """
    try:
        os.rename(folder, target)
    except OSError as exc:
        if exc.errno != errno.EXDEV:
            raise
        incoming = new_staging(target.parent, f".{target.name}{INCOMING}")
        try:
            shutil.copytree(folder, incoming / target.name, copy_function=copy)
            os.rename(incoming / target.name, target)
        finally:
            remove_staging(incoming)
        shutil.rmtree(folder, ignore_errors=True)


def new_staging(parent: Path, prefix: str) -> Path:
    """An empty folder for what is written, or taken away: ``is_staging`` knows it again, after a kill too.

    Raises:
        OSError: it can't be made.
    """
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    (folder / MARK).touch()
    return folder


def is_staging(folder: Path) -> bool:
    """Whether a folder is one of ``new_staging``, killed the moment after it was made perhaps: then it is empty."""
    with suppress(OSError):  # another's
        return folder.is_dir() and not folder.is_symlink() and (is_regular(folder / MARK) or not any(folder.iterdir()))
    return False


def remove_staging(folder: Path) -> None:
    """Delete a folder of ``new_staging`` as far as possible; its mark goes last, so that a kill leaves it known."""
    with suppress(OSError):
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != MARK:
                path.unlink()
        (folder / MARK).unlink(missing_ok=True)
        folder.rmdir()


def flush(folder: Path) -> None:
    """Have renames in a folder survive a power cut, where the file system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def others(folder: Path, known: Collection[str]) -> list[Path]:
    """What is in a folder beside regular files of these relative names and the folders they are in. Follows no link."""
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
    """The first thing in a folder that is no link to, or copy of, the source of its relative name, if there is one.

    Args:
        sources: by the names of the folder's files; those that are not in it are not missed.
    """
    found = others(folder, sources)
    for name, source in sources.items():
        file = folder / name
        if not found and is_regular(file) and not _same(file, source):
            found.append(file)
    return found[:1]


def is_regular(file: Path) -> bool:
    """Whether it is a regular file itself, not a link to one."""
    return file.is_file() and not file.is_symlink()


def _same(file: Path, other: Path) -> bool:
    return is_regular(other) and (file.samefile(other) or filecmp.cmp(file, other, shallow=False))
