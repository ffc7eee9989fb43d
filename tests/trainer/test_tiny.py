"""Tiny and uneven tasks are either learned, or refused in one line before any slow step."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from clipweld.trainer.adapters.adapter import load_adapter
from clipweld.trainer.config import train_config
from clipweld.trainer.errors import ConfigError, TaskInvalid
from clipweld.trainer.learning.fit import fit
from clipweld.trainer.sequence.run import run_sequence
from clipweld.trainer.tasks import load_task, validation


def lay(folder: Path, train: list[int], test: list[int]) -> Path:
    """Write classes with the given numbers of training and test images, and return their folder."""
    shade = 0
    for split, counts in (("train", train), ("test", test)):
        for label, count in enumerate(counts):
            for number in range(count):
                file = folder / split / f"class {label:03}" / f"{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                shade += 1
                Image.new("RGB", (9, 9), (shade % 256, shade // 256, 9)).save(file)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("train", "test", "settings"),
    [
        ([1, 1], [1, 1], {}),
        ([1, 1], [1, 0], {"shots": 0}),
        ([3, 4], [1, 2], {"batch_size": 100}),
        ([1, 300], [1, 1], {"shots": 0, "batch_size": 8}),
        ([1] * 200, [1] * 200, {}),
        ([2, 3], [1, 1], {"shots": 100, "batch_size": 2}),
    ],
)
def test_tiny_and_uneven_tasks_are_learned(mini, tmp_path, train, test, settings):
    task = load_task(str(lay(tmp_path / "tiny", train, test)))
    config = train_config("mini", iterations=2, **{"batch_size": 8} | settings)
    steps = []
    fitted = fit(task, mini, [], config, test_on=[task], on_step=steps.append)
    assert len(steps) == 2
    assert 0 <= fitted.adapter.accuracy["after"]["tiny"] <= 100


def test_a_folder_without_splits_and_with_one_image_per_class_is_refused(tmp_path):
    folder = lay(tmp_path / "tiny", [1, 1, 1], [])
    with pytest.raises(TaskInvalid, match=r"3 classes have one image each.*give two or more per class"):
        load_task(str(folder / "train"))
    assert len(load_task(str(lay(tmp_path / "more", [1, 2], []) / "train")).load("test")) == 1


def test_validation_with_one_training_image_per_class_is_refused(tmp_path):
    with pytest.raises(TaskInvalid, match=r"'tiny', training images .*have one image each"):
        validation(load_task(str(lay(tmp_path / "tiny", [1, 1], [1, 1]))))


def test_a_batch_size_of_one_is_refused(mini, tmp_path):
    task = load_task(str(lay(tmp_path / "tiny", [2, 2], [1, 1])))
    config = train_config("mini", iterations=1, batch_size=1)
    with pytest.raises(ConfigError, match="--batch-size 2 or more"):
        fit(task, mini, [], config, test_on=[])
    with pytest.raises(ConfigError, match="--batch-size 2 or more"):
        run_sequence([task], mini, config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("settings", [["--shots", "0", "--batch-size", "1"], ["--batch-size", "50"]])
def test_two_devices_share_an_odd_number_of_images(tmp_path, settings):
    folder = lay(tmp_path / "tiny", [3, 4], [1, 2])
    command = [
        sys.executable,
        "-m",
        "clipweld.trainer",
        "fit",
        "--model",
        "mini",
        "--task",
        folder,
        "--iterations",
        "2",
        "--json",
    ]
    command += ["--accelerator", "cpu", "--devices", "2", "--adapters", tmp_path / "adapters", *settings]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert load_adapter(tmp_path / "adapters/tiny.safetensors").sha256 == json.loads(done.stdout)["sha256"]
    # Counted, not compared by line: the processes share one stderr, and Gloo writes its own lines there in pieces.
    assert done.stderr.count("tiny (") == 1, f"one process speaks for all: {done.stderr}"
