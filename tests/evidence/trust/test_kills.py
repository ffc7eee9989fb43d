"""Killed commands end as if undisturbed when run again, and the study notices where they don't."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from clipweld.exporter.serving.installation import SHARED_MEMORY
from evidence.trust import kills
from evidence.trust.kills import Undisturbed, content, strange, strays, study
from evidence.trust.record import Record
from evidence.trust.stage import Command, environment

ROOT = Path(__file__).parents[3]
CAREFUL = """
import os, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
staged = folder / ".result.tmp"
with staged.open("w") as file:
    for line in range(20):
        print(line, file=file, flush=True)
        time.sleep(0.01)
os.replace(staged, folder / "result")
"""
FAULTS = {
    "half a file": (CAREFUL.replace(".result.tmp", "result"), "result is neither as it was, nor as it is at the end"),
    "left for good": (
        CAREFUL.replace(".result.tmp", ".result-{os.getpid()}.tmp").replace('".', 'f".'),
        "is left for good",
    ),
    "another end": (
        CAREFUL.replace("with", "lines = 20 + staged.exists()\nwith", 1).replace("range(20)", "range(lines)"),
        "result is another than that of an undisturbed run",
    ),
}


def command(program: str) -> Command:
    return Command(
        "a command",
        ("-c", program, "{folder}"),
        lambda folder: (folder / "earlier").write_text("what was there"),
        unfinished=(".result*.tmp",),
    )


def killed(program: str, tmp_path: Path) -> Record:
    record = Record(tmp_path / "kills.json")
    study([command(program)], 6, 0, tmp_path / "cases", record, tmp_path / "kills")
    return record


@pytest.mark.slow
def test_a_careful_command_has_no_faults(tmp_path):
    record = killed(CAREFUL, tmp_path)
    assert record.broken == []
    found = record.figures["a command"]["found"]
    assert sum(found.values()) == record.figures["a command"]["kills"] >= 6
    assert found["half of it"] >= 1
    kills = [json.loads(line) for line in (tmp_path / "kills" / "kills.jsonl").read_text().splitlines()]
    assert len(kills) == record.figures["kills"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["half a file", "left for good", "another end"])
def test_faults_after_a_kill_are_reported(tmp_path, name):
    program, fault = FAULTS[name]
    record = killed(program, tmp_path)
    assert any(fault in line for line in record.broken), record.broken
    assert all("a command, --seed 0, case " in line for line in record.broken)
    assert [path for path in (tmp_path / "kills").iterdir() if path.is_dir()]  # kept for inspection


def test_a_run_that_ends_before_its_kill_is_not_run_again(tmp_path):
    once = command("import pathlib, sys; (pathlib.Path(sys.argv[1]) / 'result').touch(exist_ok=False)")
    undisturbed = replace(kills.left_alone(once, tmp_path / "alone"), starting_s=60, working_s=60)
    assert kills.kill(once, 0, undisturbed, 0, tmp_path) == kills.Case()


def test_incomplete_versions_and_missing_files_are_reported():
    undisturbed = Undisturbed(
        {"kept": "1", "gone": "2"}, {"kept": "1", "gone": "2", "store/3": "", "store/3/x": "3"}, 1, 1
    )
    assert strange(command(""), {"kept": "1", "store/3": ""}, undisturbed) == [
        "gone is gone",
        "store/3 lacks store/3/x",
    ]
    assert strange(command(""), {"kept": "1", "gone": "2"}, undisturbed) == []


def test_scores_are_compared_to_three_decimals(tmp_path):
    def written(row):
        (tmp_path / "answers.csv").write_text(f"image,rank,label,probability,score\n{row}\n")
        return content(tmp_path)["answers.csv"]

    end = written("a.png,1,bird,0.6476868139298007,0.33163464069366455")
    assert written("a.png,1,bird,0.6476869728010504,0.33163467049598694") == end
    assert written("a.png,1,bird,0.6496868139298007,0.33163464069366455") != end
    assert written("a.png,1,cat,0.6476868139298007,0.33163464069366455") != end


def test_leftover_processes_and_shared_memory_are_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(kills, "ENDING_S", 0)
    process = subprocess.Popen(["sleep", "60"], env=environment(tmp_path), start_new_session=True)
    while not psutil.Process(process.pid).environ():  # until the kernel has started the program
        time.sleep(0.01)
    region = SHARED_MEMORY / f"clipweld-{process.pid}-of-a-test"
    region.touch()
    try:
        left = strays(tmp_path, [process.pid])
    finally:
        region.unlink()
        process.kill()
        process.wait()
    assert left == [
        f"process {process.pid} lives on: sleep",
        f"shared memory {region.name} is left for good",
    ]
    assert strays(tmp_path, [process.pid]) == []


@pytest.mark.slow
def test_killed_real_commands_have_no_faults(tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "evidence.trust.kills", "--kills", "2", "--out", tmp_path / "kills.json"),
            *("--only", "exporter prune", "--only", "client classify"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "kills.json").read_text())
    assert record["broken"] == []
    assert record["figures"]["kills"] >= 4
