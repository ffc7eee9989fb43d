"""Folders of images, read in the layouts that users have."""

import os
import unicodedata
from pathlib import Path

import pytest
from PIL import Image, features

from clipweld.trainer.errors import ConfigError, TaskDataMissing, TaskError, TaskInvalid, UnknownTask, UnreadableImage
from clipweld.trainer.tasks import find_learned, load_task, load_tasks

NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def draw(file: Path, shade: int = 0) -> Path:
    """Write a small image in the format of the suffix, and return its path."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 9), (shade, 99, 0)).save(file)
    return file


def lay(folder: Path, *classes: str, images: int = 2) -> Path:
    """Write class folders with images, and return the folder."""
    for place, name in enumerate(classes):
        for number in range(images):
            draw(folder / name / f"{number}.png", 40 * place + number)
    return folder


def lay_splits(folder: Path, train: str = "train", test: str = "test", classes=("hex bolt", "rivet")) -> Path:
    for split in (train, test):
        lay(folder / split, *classes)
    return folder


@pytest.mark.parametrize(
    ("train", "test"),
    [("Train", "Test"), ("TRAIN", "test"), ("training", "Testing"), ("train", "val"), ("Training", "Validation")],
)
def test_splits_are_recognised_in_any_case_and_under_other_names(tmp_path, train, test):
    task = load_task(str(lay_splits(tmp_path / "bolts", train, test)))
    assert task.class_names == ("hex bolt", "rivet")
    assert {f"/{train}/" in task.load("train").name_of(i) for i in range(4)} == {True}
    assert {f"/{test}/" in task.load("test").name_of(i) for i in range(4)} == {True}


def test_validation_images_beside_test_images_are_skipped_with_a_note(tmp_path):
    folder = lay_splits(lay_splits(tmp_path / "bolts"), test="Valid")
    task = load_task(str(folder))
    assert len(task.load("test")) == 4
    assert "Valid" not in task.load("test").name_of(0)
    assert task.origin.notes == ("Valid/ is left out",)
    assert load_task(str(lay_splits(tmp_path / "b", test="val"))).origin.notes == ("val/ is its test split",)


@pytest.mark.parametrize(
    ("classes", "says"),
    [
        (("bus/a", "Train/a"), "'Train' is named like a split, but lies beside 'bus'"),
        (("bus/a", "car/a", "validation/a"), "'validation' is named like a split"),
        (("train/a", "train/b", "Train/a", "test/a"), r"'[Tt]rain' and '[Tt]rain' are both its train split"),
        (("train/a", "val/a", "valid/a"), "'val' and 'valid' are both"),
        (("train/a", "train/b"), "test/ is missing beside 'train'"),
        (("test/a", "val/a"), "train/ is missing"),
        (("bolts/train/a", "bolts/test/a"), "class folder 'bolts' holds splits .* give .*/bolts"),
        (("a/train", "a/test", "b/train", "b/test"), "class folder 'a' holds splits"),
        (("train/a", "train/b", "test/a", "test/c"), "'c' is in one of"),
        (("train/hex_bolt", "train/b", "test/Hex bolt"), "train/ has 'hex_bolt': spell both alike"),
        (("hex_bolt", "hex bolt"), "'hex bolt', 'hex_bolt' would become class name 'hex bolt'"),
        (("_", "a"), "'_' would become class name ''"),
        ((NFC, NFD), r"'cafe\\u0301' and 'caf\\xe9' are one name in two"),
        (("a\nb", "c"), r"the folder name 'a\\nb' is blank or holds control characters"),
        ((os.fsdecode(b"caf\xe9"), "c"), r"the folder name b'caf\\xe9' is not valid UTF-8"),
    ],
)
def test_ambiguous_and_faulty_layouts_are_refused_by_name(tmp_path, classes, says):
    lay(tmp_path / "t", *classes)
    with pytest.raises(TaskInvalid, match=says) as caught:
        load_task(str(tmp_path / "t"))
    assert str(tmp_path / "t") in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_class_may_be_called_train_where_splits_are_folders(tmp_path):
    task = load_task(str(lay_splits(tmp_path / "vehicles", classes=("bus", "train"))))
    assert task.class_names == ("bus", "train")
    assert load_task(str(lay(tmp_path / "flat", "bus", "train_"))).class_names == ("bus", "train")


def test_images_without_class_folders_are_counted_in_the_error(tmp_path):
    for number in range(3):
        draw(tmp_path / "t" / f"{number}.png")
    with pytest.raises(TaskInvalid, match="3 images and no class folders"):
        load_task(str(tmp_path / "t"))


def test_hidden_entries_are_neither_classes_nor_images(tmp_path):
    folder = lay_splits(tmp_path / "bolts")
    before = load_task(str(folder))
    for place in (folder, folder / "train", folder / "train" / "rivet", folder / "test" / "hex bolt"):
        for name in (".ipynb_checkpoints", "@eaDir", "__MACOSX"):
            draw(place / name / "1.png")
        for name in (".DS_Store", "._0.png", "Thumbs.db", "desktop.ini"):
            (place / name).write_bytes(b"\0\5\26\7")
    task = load_task(str(folder))
    assert task.class_names == before.class_names
    assert [len(task.load(split)) for split in ("train", "test")] == [4, 4]
    assert task.origin.left_out == {"hidden": 28}


@pytest.mark.parametrize("suffix", [".jfif", ".JPE", ".avif", ".GIF", ".jp2", ".JPG", ".webp", ".apng", ".TIFF"])
def test_every_suffix_of_the_decoder_s_formats_is_an_image(tmp_path, suffix):
    if not all(features.check(codec) for codec in ("avif", "jpg_2000", "webp")):
        pytest.fail("Pillow lacks a codec")
    folder = lay_splits(tmp_path / "bolts")
    image = draw(folder / "test" / "rivet" / f"another{suffix}")
    test = load_task(str(folder)).load("test")
    assert len(list(test)) == 5
    assert str(image) in test.files


def test_entries_that_are_left_out_are_counted_by_kind(tmp_path):
    folder = lay_splits(tmp_path / "bolts")
    for name in ("train/rivet/a.heic", "train/rivet/b.HEIC", "test/rivet/notes.txt", "README", "classes.csv"):
        (folder / name).write_text("x")
    draw(folder / "train" / "loose.png")
    (folder / "train" / "rivet" / "link").symlink_to(folder / "test")
    task = load_task(str(folder))
    assert task.origin.left_out == {
        ".heic": 2, ".txt": 1, ".csv": 1, "without a known suffix": 1, "images outside class folders": 1,
        "linked folders": 1,
    }  # fmt: skip


def test_an_empty_class_is_refused_and_its_contents_are_named(tmp_path):
    folder = lay_splits(tmp_path / "bolts")
    for image in (folder / "train" / "rivet").iterdir():
        image.rename(image.with_suffix(".heic"))
    with pytest.raises(TaskInvalid, match=r"no images in class 'rivet', but 2 \.heic; known: .*\.avif"):
        load_task(str(folder))


def test_some_but_not_all_classes_may_lack_test_images(tmp_path):
    folder = lay(lay_splits(tmp_path / "bolts") / "train", "nut").parent
    task = load_task(str(folder))
    assert task.class_names == ("hex bolt", "nut", "rivet")
    assert set(task.load("test").labels) == {0, 2}
    for image in (folder / "test").rglob("*.png"):
        image.unlink()
    with pytest.raises(TaskInvalid, match="no images in any class"):
        load_task(str(folder))


def test_class_names_match_across_splits_in_any_unicode_form(tmp_path):
    folder = lay(lay(tmp_path / NFD / "train", NFC, "tea").parent / "test", NFD, "tea").parent
    task = load_task(str(folder))
    assert task.class_names == (NFC, "tea")
    assert task.name == NFC, "a name that was typed finds it"
    assert list(task.load("test").labels) == [0, 0, 1, 1]


def test_links_that_make_one_folder_two_classes_are_refused(tmp_path):
    folder = lay(tmp_path / "bolts", "hex bolt", "rivet")
    (folder / "round").symlink_to("rivet")
    with pytest.raises(TaskInvalid, match="'round' is a link to 'rivet'"):
        load_task(str(folder))
    (folder / "round").unlink()
    (folder / "round").symlink_to("..")
    with pytest.raises(TaskInvalid, match="'round' is a link to the folder that holds it"):
        load_task(str(folder))


def test_dangling_and_circular_links_are_not_classes(tmp_path):
    folder = lay(tmp_path / "bolts", "hex bolt", "rivet")
    (folder / "self").symlink_to("self")
    (folder / "gone").symlink_to(tmp_path / "nowhere")
    task = load_task(str(folder))
    assert task.class_names == ("hex bolt", "rivet")
    assert task.origin.left_out == {"without a known suffix": 2}


def test_class_folders_may_be_links(tmp_path):
    lay(tmp_path / "elsewhere", "rivet")
    folder = lay(tmp_path / "bolts", "hex bolt")
    (folder / "rivet").symlink_to(tmp_path / "elsewhere" / "rivet")
    assert load_task(str(folder)).class_names == ("hex bolt", "rivet")


@pytest.mark.parametrize("content", [b"", b"\0\5\26\7", b"<html>"])
def test_a_file_that_is_not_an_image_is_named_by_its_path_once(tmp_path, content):
    folder = lay_splits(tmp_path / "bolts")
    (folder / "test" / "rivet" / "0.png").write_bytes(content)
    with pytest.raises(UnreadableImage, match=r"rivet/0\.png can't be read") as caught:
        list(load_task(str(folder)).load("test"))
    assert " at 0x" not in str(caught.value)
    assert str(caught.value).count(str(tmp_path)) == 1


@pytest.mark.parametrize(
    "save",
    [
        lambda text: b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode(),
        lambda text: text.replace("\n", "\r").encode(),
        lambda text: text.replace("\n", "\r\n").encode("utf-16"),
        lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
        lambda text: (text + "\n\n\x1a").encode(),
        lambda text: ("\ufeff" + text.replace("\n", " \n\ufeff") + "\n").encode(),
        lambda text: unicodedata.normalize("NFD", text).encode(),
    ],
)
@pytest.mark.parametrize("case", [str.lower, str.title])
def test_lists_are_read_in_every_encoding_and_with_any_line_endings(tmp_path, save, case):
    folder = lay_splits(tmp_path / "bolts")
    (folder / case("classes.txt")).write_bytes(save("a bólt\nround thing"))
    (folder / case("templates.txt")).write_bytes(save("a photo of {}\n\nthe {}"))
    task = load_task(str(folder))
    assert task.class_names == ("a bólt", "round thing")
    assert task.templates == ("a photo of {}", "the {}")
    assert not task.origin.left_out


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("classes.txt", b"bolt\ncaf\xe9\n", r"line 2 is not UTF-8 \(b'\\xe9'\); save it as UTF-8"),
        ("classes.txt", b"a\tb\nc", r"entry 1 \('a b'\).*control characters"),
        ("templates.txt", b"\n\n", "no line in it"),
        ("templates.txt", b"\xef\xbb\xbf", "no line in it"),
        ("classes.txt", b"one", "1 class names for 2 class folders"),
    ],
)
def test_invalid_lists_are_refused_and_their_file_and_line_named(tmp_path, name, content, says):
    folder = lay_splits(tmp_path / "bolts")
    (folder / name).write_bytes(content)
    with pytest.raises(TaskInvalid, match=says) as caught:
        load_task(str(folder))
    assert str(folder / name) in str(caught.value)


def test_class_names_equal_to_folder_names_may_be_listed_in_any_order(tmp_path):
    folder = lay_splits(tmp_path / "bolts", classes=("eye_bolt", "hex_bolt", "rivet"))
    (folder / "classes.txt").write_text("Rivet\nhex bolt\neye-bolt\n")
    task = load_task(str(folder))
    assert task.class_names == ("eye-bolt", "hex bolt", "Rivet")
    assert not task.origin.warnings


@pytest.mark.parametrize(
    ("folders", "written", "shown"),
    [
        (("1", "2", "10"), ("one", "two", "ten"), "'1' -> 'one', '10' -> 'two', '2' -> 'ten'"),
        (("Zebra", "ape"), ("ape", "striped"), "'Zebra' -> 'ape', 'ape' -> 'striped'"),
        (("cat", "dog", "x"), ("dog", "cat", "bird"), "'cat' -> 'dog', 'dog' -> 'cat'"),
        (("a", "b"), ("apple", "banana"), None),
    ],
)
def test_class_names_in_a_doubtful_order_cause_a_warning_that_shows_the_pairs(tmp_path, folders, written, shown):
    folder = lay_splits(tmp_path / "bolts", classes=folders)
    (folder / "classes.txt").write_text("\n".join(written))
    warnings = load_task(str(folder)).origin.warnings
    assert (shown in warnings[0]) if shown else not warnings


def test_folders_that_look_like_splits_cause_a_warning(tmp_path):
    warning = load_task(str(lay_splits(tmp_path / "bolts", "train_images", "test_images"))).origin.warnings[0]
    assert "'test_images', 'train_images' hold the same folders ('hex bolt', 'rivet')" in warning
    assert not load_task(str(lay(tmp_path / "b", "bolt/2019", "bolt/2020", "nut/2020"))).origin.warnings


def test_folders_beside_the_splits_cause_a_warning(tmp_path):
    folder = lay(lay_splits(tmp_path / "bolts"), "annotations")
    assert "'annotations'" in load_task(str(folder)).origin.warnings[0]


def test_a_folder_can_be_loaded_under_another_name(tmp_path):
    folder = lay_splits(tmp_path / "digits")
    task = load_task(f"numbers={folder}")
    assert (task.name, task.source) == ("numbers", str(folder))
    odd = lay_splits(tmp_path / "lr=1")
    with pytest.raises(TaskInvalid, match="--name NAME or as NAME=FOLDER"):
        load_task(str(odd))
    assert load_task(f"rate={odd}").name == "rate"
    with pytest.raises(TaskDataMissing, match="nowhere: no such folder"):
        load_task("numbers=nowhere")


def test_two_tasks_with_the_same_name_are_refused_with_advice(tmp_path):
    folder = lay_splits(tmp_path / "digits")
    with pytest.raises(ConfigError, match=f"'digits' is shipped and {folder}: .*NAME=FOLDER"):
        load_tasks(["mini", str(folder)])
    assert [task.name for task in load_tasks(["digits", f"numbers={folder}"])] == ["digits", "numbers"]


@pytest.mark.parametrize("name", ["", "=", "=x", "x=", "x" * 5000, "x" * 5000 + "/", "\0", "a\nb"])
def test_invalid_task_names_are_refused_in_one_line(name):
    with pytest.raises(TaskError) as caught:
        load_task(name)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_a_file_is_refused_as_a_task(tmp_path, monkeypatch):
    draw(tmp_path / "photos.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnknownTask, match=r"'photos\.png' is a file"):
        load_task("photos.png")
    with pytest.raises(TaskDataMissing, match=r"photos\.png: is a file; unpack it"):
        load_task("./photos.png")


def test_a_folder_named_like_a_missing_benchmark_is_mentioned(tmp_path, monkeypatch):
    lay_splits(tmp_path / "food")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TaskDataMissing, match=r"for the folder of that name here give \./food"):
        load_task("food")


def test_an_adapter_s_source_is_not_parsed_as_name_and_folder(tmp_path):
    from types import SimpleNamespace

    folder = lay_splits(tmp_path / "bolts")
    adapter = SimpleNamespace(task="b", class_names=("hex bolt", "rivet"), templates=("{}",), config={})
    adapter.config["source"] = str(folder)
    assert find_learned(adapter).class_names == ("hex bolt", "rivet")
    adapter.config["source"] = f"b={folder}"
    assert find_learned(adapter) is None


def test_a_name_or_templates_that_would_be_ignored_are_refused(tmp_path):
    folder = lay_splits(tmp_path / "bolts")
    with pytest.raises(TaskInvalid, match=r"'digits': .*--name and --template are for folders"):
        load_task("digits", rename="numbers")
    with pytest.raises(TaskInvalid, match="'food': "):
        load_task("food", templates=("a {}",))
    with pytest.raises(TaskInvalid, match="named both 'nuts' and 'rivets'"):
        load_task(f"nuts={folder}", rename="rivets")


def test_a_list_with_a_doubled_suffix_is_refused_by_name(tmp_path):
    folder = lay_splits(tmp_path / "bolts")
    (folder / "Classes.txt.txt").write_text("a\nb\n")
    with pytest.raises(TaskInvalid, match=r"Classes\.txt\.txt has its suffix twice; rename it to classes\.txt"):
        load_task(str(folder))
