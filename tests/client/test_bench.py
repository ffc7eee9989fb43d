import errno
import json
from dataclasses import replace

import numpy as np
import pytest

from clipweld.client import Interval, bench
from clipweld.client._bench import WARMUP_ROUNDS, BenchResult, Timing, interval
from clipweld.client._figure import draw
from clipweld.client.errors import ContractMismatch, InvalidRequest, ResultsError, VersionGone


def timing(contender, ratio, *, tasks=0, batch=1, concurrency=1):
    low, high = (1, 1) if contender == "base" else (ratio - 0.01, ratio + 0.02)
    found = Interval(ratio, low, high)
    return Timing(contender, "clip", 1, tasks, batch, concurrency, 10 * ratio, 20, 30, 100 / ratio, found, 1.0)


RESULT = BenchResult(
    tuple(
        timing(name, ratio, tasks=tasks, batch=batch)
        for batch in (1, 8)
        for name, ratio, tasks in (("base", 1, 0), ("merged", 1.001, 11), ("unmerged", 1.2, 1), ("unmerged", 2.1, 11))
    ),
    requests=7,
)


def test_contenders_take_turns_and_warm_up_is_not_counted(fake):
    seen = []

    def track(rounds):
        for number in rounds:
            fake.requests.clear()
            yield number
            seen.append([(version, shape) for model, version, shape in fake.requests if model == "clip_image"])

    result = bench(fake.url, (1, 2), requests=6, batches=[3], track=track)
    shape = (3, 16, 16, 3)
    orders = [[(2, shape), (1, shape)], [(1, shape), (2, shape)]]
    assert [found for found in seen if found] == [orders[turn % 2] for turn in range(WARMUP_ROUNDS + 6)]
    assert result.requests == 6
    base, merged = result.timings
    assert (base.contender, merged.contender, merged.tasks) == ("base", "merged", 1)
    assert 0 < base.p50_ms <= base.p95_ms <= base.p99_ms
    assert base.to_base == Interval(1, 1, 1)


def test_every_combination_of_batch_and_concurrency_is_measured(fake):
    result = bench(fake.url, (1, 2), requests=3, batches=[1, 2], concurrencies=[1, 3])
    settings = [(t.contender, t.batch, t.concurrency) for t in result.timings]
    assert settings == [(name, b, c) for b in (1, 2) for c in (1, 3) for name in ("base", "merged")]
    images = [shape[0] for model, _, shape in fake.requests if model == "clip_image"]
    assert images.count(2) == 2 * (1 + 3) * (WARMUP_ROUNDS + 3)
    assert all(t.compute_to_base == pytest.approx(t.version) for t in result.timings)


def test_the_interval_is_the_confidence_interval_of_the_median():
    ratios = np.random.default_rng(5).normal(1.1, 0.1, 400)
    found = interval(ratios)
    assert found.ratio == np.median(ratios)
    # The median's standard error of a normal sample: 1.2533 sigma / sqrt(n).
    assert found.high - found.low == pytest.approx(2 * 1.96 * 1.2533 * 0.1 / 20, rel=0.25)
    assert found.low < found.ratio < found.high
    assert interval(ratios) == found
    assert interval(np.array([1.5, 1.5])) == Interval(1.5, 1.5, 1.5)


def test_the_verdict_is_the_merged_overhead():
    assert RESULT.verdict == "Overhead of 11 learned tasks, merged: +0.1% to +0.1% (95% intervals -0.9% to +2.1%)"
    one = BenchResult(RESULT.timings[:2], 3)
    assert one.verdict == "Overhead of 11 learned tasks, merged: +0.1% (95% interval -0.9% to +2.1%)"


def test_to_dict_is_json_with_the_first_setting_at_the_top():
    found = json.loads(json.dumps(RESULT.to_dict()))
    assert list(found) == [
        "base",
        "merged",
        "ratio_p50",
        "ratio_throughput",
        "requests",
        "verdict",
        "warning",
        "timings",
    ]
    assert set(found["base"]) == set(found["merged"]) == {"p50_ms", "p95_ms", "images_per_s"}
    assert found["ratio_p50"] == 1.001
    assert found["ratio_throughput"] == pytest.approx(1 / 1.001)
    assert len(found["timings"]) == 8
    assert found["timings"][1]["to_base"] == pytest.approx({"ratio": 1.001, "low": 0.991, "high": 1.021})


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_the_figure_is_written_as_svg_or_png(tmp_path, ending):
    draw(RESULT, tmp_path / f"overhead.{ending}")
    assert (tmp_path / f"overhead.{ending}").stat().st_size > 5000
    with pytest.raises(ResultsError, match=r"figure .*overhead\.xyz: cannot be written"):
        draw(RESULT, tmp_path / "overhead.xyz")


def test_a_figure_that_cannot_be_written_leaves_the_earlier_file_unchanged(tmp_path, monkeypatch):
    (tmp_path / "overhead.svg").write_text("before")

    def full(file, **_):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, file, **options: full(file))
    with pytest.raises(ResultsError, match=r"figure .*overhead\.svg: cannot be written .*No space left on device"):
        draw(RESULT, tmp_path / "overhead.svg")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


def test_a_batch_larger_than_the_server_allows_is_refused(fake):
    with pytest.raises(InvalidRequest, match="batch is 5; the server takes at most 4 images in a request"):
        bench(fake.url, (1, 2), batches=[5])


def test_versions_with_different_image_sizes_are_refused(fake):
    fake.cards[2]["image"]["size"] = 32
    with pytest.raises(ContractMismatch, match=r"contenders take images of \[16, 32\] pixels"):
        bench(fake.url, (1, 2))


def test_version_that_is_not_served_is_refused(fake):
    with pytest.raises(VersionGone, match="version 9 of model 'clip'"):
        bench(fake.url, (1, 9))


@pytest.mark.parametrize("wrong", [{"requests": 0}, {"batches": []}, {"concurrencies": [0]}])
def test_settings_that_measure_nothing_are_refused(wrong):
    with pytest.raises(InvalidRequest, match=r"expected (a whole number, 1 to|one or more)"):
        bench("localhost:8001", (1, 2), **wrong)


def test_intervals_that_are_too_wide_cause_a_warning():
    draw = np.random.default_rng(3)
    steady, busy = (interval(draw.normal(1.0, spread, 40)) for spread in (0.02, 1.5))
    assert not steady.too_wide
    assert busy.too_wide
    assert BenchResult(RESULT.timings, requests=40).warning is None
    wide = [replace(found, to_base=busy) if found.contender == "merged" else found for found in RESULT.timings]
    said = BenchResult(tuple(wide), requests=40).warning
    assert said.startswith(f"2 of 8 intervals are too wide to mean anything, such as {busy} of merged at batch 1")
    assert "--requests" in said
    assert json.loads(json.dumps(BenchResult(tuple(wide), requests=40).to_dict()))["warning"] == said


def test_too_few_requests_for_an_interval_cause_a_warning():
    assert BenchResult(RESULT.timings, requests=3).warning.startswith("3 requests are too few for an interval")
