"""Every program works with any standard streams, or says in one line why it cannot."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from clipweld.client import _output as of_client
from clipweld.client.errors import ResultsError
from clipweld.trainer import output as of_trainer
from clipweld.trainer.errors import OutputError

# Commands, and their exit status with normal streams.
CALLS = {
    "trainer --help": 0,
    "trainer fit --task nonsuch": 1,
    "exporter --help": 0,
    "exporter nonsense": 2,
    "client tasks --help": 0,
    "client tasks --url nonsense": 1,
}
SHELL = {
    "stdout closed": "{} >&-",
    "stderr closed": "{} 2>&-",
    "stdin closed": "{} <&-",
    "all closed": "{} >&- 2>&- <&-",
    "stdout full": "{} >/dev/full",
    "stderr full": "{} 2>/dev/full",
    "stdout read by nobody": "exec 3> >(exec true); wait $!; {} >&3",
}
VARIABLES = {
    "ASCII": {"PYTHONIOENCODING": "ascii"},
    "Latin-1": {"PYTHONIOENCODING": "latin-1"},
    "UTF-16": {"PYTHONIOENCODING": "utf-16"},
    "plain C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "a terminal that can do nothing": {"TERM": "dumb"},
    "one column": {"COLUMNS": "1"},
    "no columns": {"COLUMNS": "0"},
    "columns that are no number": {"COLUMNS": "many"},
}
PROGRAMS = Path(sys.executable).parent
both = pytest.mark.parametrize(("printing", "error"), [(of_trainer, OutputError), (of_client, ResultsError)])


def run(call, shell="{}", **variables):
    script = shell.format(f"{PROGRAMS}/{call}")
    return subprocess.run(
        ["bash", "-c", script], env={**os.environ, **variables}, capture_output=True, timeout=120, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
def test_no_stream_or_terminal_setting_causes_a_traceback(call):
    with ThreadPoolExecutor(2) as pool:
        by_shell = {name: pool.submit(run, call, shell) for name, shell in SHELL.items()}
        by_variable = {name: pool.submit(run, call, **variables) for name, variables in VARIABLES.items()}
    for name, done in ((name, future.result()) for name, future in {**by_shell, **by_variable}.items()):
        said = done.stdout + done.stderr
        assert b"Traceback" not in said and b"Exception ignored" not in said, (name, said)  # noqa: PT018
        cannot_print = CALLS[call] == 0 and name in ("stdout full", "stdout read by nobody")
        assert done.returncode == (1 if cannot_print else CALLS[call]), (name, said)
        if cannot_print and name == "stdout full":
            assert b"standard output: can" in said
            assert said.count(b"\n") == 1


@both
def test_json_output_is_valid_in_every_stream_encoding(printing, error, monkeypatch):
    for encoding in ("ascii", "latin-1", "utf-16", "utf-8"):
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
        with printing.printing():
            printing.print_json({"class": "Å 数字 \U0001f600 \udcff"})
        assert json.loads(written.getvalue().decode(encoding)) == {"class": "Å 数字 \U0001f600 \udcff"}


@both
def test_tables_use_only_characters_that_the_stream_can_encode(printing, error, monkeypatch):
    from rich.table import Table

    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    table = Table("class")
    table.add_row("數")
    with printing.printing():
        printing.console().print(table)
    text = written.getvalue().decode("ascii")
    assert "| \\u6578" in text
    assert "\\u2" not in text, "lines are drawn in ASCII"


@both
def test_output_to_a_closed_stream_never_ends_up_in_the_next_opened_file(printing, error, tmp_path):
    code = (
        f"import os, {printing.__name__} as p\n"
        "with p.messages(), p.printing():\n"
        f"    file = open({str(tmp_path / 'file')!r}, 'w')\n"
        "    os.write(1, b'not for the file')\n"
        "    print('nor this')\n"
    )
    done = subprocess.run(["bash", "-c", f'exec {sys.executable} -c "$0" >&- 2>&- <&-', code], check=False)
    assert done.returncode == 0
    assert (tmp_path / "file").read_bytes() == b""


@both
def test_unwritable_messages_are_ignored_and_unwritable_results_are_an_error(printing, error, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        with printing.messages():
            print("lost", file=sys.stderr, flush=True)
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(error, match="No space left on device"), printing.printing():
            print("a result")
