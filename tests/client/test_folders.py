"""Walking folders: whatever is left out is counted and reported, and system files are never taken for images."""

import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipweld.client import LeftOut, ZeroShotClassifier
from clipweld.client._folders import image_files
from clipweld.client.cli import main
from clipweld.client.errors import BadImage

NOBODY = 65534
LABELS = ("--labels", "cat, dog")


@pytest.fixture
def run(fake, monkeypatch, capsys):
    """A function that runs ``client classify`` on the fake server and returns (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setenv("CLIPWELD_URL", fake.url)
        monkeypatch.setattr(sys, "argv", ["client", "classify", *map(str, arguments), *LABELS])
        with pytest.raises(SystemExit) as exit_:
            main()
        return exit_.value.code or 0, *capsys.readouterr()

    return run


def draw(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(path)
    return path


@contextlib.contextmanager
def as_nobody():
    """Run as the user "nobody" where the tests run as root, who may read everything."""
    if os.geteuid():
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def scans(tmp_path):
    """Two images among everything else that real folders contain."""
    scans = tmp_path / "scans"
    draw(scans / "one.png")
    draw(scans / "deep/er/Two.PNG", 1)
    for system in (
        ".ipynb_checkpoints/one-checkpoint.png", "@eaDir/one.png/SYNOPHOTO_THUMB_M.png", "._one.png", ".hidden.jpg",
        "__MACOSX/one.png", "deep/@eadir/x.png", "$RECYCLE.BIN/gone.png", "lost+found/found.png",
    ):  # fmt: skip
        draw(scans / system, 2)
    for system in (".DS_Store", "Thumbs.db", "deep/desktop.ini"):
        (scans / system).write_bytes(b"x")
    (scans / "notes.txt").write_text("no image")
    (scans / "one.png.bak").write_text("no image")
    (scans / "deep" / "loop").symlink_to(scans)
    (scans / "gone.png").symlink_to(scans / "nothing.png")
    (scans / "self.png").symlink_to("self.png")
    os.mkfifo(scans / "pipe.png")
    return scans


def reasons(left_out):
    counts = {}
    for one in left_out:
        counts[one.reason] = counts.get(one.reason, 0) + 1
    return counts


EXPECTED = {"linked folder": 1, "dangling link": 2, "special file": 1, "no image": 2, "hidden": 11}


def test_everything_left_out_of_a_folder_is_reported(scans):
    left_out = []
    assert list(image_files(scans, left_out.append)) == [scans / "one.png", scans / "deep/er/Two.PNG"]
    assert reasons(left_out) == EXPECTED
    assert LeftOut(str(scans / "notes.txt"), "no image") in left_out


def test_the_library_warns_unless_the_caller_collects_reports(fake, scans):
    with ZeroShotClassifier(fake.url) as clip:
        with pytest.warns(
            UserWarning, match=r"left out 1 linked folder .*, 2 links that lead nowhere .*11 hidden files"
        ):
            answers = list(clip.classify(scans, ["cat", "dog"]))
        reported = []
        assert list(clip.classify(scans, ["cat", "dog"], left_out=reported.append)) == answers
    assert len(answers) == 2
    assert reasons(reported) == EXPECTED


def test_hidden_files_alone_cause_no_warning(scans):
    for path in scans.iterdir():
        if path.name not in ("one.png", ".DS_Store"):
            (path.rename if path.is_dir() and not path.is_symlink() else path.replace)(scans.parent / f"x{path.name}")
    assert list(image_files(scans)) == [scans / "one.png"]


def test_a_folder_that_cannot_be_read_is_counted():
    with tempfile.TemporaryDirectory() as name:  # other users may not enter pytest's own folders
        folder, left_out = Path(name), []
        folder.chmod(0o755)
        draw(folder / "open/one.png")
        draw(folder / "shut/two.png")
        (folder / "shut").chmod(0)
        with as_nobody():
            found = list(image_files(folder, left_out.append))
            with pytest.raises(BadImage, match=r"^folder .*shut cannot be read: Permission denied"):
                next(image_files(folder / "shut"))
        (folder / "shut").chmod(0o755)
    assert found == [folder / "open/one.png"]
    assert left_out == [LeftOut(str(folder / "shut"), "unreadable folder")]


def test_a_folder_without_images_is_refused_and_its_contents_are_named(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(BadImage, match=r"has no images; .* \(left out: 1 file that is no image \(.*notes\.txt\)\)$"):
        next(image_files(tmp_path))


def test_paths_that_are_named_explicitly_are_never_left_out(run, scans, tmp_path):
    """A hidden file, a hidden folder and a link to a folder."""
    (tmp_path / "link").symlink_to(scans / "deep/er")
    arguments = (scans / ".hidden.jpg", scans / ".ipynb_checkpoints", tmp_path / "link", "--json")
    code, out, err = run(*arguments)
    assert (code, err) == (0, "")
    assert [Path(answer["image"]).name for answer in json.loads(out)] == [
        ".hidden.jpg", "one-checkpoint.png", "Two.PNG",
    ]  # fmt: skip


def test_the_command_reports_what_it_left_out_in_one_line(run, scans, tmp_path):
    code, out, err = run(scans, "--json")
    assert (code, len(json.loads(out))) == (0, 2)
    (line,) = err.splitlines()
    assert line.startswith(
        f"client: left out: 1 linked folder ({scans}/deep/loop), 2 links that lead nowhere (such as "
    )
    assert "2 files that are no images (such as " in line
    code, out, err = run(scans, "--json", "--out", tmp_path / "a.csv")
    assert code == 0
    assert json.loads(out)["left_out"] == EXPECTED
    assert [said for said in err.splitlines() if said == line]
    assert "b.csv: 2 images; 17 left out; " in run(scans, "--out", tmp_path / "b.csv")[1]


@pytest.mark.parametrize("more", [(), ("--out", "a.csv")])
def test_an_empty_path_is_refused(run, scans, monkeypatch, more):
    monkeypatch.chdir(scans)
    code, out, err = run("", *more)
    assert (code, out) == (1, "")
    assert "client: an empty text is no image; name image files, or folders of them" in err
    assert not Path("a.csv.part").exists()


def test_a_folder_without_images_leaves_no_results_behind(run, tmp_path):
    (tmp_path / "empty").mkdir()
    code, _, err = run(tmp_path / "empty", "--out", tmp_path / "a.csv")
    assert code == 1
    assert "empty has no images" in err
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_an_image_listed_twice_is_classified_once_in_a_results_file(run, scans, tmp_path):
    code, out, err = run(scans / "one.png", scans, f"{scans}/../scans/one.png", "--json", "--out", tmp_path / "a.csv")
    assert code == 0
    assert json.loads(out)["images"] == 2
    assert json.loads(out)["left_out"]["named twice"] == 2
    assert "2 images named twice (such as " in err


SPELLINGS = {
    "as it is": lambda scans: ("scans", scans.parent),
    "with a dot": lambda scans: ("./scans", scans.parent),
    "with a slash": lambda scans: ("scans//", scans.parent),
    "by a detour": lambda scans: ("scans/../scans", scans.parent),
    "absolute": lambda scans: (str(scans), scans.parent),
    "from inside": lambda scans: (".", scans),
    "from a sibling": lambda scans: ("../scans", scans.parent / "elsewhere"),
    "by a link to it": lambda scans: ("../link", scans.parent / "elsewhere"),
    "by a link above it": lambda scans: (str(scans.parents[1] / "above" / "scans"), scans.parent),
}


@pytest.mark.parametrize("first", ["as it is", "absolute", "by a link to it"])
@pytest.mark.parametrize("then", SPELLINGS)
def test_results_are_resumed_however_the_folder_path_is_written(fake, run, tmp_path, monkeypatch, first, then):
    home = tmp_path / "home"
    for number in range(4):
        draw(home / f"scans/{number}.png", number)
    (home / "elsewhere").mkdir()
    (home / "link").symlink_to(home / "scans")
    (tmp_path / "above").symlink_to(home)
    out = tmp_path / "a.jsonl"

    def classify(spelling):
        folder, working_folder = SPELLINGS[spelling](home / "scans")
        monkeypatch.chdir(working_folder)
        return run(folder, "--json", "--out", out)

    hidden = (home / "scans/3.png").rename(home / "3.png")
    code, _, _ = classify(first)
    assert code == 0
    lines = out.read_text().splitlines()
    header = {"labels": ["cat", "dog"], "task": None, "templates": None, "top_k": 5, "model": "clip", "version": None}
    begun = json.dumps({"clipweld results": 1, "question": header})
    paths = [str(home / "scans" / f"{number}.png") for number in range(3)]
    rows = [json.dumps(json.loads(line) | {"path": path}) for line, path in zip(lines, paths, strict=True)]
    out.with_name("a.jsonl.part").write_text("\n".join([begun, *rows]) + "\n")
    out.unlink()
    hidden.rename(home / "scans/3.png")
    code, said, _ = classify(then)
    assert code == 0
    assert (json.loads(said)["of_earlier_runs"], json.loads(said)["images"]) == (3, 4)
    assert out.read_text().splitlines()[:3] == lines


def test_results_files_of_older_versions_without_paths_are_resumed(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in range(2):
        draw(tmp_path / f"scans/{number}.png", number)
    assert run("scans", "--out", "a.jsonl")[0] == 0
    first, _ = Path("a.jsonl").read_text().splitlines()
    header = {"labels": ["cat", "dog"], "task": None, "templates": None, "top_k": 5, "model": "clip", "version": None}
    Path("a.jsonl.part").write_text(json.dumps({"clipweld results": 1, "question": header}) + f"\n{first}\n")
    Path("a.jsonl").unlink()
    code, said, _ = run(f"{tmp_path}/./scans", "--out", "a.jsonl", "--json")
    assert (code, json.loads(said)["of_earlier_runs"], json.loads(said)["images"]) == (0, 1, 2)


def test_a_link_to_an_image_counts_as_a_second_image(run, tmp_path):
    draw(tmp_path / "scans/one.png")
    (tmp_path / "scans/same.png").symlink_to("one.png")
    code, said, _ = run(tmp_path / "scans", "--json", "--out", tmp_path / "a.csv")
    assert (code, json.loads(said)["images"]) == (0, 2)
