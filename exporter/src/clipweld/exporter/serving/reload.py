"""Load one version again, while the other versions of its model answer on.

Triton reloads a version only if it went away in between, and unloading is for whole models. So Triton, which reaches
the repository by a link of ours, is shown the model without the version for a moment, and then with it. The repository
itself is never touched.
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
    """Reloads of a Triton's lifetime.

    Args:
        repository: the real one.
        link: what Triton takes for it; its folder is ours. Also an attribute.
    """

    def __init__(self, repository: Path, link: Path, control: Control) -> None:
        self._repository, self.link, self._control = repository.resolve(), link, control
        self._numbers = itertools.count(1)

    def drop(self, model: str, version: str) -> None:
        """Have requests to a version refused from now on, and Triton call it what it is: not ready.

        Raises:
            ModelNotLoaded, OSError: Triton refused, or is gone.
        """
        if any(entry.is_dir() and entry.name != version for entry in (self._repository / model).iterdir()):
            with self._showing(model, without=version):
                self._control.load(model)
        # Triton loads no model without versions, and some file systems have no times that fine.
        if version in self._control.ready_versions(model):
            self._control.unload(model)

    def load(self, model: str) -> None:
        """Load what a model lacks.

        Raises:
            ModelNotLoaded: in Triton's own words.
            OSError: Triton is gone.
        """
        before = self._contents(model)
        with self._showing(model):
            self._control.load(model)
        if self._contents(model) != before:  # an exporter switched versions meanwhile, and Triton saw those before
            self._control.load(model)

    @contextmanager
    def _showing(self, model: str, without: str | None = None) -> Iterator[None]:
        """Let Triton see a model without a version while the block runs."""
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
            # Triton looks into a folder that is newer than the one it saw last. By a nanosecond: whatever changes in
            # the repository itself later on is newer still.
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
