"""Every example in the documents and docstrings, run exactly as written against a real server."""

from __future__ import annotations

import asyncio
import doctest
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clipweld import client

ROOT = Path(__file__).parents[1]


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, which contains the samples."""
    shutil.copytree(ROOT / "samples", tmp_path / "samples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def at(server, text):
    """Return the example with this server's addresses."""
    grpc, http = (url.rpartition("/")[2] for url in (server.url, server.http_url))
    assert "localhost:8000" in text or "localhost:8001" in text
    return text.replace("localhost:8000", http).replace("localhost:8001", grpc)


def test_the_curl_examples_give_the_documented_answers(server, folder):
    scripts = blocks("docs/without-the-client.md", "sh")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    said = [
        subprocess.run(
            ["bash", "-euc", at(server, script)],
            capture_output=True, text=True, check=True, env=os.environ | {"PATH": path},
        ).stdout
        for script in scripts
    ]  # fmt: skip
    assert said[0].count('"versions":["1","2"]') == 3
    card = json.loads(json.loads(said[1])["outputs"][0]["data"][0])
    assert card["version"] == 2
    assert [task["name"] for task in card["tasks"]] == ["digits"]
    for answer, name in ((said[2], "text_features"), (said[3], "image_features")):
        (output,) = json.loads(answer)["outputs"]
        assert output["name"] == name
        assert sum(x * x for x in output["data"]) == pytest.approx(1, abs=1e-4)


def test_every_curl_request_with_a_body_sets_its_content_type():
    """Form-encoded bodies, curl's default, have crashed servers."""
    sent = [
        command
        for page in ("docs/without-the-client.md", "deploy/README.md", "README.md")
        for script in blocks(page, "sh")
        for command in re.findall(r"curl (?:[^\n]|(?<=\\)\n|(?<=,)\n)*", script)
        if re.search(r" (-d|--data\S*) ", command)
    ]
    assert len(sent) == 3
    for command in sent:
        assert re.search(r"-H 'Content-Type: application/(json|octet-stream)'", command), command


def test_tritonclient_gives_our_answers(server, folder):
    (script,) = blocks("docs/without-the-client.md", "python")
    done = subprocess.run([sys.executable, "-c", at(server, script)], capture_output=True, text=True, check=True)
    with client.ZeroShotClassifier(server.url) as clip:
        (answer,) = clip.classify("samples/seven.png", task="digits", top_k=3)
    assert done.stdout.split("\n")[:3] == [str(found) for found in answer]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="no ray")
def test_the_ray_example_gives_our_answers(server, folder, digits):
    import pyarrow.parquet

    test = digits.load("test")
    (folder / "images").mkdir()
    for i in range(40):
        test[i][0].save(folder / f"images/{i}.png")
    (folder / "images/broken.png").write_bytes(b"nothing")
    (script,) = blocks("docs/many-machines.md", "python")
    start = "import ray\nray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)\n"
    environment = os.environ | {"CLIPWELD_URL": server.url, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    subprocess.run(
        [sys.executable, "-c", start + script], check=True, capture_output=True, env=environment, timeout=240
    )
    rows = {Path(row["path"]).name: row for row in pyarrow.parquet.read_table(folder / "answers").to_pylist()}
    assert len(rows) == 41
    assert rows.pop("broken.png")["label"] == ""
    with client.ZeroShotClassifier(server.url) as clip:
        for name, row in rows.items():
            (answer,) = clip.classify(folder / "images" / name, task="digits", top_k=1)
            assert (row["label"], row["version"]) == (answer.best.label, 2)
            assert row["probability"] == pytest.approx(answer.best.probability, abs=1e-3)


@pytest.mark.parametrize("module", [client, client._classifier])
def test_examples_in_docstrings_run(server, folder, module):
    names = {**vars(client), "url": server.url, "asyncio": asyncio}
    done = doctest.testmod(module, extraglobs=names)
    assert done.attempted >= 2
    assert done.failed == 0
