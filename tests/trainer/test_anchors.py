import dataclasses
import random

import open_clip
import pytest
import torch
import torch.nn.functional as F

from trainer.anchors import WORDS_PER_STEP, Anchors
from trainer.backbone import encode_text, with_weights
from trainer.batches import Batches
from trainer.config import train_config
from trainer.errors import ConfigError
from trainer.evaluate import evaluate
from trainer.fit import fit
from trainer.pictures import picture
from trainer.tasks import load_task


@pytest.fixture(scope="module")
def batches(mini, digits):
    return Batches(digits, mini, train_config("mini", shots=2, batch_size=4, seed=3))


@pytest.fixture(scope="module")
def anchors(mini, batches):
    return Anchors(mini, batches, train_config("mini", shots=2, batch_size=4, seed=3, anchor_pictures=0))


@pytest.fixture(scope="module")
def moved(mini):
    """The small CLIP after a little noise in all weights."""
    generator = torch.Generator().manual_seed(0)
    state = {
        name: weight + 0.02 * torch.randn(weight.shape, generator=generator)
        for name, weight in mini.model.state_dict().items()
    }
    return with_weights(mini, state).model


def features(model, pixels):
    return F.normalize(model.encode_image(pixels), dim=-1)


def loss_of(anchors, model, number, batch):
    words = F.normalize(encode_text(model, anchors.tokens(number)), dim=-1)
    return anchors.loss(number, batch, features(model, batch.pixels), words)


@torch.no_grad()
def test_a_model_that_has_not_moved_loses_nothing(anchors, batches, mini):
    loss = loss_of(anchors, mini.model, 1, batches[1])
    assert abs(float(loss)) < 1e-5


@torch.no_grad()
def test_loss_equals_the_sum_written_out(anchors, batches, mini, moved):
    """Over all words: what the towers said before and say now, from open_clip's own functions."""
    batch = batches[5]
    prompts = [f"a photo of a {word}" for word in open_clip.IMAGENET_CLASSNAMES]
    old = mini.model.encode_text(mini.tokenizer(prompts), normalize=True)
    scale = 100.0
    before = (scale * features(mini.model, batch.pixels) @ old.T).softmax(-1)
    now = (scale * features(moved, batch.pixels) @ old.T).softmax(-1)
    kl = (before * (before / now).log()).sum(-1).mean()
    drawn = random.Random("words 3 5").sample(range(len(prompts)), WORDS_PER_STEP)
    new = moved.encode_text(mini.tokenizer([prompts[i] for i in drawn]), normalize=True)
    expected = kl + (1 - (new * old[drawn]).sum(-1)).mean()
    assert expected > 0.01
    got = loss_of(anchors, moved, 5, batch)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_images_that_are_too_many_to_keep_are_described_as_they_come(mini, digits, moved):
    all_images = Batches(digits, mini, train_config("mini", shots=0, batch_size=4, seed=3))
    batch = all_images[1]
    many = Anchors(mini, all_images, train_config("mini", seed=3, anchor_pictures=0))
    assert abs(float(loss_of(many, mini.model, 1, batch))) < 1e-5
    assert loss_of(many, moved, 1, batch) > 0.01


@torch.no_grad()
def test_drawn_pictures_are_held_as_words_describe_them(batches, mini, moved):
    held = Anchors(mini, batches, train_config("mini", seed=3, anchor_pictures=6))
    batch, pictures = batches[1], held.pixels(1)
    assert pictures.shape == (6, 3, 64, 64)
    words = F.normalize(encode_text(mini.model, held.tokens(1)), dim=-1)
    everything = torch.cat([batch.pixels, pictures])
    assert abs(float(held.loss(1, batch, features(mini.model, everything), words))) < 1e-5
    mixed = torch.cat([features(mini.model, batch.pixels), features(moved, pictures)])
    old = mini.model.encode_text(
        mini.tokenizer([f"a photo of a {word}" for word in open_clip.IMAGENET_CLASSNAMES]), normalize=True
    )
    before, now = ((100 * features(model, pictures) @ old.T).softmax(-1) for model in (mini.model, moved))
    expected = (before * (before / now).log()).sum(-1).mean()
    assert expected > 0.01
    torch.testing.assert_close(held.loss(1, batch, mixed, words), expected, atol=1e-4, rtol=1e-3)


def test_processes_share_out_the_drawn_pictures(mini, digits):
    config = train_config("mini", shots=2, batch_size=4, anchor_pictures=3)
    shares = [
        Anchors(mini, Batches(digits, mini, config, rank=rank, world_size=2), config).pixels(5) for rank in (0, 1)
    ]
    whole = Anchors(mini, Batches(digits, mini, config), dataclasses.replace(config, anchor_pictures=6)).pixels(5)
    assert torch.equal(torch.cat(shares), whole)


def test_pictures_are_drawn_by_their_seed_and_differ():
    drawn = [picture(seed) for seed in range(40)]
    assert {image.size for image in drawn} == {(128, 128)}
    assert {image.mode for image in drawn} == {"RGB"}
    assert len({image.tobytes() for image in drawn}) > 35
    picture.cache_clear()
    assert picture(3).tobytes() == drawn[3].tobytes()


def test_anchors_hold_what_is_not_being_learned(mini):
    """A few steps at a high rate: with anchors, less is lost of what the model knew."""
    watched = [load_task("emoji"), load_task("clipart")]
    before = evaluate(mini, watched)
    kept = {}
    for weight in (0.0, 1.0):
        config = train_config("mini", iterations=20, shots=4, lr=2e-2, anchor_weight=weight)
        after = fit(load_task("flags"), mini, [], config, test_on=watched, before=before).adapter.accuracy["after"]
        kept[weight] = sum(after.values())
    assert kept[1.0] > kept[0.0]


def test_a_negative_weight_is_refused():
    with pytest.raises(ConfigError, match="anchor_weight"):
        train_config("mini", anchor_weight=-1.0)
