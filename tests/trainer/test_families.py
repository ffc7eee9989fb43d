"""Every supported kind of CLIP, with random weights and one block per tower, from building to releasing."""

import copy
import json

import open_clip
import pytest
import torch

from clipweld.exporter.release.publish import release
from clipweld.exporter.store.repository import Repository
from clipweld.trainer.base.backbone import load_backbone
from clipweld.trainer.base.cls_block import encode_text
from clipweld.trainer.config import train_config
from clipweld.trainer.learning.fit import fit
from clipweld.trainer.method import attach_pools
from clipweld.trainer.tasks import sample

OWN_ATTENTION = {
    "qk_norm": True, "scale_heads": True, "scale_attn_inner": True, "scale_attn": True, "scale_fc": True,
    "ls_init_value": 0.1,
}  # fmt: skip
FAMILIES = [
    "ViT-B-32", "ViT-B-32-quickgelu", "ViT-B-16-plus-240", "ViT-L-14", "ViT-H-14",
    "ViT-H-14-quickgelu", "ViT-M-16-alt",
]  # fmt: skip
VARIANTS = {
    "own attention, every feature": {"vision_cfg": OWN_ATTENTION, "text_cfg": OWN_ATTENTION},
    "own attention, plain": {"vision_cfg": {"block_type": "custom"}, "text_cfg": {"block_type": "custom"}},
    "biased projection": {"text_cfg": {"proj_bias": True}},
    "biased logits": {"init_logit_bias": -10.0},
    "no projection": {"text_cfg": {"proj_type": "none", "width": 192, "heads": 4}},
}


@pytest.fixture
def build(tmp_path):
    """A function that builds an open_clip model with one block per tower, changed settings and random weights."""

    def build(name, changes):
        config = copy.deepcopy(open_clip.get_model_config(name))
        for key, value in changes.items():
            config[key] = {**config[key], **value} if isinstance(value, dict) else value
        config["vision_cfg"]["layers"] = config["text_cfg"]["layers"] = 1
        file = tmp_path / f"one-block-{name}.json"
        file.write_text(json.dumps(config))
        open_clip.add_model_config(file)
        backbone = load_backbone(file.stem, "random")
        generator = torch.Generator().manual_seed(1)
        for path, weight in backbone.model.named_parameters():
            if "ln_" in path or "head_scale" in path or path.endswith("bias"):  # initial 0 and 1 hide faults
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
        return backbone

    yield build
    for file in tmp_path.glob("one-block-*.json"):
        open_clip.factory._MODEL_CONFIGS.pop(file.stem)
        open_clip.factory._MODEL_CONFIG_PATHS[:] = [
            path for path in open_clip.factory._MODEL_CONFIG_PATHS if path != file
        ]


def learns(backbone, digits):
    """Check that fresh pools change nothing, and that two steps train every layer and change the merged model."""
    pixels = torch.randn(2, 3, *[backbone.image_size] * 2, generator=torch.Generator().manual_seed(0))
    tokens = backbone.tokenizer(["a cat", "the letter q, drawn by hand"])
    plain = open_clip.create_model(backbone.model_name)
    plain.load_state_dict(backbone.model.state_dict())
    before = plain.eval().encode_image(pixels), plain.encode_text(tokens)
    attached = copy.deepcopy(backbone.model)
    attach_pools(attached, train_config("mini"))
    for found, expected in zip((attached.encode_image(pixels), encode_text(attached, tokens)), before, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    config = train_config("mini", iterations=2, shots=1, batch_size=4, anchor_weight=0.0)
    fitted = fit(digits, backbone, [], config, test_on=[])
    assert len(fitted.adapter.modules()) == 12
    for module in fitted.adapter.modules():
        assert fitted.adapter.experts(module)[1].abs().max() > 0, module
    after = fitted.backbone.model.encode_image(pixels), fitted.backbone.model.encode_text(tokens)
    for found, expected in zip(after, before, strict=True):
        assert torch.isfinite(found).all()
        assert not torch.equal(found, expected)
    return fitted


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_model_family_can_be_trained(name, build, digits):
    learns(build(name, {}), digits)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_of_a_block_can_be_trained(changes, build, digits):
    learns(build("mini", changes), digits)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, VARIANTS["own attention, every feature"]], ids=["torch", "open_clip"])
def test_both_implementations_of_attention_can_be_released(changes, build, digits, tmp_path):
    backbone = build("mini", changes)
    fitted = learns(backbone, digits)
    released = release(backbone, [fitted.adapter], Repository(tmp_path / "models", "clip"), *sample(8))
    assert released.to_dict()["graph_identical_to_base"]
    assert released.to_dict()["parity"]["top1_agreement"] == 1.0
