import os
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from clipweld.trainer.errors import TaskDataMissing, TaskInvalid, UnknownTask, UnreadableImage
from clipweld.trainer.tasks import (
    Images,
    Task,
    catalogue,
    find_learned,
    load_task,
    load_tasks,
    sample,
    shipped_tasks,
    skip_unreadable,
    task_lists,
    validation,
)
from clipweld.trainer.tasks.split import split_by_seed


def paint(path, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((20, 30, 3), colour, dtype=np.uint8)).save(path)


@pytest.fixture
def bolts(tmp_path):
    """Three classes, each of a single colour, in the layout of a user's folder."""
    folder = tmp_path / "bolts"
    for split, count in (("train", 4), ("test", 2)):
        for value, name in enumerate(("hex_bolt", "eye-bolt", "rivet")):
            for i in range(count):
                paint(folder / split / name / f"{i}.png", 50 * value)
    return folder


def test_a_shipped_task_has_both_splits():
    task = load_task("digits")
    assert task.class_names[7] == "seven"
    assert (len(task.load("train")), len(task.load("test"))) == (993, 797)
    image, label = task.load("test")[5]
    assert image.size == (64, 64)
    assert task.class_names[label] == task.load("test").name_of(5).split("/")[-2]


def test_a_folder_becomes_a_task(bolts):
    task = load_task(str(bolts))
    assert task.name == "bolts"
    assert task.class_names == ("eye bolt", "hex bolt", "rivet")
    assert task.templates == ("a photo of a {}",)
    test = task.load("test")
    assert list(test.labels) == [0, 0, 1, 1, 2, 2]
    assert np.asarray(test[2][0])[0, 0, 0] == 0, "hex_bolt was painted black"


def test_a_folder_s_names_and_templates_come_from_files_or_the_caller(bolts):
    (bolts / "classes.txt").write_text("eyelet\nhexagon\nrivet\n")
    (bolts / "templates.txt").write_text("a photo of a {}\n\na close-up of a {}\n")
    task = load_task(str(bolts))
    assert task.class_names == ("eyelet", "hexagon", "rivet")
    assert task.templates == ("a photo of a {}", "a close-up of a {}")
    renamed = load_task(str(bolts), rename="fasteners", templates=("a {}, a type of bolt",))
    assert (renamed.name, renamed.templates) == ("fasteners", ("a {}, a type of bolt",))


def test_a_folder_without_splits_is_split_the_same_way_every_time(bolts):
    tree = bolts / "train"
    first, second = load_task(str(tree)), load_task(str(tree))
    assert len(first.load("train")) == 9
    assert len(first.load("test")) == 3
    names = [[task.load("test").name_of(i) for i in range(3)] for task in (first, second)]
    assert names[0] == names[1]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda f: (f / "classes.txt").write_text("one\ntwo\n"), "2 class names for 3"),
        (lambda f: (f / "templates.txt").write_text("a photo\n"), "exactly one {}"),
        (lambda f: (f / "classes.txt").write_text("a\na\nb\n"), "'a' is listed twice"),
        (lambda f: (f / "train" / "empty").mkdir(), "empty"),
        (lambda f: paint(f / "test" / "nut" / "1.png", 3), "'nut' is in one of"),
    ],
)
def test_faulty_folders_are_refused(bolts, spoil, says):
    spoil(bolts)
    with pytest.raises(TaskInvalid, match=says):
        load_task(str(bolts))


def test_a_folder_with_one_class_is_refused(tmp_path):
    paint(tmp_path / "t" / "only" / "1.png", 3)
    with pytest.raises(TaskInvalid, match="has 1 class"):
        load_task(str(tmp_path / "t"))


def test_a_name_that_would_leave_the_folder_is_refused(bolts):
    with pytest.raises(TaskInvalid, match="task name"):
        load_task(str(bolts), rename="../escape")


def test_an_unreadable_image_is_named(bolts):
    bad = bolts / "test" / "rivet" / "0.png"
    bad.write_bytes(b"not a picture")
    with pytest.raises(UnreadableImage, match=r"rivet/0\.png"):
        list(load_task(str(bolts)).load("test"))


def test_unreadable_images_are_skipped_and_reported_on_request(bolts, mini):
    bad = bolts / "train" / "rivet" / "2.png"
    bad.write_bytes(bad.read_bytes()[:40])
    told = []
    task = skip_unreadable(load_task(str(bolts)), mini.preprocess, told.append)
    assert list(task.load("train").labels) == [0] * 4 + [1] * 4 + [2] * 3
    assert len(list(task.load("train"))) == 11
    assert len(told) == 1
    assert str(bad) in told[0]
    assert "--skip-unreadable" not in told[0]


def test_a_split_without_any_readable_image_is_refused(bolts, mini):
    for path in (bolts / "test").rglob("*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(TaskInvalid, match="not one of its test images"):
        skip_unreadable(load_task(str(bolts)), mini.preprocess, lambda fault: None).load("test")


def test_images_of_a_folder_are_opened_only_when_used(bolts, monkeypatch):
    for number in range(1000):
        os.link(bolts / "train/rivet/0.png", bolts / f"train/rivet/link{number}.png")
    opened = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda file, **known: opened.append(file) or real(file, **known))
    task = load_task(str(bolts))
    drawn = task.load("train").few_shot(3, seed=0)
    assert (len(task.load("train")), len(drawn), opened) == (1012, 9, [])
    assert len(list(drawn)) == len(opened) == 9


def test_an_unknown_task_is_refused_with_similar_names():
    with pytest.raises(UnknownTask, match="near names: digits"):
        load_task("digit")
    with pytest.raises(TaskDataMissing, match="no such folder"):
        load_task("./nowhere")


def test_the_catalogue_tells_where_data_was_looked_for(tmp_path):
    entries = {entry.name: entry for entry in catalogue(tmp_path)}
    assert len(entries) == 20
    assert entries["digits"].missing == ""
    assert entries["aircraft"].source == str(tmp_path / "fgvc-aircraft-2013b")
    assert "--download" in entries["aircraft"].missing
    assert "dead" in entries["sun397"].missing
    with pytest.raises(TaskDataMissing, match=r"fgvc-aircraft-2013b.*--download"):
        load_task("aircraft", tmp_path)


def test_few_shot_draws_the_same_images_of_every_class_for_a_seed():
    images = Images([0] * 9 + [1] * 2 + [2] * 9, lambda i: None, str)
    drawn = images.few_shot(3, seed=1)
    assert list(drawn.labels) == [0] * 3 + [1] * 2 + [2] * 3
    assert [drawn.name_of(i) for i in range(8)] == [images.few_shot(3, seed=1).name_of(i) for i in range(8)]
    assert [drawn.name_of(i) for i in range(8)] != [images.few_shot(3, seed=2).name_of(i) for i in range(8)]
    assert images.few_shot(0, seed=1) is images


def test_split_by_seed_puts_every_image_into_one_split():
    images = Images([0] * 10 + [1] * 2 + [2], lambda i: None, str)
    parts = split_by_seed(images)
    names = [part.name_of(i) for part in parts.values() for i in range(len(part))]
    assert sorted(names, key=int) == [str(i) for i in range(13)]
    assert list(parts["test"].labels) == [0, 0, 1]


def test_templates_need_exactly_one_placeholder():
    for templates in ((), ("no place",), ("{} and {}",)):
        with pytest.raises(TaskInvalid):
            Task("t", ("a", "b"), templates, lambda split: None, "here")


def test_sample_gives_real_images_and_prompts():
    images, prompts = sample(12)
    assert len(images) == 12
    assert all(image.size == (64, 64) for image in images)
    assert "the flag of france" in prompts
    assert len(prompts) == sum(len(task.prompts()) for task in shipped_tasks())


def test_lists_of_tasks_expand_to_their_tasks_in_order():
    assert [task.name for task in load_tasks(["mini"])] == ["digits", "fashion", "letters", "flags", "emoji", "clipart"]
    assert [task.name for task in load_tasks(["flags", "emoji"])] == ["flags", "emoji"]
    lists = task_lists()
    assert lists["mini-unseen"] == ("textures", "signs", "icons")
    assert [task.name for task in load_tasks(["mini-unseen"])] == list(lists["mini-unseen"])
    assert [task.name for task in shipped_tasks()] == list(lists["mini"])
    assert lists["mtil-1"][:3] == ("aircraft", "caltech101", "cifar100")
    assert sorted(lists["mtil-2"]) == sorted(lists["mtil-1"])
    assert set(lists["mtil-1"]) - set(lists["x-tail"]) == {"cifar100"}


def test_validation_splits_the_training_images_only(digits):
    held_out = validation(digits)
    learn, check, every = held_out.load("train"), held_out.load("test"), digits.load("train")
    assert len(learn) + len(check) == len(every)
    names = [{images.name_of(i) for i in range(len(images))} for images in (learn, check, every)]
    assert names[0] | names[1] == names[2]
    assert not names[0] & names[1]
    assert set(check.labels) == set(every.labels)


def test_circular_links_are_not_followed(bolts):
    (bolts / "train" / "rivet" / "loop").symlink_to(bolts)
    (bolts / "train" / "rivet" / "self").symlink_to(".")
    assert len(load_task(str(bolts)).load("train")) == 12


def test_a_pipe_among_the_images_is_refused_without_waiting(bolts):
    os.mkfifo(bolts / "test" / "rivet" / "pipe.jpg")
    with pytest.raises(UnreadableImage, match=r"pipe\.jpg.*not a regular file"):
        list(load_task(str(bolts)).load("test"))


@pytest.mark.parametrize("name", ["classes.txt", "templates.txt"])
@pytest.mark.parametrize(
    "make",
    [
        os.mkfifo,
        lambda file: file.symlink_to("/dev/zero"),
        os.mkdir,
        lambda file: file.write_bytes(b"\xff\xfe"),
        lambda file: (file.touch(), os.truncate(file, 1 << 40)),
        lambda file: file.write_text("a\x1b[2J {}\nb\nc"),
    ],
)
def test_lists_that_are_not_text_files_are_refused(bolts, name, make):
    (bolts / name).unlink(missing_ok=True)
    make(bolts / name)
    with pytest.raises(TaskInvalid):
        load_task(str(bolts))


def test_an_adapter_s_source_folder_is_read_only_if_it_has_its_classes(bolts, monkeypatch):
    adapter = SimpleNamespace(
        task="bolts", class_names=("eye bolt", "hex bolt", "rivet"), templates=("a {}",), config={"source": str(bolts)}
    )
    assert find_learned(adapter).source == str(bolts)
    monkeypatch.setattr("clipweld.trainer.tasks.folder.os.walk", lambda *_, **__: pytest.fail("it was looked into"))
    adapter.class_names = ("eyelet", "other")
    assert find_learned(adapter) is None
    for source in (7, "\x00", "x" * 5000, "/", "\ud800"):
        adapter.config = {"source": source}
        assert find_learned(adapter) is None
