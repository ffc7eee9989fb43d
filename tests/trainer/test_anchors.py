import random

import open_clip
import pytest
import torch
import torch.nn.functional as F

from clipweld.trainer.base.backbone import with_weights
from clipweld.trainer.base.batches import Batches
from clipweld.trainer.base.cls_block import encode_text
from clipweld.trainer.config import train_config
from clipweld.trainer.errors import ConfigError
from clipweld.trainer.learning.evaluate import evaluate
from clipweld.trainer.learning.fit import fit
from clipweld.trainer.method.anchors import WORDS_PER_STEP, WordAnchors
from clipweld.trainer.tasks import load_task


@pytest.fixture(scope="module")
def batches(mini, digits):
    return Batches(digits, mini, train_config("mini", shots=2, batch_size=4, seed=3))


@pytest.fixture(scope="module")
def anchors(mini, batches):
    return WordAnchors(mini, batches, seed=3)


@pytest.fixture(scope="module")
def moved(mini):
    """The small CLIP with a little noise added to all weights."""
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
def test_the_loss_of_an_unchanged_model_is_zero(anchors, batches, mini):
    loss = loss_of(anchors, mini.model, 1, batches[1])
    assert abs(float(loss)) < 1e-4


@pytest.mark.slow
@torch.no_grad()
def test_loss_equals_the_sum_written_out(anchors, batches, mini, moved):
    """Computed with open_clip's functions over all words, before and after the change."""
    batch = batches[5]
    prompts = [f"a photo of a {word}" for index, word in enumerate(open_clip.IMAGENET_CLASSNAMES) if index % 10]
    old = mini.model.encode_text(mini.tokenizer(prompts), normalize=True)
    scale = 100.0
    before = (scale * features(mini.model, batch.pixels) @ old.T).softmax(-1)
    now = (scale * features(moved, batch.pixels) @ old.T).softmax(-1)
    kl = (before * (before / now).log()).sum(-1).mean()
    drawn = random.Random("words 3 5").sample(range(len(prompts)), WORDS_PER_STEP)
    new = moved.encode_text(mini.tokenizer([prompts[i] for i in drawn]), normalize=True)
    expected = kl + scale * (1 - (new * old[drawn]).sum(-1)).mean()
    assert expected > 0.01
    got = loss_of(anchors, moved, 5, batch)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_features_of_too_many_images_to_keep_are_computed_per_batch(mini, digits, moved):
    all_images = Batches(digits, mini, train_config("mini", shots=0, batch_size=4, seed=3))
    batch = all_images[1]
    many = WordAnchors(mini, all_images, seed=3)
    assert abs(float(loss_of(many, mini.model, 1, batch))) < 1e-4
    assert loss_of(many, moved, 1, batch) > 0.01


@pytest.mark.slow
def test_anchors_preserve_accuracy_on_other_tasks(mini):
    """After a few steps at a high learning rate, less accuracy is lost with anchors than without."""
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
