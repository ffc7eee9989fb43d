"""Reload one version while the other versions of its model keep answering.

Triton reloads a version only if it has disappeared in between, and can unload only whole models. Triton reaches the
repository through a symbolic link, so we point that to a view without the version, and then to one with it. The
repository itself is never changed.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from clipweld.exporter.serving.control import Control


class Reloader:
    """Reloads versions of one running Triton.

    Args:
        repository: the real one.
        link: the path by which Triton reaches it, in a folder of ours; also an attribute.
    """

    def __init__(self, repository: Path, link: Path, control: Control) -> None:
        self._repository, self.link, self._control = repository.resolve(), link, control
        self._numbers = itertools.count(1)

    def drop(self, model: str, version: str) -> None:
        """Unload a version, so that Triton refuses its requests and reports it as not ready.

        Raises:
            ModelNotLoaded, OSError: Triton refused, or is gone.
        """
        if any(entry.is_dir() and entry.name != version for entry in (self._repository / model).iterdir()):
            with self._showing(model, without=version):
                self._control.load(model)
        # Triton refuses to load a model without versions, and misses the change on file systems with coarse timestamps.
        if version in self._control.ready_versions(model):
            self._control.unload(model)

    def load(self, model: str) -> None:
        """Load the missing versions of a model.

        Raises:
            ModelNotLoaded: in Triton's own words.
            OSError: Triton is gone.
        """
        before = self._contents(model)
        with self._showing(model):
            self._control.load(model)
        if self._contents(model) != before:  # an exporter switched versions meanwhile, Triton saw the old ones
            self._control.load(model)

    @contextmanager
    def _showing(self, model: str, without: str | None = None) -> Iterator[None]:
        """Show Triton the model, without a version if given, while the block runs."""
        number = next(self._numbers)
        view = self.link.with_name(f"view-{number}")
        try:
            view.mkdir()
            for other in self._repository.iterdir():
                if other.name != model:
                    (view / other.name).symlink_to(other)
            (view / model).mkdir()
            for entry in (self._repository / model).iterdir():
                if entry.name != without:
                    (view / model / entry.name).symlink_to(entry)
            # Triton reloads only from a folder newer than the one it saw last. Newer by nanoseconds only, so that later
            # changes to the repository itself are newer still.
            time = _modified(self._repository / model) + number
            os.utime(view / model, ns=(time, time))
            self._point_to(view)
            yield
        finally:
            self._point_to(self._repository)
            shutil.rmtree(view, ignore_errors=True)

    def _point_to(self, place: Path) -> None:
        new = self.link.with_name("next")
        new.symlink_to(place)
        os.replace(new, self.link)

    def _contents(self, model: str) -> tuple[list[str], int]:
        folder = self._repository / model
        with suppress(FileNotFoundError):
            return sorted(os.listdir(folder)), _modified(folder)
        return [], 0


def _modified(path: Path) -> int:
    """When a folder or anything in it was last changed, as Triton sees it; in nanoseconds."""
    newest = path.stat().st_mtime_ns
    for folder, folders, files in os.walk(path):
        for name in (*folders, *files):
            with suppress(FileNotFoundError):
                newest = max(newest, os.stat(os.path.join(folder, name)).st_mtime_ns)
    return newest
