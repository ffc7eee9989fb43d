"""Which version is served: promotion, rollback and pruning, on disk and in running Tritons.

What stands in the models' folders is what is served. A new version goes in tower by tower and is loaded and asked
before its card follows; only then do clients see it. The version before it stands on, loaded, for the way back. Clients
pin one version for both towers and move to another between calls, so no answer ever mixes two.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from clipweld.exporter.errors import NothingToRollBackTo, PromotionFailed, RepositoryError
from clipweld.exporter.serving.admin import admin_key
from clipweld.exporter.serving.connection import Connection, ModelControl
from clipweld.exporter.store.manifest import check_files
from clipweld.exporter.store.repository import BASE_VERSION, KINDS, TOWERS, Repository

ASK_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Switched:
    """What is served now.

    Attributes:
        version: what requests get that name none.
        previous: what was served before; None where nothing was.
        standing: all versions that are served to those who name them, oldest first.
        servers: addresses that were switched; empty where only the files were.
        seconds: wall time.
        warnings: what went wrong after the switch itself, a line each.
    """

    model: str
    version: int
    previous: int | None
    standing: list[int]
    servers: list[str]
    seconds: float
    warnings: list[str]

    def to_dict(self) -> dict:
        """The fields as JSON has them."""
        return asdict(self) | {"seconds": round(self.seconds, 3)}


@dataclass(frozen=True)
class Pruned:
    """What is left of a store.

    Attributes:
        removed, kept: versions, oldest first.
    """

    model: str
    removed: list[int]
    kept: list[int]

    def to_dict(self) -> dict:
        """The fields as JSON has them."""
        return asdict(self)


def promote(
    repository: Repository,
    version: int | None,
    urls: Sequence[str],
    *,
    timeout_s: float = 120.0,
    report: Callable[[str], None] = lambda step: None,
) -> Switched:
    """Serve a version: after it is loaded and warm on every server, and never with a request lost.

    Standing afterwards: it, and the version before it unless that is a newer one, which would be served in its place.

    Args:
        version: None for the newest in the store.
        urls: of the servers' model control; where there are none, files are moved and the next start serves them.
        timeout_s: of each load.
        report: called with a line when a step begins.

    Raises:
        RepositoryEmpty, StoreMissing, VersionMissing, VersionDamaged, ForeignFiles: nothing was touched.
        ServerUnreachable: nothing was touched.
        PromotionFailed: a server could not load it; what was served before is.
    """
    repository.check_released()
    with repository.writing() as staging, _connected(repository, urls, timeout_s) as servers:
        history = repository.history()
        version = repository.versions()[-1] if version is None else version
        return _switch(repository, version, [*history, version], servers, staging, report)


def rollback(
    repository: Repository,
    urls: Sequence[str],
    *,
    timeout_s: float = 120.0,
    report: Callable[[str], None] = lambda step: None,
) -> Switched:
    """Serve what was served before the version that is served now; again for the one before that.

    Args, errors: as ``promote``, and
        NothingToRollBackTo: the version served now was the first.
    """
    repository.check_released()
    with repository.writing() as staging, _connected(repository, urls, timeout_s) as servers:
        history = [version for version in repository.history() if version in repository.versions()]
        if len(history) < 2:
            raise NothingToRollBackTo(
                f"{repository.name}: nothing was served before version {repository.served}; exporter promote N serves "
                "any version of: exporter versions"
            )
        return _switch(repository, history[-2], history[:-1], servers, staging, report)


def prune(repository: Repository, keep: int, urls: Sequence[str] = ()) -> Pruned:
    """Delete old versions for good: all but the newest, those that are loaded, and the base, which merges are compared
    with.

    Args:
        keep: how many of the newest are kept.
        urls: of running servers: what they have loaded is kept, though it may no longer be active on disk.

    Raises:
        RepositoryEmpty, StoreMissing: there is nothing to prune.
        ForeignFiles: a version has something in it that clipweld did not write; nothing was deleted.
        ServerUnreachable: a server can't be asked; nothing was deleted.
    """
    repository.check_released()
    with repository.held():
        versions = repository.versions()
        loaded = {version for url in urls for version in loaded_versions(repository, url)}
        kept = {*versions[-keep:], *repository.standing(), *loaded, BASE_VERSION} & set(versions)
        removed = [version for version in versions if version not in kept]
        for version in removed:
            repository.check_removable(version)
        for version in removed:
            repository.remove(version)
        return Pruned(repository.name, removed, sorted(kept))


def loaded_versions(repository: Repository, url: str) -> list[int]:
    """What a running server has loaded, oldest first; the last is what it serves to those who name no version.

    Raises:
        ServerUnreachable: no Triton answers.
    """
    with Connection(url, ASK_TIMEOUT_S) as connection:
        return connection.loaded(repository)


def _switch(
    repository: Repository,
    version: int,
    following: Sequence[int],
    servers: Sequence[ModelControl],
    staging: Path,
    report: Callable[[str], None],
) -> Switched:
    began = time.perf_counter()
    repository.check(version)
    repository.check_foreign()
    report(f"version {version}: reading its files")
    check_files(repository, version)
    previous, stood = repository.served, repository.standing()
    following = [number for place, number in enumerate(following) if place == 0 or following[place - 1] != number]
    keep = {version, min(following[-2:])}
    gone = [old for old in stood if old not in keep]
    for old in gone:
        repository.check_retirable(old)
    history = repository.history()
    if following != history:
        repository.record(history, following)
    newer = [old for old in gone if old > version]  # each is served in its place until its card is out
    try:
        report(f"version {version}: loading")
        _load(repository, version, servers, staging)
        for old in newer:
            repository.take_out(old, staging, ("card",))
        if newer:
            _reload(repository, servers, ("card",))
    except BaseException:
        _undo(repository, version, stood, newer, servers, staging)
        raise
    warnings = _retire(repository, gone, servers, staging, report)
    urls = [server.url for server in servers]
    took = time.perf_counter() - began
    return Switched(repository.name, version, previous, repository.standing(), urls, took, warnings)


def _load(repository: Repository, version: int, servers: Sequence[ModelControl], staging: Path) -> None:
    """Put a version in, its card once both towers answer on every server."""
    repository.put_in(version, staging, TOWERS)
    _reload(repository, servers, TOWERS)
    for server in servers:
        for kind in TOWERS:
            server.wait(repository.model(kind), version)
        server.check_answers(repository, version)
    repository.put_in(version, staging, ("card",))
    _reload(repository, servers, ("card",))
    for server in servers:
        server.wait(repository.model("card"), version)
        server.check_card(repository, version)


def _undo(
    repository: Repository,
    version: int,
    stood: Sequence[int],
    newer: Sequence[int],
    servers: Sequence[ModelControl],
    staging: Path,
) -> None:
    """Serve again what was served before a switch that failed."""
    for old in newer:
        repository.put_in(old, staging, ("card",))
    if version not in stood:
        repository.take_out(version, staging)
    if newer or version not in stood:
        for server in servers:
            for kind in KINDS:
                with suppress(PromotionFailed):
                    server.load(repository.model(kind))


def _retire(
    repository: Repository,
    gone: Sequence[int],
    servers: Sequence[ModelControl],
    staging: Path,
    report: Callable[[str], None],
) -> list[str]:
    """Take out what was replaced. The switch has happened: what fails here is returned, a line each."""
    report("taking out what it replaces")
    failed = []
    for kinds in (("card",), TOWERS):
        for old in gone:
            try:
                repository.take_out(old, staging, kinds)
            except RepositoryError as exc:
                failed.append(f"version {old} could not be taken out: {exc}")
        for server in servers if gone else ():
            try:
                _reload(repository, [server], kinds)
            except PromotionFailed as exc:
                failed.append(f"what is replaced may still be loaded: {exc}")
    return failed


def _reload(repository: Repository, servers: Sequence[ModelControl], kinds: Sequence[str]) -> None:
    for server in servers:
        for kind in kinds:
            server.load(repository.model(kind))


@contextmanager
def _connected(repository: Repository, urls: Sequence[str], timeout_s: float) -> Iterator[list[ModelControl]]:
    with ExitStack() as stack:
        servers, key = [], admin_key(repository.path) if urls else None
        for url in urls:
            servers.append(ModelControl(url, key, timeout_s))
            stack.callback(servers[-1].close)
        yield servers
