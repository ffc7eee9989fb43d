"""Only the import name ``clipweld`` is taken: files of users named client, trainer or exporter remain theirs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = ("client", "trainer", "exporter")
OWN = {
    "client.py, trainer.py and exporter.py": [f"{name}.py" for name in COMMANDS],
    "client/, trainer/ and exporter/": [f"{name}/__init__.py" for name in COMMANDS],
    "folders that hold other files": [f"{name}/data.txt" for name in COMMANDS],
}
SCRIPT = """
from clipweld.client import ZeroShotClassifier
from clipweld.exporter.errors import ExporterError
from clipweld.trainer.errors import TrainerError

import client, exporter, trainer


def test_each_is_its_own():
    for module in (client, trainer, exporter):
        assert getattr(module, "MINE", "a folder") in ("yes", "a folder"), module
        assert not hasattr(module, "errors")
    assert ZeroShotClassifier.__module__ == "clipweld.client._classifier"
    assert ExporterError.__module__ == "clipweld.exporter.errors"
    assert TrainerError.__module__ == "clipweld.trainer.errors"


test_each_is_its_own()
"""


@pytest.fixture(params=OWN)
def folder(request, tmp_path):
    """A user's folder with modules of those names, and a script that imports them and clipweld."""
    for name in OWN[request.param]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('MINE = "yes"\n')
    (tmp_path / "test_mine.py").write_text(SCRIPT)
    return tmp_path


def run(command, folder, **environment):
    environment = {"PYTHONDONTWRITEBYTECODE": "1", **environment}
    return subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{}, {"PYTHONPATH": "."}], ids=["plain", "PYTHONPATH=."])
@pytest.mark.parametrize(
    "way", [["test_mine.py"], ["-m", "test_mine"], ["-m", "pytest", "-q", "-p", "no:cacheprovider"]]
)
def test_a_script_imports_its_own_modules_and_clipweld(folder, way, environment):
    done = run([sys.executable, *way], folder, **environment)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("environment", [{}, {"PYTHONPATH": "."}], ids=["plain", "PYTHONPATH=."])
@pytest.mark.parametrize("name", COMMANDS)
def test_the_commands_work_beside_files_of_their_names(folder, name, environment):
    done = run([Path(sys.executable).with_name(name), "--version"], folder, **environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("clipweld ")


@pytest.mark.slow
def test_a_type_checker_finds_the_package_from_outside(tmp_path):
    """It needs no extra path, in an editable checkout as with an installed wheel."""
    (tmp_path / "mine.py").write_text(
        "from clipweld.client import Classification, ZeroShotClassifier\n\n"
        'def ask(path: str) -> "list[Classification]":\n'
        '    return list(ZeroShotClassifier("127.0.0.1:8001").classify(path, ["a", "b"]))\n\n'
        "reveal_type(ask)\nZeroShotClassifier(1, nothing=2)\n"
    )
    done = run([sys.executable, "-m", "mypy", "--strict", "--cache-dir", tmp_path / "cache", "mine.py"], tmp_path)
    assert 'Revealed type is "def (path: str) -> list[clipweld.client._results.Classification]"' in done.stdout
    assert 'Unexpected keyword argument "nothing"' in done.stdout, "it took the classifier for Any"
    assert "import" not in done.stdout, done.stdout
