"""Two exporters at once leave a repository intact, and the study notices if they don't."""

from __future__ import annotations

import random
import shutil

import pytest

from clipweld.exporter.serving.triton import serve
from clipweld.exporter.store.repository import Repository
from evidence.trust import concurrent_exporters
from evidence.trust.record import Record


@pytest.fixture
def copy(versions, tmp_path):
    """A copy of the repository that a test may change."""
    for folder in (versions.path, versions.store.parent):
        shutil.copytree(folder, tmp_path / folder.name)
    shutil.copytree(versions.path.parent / "adapters-2", tmp_path / "adapters-2")
    return Repository(tmp_path / versions.path.name, versions.name)


@pytest.mark.slow
def test_two_exporters_at_once_leave_the_repository_intact(copy, tmp_path):
    record = Record(tmp_path / "record.json")
    with serve(copy.path) as server:
        for number in range(2):
            concurrent_exporters.start(copy, server.url, random.Random(number), f"pair {number}", record)
    assert record.broken == []
    assert record.figures["pairs"] == 2


@pytest.mark.slow
def test_a_damaged_repository_is_reported(copy):
    with serve(copy.path) as server:
        assert concurrent_exporters.faults(copy, server.url) == []
        file = copy.file("card", 1)
        file.write_bytes(file.read_bytes() + b" ")
        (copy.path.parent / f".{copy.path.name}.staging-left").mkdir()
        (copy.model("text") / "9").mkdir()
        found = concurrent_exporters.faults(copy, server.url)
    assert [line for line in found if "left behind" in line]
    assert [line for line in found if f"has versions {[*copy.standing(), 9]}" in line]
    assert [line for line in found if str(file) in line]
