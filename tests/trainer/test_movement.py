import open_clip
import pytest
import torch
import torch.nn.functional as F

from clipweld.trainer.base.backbone import encode_classes, with_weights
from clipweld.trainer.base.batches import Batches
from clipweld.trainer.config import train_config
from clipweld.trainer.errors import NotFinite
from clipweld.trainer.learning.movement import movement


@pytest.fixture(scope="module")
def batches(mini, digits):
    return Batches(digits, mini, train_config("mini", shots=1))


def changed(mini, tower, noise):
    """The small CLIP with noise on the weights of one tower's blocks."""
    generator = torch.Generator().manual_seed(0)
    state = {
        name: weight + noise * torch.randn(weight.shape, generator=generator) if name.startswith(tower) else weight
        for name, weight in mini.model.state_dict().items()
    }
    return with_weights(mini, state)


def test_an_unchanged_model_has_not_moved(mini, batches):
    moved = movement(mini, mini, batches)
    assert moved == pytest.approx({"words_mean": 0.0, "words_p95": 0.0, "images_kl": 0.0, "names_mean": 0.0}, abs=1e-4)


def test_a_changed_image_tower_moves_images_and_no_words(mini, batches):
    moved = movement(mini, changed(mini, "visual.transformer.", 0.02), batches)
    assert moved["words_mean"] == pytest.approx(0.0, abs=1e-4)
    assert moved["images_kl"] > 0.01


@pytest.mark.slow
@torch.no_grad()
def test_movement_equals_the_formulas_written_out(mini, batches):
    after = changed(mini, "transformer.", 0.02)
    prompts = mini.tokenizer([f"a photo of a {word}" for word in open_clip.IMAGENET_CLASSNAMES[::10]])
    words = [F.normalize(model.model.encode_text(prompts), dim=-1) for model in (mini, after)]
    fallen = 100 * (1 - (words[0] * words[1]).sum(-1))
    pixels = batches.pixels(range(len(batches)))
    said = [
        (100 * F.normalize(model.model.encode_image(pixels), dim=-1) @ own.T).softmax(-1)
        for model, own in zip((mini, after), words, strict=True)
    ]
    moved = movement(mini, after, batches)
    assert moved["words_mean"] == pytest.approx(float(fallen.mean()), rel=1e-3)
    assert moved["words_p95"] == pytest.approx(float(fallen.quantile(0.95)), rel=1e-3)
    assert moved["images_kl"] == pytest.approx(float((said[0] * (said[0] / said[1]).log()).sum(-1).mean()), rel=1e-2)
    own = [encode_classes(model, batches.task.class_names, batches.task.templates) for model in (mini, after)]
    assert moved["names_mean"] == pytest.approx(float(100 * (1 - (own[0] * own[1]).sum(-1)).mean()), rel=1e-3)
    assert moved["words_p95"] > moved["words_mean"] > 0.1


def test_a_model_that_gives_nan_is_refused(mini, batches):
    with pytest.raises(NotFinite, match=r"task 'digits': .* lower --lr"):
        movement(mini, changed(mini, "transformer.", float("nan")), batches)
