"""SIGKILL at every change that training makes to the disk: training that is resumed ends as if uninterrupted."""

from __future__ import annotations

import json

import pytest
import torch

from clipweld.trainer import cli
from clipweld.trainer.adapters.adapter import Moved
from clipweld.trainer.config import MEASURED, train_config
from clipweld.trainer.errors import TaskAlreadyLearned
from clipweld.trainer.learning import fit
from clipweld.trainer.sequence import methods
from clipweld.trainer.sequence import run as sequence
from clipweld.trainer.sequence.run import run_sequence
from clipweld.trainer.tasks import load_tasks


@pytest.fixture
def quick(mini, monkeypatch):
    """Save after every step and measure nothing; use one thread, as forked children have only one."""
    monkeypatch.setattr("clipweld.trainer.learning.checkpoint.SAVE_EVERY_S", 0)
    monkeypatch.setattr("clipweld.trainer.learning.checkpoint.SHARE", 0)
    for module in (fit, methods, sequence):
        monkeypatch.setattr(module, "evaluate", measured)
    monkeypatch.setattr(fit, "movement", lambda *_: Moved(words_mean=0.0, words_p95=0.0, images_kl=0.0, names_mean=0.0))
    monkeypatch.setattr(fit, "principal_inputs", lambda *_: {})
    monkeypatch.setattr(cli, "_load", lambda command, fabric: mini)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def measured(model, tasks, fabric):
    return {measured: {task.name: 50.0 for task in tasks} for measured in MEASURED}


def left(folder):
    """Return all files, without measured times."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    if "sequence.json" in found:
        record = json.loads(found["sequence.json"])
        for result in record["results"].values():
            del result["seconds_per_task"]
        found["sequence.json"] = record
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("method", ["pool", "finetune"])
def test_a_sequence_killed_at_any_change_can_be_resumed(mini, tmp_path, killed_at, method):
    config = train_config("mini", method, iterations=2, shots=1, batch_size=4, anchor_weight=0.0, drift_weight=0.0)
    tasks = load_tasks(["emoji", "clipart"], tmp_path)

    def run(out):
        run_sequence(tasks, mini, config, out, method=method, resume=True)

    run(tmp_path / "whole")
    change = 0
    while killed_at(change, lambda: run(tmp_path / f"{change}")):  # noqa: B023
        run(tmp_path / f"{change}")
        assert left(tmp_path / f"{change}") == left(tmp_path / "whole"), f"killed at change {change}"
        change += 1
    assert change > 12


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_fit_killed_at_any_change_can_be_resumed(tmp_path, killed_at):
    def run(adapters):
        options = [
            "--iterations",
            "2",
            "--shots",
            "1",
            "--batch-size",
            "4",
            "--anchor-weight",
            "0",
            "--drift-weight",
            "0",
            "--resume",
        ]
        cli.main(["fit", "--model", "mini", "--task", "emoji", "--adapters", str(adapters), *options])

    run(tmp_path / "whole")
    change, learned = 0, 0
    while killed_at(change, lambda: run(tmp_path / f"{change}")):  # noqa: B023
        if (tmp_path / f"{change}" / "emoji.safetensors").exists():
            learned += 1
            with pytest.raises(SystemExit) as caught:
                run(tmp_path / f"{change}")
            assert isinstance(caught.value.__cause__, TaskAlreadyLearned)
        else:
            run(tmp_path / f"{change}")
        assert left(tmp_path / f"{change}") == left(tmp_path / "whole"), f"killed at change {change}"
        change += 1
    assert change > 6
    assert learned > 0
