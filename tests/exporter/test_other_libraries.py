"""Files written for other libraries, loaded there by the line that we print, give our answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg

from clipweld.exporter.errors import CheckpointError, UnsupportedModel
from clipweld.exporter.release.checkpoints import save
from clipweld.exporter.release.out import check_out
from clipweld.trainer.adapters.adapter import load_adapter
from clipweld.trainer.adapters.merge import merge
from clipweld.trainer.base.backbone import encode_classes, load_backbone, with_weights
from clipweld.trainer.preprocessing import preprocessing
from clipweld.trainer.tasks import load_task

TEMPLATE = "an icon of a {}"
# Run after the printed line; sets ``predictions``, the index of the best label for every file of ``images``.
ASK = {
    "open_clip": """
import torch
from PIL import Image
pixels = torch.stack([preprocess(Image.open(file)) for file in images])
with torch.no_grad():
    text = model.eval().encode_text(tokenizer([template.format(label) for label in labels]), normalize=True)
    predictions = (model.encode_image(pixels, normalize=True) @ text.T).argmax(1).tolist()
""",
    "transformers": """
found = [classify(file, candidate_labels=labels, hypothesis_template=template) for file in images]
predictions = [labels.index(answers[0]["label"]) for answers in found]
""",
    "peft": """
import torch
from PIL import Image
opened = [Image.open(file).convert("RGB") for file in images]
inputs = processor(text=[template.format(label) for label in labels], images=opened, return_tensors="pt", padding=True)
with torch.no_grad():
    predictions = model.eval()(**inputs).logits_per_image.argmax(1).tolist()
""",
}


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    """The emoji task, and its test images as files."""
    task, folder = load_task("emoji"), tmp_path_factory.mktemp("emoji")
    files = []
    for number, (image, _) in enumerate(task.load("test")):
        files.append(str(folder / f"{number:03}.png"))
        image.convert("RGB").save(files[-1])
    return task, files


@pytest.fixture(scope="module")
def learned(adapters):
    return [load_adapter(adapters / "digits.safetensors")]


def predictions(backbone, adapters, emoji):
    """Return our predictions for the test images of emoji."""
    task, _ = emoji
    merged = with_weights(backbone, merge(backbone.model.state_dict(), adapters))
    pixels = torch.stack([backbone.preprocess(image.convert("RGB")) for image, _ in task.load("test")])
    text = encode_classes(merged, task.class_names, (TEMPLATE,))
    return (merged.model.encode_image(pixels, normalize=True) @ text.T).argmax(1)


def theirs(target, line, emoji, cwd):
    """Return another library's predictions, from a process that does not import ours."""
    task, files = emoji
    given = f"images, labels, template = {files!r}, {list(task.class_names)!r}, {TEMPLATE!r}\n"
    code = (
        f"{given}{line}\n{ASK[target]}\nimport json, sys\n"
        "print(json.dumps([predictions, [name for name in sys.modules if name.startswith('clipweld')]]))"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False, cwd=cwd, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found, ours = json.loads(done.stdout.splitlines()[-1])
    assert ours == []
    return torch.tensor(found)


def with_preprocessing(backbone, **changes):
    """Return the same model with a different preprocessing."""
    config = PreprocessCfg(**{**open_clip.get_model_preprocess_cfg(backbone.model), **changes})
    changed = with_weights(backbone, backbone.model.state_dict())
    open_clip.model.set_model_preprocess_cfg(changed.model, vars(config))
    names = ("mean", "std", "resize_mode", "interpolation")
    return replace(changed, preprocess=preprocessing(config), **{name: getattr(config, name) for name in names})


@torch.no_grad()
@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("open_clip", "merged"),
        ("open_clip", "merged.safetensors"),
        ("transformers", "it's merged"),
        ("peft", "lora"),
    ],
)
def test_the_printed_line_loads_a_model_that_gives_our_answers(target, name, mini, learned, emoji, tmp_path):
    ours = predictions(mini, learned, emoji)
    _, line = save(target, mini, learned, tmp_path / "new" / name)
    assert os.listdir(tmp_path) == ["new"]
    assert os.listdir(tmp_path / "new") == [name]
    found = theirs(target, line, emoji, tmp_path)
    labels = torch.tensor(emoji[0].load("test").labels)
    assert (ours == labels).float().mean() > 0.6
    # transformers resizes with torchvision, which differs from Pillow by up to a grey level: a near tie may change.
    assert (found != ours).sum() <= (0 if target == "open_clip" else 1)
    if target == "open_clip":
        assert torch.equal(found, ours)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("mode", ["squash", "longest"])
@pytest.mark.parametrize(
    ("target", "name"), [("open_clip", "merged"), ("open_clip", "merged.safetensors"), ("transformers", "merged")]
)
def test_the_preprocessing_is_written_too(target, name, mode, mini, emoji, tmp_path):
    other = with_preprocessing(
        mini, mean=(0.4, 0.5, 0.6), std=(0.3, 0.3, 0.2), resize_mode=mode, interpolation="bilinear"
    )
    task, _ = emoji
    wide, files = [], []
    for number in range(12):  # wide images, for which resize modes differ
        image = task.load("test")[number][0].convert("RGB").resize((150, 70 + 5 * number))
        wide.append(image)
        files.append(str(tmp_path / f"{number}.png"))
        image.save(files[-1])
    _, line = save(target, other, [], tmp_path / name)
    text = encode_classes(other, task.class_names, (TEMPLATE,))
    pixels = torch.stack([other.preprocess(image) for image in wide])
    ours = (other.model.encode_image(pixels, normalize=True) @ text.T).argmax(1)
    assert (theirs(target, line, (task, files), tmp_path) != ours).sum() <= (0 if target == "open_clip" else 1)


@pytest.mark.slow
def test_transformers_tokenizes_prompts_as_we_do(mini, tmp_path):
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    save("transformers", mini, [], tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.model_max_length == mini.context_length
    prompts = ["a photo of a {}.".replace("{}", c) for name in ("emoji", "flags") for c in load_task(name).class_names]
    prompts += ["Côte d'Ivoire", "it's  a\tTEST, of 1234 numbers!", "日本語 emoji 🙂", "a " * 40]
    ours = mini.tokenizer(prompts)
    found = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
    kept = found["attention_mask"].bool()
    assert torch.equal(found["input_ids"][kept], ours[kept])
    assert torch.equal(kept.sum(1), ours.argmax(1) + 1)
    plain = Tokenizer.from_file(str(tmp_path / "merged" / "tokenizer.json"))
    assert [plain.encode(prompt).ids for prompt in prompts[:50]] == [
        row[: row.argmax() + 1].tolist() for row in ours[:50]
    ]


def test_preprocessing_written_for_open_clip_is_read_back(mini, tmp_path):
    other = with_preprocessing(mini, mean=(0.5, 0.5, 0.5), resize_mode="squash")
    save("open_clip", other, [], tmp_path / "merged")
    found = load_backbone("mini", str(tmp_path / "merged" / "open_clip_model.safetensors"))
    assert (found.mean, found.resize_mode, found.notes) == ((0.5, 0.5, 0.5), "squash", ())
    assert found.fingerprint == mini.fingerprint


@pytest.mark.parametrize("target", ["open_clip", "transformers", "peft"])
def test_permissions_of_written_files_follow_the_umask(target, mini, learned, tmp_path):
    before = os.umask(0o022)
    try:
        save(target, mini, learned, tmp_path / "merged")
    finally:
        os.umask(before)
    for folder, _, files in os.walk(tmp_path / "merged"):
        assert os.stat(folder).st_mode & 0o777 == 0o755
        for file in files:
            assert os.stat(os.path.join(folder, file)).st_mode & 0o777 == 0o644, file


@pytest.mark.parametrize("target", ["open_clip", "transformers", "peft"])
def test_a_failed_write_leaves_nothing(target, mini, learned, tmp_path, monkeypatch):
    def full(*_arguments, **_settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("clipweld.exporter.release.checkpoints.save_file", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save(target, mini, learned, tmp_path / "new" / "merged")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("target", "name", "says"),
    [
        ("open_clip", "file.safetensors", "is there already"),
        ("open_clip", "full", "not empty"),
        ("open_clip", "link", "is there already"),
        ("open_clip", "new.pt", "a file that ends in .safetensors; give --out"),
        ("open_clip", "new.SAFETENSORS", "a file that ends in .safetensors; give --out"),
        ("transformers", "full", "not empty"),
        ("transformers", "new.safetensors", "--to transformers writes a folder; give --out"),
        ("peft", "file.safetensors/lora", "is no folder"),
        ("peft", "/", "it has no name"),
    ],
)
def test_an_output_path_that_exists_or_does_not_fit_is_refused(target, name, says, tmp_path):
    (tmp_path / "file.safetensors").write_bytes(b"mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to("gone")
    with pytest.raises(CheckpointError, match=says):
        check_out(target, tmp_path / name)
    check_out(target, tmp_path / "new" / "merged")
    assert (tmp_path / "file.safetensors").read_bytes() == b"mine"


def test_a_folder_created_meanwhile_is_not_replaced(mini, tmp_path, monkeypatch):
    def fill(*_arguments, **_settings):
        (tmp_path / "merged").mkdir()
        (tmp_path / "merged" / "notes.txt").write_text("mine")

    monkeypatch.setattr(open_clip, "load_checkpoint", fill)
    with pytest.raises(CheckpointError, match="not empty"):
        save("open_clip", mini, [], tmp_path / "merged")
    assert os.listdir(tmp_path) == ["merged"]
    assert os.listdir(tmp_path / "merged") == ["notes.txt"]


def test_padding_with_a_colour_is_refused_for_transformers(mini, tmp_path):
    other = with_preprocessing(mini, resize_mode="longest", fill_color=128)
    with pytest.raises(UnsupportedModel, match="colour 128"):
        save("transformers", other, [], tmp_path / "merged")
    assert os.listdir(tmp_path) == []
