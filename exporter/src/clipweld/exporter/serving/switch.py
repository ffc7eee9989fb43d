"""Promotion, rollback and pruning of versions, on disk and in running Tritons.

The versions in the models' folders are the active ones. The towers of a new version are activated, loaded and tested
before its card; clients see it only then. The previous version stays loaded for a rollback. Clients pin one version for
both towers and change it only between calls, so no answer ever mixes two.
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
        version: the version that answers requests that name none.
        previous: the version served before, if any.
        standing: all active versions, oldest first.
        servers: addresses that were switched; empty if only the files were.
        seconds: wall time.
        warnings: failures after the switch itself, a line each.
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
    """Serve a version once it is loaded and warm on every server, without failing a request.

    Afterwards it is active, and so is the previous version unless that is newer: Triton serves the newest by default.

    Args:
        version: None for the newest in the store.
        urls: of the servers' model control; if empty, only files change and the next server start loads them.
        timeout_s: of each load.
        report: called with a line when a step begins.

    Raises:
        RepositoryEmpty, StoreMissing, VersionMissing, VersionDamaged, ForeignFiles: nothing was changed.
        ServerUnreachable: nothing was changed.
        PromotionFailed: a server could not load it; the previous version is still served.
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
    """Serve the previously served version; repeat to go back further.

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
    """Delete all versions but the newest, loaded ones, and the base, which merges are compared with.

    Args:
        keep: how many of the newest are kept.
        urls: of running servers; versions they have loaded are kept even if no longer active on disk.

    Raises:
        RepositoryEmpty, StoreMissing: there is nothing to prune.
        ForeignFiles: a version has something in it that clipweld did not write; nothing was deleted.
        ServerUnreachable: a server doesn't answer; nothing was deleted.
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
    """Return the versions a server has loaded, oldest first; the last answers requests that name none.

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
    newer = [old for old in gone if old > version]  # Triton serves these by default until their cards are deactivated
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
    """Activate a version on disk and on every server; its card only once both towers answer everywhere."""
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
    """Deactivate replaced versions. The switch is done, so failures are returned as warnings."""
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
