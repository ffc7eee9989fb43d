import pytest
import torch

from clipweld.trainer.adapters.adapter import Adapter
from clipweld.trainer.adapters.merge import delta_weight, merge
from clipweld.trainer.errors import WrongBase


def adapter_of(tensors, scaling=0.5):
    return Adapter(
        task="t", class_names=("a", "b"), templates=("{}",), model_name="m", pretrained="p", base_fingerprint="f",
        parents=(), scaling=scaling, seed=0, accuracy={}, config={}, activation_counts={}, tensors=tensors,
    )  # fmt: skip


def experts(module, d_in, d_out, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{module}.lora_A": torch.randn(2, d_in, generator=generator),
        f"{module}.lora_B": torch.randn(d_out, 2, generator=generator),
    }


def test_delta_weight_is_the_scaled_sum_of_outer_products():
    tensors = experts("x", 3, 5)
    a, b = tensors["x.lora_A"], tensors["x.lora_B"]
    expected = 0.25 * sum(torch.outer(b[:, i], a[i]) for i in range(2))
    torch.testing.assert_close(delta_weight(a, b, 0.25), expected, atol=1e-6, rtol=1e-6)


def test_k_proj_is_merged_into_the_middle_third_of_the_stacked_weight():
    tensors = experts("block.attn.k_proj", 4, 4)
    weights = {"block.attn.in_proj_weight": torch.zeros(12, 4)}
    merged = merge(weights, [adapter_of(tensors)])["block.attn.in_proj_weight"]
    torch.testing.assert_close(merged[4:8], delta_weight(*tensors.values(), 0.5))
    assert merged[:4].abs().sum() == merged[8:].abs().sum() == 0


def test_merge_changes_no_input_and_returns_other_weights_as_the_same_objects():
    weights = {"mlp.c_fc.weight": torch.ones(5, 3), "other": torch.ones(2)}
    merged = merge(weights, [adapter_of(experts("mlp.c_fc", 3, 5))])
    assert torch.equal(weights["mlp.c_fc.weight"], torch.ones(5, 3))
    assert merged["other"] is weights["other"]
    assert not torch.equal(merged["mlp.c_fc.weight"], weights["mlp.c_fc.weight"])


def test_merge_adds_in_float32_and_casts_to_half_precision_last():
    weights = {"mlp.c_fc.weight": torch.ones(5, 3, dtype=torch.float16)}
    tensors = experts("mlp.c_fc", 3, 5)
    merged = merge(weights, [adapter_of(tensors)])["mlp.c_fc.weight"]
    assert torch.equal(merged, (torch.ones(5, 3) + delta_weight(*tensors.values(), 0.5)).half())


@pytest.mark.parametrize("module", ["mlp.gone", "attn.q_proj", "mlp.c_fc"])
def test_merge_refuses_layers_that_are_missing_or_have_another_shape(module):
    weights = {"mlp.c_fc.weight": torch.zeros(5, 4), "attn.in_proj_weight": torch.zeros(9, 4)}
    with pytest.raises(WrongBase, match=module):
        merge(weights, [adapter_of(experts(module, 3, 3))])


def test_a_product_of_the_wrong_shape_is_refused_before_it_is_computed():
    tensors = {"mlp.c_fc.lora_A": torch.ones(1, 10**6), "mlp.c_fc.lora_B": torch.ones(10**6, 1)}  # product: 4 TB
    with pytest.raises(WrongBase, match=r"is \(1000000, 1000000\), mlp.c_fc.weight is \(5, 4\)"):
        merge({"mlp.c_fc.weight": torch.zeros(5, 4)}, [adapter_of(tensors)])
