"""Only arguments configure a command, not variables that a launcher left in the shell; errors are always printed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from clipweld.trainer import launch
from clipweld.trainer.errors import ConfigError

QUICK = ["--model", "mini", "--iterations", "2", "--shots", "2", "--batch-size", "4", "--accelerator", "cpu", "--json"]
LEFT_OVER = {
    "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "2", "SLURM_LOCALID": "2", "RANK": "2",
    "LOCAL_RANK": "2", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1", "NODE_RANK": "1",
    "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "none", "OMPI_COMM_WORLD_RANK": "2",
    "PMI_RANK": "2", "LT_DEVICES": "2",
}  # fmt: skip


def trainer(*arguments, **variables):
    return subprocess.run(
        [sys.executable, "-m", "clipweld.trainer", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables}, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_variables_of_launchers_change_nothing(tmp_path, devices):
    arguments = ["fit", "--task", "emoji", *QUICK, "--devices", devices, "--adapters"]
    plain, left_over = trainer(*arguments, tmp_path / "a"), trainer(*arguments, tmp_path / "b", **LEFT_OVER)
    assert (plain.returncode, left_over.returncode) == (0, 0), left_over.stderr
    assert json.loads(plain.stdout)["sha256"] == json.loads(left_over.stdout)["sha256"]
    assert left_over.stderr.count("learning emoji on top of the base alone") == 1


@pytest.mark.parametrize("variables", [{"LOCAL_RANK": "1"}, {"RANK": ""}, {"LOCAL_RANK": "x"}, LEFT_OVER])
def test_errors_are_printed_whatever_rank_the_environment_sets(variables):
    done = trainer("fit", "--task", "digit", **variables)
    assert done.returncode == 1
    assert done.stderr.startswith("trainer: unknown task 'digit'")
    assert done.stderr.count("\n") == 1


def test_only_processes_started_by_the_trainer_have_a_process_number(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert launch.process_number() == 0
    monkeypatch.setenv(launch.STARTED_BY, str(os.getppid()))
    assert launch.process_number() == 3
    launch.forget_launchers()
    assert os.environ["LOCAL_RANK"] == "3", "it is needed there"


def test_another_process_reports_an_error_unless_the_first_has_ended(monkeypatch):
    monkeypatch.setattr(launch, "PATIENCE_S", 0.1)
    monkeypatch.setattr(launch, "process_number", lambda: 1)
    assert launch.speaks(), "the first is still there"
    parents = iter([os.getppid()])
    monkeypatch.setattr(launch.os, "getppid", lambda: next(parents, 1))
    assert not launch.speaks(), "it has ended, and said why"


@pytest.mark.parametrize(("accelerator", "devices"), [("cpu", 0), ("cpu", -1), ("mps", 1)])
def test_missing_devices_are_refused_by_name(accelerator, devices):
    with pytest.raises(ConfigError, match=f"--accelerator {accelerator} --devices {devices}: not here"):
        launch.fabric(accelerator, devices, "32-true")
