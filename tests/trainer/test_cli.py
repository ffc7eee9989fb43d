import json

import pytest

from trainer.adapter import load_adapter
from trainer.cli import main

QUICK = ["--model", "mini", "--iterations", "2", "--shots", "2", "--batch-size", "4"]


def fails(capsys, *arguments):
    """The one line that a failing command leaves on stderr."""
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    assert caught.value.code == 1
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("trainer: ")]
    assert len(lines) == 1
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return lines[0]


@pytest.mark.parametrize("command", [[], ["tasks"], ["fit"], ["sequence"], ["evaluate"], ["report"]])
def test_help_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    assert f"Example: trainer {' '.join(command)}" in capsys.readouterr().out


def test_defaults_shown_are_those_of_the_model(capsys):
    shown = {}
    for model in ("ViT-B-16", "mini"):
        with pytest.raises(SystemExit):
            main(["fit", "--model", model, "--help"])
        shown[model] = capsys.readouterr().out
    assert "--shots INT" in shown["mini"]
    assert "(default: 500)" in shown["ViT-B-16"]
    assert "(default: 500)" not in shown["mini"]


@pytest.mark.parametrize("arguments", [["fit"], ["fit", "--task"], ["unfit"], ["fit", "--task", "x", "--lr", "high"]])
def test_usage_errors_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_tasks_lists_what_is_here_and_what_is_missing(capsys, tmp_path):
    main(["tasks", "--data", str(tmp_path), "--json"])
    entries = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert entries["flags"]["classes"] == 40
    assert entries["aircraft"]["missing"]
    main(["tasks"])
    assert "trainer fit --task FOLDER" in capsys.readouterr().out


def test_fit_then_fit_again_then_evaluate(capsys, tmp_path):
    adapters = str(tmp_path / "adapters")
    main(["fit", "--task", "emoji", "--adapters", adapters, *QUICK, "--json"])
    first = json.loads(capsys.readouterr().out)
    assert first["sha256"] == load_adapter(first["adapter"]).sha256
    assert first["trainable_parameters"] == 539_856

    main(["fit", "--task", "clipart", "--adapters", adapters, *QUICK])
    table = capsys.readouterr().out
    assert "emoji" in table
    assert "clipart" in table
    second = load_adapter(f"{adapters}/clipart.safetensors")
    assert second.parents == (first["sha256"],)
    assert set(second.accuracy["before"]) == {"emoji", "clipart"}

    main(["evaluate", "--model", "mini", "--tasks", "emoji", "--adapters", adapters, "--json"])
    evaluated = json.loads(capsys.readouterr().out)
    assert evaluated["learned"] == ["emoji", "clipart"]
    assert evaluated["accuracy"]["emoji"] == second.accuracy["after"]["emoji"]
    assert sorted(p.name for p in (tmp_path / "adapters").iterdir()) == ["clipart.safetensors", "emoji.safetensors"]


def test_sequence_prints_and_saves_the_matrix(capsys, tmp_path):
    out = tmp_path / "run"
    main(["sequence", "--tasks", "emoji", "clipart", "--watch", "flags", "--out", str(out), *QUICK])
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("emoji", "clipart", "flags", "Transfer", "Forgetting"))
    assert json.loads((out / "sequence.json").read_text())["results"]["task"]["tested"] == ["emoji", "clipart", "flags"]


def test_unknown_task_and_missing_data_are_one_line(capsys, tmp_path):
    assert "near names: digits" in fails(capsys, "fit", "--model", "mini", "--task", "digit")
    line = fails(capsys, "fit", "--model", "mini", "--task", "aircraft", "--data", str(tmp_path))
    assert str(tmp_path) in line
    assert "--download" in line


def test_all_faults_of_a_configuration_are_one_line(capsys):
    line = fails(capsys, "fit", "--task", "emoji", "--rank", "4", "--lr", "-1")
    assert "k_active 8" in line
    assert "lr -1" in line


def test_wrong_base_broken_chain_and_tampered_adapter_are_one_line(capsys, adapters, tmp_path):
    arguments = ["evaluate", "--model", "mini", "--tasks", "emoji", "--adapters", str(tmp_path)]
    whole = (adapters / "digits.safetensors").read_bytes()
    (tmp_path / "digits.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "was altered" in fails(capsys, *arguments)
    (tmp_path / "digits.safetensors").write_bytes(whole)
    assert "--pretrained" in fails(capsys, *arguments, "--pretrained", "random")
    main(["fit", "--task", "emoji", "--adapters", str(tmp_path), *QUICK, "--json"])
    capsys.readouterr()
    (tmp_path / "digits.safetensors").unlink()
    assert "found before it: the base alone" in fails(capsys, *arguments)


def test_a_failing_fit_writes_nothing(capsys, tmp_path):
    folder = tmp_path / "bolts"
    for split in ("train", "test"):
        for name in ("a", "b"):
            (folder / split / name).mkdir(parents=True)
            (folder / split / name / "0.png").write_bytes(b"not a picture")
    line = fails(capsys, "fit", "--task", str(folder), "--adapters", str(tmp_path / "adapters"), *QUICK)
    assert "0.png" in line
    assert not (tmp_path / "adapters").exists()
