"""Commands in unusual environments: home, locale, umask, cores, working folder and temporary folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
MODULES = ("exporter", "trainer")


def run(arguments, folder, prefix=(), **settings):
    """Run one of our commands with the Python that runs the tests, without assertions."""
    command, *rest = arguments
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    environment = {name: value for name, value in environment.items() if name not in ("LANG", "HOME", "PYTHONUTF8")}
    return subprocess.run(
        [*prefix, sys.executable, "-O", BIN / command, *rest],
        cwd=folder, capture_output=True, check=False, env=environment | settings.pop("env", {}), **settings,
    )  # fmt: skip


@pytest.mark.slow
def test_fit_merge_and_serve_work_in_an_unusual_environment(tmp_path):
    """No home, the C locale, a strict umask, one core, no assertions and non-ASCII folder names, all at once."""
    folder = tmp_path / "Größe 数字 ☃"
    shutil.copytree(ROOT / "samples", folder / "bilder")
    settings = {"env": {"LC_ALL": "C", "HOME": "/proc/none"}, "umask": 0o077, "prefix": ("taskset", "-c", "0")}
    models = ("--repository", "répo")
    for arguments in (
        ("trainer", "fit", "--model", "mini", "--task", "bilder/bolts", "--name", "Schräubchen", "--iterations", "3",
         "--adapters", "gelernt ☃"),
        ("exporter", "merge", "--to", "onnx", "--model", "mini", "--adapters", "gelernt ☃", *models),
        ("exporter", "versions", *models),
    ):  # fmt: skip
        done = run(arguments, folder, **settings)
        assert done.returncode == 0, done.stderr.decode()
    ask = ("client", "classify", "bilder/new.jpg", "--task", "Schräubchen", "--json")
    done = run(("exporter", "serve", "--port", "0", *models, "--", *ask), folder, **settings)
    assert done.returncode == 0, done.stderr.decode()
    (answer,) = json.loads(done.stdout)
    assert {row["label"] for row in answer["predictions"]} == {"hex bolt", "eye bolt"}


@pytest.mark.parametrize("command", MODULES)
def test_a_deleted_working_folder_is_reported(command, tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    line = f'cd "{gone}" && rmdir "{gone}" && exec "{sys.executable}" "{BIN / command}" {first(command)}'
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f"{command}: the working folder has been deleted; change to another one\n"


@pytest.mark.slow
@pytest.mark.parametrize("command", MODULES)
def test_a_folder_name_that_is_not_utf_8_is_refused(command, tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    os.mkdir(folder)
    for where, arguments in (
        (tmp_path, (first(command), {"exporter": "--repository", "trainer": "--data"}[command], folder)),
        (folder, (first(command),)),
    ):
        done = run((command, *arguments), where)
        assert done.returncode == 1
        assert done.stderr.decode().endswith("caf\\udce9: this name is not valid UTF-8; rename it\n")
        assert len(done.stderr.splitlines()) == 1
    assert os.listdir(folder) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="making every temporary folder read-only takes root")
@pytest.mark.parametrize("command", MODULES)
def test_without_a_temporary_folder_the_error_names_the_variable_to_set(command, tmp_path):
    hidden = ("/tmp", "/var/tmp")
    if sys.executable.startswith(hidden):
        pytest.skip("this Python lies in what is to be hidden")
    hide = " && ".join(f"mount -t tmpfs -o ro none {place}" for place in hidden)
    line = f'{hide} && cd /proc/sys && exec "{sys.executable}" "{BIN / command}" {first(command)}'
    environment = {name: value for name, value in os.environ.items() if name not in ("TMPDIR", "TEMP", "TMP")}
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", line], capture_output=True, text=True, check=False, env=environment
    )
    if "permission denied" in done.stderr.lower() or "unshare" in done.stderr:
        pytest.skip("no mount namespaces here")
    assert done.returncode == 1
    assert done.stderr.startswith(f"{command}: temporary files: no folder for them can be written")
    assert "TMPDIR" in done.stderr


def first(command):
    """Return a subcommand that needs no arguments."""
    return {"exporter": "versions", "trainer": "tasks"}[command]
