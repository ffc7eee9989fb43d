"""Untrusted files are accepted or refused, and the study notices anything else."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from evidence.trust import files
from evidence.trust.files import Guard, Job, _attend, _case
from evidence.trust.mutations import corrupted_bytes, corrupted_json
from evidence.trust.readers import READERS, Adapters, Folders, Manifests, Models, OtherMeaning, Reader, reader

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_a_short_run_finds_no_faults(tmp_path):
    out = tmp_path / "files.json"
    flags = ["--adapters", "600", "--manifests", "200", "--others", "40", "--atheris", "500", "--processes", "1"]
    command = [sys.executable, "-m", "evidence.trust.files", *flags, "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads(out.read_text())
    assert record["broken"] == []
    assert record["figures"]["files"] == 600 + 200 + 8 * 40 + 4
    kinds = record["figures"]["by_kind"]
    assert kinds.keys() == READERS.keys()
    assert {"accepted", "AdapterCorrupt"} <= set(kinds["adapters"]["outcomes"])
    assert {"accepted", "RepositoryError"} <= set(kinds["manifests"]["outcomes"])
    assert record["figures"]["atheris"]["files"] >= 500


def test_files_are_the_same_for_the_same_seed():
    for draw in (random.Random, lambda seed: random.Random(f"{seed} adapters 7")):
        content = bytes(range(100))
        assert corrupted_bytes(content, draw(3)) == corrupted_bytes(content, draw(3))
        value = {"a": [1, {"b": "c"}], "d": None}
        assert repr(corrupted_json(value, draw(3))) == repr(corrupted_json(value, draw(3)))


@pytest.fixture
def cases(tmp_path, monkeypatch):
    """A function that runs a reader on corrupted files in this process and returns the first fault."""
    monkeypatch.setattr(files, "SECONDS", 3.0)
    before = signal.signal(signal.SIGALRM, files._too_long)
    guard = Guard(tmp_path / "files")

    def run(kind: type[Reader], count: int = 1) -> str:
        with reader(kind, tmp_path / "files" / "here") as one:
            for number in range(count):
                if broken := _case(one, "planted", 0, number, guard, tmp_path / "kept")[-1]:
                    return broken
        return ""

    yield run
    signal.signal(signal.SIGALRM, before)


def planted(read):
    """Return a reader class with this ``read`` method."""
    return type("Planted", (Reader,), {"spoil": lambda self, draw: 10, "read": read})


def raise_(error):
    raise error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("read", "says"),
    [
        (lambda self: raise_(KeyError("x")), "KeyError: 'x'"),
        (lambda self: raise_(RecursionError("deep")), "RecursionError"),
        (lambda self: raise_(OtherMeaning("it is another")), "it is another"),
        (lambda self: time.sleep(60), "TooLong: more than 3 s"),
        (lambda self: b"x" * (120 << 20), "MiB beyond twice its 10 bytes"),
        (lambda self: torch.zeros(1 << 40), "RuntimeError"),
        (lambda self: open("/etc/hostname"), "Escaped: open /etc/hostname"),  # noqa: SIM115
        (lambda self: (self.folder.parents[1] / "x").mkdir(), "Escaped: os.mkdir"),
        (lambda self: subprocess.run("true", check=False), "Escaped: subprocess.Popen"),
    ],
)
def test_a_reader_that_breaks_a_promise_is_reported(cases, tmp_path, read, says):
    line = cases(planted(read))
    assert line.startswith("planted 0 of seed 0: ")
    assert says in line
    assert (tmp_path / "kept" / "planted-0").is_dir()


def test_a_reader_that_keeps_its_promises_is_not_reported(cases):
    assert cases(planted(lambda self: (self.folder / "x").write_text("x"))) == ""


@pytest.mark.parametrize(
    ("kind", "check", "stand_in"),
    [
        (Adapters, "clipweld.trainer.adapters.adapter.read_json", lambda kind, text: kind(**json.loads(text))),
        (Adapters, "clipweld.trainer.adapters.adapter._check_tensors", lambda tensors: None),
        (Manifests, "clipweld.exporter.store.layout.read_json_file", lambda kind, path: json.loads(path.read_bytes())),
        (Models, "clipweld.exporter.store.layout.Layout.fault", lambda layout, folder, version: None),
        (
            Folders,
            "clipweld.trainer.tasks.folder.os.walk",
            lambda folder, onerror, walk=os.walk: walk(folder, followlinks=True),
        ),
    ],
)
def test_a_removed_check_is_noticed(cases, monkeypatch, kind, check, stand_in):
    assert cases(kind, 30) == ""
    monkeypatch.setattr(check, stand_in)
    assert cases(kind, 400) != ""


@pytest.mark.slow
def test_a_process_that_dies_is_reported_and_replaced(tmp_path):
    found, progress = files.Found(), Counter()
    arguments = ([Job("histories", 0, 1, 400)], 0, tmp_path / "work", tmp_path / "kept", progress, found)
    attended = threading.Thread(target=_attend, args=arguments)
    attended.start()
    log = tmp_path / "work" / "log"
    while not log.exists() or len(log.read_text().splitlines()) < 50:
        time.sleep(0.05)
    (worker,) = multiprocessing.active_children()
    worker.kill()
    attended.join()
    (line,) = found.broken
    assert line.startswith("histories ")
    assert line.endswith("the process ended with -9")
    assert found.outcomes["histories"].total() == 400
