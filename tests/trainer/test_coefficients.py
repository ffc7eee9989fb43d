from dataclasses import replace

import pytest
import torch

from clipweld.trainer.adapters.adapter import load_adapter, save_adapter
from clipweld.trainer.adapters.merge import merge
from clipweld.trainer.base.backbone import with_weights
from clipweld.trainer.config import train_config
from clipweld.trainer.errors import TaskInvalid
from clipweld.trainer.learning.coefficients import GRID, held_out, scale, smallest_update
from clipweld.trainer.learning.evaluate import evaluate
from clipweld.trainer.learning.fit import fit
from clipweld.trainer.tasks import load_task

QUICK = {"iterations": 6, "shots": 5, "batch_size": 16}


@pytest.fixture(scope="module")
def chosen(mini):
    return fit(load_task("flags"), mini, [], train_config("mini", coefficients="chosen", **QUICK), test_on=[])


def test_a_fifth_of_the_drawn_images_is_held_out():
    digits = load_task("digits")
    part = held_out(digits, 5, seed=3)
    drawn = digits.load("train").few_shot(5, 3)
    train, test = part.load("train"), part.load("test")
    assert (len(drawn), len(train), len(test)) == (50, 40, 10)
    names = [[images.name_of(index) for index in range(len(images))] for images in (train, test, drawn)]
    assert sorted(names[0] + names[1]) == sorted(names[2])
    assert sorted(test.labels) == list(range(10))


def test_one_image_per_class_leaves_none_to_hold_out():
    with pytest.raises(TaskInvalid, match="one image each"):
        held_out(load_task("digits"), 1, seed=3)


@pytest.mark.slow
def test_coefficients_are_recorded_and_are_in_the_merged_weights(mini, chosen, tmp_path):
    adapter = chosen.adapter
    assert set(adapter.coefficients.values()) <= set(GRID)
    save_adapter(adapter, tmp_path / "flags.safetensors")
    assert load_adapter(tmp_path / "flags.safetensors").coefficients == adapter.coefficients
    full = fit(load_task("flags"), mini, [], train_config("mini", **QUICK), test_on=[]).adapter
    assert full.coefficients == {"image": 1.0, "text": 1.0}
    assert full.parents == adapter.parents
    expected = scale(full.tensors, adapter.coefficients)
    for name in expected:
        if not name.endswith(".inputs"):
            assert torch.equal(adapter.tensors[name], expected[name]), name


@pytest.mark.slow
def test_half_of_an_update_that_harms_is_left_out(mini, chosen):
    """An update of the text tower that is noise gets 0; the same for the image tower."""
    task = held_out(load_task("digits"), 16, seed=0)
    generator = torch.Generator().manual_seed(0)
    for tower, other in (("text", "image"), ("image", "text")):
        noise = {
            name: 30 * torch.randn(tensor.shape, generator=generator) if name.endswith(".lora_B") else tensor
            for name, tensor in chosen.adapter.tensors.items()
        }
        only = scale(noise, {tower: 1.0, other: 0.0})
        adapter = replace(chosen.adapter, tensors=only)
        spoilt = with_weights(mini, merge(mini.model.state_dict(), [adapter]))
        assert evaluate(spoilt, [task])["task"]["digits"] < evaluate(mini, [task])["task"]["digits"]
        assert smallest_update(adapter, mini, task) == {"image": 0.0, "text": 0.0}
