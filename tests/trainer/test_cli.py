import json
import re
from pathlib import Path

import pytest
from PIL import Image

from clipweld.trainer import commands
from clipweld.trainer.adapters.adapter import load_adapter
from clipweld.trainer.cli import _precision, main
from clipweld.trainer.tasks import as_learned, load_task

QUICK = ["--model", "mini", "--iterations", "2", "--shots", "2", "--batch-size", "4"]


def fails(capsys, *arguments):
    """Run a command that must fail; return its error message, which must be one line."""
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


def test_help_shows_the_defaults_of_the_given_model(capsys):
    shown = {}
    for model in ("ViT-B-16", "mini"):
        with pytest.raises(SystemExit):
            main(["fit", "--model", model, "--help"])
        shown[model] = capsys.readouterr().out
    assert "--lr FLOAT" in shown["mini"]
    assert "[default: 0.002]" in shown["ViT-B-16"]
    assert "[default: 0.002]" not in shown["mini"]


@pytest.mark.parametrize("command", ["fit", "sequence"])
def test_help_shows_the_groups_of_rare_flags_last(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    titles = re.findall(r"╭─ ([A-Z][a-z ]+) ─", capsys.readouterr().out)
    assert titles == ["Options", "Model and data", "Hardware", "Training"]


@pytest.mark.parametrize("arguments", [["fit"], ["fit", "--task"], ["unfit"], ["fit", "--task", "x", "--lr", "high"]])
def test_usage_errors_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_tasks_lists_available_and_missing_tasks(capsys, tmp_path):
    main(["tasks", "--data", str(tmp_path), "--json"])
    entries = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert entries["flags"]["classes"] == 40
    assert entries["aircraft"]["missing"]
    main(["tasks"])
    assert "trainer fit --task FOLDER" in capsys.readouterr().out


@pytest.mark.slow
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
    assert evaluated["accuracy_classes"]["emoji"] == second.accuracy["after_classes"]["emoji"]
    low, high = evaluated["intervals"]["emoji"]
    assert low < evaluated["accuracy"]["emoji"] < high
    assert sorted(p.name for p in (tmp_path / "adapters").iterdir()) == ["clipart.safetensors", "emoji.safetensors"]


@pytest.mark.slow
def test_evaluate_uses_the_prompts_with_which_a_folder_was_learned(capsys, tmp_path):
    adapters, folder = str(tmp_path / "adapters"), str(Path(__file__).parents[2] / "samples" / "bolts")
    template = "not a {}"
    main(["fit", "--task", folder, "--template", template, "--adapters", adapters, *QUICK, "--json"])
    learned = load_adapter(json.loads(capsys.readouterr().out)["adapter"])
    assert as_learned(load_task(folder), [learned]).templates == (template,)
    assert as_learned(load_task("emoji"), [learned]).templates != (template,)
    main(["evaluate", "--model", "mini", "--tasks", folder, "--adapters", adapters, "--json"])
    assert json.loads(capsys.readouterr().out)["accuracy"] == learned.accuracy["after"]


@pytest.mark.slow
def test_sequence_prints_and_saves_the_matrix(capsys, tmp_path):
    out = tmp_path / "run"
    main(["sequence", "--tasks", "emoji", "clipart", "--watch", "flags", "--out", str(out), *QUICK])
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("emoji", "clipart", "flags", "Transfer", "Forgetting"))
    assert json.loads((out / "sequence.json").read_text())["results"]["task"]["tested"] == ["emoji", "clipart", "flags"]


RESULT = {
    "method", "tasks", "tested", "label_space", "seed", "zero_shot", "matrix", "transfer", "average", "last",
    "forgetting", "trainable_parameters", "kept_parameters", "seconds_per_task", "images", "class_zero_shot",
    "class_matrix",
}  # fmt: skip


@pytest.mark.slow
def test_sequence_prints_one_result_or_a_list_for_several_seeds(capsys, tmp_path):
    arguments = ["sequence", "--tasks", "emoji", "clipart", "--method", "lora", "--label-space", "union", "--json"]
    main([*arguments, "--seed", "3", "--out", str(tmp_path / "one"), *QUICK])
    one = json.loads(capsys.readouterr().out)
    assert set(one) == RESULT
    assert (one["method"], one["label_space"], one["seed"]) == ("lora", "union", 3)
    main([*arguments, "--seeds", "3", "4", "--out", str(tmp_path / "several"), *QUICK])
    several = json.loads(capsys.readouterr().out)
    assert [result["seed"] for result in several] == [3, 4]
    assert {**several[0], "seconds_per_task": []} == {**one, "seconds_per_task": []}
    assert (tmp_path / "several/seed-4/sequence.json").is_file()

    main(["report", str(tmp_path / "several"), "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert "lora" in Path(printed["page"]).read_text(encoding="utf-8")
    assert printed["figures"]


@pytest.mark.slow
def test_sequence_shows_the_spread_over_seeds(capsys, tmp_path):
    main(["sequence", "--tasks", "emoji", "clipart", "--seeds", "0", "1", "--out", str(tmp_path / "run"), *QUICK])
    shown = capsys.readouterr().out
    assert "standard deviation" in shown
    assert f"trainer report {tmp_path / 'run'}" in shown


@pytest.mark.slow
def test_validation_never_reads_a_test_image(capsys, tmp_path, monkeypatch):
    from clipweld.trainer.tasks import shipped

    asked = []
    images = shipped._images
    monkeypatch.setattr(
        shipped, "_images", lambda path, split, names: asked.append(split) or images(path, split, names)
    )
    main(["sequence", "--tasks", "emoji", "--validate", "--out", str(tmp_path / "run"), *QUICK])
    assert set(asked) == {"train"}


def test_each_method_has_its_own_default_learning_rate(capsys):
    rates = {}
    for method in ("pool", "lora", "finetune"):
        with pytest.raises(SystemExit):
            main(["sequence", "--model", "mini", "--method", method, "--help"])
        shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
        rates[method] = shown.split("AdamW's learning rate")[1].split("[default: ")[1].split("]")[0]
    assert float(rates["finetune"]) < float(rates["lora"])
    assert rates["pool"] != rates["lora"]


@pytest.mark.slow
def test_a_run_is_not_overwritten(capsys, tmp_path):
    arguments = ["sequence", "--tasks", "emoji", "--out", str(tmp_path / "run"), *QUICK]
    main(arguments)
    capsys.readouterr()
    assert "--resume" in fails(capsys, *arguments)
    main([*arguments, "--resume", "--json"])
    assert json.loads(capsys.readouterr().out)["tasks"] == ["emoji"]


def test_a_report_needs_a_run(capsys, tmp_path):
    assert "no such folder" in fails(capsys, "report", str(tmp_path / "nowhere"))
    assert "sequence" in fails(capsys, "report", str(tmp_path))


def test_unknown_task_and_missing_data_are_one_line(capsys, tmp_path):
    assert "near names: digits" in fails(capsys, "fit", "--model", "mini", "--task", "digit")
    line = fails(capsys, "fit", "--model", "mini", "--task", "aircraft", "--data", str(tmp_path))
    assert str(tmp_path) in line
    assert "--download" in line


def test_all_faults_of_a_configuration_are_reported_in_one_line(capsys):
    line = fails(capsys, "fit", "--task", "emoji", "--rank", "4", "--lr", "-1")
    assert "k_active 8" in line
    assert "lr -1" in line


def test_wrong_base_broken_lineage_and_altered_adapter_are_one_line(capsys, adapters, tmp_path):
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


def test_an_unreadable_image_stops_the_command_unless_skipping_is_allowed(capsys, tmp_path):
    folder = tmp_path / "bolts"
    for split in ("train", "test"):
        for value, name in enumerate(("hex bolt", "rivet")):
            for number in range(3):
                path = folder / split / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (20, 20), (90 * value, 0, 0)).save(path)
    path.write_bytes(b"no picture")
    (tmp_path / "none").mkdir()
    arguments = ["evaluate", "--model", "mini", "--tasks", str(folder), "--json", "--adapters", str(tmp_path / "none")]
    said = fails(capsys, *arguments)
    assert str(path) in said
    assert "--skip-unreadable" in said
    main([*arguments, "--skip-unreadable"])
    captured = capsys.readouterr()
    assert f"\nskipped: image {path} can't be read" in captured.err
    assert captured.err.count("\n") == 3, "a line on what was loaded, a warning of equal images, one that was skipped"
    assert set(json.loads(captured.out)["accuracy"]) == {"bolts"}


@pytest.mark.parametrize(
    ("asked", "accelerator", "gpu", "bf16", "precision"),
    [
        ("auto", "auto", True, True, "bf16-mixed"),
        ("auto", "cuda", True, False, "32-true"),
        ("auto", "cpu", True, True, "32-true"),
        ("auto", "auto", False, True, "32-true"),
        ("32-true", "auto", True, True, "32-true"),
    ],
)
def test_training_uses_bfloat16_on_gpus_that_support_it(monkeypatch, asked, accelerator, gpu, bf16, precision):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: bf16)
    assert _precision(commands.Bench(precision=asked, accelerator=accelerator)) == precision


@pytest.mark.slow
def test_a_dry_run_reports_sizes_memory_and_time_and_writes_nothing(capsys, tmp_path):
    adapters = tmp_path / "adapters"
    arguments = ["fit", *QUICK, "--task", "digits", "--router", "learned", "--adapters", str(adapters)]
    main([*arguments, "--dry-run", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert list(found) == [
        "trainable_parameters", "parts", "kept_parameters", "kept_bytes", "memory_bytes", "seconds_per_step"
    ]  # fmt: skip
    assert sum(found["parts"].values()) == found["trainable_parameters"] == 539_856
    assert min(found["parts"].values()) > 0
    assert found["kept_bytes"] == 4 * found["kept_parameters"]
    assert found["memory_bytes"] > 100e6
    assert found["seconds_per_step"] > 0
    assert not adapters.exists()
    main([*arguments, "--json"])
    learned = json.loads(capsys.readouterr().out)
    assert all(learned[name] == found[name] for name in ("trainable_parameters", "kept_parameters"))
    assert "learned already" in fails(capsys, *arguments, "--dry-run")
