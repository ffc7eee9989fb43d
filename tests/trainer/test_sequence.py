import dataclasses
import json
from statistics import mean

import pytest
import torch
from safetensors.torch import load_file

from clipweld.trainer.adapters.adapter import load_lineage
from clipweld.trainer.adapters.merge import merge
from clipweld.trainer.base.backbone import encode_classes, with_weights
from clipweld.trainer.config import train_config
from clipweld.trainer.errors import ConfigError
from clipweld.trainer.learning.evaluate import encode_images, evaluate
from clipweld.trainer.sequence.metrics import average, forgetting, last, transfer
from clipweld.trainer.sequence.run import run_sequence
from clipweld.trainer.tasks import load_task, untouched, validation

# Accuracies on three tasks; one row after each learned task.
MATRIX = [[80.0, 30.0, 10.0], [70.0, 90.0, 20.0], [75.0, 60.0, 50.0]]


def test_metrics_equal_those_computed_by_hand():
    assert transfer(MATRIX) == (30 + (10 + 20) / 2) / 2
    assert average(MATRIX) == round((75 + 60 + 80 / 3) / 3, 2)
    assert last(MATRIX) == round((75 + 60 + 50) / 3, 2)
    assert forgetting(MATRIX) == ((80 - 75) + (90 - 60)) / 2


def test_one_task_has_no_transfer_and_no_forgetting():
    assert transfer([[80.0]]) is None
    assert forgetting([[80.0]]) is None
    assert average([[80.0]]) == last([[80.0]]) == 80.0


@pytest.fixture(scope="module")
def run(mini, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    config = train_config("mini", iterations=3, shots=2, batch_size=8)
    tasks = [load_task("emoji"), load_task("clipart")]
    return out, run_sequence(tasks, mini, config, out, watch=[load_task("flags")])["task"]


def test_a_sequence_tests_all_tasks_after_each_task(run):
    _, result = run
    assert result.tested == ["emoji", "clipart", "flags"]
    assert [len(row) for row in result.matrix] == [3, 3]
    assert len(result.zero_shot) == 3
    assert result.last == round(sum(result.matrix[1][:2]) / 2, 2)


def test_a_sequence_writes_a_lineage_and_a_record(run, mini):
    out, result = run
    assert [a.task for a in load_lineage(out / "adapters", mini.fingerprint)] == ["emoji", "clipart"]
    assert json.loads((out / "sequence.json").read_text())["results"]["task"]["matrix"] == result.matrix


def test_a_sequence_refuses_a_folder_with_another_run(run, mini):
    with pytest.raises(ConfigError, match="holds a run already"):
        run_sequence([load_task("emoji")], mini, train_config("mini"), run[0])


def test_a_task_that_is_listed_twice_is_refused(mini, tmp_path):
    with pytest.raises(ConfigError, match="emoji emoji"):
        run_sequence([load_task("emoji"), load_task("emoji")], mini, train_config("mini"), tmp_path)


QUICK = {"iterations": 2, "shots": 2, "batch_size": 8}


def learn(mini, out, method, **settings):
    config = train_config("mini", method, **QUICK, **settings)
    return run_sequence([load_task("emoji"), load_task("clipart")], mini, config, out, method=method)["task"]


@pytest.mark.slow
def test_method_lora_trains_and_keeps_a_plain_lora(mini, tmp_path):
    result = learn(mini, tmp_path, "lora")
    adapters = load_lineage(tmp_path / "adapters", mini.fingerprint)
    inputs = sum(tensor.numel() for name, tensor in adapters[-1].tensors.items() if name.endswith(".inputs"))
    assert result.trainable_parameters == result.kept_parameters - inputs
    assert inputs > 0
    assert {adapter.tensors[f"{module}.lora_A"].shape[0] for adapter in adapters for module in adapter.modules()} == {
        12
    }
    assert adapters[1].config["ago"] == "off"
    assert not any(any(counts) for counts in adapters[0].activation_counts.values()), "nothing votes"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pool", "finetune"])
def test_in_validation_a_task_is_tested_on_all_training_images_until_it_is_learned(mini, tmp_path, method):
    tasks = [load_task("emoji"), load_task("clipart")]
    whole, held_out = [untouched(task) for task in tasks], [validation(task) for task in tasks]
    assert [len(task.load("test")) for task in whole] == [len(task.load("train")) for task in tasks]
    config = train_config("mini", method, **QUICK)
    result = run_sequence(held_out, mini, config, tmp_path, method=method, before_learned=whole)["task"]
    assert result.zero_shot == list(evaluate(mini, whole)["task"].values())
    if method == "pool":
        adapters = load_lineage(tmp_path / "adapters", mini.fingerprint)
        stages = [with_weights(mini, merge(mini.model.state_dict(), adapters[: i + 1])) for i in range(2)]
        for row, stage, tested in zip(result.matrix, stages, ([held_out[0], whole[1]], held_out), strict=True):
            assert row == list(evaluate(stage, tested)["task"].values())


@pytest.mark.slow
def test_finetune_changes_all_weights_task_after_task(mini, tmp_path):
    result = learn(mini, tmp_path, "finetune")
    everything = sum(value.numel() for name, value in mini.model.named_parameters() if name != "logit_scale")
    assert result.trainable_parameters == result.kept_parameters == everything
    weights = load_file(tmp_path / "weights/clipart.safetensors")
    before = mini.model.state_dict()
    assert weights.keys() == before.keys()
    assert not torch.equal(weights["visual.conv1.weight"], before["visual.conv1.weight"])
    assert torch.equal(weights["logit_scale"], before["logit_scale"])
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["clipart.safetensors"], "the last is enough"
    assert not any(parameter.requires_grad for parameter in mini.model.parameters())


@pytest.mark.slow
def test_joint_learns_all_tasks_at_once(mini, tmp_path):
    result = learn(mini, tmp_path, "joint")
    assert len(result.matrix) == 1
    assert (result.transfer, result.forgetting) == (None, None)
    assert result.average == result.last == round(sum(result.matrix[0]) / 2, 2)


@pytest.mark.slow
def test_joint_takes_as_many_steps_as_all_tasks_together(mini, tmp_path):
    numbers = []
    config = train_config("mini", "joint", **QUICK)
    tasks = [load_task("emoji"), load_task("clipart")]
    seen = []

    def on_stage(stage):
        seen.append([task.name for task in stage])
        return lambda step: numbers.append(step.number)

    run_sequence(tasks, mini, config, tmp_path, method="joint", on_stage=on_stage)
    assert seen == [["emoji", "clipart"]]
    assert numbers == [1, 2, 3, 4], "as many steps as the tasks one after another"


@pytest.mark.slow
def test_order_seed_shuffles_the_tasks_and_nothing_else(mini, tmp_path):
    names = ["emoji", "clipart", "digits"]
    tasks = [dataclasses.replace(load_task(name), load=few(load_task(name))) for name in names]
    config = train_config("mini", iterations=1, shots=1, batch_size=2)
    orders = {}
    for order_seed in (None, 0, 1, 2):
        out = tmp_path / str(order_seed)
        orders[order_seed] = run_sequence(tasks, mini, config, out, order_seed=order_seed)["task"].tasks
        assert json.loads((out / "sequence.json").read_text())["order_seed"] == order_seed
    assert orders[None] == names
    assert all(sorted(order) == sorted(names) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) > 1
    again = run_sequence(tasks, mini, config, tmp_path / "again", order_seed=1)["task"]
    assert again.tasks == orders[1]


def few(task):
    """Return a loader of only sixteen images per split."""
    return lambda split: task.load(split).subset(range(16))


def test_union_classifies_among_all_class_names_and_a_shared_name_is_one_class(mini):
    tasks = [dataclasses.replace(load_task(name), load=few(load_task(name))) for name in ("emoji", "clipart")]
    assert {"animal", "food"} <= set(tasks[0].class_names) & set(tasks[1].class_names)
    found = evaluate(mini, tasks)
    weights = torch.cat([encode_classes(mini, task.class_names, task.templates) for task in tasks])
    names = [*tasks[0].class_names, *tasks[1].class_names]
    for task in tasks:
        images = task.load("test")
        with torch.no_grad():
            answers = (encode_images(mini, images, range(16)) @ weights.T).argmax(-1).tolist()
        right = [names[answer] == task.class_names[label] for answer, label in zip(answers, images.labels, strict=True)]
        assert found["union"][task.name] == 100 * sum(right) / 16
        of_classes = [
            mean(hit for hit, label in zip(right, images.labels, strict=True) if label == one)
            for one in sorted(set(images.labels))
        ]
        assert found["union_classes"][task.name] == pytest.approx(100 * mean(of_classes), abs=0.01)
    assert all(found["union"][name] <= found["task"][name] for name in found["task"])
