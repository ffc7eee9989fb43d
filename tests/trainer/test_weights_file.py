"""Files given as weights: their format, their contents, and the preprocessing configured beside them."""

import argparse
import copy
import gzip
import io
import json
import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from clipweld.trainer.adapters.adapter import save_adapter
from clipweld.trainer.base.backbone import check_preprocessing, load_backbone
from clipweld.trainer.cli import main
from clipweld.trainer.config import train_config
from clipweld.trainer.errors import UnsupportedModel, WeightsError, WrongBase
from clipweld.trainer.learning.fit import fit

SHIPPED = Path("trainer/src/clipweld/trainer/mini/mini.safetensors")


def refused(file, model="mini"):
    """Return the one-line error with which a file is refused."""
    with pytest.raises(WeightsError) as caught:
        load_backbone(model, str(file))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def archive(file, kind):
    with kind(file, "w") as opened:
        opened.add(SHIPPED) if kind is tarfile.open else opened.write(SHIPPED)


FOREIGN = {
    "pointer.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", "Git LFS.*git lfs pull"),
    "annex.pt": (b"/annex/objects/SHA256E-s1--ab.pt\n", "git annex get"),
    "page.pt": (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "HTML page"),
    "answer.pt": (b"<?xml version='1.0'?><Error/>", "XML"),
    "empty.safetensors": (b"", "it is empty"),
    "blank.safetensors": (b"  \n", "plain text"),
    "notes.pt": ("Notiz: die Gewichte sind größer".encode(), "plain text"),
    "config.json": (b'{"model_cfg": {}}', "it is JSON"),
    "model.safetensors.index.json": (b'{"weight_map": {}}', "parts of a checkpoint"),
    "weights.pt.gz": (gzip.compress(b"x"), r"compressed \(gzip\); unpack it"),
    "weights.h5": (b"\x89HDF\r\n\x1a\n" + bytes(50), "HDF5"),
    "weights.npy": (b"\x93NUMPY\x01\x00" + bytes(50), "NumPy"),
    "graph.onnx": (b"\x08\x08\x12\x07pytorch\x1a\x05" + bytes(90), "ONNX"),
    "model.tflite": (b"\x1c\x00\x00\x00TFL3" + bytes(90), "TensorFlow"),
    "model.gguf": (b"GGUF\x03\x00\x00\x00" + bytes(90), "GGUF"),
    "picture.pt": (b"\x89PNG\r\n\x1a\n" + bytes(90), "image"),
    "noise.pt": (b"\x07\xfe\x01\x02" * 20, "begins with 07 fe 01 02"),
    "header.safetensors": ((10**6).to_bytes(8, "little") + b'{"a":', "cut off: 13 bytes"),
    "old.zip.pt": (b"PK\x03\x04" + bytes(100), "zip archive, cut off"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_of_another_format_is_refused_and_the_format_named(name, tmp_path):
    content, says = FOREIGN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=f"could not be loaded: .*{says}") as caught:
        load_backbone("mini", str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_archives_and_arrays_are_recognised_under_any_suffix(tmp_path):
    for kind, says in (
        (tarfile.open, "tar archive; unpack it"),
        (zipfile.ZipFile, "zip archive, and torch.save did not"),
    ):
        archive(tmp_path / "weights.bin", kind)
        assert says in refused(tmp_path / "weights.bin")
    np.savez(tmp_path / "weights.npz", a=np.zeros(3))
    (tmp_path / "weights.npz").rename(tmp_path / "weights.pt")
    assert "arrays of NumPy" in refused(tmp_path / "weights.pt")


def test_a_truncated_checkpoint_is_refused(tmp_path, mini):
    torch.save(mini.model.state_dict(), tmp_path / "weights.pt")
    for file in (SHIPPED, tmp_path / "weights.pt"):
        cut = tmp_path / f"cut{file.suffix}"
        cut.write_bytes(file.read_bytes()[:-5000])
        assert "cut off" in refused(cut)


def test_anything_but_a_regular_file_is_refused_with_the_reason(tmp_path):
    (tmp_path / "link.pt").symlink_to("gone.pt")
    assert "a link to gone.pt, which is not there" in refused(tmp_path / "link.pt")
    os.mkfifo(tmp_path / "pipe.pt")
    assert "no regular file" in refused(tmp_path / "pipe.pt")
    (tmp_path / "loop.pt").symlink_to("loop.pt")
    assert "could not be loaded" in refused(tmp_path / "loop.pt")
    (tmp_path / "folder").mkdir()
    assert "it is a folder; give a file" in refused(tmp_path / "folder")
    shutil.copy(SHIPPED, tmp_path / "folder" / "open_clip_model.safetensors")
    assert f"--pretrained {tmp_path / 'folder' / 'open_clip_model.safetensors'}" in refused(tmp_path / "folder")
    assert f"near it: {tmp_path / 'link.pt'}" in refused(tmp_path / "lnk.pt")
    assert "fetch it, and give the file" in refused("https://example.org/weights.pt")
    for blank in ("", " "):
        assert "leave out --pretrained" in refused(blank)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_read_permission_is_reported(tmp_path):
    shutil.copy(SHIPPED, tmp_path / "weights.safetensors")
    (tmp_path / "weights.safetensors").chmod(0)
    assert "can't be read (Permission denied)" in refused(tmp_path / "weights.safetensors")


def test_tags_are_understood_in_any_case_and_the_right_model_is_suggested(monkeypatch):
    monkeypatch.setattr(open_clip, "create_model", lambda *_, **given: pytest.fail(given["pretrained"]))
    with pytest.raises(pytest.fail.Exception, match=r"^laion2b_s34b_b79k$"):
        load_backbone("ViT-B-32", "LAION2B-s34b-b79k")
    assert "--model ViT-L-14 --pretrained laion2b_s32b_b82k" in refused("laion/CLIP-ViT-L-14-laion2B-s32B-b82K")


def test_an_unsupported_model_is_refused_before_its_weights_are_downloaded(monkeypatch):
    monkeypatch.setattr(open_clip, "create_model", lambda *_, **__: pytest.fail("it was built"))
    for name in ("RN50", "roberta-ViT-B-32", "ViT-B-16-SigLIP", "coca_ViT-B-32", "convnext_base"):
        with pytest.raises(UnsupportedModel, match=f"model {name}: "):
            load_backbone(name)


@pytest.mark.parametrize("ending", ["pt", "bin", "safetensors", "npz", "weights", ""])
@pytest.mark.parametrize("layout", ["safetensors", "zip", "legacy"])
def test_a_checkpoint_is_recognised_by_its_bytes_under_any_suffix(layout, ending, mini, tmp_path):
    file = tmp_path / f"file.{ending}"
    if layout == "safetensors":
        save_file(mini.model.state_dict(), file)
    else:
        torch.save(mini.model.state_dict(), file, _use_new_zipfile_serialization=layout == "zip")
    assert load_backbone("mini", str(file)).fingerprint == mini.fingerprint


@pytest.mark.parametrize(
    ("prefix", "says"),
    [
        ("module.", "without module."),
        ("_orig_mod.", "without _orig_mod."),
        ("model.", "without model."),
        ("model._orig_mod.module.", "without _orig_mod., model., module."),
    ],
)
def test_prefixes_of_wrappers_are_removed_with_a_note(prefix, says, mini, tmp_path):
    state = {f"{prefix}{name}": tensor for name, tensor in mini.model.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3, "optimizer": {"lr": 0.1}}, tmp_path / "last.ckpt")
    found = load_backbone("mini", str(tmp_path / "last.ckpt"))
    assert found.fingerprint == mini.fingerprint
    assert says in found.notes[0]


def test_weights_of_a_compiled_tower_are_read(mini, tmp_path):
    state = {name.replace("visual.", "visual._orig_mod.", 1): t for name, t in mini.model.state_dict().items()}
    save_file(state, tmp_path / "compiled.safetensors")
    assert load_backbone("mini", str(tmp_path / "compiled.safetensors")).fingerprint == mini.fingerprint


def test_a_checkpoint_with_other_objects_is_refused_with_advice(mini, tmp_path):
    state = {"state_dict": mini.model.state_dict(), "args": argparse.Namespace(lr=1)}
    torch.save(state, tmp_path / "objects.pt")
    assert "more than tensors: argparse.Namespace; " in refused(tmp_path / "objects.pt")
    assert "torch.save(model.state_dict(), FILE)" in refused(tmp_path / "objects.pt")
    torch.save(mini.model, tmp_path / "whole.pt")
    assert "open_clip" in refused(tmp_path / "whole.pt")


def test_entries_that_are_not_weights_are_refused_by_name(mini, tmp_path):
    file, state = tmp_path / "odd.pt", mini.model.state_dict()
    for content, says in (
        ({**state, "epoch": 3}, "entry 'epoch' is of type int, expected a tensor"),
        ({"model": state, "module": state}, "weights twice, in 'model' and 'module'"),
        ({**state, "module.logit_scale": state["logit_scale"]}, "tensors twice, with and without module"),
        ([state["logit_scale"]], "holds a list, expected a dictionary"),
        (state["logit_scale"], "holds a Tensor, expected a dictionary"),
        ({}, "holds no tensors"),
        ({3: state["logit_scale"]}, "an entry 3, expected tensors by their names"),
        ({**state, "logit_scale": torch.tensor(4)}, "is torch.int64, expected floating-point"),
    ):
        torch.save(content, file)
        assert says in refused(file)


def test_checkpoints_of_other_libraries_are_recognised_and_refused(mini, adapters, tmp_path):
    from clipweld.exporter.release.checkpoints import save_peft, save_transformers
    from clipweld.trainer.adapters.adapter import load_adapter

    adapter = adapters / "digits.safetensors"
    assert "it is an adapter of clipweld; adapters go into the folder of --adapters" in refused(adapter)
    save_transformers(mini, [], tmp_path / "other")
    assert "it is a checkpoint of transformers" in refused(tmp_path / "other" / "model.safetensors")
    save_peft(mini, [load_adapter(adapter)], tmp_path / "lora")
    assert "it is a LoRA, without the weights" in refused(tmp_path / "lora" / "adapter_model.safetensors")
    with pytest.raises(WeightsError, match="it fits mini: give --model mini"):
        load_backbone("ViT-B-32", str(SHIPPED))


def test_tensors_of_other_shapes_are_refused_and_not_resized(mini, tmp_path):
    state = load_file(SHIPPED)
    state["visual.positional_embedding"] = torch.randn(26, 192)
    state["positional_embedding"] = torch.randn(77, 128)
    save_file(state, tmp_path / "larger.safetensors")
    said = refused(tmp_path / "larger.safetensors")
    assert "visual.positional_embedding (26, 192), expected (17, 192)" in said
    assert "positional_embedding (77, 128), expected (24, 128)" in said


def test_missing_and_unexpected_tensors_are_counted_and_named(tmp_path):
    state = load_file(SHIPPED)
    del state["ln_final.weight"], state["visual.proj"]
    save_file(state | {"head.weight": torch.zeros(3)}, tmp_path / "odd.safetensors")
    said = refused(tmp_path / "odd.safetensors")
    assert "1 of its tensors have no place in mini (head.weight)" in said
    assert "2 of the tensors of mini are missing in it (" in said


def test_scalars_saved_as_tensors_of_one_element_are_read(mini, tmp_path):
    state = load_file(SHIPPED)
    save_file(state | {"logit_scale": state["logit_scale"].reshape(1)}, tmp_path / "listed.safetensors")
    assert load_backbone("mini", str(tmp_path / "listed.safetensors")).fingerprint == mini.fingerprint


@pytest.fixture
def beside(tmp_path):
    """A function that writes a configuration beside a copy of the shipped weights and returns the copy."""

    def write(config):
        (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
        return str(shutil.copy(SHIPPED, tmp_path / "weights.safetensors"))

    return write


HALF = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bilinear", "resize_mode": "squash"}


def test_the_preprocessing_configured_beside_the_weights_is_used(beside, mini, samples_image):
    found = load_backbone("mini", beside({"preprocess_cfg": {**HALF, "size": 64}}))
    assert (found.mean, found.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert (found.interpolation, found.resize_mode, found.notes) == ("bilinear", "squash", ())
    theirs = open_clip.image_transform(64, False, (0.5,) * 3, (0.5,) * 3, "squash", "bilinear")
    torch.testing.assert_close(found.preprocess(samples_image), theirs(samples_image))
    assert found.fingerprint == mini.fingerprint


@pytest.fixture
def samples_image(digits):
    return digits.load("test")[0][0].convert("RGB").resize((90, 70))


@pytest.mark.slow
def test_without_a_configuration_openais_preprocessing_is_used_with_a_note(mini, tmp_path, capsys):
    file = shutil.copy(SHIPPED, tmp_path / "weights.safetensors")
    found = load_backbone("mini", str(file))
    assert found.mean == mini.mean
    assert "prepared as for OpenAI's weights" in found.notes[0]
    assert mini.notes == ()
    (tmp_path / "none").mkdir()
    main(
        [
            "evaluate",
            "--model",
            "mini",
            "--pretrained",
            str(file),
            "--tasks",
            "digits",
            "--adapters",
            str(tmp_path / "none"),
        ]
    )
    assert "prepared as for OpenAI's weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"preprocess_cfg": {"mean": [0.5, 0.5]}}, "can't be read"),
        ({"preprocess_cfg": {"std": [0.5, 0.0, 0.5]}}, "can't be read"),
        ({"preprocess_cfg": {"resize_mode": "stretch"}}, "can't be read"),
        ({"preprocess_cfg": {"interpolation": "nearest"}}, "can't be read"),
        ({"preprocess_cfg": []}, "can't be read"),
        ({"preprocess_cfg": {"size": 224}}, "is for images of 224 pixels, model mini takes 64"),
        ({"model_cfg": {"vision_cfg": {"head_width": 32}}}, "vision_cfg.head_width 32, model mini has 64"),
        ({"model_cfg": {"text_cfg": {"heads": 2}}}, "text_cfg.heads 2, model mini has 4"),
    ],
)
def test_a_configuration_that_contradicts_the_model_is_refused(config, says, beside):
    assert says in refused(beside(config))


def test_an_adapter_records_its_preprocessing_and_refuses_another(beside, digits, fitted, mini, tmp_path):
    assert "preprocessing" not in fitted.adapter.config
    half = load_backbone("mini", beside({"preprocess_cfg": HALF}))
    config = train_config("mini", iterations=1, shots=1, batch_size=4, anchor_weight=0.0, drift_weight=0.0)
    adapter = fit(digits, half, [], config, test_on=[]).adapter
    assert adapter.config["preprocessing"] == "mean 0.5 0.5 0.5, std 0.5 0.5 0.5, bilinear, squash"
    check_preprocessing(half, [adapter])
    check_preprocessing(mini, [fitted.adapter])
    with pytest.raises(WrongBase, match=r"prepared with mean 0\.5 .*; these weights have mean 0\.48.*, shortest"):
        check_preprocessing(mini, [adapter])
    with pytest.raises(WrongBase, match=r"prepared with mean 0\.48.*; these weights have mean 0\.5 "):
        check_preprocessing(half, [fitted.adapter])
    save_adapter(adapter, tmp_path / "adapters" / "digits.safetensors")
    shutil.copy(SHIPPED, tmp_path / "adapters" / "bare.weights")
    with pytest.raises(SystemExit):
        main(["evaluate", "--tasks", "digits", "--adapters", str(tmp_path / "adapters"),
              "--pretrained", str(tmp_path / "adapters" / "bare.weights")])  # fmt: skip


def test_a_configuration_may_be_partial(beside, mini):
    for config in ({"model_cfg": {"quick_gelu": False}}, {"model_cfg": {"vision_cfg": {"head_width": 64}}}):
        assert load_backbone("mini", beside(config)).fingerprint == mini.fingerprint


def test_the_advice_for_a_tag_includes_its_preprocessing(monkeypatch, beside):
    def offline(*_arguments, **_settings):
        raise OSError("Name or service not known")

    with monkeypatch.context() as patch:
        patch.setattr(open_clip, "create_model", offline)
        with pytest.raises(WeightsError, match=r"beside it a file open_clip_config\.json with") as caught:
            load_backbone("ViT-L-14", "laion2b_s32b_b82k")
        with pytest.raises(WeightsError) as plain:
            load_backbone("ViT-B-32", "laion2b_s34b_b79k")
    assert "open_clip_config" not in str(plain.value)
    advised = str(caught.value).partition("open_clip_config.json with ")[2].partition(", then give")[0]
    assert load_backbone("mini", beside(json.loads(advised))).mean == (0.5, 0.5, 0.5)


def test_weights_in_openai_s_layout_require_quick_gelu(mini, tmp_path):
    extras = {name: torch.tensor(1) for name in ("input_resolution", "context_length", "vocab_size")}
    torch.save(mini.model.state_dict() | extras, tmp_path / "openai.pt")
    assert "were trained with QuickGELU, model mini has GELU" in refused(tmp_path / "openai.pt")


def test_a_damaged_pickle_raises_no_other_error(tmp_path, mini):
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(3), "b": copy.deepcopy(mini.mean)}, buffer, _use_new_zipfile_serialization=False)
    whole, random = buffer.getvalue(), np.random.default_rng(0)
    for _ in range(40):
        content = bytearray(whole)
        content[int(random.integers(2, len(content)))] = int(random.integers(256))
        (tmp_path / "damaged.pt").write_bytes(content)
        refused(tmp_path / "damaged.pt")
