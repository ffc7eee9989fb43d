import open_clip
import torch

from clipweld.trainer.base.backbone import MINI
from clipweld.trainer.base.cls_block import ClsBlock, cut_to_longest, encode_text


def test_encode_text_equals_open_clip_on_cut_prompts(mini):
    tokens = mini.tokenizer(["a", "a cat", "a long prompt about the letter q, with many more words in it than fit"])
    expected = mini.model.encode_text(tokens)
    for rows in ([0], [0, 1], [0, 1, 2]):
        cut = cut_to_longest(tokens[rows])
        torch.testing.assert_close(encode_text(mini.model, cut), expected[rows], atol=1e-5, rtol=1e-5)
    assert cut_to_longest(tokens[:1]).shape == (1, 3)


def test_the_last_block_at_cls_equals_open_clip_forward_and_backward(mini):
    plain = open_clip.create_model("mini", pretrained=str(MINI / "mini.safetensors"))
    assert isinstance(mini.model.visual.transformer.resblocks[-1], ClsBlock)
    assert list(mini.model.state_dict()) == list(plain.state_dict())
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = []
    for model in (mini.model, plain):
        pixels = images.clone().requires_grad_()
        features = model.encode_image(pixels)
        found.append((features, torch.autograd.grad(features.square().sum(), pixels)[0]))
    for ours, its in zip(*found, strict=True):
        torch.testing.assert_close(ours, its, atol=1e-5, rtol=1e-4)
