"""The line that is printed when a task is loaded, and its warnings."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from clipweld.trainer.cli import main
from clipweld.trainer.tasks import load_task, summarise, validation
from clipweld.trainer.tasks.equal_files import LOOKED_AT, MAX_READ, equal_files
from clipweld.trainer.tasks.summary import Counts, Summary

QUICK = ["--model", "mini", "--iterations", "1", "--batch-size", "4"]


def lay(folder: Path, **counts: tuple[int, int]) -> Path:
    """Write classes with the given numbers of training and test images, all different."""
    shade = 0
    for name, numbers in counts.items():
        for split, count in zip(("train", "test"), numbers, strict=True):
            for number in range(count):
                file = folder / split / name / f"{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                shade += 1
                Image.new("RGB", (9, 9), (shade % 256, shade // 256, 9)).save(file)
    return folder


def test_the_line_tells_how_many_images_exist_are_used_and_are_left_out(tmp_path):
    folder = lay(tmp_path / "bolts", hex_bolt=(3, 2), rivet=(8, 4))
    (folder / "train" / "rivet" / "notes.md").write_text("x")
    (folder / "train" / ".DS_Store").write_text("x")
    summary = summarise(load_task(str(folder)), shots=5)
    assert summary.line() == (
        f"bolts ({folder}): 2 classes; train 3 to 8 images per class (fewest: hex bolt), 3 to 5 per class used "
        "(--shots); test 2 to 4 images per class (fewest: hex bolt); 2 left out (1 .md, 1 hidden); "
        "names: hex_bolt -> hex bolt"
    )
    assert not summary.warnings
    said = json.loads(json.dumps(dataclasses.asdict(summary)))
    assert said["used"] == {"per_class": [3, 5]}
    assert said["renamed"] == {"hex_bolt": "hex bolt"}


def test_the_line_in_docs_folders_is_the_real_one():
    summary = Summary(
        task="bolts",
        source="photos/bolts",
        class_names=("hex bolt", "rivet", *map(str, range(10))),
        train=Counts((30, 1200, *[99] * 10)),
        used=Counts((30, 1200, *[99] * 10)),
        test=Counts((9, 5, *[8] * 10)),
        left_out={".txt": 2, "hidden": 1},
        renamed={"hex_bolt": "hex bolt"},
        notes=(),
        warnings=(),
    )
    page = (Path(__file__).parents[3] / "docs" / "folders.md").read_text(encoding="utf-8")
    assert summary.line() in " ".join(page.split())


@pytest.mark.parametrize(
    ("shots", "says"), [(0, "train 4 images per class, all used"), (9, "all used"), (1, "class, 1 per class used")]
)
def test_the_line_tells_how_many_images_per_class_training_uses(tmp_path, shots, says):
    folder = lay(tmp_path / "bolts", a=(4, 1), b=(4, 1))
    assert says in summarise(load_task(str(folder)), shots).line()
    assert "; test 1 image per class" in summarise(load_task(str(folder)), shots).line()


def test_the_line_of_a_task_that_is_only_tested_omits_training(tmp_path):
    line = summarise(load_task(str(lay(tmp_path / "bolts", a=(4, 2), b=(4, 2))))).line()
    assert line == f"bolts ({tmp_path / 'bolts'}): 2 classes; test 2 images per class"


@pytest.mark.parametrize("name", ["digits", "emoji", "textures", "signs", "icons"])
def test_shipped_tasks_have_a_line_and_no_warnings(name):
    summary = summarise(load_task(name), shots=16)
    assert summary.line().startswith(f"{name} (shipped): ")
    assert not summary.warnings


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        ({"a": (9, 2), "b": (2, 2)}, "class 'a' has 9 training images, class 'b' 2; --balance draws all classes"),
        ({"a": (3, 9), "b": (3, 2)}, "class 'a' has 9 test images, class 'b' 2"),
        ({"a": (3, 2), "b": (3, 0)}, "no test image in class 'b'"),
        ({"a": (8, 2), "b": (2, 2)}, None),
    ],
)
def test_uneven_and_untested_classes_cause_a_warning(tmp_path, counts, says):
    warnings = summarise(load_task(str(lay(tmp_path / "bolts", **counts))), 0).warnings
    assert (says in warnings[0]) if says else not warnings


def test_uneven_classes_of_which_training_draws_equally_cause_no_warning(tmp_path):
    task = load_task(str(lay(tmp_path / "bolts", a=(9, 2), b=(2, 2))))
    assert not summarise(task, 2).warnings
    assert not summarise(task, 0, balanced=True).warnings


def test_a_class_with_one_image_in_a_folder_without_splits_is_untested(tmp_path):
    folder = lay(tmp_path / "bolts", a=(5, 0), b=(1, 0)) / "train"
    assert "no test image in class 'b'" in summarise(load_task(str(folder)), 5).warnings[0]


def test_equal_files_in_both_splits_cause_a_warning(tmp_path):
    folder = lay(tmp_path / "bolts", a=(4, 2), b=(4, 2))
    shutil.copy(folder / "train/a/3.png", folder / "test/b/copy.png")
    (warning,) = summarise(load_task(str(folder))).warnings
    assert "1 of 5 test images are training images too" in warning
    assert f"{folder}/test/b/copy.png and {folder}/train/a/3.png" in warning


def test_equal_files_are_found_in_a_folder_without_splits(tmp_path):
    folder = lay(tmp_path / "bolts", a=(5, 0), b=(5, 0)) / "train"
    for number in range(4):
        shutil.copy(folder / "a/0.png", folder / f"a/copy{number}.png")
    assert "training images too" in summarise(load_task(str(folder))).warnings[0]


def test_the_number_of_reads_is_limited_for_large_folders(tmp_path, monkeypatch):
    file = tmp_path / "image"
    file.write_bytes(b"x" * 100)
    read = []
    monkeypatch.setattr("clipweld.trainer.tasks.equal_files._head", lambda name: read.append(name) or b"head")
    found = equal_files([str(file)] * 20_000, [str(file)] * 20_000)
    assert found.looked_at == LOOKED_AT
    assert len(read) <= LOOKED_AT + MAX_READ


def test_files_that_differ_in_the_last_byte_are_not_equal(tmp_path):
    for name, last in (("one", b"1"), ("two", b"2"), ("again", b"1")):
        (tmp_path / name).write_bytes(bytes(100_000) + last)
    (tmp_path / "empty").touch()
    one, two, again, empty = (str(tmp_path / name) for name in ("one", "two", "again", "empty"))
    assert equal_files([one, empty], [two, empty, str(tmp_path), str(tmp_path / "none")]).found == ()
    assert equal_files([two, one], [again]).found == ((again, one),)


@pytest.mark.slow
def test_commands_print_the_line_on_stderr_before_training(tmp_path, capsys):
    folder = lay(tmp_path / "bolts", a=(40, 2), b=(2, 2))
    main(["fit", "--task", str(folder), "--shots", "9", "--adapters", str(tmp_path / "adapters"), *QUICK, "--json"])
    captured = capsys.readouterr()
    json.loads(captured.out)
    first, second = captured.err.splitlines()[:2]
    assert first.startswith(f"bolts ({folder}): 2 classes; train 2 to 40 images per class (fewest: b), 2 to 9 per")
    assert second == (
        "warning: bolts: class 'a' has 9 training images, class 'b' 2; --balance draws all classes equally often"
    )

    arguments = ["--tasks", f"nuts={folder}", "--watch", "emoji", "--out", str(tmp_path / "run"), "--json"]
    main(["sequence", *arguments, "--shots", "1", "--validate", *QUICK])
    captured = capsys.readouterr()
    assert json.loads(captured.out)["tested"] == ["nuts", "emoji"]
    lines = captured.err.splitlines()
    assert lines[0].startswith(f"nuts ({folder}, validation): 2 classes; train 1 to 32 images per class")
    assert lines[2].startswith("emoji (shipped, validation): ")

    main(["evaluate", "--model", "mini", "--tasks", "emoji", f"nuts={folder}", "--json"])
    captured = capsys.readouterr()
    assert set(json.loads(captured.out)["accuracy"]) == {"emoji", "nuts"}
    assert [line.split()[0] for line in captured.err.splitlines()] == ["emoji", "nuts"]


def test_the_summary_of_validation_concerns_training_images_only(tmp_path):
    folder = lay(tmp_path / "bolts", a=(10, 2), b=(10, 2))
    shutil.copy(folder / "train/a/3.png", folder / "test/b/copy.png")
    summary = summarise(validation(load_task(str(folder))), 5)
    assert not summary.warnings
    assert "test 2 images per class" in summary.line()
