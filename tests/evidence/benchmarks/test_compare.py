"""The smallest comparison with other ways to run CLIP: what is timed, refused or missing, and what is left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
OTHERS = """
from evidence.benchmarks.contenders import OnnxRuntime


class Mirrored(OnnxRuntime):
    title = "mirrored"

    def _pixels(self, file):
        return super()._pixels(file)[:, ::-1]


class Broken(OnnxRuntime):
    title = "broken"

    def start(self):
        raise RuntimeError("no weights here")


class Absent(OnnxRuntime):
    title = "absent"

    @classmethod
    def missing(cls):
        return "not installed"
"""
# A stand-in for infinity-emb's server, which can't be installed together with transformers 5.
INFINITY = """#!{python}
import base64, io, json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

given = dict(zip(sys.argv[2::2], sys.argv[3::2]))
Path({pid_file!r}).write_text(str(os.getpid()))
model = CLIPModel.from_pretrained(given["--model-id"]).eval()
tokenizer = AutoTokenizer.from_pretrained(given["--model-id"])
processor = CLIPImageProcessor.from_pretrained(given["--model-id"])
size = model.config.vision_config.image_size


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({{}} if self.path == "/health" else None)

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert (self.path, asked["model"]) == ("/embeddings", given["--served-model-name"])
        assert asked["encoding_format"] == "base64"
        tokens, pixels = tokenizer(["a"], return_tensors="pt"), torch.zeros(1, 3, size, size)
        if asked["modality"] == "text":
            tokens = tokenizer(asked["input"], padding=True, return_tensors="pt")
        else:
            files = [base64.b64decode(uri.removeprefix("data:image/png;base64,")) for uri in asked["input"]]
            images = [Image.open(io.BytesIO(file)) for file in files]
            pixels = processor(images, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            found = model(**tokens, pixel_values=pixels)
        rows = found.text_embeds if asked["modality"] == "text" else found.image_embeds
        self.answer({{"data": [{{"embedding": base64.b64encode(row.numpy().tobytes()).decode()}} for row in rows]}})

    def answer(self, content):
        self.send_response(404 if content is None else 200)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())


HTTPServer((given["--host"], int(given["--port"])), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The command on the small CLIP with three more contenders: one mirrors images, one fails, one is missing."""
    folder = tmp_path_factory.mktemp("compared")
    (folder / "others.py").write_text(OTHERS)
    server, pid_file = folder / "infinity_emb", folder / "pid"
    server.write_text(INFINITY.format(python=sys.executable, pid_file=str(pid_file)))
    server.chmod(0o755)
    command = [
        sys.executable,
        "-m",
        "evidence.benchmarks.compare",
        "--model",
        "mini",
        "--json",
        "--infinity",
        str(server),
    ]
    command += ["--images", "4", "--batch-size", "1", "--batch-size", "4", "--rounds", "1", "--starts", "1"]
    command += [word for name in ("Mirrored", "Broken", "Absent") for word in ("--also", f"others:{name}")]
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(
        [*command, "--out", str(folder / "runs" / "compare.json")],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout, done.stderr
    return SimpleNamespace(done=done, figures=json.loads(done.stdout), folder=folder, pid_file=pid_file)


def test_all_installed_contenders_agree_and_are_timed(compared):
    measured = compared.figures["models"]["mini"]
    agreeing = {title: row for title, row in measured.items() if title not in ("mirrored", "broken")}
    assert list(agreeing) == [
        "clipweld: Triton, client",
        "ONNX Runtime",
        "open_clip, labels once",
        "open_clip",
        "transformers pipeline",
        "infinity-emb",
    ]
    for title, row in agreeing.items():
        assert list(row["batches"]) == ["1", "4"]
        assert row["start"]["client_seconds"] > 0
        is_server = row["kind"] == "server"
        assert bool(row["start"]["server_seconds"]) == is_server
        for size, found in row["batches"].items():
            assert found["furthest_off"] < 1e-3
            assert len(found["calls_seconds"]) == 4 / int(size)
            assert found["images_per_second"] > 0 < found["p50_seconds"]
            assert found["ratio"] == 1 if title == "clipweld: Triton, client" else found["ratio"] > 0
            assert found["peak_bytes"] > 2e7
            assert (found["server_peak_bytes"] > 2e7) == is_server


def test_a_contender_that_answers_differently_is_reported_and_not_timed(compared):
    row = compared.figures["models"]["mini"]["mirrored"]
    for found in row["batches"].values():
        assert set(found) == {"wrong"}
        assert "of 4 images, probabilities up to 0." in found["wrong"]
    assert compared.done.returncode == 1


def test_contenders_that_fail_or_are_missing_are_named(compared):
    measured = compared.figures["models"]["mini"]
    assert measured["broken"] == {
        "kind": "onnxruntime",
        "start": None,
        "batches": {},
        "failed": "RuntimeError: no weights here",
    }
    assert compared.figures["missing"] == {"absent": "not installed"}
    assert "absent" not in measured


def test_goals_are_set_against_pytorch_and_against_servers(compared):
    goals = compared.figures["goals"]
    assert {(goal["than"], goal["times"]) for goal in goals} == {
        ("open_clip, labels once", 1.0),
        ("open_clip", 1.0),
        ("transformers pipeline", 1.0),
        ("infinity-emb", 1.5),
    }
    assert len(goals) == 2 * 4
    assert all(goal["reached"] == (goal["measured"] >= goal["times"]) for goal in goals)


def test_the_tables_show_the_figures_of_the_file(compared):
    file = compared.folder / "runs" / "compare.json"
    assert json.loads(file.read_text()) == compared.figures
    command = [sys.executable, "-m", "evidence.benchmarks.table", str(file)]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == 2 + 6 * 2 + 2 + 1
    assert len({line.count("|") for line in lines}) == 1
    assert sum("WRONG" in line for line in lines) == 2
    assert sum("FAILED: RuntimeError: no weights here" in line for line in lines) == 1


def test_no_server_is_left_running(compared):
    assert not Path(f"/proc/{compared.pid_file.read_text()}").exists()
