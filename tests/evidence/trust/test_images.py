"""Hostile image files break neither client nor trainer, and the study would notice if they did."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipweld.trainer.tasks import sample
from evidence.trust import images
from evidence.trust.image_damage import GENERAL, STRUCTURED
from evidence.trust.images import file_of, judge, read_all, through_commands
from evidence.trust.pictures import of_unknown_range, seeds
from evidence.trust.record import Record

ROOT = Path(__file__).parents[3]


@pytest.fixture
def record(tmp_path):
    return Record(tmp_path / "record.json")


@pytest.fixture(scope="module")
def made():
    return seeds(sample(60)[0])


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.jpg"
    Image.effect_noise((50, 40), 50).convert("RGB").save(path)
    return path


@pytest.mark.slow
def test_hostile_files_break_neither_client_nor_trainer(record, made, tmp_path):
    figures = read_all(record, range(-len(made), 80), 1, 0, tmp_path)
    assert record.broken == []
    assert figures["read"] + figures["refused"] + figures["unsteady"] == len(made) + 80
    assert figures["whole files read"] == len(made) - sum(of_unknown_range(data) for _, data in made)
    assert figures["refused"] > 15


@pytest.mark.slow
def test_hostile_files_do_not_break_the_commands(record):
    figures = through_commands(record, 16, 0)
    assert record.broken == []
    assert 0 < figures["unreadable"] < 16


def test_a_file_depends_only_on_its_seed_and_number(made):
    assert file_of(7, 3, made) == file_of(7, 3, seeds(sample(60)[0])) != file_of(7, 4, made)


@pytest.mark.slow
def test_every_kind_of_damage_changes_files(made):
    draw = random.Random(0)
    for kind, data in made:
        for mutate in (*GENERAL, *STRUCTURED[kind]):
            assert any((mutate(data, draw) or data) != data for _ in range(20)) or data[:4] in (b"II+\0", b"MM\0+")


def test_a_raw_exception_would_be_reported(picture, monkeypatch):
    monkeypatch.setattr(images, "preprocess", lambda *args, **settings: {}["size"])
    assert judge(picture, random.Random(0))["problems"] == ["client: KeyError: 'size'", "refused by the client alone"]


def test_different_pixels_would_be_reported(picture, monkeypatch):
    real = images.preprocess
    monkeypatch.setattr(images, "preprocess", lambda *args, **settings: np.flip(real(*args, **settings), 1).copy())
    assert judge(picture, random.Random(0))["problems"] == ["client and trainer read other pixels"]


GREEDY = """
import random, sys
from pathlib import Path
from evidence.trust import images

images.MEMORY_BYTES, real = 100 << 20, images.preprocess
images.preprocess = lambda *args, **settings: (b"x" * (200 << 20), real(*args, **settings))[1]
print(images.judge(Path(sys.argv[1]), random.Random(0))["problems"])
"""


@pytest.mark.slow
def test_excessive_memory_would_be_reported(picture):
    """This needs a fresh process: one that was larger before may return memory at any time."""
    done = subprocess.run([sys.executable, "-c", GREEDY, picture], cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.fullmatch(r"\['took [0-9]{3} MB'\]\n", done.stdout)


FAULTS = """
import os, signal, time
from PIL import Image

def faulty(file, real=Image.open, **known):
    data = getattr(file, "getvalue", bytes)()
    if data == {ending!r}:
        os.kill(os.getpid(), signal.SIGSEGV)
    if data == {refused!r}:
        raise OSError
    if data == {hanging!r}:
        time.sleep(600)
    return real(file, **known)

Image.open = faulty
"""


@pytest.mark.slow
def test_files_that_are_wrongly_refused_or_crash_or_hang_a_worker_are_kept(record, made, tmp_path, monkeypatch):
    refused, ending, hanging = (file_of(number, 0, made)[2] for number in (-1, 1, 2))
    (tmp_path / "sitecustomize.py").write_text(FAULTS.format(refused=refused, ending=ending, hanging=hanging))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    monkeypatch.setattr(images, "HANG_S", 5.0)
    figures = read_all(record, range(-1, 3), 1, 0, tmp_path / "kept")
    assert figures["read"] + figures["refused"] == 2
    whole, ended, hung = record.broken
    assert whole.startswith("file -1 of seed 0")
    assert whole.endswith("refused, though whole")
    assert ended.startswith("file 1 of seed 0")
    assert ended.endswith("the process ended, status -11")
    assert hung.startswith("file 2 of seed 0")
    assert hung.endswith("no answer within 5 s")
    assert sorted(path.stem for path in (tmp_path / "kept").iterdir()) == ["0--1", "0-1", "0-2"]
