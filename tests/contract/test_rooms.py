"""Which package and module may import which, and which imports must stay light."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# From the lowest layer up. Modules listed together must not import each other.
FLOORS = {
    "trainer": (
        "errors extras intervals mini os_errors preprocessing schemas",
        "command_line config files finite header launch output text",
        "tensors", "adapters", "tasks",
        "base", "commands method", "learning", "sequence", "report tables", "cli", "__main__",
    ),
    "exporter": (
        "config results", "errors", "disk", "graph", "store", "checks serving", "release", "tables", "cli", "__main__",
    ),
}  # fmt: skip
SEAMS = {
    f"clipweld.trainer.{name}"
    for name in (
        "adapters",
        "base",
        "command_line",
        "errors",
        "extras",
        "files",
        "os_errors",
        "output",
        "schemas",
        "tasks",
        "text",
    )
}  # fmt: skip


def imports_of(room):
    """Yield (file, imported module) for every import of a package."""
    for path in (ROOT / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from ((path, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield path, node.module
                yield from ((path, f"{node.module}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize(
    ("room", "others"),
    [("trainer", {"exporter", "client"}), ("exporter", {"client"}), ("client", {"trainer", "exporter", "torch"})],
)
def test_a_package_does_not_import_the_others(room, others):
    found = [(str(path), name.removeprefix("clipweld.")) for path, name in imports_of(room)]
    assert len(found) > 100
    assert [(path, name) for path, name in found if name.split(".")[0] in others | {"evidence"}] == []


@pytest.mark.parametrize("room", FLOORS)
def test_modules_import_only_from_lower_layers(room):
    """This includes imports inside functions and for types, so there are no import cycles."""
    floor = {wing: number for number, wings in enumerate(FLOORS[room]) for wing in wings.split()}
    home = ROOT / room / "src" / "clipweld" / room
    wings = {path.name.removesuffix(".py") for path in home.iterdir() if path.name not in ("__pycache__", "py.typed")}
    assert wings == {*floor, "__init__"}
    seen = set()
    for path, name in imports_of(room):
        wing = path.relative_to(home).parts[0].removesuffix(".py")
        target = name.removeprefix(f"clipweld.{room}.").partition(".")[0]
        if name.startswith(f"clipweld.{room}.") and target in floor and target != wing:
            assert floor[target] < floor[wing], f"{path} imports {name}"
            seen.add((wing, target))
    assert len(seen) > 30


@pytest.mark.slow
def test_modules_of_one_subpackage_form_no_import_cycle():
    for room in ("trainer", "exporter", "client"):
        modules = {}
        for path, name in imports_of(room):
            module = ".".join(path.relative_to(ROOT / room / "src").with_suffix("").parts).removesuffix(".__init__")
            modules.setdefault(module, set()).add(name)
        for module, names in modules.items():  # importing from a package does not count as importing the package
            packages = {name.rpartition(".")[0] for name in names & modules.keys()}
            modules[module] = names & modules.keys() - packages - {module}
        list(TopologicalSorter(modules).static_order())  # raises CycleError, which names the cycle


def test_the_exporter_uses_only_the_allowed_modules_of_the_trainer():
    used = {name for _, name in imports_of("exporter") if name.startswith("clipweld.trainer.")}
    assert {".".join(name.split(".")[:3]) for name in used} <= SEAMS


@pytest.mark.parametrize(
    "statement",
    [
        "from clipweld import client; client.ZeroShotClassifier",
        "from clipweld.client.cli import main; main()",
        "from clipweld.trainer.cli import main; main()",
        "from clipweld.trainer.cli import main; sys.argv.insert(1, 'fit'); main()",
        "from clipweld.exporter.cli import main; main()",
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
