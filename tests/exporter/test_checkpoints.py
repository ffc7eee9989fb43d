import copy
import json
import os
from dataclasses import replace

import open_clip
import pytest
import torch
from open_clip.transformer import QuickGELU
from peft import PeftModel
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel

from clipweld.exporter.errors import CheckpointError, UnsupportedModel
from clipweld.exporter.release.checkpoints import save_open_clip, save_peft, save_transformers
from clipweld.trainer.adapters.merge import merge
from clipweld.trainer.base.backbone import load_backbone, with_weights


def as_tensors(backbone, samples):
    """Return real images and prompts as input tensors of the towers."""
    images, prompts = samples
    return torch.stack([backbone.preprocess(image.convert("RGB")) for image in images]), backbone.tokenizer(prompts)


def assert_same_features(model, expected, pixels, tokens):
    """Check that transformers' model gives the features of open_clip's, and return its outputs."""
    found = model(input_ids=tokens, pixel_values=pixels)
    torch.testing.assert_close(found.image_embeds, expected.encode_image(pixels, normalize=True), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.text_embeds, expected.encode_text(tokens, normalize=True), atol=1e-5, rtol=1e-5)
    return found


@torch.no_grad()
def test_open_clip_loads_the_checkpoint(mini, make_adapter, tmp_path, samples):
    adapters = [make_adapter("digits")]
    out = tmp_path / "new" / "merged.safetensors"
    assert save_open_clip(mini, adapters, out) == "mini"
    model = open_clip.create_model("mini", pretrained=str(out)).eval()
    for name, tensor in merge(mini.model.state_dict(), adapters).items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=0)
    pixels = torch.stack([mini.preprocess(image.convert("RGB")) for image in samples[0]])
    assert not torch.equal(model.encode_image(pixels), mini.model.encode_image(pixels))
    assert os.listdir(out.parent) == ["merged.safetensors"]


@pytest.mark.slow
def test_weights_trained_with_quick_gelu_get_a_model_name_with_quick_gelu(tmp_path):
    backbone = load_backbone("ViT-B-32", "random")
    assert save_open_clip(backbone, [], tmp_path / "plain.safetensors") == "ViT-B-32"
    for module in backbone.model.modules():
        if hasattr(module, "gelu"):
            module.gelu = QuickGELU()  # as open_clip does for OpenAI's weights
    assert save_open_clip(backbone, [], tmp_path / "quick.safetensors") == "ViT-B-32-quickgelu"


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("quick", [False, True])
def test_transformers_computes_the_same_features(mini, make_adapter, tmp_path, samples, quick):
    adapters = [make_adapter("digits")]
    backbone = with_weights(mini, mini.model.state_dict())
    if quick:
        for module in backbone.model.modules():
            if hasattr(module, "gelu"):
                module.gelu = QuickGELU()
    out = tmp_path / "new" / "merged"
    save_transformers(backbone, adapters, out)
    assert sorted(os.listdir(out)) == [
        "config.json", "merges.txt", "model.safetensors", "preprocessor_config.json", "special_tokens_map.json",
        "tokenizer.json", "tokenizer_config.json", "vocab.json",
    ]  # fmt: skip
    assert os.listdir(out.parent) == ["merged"]
    model, loading = CLIPModel.from_pretrained(out, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    merged = with_weights(backbone, merge(backbone.model.state_dict(), adapters)).model
    pixels, tokens = as_tensors(mini, samples)
    assert_same_features(model, merged, pixels, tokens)
    torch.testing.assert_close(model.logit_scale, merged.logit_scale)


@torch.no_grad()
def test_peft_adds_all_adapters_to_the_base_in_transformers(mini, make_adapter, tmp_path, samples):
    first = make_adapter("digits")
    adapters = [first, make_adapter("flags", parents=(first,), seed=1)]
    save_transformers(mini, [], tmp_path / "base")
    save_peft(mini, adapters, tmp_path / "lora")
    base = CLIPModel.from_pretrained(tmp_path / "base")
    model = PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    assert {len(tensor) for name, tensor in model.state_dict().items() if "lora_A" in name} == {8}
    merged = with_weights(mini, merge(mini.model.state_dict(), adapters)).model
    pixels, tokens = as_tensors(mini, samples)
    found = assert_same_features(model, merged, pixels, tokens)
    assert not torch.allclose(found.image_embeds, mini.model.encode_image(pixels, normalize=True), atol=1e-4)


def test_peft_without_adapters_is_refused(mini, tmp_path):
    with pytest.raises(CheckpointError, match="no adapters to write"):
        save_peft(mini, [], tmp_path / "lora")
    assert os.listdir(tmp_path) == []


def test_transformers_preprocesses_images_as_we_do(mini, tmp_path, samples):
    save_transformers(mini, [], tmp_path / "merged")
    processor = CLIPImageProcessorPil.from_pretrained(tmp_path / "merged")
    wide = Image.effect_mandelbrot((300, 170), (-2, -1, 1, 1), 80).convert("RGB")
    for image in (wide, samples[0][0].convert("RGB")):
        found = processor(image, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(found, mini.preprocess(image), atol=0.02, rtol=0)


def test_weights_that_transformers_cannot_hold_are_named_and_nothing_is_written(mini, tmp_path):
    odd = copy.deepcopy(mini.model)
    del odd.logit_bias
    odd.logit_bias = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(UnsupportedModel, match="no place for logit_bias; use --to open_clip"):
        save_transformers(replace(mini, model=odd), [], tmp_path / "new" / "merged")
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_a_folder_that_is_not_empty_is_refused_and_left_alone(mini, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="give another --out"):
        save_transformers(mini, [], tmp_path / "merged")
    assert os.listdir(tmp_path) == ["merged"]
    assert os.listdir(tmp_path / "merged") == ["notes.txt"]


def test_the_transformers_configuration_names_the_end_of_text_token(mini, tmp_path):
    save_transformers(mini, [], tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["text_config"]["eos_token_id"] == 49407
