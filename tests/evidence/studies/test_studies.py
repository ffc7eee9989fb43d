import json
import shlex
from dataclasses import asdict, replace
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from clipweld.trainer import commands
from clipweld.trainer.config import train_config
from clipweld.trainer.sequence.run import run_sequence
from clipweld.trainer.tasks import load_task
from evidence.studies import mini, routing, scale, second, towers


def chains(part, length):
    """Return the commands of one part of the study, as parsed by the trainer."""
    return [commands.parse(shlex.split(line)[1:]) for line in mini.PARTS[part](Path("out", part), length)]


@pytest.mark.slow
@pytest.mark.parametrize("length", mini.LENGTHS)
def test_every_run_of_the_study_is_a_valid_command(length):
    found = [command for part in mini.PARTS for command in chains(part, length)]
    assert len({command.out for command in found}) == len(found)
    assert all(isinstance(command, commands.Sequence) for command in found)
    assert {command.tasks for command in found if command.out.parts[1] != "unseen"} == {("mini",)}
    assert {command.train.iterations for command in found} == {"long": {None, 300, 500}, "short": {100}}[length]


@pytest.mark.slow
@pytest.mark.parametrize("length", mini.LENGTHS)
def test_settings_are_chosen_on_validation_images_only(length):
    assert all(command.validate for command in chains("search", length))
    assert not any(command.validate for part in ("methods", "ablations", "orders") for command in chains(part, length))


@pytest.mark.parametrize("length", mini.LENGTHS)
def test_methods_and_orders_cover_every_pair_of_seed_and_order(length):
    found = chains("methods", length) + chains("orders", length)
    for method in ("pool", "lora", "finetune"):
        pairs = [(command.train.seed, command.order_seed) for command in found if command.method == method]
        assert sorted(pairs) == [(seed, order) for seed in mini.SEEDS for order in mini.ORDERS]


@pytest.mark.parametrize("length", mini.LENGTHS)
def test_a_baseline_uses_one_of_the_learning_rates_searched(length):
    for command in chains("methods", length):
        if command.method != "pool":
            assert command.train.lr in mini.RATES[length][command.method]


@pytest.mark.slow
def test_an_ablation_changes_its_flag_and_nothing_else():
    (base,) = (c.train for c in chains("methods", "short") if c.method == "pool" and c.train.seed == 0)
    for command in chains("ablations", "short"):
        if command.out.parent.name == "firmer" and command.train.seed == 0:
            assert command.train == replace(base, anchor_weight=4.0, drift_weight=400.0)


def test_attribution_has_the_losses_without_the_pool_and_the_pool_without_the_losses():
    found = {command.out.parent.name: command for command in chains("attribution", "long")}
    (base,) = (c.train for c in chains("methods", "long") if c.method == "pool" and c.train.seed == 2)
    bare, alone = found["pool-no-losses"].train, found["lora-both-losses"]
    assert bare == replace(base, anchor_weight=0.0, drift_weight=0.0)
    assert (alone.method, alone.train.anchor_weight, alone.train.drift_weight) == ("lora", 4.0, 1600.0)
    assert found["default-of-other-models"].train == replace(
        train_config("ViT-B-16"), seed=2, iterations=500, shots=None
    )
    assert list(mini.attribution(Path("out"), "short")) == []


def test_unseen_tasks_are_learned_while_the_six_are_watched():
    found = chains("unseen", "long")
    assert {(command.tasks, command.watch) for command in found} == {(("mini-unseen",), ("mini",))}
    assert len(found) == 3 * len(mini.SEEDS)


@pytest.mark.slow
def test_the_quick_study_runs_every_method_once_and_prints_the_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(mini.LENGTHS, "long", dict.fromkeys(mini.METHODS, "--iterations 1 --shots 1 --batch-size 2"))
    mini.main(mini.Study(out=tmp_path, quick=True))
    printed = capsys.readouterr().out
    assert all(f"| {method} |" in printed for method in ("pool", "lora", "finetune", "joint"))
    assert "zero-shot" in printed
    assert sorted(path.parent.name for path in tmp_path.rglob("sequence.json")) == sorted(mini.METHODS)


@pytest.mark.slow
def test_scale_compares_the_last_task_with_the_second(tmp_path, capsys):
    scale.main(scale.Scale(tasks=3, iterations=1, pairs=1, out=tmp_path))
    assert "The last of 3 tasks" in capsys.readouterr().out
    result = json.loads((tmp_path / "scale.json").read_text())
    assert [row["tasks_before"] for row in result["rows"]] == [0, 1, 2]
    assert result["ratio_last_to_second"] > 0


@pytest.mark.slow
def test_the_updates_of_each_tower_are_evaluated_separately(mini, tmp_path, capsys):
    tasks = [load_task("emoji"), load_task("flags")]
    config = train_config("mini", iterations=3, shots=2, lr=5e-2, anchor_weight=1.0)
    result = run_sequence(tasks, mini, config, tmp_path / "run")["task"]
    towers.main((tmp_path / "run",), out=tmp_path / "towers.json")
    measured = json.loads((tmp_path / "towers.json").read_text())[0]
    assert measured["learned"] == "emoji"
    nothing, image, text, both = (list(row.values()) for row in measured["accuracy"].values())
    assert nothing == result.zero_shot
    assert both == result.matrix[0]
    assert image != text
    printed = capsys.readouterr().out
    towers.main(out=tmp_path / "towers.json")
    assert capsys.readouterr().out == printed
    assert "| emoji | 1 | text tower |" in printed


def test_the_information_of_a_choice_is_what_the_classes_tell_of_it():
    classes = torch.tensor([0, 0, 1, 1])
    apart = torch.tensor([[0, 1], [1, 0], [2, 3], [3, 2]])  # each class has experts of its own
    same = torch.tensor([[0, 1]] * 4)
    assert routing.information(apart, classes) == pytest.approx(1)
    assert routing.information(same, classes) == pytest.approx(0, abs=1e-12)
    assert routing.shared([{"layer": {0, 1}}, {"layer": {1, 2}}]) == 0.5


@pytest.mark.slow
def test_routers_are_measured_in_both_towers(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(routing, "ROUTERS", {"fixed": {"router": "fixed", "shots": 1, "batch_size": 4}})
    monkeypatch.setattr(routing, "shipped_tasks", lambda: [load_task("emoji"), load_task("clipart")])
    routing.main(out=tmp_path / "routing.json", iterations=2)
    printed = capsys.readouterr().out
    figures = json.loads((tmp_path / "routing.json").read_text())["fixed"]
    for tower in ("image", "text"):
        assert 0 <= figures[tower]["class"] <= figures[tower]["image"] < 0.585  # log2(12 / 8) bits
        assert 0.3 < figures[tower]["shared"] <= 1
    routing.main(out=tmp_path / "routing.json", show=True)
    assert capsys.readouterr().out == printed


@pytest.mark.slow
def test_a_second_clip_learns_with_the_settings_of_the_first(tmp_path, capsys, monkeypatch):
    architecture = json.loads(second.VARIANT.read_text())["model"]
    save_file(open_clip.CLIP(**architecture).state_dict(), tmp_path / "random.safetensors")
    monkeypatch.setattr(second, "load_tasks", lambda names: [load_task("emoji"), load_task("clipart")])
    rows = ("pool", "default-of-other-models")
    second.main(weights=tmp_path / "random.safetensors", out=tmp_path, seeds=(1,), runs=rows, iterations=1)
    printed = capsys.readouterr().out
    assert "zero-shot" in printed
    records = [json.loads((tmp_path / "runs" / row / "order-1-seed-1" / "sequence.json").read_text()) for row in rows]
    assert {record["model"] for record in records} == {"second-mini"}
    configs = [record["config"] for record in records]
    assert configs[0] | {"iterations": None} == asdict(train_config("mini", seed=1, shots=16)) | {"iterations": None}
    assert [config["lr"] for config in configs] == [train_config("mini").lr, train_config("ViT-B-16").lr]
    assert {config["anchor_weight"] for config in configs} == {4.0}
