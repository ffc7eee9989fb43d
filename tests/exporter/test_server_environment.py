"""The server's own environment: which Python it is made with, what it holds, and what an interruption leaves."""

from __future__ import annotations

import ctypes.util
import fcntl
import hashlib
import json
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from clipweld.exporter.cli import app
from clipweld.exporter.errors import InstallationFailed, TritonMissing
from clipweld.exporter.serving import interpreter
from clipweld.exporter.serving import server_environment as server

NAME = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"


def write_python(path: Path, version: str, *, shared: bool = True) -> Path:
    """Write a program that answers as a Python of another version or build would."""
    facts = {"version": version, "packages": "/p", "base": "/b", "library": None, "system_has_library": shared}
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{json.dumps(facts)}'\n")
    path.chmod(0o755)
    return path


def write_wheel(folder: Path, name: str, version: str) -> str:
    """Write a wheel of one empty module, and return its requirement with its hash."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": "",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{file},,\n" for file in (*files, f"{info}/RECORD"))
    with zipfile.ZipFile(path, "w") as wheel:
        for file, text in {**files, f"{info}/RECORD": record}.items():
            wheel.writestr(file, text)
    return f"{name}=={version} --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n"


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """A folder of small wheels that are the requirements, in place of the real ones; and an empty environment."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    requirements = tmp_path / "server-cpu.txt"
    requirements.write_text("".join(write_wheel(folder, name, "1.0") for name in ("numpy", "onnxruntime")))
    (tmp_path / "environment").mkdir()
    monkeypatch.setattr(server, "FOLDER", tmp_path / "environment" / "clipweld-server")
    monkeypatch.setattr(server, "REQUIREMENTS", requirements)
    for_gpus = tmp_path / "server-cuda.txt"
    for_gpus.write_text(requirements.read_text() + write_wheel(folder, "cuda", "1.0"))
    monkeypatch.setattr(server, "CUDA_REQUIREMENTS", for_gpus)
    return folder


def run(*arguments):
    app(["install-server", *map(str, arguments)], result_action="return_value")


def test_the_environment_of_this_checkout_shares_no_package_with_the_user_s():
    found = server.server_environment()
    assert found.version in server.VERSIONS
    ask = "import sys, numpy; print(numpy.__version__); print(*sys.path, sep='\\n')"
    version, *path = subprocess.check_output([found.executable, "-I", "-c", ask], text=True).splitlines()
    assert version.startswith("1.")
    assert str(found.packages) in path
    assert not {entry for entry in path if "site-packages" in entry} & set(sys.path)
    for name in ("torch", "clipweld", "tritonclient"):
        done = subprocess.run([found.executable, "-I", "-c", f"import {name}"], capture_output=True, text=True)
        assert f"No module named '{name}'" in done.stderr
    with pytest.raises(ModuleNotFoundError):
        import pytriton  # noqa: F401


def test_without_an_environment_the_error_names_the_command(wheels):
    with pytest.raises(TritonMissing, match=r"^no Triton here: .*; make that with: exporter install-server$"):
        server.server_environment()


def test_installing_from_a_folder_of_wheels(wheels, capsys):
    run("--from", wheels)
    assert re.fullmatch(
        rf"{server.FOLDER}: Triton, run by Python 3\.\d+\. Next: exporter serve\n", capsys.readouterr().out
    )
    assert [path.name for path in server.FOLDER.parent.iterdir()] == ["clipweld-server"]
    made = server.FOLDER.stat().st_ino
    run()
    assert capsys.readouterr().out == f"{server.FOLDER}: is there already\n"
    assert server.FOLDER.stat().st_ino == made

    server.REQUIREMENTS.write_text(server.REQUIREMENTS.read_text() + write_wheel(wheels, "more", "2.0"))
    with pytest.raises(TritonMissing, match="made for another release of clipweld; make it anew with: exporter inst"):
        server.server_environment()
    run("--from", wheels)
    assert (server.server_environment().packages / "more.py").is_file()


@pytest.mark.parametrize(
    ("fault", "said"), [("hash", "THESE PACKAGES DO NOT MATCH THE HASHES"), ("lacking", "No matching distribution")]
)
def test_a_wheel_that_is_another_or_lacking_is_refused_and_the_environment_stays(wheels, fault, said):
    run("--from", wheels)
    made = server.FOLDER.stat().st_ino
    if fault == "hash":
        write_wheel(wheels, "numpy", "1.0")  # the time in it is another
        with (wheels / "numpy-1.0-py3-none-any.whl").open("ab") as file:
            file.write(b" ")
    else:
        (wheels / "numpy-1.0-py3-none-any.whl").unlink()
    with pytest.raises(InstallationFailed, match=rf"^the server's environment could not be made: .*{said}"):
        run("--python", server.choose_python(None, cuda=False).executable, "--from", wheels)
    assert [path.name for path in server.FOLDER.parent.iterdir()] == ["clipweld-server"]
    assert server.FOLDER.stat().st_ino == made
    server.server_environment()


def test_what_a_killed_installation_left_is_removed_and_one_at_work_is_not_disturbed(wheels):
    new = server.FOLDER.with_name("clipweld-server.new")
    (new / "lib").mkdir(parents=True)
    (new / "lib" / "half").touch()
    descriptor = os.open(new, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(InstallationFailed, match="another exporter install-server is at work; wait until"):
        run("--from", wheels)
    assert (new / "lib" / "half").exists()
    os.close(descriptor)
    run("--from", wheels)
    assert not new.exists()
    assert not (server.FOLDER / "lib" / "half").exists()


def test_an_environment_with_cuda_is_kept_where_none_is_asked_for(wheels, capsys):
    run("--from", wheels)
    run("--from", wheels, "--cuda")
    assert (server.server_environment().packages / "cuda.py").is_file()
    capsys.readouterr()
    run("--from", wheels)
    assert capsys.readouterr().out == f"{server.FOLDER}: is there already\n"


def test_a_folder_that_can_t_be_written_to_is_named(wheels, monkeypatch):
    monkeypatch.setattr(server, "FOLDER", Path("/proc/clipweld-server"))
    with pytest.raises(InstallationFailed, match=r"^/proc/clipweld-server.new: .*; .* or in a virtual environment$"):
        run("--from", wheels)


def test_a_pip_conf_of_the_user_s_environment_is_used(wheels, tmp_path, monkeypatch):
    monkeypatch.setattr(server, "FOLDER", tmp_path / "environment" / "clipweld-server")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    for name in [name for name in os.environ if name.startswith("PIP_")]:  # they come before any file
        monkeypatch.delenv(name)
    (tmp_path / "pip.conf").write_text(f"[global]\nno-index = true\nfind-links = {wheels}\n")
    run()
    assert (server.FOLDER / "pip.conf").is_file()


def test_a_python_too_new_is_passed_over_for_one_on_path(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(write_python(tmp_path / "python3", "3.14")))
    monkeypatch.setenv("PATH", f"{tmp_path}/bin")
    with pytest.raises(TritonMissing, match=rf"on Python 3.12, 3.11, 3.10; here {tmp_path}/python3 is Python 3.14"):
        server.choose_python(None, cuda=False)
    write_python(tmp_path / "bin" / "python3.12", "3.12", shared=False)
    write_python(tmp_path / "bin" / "python3.10", "3.10")
    assert server.choose_python(None, cuda=False).executable == tmp_path / "bin" / "python3.10"
    with pytest.raises(
        TritonMissing, match=r"with CUDA runs on Python 3.12, 3.11; here .*install the system's libpython"
    ):
        server.choose_python(None, cuda=True)


def test_a_given_python_that_can_t_run_a_server_is_refused(tmp_path):
    other = write_python(tmp_path / "python", "3.13")
    with pytest.raises(TritonMissing, match=rf"^--python {other} is Python 3.13; a server runs on Python 3.12, 3.11"):
        server.choose_python(str(other), cuda=False)
    static = write_python(tmp_path / "static", "3.12", shared=False)
    with pytest.raises(TritonMissing, match=r"^libpython3.12.so.1.0: .*--enable-shared: exporter install-server --py"):
        server.choose_python(str(static), cuda=False)
    with pytest.raises(TritonMissing, match=r"^/nowhere: not a Python that can be run"):
        server.choose_python("/nowhere", cuda=False)


def test_a_python_knows_its_shared_library(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_config_var", {"LIBDIR": str(tmp_path)}.get)
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path))
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    for known in (None, NAME):
        monkeypatch.setattr(ctypes.util, "find_library", {interpreter_name(): known}.get)
        facts = interpreter.facts()
        assert (facts["library"], facts["system_has_library"]) == (None, known is not None)
    (tmp_path / NAME).touch()
    assert interpreter.facts()["library"] == f"{tmp_path}/{NAME}"


def interpreter_name():
    return f"python{sys.version_info.major}.{sys.version_info.minor}"


def test_all_requirements_are_pinned_and_hashed():
    for file in (server.requirements(cuda=cuda) for cuda in (False, True)):
        lines = re.sub(r"\\\n\s+", "", re.sub(r"(?m)^#.*\n", "", file.read_text(encoding="utf-8"))).splitlines()
        assert lines
        for line in lines:
            assert re.fullmatch(r"[\w-]+==[\w.]+(; [^-]+)?\s?(\s?--hash=sha256:[0-9a-f]{64})+", line), line
