import numpy as np
import pytest

from client import BenchResult, TowerTiming, bench
from client._bench import summarise
from client.errors import ContractMismatch, InvalidRequest, VersionGone


def test_versions_take_turns_and_warm_up_is_not_counted(fake):
    seen = []

    def track(turns):
        for turn in turns:
            fake.requests.clear()
            yield turn
            seen.append([(version, shape) for _, version, shape in fake.requests])

    result = bench(fake.url, (1, 2), requests=6, batch=3, track=track)
    shape = (3, 16, 16, 3)
    assert seen == [[(1, shape), (2, shape)], [(2, shape), (1, shape)]] * 3
    assert result.requests == 6
    assert 0 < result.base.p50_ms <= result.base.p95_ms


def test_figures_follow_their_definitions():
    times_s = np.array([[0.010, 0.011], [0.020, 0.022], [0.040, 0.020]])
    result = summarise(times_s, batch=4)
    assert result == BenchResult(
        base=TowerTiming(p50_ms=pytest.approx(20), p95_ms=pytest.approx(38), images_per_s=pytest.approx(200)),
        merged=TowerTiming(p50_ms=pytest.approx(20), p95_ms=pytest.approx(21.8), images_per_s=pytest.approx(200)),
        ratio_p50=pytest.approx(1.1),  # median of 1.1, 1.1 and 0.5
        ratio_throughput=pytest.approx(1.0),
        requests=3,
    )


def test_to_dict_has_exactly_these_keys():
    result = summarise(np.full((2, 2), 0.01), batch=1).to_dict()
    tower = {"p50_ms", "p95_ms", "images_per_s"}
    assert list(result) == ["base", "merged", "ratio_p50", "ratio_throughput", "requests"]
    assert set(result["base"]) == set(result["merged"]) == tower


def test_batch_larger_than_the_servers_is_refused(fake):
    with pytest.raises(InvalidRequest, match=r"batch is 5; .* take at most 4 images in a request"):
        bench(fake.url, (1, 2), batch=5)


def test_versions_with_different_images_are_refused(fake):
    fake.cards[2]["image"]["size"] = 32
    with pytest.raises(ContractMismatch, match=r"takes images of 16 pixels, .* of 32"):
        bench(fake.url, (1, 2))


def test_version_that_is_not_served_is_refused(fake):
    with pytest.raises(VersionGone, match="version 9 of model 'clip'"):
        bench(fake.url, (1, 9))


def test_nothing_to_measure_is_refused():
    with pytest.raises(InvalidRequest, match="requests is 0"):
        bench("localhost:8001", (1, 2), requests=0)
