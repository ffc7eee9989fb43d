"""Training that is killed and resumed: the result is byte for byte that of uninterrupted training."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.precision import MixedPrecision, Precision

from clipweld.trainer.config import train_config
from clipweld.trainer.errors import CheckpointError, ConfigError
from clipweld.trainer.learning import checkpoint as checkpoint_module
from clipweld.trainer.learning.checkpoint import Checkpoint, differences
from clipweld.trainer.learning.fit import batches_of, fit
from clipweld.trainer.sequence.run import run_sequence
from clipweld.trainer.tasks import load_task

# The command line itself, saving after every step.
TRAINER = (
    "from clipweld.trainer import cli; from clipweld.trainer.learning import checkpoint as saving; "
    "saving.SAVE_EVERY_S = saving.SHARE = 0; cli.main()"
)
QUICK = ["--model", "mini", "--shots", "2", "--batch-size", "8", "--iterations", "12"]


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-c", TRAINER, *map(str, arguments), *QUICK],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process):
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


def kill_until_finished(arguments, out, seed):
    """Start, kill at a random time after a save, resume, and repeat; return the number of killed processes."""
    draw, deaths = random.Random(seed), 0
    while deaths < 3:
        process = start(*arguments, *(["--resume"] if deaths else []))
        newest = newest_change(out)
        while newest_change(out) == newest and process.poll() is None:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 1.5))
        process.kill()
        process.communicate()
        if process.returncode == 0:
            return deaths
        deaths += 1
    finish(start(*arguments, "--resume"))
    return deaths


def newest_change(out):
    return max((path.stat().st_mtime_ns for path in out.rglob("*") if not path.name.endswith(".tmp")), default=0)


def left_behind(out):
    """Return all files of a finished run, without measured times."""
    files = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*.safetensors")}
    record = json.loads((out / "sequence.json").read_text())
    for result in record["results"].values():
        del result["seconds_per_task"]
    return files, record


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pool", "finetune"])
def test_a_killed_and_resumed_sequence_equals_an_uninterrupted_one(tmp_path, method):
    arguments = ["sequence", "--tasks", "emoji", "clipart", "--method", method, "--dropout", "0.1"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(*arguments, "--out", whole))
    deaths = kill_until_finished([*arguments, "--out", killed], killed, seed=method)
    assert deaths > 0
    assert left_behind(killed) == left_behind(whole)
    assert sorted(path.name for path in killed.iterdir()) == sorted(path.name for path in whole.iterdir())


@pytest.mark.slow
def test_ctrl_c_prints_how_to_resume_and_that_works(tmp_path):
    arguments = ["fit", "--task", "emoji", "--adapters", tmp_path / "killed"]
    process = start(*arguments)
    unfinished = tmp_path / "killed" / ".emoji.unfinished"
    while not unfinished.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"go on with: trainer fit --task emoji --adapters {tmp_path}/killed" in errors
    assert errors.rstrip().endswith("--resume")
    assert "Traceback" not in errors
    finish(start(*arguments, "--resume"))
    finish(start("fit", "--task", "emoji", "--adapters", tmp_path / "whole"))
    assert (tmp_path / "killed/emoji.safetensors").read_bytes() == (tmp_path / "whole/emoji.safetensors").read_bytes()
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["emoji.safetensors"]


class Stopped(Exception):
    pass


def stop_at_three(step):
    if step.number == 3:
        raise Stopped


@pytest.fixture
def saved_each_step(monkeypatch):
    monkeypatch.setattr("clipweld.trainer.learning.checkpoint.SAVE_EVERY_S", 0)
    monkeypatch.setattr("clipweld.trainer.learning.checkpoint.SHARE", 0)


@pytest.fixture
def interrupted(mini, tmp_path, saved_each_step):
    """A checkpoint after two of four steps on emoji, and the settings."""
    config = train_config("mini", iterations=4, shots=2, batch_size=8)
    path = tmp_path / "unfinished"
    with pytest.raises(Stopped):
        fit(load_task("emoji"), mini, [], config, test_on=[], unfinished=path, on_step=stop_at_three)
    return path, config


@pytest.mark.slow
def test_resuming_takes_only_the_remaining_steps(mini, interrupted):
    path, config = interrupted
    steps = []
    again = fit(load_task("emoji"), mini, [], config, test_on=[], unfinished=path, resume=True, on_step=steps.append)
    assert [step.number for step in steps] == [3, 4]
    assert again.adapter.sha256 == fit(load_task("emoji"), mini, [], config, test_on=[]).adapter.sha256


@pytest.mark.slow
def test_without_resume_training_starts_anew(mini, interrupted):
    path, config = interrupted
    steps = []
    fit(load_task("emoji"), mini, [], config, test_on=[], unfinished=path, on_step=steps.append)
    assert [step.number for step in steps] == [1, 2, 3, 4]


@pytest.mark.slow
def test_other_settings_and_other_tasks_are_refused_by_name(mini, interrupted):
    path, _ = interrupted
    other = train_config("mini", iterations=4, shots=2, batch_size=8, lr=0.1)
    with pytest.raises(CheckpointError, match=r"lr 0\.01, not 0\.1"):
        fit(load_task("emoji"), mini, [], other, test_on=[], unfinished=path, resume=True)
    with pytest.raises(CheckpointError, match=r"tasks \['emoji'\], not \['flags'\]"):
        fit(load_task("flags"), mini, [], other, test_on=[], unfinished=path, resume=True)


def other_task(task, change):
    """Return the same task with other classes, prompts, source or images."""
    if change == "class_names":
        return replace(task, class_names=("something else", *task.class_names[1:]))
    if change == "templates":
        return replace(task, templates=(*task.templates, "a drawing of a {}"))
    if change == "source":
        return replace(task, source="elsewhere")

    def load(split):
        """Return the images with one pixel changed in each."""
        images = task.load(split)

        def opened(index):
            image = images.open(index).convert("RGB")
            image.putpixel((30, 30), (255, 0, 255))
            return image

        return replace(images, open=opened)

    return replace(task, load=load)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("class_names", "class_names.*, not .*something else"),
        ("templates", "templates.*, not .*a drawing of a {}"),
        ("source", r"sources \['shipped'\], not \['elsewhere'\]"),
        ("images", r"images \['\d+ drawn, SHA-256 \w{16}'\], not \['\d+ drawn, SHA-256 \w{16}'\]"),
    ],
)
def test_other_classes_prompts_and_images_are_refused_by_name(mini, interrupted, change, says):
    path, config = interrupted
    before = path.read_bytes()
    task = other_task(load_task("emoji"), change)
    with pytest.raises(CheckpointError, match=says):
        fit(task, mini, [], config, test_on=[], unfinished=path, resume=True)
    assert path.read_bytes() == before


def test_changed_images_are_detected_without_decoding_all_of_them(mini, monkeypatch):
    monkeypatch.setattr("clipweld.trainer.base.batches.KEPT_BYTES", 0)
    config = train_config("mini", shots=0)
    fabric = Fabric(accelerator="cpu", devices=1)
    digits = load_task("digits")
    unreadable = replace(digits, load=lambda split: replace(digits.load(split), open=None))
    fewer = replace(digits, load=lambda split: digits.load(split).subset(range(100)))
    whole, same, part = (batches_of(task, mini, config, fabric).drawn() for task in (digits, unreadable, fewer))
    assert whole == same != part


def test_other_precision_is_refused(mini, interrupted):
    path, config = interrupted
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    with pytest.raises(CheckpointError, match="precision 32-true, not bf16-mixed"):
        fit(load_task("emoji"), mini, [], config, test_on=[], fabric=fabric, unfinished=path, resume=True)


@pytest.mark.slow
@pytest.mark.usefixtures("saved_each_step")
def test_float16_training_resumes_with_its_loss_scale(mini, tmp_path):
    config = train_config("mini", iterations=4, shots=2, batch_size=8)
    path = tmp_path / "unfinished"

    def learn(**how):
        # The scale is too large: the first two steps only halve it.
        precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**22))
        fabric = Fabric(accelerator="cpu", devices=1, plugins=precision)
        return fit(load_task("emoji"), mini, [], config, test_on=[], fabric=fabric, **how).adapter, precision.scaler

    whole, scaler = learn()
    with pytest.raises(Stopped):
        learn(unfinished=path, on_step=stop_at_three)
    resumed, again = learn(unfinished=path, resume=True)
    assert again.get_scale() == scaler.get_scale() == 2.0**20
    assert resumed.sha256 == whole.sha256


@pytest.mark.parametrize("damage", [lambda raw: raw[: len(raw) // 2], lambda raw: b"", lambda raw: b"\xff" * 64])
def test_a_damaged_checkpoint_is_refused(mini, interrupted, damage):
    path, config = interrupted
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        fit(load_task("emoji"), mini, [], config, test_on=[], unfinished=path, resume=True)


@pytest.mark.slow
def test_one_flipped_bit_of_a_checkpoint_is_refused(mini, interrupted):
    path, config = interrupted
    whole, draw = path.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    for place in (draw.randrange(header, len(whole)), whole.index(b'"step') - 1, whole.index(b"lr") + 1):
        corrupted = bytearray(whole)
        corrupted[place] ^= 1 << draw.randrange(8)
        path.write_bytes(corrupted)
        with pytest.raises(CheckpointError, match="not a whole checkpoint"):
            fit(load_task("emoji"), mini, [], config, test_on=[], unfinished=path, resume=True)


def test_saving_takes_at_most_a_twentieth_of_the_time(tmp_path, monkeypatch):
    clock = iter([0.0, 4.9, 5.1, 6.1, 26.0, 26.2, 26.3])
    # Only this module's ``time`` is replaced, because other threads use time.monotonic too.
    monkeypatch.setattr(checkpoint_module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    checkpoint = Checkpoint(tmp_path / "c", {}, Precision())
    weights = torch.nn.Linear(2, 2)

    class Trainee:
        def state(self):
            return dict(weights.named_parameters())

    optimizer = torch.optim.AdamW(weights.parameters())
    saved = []
    for step in (1, 2, 3, 4):  # at 4.9 s; at 5.1 s, where saving takes a second; at 26.0 s; at 26.2 s
        checkpoint.save_when_due(step, 0.0, Trainee(), optimizer)
        saved.append(checkpoint.path.read_bytes() if checkpoint.path.exists() else None)
    assert saved[0] is None
    assert saved[1] == saved[2] != saved[3]


@pytest.mark.slow
@pytest.mark.usefixtures("saved_each_step")
def test_training_continues_if_checkpoints_cannot_be_saved(mini, tmp_path, caplog):
    (tmp_path / "a file").touch()
    config = train_config("mini", iterations=3, shots=2, batch_size=4)
    path = tmp_path / "a file" / "unfinished"
    fitted = fit(load_task("emoji"), mini, [], config, test_on=[], unfinished=path)
    assert fitted.adapter.sha256 == fit(load_task("emoji"), mini, [], config, test_on=[]).adapter.sha256
    assert [record.message.partition("; something else has the name")[0] for record in caplog.records] == [
        f"training goes on, but isn't saved: {path}: can't be written (File exists: {path.parent})"
    ]


def test_a_finished_run_is_not_run_again(mini, tmp_path):
    config = train_config("mini", iterations=2, shots=2, batch_size=4)
    first = run_sequence([load_task("emoji")], mini, config, tmp_path, method="joint")
    assert run_sequence([load_task("emoji")], mini, config, tmp_path, method="joint", resume=True) == first
    with pytest.raises(CheckpointError, match="method joint, not finetune"):
        run_sequence([load_task("emoji")], mini, config, tmp_path, method="finetune", resume=True)
    with pytest.raises(ConfigError, match="--resume"):
        run_sequence([load_task("emoji")], mini, config, tmp_path, method="joint")


@pytest.mark.slow
@pytest.mark.usefixtures("saved_each_step")
@pytest.mark.parametrize("change", ["class_names", "templates"])
def test_a_sequence_is_not_resumed_with_other_class_names_or_templates(mini, tmp_path, change):
    config = train_config("mini", iterations=3, shots=1, batch_size=4, anchor_weight=0.0)
    tasks = [load_task(name) for name in ("emoji", "clipart")]

    def stop_at_the_second(stage):
        return (lambda step: None) if stage[0].name == "emoji" else stop_at_three

    with pytest.raises(Stopped):
        run_sequence(tasks, mini, config, tmp_path, on_stage=stop_at_the_second)
    changed = [other_task(tasks[0], change), tasks[1]]
    with pytest.raises(CheckpointError, match=r"progress\.json: is of a run with .*"):
        run_sequence(changed, mini, config, tmp_path, resume=True)
    run_sequence(tasks, mini, config, tmp_path, resume=True)


def test_only_the_first_difference_of_long_lists_is_named():
    long = [f"class number {number}" for number in range(50)]
    assert differences({"names": long}, {"names": [*long[:7], "x", *long[8:]]}) == ["names[7] class number 7, not x"]
    assert differences({"names": [long]}, {"names": [long[:49]]}) == ["names[0][49] class number 49, not unset"]


def test_settings_missing_on_one_side_are_named_as_differences():
    assert differences({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3, "d": 4}}) == ["c 2, not 3", "d unset, not 4"]
