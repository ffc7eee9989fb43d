"""Nothing is open to unauthorized access, and the study would notice if it were."""

from __future__ import annotations

import json
import random
import socket
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from clipweld.exporter.serving import triton
from evidence.trust.exposure import CONTROL, knocked, listeners, uploaded, visited
from evidence.trust.record import Record

ROOT = Path(__file__).parents[3]


@pytest.fixture
def record(tmp_path):
    return Record(tmp_path / "record.json")


@pytest.mark.slow
def test_nothing_is_open_to_unauthorized_access(tmp_path):
    command = [
        sys.executable,
        "-m",
        "evidence.trust.exposure",
        "--guesses",
        "1",
        "--uploads",
        "5",
        "--out",
        tmp_path / "exposure.json",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "exposure.json").read_text())
    assert record["broken"] == []
    assert record["command"].startswith("python -m evidence.trust.exposure --guesses 1")
    figures = record["figures"]
    assert figures["listeners"]["on loopback"] == 3
    assert figures["model control"]["asked"] == figures["model control"]["refused"] == 2 * 6 * len(CONTROL)
    assert figures["page"]["strangers"] == figures["page"]["refused"] > 100


def test_a_listener_on_all_interfaces_would_be_reported(record):
    with socket.create_server(("0.0.0.0", 0)) as open_to_all:
        listeners(record, (psutil.Process(),))
        assert any(f"listens on 0.0.0.0:{open_to_all.getsockname()[1]}" in line for line in record.broken)


@pytest.mark.slow
def test_model_control_without_a_key_would_be_reported(record, repository, monkeypatch):
    monkeypatch.setattr(triton, "_restrictions", lambda key: [])
    with triton.serve(repository) as server:
        found = knocked(record, (server.url, server.http_url), "key", 1, random.Random(0))
    assert found["refused"] == 0
    assert len(record.broken) > found["asked"] / 2
    assert any("clip_image" in line and "unloaded" in line for line in record.broken)


def test_a_page_that_answers_other_sites_would_be_reported(record, tmp_path, monkeypatch):
    class Handler(SimpleHTTPRequestHandler):
        log_message = lambda self, *args: None  # noqa: E731

    monkeypatch.chdir(tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as page:
        threading.Thread(target=page.serve_forever).start()
        visited(record, f"http://127.0.0.1:{page.server_port}/")
        uploaded(record, f"http://127.0.0.1:{page.server_port}/", 2, random.Random(0))
        page.shutdown()
    assert any("GET / with {'Origin'" in line and "got 200" in line for line in record.broken)
    assert any("an upload of" in line for line in record.broken)
