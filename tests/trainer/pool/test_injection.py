import copy

import pytest
import torch

from clipweld.trainer.adapters.adapter import Adapter
from clipweld.trainer.adapters.merge import merge
from clipweld.trainer.base.backbone import load_backbone, transformer_blocks
from clipweld.trainer.base.cls_block import encode_text
from clipweld.trainer.config import PoolConfig
from clipweld.trainer.method import attach_pools, detach_pools

CONFIG = PoolConfig(dropout=0.0)


@pytest.fixture
def model(mini):
    return copy.deepcopy(mini.model)


@pytest.fixture
def inputs(mini):
    pixels = torch.randn(3, 3, mini.image_size, mini.image_size, generator=torch.Generator().manual_seed(0))
    return pixels, mini.tokenizer(["a cat", "the letter q, drawn by hand", "red"])


def train_a_little(model, pools, inputs):
    """Take two steps, so that experts have an effect and activation counts differ."""
    optimizer = torch.optim.SGD(pools.parameters(), lr=1.0)
    for _ in range(2):
        (model.train().encode_image(inputs[0]).sum() + encode_text(model, inputs[1]).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.mark.slow
def test_trainable_parameters_of_vit_b_16_equal_the_published_numbers():
    pools = attach_pools(load_backbone("ViT-B-16", "random").model, PoolConfig())
    routers = sum(p.numel() for pool in pools.pools.values() for p in pool.router.parameters())
    kept = sum(tensor.shape.numel() for pool in pools.pools.values() for tensor in (pool.lora_A, pool.lora_B)) * 4 // 12
    assert (pools.num_trainable, routers, kept) == (4_978_368, 1_660_608, 1_105_920)


def test_attached_fresh_pools_change_nothing(mini, model, inputs):
    attach_pools(model, CONFIG)
    model.train()
    torch.testing.assert_close(model.encode_image(inputs[0]), mini.model.encode_image(inputs[0]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.encode_text(inputs[1]), mini.model.encode_text(inputs[1]), atol=1e-5, rtol=1e-5)


def test_every_linear_layer_of_both_towers_has_a_pool(model):
    pools = attach_pools(model, CONFIG)
    assert len(pools.pools) == 6 * len(transformer_blocks(model))
    assert "visual.transformer.resblocks.0.attn.q_proj" in pools.pools
    assert "transformer.resblocks.3.mlp.c_proj" in pools.pools


def test_text_tower_is_routed_on_eot(model, inputs):
    pools = attach_pools(model, CONFIG)
    encode_text(model, inputs[1])
    position = pools.pools["transformer.resblocks.0.mlp.c_fc"].router.position
    assert torch.equal(position.index, inputs[1].argmax(-1))
    assert pools.pools["visual.transformer.resblocks.0.mlp.c_fc"].router.position.index is None


def test_text_tower_can_be_routed_on_its_first_token(model, inputs):
    pools = attach_pools(model, PoolConfig(dropout=0.0, route_on="first"))
    encode_text(model, inputs[1])
    assert pools.pools["transformer.resblocks.0.mlp.c_fc"].router.position.index is None


@pytest.mark.parametrize(("router_per", "routers"), [("layer", 60), ("block", 10)])
def test_there_is_one_router_per_layer_or_per_block(model, router_per, routers):
    pools = attach_pools(model, PoolConfig(router_per=router_per))
    assert len({id(pool.router) for pool in pools.pools.values()}) == routers
    assert sum("router.linear.weight" in name for name in pools.state()) == routers


def test_all_routers_get_a_gradient(model, inputs):
    pools = attach_pools(model, CONFIG)
    for pool in pools.pools.values():
        torch.nn.init.normal_(pool.lora_B, std=0.1)
    model.train()
    (model.encode_image(inputs[0]).square().sum() + encode_text(model, inputs[1]).square().sum()).backward()
    still = [name for name, pool in pools.pools.items() if not pool.router.linear.weight.grad.abs().sum() > 0]
    assert still == []


def test_detach_restores_modules_and_weights(mini, model, inputs):
    before = {name: type(module) for name, module in model.named_modules()}
    pools = attach_pools(model, CONFIG)
    train_a_little(model, pools, inputs)
    detach_pools(pools)
    assert {name: type(module) for name, module in model.named_modules()} == before
    for name, weight in mini.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    assert not model.token_embedding._forward_pre_hooks


def test_merged_weights_equal_the_pool_restricted_to_the_merged_experts(mini, model, inputs):
    pools = attach_pools(model, CONFIG)
    train_a_little(model, pools, inputs)
    image, text = model.encode_image(inputs[0]), encode_text(model, inputs[1])
    adapter = Adapter(
        task="t", class_names=("a", "b"), templates=("{}",), model_name="mini", pretrained="mini",
        base_fingerprint=mini.fingerprint, parents=(), scaling=CONFIG.alpha / CONFIG.rank, seed=0, accuracy={},
        config={}, activation_counts={}, tensors=pools.merged_tensors(),
    )  # fmt: skip
    merged = copy.deepcopy(mini.model)
    merged.load_state_dict(merge(mini.model.state_dict(), [adapter]))
    assert not torch.allclose(image, mini.model.encode_image(inputs[0]), atol=1e-3), "the pools must do something"
    torch.testing.assert_close(merged.encode_image(inputs[0]), image, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(merged.encode_text(inputs[1]), text, atol=1e-4, rtol=1e-4)


def test_pools_with_the_same_input_share_its_dropout(model, inputs):
    """These are q, k and v of a block; in the last block q has [CLS] as its only input and its own dropout."""
    pools = attach_pools(model, PoolConfig(dropout=0.5)).pools
    drawn = []
    for pool in pools.values():
        pool.dropout.register_forward_hook(lambda _module, inputs, output: drawn.append((inputs[0], output)))
    model.train().encode_image(inputs[0])
    blocks = len(model.visual.transformer.resblocks)
    assert len(drawn) == 4 * blocks + 1
    assert len({id(x) for x, _ in drawn}) == len(drawn)
    for x, dropped in drawn:
        assert 0.3 < (dropped == 0).float().mean() < 0.7
        assert torch.equal(dropped[dropped != 0], x[dropped != 0])
