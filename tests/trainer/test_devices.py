"""Two processes connected by gloo learn the same as one process with twice the batch size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clipweld.trainer.adapters.adapter import load_adapter

SCRIPT = Path(__file__).with_name("fit_on_devices.py")


def run(devices, batch_size, out):
    done = subprocess.run(
        [sys.executable, SCRIPT, str(devices), str(batch_size), out],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(devices)]


def moment(rows):
    """Return the second moment that principal inputs approximate, scaled to a trace of one."""
    return rows.T @ rows / rows.square().sum()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("devices")
    return out, run(1, 16, out / "one"), run(2, 8, out / "two")


@pytest.mark.slow
def test_active_experts_are_the_same_on_all_ranks_and_in_a_single_process(runs):
    _, (one,), (first, second) = runs
    layers = 36 + 24  # image and text tower, each once per step
    assert len(first["votes"]) == 2 * 4 * layers, "two tasks, four steps before the last experts are fixed"
    assert first["votes"] == second["votes"] == one["votes"]


@pytest.mark.slow
def test_the_loss_curve_equals_that_of_a_single_process(runs):
    _, (one,), (first, second) = runs
    assert first["losses"] == second["losses"]
    torch.testing.assert_close(torch.tensor(first["losses"]), torch.tensor(one["losses"]), atol=1e-4, rtol=1e-4)
    assert one["losses"][-1] != one["losses"][0]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["emoji", "flags"])
def test_adapters_are_equal_on_all_ranks_and_close_to_those_of_a_single_process(runs, task):
    out, _, _ = runs
    one, first, second = (
        load_adapter(out / folder / f"{task}.safetensors") for folder in ("one/rank-0", "two/rank-0", "two/rank-1")
    )
    assert first.activation_counts == second.activation_counts
    for layer, votes in one.activation_counts.items():  # a close vote may fall to another expert by rounding
        assert max(abs(a - b) for a, b in zip(votes, first.activation_counts[layer], strict=True)) <= 2, layer
    assert first.accuracy == second.accuracy
    for name, tensor in one.tensors.items():
        assert torch.equal(first.tensors[name], second.tensors[name])
        if name.endswith(".inputs"):  # the signs of principal directions are arbitrary, their moment is not
            torch.testing.assert_close(moment(first.tensors[name]), moment(tensor), atol=2e-3, rtol=2e-2)
        else:  # not per element: Adam takes full steps even where a gradient is only rounding
            assert (first.tensors[name] - tensor).norm() < 0.05 * tensor.norm(), name


@pytest.mark.slow
def test_the_command_line_runs_on_two_devices_and_writes_once(tmp_path):
    command = [Path(sys.executable).with_name("trainer"), "fit", "--model", "mini", "--task", "emoji", "--json"]
    command += ["--accelerator", "cpu", "--devices", "2", "--iterations", "2", "--shots", "2", "--batch-size", "4"]
    done = subprocess.run(
        [*command, "--adapters", tmp_path / "adapters"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert load_adapter(tmp_path / "adapters/emoji.safetensors").sha256 == printed["sha256"]
    assert [path.name for path in (tmp_path / "adapters").iterdir()] == ["emoji.safetensors"]


@pytest.mark.slow
def test_training_in_bfloat16_writes_a_float32_adapter(tmp_path):
    from clipweld.trainer.cli import main

    main(["fit", "--model", "mini", "--task", "emoji", "--accelerator", "cpu", "--precision", "bf16-mixed",
          "--iterations", "3", "--shots", "2", "--batch-size", "4", "--adapters", str(tmp_path)])  # fmt: skip
    adapter = load_adapter(tmp_path / "emoji.safetensors")
    assert {tensor.dtype for tensor in adapter.tensors.values()} == {torch.float32}
    assert any(tensor.abs().sum() > 0 for name, tensor in adapter.tensors.items() if name.endswith("lora_B"))


@pytest.mark.slow
def test_all_processes_stop_when_training_diverges_and_write_nothing(tmp_path):
    command = [
        sys.executable,
        "-m",
        "clipweld.trainer",
        "fit",
        "--model",
        "mini",
        "--task",
        "emoji",
        "--accelerator",
        "cpu",
    ]
    command += ["--devices", "2", "--iterations", "20", "--shots", "2", "--batch-size", "4", "--lr", "1e20"]
    done = subprocess.run(
        [*command, "--adapters", tmp_path / "adapters"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    # All processes write to one stderr, and Gloo in pieces: a message need not start its line.
    said = {line.partition("trainer: ")[2] for line in done.stderr.splitlines() if "NaN or infinite is" in line}
    assert (done.returncode, len(said)) == (1, 1), done.stderr
    assert "lower --lr than 1e+20" in said.pop()
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.safetensors*"))
