import dataclasses

import pytest
import torch
from torch import nn

from clipweld.trainer.config import PoolConfig
from clipweld.trainer.method import ExpertPool, Router, RoutingPosition

CONFIG = PoolConfig(rank=6, k_active=4, k_merge=2, alpha=3.0, dropout=0.0)
BATCH, LENGTH, D_IN, D_OUT = 5, 7, 8, 10


def fresh_pool(config=CONFIG):
    router = Router(D_IN, config, RoutingPosition(sharded=True), torch.device("cpu"))
    return ExpertPool(nn.Linear(D_IN, D_OUT), config, router)


@pytest.fixture
def pool():
    torch.manual_seed(1)
    pool = fresh_pool()
    nn.init.normal_(pool.lora_B)
    pool.router.activation_counts += torch.tensor([5, 0, 9, 1, 7, 2])
    return pool


@pytest.fixture
def x():
    return torch.randn(BATCH, LENGTH, D_IN, generator=torch.Generator().manual_seed(1))


def votes_by_hand(pool, phi):
    votes = [0] * CONFIG.rank
    for sample in phi:
        scores = (pool.router.linear.weight @ sample + pool.router.linear.bias).tolist()
        for expert in sorted(range(CONFIG.rank), key=lambda e: -scores[e])[: CONFIG.k_active]:
            votes[expert] += 1
    return votes


def active_by_hand(pool, phi):
    votes = votes_by_hand(pool, phi)
    ranked = sorted(range(CONFIG.rank), key=lambda e: -votes[e])
    assert votes[ranked[CONFIG.k_active - 1]] > votes[ranked[CONFIG.k_active]], "the vote must be clear for a test"
    return sorted(ranked[: CONFIG.k_active])


def added_by_hand(pool, x, experts):
    """Return the layer's output plus scaling * b_i (a_i . x) of each expert, added one at a time."""
    out = x @ pool.base_layer.weight.T + pool.base_layer.bias
    for expert in experts:
        dot = (x * pool.lora_A[expert]).sum(-1, keepdim=True)
        out = out + CONFIG.alpha / CONFIG.rank * dot * pool.lora_B[:, expert]
    return out


def test_forward_equals_the_sum_over_experts_with_most_votes(pool, x):
    before = pool.router.activation_counts.clone()
    out = pool.train()(x)
    votes = votes_by_hand(pool, x[:, 0])
    expected = added_by_hand(pool, x, active_by_hand(pool, x[:, 0]))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert (pool.router.activation_counts - before).tolist() == votes


def test_a_fresh_pool_changes_nothing(x):
    pool = fresh_pool()
    torch.testing.assert_close(pool.train()(x), pool.base_layer(x), atol=0, rtol=0)


def test_eval_is_the_merged_layer_and_counts_nothing(pool, x):
    before = pool.router.activation_counts.clone()
    out = pool.eval()(x)
    torch.testing.assert_close(out, added_by_hand(pool, x, [2, 4]), atol=1e-5, rtol=1e-5)
    assert torch.equal(pool.router.activation_counts, before)


def test_eval_does_not_depend_on_other_samples_in_the_batch(pool, x):
    pool.eval()
    torch.testing.assert_close(pool(x)[2:3], pool(x[2:3]), atol=1e-6, rtol=1e-6)


def test_the_router_gets_a_gradient_and_the_base_layer_none(pool, x):
    pool.base_layer.requires_grad_(False)
    pool.train()(x).square().sum().backward()
    assert pool.router.linear.weight.grad.abs().sum() > 0
    assert pool.router.linear.bias.grad.abs().sum() > 0
    assert pool.base_layer.weight.grad is None


def test_router_gradient_is_that_of_the_probability(pool, x):
    """Straight-through: d out / d router equals the gradient of probability * contribution at the active experts."""
    pool.train()(x).sum().backward()
    got = pool.router.linear.weight.grad.clone()
    pool.router.linear.zero_grad()
    probabilities = pool.router.linear(x[:, 0]).softmax(-1)
    total = 0
    for expert in active_by_hand(pool, x[:, 0]):
        contribution = (
            CONFIG.alpha
            / CONFIG.rank
            * (x @ pool.lora_A[expert]).detach().sum(1)
            * pool.lora_B[:, expert].sum().detach()
        )
        total = total + (probabilities[:, expert] * contribution).sum()
    total.backward()
    torch.testing.assert_close(got, pool.router.linear.weight.grad, atol=1e-5, rtol=1e-4)


def test_routing_position_picks_each_text_s_own_token(x):
    position = RoutingPosition(sharded=False)
    assert torch.equal(position.pick(x), x[:, 0])
    position.index = torch.tensor([3, 0, 6, 2, 2])
    assert torch.equal(position.pick(x), torch.stack([x[i, p] for i, p in enumerate(position.index)]))


def test_consolidating_trains_only_the_experts_that_will_be_merged(pool, x):
    pool.router.consolidating = True
    before = pool.router.activation_counts.clone()
    out = pool.train()(x)
    torch.testing.assert_close(out, added_by_hand(pool, x, [2, 4]), atol=1e-5, rtol=1e-5)
    out.square().sum().backward()
    assert pool.lora_A.grad.abs().sum(1).nonzero().flatten().tolist() == [2, 4]
    assert torch.equal(pool.router.activation_counts, before)


def test_a_fixed_router_picks_like_a_learned_one_and_gets_no_gradient(x):
    torch.manual_seed(1)
    pool = fresh_pool(dataclasses.replace(CONFIG, router="fixed"))
    nn.init.normal_(pool.lora_B)
    active = active_by_hand(pool, x[:, 0])
    out = pool.train()(x)
    torch.testing.assert_close(out, added_by_hand(pool, x, active), atol=1e-5, rtol=1e-5)
    out.sum().backward()
    assert pool.router.linear.weight.grad is None


def test_without_a_router_the_first_experts_are_active_and_merged(x):
    torch.manual_seed(1)
    pool = fresh_pool(dataclasses.replace(CONFIG, router="none"))
    nn.init.normal_(pool.lora_B)
    assert list(pool.router.parameters()) == []
    torch.testing.assert_close(pool.train()(x), added_by_hand(pool, x, range(4)), atol=1e-5, rtol=1e-5)
    pool.router.consolidating = True
    torch.testing.assert_close(pool(x), added_by_hand(pool, x, range(2)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pool.eval()(x), added_by_hand(pool, x, range(2)), atol=1e-5, rtol=1e-5)


def test_pools_that_share_a_router_use_the_choice_of_the_leading_pool(x):
    torch.manual_seed(1)
    leader = fresh_pool()
    follower = ExpertPool(nn.Linear(D_IN, D_OUT), CONFIG, leader.router, leads=False)
    nn.init.normal_(follower.lora_B)
    leader.train()(x)
    before = leader.router.activation_counts.clone()
    other = torch.randn(BATCH, LENGTH, D_IN)
    out = follower.train()(other)
    active = leader.router.active.tolist()
    torch.testing.assert_close(out, added_by_hand(follower, other, active), atol=1e-5, rtol=1e-5)
    assert torch.equal(leader.router.activation_counts, before)
    assert torch.equal(follower.merged_experts()[0], follower.lora_A[leader.router.most_activated()])


@torch.no_grad()
def test_dropout_keeps_the_mean_of_the_experts_output(x):
    torch.manual_seed(1)
    pool = fresh_pool(dataclasses.replace(CONFIG, router="none", dropout=0.25)).train()
    nn.init.normal_(pool.lora_B)
    expected = added_by_hand(pool, x, range(CONFIG.k_active)) - pool.base_layer(x)
    added = torch.stack([pool(x) - pool.base_layer(x) for _ in range(4000)])
    torch.testing.assert_close(added.mean(0), expected, atol=0.1 * float(expected.std()), rtol=0)
