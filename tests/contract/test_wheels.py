"""The wheels: their contents, their size, and what their commands do in fresh environments."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("client", "trainer", "exporter")
# Data files, in addition to the Python modules.
DATA = {
    "client": {
        "LICENSES.md", "bpe_simple_vocab_16e6.txt.gz", "page/icon.svg", "page/page.css", "page/index.html",
        "page/page.js", "py.typed",
    },
    "trainer": {
        "mini/LICENSES.md", "mini/MEASURED.md", "mini/held_out.json", "mini/mini.json", "mini/mini.safetensors",
        "mini/tasks/clipart.zip", "mini/tasks/digits.zip", "mini/tasks/emoji.zip", "mini/tasks/fashion.zip",
        "mini/tasks/flags.zip", "mini/tasks/icons.zip", "mini/tasks/letters.zip", "mini/tasks/signs.zip",
        "mini/tasks/tasks.json", "mini/tasks/textures.zip", "py.typed", "report/page.html.j2",
    },
    "exporter": {"py.typed", "serving/server-cpu.txt", "serving/server-cuda.txt"},
}  # fmt: skip
LARGEST_MB = {"client": 2, "trainer": 38, "exporter": 1}


@pytest.fixture(scope="session")
def wheels(tmp_path_factory):
    """The four wheels, built from a copy of the checkout because builds leave files in their source folders."""
    sources, built = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheels")
    for name in ("LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, sources)
    leftovers = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "dist")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, sources / name, symlinks=True, ignore=leftovers)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(built)]
    subprocess.run([*build, str(sources), *(str(sources / name) for name in PACKAGES)], check=True)
    return built


def contents(wheels, name):
    """Return the files in a wheel, without its metadata."""
    (wheel,) = wheels.glob(f"{name}-*.whl")
    with zipfile.ZipFile(wheel) as opened:
        return {entry for entry in opened.namelist() if not re.match(r"[\w.-]+\.dist-info/", entry)}


@pytest.mark.parametrize("name", PACKAGES)
def test_a_wheel_holds_its_package_and_nothing_else(wheels, name):
    source = ROOT / name / "src"
    modules = {str(path.relative_to(source)) for path in source.rglob("*.py")}
    data = {f"clipweld/{name}/{file}" for file in DATA[name]}
    assert contents(wheels, f"clipweld_{name}") == modules | data
    assert len(modules) > 20


@pytest.mark.parametrize("name", PACKAGES)
def test_a_wheel_is_small_and_includes_the_licence(wheels, name):
    (wheel,) = wheels.glob(f"clipweld_{name}-*.whl")
    assert wheel.stat().st_size < LARGEST_MB[name] * 1e6
    with zipfile.ZipFile(wheel) as opened:
        (licence,) = (entry for entry in opened.namelist() if entry.endswith(".dist-info/licenses/LICENSE"))
        assert opened.read(licence) == (ROOT / "LICENSE").read_bytes()


def test_the_wheel_that_users_install_has_no_files_of_its_own(wheels):
    assert contents(wheels, "clipweld") == set()


def test_its_page_on_a_package_index_has_no_broken_links(wheels):
    (wheel,) = wheels.glob("clipweld-*.whl")
    with zipfile.ZipFile(wheel) as opened:
        (metadata,) = (entry for entry in opened.namelist() if entry.endswith("/METADATA"))
        page = opened.read(metadata).decode()
    links = re.findall(r"\]\(([^)]+)\)", page)
    assert len(links) == len(re.findall(r"\]\(", (ROOT / "README.md").read_text(encoding="utf-8"))) > 10
    assert [link for link in links if not link.startswith("https://")] == []
    for link in links:
        file = re.sub(r"^https://[\w.]+/clipweld/clipweld/(blob/)?main/", "", link)
        assert (ROOT / file).exists(), link
    assert "raw.githubusercontent.com/clipweld/clipweld/main/docs/forgetting.png" in page


def test_all_packages_have_the_same_version(wheels):
    """It is the same in modules, wheels, and the requirements of each wheel on the others."""
    version = import_module("clipweld.client").__version__
    assert {import_module(f"clipweld.{name}").__version__ for name in PACKAGES} == {version}
    assert {wheel.name.split("-")[1] for wheel in wheels.glob("*.whl")} == {version}
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as opened:
            (metadata,) = (entry for entry in opened.namelist() if entry.endswith("/METADATA"))
            asked = re.findall(r"^Requires-Dist: (clipweld\S+?)==(\S+?);?(?: |$)", opened.read(metadata).decode(), re.M)
        assert {found for _, found in asked} <= {version}
        assert asked or "client" in wheel.name or "trainer" in wheel.name


@pytest.fixture(scope="session")
def install(wheels, tmp_path_factory):
    """A function that installs wheels and their dependencies in a fresh environment and returns its bin folder."""
    # With hashes, pip would ask for those of our own wheels too.
    pinned = re.sub(r" \\\n\s+--hash=\S+", "", (ROOT / "requirements" / "dev.txt").read_text(encoding="utf-8"))
    constraints = tmp_path_factory.mktemp("constraints") / "constraints.txt"
    constraints.write_text(pinned, encoding="utf-8")

    def install(*requirements):
        folder = tmp_path_factory.mktemp("environment")
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [folder / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check"]
        pins = ["--constraint", str(constraints), "--find-links", str(wheels)]
        subprocess.run([*pip, *pins, *requirements], check=True)
        return folder / "bin"

    return install


def run(command, folder):
    """Run a command in a folder with a minimal environment; return (exit code, stdout, stderr)."""
    done = subprocess.run(command, cwd=folder, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.network
@pytest.mark.slow
def test_a_plain_install_has_the_client_only(install, server, tmp_path):
    commands = install("clipweld")
    shutil.copy(ROOT / "samples" / "seven.png", tmp_path)
    code, out, err = run(
        [commands / "client", "classify", "seven.png", "--task", "digits", "--url", server.url], tmp_path
    )
    assert (code, err) == (0, "")
    assert "seven" in out
    assert not [name for name in PACKAGES[1:] if (commands / name).exists()]
    assert "ModuleNotFoundError" in run([commands / "python", "-c", "import client"], tmp_path)[2]


@pytest.mark.network
@pytest.mark.slow
def test_commands_name_the_extra_that_they_lack(install, repository, tmp_path):
    """Without extras a repository can be inspected; commands that need more name the extra to install."""
    commands = install("clipweld-exporter")
    assert run([commands / "trainer", "--version"], tmp_path) == run([commands / "exporter", "--version"], tmp_path)
    code, out, err = run([commands / "exporter", "versions", "--offline", "--repository", repository], tmp_path)
    assert (code, err) == (0, "")
    assert "digits" in out
    for command, extra in (
        (["trainer", "fit", "--model", "mini", "--task", "digits"], "train"),
        (["exporter", "merge", "--to", "onnx", "--model", "mini"], "export"),
    ):
        code, out, err = run([commands / command[0], *command[1:]], tmp_path)
        assert (code, out) == (1, "")
        assert re.fullmatch(rf"{command[0]}: .*pip install 'clipweld\[{extra}\]'\n", err), err
    code, out, err = run([commands / "exporter", "serve", "--repository", repository], tmp_path)
    assert (code, out) == (1, "")
    assert re.fullmatch(r"exporter: no Triton here: .*; make that with: exporter install-server\n", err), err


@pytest.mark.network
@pytest.mark.slow
def test_serving_needs_no_torch(install, repository, tmp_path):
    """With the extra ``serve`` alone, a server can be installed, and versions listed, served and queried."""
    commands = install("clipweld[serve]")
    assert not list(commands.parent.glob("lib/python*/site-packages/torch"))
    code, out, err = run([commands / "exporter", "install-server"], tmp_path)
    assert (code, err) == (0, "")
    assert out.endswith("Next: exporter serve\n")
    for folder in ("", ".store"):  # hard links, as in the original: both folders share their files
        shutil.copytree(f"{repository}{folder}", tmp_path / f"model_repository{folder}", copy_function=os.link)
    shutil.copy(ROOT / "samples" / "seven.png", tmp_path)
    code, out, err = run([commands / "exporter", "versions"], tmp_path)
    assert (code, err) == (0, "")
    assert "digits" in out
    ask = [commands / "client", "classify", "seven.png", "--task", "digits"]
    code, out, err = run([commands / "exporter", "serve", "--port", "0", "--", *ask], tmp_path)
    assert code == 0, err
    assert "seven" in out
