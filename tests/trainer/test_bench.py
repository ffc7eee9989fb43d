import dataclasses
import json
from functools import partial

import pytest
import torch

from clipweld.trainer.cli import main
from clipweld.trainer.errors import BenchError
from clipweld.trainer.learning import bench
from clipweld.trainer.learning.bench import DensePool, Steps, _peak, frozen_flops, random_batch
from clipweld.trainer.tables import show_bench


@pytest.fixture(scope="module")
def steps():
    return Steps("mini", "random", 4, "cpu", "32-true")


def test_both_steps_have_the_same_loss_and_gradients(steps):
    loss, gradients = steps.differences()
    assert loss < 1e-5
    assert gradients < 1e-4
    assert steps.pools.num_trainable == 359_424


def test_steps_that_differ_are_not_timed(steps, monkeypatch):
    monkeypatch.setattr(bench, "Steps", lambda *_: steps)
    monkeypatch.setattr(bench, "_peak", lambda *_: 0)
    right = DensePool.forward
    monkeypatch.setattr(DensePool, "forward", lambda self, x: 1.01 * right(self, x))
    with pytest.raises(BenchError, match="of the two steps differ by"):
        bench.bench("mini", "random", batch_size=4, pairs=1, accelerator="cpu", precision="32-true")


def test_the_pools_are_restored_after_a_naive_step(steps):
    before = {path: pool.lora_B.clone() for path, pool in steps.pools.pools.items()}
    steps.naive()
    for path, pool in steps.pools.pools.items():
        assert steps._model.get_submodule(path) is pool
        assert not torch.equal(pool.lora_B, before[path]), path


def test_the_lower_bound_counts_frozen_products_forward_and_backward(mini):
    """Written out for the image tower: a block's products count twice, attention's two products three times."""
    batch = random_batch(mini, 2)
    layers, width, tokens = 6, 192, 17
    linear = layers * 2 * (2 * tokens) * 12 * width**2
    attention = layers * 2 * 2 * 2 * tokens**2 * width
    patches = 2 * 2 * 16 * (3 * 16 * 16) * width
    head = 2 * 2 * width * 192
    image = 2 * (linear + head) + 3 * attention + patches
    text_only = frozen_flops(mini.model, batch) - image
    assert 0 < text_only < image


@pytest.mark.slow
def test_memory_is_measured_in_a_separate_process():
    ballast = torch.ones(2**29)  # two gigabytes in this process only
    assert _peak(partial(Steps, "mini", "random", 4, "cpu", "32-true"), "pool") < ballast.nbytes


@pytest.mark.slow
def test_bench_prints_what_it_measured(capsys):
    main(["bench", "--model", "mini", "--batch-size", "4", "--pairs", "2", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["trainable_parameters"] == 359_424
    assert found["floor_seconds"] == pytest.approx(found["floor_flops"] / found["flops_per_second"])
    assert min(found[f"{kind}_{what}"] for kind in ("pool", "naive") for what in ("seconds", "bytes")) > 0
    assert found["speedup"] > 0
    assert 2 < found["naive_flops"] / found["floor_flops"] < 6
    assert found["times_floor"] > 0


RESULT = bench.BenchResult(
    model="mini", device="4 CPU threads", precision="32-true", batch_size=4, pairs=5, trainable_parameters=1,
    loss_difference=0.0, gradient_difference=0.0, pool_seconds=1.0, naive_seconds=3.0, speedup=3.0,
    speedup_range=(2.9, 3.1), naive_flops=3, floor_flops=1, flops_per_second=1.0, floor_seconds=1.0, times_floor=1.5,
    times_floor_range=(1.4, 1.6), pool_bytes=1, naive_bytes=1,
)  # fmt: skip


def test_ranges_that_are_too_wide_cause_a_warning(capsys):
    assert RESULT.warning is None
    busy = dataclasses.replace(RESULT, speedup_range=(1.1, 4.0))
    assert busy.warning.startswith(
        "speedup 3.00 lies between 1.10 and 4.00, too wide to mean anything; give more --pairs"
    )
    assert "1 pairs are too few" in dataclasses.replace(RESULT, pairs=1).warning
    show_bench(busy)
    assert f"Warning: {busy.warning}" in capsys.readouterr().out
