import copy

import pytest
import torch

from clipweld.trainer.adapters.adapter import Adapter, load_adapter, save_adapter
from clipweld.trainer.base.backbone import with_weights
from clipweld.trainer.base.batches import Batches
from clipweld.trainer.base.cls_block import encode_text
from clipweld.trainer.config import train_config
from clipweld.trainer.learning.fit import fit
from clipweld.trainer.method import attach_pools, detach_pools
from clipweld.trainer.method.drift import drift_loss, past_inputs, principal_inputs
from clipweld.trainer.tasks import load_task

QUICK = {"iterations": 3, "shots": 2, "batch_size": 8}


@pytest.fixture(scope="module")
def first(mini):
    """The result of training emoji for three steps without a drift loss; principal inputs are stored anyway."""
    return fit(load_task("emoji"), mini, [], train_config("mini", drift_weight=0.0, **QUICK), test_on=[])


@pytest.fixture
def pools(mini, first):
    """Fresh pools on the model that was trained on emoji."""
    model = copy.deepcopy(first.backbone.model)
    attached = attach_pools(model, train_config("mini"))
    yield attached
    detach_pools(attached)


@pytest.mark.slow
def test_principal_inputs_approximate_the_second_moment(mini):
    """With all directions, the sum of the rows' outer products is the whole moment; checked on one layer."""
    task, config = load_task("emoji"), train_config("mini", **QUICK)
    batches = Batches(task, mini, config)
    model = with_weights(mini, mini.model.state_dict())
    attached = attach_pools(model.model, config)
    rows = principal_inputs(task, model, attached, batches, directions=192)
    detach_pools(attached)
    name = "visual.transformer.resblocks.0.attn.k_proj"
    seen = []
    hook = mini.model.visual.transformer.resblocks[0].ln_1.register_forward_hook(lambda *a: seen.append(a[2]))
    with torch.no_grad():
        mini.model.encode_image(batches.pixels(range(len(batches))))
    hook.remove()
    x = seen[0].flatten(0, 1)
    moment, got = x.T @ x / len(x), rows[f"{name}.inputs"]
    torch.testing.assert_close(got.T @ got, moment, atol=1e-3 * float(moment.abs().max()), rtol=1e-2)
    few = principal_inputs_of(mini, task, batches, config, directions=8)[f"{name}.inputs"]
    assert few.shape == (8, 192)
    top = torch.linalg.eigvalsh(moment)[-8:].sum()
    torch.testing.assert_close(few.square().sum(), top, atol=0, rtol=2e-2)


def principal_inputs_of(mini, task, batches, config, directions):
    model = with_weights(mini, mini.model.state_dict())
    attached = attach_pools(model.model, config)
    rows = principal_inputs(task, model, attached, batches, directions)
    detach_pools(attached)
    return rows


@pytest.mark.slow
def test_only_tokens_up_to_eot_count_for_texts(mini):
    """The moment of prompts does not depend on longer prompts in their batch."""
    task, config = load_task("emoji"), train_config("mini", **QUICK)
    rows = principal_inputs_of(mini, task, Batches(task, mini, config), config, directions=128)
    got = rows["transformer.resblocks.0.attn.k_proj.inputs"]
    seen = []
    hook = mini.model.transformer.resblocks[0].ln_1.register_forward_hook(lambda *a: seen.append(a[2][0]))
    with torch.no_grad():
        for name in task.class_names:
            for template in task.templates:
                tokens = mini.tokenizer([template.replace("{}", name)])
                encode_text(mini.model, tokens[:, : int(tokens.argmax()) + 1])
    hook.remove()
    x = torch.cat(seen)
    moment = x.T @ x / len(x)
    torch.testing.assert_close(got.T @ got, moment, atol=1e-3 * float(moment.abs().max()), rtol=1e-2)


def test_drift_is_the_relative_change_of_outputs_written_out(first, pools):
    past = past_inputs([first.adapter], pools)
    assert set(past) == set(pools.pools)
    generator = torch.Generator().manual_seed(0)
    changes = []
    for module, pool in pools.pools.items():
        pool.lora_B.data = torch.randn(pool.lora_B.shape, generator=generator)
        source = module.replace("q_proj", "k_proj").replace("v_proj", "k_proj")
        x = first.adapter.tensors[f"{source}.inputs"]
        delta = pool.scaling * (pool.lora_B @ pool.lora_A).detach()
        changes.append((x @ delta.T).square().sum() / (x @ pool.weight.T).square().sum())
    torch.testing.assert_close(drift_loss(pools.pools, past), torch.stack(changes).mean(), atol=1e-5, rtol=1e-4)


def test_drift_of_consolidating_pools_is_that_of_the_experts_that_will_be_merged(first, pools):
    past = past_inputs([first.adapter], pools)
    for pool in pools.pools.values():
        torch.nn.init.normal_(pool.lora_B)
    everything = drift_loss(pools.pools, past)
    pools.consolidate()
    merged = drift_loss(pools.pools, past)
    for pool in pools.pools.values():
        keep = set(pool.router.most_activated().tolist())
        for expert in set(range(12)) - keep:
            pool.lora_B.data[:, expert] = 0
        pool.router.consolidating = False
    assert merged < everything
    torch.testing.assert_close(drift_loss(pools.pools, past), merged)


def test_moments_of_several_tasks_are_added(first, pools):
    one, two = (past_inputs([first.adapter] * count, pools) for count in (1, 2))
    for module, moment in one.items():
        torch.testing.assert_close(two[module], 2 * moment)
    assert past_inputs([], pools) == {}


@pytest.mark.slow
def test_training_with_drift_loss_changes_earlier_outputs_less(mini, first):
    task, probe = load_task("flags"), load_task("emoji")
    pixels = Batches(probe, mini, train_config("mini", **QUICK)).pixels(range(16))
    moved = {}
    for weight in (0.0, 3000.0):
        settings = {"iterations": 12, "shots": 4, "lr": 1e-2, "ago": "off", "anchor_weight": 0.0}
        config = train_config("mini", drift_weight=weight, **settings)
        second = fit(task, mini, [first.adapter], config, test_on=[])
        with torch.no_grad():
            before, after = (m.model.encode_image(pixels, normalize=True) for m in (first.backbone, second.backbone))
        moved[weight] = float((1 - (before * after).sum(-1)).mean())
    assert moved[3000.0] < moved[0.0] / 2


def test_principal_inputs_are_saved_with_the_adapter(first, tmp_path):
    assert isinstance(first.adapter, Adapter)
    save_adapter(first.adapter, tmp_path / "a.safetensors")
    again = load_adapter(tmp_path / "a.safetensors")
    assert again.sha256 == first.adapter.sha256
    assert again.modules() == first.adapter.modules()
    assert sum(name.endswith(".inputs") for name in again.tensors) == 4 * 10
