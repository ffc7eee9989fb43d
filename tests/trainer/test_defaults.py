"""Settings that nobody gave: images per class, steps, and the losses that protect what other tasks use."""

import json
from collections import Counter
from dataclasses import asdict, replace

import pytest
import torch
from PIL import Image

from clipweld.trainer import commands
from clipweld.trainer.base import batches as batches_module
from clipweld.trainer.base.batches import Batches
from clipweld.trainer.cli import main
from clipweld.trainer.config import TrainConfig, of_method, shots_of, train_config, with_steps
from clipweld.trainer.errors import ConfigError, UnreadableImage
from clipweld.trainer.learning.fit import for_tasks, one_device
from clipweld.trainer.tasks import load_task


@pytest.fixture(scope="module")
def bolts(tmp_path_factory):
    """A folder with 20 images in one class and 12 in the other."""
    folder = tmp_path_factory.mktemp("photos") / "bolts"
    for name, count in (("hex bolt", 20), ("wing nut", 12)):
        for split, some in (("train", count), ("test", 2)):
            (folder / split / name).mkdir(parents=True)
            for number in range(some):
                image = Image.new("RGB", (64, 64), (number * 9, 90, 40 if name == "hex bolt" else 200))
                image.save(folder / split / name / f"{number}.png")
    return folder


@pytest.mark.parametrize(
    ("model", "is_folder", "given", "expected"),
    [("mini", False, None, 16), ("ViT-B-16", False, None, 5), ("mini", True, None, 0), ("ViT-B-16", True, None, 0),
     ("mini", True, 3, 3), ("ViT-B-16", False, 0, 0)],
)  # fmt: skip
def test_all_images_of_a_folder_and_few_of_a_benchmark_task(model, is_folder, given, expected):
    assert shots_of(train_config(model, shots=given), model, is_folder=is_folder) == expected


@pytest.mark.parametrize(
    ("model", "images", "devices", "expected"),
    [("mini", 160, 1, 300), ("ViT-B-16", 500, 1, 500), ("ViT-B-16", 10_000, 1, 1250), ("ViT-B-16", 10_000, 2, 625),
     ("mini", 10**6, 1, 5000)],
)  # fmt: skip
def test_many_images_are_seen_four_times_within_a_bound(model, images, devices, expected):
    assert with_steps(train_config(model), model, images, devices).iterations == expected
    assert with_steps(train_config(model, iterations=7), model, images, devices).iterations == 7


def test_settings_of_several_tasks_learned_at_once(mini, bolts):
    fabric = one_device(mini)
    folder, digits = load_task(str(bolts)), load_task("digits")
    alone = for_tasks(train_config("mini"), [folder], mini, fabric)
    assert (alone.shots, alone.iterations) == (0, 300)
    both = for_tasks(train_config("mini", "joint"), [folder, digits], mini, fabric)
    assert both.shots is None
    assert [len(Batches(task, mini, both)) for task in (folder, digits)] == [32, 160]
    given = for_tasks(train_config("mini", shots=5, iterations=9), [folder, digits], mini, fabric)
    assert (given.shots, given.iterations) == (5, 9)


def test_fit_prints_how_many_images_it_learns_from(bolts, tmp_path, capsys):
    quick = ["--model", "mini", "--adapters", str(tmp_path), "--iterations", "1", "--batch-size", "4", "--json"]
    main(["fit", "--task", str(bolts), *quick, "--dry-run"])
    assert "bolts: 32 of 32 training images, 1 steps of 4" in capsys.readouterr().err
    main(["fit", "--task", str(bolts), *quick, "--shots", "3"])
    said = capsys.readouterr()
    assert "bolts: 6 of 32 training images, 1 steps of 4" in said.err
    moved = json.loads(said.out)["moved"]
    assert moved.keys() == {"words_mean", "words_p95", "images_kl", "names_mean"}


def test_images_that_are_not_kept_are_read_ahead_and_are_the_same(mini, bolts, monkeypatch):
    task, config = load_task(str(bolts)), train_config("mini", batch_size=8)
    kept = Batches(task, mini, config)
    monkeypatch.setattr(batches_module, "KEPT_BYTES", 0)
    read = Batches(task, mini, config)
    assert (kept.in_memory, read.in_memory) == (True, False)
    for number in (1, 2, 3, 7, 1):  # a resumed run starts anywhere
        one, other = kept[number], read[number]
        assert one.indices == other.indices
        assert torch.equal(one.pixels, other.pixels)


def test_balanced_batches_show_all_classes_equally_often(mini):
    task = load_task("clipart")  # 10 to 91 images per class
    balanced = Batches(task, mini, train_config("mini", shots=0, balance=True))
    drawn = [index for number in range(1, 15) for index in balanced[number].indices]
    labels = Counter(task.load("train").labels[index] for index in drawn)
    assert len(labels) == 8
    assert max(labels.values()) - min(labels.values()) <= 2 * len(task.class_names)
    assert max(Counter(drawn).values()) > min(Counter(drawn).values())  # small classes repeat


@pytest.mark.parametrize("change", ["random_crop", "random_flip", "color_jitter"])
def test_augmented_images_differ_in_every_epoch_and_are_the_same_when_resumed(mini, change):
    task, plain = load_task("fashion"), train_config("mini", shots=2, batch_size=8)
    augmented = Batches(task, mini, replace(plain, **{change: True}))
    assert not augmented.unchanging
    before = torch.random.get_rng_state()
    one, again = augmented[3], augmented[3]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(one.pixels, again.pixels)
    original = Batches(task, mini, plain)[3]
    assert original.indices == one.indices
    assert one.pixels.shape == original.pixels.shape
    assert not torch.equal(one.pixels, original.pixels)
    later = next(batch for number in range(5, 9) if set((batch := augmented[number]).indices) & set(one.indices))
    (index, *_) = set(later.indices) & set(one.indices)
    epochs = [batch.pixels[batch.indices.index(index)] for batch in (one, later)]
    if change != "random_flip":  # which may fall alike
        assert not torch.equal(*epochs)


def test_a_flip_mirrors_about_half_of_the_images(mini):
    task, plain = load_task("fashion"), train_config("mini")
    flipped, original = (Batches(task, mini, c)[1].pixels for c in (replace(plain, random_flip=True), plain))
    mirrored = [torch.equal(one, other.flip(-1)) for one, other in zip(flipped, original, strict=True)]
    same = [torch.equal(one, other) for one, other in zip(flipped, original, strict=True)]
    assert all(a != b for a, b in zip(mirrored, same, strict=True))
    assert 8 <= sum(mirrored) <= 24


def test_color_jitter_stays_within_the_colours_of_an_image(mini, bolts):
    task = load_task(str(bolts))
    pixels = Batches(task, mini, train_config("mini", color_jitter=True))[1].pixels
    mean, std = (
        torch.tensor(own)[:, None, None] for own in (mini.model.visual.image_mean, mini.model.visual.image_std)
    )
    raw = pixels * std + mean
    assert raw.min() >= -1e-5
    assert raw.max() <= 1 + 1e-5


def test_an_unreadable_image_that_is_read_ahead_is_named_when_it_is_needed(mini, bolts, tmp_path, monkeypatch):
    monkeypatch.setattr(batches_module, "KEPT_BYTES", 0)
    task = load_task(str(bolts))

    def broken(split):
        images = task.load(split)
        return replace(images, open=lambda index: images.open(index) if index else Image.open(tmp_path / "gone.png"))

    batches = Batches(replace(task, load=broken), mini, train_config("mini", batch_size=8))
    first = next(number for number in range(1, 5) if 0 in batches._chosen(number)[1])
    for number in range(1, first):
        assert batches[number].pixels.shape == (8, 3, 64, 64)
    with pytest.raises(UnreadableImage, match=r"image .*hex bolt"):
        batches[first]


@pytest.mark.parametrize("model", ["mini", "ViT-B-16", "ViT-L-14"])
def test_every_model_protects_by_default(model):
    config = train_config(model)
    assert (config.anchor_weight, config.drift_weight) == (4.0, 1600.0)


@pytest.mark.parametrize("model", ["mini", "ViT-B-16"])
def test_published_settings_are_the_papers_for_every_model(model):
    expected = TrainConfig(
        rank=12, k_active=8, k_merge=4, alpha=1.0, dropout=0.2, router="fixed", router_per="layer", route_on="first",
        shots=5, iterations=500, batch_size=32, lr=2e-3, consolidate=0.0, weight_decay=1e-2, ago="sum", ago_weight=0.1,
        drift_weight=0.0, anchor_weight=0.0, seed=42,
    )  # fmt: skip
    assert train_config(model, published=True) == expected
    given = commands.parse(["fit", "--task", "digits", "--lr", "0.1", "--published", "--model", model])
    assert given.train == replace(expected, lr=0.1)
    assert commands.parse(["sequence", "--published", "--model", model, "--tasks", "digits", "--out", "x"]).train == (
        expected
    )


@pytest.mark.parametrize("value", ["=true", "=yes", "=Y", "=1", "=t", "=no", ""])
def test_the_published_flag_and_its_settings_agree(value):
    given = commands.parse(["fit", "--task", "digits", "--model", "mini", f"--published{value}"])
    assert given.train == train_config("mini", published=given.published)
    assert given.published == (value != "=no")


def test_published_settings_are_those_of_the_pool():
    with pytest.raises(ConfigError, match="--method pool, not lora"):
        commands.parse(["sequence", "--published", "--method", "lora", "--tasks", "digits", "--out", "x"])


def test_lora_takes_the_losses_by_their_flags():
    plain = train_config("mini", "lora")
    assert (plain.anchor_weight, plain.drift_weight, plain.k_merge) == (0.0, 0.0, 12)
    command = ["sequence", "--method", "lora", "--model", "mini", "--tasks", "digits", "--out", "x"]
    given = commands.parse([*command, "--anchor-weight", "4", "--drift-weight", "1600"]).train
    assert of_method(given, "lora") == replace(plain, anchor_weight=4.0, drift_weight=1600.0)
    assert asdict(of_method(given, "joint"))["anchor_weight"] == 0.0
