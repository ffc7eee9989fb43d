"""A server runs no files of the working folder; the command run beside it keeps that folder and its variables."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from clipweld.exporter.errors import TritonFailed
from clipweld.exporter.serving import isolation
from clipweld.exporter.serving.installation import installation
from clipweld.exporter.serving.triton import run_beside, serve

SHADOWS = ("json", "random", "numpy", "onnxruntime", "triton_python_backend_utils", "model", "sitecustomize")


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """A working folder whose files leave a trace when run, with every variable set that may lead to it."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    trace = folder / "RAN"
    for name in (*SHADOWS, "usercustomize"):
        (folder / f"{name}.py").write_text(f"open({str(trace)!r}, 'a').write('{name} ')\nraise RuntimeError\n")
    (folder / "shell").write_text(f"echo shell >> '{trace}'\n")
    for name in ("bash", "sh", "python3", "env"):
        (folder / name).write_text(f"#!/bin/false\n{name}")
        (folder / name).chmod(0o755)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(folder), ".", "")))
    monkeypatch.setenv("PYTHONSTARTUP", str(folder / "json.py"))
    monkeypatch.setenv("PYTHONUSERBASE", ".")
    monkeypatch.setenv("PYTHONHOME", "/nonexistent")
    monkeypatch.setenv("BASH_ENV", str(folder / "shell"))
    monkeypatch.setenv("PATH", os.pathsep.join((".", "", os.environ["PATH"])))
    return folder


def test_a_server_runs_nothing_from_the_working_folder(repository, hostile):
    place = os.path.relpath(repository.path)
    command = [sys.executable, "-I", "-c", "import os; open('kept', 'w').write(os.getcwd() + os.environ['PYTHONPATH'])"]
    with serve(Path(place)) as server:
        os.environ.pop("PYTHONHOME")  # with it, the command itself would not start
        assert run_beside(server, command) == 0
        working = Path(f"/proc/{server.process.pid}/cwd").readlink()
        assert list(working.iterdir()) == []
    assert not (hostile / "RAN").exists(), (hostile / "RAN").read_text()
    assert (hostile / "kept").read_text() == f"{hostile}{os.environ['PYTHONPATH']}"
    assert not working.exists()


def test_variables_and_relative_paths_that_may_run_files_are_left_out():
    given = {
        "HOME": "/home/a", "LANG": "C", "PYTHONPATH": "/a", "PYTHONHOME": "/b", "BASH_ENV": "x", "ENV": "x",
        "BASH_FUNC_exec%%": "() { :; }", "PATH": ".::bin:/usr/bin:/bin", "LD_LIBRARY_PATH": ":lib:",
    }  # fmt: skip
    assert isolation.isolated_environment(given) == {"HOME": "/home/a", "LANG": "C", "PATH": "/usr/bin:/bin"}


def test_onnx_runtime_reports_to_nobody(repository, tmp_path):
    """From 1.29 on it sends what it runs to Microsoft, and leaves a device's identifier in the home folder."""
    assert isolation.isolated_environment(os.environ)["ORT_DISABLE_TELEMETRY"] == "1", "servers inherit it"
    tower = str(repository.file("text", 1))
    code = f"from clipweld.exporter.checks.parity import onnxruntime; onnxruntime.InferenceSession({tower!r})"
    environment = {"HOME": str(tmp_path), "TMPDIR": str(tmp_path), "PATH": os.environ["PATH"]}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / ".ses").exists()
    assert not list(tmp_path.rglob("Microsoft"))


def test_a_temporary_folder_mounted_noexec_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=os.ST_NOEXEC))
    with (
        pytest.raises(TritonFailed, match=rf"temporary folder {tmp_path}: .* noexec, .*; set TMPDIR to a folder"),
        installation("clipweld-0-0-"),
    ):
        pytest.fail("must not start")
    assert list(tmp_path.iterdir()) == []
