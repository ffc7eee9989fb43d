import copy
import json
import pickle
import shutil
import warnings
import zipfile

import open_clip
import pytest
import torch

from clipweld.trainer.base.backbone import check_supported, encode_classes, fingerprint, load_backbone, with_weights
from clipweld.trainer.base.weights_file import OPENAI_SHA256
from clipweld.trainer.errors import UnknownModel, UnsupportedModel, WeightsError
from clipweld.trainer.schemas import sha256_of


def test_mini_is_an_ordinary_open_clip_model(mini):
    theirs, _, _ = open_clip.create_model_and_transforms(
        "mini", pretrained="trainer/src/clipweld/trainer/mini/mini.safetensors", require_pretrained=True
    )
    for name, weight in theirs.state_dict().items():
        assert torch.equal(mini.model.state_dict()[name], weight), name
    assert (mini.image_size, mini.context_length, mini.embed_dim) == (64, 24, 192)


def test_encode_classes_is_the_normalised_mean_of_normalised_prompts(mini):
    features = mini.model.encode_text(mini.tokenizer(["a cat", "the cat"]), normalize=True)
    expected = features.mean(0) / features.mean(0).norm()
    got = encode_classes(mini, ("dog", "cat"), ("a {}", "the {}"))
    torch.testing.assert_close(got[1], expected, atol=1e-5, rtol=1e-5)


def test_the_fingerprint_depends_on_the_weights_only(mini):
    state = mini.model.state_dict()
    assert fingerprint(dict(reversed(state.items()))) == mini.fingerprint
    state["logit_scale"] = state["logit_scale"] + 1e-6
    assert fingerprint(state) != mini.fingerprint


def test_with_weights_leaves_the_original_unchanged(mini):
    changed = with_weights(mini, {name: weight * 0 for name, weight in mini.model.state_dict().items()})
    assert changed.model.logit_scale == 0
    assert mini.model.logit_scale != 0
    assert changed.fingerprint == mini.fingerprint


def test_random_weights_are_the_same_every_time():
    assert load_backbone("mini", "random").fingerprint == load_backbone("mini", "random").fingerprint


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (("ViT-B-17",), UnknownModel, "ViT-B-16"),
        (("RN50", "random"), UnsupportedModel, "ModifiedResNet"),
        (("mini", "nope"), WeightsError, "neither a known tag nor a file"),
        (("ViT-B-32", "trainer/src/clipweld/trainer/mini/mini.safetensors"), WeightsError, "could not be loaded"),
        (("mini", "LICENSE"), WeightsError, "could not be loaded"),
    ],
)
def test_unknown_and_unsupported_models_and_weights_are_refused(arguments, error, says):
    with pytest.raises(error, match=says) as caught:
        load_backbone(*arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "tag", "fetch", "give"),
    [
        ("ViT-B-16", "openai", "/ViT-B-16.pt where there is", "--model ViT-B-16-quickgelu --pretrained FILE"),
        (
            "ViT-B-16",
            "laion2b_s34b_b88k",
            "ViT-B-16-laion2B-s34B-b88K where",
            "--model ViT-B-16 --pretrained FILE",
        ),
    ],
)
def test_without_a_network_the_error_says_what_to_download(monkeypatch, name, tag, fetch, give):
    def offline(*_arguments, **_settings):
        raise OSError("Name or service not known")

    monkeypatch.setattr(open_clip, "create_model", offline)
    with pytest.raises(WeightsError, match="Name or service not known") as caught:
        load_backbone(name, tag)
    assert fetch in str(caught.value)
    assert give in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("attribute", "value", "says"), [("text_pool_type", "last", "EOT"), ("attn_mask", None, "not causal")]
)
def test_text_towers_with_other_pooling_or_masking_are_refused(mini, attribute, value, says):
    model = copy.deepcopy(mini.model)
    setattr(model, attribute, value)
    with pytest.raises(UnsupportedModel, match=says):
        check_supported(model, "odd")


@pytest.fixture
def quick(tmp_path):
    """The name of a registered model with the small CLIP's configuration and QuickGELU."""
    config = {**open_clip.get_model_config("mini"), "quick_gelu": True}
    file = tmp_path / "quick" / "mini-quickgelu.json"
    file.parent.mkdir()
    file.write_text(json.dumps(config))
    open_clip.add_model_config(file)
    yield file.stem
    open_clip.factory._MODEL_CONFIGS.pop(file.stem)
    open_clip.factory._MODEL_CONFIG_PATHS.remove(file)


@pytest.fixture
def torchscript(mini, tmp_path, monkeypatch):
    """Weights in the form that OpenAI published: a known TorchScript archive with three additional numbers."""
    model = copy.deepcopy(mini.model)
    del model.attn_mask
    for name in ("input_resolution", "context_length", "vocab_size"):
        if hasattr(model, name):
            delattr(model, name)
        model.register_buffer(name, torch.tensor(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing emits many warnings
        archive = torch.jit.trace_module(model, {"encode_image": torch.zeros(1, 3, 64, 64)}, check_trace=False)
    archive.save(str(tmp_path / "ViT.pt"))
    monkeypatch.setattr("clipweld.trainer.base.weights_file.OPENAI_SHA256", {sha256_of(tmp_path / "ViT.pt")})
    return str(tmp_path / "ViT.pt")


def test_openai_s_own_files_are_read(quick, torchscript, mini):
    assert load_backbone(quick, torchscript).fingerprint == mini.fingerprint


def test_weights_of_another_activation_are_refused(quick, torchscript, tmp_path):
    with pytest.raises(WeightsError, match="trained with QuickGELU, model mini has GELU; give --model mini-quickgelu"):
        load_backbone("mini", torchscript)
    shipped = tmp_path / "open_clip_model.safetensors"
    shutil.copy("trainer/src/clipweld/trainer/mini/mini.safetensors", shipped)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": open_clip.get_model_config("mini")}))
    assert load_backbone("mini", str(shipped))
    with pytest.raises(WeightsError, match=r"with GELU, model mini-quickgelu has QuickGELU; give --model mini$"):
        load_backbone(quick, str(shipped))


def test_the_hashes_of_openai_s_own_files_are_known():
    assert "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f" in OPENAI_SHA256  # ViT-B-16
    assert len(OPENAI_SHA256) == 9


def test_a_torchscript_archive_from_anyone_else_is_not_run(quick, torchscript, monkeypatch):
    monkeypatch.setattr("clipweld.trainer.base.weights_file.OPENAI_SHA256", OPENAI_SHA256)
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("it was run"))
    with pytest.raises(WeightsError, match="is a program, and this is none of OpenAI's own; give a checkpoint"):
        load_backbone(quick, torchscript)


class Bomb:
    """An object that creates a file when unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


@pytest.mark.parametrize("ending", ["pt", "bin", "pth", "ckpt", "npz", "npy", "safetensors"])
@pytest.mark.parametrize("layout", ["zip", "legacy", "pickle"])
def test_a_pickle_is_never_run(tmp_path, layout, ending):
    file, target = tmp_path / f"weights.{ending}", tmp_path / "run"
    if layout == "pickle":
        file.write_bytes(pickle.dumps({"state_dict": Bomb(target)}))
    else:
        torch.save({"state_dict": Bomb(target)}, file, _use_new_zipfile_serialization=layout == "zip")
    with pytest.raises(WeightsError, match="could not be loaded") as caught:
        load_backbone("mini", str(file))
    assert "\n" not in str(caught.value)
    assert not target.exists()


def test_compressed_and_expanded_tensors_are_refused_before_allocating_memory(mini, tmp_path):
    file, bomb = tmp_path / "weights.pt", tmp_path / "bomb.pt"
    torch.save({"positional_embedding": torch.zeros(4 << 20)}, file)
    with zipfile.ZipFile(file) as whole, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as smaller:
        for name in whole.namelist():
            smaller.writestr(name, whole.read(name))
    assert bomb.stat().st_size < file.stat().st_size / 100
    with pytest.raises(WeightsError, match="compressed or overlap"):
        load_backbone("mini", str(bomb))
    torch.save({"visual.positional_embedding": torch.zeros(1).expand(10**7, 10**4)}, file)
    with pytest.raises(WeightsError, match="is larger than the file"):
        load_backbone("mini", str(file))


def test_torch_checkpoints_with_a_state_dict_entry_are_read(mini, tmp_path):
    for zipped in (True, False):
        torch.save(
            {"state_dict": mini.model.state_dict()}, tmp_path / "weights.pt", _use_new_zipfile_serialization=zipped
        )
        assert load_backbone("mini", str(tmp_path / "weights.pt")).fingerprint == mini.fingerprint


@pytest.mark.parametrize("text", ["[" * 10**5, "{}", '{"model_cfg": 3}', "\xff"])
def test_an_invalid_configuration_beside_the_weights_is_refused_by_name(tmp_path, text):
    shutil.copy("trainer/src/clipweld/trainer/mini/mini.safetensors", tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(text, encoding="latin-1")
    with pytest.raises(WeightsError, match=r"open_clip_config\.json beside them can't be read"):
        load_backbone("mini", str(tmp_path / "open_clip_model.safetensors"))
