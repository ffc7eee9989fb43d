"""Every command in the README, run as it stands there, in order.

Three changes make that possible without a network: ``--download`` is left out and a tiny aircraft data set in
torchvision's layout is there instead; the real ViT-B-16 has random weights, few steps and small batches; ports are free
ones. ``make`` itself is what runs these tests.
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
SETUP = {"make demo", "make test", "make audit", "source .venv/bin/activate"}
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def commands(section):
    """The shell lines of one section, without comments."""
    text = README.split(f"## {section}\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```sh\n(.*?)```", text, re.S)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and line not in SETUP]


def run(command, folder):
    """Run one command to its end; it must succeed."""
    done = subprocess.run(
        shlex.split(command), cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"$ {command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def offline(command):
    """The same command without a network and in seconds."""
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
    """A new user's folder: the samples as they ship, and a tiny FGVC-Aircraft."""
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


def test_setup_commands_are_the_makefile_s():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("demo", "test", "audit"):
        assert f"make {target} " in README
        assert re.search(rf"^{target}: install", makefile, re.M)


def test_no_section_with_commands_is_forgotten():
    sections = [s for s in re.findall(r"^## (.+)$", README, re.M) if commands(s)]
    assert sections == [
        "First steps, offline",
        "The real CLIP",
        "Your own images",
        "Releases, and the way back",
        "Does it work? Measure it",
    ]


def test_pictures_and_pages_that_the_documents_name_exist():
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


@pytest.mark.slow
def test_first_steps(folder):
    lines = [offline(line) for line in commands("First steps, offline")]
    learn, ask = lines[: lines.index("exporter serve")], lines[lines.index("exporter serve") + 1 :]
    for line in learn:
        run(line, folder)
    for line in ask[:-1]:
        run(f"exporter serve --port 0 -- {line}", folder)
    assert '"seven"' in run(ask[-1], folder)

    server = subprocess.Popen(["exporter", "serve"], cwd=folder, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    try:
        while "Ctrl-C" not in (line := server.stderr.readline()):
            assert line, "exporter serve ended before it was ready"
        examples = re.findall(r"```python\n(.*?)```", README, re.S)
        said = [
            subprocess.run(
                [sys.executable, "-c", example], cwd=folder, capture_output=True, text=True, check=True
            ).stdout
            for example in examples
        ]
        assert "%" in said[0]
        assert len(said[1].splitlines()) == 5
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=30) == 0
        server.stderr.close()


@pytest.mark.slow
def test_the_real_clip_and_your_own_images(folder):
    """Both sections as one story: learn everything first, then merge once, then ask; a ViT-B-16 is slow to export."""
    lines = dict.fromkeys(commands("The real CLIP") + commands("Your own images"))
    for step in ("trainer", "exporter merge", "exporter serve"):
        for line in lines:
            if line.startswith(step):
                run(offline(line), folder)


@pytest.mark.slow
def test_releases(folder):
    run(offline("trainer fit --model mini --task digits"), folder)
    run("exporter merge --to onnx --model mini", folder)
    said = {line: run(offline(line), folder) for line in commands("Releases, and the way back")}
    assert "version 3 is served (before: 2)" in said["exporter promote 3"]
    assert "version 2 is served (before: 3)" in said["exporter rollback"]
    assert said["exporter prune --keep 3"].startswith("clip: removed none; kept 1, 2, 3; no server of it was found")


@pytest.mark.slow
def test_measure_it(folder):
    for line in commands("Does it work? Measure it"):
        run(offline(line), folder)
    assert "lora" in (folder / "runs/two/report.html").read_text(encoding="utf-8")
    assert (folder / "adapters/letters.safetensors").is_file()
