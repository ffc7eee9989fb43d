"""The directions between the rooms, and what must stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("trainer", "exporter", "client")
SEAMS = {
    f"trainer.{name}"
    for name in (
        "adapter",
        "adapters_folder",
        "backbone",
        "errors",
        "files",
        "hub",
        "merge",
        "model_choice",
        "os_errors",
        "printing",
        "records",
        "tasks",
        "towers",
        "wording",
    )
}


def imports_of(room):
    """(file, module) for every import of a room's files."""
    for path in (ROOT / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from ((path, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield path, node.module
                yield from ((path, f"{node.module}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize(
    ("room", "others"), [("trainer", {"exporter", "client"}), ("client", {"trainer", "exporter", "torch"})]
)
def test_room_imports_nothing_of(room, others):
    assert [(str(path), name) for path, name in imports_of(room) if name.split(".")[0] in others] == []


def test_exporter_uses_the_trainer_at_its_seams_only():
    used = {name for _, name in imports_of("exporter") if name.startswith("trainer.")}
    assert {".".join(name.split(".")[:2]) for name in used} <= SEAMS
    assert not [name for _, name in imports_of("exporter") if name.split(".")[0] == "client"]


@pytest.mark.parametrize(
    "statement",
    [
        "import client; client.ZeroShotClassifier",
        "from client.cli import main; main()",
        "from trainer.cli import main; main()",
        "from trainer.cli import main; sys.argv.insert(1, 'fit'); main()",
        "from exporter.cli import main; main()",
    ],
)
def test_help_and_the_client_import_nothing_heavy(statement):
    code = (
        f"import sys; sys.argv = ['x', '--help']\n"
        f"try:\n    {statement}\nexcept SystemExit as e:\n    assert not e.code, e.code\n"
        "print('HEAVY', sorted({'torch', 'open_clip', 'onnx', 'onnxruntime'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("HEAVY []"), done.stdout[-200:]
