"""Is a merged image tower as fast as the base? Two versions measured side by side on one server."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from client._address import parse_url
from client._asker import Asker
from client._release import Release, open_release
from client._runtime import BlockingRuntime, run
from client._transport import BlockingTransport
from client.errors import ContractMismatch, InvalidRequest

_WARMUP_PAIRS = 10


@dataclass(frozen=True)
class TowerTiming:
    """Times of one image tower.

    Attributes:
        p50_ms: median time of a request, in milliseconds.
        p95_ms: 95th percentile, in milliseconds.
        images_per_s: images in a request divided by its median time.
    """

    p50_ms: float
    p95_ms: float
    images_per_s: float


@dataclass(frozen=True)
class BenchResult:
    """Base and merged image tower, compared.

    Attributes:
        base: times of the first version.
        merged: times of the second version.
        ratio_p50: median over the pairs of (merged time / base time). The two requests of a pair follow each other
            at once, so that a slow moment of the machine weighs on both; steadier than a ratio of medians.
        ratio_throughput: merged images_per_s divided by base images_per_s.
        requests: requests that each version answered, warm-up excluded.
    """

    base: TowerTiming
    merged: TowerTiming
    ratio_p50: float
    ratio_throughput: float
    requests: int

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types, keys as the attributes."""
        return asdict(self)


def bench(
    url: str,
    versions: tuple[int, int],
    *,
    model: str = "clip",
    requests: int = 200,
    batch: int = 1,
    timeout_s: float = 30.0,
    track: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> BenchResult:
    """Measure two versions of the image tower, in turns, with the same random images.

    A pair is one request to each version; which of the two goes first alternates.

    Args:
        url: as in `ZeroShotClassifier`.
        versions: base and merged.
        model: name of the served model.
        requests: how many requests each version gets.
        batch: images in a request.
        timeout_s: how long one request may take, in seconds.
        track: wraps the loop over the pairs, for a progress bar.

    Raises:
        InvalidRequest: no requests, or a batch the server does not take.
        ContractMismatch: the two versions take different images.
        ServerUnavailable, RequestTimeout, ServerError, ModelNotFound, VersionGone: see `client.errors`.
    """
    if requests < 1 or batch < 1:
        raise InvalidRequest(f"requests is {requests} and batch is {batch}; expected 1 or more of both")
    transport = BlockingTransport(parse_url(url), timeout_s)
    asker = Asker(transport, BlockingRuntime(), timeout_s, 0, None)
    try:
        base, merged = (run(open_release(asker, model, version)) for version in versions)
        pixels = _random_images(base, merged, batch)
        for turn in range(_WARMUP_PAIRS):
            _timed_pair(asker, base, merged, pixels, turn)
        times_s = np.array([_timed_pair(asker, base, merged, pixels, turn) for turn in track(range(requests))])
    finally:
        run(transport.close())
    return summarise(times_s, batch)


def summarise(times_s: np.ndarray, batch: int) -> BenchResult:
    """The figures of a measurement.

    Args:
        times_s: float (requests, 2), seconds: base and merged time of each pair.
        batch: images in a request.
    """
    base, merged = (_tower_timing(column, batch) for column in times_s.T)
    return BenchResult(
        base=base,
        merged=merged,
        ratio_p50=float(np.median(times_s[:, 1] / times_s[:, 0])),
        ratio_throughput=merged.images_per_s / base.images_per_s,
        requests=len(times_s),
    )


def _tower_timing(times_s: np.ndarray, batch: int) -> TowerTiming:
    p50_s, p95_s = np.percentile(times_s, [50, 95])
    return TowerTiming(p50_ms=float(p50_s) * 1e3, p95_ms=float(p95_s) * 1e3, images_per_s=float(batch / p50_s))


def _random_images(base: Release, merged: Release, batch: int) -> np.ndarray:
    size, other = base.card.image_size, merged.card.image_size
    if size != other:
        raise ContractMismatch(f"{base} takes images of {size} pixels, {merged} of {other}; expected the same")
    most = min(base.max_images, merged.max_images)
    if batch > most:
        raise InvalidRequest(f"batch is {batch}; {base} and {merged} take at most {most} images in a request")
    return np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)


def _timed_pair(asker: Asker, base: Release, merged: Release, pixels: np.ndarray, turn: int) -> tuple[float, float]:
    """Seconds that one request to each took; the merged one goes first in odd turns."""
    if turn % 2:
        merged_s, base_s = _timed(asker, merged, pixels), _timed(asker, base, pixels)
    else:
        base_s, merged_s = _timed(asker, base, pixels), _timed(asker, merged, pixels)
    return base_s, merged_s


def _timed(asker: Asker, release: Release, pixels: np.ndarray) -> float:
    start = time.perf_counter()
    run(release.image_features(asker, pixels))
    return time.perf_counter() - start
