"""NaN and infinity are errors that name the first layer, weight or term that has them."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from clipweld.trainer.adapters.merge import merge
from clipweld.trainer.base.backbone import DEFAULT_PRETRAINED, encode_classes, load_backbone, with_weights
from clipweld.trainer.config import train_config
from clipweld.trainer.errors import ConfigError, NotFinite, WeightsError
from clipweld.trainer.finite import all_finite, first_not_finite, unit
from clipweld.trainer.learning import checkpoint
from clipweld.trainer.learning.evaluate import evaluate
from clipweld.trainer.learning.fit import fit
from clipweld.trainer.tasks import load_task

QUICK = {"iterations": 4, "shots": 2, "batch_size": 8, "anchor_weight": 0.0, "drift_weight": 0.0}
LAYER = "visual.transformer.resblocks.3.mlp.c_fc"


@pytest.fixture
def broken(mini):
    """A function that returns the small CLIP with one element of a weight replaced."""

    def broken(name, value=math.nan):
        weights = {key: weight.clone() for key, weight in mini.model.state_dict().items()}
        weights[name].view(-1)[-1] = value
        return with_weights(mini, weights)

    return broken


def learn(base, on_step=lambda step: None, lineage=(), **settings):
    config = train_config("mini", **(QUICK | settings))
    return fit(load_task("emoji"), base, lineage, config, test_on=[], on_step=on_step)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_file_with_non_finite_weights_is_refused(tmp_path, value):
    weights = load_file(DEFAULT_PRETRAINED["mini"])
    weights["transformer.resblocks.2.mlp.c_fc.weight"][3, 5] = value
    save_file(weights, tmp_path / "broken.safetensors")
    with pytest.raises(
        WeightsError, match=r"broken.safetensors' for mini: transformer.resblocks.2.mlp.c_fc.weight holds NaN"
    ):
        load_backbone("mini", str(tmp_path / "broken.safetensors"))


def test_a_non_finite_base_weight_is_named_at_the_first_step(broken):
    seen = []
    with pytest.raises(NotFinite, match=rf"step 1: the loss is nan, .* weight {LAYER}.base_layer.weight; .* --lr"):
        learn(broken(f"{LAYER}.weight"), seen.append)
    assert seen == []


@pytest.mark.parametrize("layer", ["visual.transformer.resblocks.2.ln_1", "transformer.resblocks.1", "ln_final"])
def test_a_layer_whose_output_overflows_is_named_with_the_step(broken, layer):
    base, steps = broken("logit_scale", 4.6), []
    overflow = lambda _layer, _inputs, output: output * (math.inf if len(steps) == 2 else 1)  # noqa: E731
    base.model.get_submodule(layer).register_forward_hook(overflow)
    with pytest.raises(NotFinite, match=rf"step 3: the loss is nan, .* is the output of layer {layer}; "):
        learn(base, steps.append)


def test_a_weight_made_non_finite_by_its_gradient_is_named_with_the_step(mini):
    weights = []

    def plant(step):
        if step.number == 2:
            (weight,) = [p for p in weights if p.shape == (12, 192)][:1]
            weight.register_hook(lambda gradient: gradient * math.nan)

    with pytest.MonkeyPatch.context() as patch:
        adamw = torch.optim.AdamW

        def noted(parameters, **settings):
            weights.extend(parameters)
            return adamw(parameters, **settings)

        patch.setattr(torch.optim, "AdamW", noted)
        first = r"visual.transformer.resblocks.0.attn.q_proj.lora_A"
        with pytest.raises(NotFinite, match=rf"step 3: after its update the first .* is weight {first}; "):
            learn(mini, plant)


def test_an_overflowing_second_moment_is_named_even_if_the_weight_is_finite(mini, monkeypatch):
    from clipweld.trainer.learning.fit import Objective

    terms = Objective.terms
    monkeypatch.setattr(Objective, "terms", lambda *a: {k: v * 1e25 for k, v in terms(*a).items()})
    with pytest.raises(NotFinite, match=r"step 1: after its update .* the second moment of visual.*'s gradient"):
        learn(mini)


@pytest.mark.parametrize("lr", [1e6, 1e20, 1e38])
def test_diverging_training_stops_and_names_the_step(mini, lr):
    steps = []
    with pytest.raises(NotFinite, match=r"a lower --lr than 1e\+") as caught:
        learn(mini, steps.append, lr=lr, iterations=60)
    assert all(math.isfinite(step.loss) for step in steps)
    number = int(re.search(r"step (\d+)", str(caught.value))[1])
    assert len(steps) == number - 1


def test_a_non_finite_term_of_the_loss_is_named_if_all_layers_are_finite(mini, fitted):
    with pytest.raises(NotFinite, match=r"step 1: the loss is nan, .* is the orthogonality loss"):
        learn(mini, lineage=[fitted.adapter], ago="sum", ago_weight=1e39)


@pytest.mark.parametrize("value", [0.0, math.nan, 1e30])
def test_unusable_stored_inputs_of_earlier_tasks_are_named(mini, fitted, value):
    name = fitted.adapter.modules()[0]
    inputs = {f"{name}.inputs": torch.full_like(fitted.adapter.tensors[f"{name}.inputs"], value)}
    broken = dataclasses.replace(fitted.adapter, tensors=fitted.adapter.tensors | inputs)
    with pytest.raises(NotFinite, match=rf"adapter 'digits': {name}.inputs are NaN, zero or"):
        learn(mini, lineage=[broken], drift_weight=1.0)


def test_checkpoints_never_contain_non_finite_values(mini, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(checkpoint, "SHARE", 0)
    path = tmp_path / "unfinished.safetensors"
    steps = []
    with pytest.raises(NotFinite):
        fit(load_task("emoji"), mini, [], train_config("mini", **(QUICK | {"lr": 1e20, "iterations": 60})), test_on=[],
            unfinished=path, on_step=steps.append)  # fmt: skip
    assert all_finite([t for t in load_file(path).values() if t.is_floating_point()]) if steps else not path.exists()
    assert not list(tmp_path.glob(".*"))


def test_merge_names_adapter_and_layer(mini, fitted):
    name = fitted.adapter.modules()[3]
    for factor in (math.nan, 1e30):
        tensors = dict(fitted.adapter.tensors)
        tensors |= {f"{name}.{part}": tensors[f"{name}.{part}"] * factor + factor for part in ("lora_A", "lora_B")}
        with pytest.raises(NotFinite, match=rf"adapter 'digits': layer {name}: merged into .* --lr"):
            merge(mini.model.state_dict(), [dataclasses.replace(fitted.adapter, tensors=tensors)])
    half = {key: weight.half() for key, weight in mini.model.state_dict().items()}
    with pytest.raises(NotFinite, match="beyond float16"):
        merge(half, [dataclasses.replace(fitted.adapter, scaling=1e9)])


@pytest.mark.slow
def test_accuracy_is_not_computed_from_zero_or_non_finite_features(mini, broken, digits):
    with pytest.raises(NotFinite, match=r"prompt .*: expected features of a finite length above 0, got length nan"):
        evaluate(broken("ln_final.weight"), [digits])
    with pytest.raises(NotFinite, match=r"task 'digits': the features of (\d+) of \1 test images"):
        evaluate(broken("visual.ln_post.weight", math.inf), [digits])
    silent = with_weights(mini, mini.model.state_dict() | {"visual.proj": torch.zeros(192, 192)})
    with pytest.raises(NotFinite, match=r"test images are NaN, infinite or zero"):
        evaluate(silent, [digits])
    mute = with_weights(mini, mini.model.state_dict() | {"text_projection": torch.zeros(128, 192)})
    with pytest.raises(NotFinite, match=r"prompt 'a cat': .* got length 0"):
        encode_classes(mute, ("cat",), ("a {}",))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["lr", "alpha", "weight_decay", "ago_weight", "drift_weight", "anchor_weight"])
def test_settings_must_be_finite_numbers(name, value):
    with pytest.raises(ConfigError, match=f"{name} {value} must be a number"):
        train_config("mini", **{name: value})


def test_unit_names_the_row_that_cannot_be_normalised():
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    torch.testing.assert_close(unit(rows[:1], ["x"]), torch.tensor([[0.6, 0.8]]))
    for fault in (0.0, math.nan, math.inf, 1e30):
        with pytest.raises(NotFinite, match=r"^row 1: .* got length"):
            unit(torch.tensor([[3.0, 4.0], [fault, fault]]), ["row 0", "row 1"])


def test_non_finite_tensors_are_found():
    good = {"a": torch.ones(2), "b": torch.full((3,), 3e38), "c": torch.arange(3)}
    assert first_not_finite(good) is None
    assert all_finite([good["a"], good["b"]])
    for value in (math.nan, math.inf, -math.inf):
        assert first_not_finite(good | {"d": torch.tensor([0.0, value])}) == "d"
        assert not all_finite([good["a"], torch.tensor([0.0, value])])
