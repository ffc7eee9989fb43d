"""The tables of RESULTS.md and TRUST.md are what their commands print from the records in the repository."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("RESULTS.md", "TRUST.md"))
# A comment names the command; the table follows.
TABLES = re.findall(r"<!-- (python -m evidence\.\w+\.\w+ .+?) -->\n\n((?:\|.+\|\n)+)", TEXT)


def test_every_command_in_the_pages_has_a_table():
    assert len(TABLES) == TEXT.count("<!-- python -m") > 2


@pytest.mark.slow
@pytest.mark.parametrize(("command", "table"), TABLES, ids=[command for command, _ in TABLES])
def test_the_table_is_what_its_command_prints(command, table):
    arguments = [sys.executable, *shlex.split(command)[1:]]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == table.strip()


def test_no_record_reports_a_broken_promise():
    records = sorted((ROOT / "evidence" / "records" / "trust").glob("*.json"))
    assert records
    for record in records:
        assert json.loads(record.read_text(encoding="utf-8"))["broken"] == [], record.name
