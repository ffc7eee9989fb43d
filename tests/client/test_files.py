"""Results files of folders: the same in every format, and resumed after any interruption."""

import csv
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from clipweld.client import ZeroShotClassifier
from clipweld.client._results_file import COLUMNS, ResultsFile
from clipweld.client.cli import main
from clipweld.client.errors import BadImage, ResultsError

QUESTION = {"labels": ["cat", "dog"], "task": None, "templates": None, "top_k": 2, "model": "clip", "version": None}


@pytest.fixture
def folder(tmp_path):
    """Thirty image files in two folders; two of them are not images."""
    for i in range(30):
        path = tmp_path / "images" / ("a", "b")[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    for broken in ("a/04.png", "b/15.png"):
        (tmp_path / "images" / broken).write_bytes(b"nothing")
    return tmp_path / "images"


@pytest.fixture
def run(fake, monkeypatch, capsys):
    """A function that runs ``client classify`` on the fake server and returns (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setenv("CLIPWELD_URL", fake.url)
        monkeypatch.setattr(sys, "argv", ["client", "classify", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        return exit_.value.code or 0, *capsys.readouterr()

    return run


def rows(path):
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            return [{name: value or None for name, value in row.items()} for row in csv.DictReader(file)]
    table = pyarrow.parquet.read_table(path).to_pylist()
    return [{name: None if value is None else str(value) for name, value in row.items()} for row in table]


def test_all_formats_hold_the_same_results(fake, run, folder, tmp_path):
    arguments = (folder, "--labels", "cat, dog", "--top-k", 2)
    for ending in ("csv", "jsonl", "parquet"):
        code, out, err = run(*arguments, "--out", tmp_path / f"answers.{ending}")
        assert code == 0
        assert f"answers.{ending}: 30 images, 2 of them unreadable" in out
        assert [line for line in err.splitlines() if "04.png (7 bytes) is no image" in line]
    table = rows(tmp_path / "answers.csv")
    assert list(table[0]) == list(COLUMNS)
    assert table == rows(tmp_path / "answers.parquet")
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    names = [str(folder / ("a", "b")[i % 2] / f"{i:02}.png") for i in (*range(0, 30, 2), *range(1, 30, 2))]
    assert sorted(line["image"] for line in lines) == sorted(names)
    good = [line for line in lines if "error" not in line]
    assert [line["image"] for line in good] == [name for name in names if name[-6:] not in ("04.png", "15.png")]
    assert len(table) == 2 * 28 + 2
    with ZeroShotClassifier(fake.url) as clip:
        expected = clip.classify([line["image"] for line in good], QUESTION["labels"], top_k=2)
        for line, answer in zip(good, expected, strict=True):
            assert line["predictions"][0]["label"] == answer.best.label
            assert line["predictions"][0]["score"] == pytest.approx(answer.best.score, abs=1e-5)
    assert not list(tmp_path.glob("*.part"))


def test_an_interrupted_file_is_resumed(fake, run, folder, tmp_path):
    out = tmp_path / "answers.jsonl"
    assert run(folder, "--labels", "cat, dog", "--out", out)[0] == 0
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    out.unlink()
    header = json.dumps({"clipweld results": 1, "question": QUESTION | {"top_k": 5}}).encode() + b"\n"
    for kept, torn in ((0, b""), (3, b""), (7, lines[7][:20]), (29, b"{"), (30, b"")):
        part = tmp_path / "answers.jsonl.part"
        part.write_bytes(header + b"".join(lines[:kept]) + torn)
        asked = len(fake.requests)
        code, said, _ = run(folder, "--labels", "cat, dog", "--out", out, "--json")
        assert (code, json.loads(said)["of_earlier_runs"], json.loads(said)["images"]) == (0, kept, 30)
        again = sorted(out.read_text().splitlines())
        assert [json.loads(line)["image"] for line in again] == sorted(json.loads(line)["image"] for line in lines)
        assert len(fake.requests) - asked <= 2 + (30 - kept)
        out.unlink()
    part.write_bytes(header[:9])  # cut off within the first line
    assert run(folder, "--labels", "cat, dog", "--out", out)[0] == 0


def test_after_a_kill_and_a_second_run_every_image_is_listed_once(server, folder, tmp_path):
    out = tmp_path / "answers.csv"
    command = [Path(sys.executable).with_name("client"), "classify", folder, "--labels", "cat, dog", "--out", out]
    environment = os.environ | {"CLIPWELD_URL": server.url}
    for i in range(400):
        Image.fromarray(np.full((9, 9, 3), i % 256, np.uint8)).save(folder / f"more{i}.png")
    process = subprocess.Popen([*map(str, command)], env=environment, stderr=subprocess.DEVNULL)
    part = tmp_path / "answers.csv.part"
    while not part.exists() or part.stat().st_size < 2000:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    subprocess.run([*map(str, command), "--top-k", "5"], env=environment, check=True, capture_output=True)
    images = [row["image"] for row in rows(out) if row["rank"] in ("1", None)]
    assert len(images) == len(set(images)) == 430


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("answers.txt", None, r"answers\.txt: unknown ending; expected \.csv, \.jsonl, \.parquet"),
        ("answers.csv", "something", "there already; remove it"),
        ("no/folder/answers.csv", None, "cannot be written"),
        ("answers.csv.part", '{"clipweld results": 1, "question": {}}\n', "begun with another question"),
        ("answers.csv.part", '{"clipweld results": 1, "ques\n', "line 1 is damaged"),
    ],
)
def test_an_unusable_results_path_is_refused_at_once(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(ResultsError, match=message):
        ResultsFile(path.with_name(name.removesuffix(".part").rpartition("/")[2]), QUESTION)
    assert content is None or path.read_text() == content


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ResultsError, match=r"pip install 'clipweld\[parquet\]'"):
        ResultsFile(tmp_path / "answers.parquet", QUESTION)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_loses_no_earlier_answer(tmp_path):
    with ResultsFile(tmp_path / "answers.csv", QUESTION) as results:
        error = BadImage("a.png is not an image")
        error.image = "a.png"
        results.add_unreadable(error)
        results._file.close()
        results._file = open("/dev/full", "w")  # noqa: SIM115
        with pytest.raises(ResultsError, match="cannot be written"):
            results.add_unreadable(error)
    with ResultsFile(tmp_path / "answers.csv", QUESTION) as again:
        assert again.done == {"a.png"}


@pytest.mark.parametrize(("number", "step"), [(errno.ENOSPC, "make room"), (errno.EIO, "the disk failed")])
def test_a_disk_error_is_reported_with_its_cause_and_the_next_step(tmp_path, monkeypatch, number, step):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    with ResultsFile(tmp_path / "answers.csv", QUESTION) as results:
        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(ResultsError, match=f"{os.strerror(number)}.; {step}"):
            results.finish()


def test_a_file_system_without_locks_is_reported(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(ResultsError, match=r"can't lock it .No locks available."):
        ResultsFile(tmp_path / "answers.csv", QUESTION)


def test_a_results_file_is_written_by_one_process_at_a_time(tmp_path):
    out = tmp_path / "answers.csv"
    with ResultsFile(out, QUESTION) as first:
        with pytest.raises(ResultsError, match="another client is writing it; wait"):
            ResultsFile(out, QUESTION)
        first.finish()
    with pytest.raises(ResultsError, match="there already"):
        ResultsFile(out, QUESTION)


@pytest.mark.parametrize(
    "line",
    [
        b"3", b"[]", b'{"image": 3, "error": "x"}', b'{"error": "x"}', b"[" * 10**5, b"\xff",
        b'{"image": "\xed\xa0\x80", "error": "x"}',
        b'{"image": "a", "version": 2, "predictions": [{}]}', b'{"image": "a", "version": 2, "predictions": 7}',
        b'{"image": "a", "version": 2, "predictions": [{"label": "a", "probability": NaN, "score": 0.1}]}',
    ],
)  # fmt: skip
def test_damaged_lines_are_refused_by_number(tmp_path, line):
    header = json.dumps({"clipweld results": 1, "question": QUESTION}).encode()
    (tmp_path / "answers.csv.part").write_bytes(header + b"\n" + line + b"\n")
    with pytest.raises(ResultsError, match="line 2 is damaged; remove the file"):
        ResultsFile(tmp_path / "answers.csv", QUESTION)


def test_a_partial_file_that_is_not_a_regular_file_is_refused(tmp_path):
    part = tmp_path / "answers.csv.part"
    for make in (lambda: os.mkfifo(part), lambda: part.symlink_to("/dev/zero"), part.mkdir):
        make()
        with pytest.raises(ResultsError, match="not a regular file"):
            ResultsFile(tmp_path / "answers.csv", QUESTION)
        part.rmdir() if part.is_dir() else part.unlink()


def test_a_line_with_too_many_values_is_refused(tmp_path):
    part = tmp_path / "answers.csv.part"
    with ResultsFile(tmp_path / "answers.csv", QUESTION):
        header = part.read_bytes()
    part.write_bytes(header + b"[" + b"[1]," * 200_000 + b"1]\n")
    with pytest.raises(ResultsError, match="line 2 is damaged"):
        ResultsFile(tmp_path / "answers.csv", QUESTION)


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_file_names_that_are_not_valid_text_are_escaped(tmp_path, ending):
    error = BadImage("\udcff is unreadable")
    error.image = os.fsdecode(b"a\xff.png")
    out = tmp_path / f"answers.{ending}"
    with ResultsFile(out, QUESTION) as results:
        results.add_unreadable(error)
    with ResultsFile(out, QUESTION) as results:
        assert results.done == {error.image}
        results.finish()
    if ending == "jsonl":
        assert json.loads(out.read_text()) == {"image": error.image, "error": str(error)}
    else:
        assert rows(out)[0]["image"] == "a\\udcff.png"
        assert rows(out)[0]["error"] == "\\udcff is unreadable"
