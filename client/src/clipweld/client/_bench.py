"""The inference cost of adapters: base, merged and unmerged, measured in turns on one server.

In a round each contender has one turn, right after the other and in a different order each time, so that a slow moment
of the machine affects them all. Ratios are taken within a round, and their median is reported. Intervals are
percentiles of that median over resampled rounds (the bootstrap, Efron 1979).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np

from clipweld.client._address import Address, parse_url
from clipweld.client._arguments import count, model_name, seconds, shown, version_number
from clipweld.client._asker import Asker
from clipweld.client._release import Release, open_release, ready_versions
from clipweld.client._runtime import BlockingRuntime, run
from clipweld.client._transport import Transport
from clipweld.client.errors import ContractMismatch, InvalidRequest, ModelNotFound

WARMUP_ROUNDS = 5
RESAMPLES = 2000
CONFIDENCE = 0.95
MOST_AT_A_TIME = 1000  # each has a thread
MOST = 10_000_000  # requests in one setting: their times are kept in memory
WIDE = 0.1  # of a ratio: an interval with a larger half-width can't tell what merging costs
FEW = 20  # requests: with fewer, resampling gives no meaningful interval
UNMERGED = "{model}-unmerged"  # written by `exporter merge --unmerged`; its versions differ in their number of adapters

_T = TypeVar("_T")


@dataclass(frozen=True)
class Interval:
    """A ratio of times, with its confidence interval.

    Attributes:
        ratio: median over rounds of a contender's time divided by the base's. A time runs until all concurrent requests
            of a turn are answered.
        low: lower end of the 95% bootstrap interval of that median.
        high: upper end of it.
    """

    ratio: float
    low: float
    high: float

    @property
    def too_wide(self) -> bool:
        """Whether it is too wide to be useful: on average it reaches over a tenth of the ratio to either side."""
        return (self.high - self.low) / 2 > WIDE * self.ratio

    def __str__(self) -> str:
        return f"{self.ratio:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Timing:
    """The measurements of one contender at one batch size and concurrency.

    Attributes:
        contender: "base", "merged" or "unmerged".
        model: name of the model that was timed.
        version: its version.
        tasks: how many tasks it has learned.
        batch: images per request.
        concurrency: requests in flight at a time.
        p50_ms: median time of a request as the client sees it, in milliseconds.
        p95_ms: 95th percentile of that time.
        p99_ms: 99th percentile of that time.
        images_per_s: images of all rounds divided by the time they took, in images per second.
        to_base: latency relative to the base, by the client's clock.
        compute_to_base: compute time per request relative to the base, by Triton's statistics; None if it keeps none.
    """

    contender: str
    model: str
    version: int
    tasks: int
    batch: int
    concurrency: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    images_per_s: float
    to_base: Interval
    compute_to_base: float | None


@dataclass(frozen=True)
class BenchResult:
    """The measurements of all contenders in all settings.

    Attributes:
        timings: setting by setting, the base first in each.
        requests: rounds per setting, without the warm-up.
    """

    timings: tuple[Timing, ...]
    requests: int

    @property
    def verdict(self) -> str:
        """The cost of merged adapters relative to the base, in one sentence."""
        merged = [timing for timing in self.timings if timing.contender == "merged"]
        ratios = [timing.to_base.ratio - 1 for timing in merged]
        low, high = min(t.to_base.low for t in merged) - 1, max(t.to_base.high for t in merged) - 1
        span = f"{ratios[0]:+.1%}" if len(ratios) == 1 else f"{min(ratios):+.1%} to {max(ratios):+.1%}"
        tasks = f"{merged[0].tasks} learned task{'s' if merged[0].tasks != 1 else ''}"
        return f"Overhead of {tasks}, merged: {span} (95% interval{'s' * (len(ratios) > 1)} {low:+.1%} to {high:+.1%})"

    @property
    def warning(self) -> str | None:
        """Why the results mean nothing, in one sentence; None if they are usable."""
        step = "give more --requests, on a machine that does nothing else"
        if self.requests < FEW:
            return f"{self.requests} requests are too few for an interval; {step}"
        wide = [timing for timing in self.timings if timing.to_base.too_wide]
        if not wide:
            return None
        worst = max(wide, key=lambda timing: (timing.to_base.high - timing.to_base.low) / timing.to_base.ratio)
        return (
            f"{len(wide)} of {len(self.timings)} intervals are too wide to mean anything, such as {worst.to_base} of "
            f"{worst.contender} at batch {worst.batch}, {worst.concurrency} at a time; {step}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; base and merged of the first setting are repeated at the top level."""
        base, merged = (next(t for t in self.timings if t.contender == name) for name in ("base", "merged"))
        return {
            "base": _brief(base),
            "merged": _brief(merged),
            "ratio_p50": merged.to_base.ratio,
            "ratio_throughput": merged.images_per_s / base.images_per_s,
            "requests": self.requests,
            "verdict": self.verdict,
            "warning": self.warning,
            "timings": [asdict(timing) for timing in self.timings],
        }


@dataclass(frozen=True)
class _Contender:
    name: str
    release: Release


def bench(
    url: str,
    versions: tuple[int, int],
    *,
    model: str = "clip",
    requests: int = 200,
    batches: Sequence[int] = (1,),
    concurrencies: Sequence[int] = (1,),
    timeout_s: float = 30.0,
    track: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> BenchResult:
    """Measure the latency and throughput of the image towers of a base and a merged version on one server.

    All contenders get the same random images. A setting is a pair of a batch size and a concurrency; all pairs are
    measured.

    Args:
        url: as in `ZeroShotClassifier`.
        versions: the base version and the merged version.
        model: name of the served model. If ``<model>-unmerged`` is served too, all its versions take part.
        requests: rounds per setting, which is also the number of requests to each contender at concurrency 1.
        batches: batch sizes to measure, in images per request.
        concurrencies: numbers of requests in flight at a time to measure, all of them to one contender.
        timeout_s: limit on one request, in seconds. Requests are not retried.
        track: wraps the loop over all rounds, for a progress bar.

    Returns:
        The measurements of each contender in each setting.

    Raises:
        InvalidRequest: there are no requests, or too many, or a batch is larger than the server accepts.
        ContractMismatch: the contenders take images of different sizes, or were made for another client.
        ModelNotFound: the model is not served.
        VersionGone: a version is not served.
        ServerUnavailable: there is no server at the address.
        RequestTimeout: a request took longer than ``timeout_s``.
        ServerError: the server failed.

    Example:
        >>> from clipweld.client import bench
        >>> print(bench("localhost:8001", versions=(1, 2)).verdict)  # doctest: +SKIP
    """
    requests = count("requests", requests, 1, MOST)
    batches = [count("batches", batch, 1) for batch in _several("batches", batches)]
    concurrencies = [
        count("concurrencies", number, 1, MOST_AT_A_TIME) for number in _several("concurrencies", concurrencies)
    ]
    pair = [version_number(version) for version in _several("versions", versions)]
    if len(pair) != 2:
        raise InvalidRequest(f"versions is {shown(versions)}; expected two: base and merged")
    if requests * max(concurrencies) > MOST:
        raise InvalidRequest(f"requests is {requests:,}, {max(concurrencies):,} at a time; expected {MOST:,} in all")
    settings = [(batch, concurrency) for batch in batches for concurrency in concurrencies]
    with ExitStack() as stack:
        # Entered first, so it shuts down last: closing the connection ends the requests that its threads wait for.
        pool = stack.enter_context(ThreadPoolExecutor(max(concurrencies)))
        asker = _connected(parse_url(url), seconds("timeout_s", timeout_s), stack)
        contenders = _contenders(asker, model_name(model), (pair[0], pair[1]))
        pixels = {batch: _random_images(contenders, batch) for batch in batches}
        rounds = iter(track(range(len(settings) * (requests + WARMUP_ROUNDS))))
        timings: list[Timing] = []
        for batch, concurrency in settings:
            measured = _measure(asker, contenders, pixels[batch], concurrency, requests, pool, rounds)
            timings += _timings(contenders, *measured, batch, concurrency)
        next(rounds, None)  # completes a progress bar
    return BenchResult(tuple(timings), requests)


def _several(name: str, values: Any) -> list[Any]:
    listed = list(values) if isinstance(values, Iterable) and not isinstance(values, str) else []
    if not listed:
        raise InvalidRequest(f"{name} is {shown(values)}; expected one or more in a list")
    return listed


def _connected(address: Address, timeout_s: float, stack: ExitStack) -> Asker:
    runtime = BlockingRuntime()
    transport = Transport(address, runtime)
    stack.callback(transport.close)
    return Asker(transport, runtime, timeout_s, 0, None)


def _contenders(asker: Asker, model: str, versions: tuple[int, int]) -> list[_Contender]:
    found = [
        _Contender(name, run(open_release(asker, model, version)))
        for name, version in zip(("base", "merged"), versions, strict=True)
    ]
    apart = UNMERGED.format(model=model)
    try:
        numbers = run(ready_versions(asker, apart))
    except ModelNotFound:
        return found
    return found + [_Contender("unmerged", run(open_release(asker, apart, number))) for number in numbers]


def _measure(
    asker: Asker,
    contenders: list[_Contender],
    pixels: np.ndarray,
    concurrency: int,
    requests: int,
    pool: ThreadPoolExecutor,
    rounds: Iterable[int],
) -> tuple[np.ndarray, np.ndarray, list[float | None]]:
    """Measure one setting.

    Returns:
        The seconds of each request (requests, num_contenders, concurrency); the seconds of each turn, until all its
        requests were answered (requests, num_contenders); and each contender's compute time per request in nanoseconds,
        by the server's statistics, or None.
    """
    seconds = np.empty((requests, len(contenders), concurrency))
    walls = np.empty((requests, len(contenders)))
    before: list[tuple[int, int] | None] = []

    def timed(release: Release) -> float:
        began = time.perf_counter()
        run(release.image_features(asker, pixels))
        return time.perf_counter() - began

    for number, _ in zip(range(-WARMUP_ROUNDS, requests), rounds, strict=False):
        if number == 0:
            before = [_computed(asker, contender) for contender in contenders]
        for turn in range(len(contenders)):
            place = (turn + number) % len(contenders)
            release = contenders[place].release
            began = time.perf_counter()
            took = [timed(release)] if concurrency == 1 else list(pool.map(timed, [release] * concurrency))
            if number >= 0:
                walls[number, place], seconds[number, place] = time.perf_counter() - began, took
    after = [_computed(asker, contender) for contender in contenders]
    return seconds, walls, [_each(*pair) for pair in zip(before, after, strict=True)]


def _computed(asker: Asker, contender: _Contender) -> tuple[int, int] | None:
    name = f"{contender.release.model}_image"
    return run(asker.ask(lambda timeout_s: asker.transport.compute_ns(name, contender.release.version, timeout_s)))


def _each(before: tuple[int, int] | None, after: tuple[int, int] | None) -> float | None:
    if before is None or after is None or after[0] == before[0]:
        return None
    return (after[1] - before[1]) / (after[0] - before[0])


def _timings(
    contenders: list[_Contender],
    seconds: np.ndarray,
    walls: np.ndarray,
    compute: list[float | None],
    batch: int,
    concurrency: int,
) -> list[Timing]:
    found = []
    for place, contender in enumerate(contenders):
        p50, p95, p99 = (float(q) * 1e3 for q in np.percentile(seconds[:, place], [50, 95, 99]))
        ours, base = compute[place], compute[0]
        found.append(
            Timing(
                contender=contender.name,
                model=contender.release.model,
                version=contender.release.version,
                tasks=len(contender.release.card.tasks),
                batch=batch,
                concurrency=concurrency,
                p50_ms=p50,
                p95_ms=p95,
                p99_ms=p99,
                images_per_s=float(batch * concurrency * len(walls) / walls[:, place].sum()),
                to_base=interval(walls[:, place] / walls[:, 0]),
                compute_to_base=ours / base if ours and base else None,
            )
        )
    return found


def interval(ratios: np.ndarray) -> Interval:
    """Return the median of ratios (rounds,) and its bootstrap interval; the same ratios give the same interval."""
    drawn = np.random.default_rng(0).choice(ratios, (RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(np.median(ratios)), float(low), float(high))


def _random_images(contenders: list[_Contender], batch: int) -> np.ndarray:
    sizes = {contender.release.card.image_size for contender in contenders}
    if len(sizes) > 1:
        raise ContractMismatch(f"contenders take images of {sorted(sizes)} pixels; expected the same")
    most = min(contender.release.max_images for contender in contenders)
    if batch > most:
        raise InvalidRequest(f"batch is {batch}; the server takes at most {most} images in a request")
    (size,) = sizes
    return np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)


def _brief(timing: Timing) -> dict[str, float]:
    return {"p50_ms": timing.p50_ms, "p95_ms": timing.p95_ms, "images_per_s": timing.images_per_s}
