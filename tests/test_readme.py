"""Every command in the README and the guides, run in order and, but for three changes, exactly as written.

The changes are needed without a network: ``--download`` is left out, and a tiny aircraft data set in
torchvision's layout replaces it; the real ViT-B-16 has random weights, few steps and small batches; ports are
free ones. ``make`` commands are left out, because ``make`` runs these tests.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDES = ("tutorial", "client", "real-clip", "folders", "releases", "measuring")
SETUP = {"make demo", "make test", "source .venv/bin/activate"}
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def commands(page, section=""):
    """Return the shell commands of a page, or of one of its sections, without comments."""
    text = (ROOT / page).read_text(encoding="utf-8")
    if section:
        text = text.split(f"## {section}\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```sh\n(.*?)```", text, re.S)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and line not in SETUP]


def run(command, folder):
    """Run one command, which must succeed, and return its stdout."""
    done = subprocess.run(
        shlex.split(command), cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"$ {command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def offline(command):
    """Return the same command, changed so that it needs no network and takes seconds."""
    command = command.replace(" --download", "")
    if command.startswith("trainer fit") and "--model" not in command:
        command += " --pretrained random --iterations 1 --batch-size 2 --shots 1"
    if command.startswith("exporter merge") and "--model" not in command:
        command += " --pretrained random"
    if command.startswith("trainer fit") and "mini" in command:
        command += " --iterations 20"
    if command.startswith("trainer sequence"):
        command += " --iterations 2"
    return command.replace("exporter serve --", "exporter serve --port 0 --")


def paint(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (80, 90, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    """A new user's folder: the shipped samples and a tiny FGVC-Aircraft."""
    folder = tmp_path / "user"
    shutil.copytree(ROOT / "samples", folder / "samples")
    data = folder / "data/fgvc-aircraft-2013b/data"
    variants = ["707-320", "A380"]
    for i, split in enumerate(("trainval", "test")):
        names = [f"{split}{j}" for j in range(2)]
        for j, name in enumerate(names):
            paint(data / "images" / f"{name}.jpg", 20 + 2 * i + j)
        rows = "".join(f"{name} {variant}\n" for name, variant in zip(names, variants, strict=True))
        (data / f"images_variant_{split}.txt").write_text(rows)
    (data / "variants.txt").write_text("\n".join(variants) + "\n")
    return folder


def test_setup_commands_are_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("demo", "test"):
        assert f"make {target} " in README
        assert re.search(rf"^{target}: install", makefile, re.M)


def test_every_page_and_section_with_commands_is_tested():
    assert [name for name in re.findall(r"^## (.+)$", README, re.M) if commands("README.md", name)] == [
        "First steps",
        "Your own images",
    ]
    others = {"without-the-client"}  # tests/test_docs.py
    assert {page.stem for page in ROOT.glob("docs/*.md") if commands(page)} == {*GUIDES, *others}


def test_pictures_and_pages_named_in_documents_exist():
    pages = [ROOT / "README.md", ROOT / "samples/README.md", *ROOT.glob("docs/*.md"), ROOT / "deploy/README.md"]
    named = re.compile(r"(?:\]\(|[ \"'])([\w./-]+\.(?:png|jpg|svg|md|py))\b")
    for page in pages:
        for name in named.findall(page.read_text(encoding="utf-8")):
            assert (page.parent / name).exists() or (ROOT / name).exists(), f"{page.name} names {name}"


@pytest.mark.parametrize("command", ["exporter serve", "client classify"])
def test_pictures_in_help_screens_exist(command, folder):
    named = re.findall(r"[\w/]+\.(?:png|jpg)\b|samples/\w+", run(f"{command} --help", folder))
    assert named
    assert all((folder / name).exists() for name in named), named


@pytest.fixture
def learned(folder):
    """The user's folder after the first steps of the README."""
    lines = [offline(line) for line in commands("README.md", "First steps")]
    serve = next(line for line in lines if line.startswith("exporter serve"))
    for line in lines[: lines.index(serve)]:
        run(line, folder)
    assert "seven" in run(serve, folder)
    return folder


@pytest.mark.slow
def test_the_first_steps_and_the_client_guide(learned):
    """All commands use one running server, as a reader's would."""
    server = subprocess.Popen(["exporter", "serve"], cwd=learned, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    try:
        while "Ctrl-C" not in (line := server.stderr.readline()):
            assert line, "exporter serve ended before it was ready"
        for line in (*commands("README.md", "First steps"), *commands("docs/client.md")):
            if line.startswith("client"):
                assert run(line, learned)
        assert len((learned / "answers.csv").read_text().splitlines()) == 26  # five labels for each image
        for page, answers in (("README.md", [5]), ("docs/client.md", [1, 5])):
            examples = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)
            said = [
                subprocess.run(
                    [sys.executable, "-c", example], cwd=learned, capture_output=True, text=True, check=True
                ).stdout
                for example in examples
            ]
            assert [len(text.splitlines()) for text in said] == answers
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=30) == 0
        server.stderr.close()


@pytest.mark.slow
def test_your_own_images_after_the_first_steps(learned):
    """Without ``--model``, the model is that of the existing adapters."""
    said = {}
    for line in commands("README.md", "Your own images"):
        quick = " --iterations 3" if line.startswith("trainer fit") else ""
        said[line] = run(line.replace("serve --", "serve --port 0 --") + quick, learned)
    assert "version 3 is served (before: 2)" in said["exporter promote"]


@pytest.mark.slow
def test_the_real_clip_and_your_own_images(folder):
    """Both run together, with a single merge after all training, because exporting a ViT-B-16 is slow."""
    lines = dict.fromkeys(commands("docs/real-clip.md") + commands("README.md", "Your own images"))
    for step in ("trainer", "exporter merge", "exporter promote", "exporter serve"):
        for line in lines:
            if line.startswith(step):
                run(offline(line), folder)


@pytest.mark.slow
def test_the_tutorial(folder):
    said = {}
    for line in commands("docs/tutorial.md"):
        said[line] = run(offline(line), folder)
    assert "bolt" in said["exporter serve -- client classify samples/new.jpg --task bolts"]
    assert "version 3 is served (before: 2)" in said["exporter promote"]
    assert "version 2 is served (before: 3)" in said["exporter rollback"]


@pytest.mark.slow
def test_the_releases_guide(learned):
    said = {line: run(offline(line), learned) for line in commands("docs/releases.md")}
    assert "version 3 is served (before: 2)" in said["exporter promote 3"]
    assert "version 2 is served (before: 3)" in said["exporter rollback"]
    assert said["exporter prune --keep 3"].startswith("clip: removed none; kept 1, 2, 3; no server of it was found")


@pytest.mark.slow
def test_the_measuring_and_folders_guides(learned):
    for line in commands("docs/measuring.md") + commands("docs/folders.md"):
        run(offline(line), learned)
    assert "lora" in (learned / "runs/two/report.html").read_text(encoding="utf-8")
    assert (learned / "adapters/letters.safetensors").is_file()
