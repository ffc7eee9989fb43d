import dataclasses

import pytest
import torch

from clipweld.trainer.adapters.merge import merge
from clipweld.trainer.base.backbone import with_weights
from clipweld.trainer.base.batches import Batches
from clipweld.trainer.config import train_config
from clipweld.trainer.errors import AdapterError, ConfigError, TaskAlreadyLearned
from clipweld.trainer.learning.evaluate import evaluate
from clipweld.trainer.learning.fit import fit, past_columns
from clipweld.trainer.tasks import load_task

QUICK = {"iterations": 3, "shots": 2, "batch_size": 8}


def test_fit_improves_accuracy(fitted):
    before, after = (fitted.adapter.accuracy[when]["digits"] for when in ("before", "after"))
    assert after > before + 3


def test_the_recorded_accuracy_is_that_of_the_merged_model(mini, fitted, digits):
    merged = with_weights(mini, merge(mini.model.state_dict(), [fitted.adapter]))
    assert evaluate(merged, [digits])["task"] == fitted.adapter.accuracy["after"]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_adapter_and_another_seed_another(mini):
    task = load_task("emoji")

    def sha(seed):
        return fit(task, mini, [], train_config("mini", seed=seed, **QUICK), test_on=[]).adapter.sha256

    assert sha(1) == sha(1) != sha(2)


@pytest.mark.slow
def test_fit_leaves_the_base_and_the_global_random_state_unchanged(mini):
    before = {name: weight.clone() for name, weight in mini.model.state_dict().items()}
    state = torch.get_rng_state()
    fit(load_task("emoji"), mini, [], train_config("mini", **QUICK), test_on=[])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(mini.model.state_dict()[name], weight) for name, weight in before.items())


def test_the_second_task_has_the_first_as_parent_and_a_loss_for_overlap(mini, fitted):
    task = load_task("emoji")
    losses = {}
    for ago in ("sum", "off"):
        config = train_config("mini", ago=ago, ago_weight=10.0, anchor_weight=0.0, **QUICK)
        seen = []
        second = fit(task, mini, [fitted.adapter], config, test_on=[], on_step=seen.append)
        losses[ago] = [step.loss for step in seen]
        assert second.adapter.parents == (fitted.adapter.sha256,)
    assert losses["sum"][0] == losses["off"][0], "fresh pools have no overlap"
    assert losses["sum"][-1] > losses["off"][-1]


def test_columns_of_past_adapters_are_concatenated(fitted):
    other = dataclasses.replace(fitted.adapter, tensors={k: v + 1 for k, v in fitted.adapter.tensors.items()})
    past = past_columns([fitted.adapter, other], torch.device("cpu"))
    name = fitted.adapter.modules()[0]
    first, second = fitted.adapter.experts(name)[1], other.experts(name)[1]
    assert torch.equal(past[name], torch.cat([first, second], dim=1))
    assert past_columns([], torch.device("cpu")) == {}


def test_a_task_cannot_be_learned_twice(mini, fitted, digits):
    with pytest.raises(TaskAlreadyLearned, match="digits"):
        fit(digits, mini, [fitted.adapter], train_config("mini", **QUICK), test_on=[])


@pytest.mark.slow
def test_an_adapter_too_large_to_be_read_again_is_refused_before_training(mini, digits):
    config = train_config("mini", rank=10_000, **QUICK)
    with pytest.raises(AdapterError, match=r"'digits': .* read again \(JSON of .* lower rank$"):
        fit(digits, mini, [], config, test_on=[], on_step=lambda step: pytest.fail("trained"))


def test_batches_pair_every_image_with_its_own_prompt(mini, digits):
    batch = Batches(digits, mini, train_config("mini", batch_size=20))[1]
    assert batch.pixels.shape == (20, 3, 64, 64)
    assert len(batch.tokens) == len(batch.labels.unique())
    prompts = [template.replace("{}", name) for template in digits.templates for name in digits.class_names]
    encoded = {
        tuple(row[row > 0].tolist()): prompt for row, prompt in zip(mini.tokenizer(prompts), prompts, strict=True)
    }
    for label, row in zip(batch.labels, batch.tokens[batch.text_of], strict=True):
        assert digits.class_names[label] in encoded[tuple(row[row > 0].tolist())]


def test_batches_show_every_image_once_before_any_is_repeated(mini, digits):
    config = train_config("mini", shots=4, batch_size=10)
    batches = Batches(digits, mini, config)
    seen = [tuple(image.flatten()[::97].tolist()) for number in range(1, 5) for image in batches[number].pixels]
    assert len(set(seen)) == 40


def test_config_names_all_faults_at_once():
    with pytest.raises(ConfigError, match=r"k_active 20.*dropout 1.5.*lr -1") as caught:
        train_config("mini", k_active=20, dropout=1.5, lr=-1.0)
    assert "\n" not in str(caught.value)
