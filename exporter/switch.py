"""Which version is served: promotion, rollback and pruning, on disk and in running Tritons.

What stands in the models' folders is what is served. A new version goes in tower by tower and is loaded and asked
before its card follows; only then do clients see it. The version before it stands on, loaded, for the way back. Clients
pin one version for both towers and move to another between calls, so no answer ever mixes two.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import shorten
from types import ModuleType

import numpy as np
import tritonclient.grpc
import tritonclient.http

from exporter.admin import HEADER, KEY_VARIABLE, admin_key
from exporter.config import UNIT_TOLERANCE
from exporter.errors import NothingToRollBackTo, PromotionFailed, RepositoryError, ServerUnreachable
from exporter.manifest import check_files
from exporter.repository import BASE_VERSION, KINDS, TOWERS, Repository

POLL_S = 0.02


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


class Server:
    """A running Triton, through its model control.

    Args:
        url: ``http://host:port``, or ``host:port`` or ``grpc://host:port`` for gRPC.
        key: the administrator's, where there is one.
        timeout_s: how long a model may take to load, and a request to be answered.

    Raises:
        ServerUnreachable: nobody answers there, or its model control is not for us.
    """

    def __init__(self, url: str, key: str | None, timeout_s: float) -> None:
        if "@" in url:  # not shown: what stands before it may be a password
            raise ServerUnreachable("server address: has a user's name in it; give host:port or http://host:port alone")
        self.url, self._timeout_s = url, timeout_s
        scheme, _, address = url.rpartition("://")
        self._triton: ModuleType = tritonclient.http if scheme == "http" else tritonclient.grpc
        limits = {"network_timeout": timeout_s} if scheme == "http" else {}
        self._client = self._triton.InferenceServerClient(address, **limits)
        prefix = "" if scheme == "http" else "triton-grpc-protocol-"
        self._headers = {f"{prefix}{HEADER}": key} if key else {}
        step = f"is there an exporter serve of this very repository, another --url, or a {KEY_VARIABLE}?"
        with self._errors(ServerUnreachable, step):
            self._client.get_model_repository_index(headers=self._headers)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def load(self, model: Path) -> None:
        """Have Triton look at a model's folder again: new versions are loaded, those that are gone are dropped."""
        with self._errors(PromotionFailed, "see the server's log"):
            self._client.load_model(model.name, headers=self._headers)

    def wait(self, model: Path, version: int) -> None:
        """Return once a version is ready: loaded, and warm, as its config.pbtxt wants it."""
        deadline = time.monotonic() + self._timeout_s
        with self._errors(PromotionFailed, "see the server's log"):
            while not self._client.is_model_ready(model.name, str(version)):
                if time.monotonic() > deadline:
                    raise PromotionFailed(
                        f"{model.name} version {version} was not ready at {self.url} within {self._timeout_s:g} s; is "
                        f"{model.parent} what it serves? or give it longer with --timeout"
                    )
                time.sleep(POLL_S)

    def check_card(self, repository: Repository, version: int) -> None:
        """Hold the card that is served against the one in the store.

        Raises:
            PromotionFailed: this server serves another repository.
        """
        model = repository.model("card")
        answer = self._infer(model, version, "index", np.zeros((1, 1), np.int32)).as_numpy("card")
        if json.loads(answer[0, 0]) != repository.card(version):
            raise PromotionFailed(
                f"{model.name} version {version} at {self.url} has another card than {repository.store}; does it serve "
                "another repository?"
            )

    def check_answers(self, repository: Repository, version: int) -> None:
        """Ask both towers once: what passed every check where it was made may overflow on this machine.

        Raises:
            PromotionFailed: an answer is no unit vector, or NaN.
        """
        card = repository.card(version)
        size, length = card["image"]["size"], card["text"]["context_length"]
        for kind, name, array in (
            ("image", "image", np.zeros((1, size, size, 3), np.uint8)),
            ("text", "tokens", np.zeros((1, length), np.int32)),
        ):
            model = repository.model(kind)
            features = self._infer(model, version, name, array).as_numpy(f"{kind}_features")
            norm = float(np.linalg.norm(features))
            if not abs(norm - 1) <= UNIT_TOLERANCE:  # NaN fails
                raise PromotionFailed(
                    f"{model.name} version {version} at {self.url} answers features of length {norm:g}, expected 1; "
                    "promote one merged with --precision fp32"
                )

    def _infer(self, model: Path, version: int, name: str, array: np.ndarray):
        value = self._triton.InferInput(name, array.shape, {"uint8": "UINT8", "int32": "INT32"}[array.dtype.name])
        value.set_data_from_numpy(array)
        with self._errors(PromotionFailed, "see the server's log"):
            return self._client.infer(model.name, [value], model_version=str(version))

    @contextmanager
    def _errors(self, kind: type[Exception], step: str) -> Iterator[None]:
        """tritonclient's errors, and those of the libraries below it, in one line of ours."""
        try:
            yield
        except (tritonclient.grpc.InferenceServerException, OSError) as exc:
            reason = shorten(str(exc), 300, placeholder=" ...")
            raise kind(f"server {self.url}: {reason}; {step}") from exc


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


def prune(repository: Repository, keep: int) -> Pruned:
    """Delete old versions for good: all but the newest, those that stand, and the base, which merges are compared with.

    Args:
        keep: how many of the newest are kept.

    Raises:
        RepositoryEmpty, StoreMissing: there is nothing to prune.
        ForeignFiles: a version has something in it that clipweld did not write; nothing was deleted.
    """
    repository.check_released()
    with repository.held():
        versions = repository.versions()
        kept = {*versions[-keep:], *repository.standing(), BASE_VERSION} & set(versions)
        removed = [version for version in versions if version not in kept]
        for version in removed:
            repository.check_removable(version)
        for version in removed:
            repository.remove(version)
        return Pruned(repository.name, removed, sorted(kept))


def _switch(
    repository: Repository,
    version: int,
    following: Sequence[int],
    servers: Sequence[Server],
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


def _load(repository: Repository, version: int, servers: Sequence[Server], staging: Path) -> None:
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
    servers: Sequence[Server],
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
    servers: Sequence[Server],
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


def _reload(repository: Repository, servers: Sequence[Server], kinds: Sequence[str]) -> None:
    for server in servers:
        for kind in kinds:
            server.load(repository.model(kind))


@contextmanager
def _connected(repository: Repository, urls: Sequence[str], timeout_s: float) -> Iterator[list[Server]]:
    with ExitStack() as stack:
        servers, key = [], admin_key(repository.path) if urls else None
        for url in urls:
            servers.append(Server(url, key, timeout_s))
            stack.callback(servers[-1].close)
        yield servers
