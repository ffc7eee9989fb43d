import random
from statistics import mean

import pytest

from clipweld.trainer.intervals import bootstrap, wilson


@pytest.mark.parametrize(
    ("percent", "images", "low", "high"),
    [(50.0, 10, 23.66, 76.34), (0.0, 10, 0.0, 27.75), (100.0, 10, 72.25, 100.0), (90.0, 100, 82.56, 94.48)],
)
def test_wilson_s_interval_is_that_of_published_tables(percent, images, low, high):
    assert wilson(percent, images) == pytest.approx((low, high), abs=0.01)


def test_the_bootstrap_of_few_runs_takes_every_sample():
    low, high = bootstrap([1.0, 2.0, 6.0])
    assert 1.0 <= low < 3.0 < high <= 6.0
    assert bootstrap([4.0]) == (4.0, 4.0)
    assert bootstrap([2.0, 2.0, 2.0]) == (2.0, 2.0)


def test_the_bootstrap_of_many_runs_is_about_that_of_the_normal_distribution():
    draw = random.Random(1)
    values = [draw.gauss(0, 1) for _ in range(100)]
    low, high = bootstrap(values)
    assert (high - low) / 2 == pytest.approx(1.96 / 10, rel=0.2)
    assert low < mean(values) < high
    assert bootstrap(values) == (low, high)
