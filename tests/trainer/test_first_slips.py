"""Common mistakes are reported at once, before torch is imported, which alone takes seconds."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
from PIL import Image

from clipweld.trainer import cli
from clipweld.trainer.base import hub
from clipweld.trainer.base.model_choice import DEFAULT_MODEL
from clipweld.trainer.cli import main
from clipweld.trainer.errors import WeightsError
from clipweld.trainer.learning.fit import Step


def fails_without_torch(*arguments, **variables):
    """Run a command that must fail before it imports torch; return its one-line error."""
    code = (
        "import sys\nfrom clipweld.trainer.cli import main\ntry:\n    main()\n"
        "except SystemExit as e:\n    print(e.code, sorted({'torch', 'open_clip'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1", **variables}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "1 []\n", done.stderr
    assert done.stderr.count("\n") == 1
    return done.stderr


def bolts(folder):
    for name in ("hex bolt", "rivet"):
        for number in range(5):
            path = folder / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (number, 9, 9)).save(path)
    return folder


@pytest.mark.slow
def test_a_folder_whose_name_cannot_be_a_task_name_needs_another_name(tmp_path):
    folder = bolts(tmp_path / "bolts (new)")
    said = fails_without_torch("fit", "--model", "mini", "--task", folder, "--adapters", tmp_path / "adapters")
    assert "bolts (new)" in said
    assert "--name" in said


def test_a_learned_task_or_a_taken_file_name_is_refused_before_torch_is_imported(adapters, tmp_path):
    fit = ("fit", "--model", "mini", "--adapters", tmp_path, "--task")
    shutil.copy(adapters / "digits.safetensors", tmp_path)
    assert "task 'digits' was learned already" in fails_without_torch(*fit, "digits")
    (tmp_path / "digits.safetensors").rename(tmp_path / "emoji.safetensors")
    assert "emoji.safetensors: is that of task 'digits'" in fails_without_torch(*fit, "emoji")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["fit", "--task", "{}/none"], "no such folder"),
        (["fit", "--task", "digit"], "near names: digits"),
        (["fit", "--task", "digits", "--adapters", "{}/file"], "Not a directory"),
        (["sequence", "--tasks", "digits", "digit", "--out", "{}/out"], "near names: digits"),
        (["evaluate", "--tasks", "digits", "--adapters", "{}/none"], "no such folder"),
    ],
)
def test_arguments_are_checked_before_torch_is_imported(tmp_path, arguments, says):
    (tmp_path / "file").touch()
    given = [argument.format(tmp_path) for argument in arguments]
    assert says in fails_without_torch(*given, "--model", "mini")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [["fit", "--task"], ["evaluate", "--tasks"], ["sequence", "--out", "out", "--tasks"]]
)
def test_without_a_network_a_missing_model_option_is_suggested(tmp_path, command):
    variables = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    said = fails_without_torch(*command, "digits", **variables)
    assert "give --model mini" in said
    assert "127.0.0.1:9 can't be asked" in said
    assert "HF_HUB_OFFLINE is set" in fails_without_torch(*command, "digits", **variables | {"HF_HUB_OFFLINE": "1"})


def test_a_network_that_never_answers_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "LOOK_S", 0.2)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_: None)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(WeightsError, match=r"no answer within 0\.2 s|timed out"):
            hub.check_default_weights(DEFAULT_MODEL, None)
        hub.check_default_weights("mini", None)
        hub.check_default_weights(DEFAULT_MODEL, "random")


def test_the_default_weights_are_looked_for_where_open_clip_downloads_them():
    from open_clip import get_pretrained_cfg

    assert get_pretrained_cfg(DEFAULT_MODEL, "openai")["hf_hub"] == f"{hub.REPOSITORY}/"


@pytest.mark.slow
def test_the_printed_loss_is_the_contrastive_loss_and_labelled_so(capsys, tmp_path, mini, monkeypatch):
    from clipweld.trainer.learning import fit

    seen = []
    monkeypatch.setattr(fit, "Step", lambda *told: seen.append(Step(*told)) or seen[-1])
    quick = ["--iterations", "2", "--shots", "2", "--batch-size", "4", "--anchor-weight", "4"]
    main(["fit", "--model", "mini", "--task", "emoji", "--adapters", str(tmp_path), *quick])
    assert f"contrastive loss {seen[-1].contrastive:.3f}" in capsys.readouterr().err
    assert seen[-1].contrastive < seen[-1].loss, "anchors add to what is minimised"


@pytest.mark.parametrize(("seconds", "says"), [(2.0, "about 10 minutes more"), (0.1, None)])
def test_long_training_is_announced_after_a_few_steps(capsys, monkeypatch, seconds, says):
    clock = iter(seconds * number for number in range(300))
    monkeypatch.setattr(cli, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    progress = cli.Progress(console=cli.stderr, auto_refresh=False)
    follow = cli._follow(progress, "bolts")
    for number in range(1, 9):
        follow(Step(number, 300, 1.0, 0.5, 16.0))
    said = capsys.readouterr().err
    assert said == ("" if says is None else f"learning bolts will take {says}\n")
