"""The recipe's functions, without a network: cleaning, holding out, drawing, augmentation, loss, training."""

import json
import random
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from evidence.mini_recipe import augment, captions, drawing, muon, sources, tasks, text, train, unseen, wad
from evidence.mini_recipe.pairs import Pair, load, save, without_repeats

MODEL_CFG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 64, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 24, "vocab_size": train.VOCABULARY, "width": 32, "heads": 2, "layers": 1},
}


def square(colour: tuple[int, int, int], side: int = 40) -> np.ndarray:
    """Return a coloured rectangle as RGBA, uint8 (64, 64, 4)."""
    image = drawing.centre_in_square(Image.new("RGBA", (side, 30), (*colour, 255)))
    assert image is not None
    return image


@pytest.fixture
def pairs() -> list[Pair]:
    colours = {"red": (220, 20, 20), "green": (20, 200, 40), "blue": (30, 30, 230), "white": (240, 240, 240)}
    kinds = ("emoji", "clipart", "icon", "glyph")
    return [
        Pair("synthetic", kinds[index % 4], (f"{name} thing",), ("thing",) if index % 2 else (), square(colour, side))
        for index, (name, colour) in enumerate(colours.items())
        for side in (20, 40)
    ]


def test_clean_title_keeps_only_words_of_the_dictionary():
    assert captions.clean_title("virus_andreas_nilsson_01", {"virus", "car"}) == "virus"
    assert captions.clean_title("01_b_x", {"virus", "b"}) == ""


def test_clean_icon_name_drops_styles_and_refuses_combined_icons_brands_and_flags():
    words = {"coffee", "cup", "account", "plus", "flag", "brand", "star"}
    assert captions.clean_icon_name("coffee-cup-outline-2", words) == "coffee cup"
    assert captions.clean_icon_name("star", words) == "star"
    for name in ("account-plus", "flag-2", "brand-coffee", "unknownword"):
        assert captions.clean_icon_name(name, words) == ""


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        (["animals", "big_cats"], ("animal", "big cat")),
        (["recreation", "sports"], ("recreation", "sport")),
        (["signs_and_symbols", "weather"], ("sign", "weather")),
        (["FoodDrinks"], ("food",)),
        (["computer", "icons", "flat-theme"], ("computer",)),
    ],
)
def test_folder_categories_are_plain_words(folders, words):
    assert captions.folder_categories(folders) == words


def test_held_out_concept_is_held_out_in_every_spelling():
    held_out = captions.HeldOut(["BACTRIAN CAMEL", "two red dice", "berries"])
    for name in ("bactrian-camel", "Bactrian Camels", "two_red_dice", "berry"):
        assert name in held_out
    for name in ("camel", "dice", "", "red dice"):
        assert name not in held_out


def test_flags_are_recognised_in_names_and_paths():
    assert captions.is_flag("signs_and_symbols/flags/europe/france.png")
    assert captions.is_flag("flag-for-peru")
    assert not captions.is_flag("camel")


def test_square_is_trimmed_centred_and_keeps_its_margin():
    canvas = Image.new("RGBA", (300, 200))
    canvas.paste((255, 0, 0, 255), (250, 20, 290, 40))
    alpha = drawing.centre_in_square(canvas)[..., 3]
    rows, columns = np.where(alpha > 128)
    assert (columns.min(), columns.max()) == (2, 61)
    assert (rows.min(), rows.max()) == (17, 46)
    assert drawing.centre_in_square(Image.new("RGBA", (10, 10))) is None


def test_nearest_equals_the_distances_written_out():
    rng = np.random.default_rng(0)
    queries, keys = (rng.uniform(0, 255, (count, 768)).astype(np.float32) for count in (5, 7))
    index, distance = drawing.nearest(queries, keys)
    plain = np.sqrt(((queries[:, None] - keys[None]) ** 2).mean(axis=2))
    np.testing.assert_array_equal(index, plain.argmin(axis=1))
    np.testing.assert_allclose(distance, plain.min(axis=1), rtol=1e-3)


def test_duplicates_and_pictures_similar_to_a_task_s_are_dropped(pairs):
    red = drawing.on_white(pairs[0].image[None]).astype(np.uint8)
    kept = without_repeats([*pairs, pairs[3]], red)
    assert [pair.image.tobytes() for pair in kept] == [pair.image.tobytes() for pair in pairs[1:]]


def test_pairs_survive_saving(pairs, tmp_path):
    save(pairs, tmp_path / "pairs.npz")
    for before, after in zip(pairs, load(tmp_path / "pairs.npz"), strict=True):
        assert (before.kind, before.names, before.categories) == (after.kind, after.names, after.categories)
        np.testing.assert_array_equal(before.image, after.image)


@pytest.mark.parametrize("size", [48, 64])
def test_augmented_batch_has_the_given_size_and_stays_in_range(size):
    torch.manual_seed(0)
    images = torch.randint(0, 256, (64, 64, 64, 4), dtype=torch.uint8)
    half = torch.arange(64) % 2 == 0
    batch = augment.augment(images, half, ~half, half, size)
    assert batch.shape == (64, 3, size, size)
    assert batch.dtype == torch.float32
    assert batch.isfinite().all()
    assert batch.min() >= 0
    assert batch.max() <= 1


def test_ink_contrasts_with_the_background():
    torch.manual_seed(0)
    ground = augment.backgrounds(200, 8)
    ink = augment.inked(torch.ones(200, 1, 8, 8), ground).mean(dim=(2, 3))
    light = (ground.mean(dim=(2, 3)) * augment.LUMA).sum(dim=1)
    assert ((ink * augment.LUMA).sum(dim=1) - light).abs().min() > 0.2


def test_multi_positive_loss_equals_the_plain_formula():
    torch.manual_seed(0)
    logits, fits = torch.randn(3, 4), torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 0, 1]], dtype=torch.bool)
    total = 0.0
    for table, right in ((logits, fits), (logits.T, fits.T)):
        rows = [
            -sum(row[j] - row.exp().sum().log() for j in range(len(row)) if ok[j]) / ok.sum()
            for row, ok in zip(table, right, strict=True)
        ]
        total = total + sum(rows) / len(rows) / 2
    torch.testing.assert_close(train.multi_positive_loss(logits, fits), total)


def test_with_one_positive_each_the_loss_is_clip_s_own():
    torch.manual_seed(0)
    logits, target = torch.randn(5, 5), torch.arange(5)
    clip = (torch.nn.functional.cross_entropy(logits, target) + torch.nn.functional.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(train.multi_positive_loss(logits, torch.eye(5, dtype=torch.bool)), clip)


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (8, 8)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(muon.orthogonalised(torch.randn(2, *shape), steps=10))
    assert values.min() > 0.5
    assert values.max() < 1.5


def test_vocabulary_rows_are_open_clip_s_tokens_renumbered():
    from open_clip.tokenizer import SimpleTokenizer

    vocabulary = text.Vocabulary(["red apple", "fruit"])
    caption = "clip art of a red apple"
    new = vocabulary.batch([caption, "fruit"])
    old = SimpleTokenizer(context_length=text.CONTEXT)([caption, "fruit"])
    assert torch.equal(vocabulary.token_ids[new], old[:, : new.shape[1]])
    assert old[:, new.shape[1] :].sum() == 0


def test_a_caption_contains_one_of_the_names_or_categories():
    rng = random.Random(0)
    for _ in range(50):
        caption, about = text.draw_caption(("apple",), ("fruit", "food"), False, 0.3, rng)
        assert about in ("apple", "fruit", "food")
        assert about in caption
    assert text.fill("a picture of {a}", "apple", "") == "a picture of an apple"
    assert text.fill("{name}, {category}", "apple", "") == "apple"


@pytest.fixture
def config() -> train.TrainConfig:
    return train.TrainConfig(small_batch=6, batch_size=8, warmup_steps=1, small_until=0.5)


def test_two_steps_are_finite_and_change_the_weights(pairs, config, tmp_path):
    training = train.Training(pairs, MODEL_CFG, config, tmp_path)
    before = {name: value.clone() for name, value in training.model.state_dict().items()}
    losses = [training.step(0.1), training.step(0.9)]
    assert all(np.isfinite(losses))
    changed = [name for name, value in training.model.state_dict().items() if not torch.equal(value, before[name])]
    assert {"visual.conv1.weight", "token_embedding.weight", "visual.positional_embedding", "logit_scale"} <= set(
        changed
    )
    assert all(value.isfinite().all() for value in training.model.state_dict().values())


def test_resumed_training_takes_the_same_step(pairs, config, tmp_path):
    first = train.Training(pairs, MODEL_CFG, config, tmp_path)
    first.step(0.1)
    first.save()
    expected = first.step(0.2)
    resumed = train.Training(pairs, MODEL_CFG, config, tmp_path)
    assert resumed.steps == 1
    assert resumed.step(0.2) == pytest.approx(expected, rel=1e-5)
    for name, value in first.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_saved_weights_load_into_open_clip_and_give_the_same_features(pairs, config, tmp_path):
    from open_clip.tokenizer import SimpleTokenizer

    from evidence.mini_recipe.measure import load_model

    training = train.Training(pairs, MODEL_CFG, config, tmp_path)
    training.step(0.1)
    training.save()
    (tmp_path / "model.json").write_text(json.dumps(MODEL_CFG), encoding="utf-8")
    loaded = load_model(tmp_path / "mini.safetensors", tmp_path / "model.json")
    training.model.load_state_dict(training.ema)
    captions_ = ["a picture of a red thing", "thing"]
    with torch.inference_mode():
        full = loaded.encode_text(SimpleTokenizer(context_length=24)(captions_), normalize=True)
        cut = train.encode_captions(training.model, training.vocabulary.batch(captions_))
        images = torch.randn(2, 3, 64, 64)
        torch.testing.assert_close(full, cut, rtol=0, atol=5e-3)  # float16 storage
        seen = train.encode_images(training.model.visual, images)
        torch.testing.assert_close(loaded.encode_image(images, normalize=True), seen, rtol=0, atol=5e-3)


def test_training_can_start_from_given_weights_and_keeps_unused_tokens(pairs, config, tmp_path):
    start = train.Training(pairs, MODEL_CFG, config, tmp_path / "one").weights()
    start = {name: value.float() for name, value in start.items()}
    second = train.Training(pairs, MODEL_CFG, config.going_on(), tmp_path / "two", start)
    for name, value in second.weights().items():
        torch.testing.assert_close(value.float(), start[name])
    second.step(0.1)
    unused = torch.ones(train.VOCABULARY, dtype=torch.bool)
    unused[second.vocabulary.token_ids] = False
    rows = second.weights()["token_embedding.weight"].float()
    torch.testing.assert_close(rows[unused], start["token_embedding.weight"][unused])
    assert not torch.equal(rows[~unused], start["token_embedding.weight"][~unused])


def test_writing_a_task_twice_gives_the_same_bytes(tmp_path):
    names = ["a", "b"]
    items = [("train", "a", square((1, 2, 3))[..., :3]), ("test", "b", square((9, 9, 9))[..., 0])]
    counts = tasks.write("letters", iter(items), names, tmp_path / "one.zip")
    tasks.write("letters", iter(items), names, tmp_path / "two.zip")
    assert counts == {"train": [1, 0], "test": [0, 1]}
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()


def archive_of(lumps: list[tuple[str, bytes]]) -> bytes:
    """Return a WAD with these entries."""
    body, directory = b"", b""
    for name, data in lumps:
        directory += struct.pack("<ii8s", 12 + len(body), len(data), name.encode())
        body += data
    return struct.pack("<4sii", b"PWAD", len(lumps), 12 + len(body)) + body + directory


def test_floors_and_patches_of_a_wad_are_read(tmp_path):
    palette = bytes(index for index in range(256) for _ in range(3))
    post = bytes([1, 2, 0, 7, 9, 0, 255])  # top 1, two pixels
    patch = struct.pack("<hhhh2i", 2, 4, 0, 0, 16, 23) + post + b"\xff"
    lumps = [("PLAYPAL", palette), ("F_START", b""), ("FLOOR", bytes([5] * 4096)), ("F_END", b"")]
    lumps += [("P_START", b""), ("WALL", patch), ("P_END", b"")]
    (tmp_path / "game.wad").write_bytes(archive_of(lumps))
    read = wad.read(tmp_path / "game.wad", {"FLOOR", "WALL"})
    assert read["FLOOR"].shape == (64, 64, 3)
    assert (read["FLOOR"] == 5).all()
    assert read["WALL"][..., 0].tolist() == [[0, 0], [7, 0], [9, 0], [0, 0]]
    with pytest.raises(KeyError, match=r"game\.wad has no \['DOOR'\]"):
        wad.read(tmp_path / "game.wad", {"DOOR", "WALL"})


def test_crops_and_signs_depend_on_the_seed_alone():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 200, 3), dtype=np.uint8))
    for make in (lambda rng: unseen._cropped(picture, rng), lambda rng: unseen._put_up(square((250, 0, 0)), rng)):
        one, same, other = (make(random.Random(seed)) for seed in ("a", "a", "b"))
        assert (one.shape, one.dtype) == ((64, 64, 3), np.uint8)
        np.testing.assert_array_equal(one, same)
        assert not np.array_equal(one, other)


def test_an_icon_is_drawn_in_its_own_box_or_that_of_its_set(monkeypatch):
    monkeypatch.setattr(drawing, "render_svg", lambda body, box: (body, box))
    icon_set = {"icons": {"square": {"body": "a"}, "wide": {"body": "b", "left": 1, "width": 32}}, "height": 8}
    assert drawing.draw_icon(icon_set, "square") == ("a", (0, 0, 16, 8))
    assert drawing.draw_icon(icon_set, "wide") == ("b", (1, 0, 32, 8))


def test_a_missing_tool_and_a_failing_command_are_named(tmp_path):
    with pytest.raises(sources.PackageMissing, match="no absent-tool on this machine"):
        sources._run(["absent-tool"], tmp_path)
    with pytest.raises(sources.PackageMissing, match=r"ls no-such-file failed in .*no-such-file"):
        sources._run(["ls", "no-such-file"], tmp_path)


def test_a_variant_trains_another_model_on_another_mix_of_pictures(tmp_path, monkeypatch):
    from evidence.mini_recipe import __main__ as recipe

    started = []
    monkeypatch.setattr(
        train, "Training", lambda *given: started.append(given) or type("Idle", (), {"run": lambda self: None})()
    )
    save([Pair("synthetic", "emoji", ("cat",), (), square((250, 0, 0)))], tmp_path / "pairs.npz")
    variant = tmp_path / "variant.json"
    variant.write_text(json.dumps({"model": MODEL_CFG, "shares": {"emoji": 1.0}}), encoding="utf-8")
    for given in (None, variant):
        recipe.train(tmp_path, minutes=1.0, variant=given)
    (_, usual, config, *_), (_, other, varied, *_) = started
    assert (usual == MODEL_CFG, other == MODEL_CFG) == (False, True)
    assert (config.shares, varied.shares) == (train.SHARES, {"emoji": 1.0})
    assert varied.minutes == 1.0
