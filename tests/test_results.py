"""The tables of RESULTS.md are what its own commands print from the records that come with it."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
# A comment names the command; the table follows.
TABLES = re.findall(r"<!-- (python -m (?:trainer\.studies|benchmarks)\.\w+ .+?) -->\n\n((?:\|.+\|\n)+)", RESULTS)


def test_there_are_tables():
    assert len(TABLES) == RESULTS.count("<!-- python -m") > 2


@pytest.mark.parametrize(("command", "table"), TABLES, ids=[command for command, _ in TABLES])
def test_table_is_what_the_command_prints(command, table):
    arguments = [sys.executable, *shlex.split(command)[1:]]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == table.strip()
