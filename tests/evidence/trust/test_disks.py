"""Full and read-only disks do no harm, and the study would notice if they did."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from evidence.trust.disks import PAGE, Case, Rig, mounted, spread
from evidence.trust.record import Record

ROOT = Path(__file__).parents[3]
CARELESS = """
import sys
from pathlib import Path

def main():
    with open(sys.argv[1], "wb") as file:
        file.write(bytes(20_000))
"""
SILENT = """
import sys
from contextlib import suppress

def main():
    with suppress(OSError), open(sys.argv[1], "wb") as file:
        file.write(bytes(20_000))
"""


@pytest.fixture
def may_mount(tmp_path):
    """Skip the test where no disk can be mounted."""
    try:
        with mounted(tmp_path / "tried"):
            pass
    except PermissionError as exc:
        pytest.skip(str(exc))


@pytest.fixture
def sweep(may_mount, tmp_path, monkeypatch):
    """A function that runs a program on small disks, under the name ``planted``, and returns the reported faults."""

    def run(program):
        (tmp_path / "clipweld" / "planted").mkdir(parents=True)
        (tmp_path / "clipweld" / "planted" / "cli.py").write_text(program)
        monkeypatch.syspath_prepend(tmp_path)
        record = Record(tmp_path / "record.json")
        (tmp_path / "rig").mkdir()
        with Rig(tmp_path / "rig", record) as rig:
            rig.sweep(Case("planted", ("planted", "{disk}/answer.onnx")), 2)
        return "\n".join(record.broken)

    return run


@pytest.mark.slow
@pytest.mark.usefixtures("may_mount")
def test_full_and_read_only_disks_do_no_harm(tmp_path):
    out = tmp_path / "disks.json"
    command = [sys.executable, "-m", "evidence.trust.disks", "--levels", "2", "--only", "peft", "--out", out]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert record["broken"] == []
    figures = record["figures"]["exporter merge --to peft"]
    assert figures["refused"] >= 2
    assert figures["bytes enough"] > 100_000


def test_missing_rights_to_mount_are_reported_in_one_line(tmp_path):
    command = ["unshare", "--user", sys.executable, "-m", "evidence.trust.disks", "--out", tmp_path / "disks.json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if "unshare" in done.stderr:
        pytest.skip("no user without rights can be made here")
    assert done.returncode == 2
    assert done.stderr.startswith("disks: no disk can be mounted here")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_tracebacks_and_half_written_files_would_be_reported(sweep):
    broken = sweep(CARELESS)
    assert "planted with size 0 free: ended with 1 and said" in broken
    assert "planted with nr_inodes 0 free: ended with 1 and said" in broken
    assert "planted on a read-only disk: ended with 1 and said" in broken
    assert "planted with size 0 free: failed and left other files than before: answer.onnx" in broken


@pytest.mark.slow
def test_a_success_status_with_half_written_files_would_be_reported(sweep):
    broken = sweep(SILENT)
    assert "planted with size 0 free: ended well with other files than an undisturbed one: answer.onnx" in broken
    assert "planted on a read-only disk: ended well, so nothing was tried" in broken


def test_tried_disk_sizes_range_from_nothing_to_enough():
    assert spread(3 * PAGE, PAGE, 25) == [0, PAGE, 2 * PAGE, 3 * PAGE]
    assert spread(0, 1, 25) == [0]
    sizes = spread(10_000_001, PAGE, 25)
    assert sizes[:4] == [0, PAGE, 2 * PAGE, 4 * PAGE]
    assert sizes[-1] >= 10_000_001
    assert len(sizes) <= 25
    assert all(size % PAGE == 0 for size in sizes)


@pytest.mark.parametrize("program", ["trainer", "exporter", "client"])
def test_a_full_stdout_is_one_line_on_stderr_and_a_closed_pipe_is_silent(program):
    script = [sys.executable, "-c", f"from clipweld.{program}.cli import main; main()", "--help"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(script, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith(f"{program}: standard output: can")
    assert "(No space left on device)" in done.stderr
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        done = subprocess.run(script, cwd=ROOT, stdout=closed, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")
