"""A real Triton on the released repository: correct answers, clean starts and clean ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import tritonclient.utils

from clipweld.exporter.errors import PortTaken, TritonFailed
from clipweld.exporter.serving import installation
from clipweld.exporter.serving.triton import serve

EXPORTER = [sys.executable, "-m", "clipweld.exporter"]
RNG = np.random.default_rng(0)


def processes_of(group: int) -> list[int]:
    """Return the living processes of a group, without zombies."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(pgrp) == group and state != "Z":
            found.append(int(stat.parent.name))
    return found


def wait_for(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture(scope="module")
def sessions(served):
    """ONNX Runtime sessions in this process, on the same files."""
    return {
        (kind, version): onnxruntime.InferenceSession(
            str(served.repository.file(kind, version)), providers=["CPUExecutionProvider"]
        )
        for kind in ("image", "text", "card")
        for version in (1, 2)
    }


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_image_features_equal_those_of_onnx_runtime(served, sessions, version, batch):
    image = RNG.integers(0, 256, (batch, 64, 64, 3), dtype=np.uint8)
    got = served.infer("clip_image", {"image": image}, version)["image_features"]
    want = sessions["image", version].run(None, {"image": image})[0]
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("version", [1, 2])
def test_text_features_equal_those_of_onnx_runtime(served, sessions, version):
    for length in (1, 7, 24, 60):
        tokens = RNG.integers(0, 49408, (3, length), dtype=np.int32)
        got = served.infer("clip_text", {"tokens": tokens}, version)["text_features"]
        np.testing.assert_allclose(got, sessions["text", version].run(None, {"tokens": tokens})[0], atol=1e-6)


@pytest.mark.parametrize("version", [1, 2])
def test_card_is_served(served, version):
    answer = served.infer("clip_card", {"index": np.array([[0]], np.int32)}, version)["card"]
    assert answer.shape == (1, 1)
    assert json.loads(answer[0, 0]) == served.repository.card(version)


def test_the_newest_version_answers_when_none_is_named(served):
    tokens = np.array([[49406, 5, 49407]], np.int32)
    got = served.infer("clip_text", {"tokens": tokens})["text_features"]
    np.testing.assert_array_equal(got, served.infer("clip_text", {"tokens": tokens}, 2)["text_features"])


def test_concurrent_requests_of_mixed_lengths_are_answered_correctly(served, sessions):
    requests = [RNG.integers(0, 49408, (1 + i % 3, 1 + i % 24), dtype=np.int32) for i in range(96)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda t: served.infer("clip_text", {"tokens": t})["text_features"], requests))
    for tokens, answer in zip(requests, answers, strict=True):
        np.testing.assert_allclose(answer, sessions["text", 2].run(None, {"tokens": tokens})[0], atol=1e-6)


def test_invalid_requests_are_refused_and_concurrent_ones_answered(served, sessions):
    image = RNG.integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
    wrong = [image[:, :32], image.astype(np.float32), np.repeat(image, 65, axis=0), image[..., :1]]

    def ask(array):
        try:
            return served.infer("clip_image", {"image": array})["image_features"]
        except tritonclient.utils.InferenceServerException as exc:
            return exc.status()

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, [image, *wrong] * 6))
    want = sessions["image", 2].run(None, {"image": image})[0]
    for place, answer in enumerate(answers):
        if place % 5 == 0:
            np.testing.assert_allclose(answer, want, atol=1e-6)
        else:
            assert answer == "StatusCode.INVALID_ARGUMENT"


@pytest.mark.parametrize("content", ["application/x-www-form-urlencoded", "application/json"])
def test_a_large_request_of_any_content_type_is_answered(served, content):
    """Triton's HTTP server copies a form-encoded body, curl's default, onto a thread's stack twice."""
    request = {"inputs": [{"name": "image", "shape": [1, 64, 64, 3], "datatype": "UINT8", "data": [7] * 64 * 64 * 3}]}
    body = b" " * (60 << 20) + json.dumps(request).encode()
    address = f"{served.server.http_url}/v2/models/clip_image/infer"
    request = urllib.request.Request(address, body, {"Content-Type": content})
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert json.load(answer)["model_version"] == "2"
    assert served.server.process.poll() is None


def test_the_server_listens_on_loopback_only(served):
    """Triton's own default is all interfaces."""
    ports = {int(url.rpartition(":")[2]) for url in (served.server.url, served.server.http_url)}
    listening = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            address, port = local.split(":")
            if state == "0A" and int(port, 16) in ports:
                listening[int(port, 16)] = address
    assert set(listening) == ports
    mapped = "0000000000000000FFFF0000"  # gRPC listens on IPv4 through an IPv6 socket
    assert {address.removeprefix(mapped) for address in listening.values()} == {"0100007F"}


def test_each_version_has_its_own_process_and_nothing_is_left_at_the_end(repository):
    with serve(repository.path) as server:
        group = server.process.pid
        assert len(processes_of(group)) == 1 + 6
        backends = next(a for a in server.process.args if a.startswith("--backend-directory=")).partition("=")[2]
        assert Path(backends).is_dir()
        assert list(Path("/dev/shm").glob(f"clipweld-{os.getpid()}-*"))
        port = int(server.url.rpartition(":")[2])
    assert processes_of(group) == []
    assert not Path(backends).exists()
    assert not list(Path("/dev/shm").glob(f"clipweld-{os.getpid()}-{port}-*"))


def test_a_broken_model_is_refused_at_the_start_in_one_line(repository):
    (repository.model("text") / "2/model.onnx").write_bytes(b"not a graph")
    with pytest.raises(TritonFailed) as caught, serve(repository.path):
        pytest.fail("must not start")
    message = str(caught.value)
    assert "failed to load 'clip_text' version 2" in message
    assert "\n" not in message


def test_a_path_with_shell_characters_can_be_served(repository, tmp_path):
    odd = tmp_path / "my models; exit 1 #$(exit 2)'"
    shutil.copytree(repository.path.parent, odd)
    with serve(odd / repository.path.name) as server:
        assert server.process.poll() is None
    assert (odd / repository.path.name).is_dir()


def test_a_port_in_use_is_reported(repository):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(PortTaken, match=f"port {port} .*in use"), serve(repository.path, port=port):
            pytest.fail("must not start")


def test_a_start_that_takes_too_long_fails_and_leaves_nothing(repository):
    def regions():
        return set(Path("/dev/shm").glob(f"clipweld-{os.getpid()}-*"))

    before = regions()  # of servers that other tests keep running
    with pytest.raises(TritonFailed, match=r"within 0.01 s; .*--timeout"), serve(repository.path, timeout_s=0.01):
        pytest.fail("must not start")
    assert regions() == before


def test_a_command_runs_beside_the_server_and_serve_exits_with_its_status(repository, tmp_path):
    script = (
        "import os, sys, urllib.request as u; h = os.environ['CLIPWELD_HTTP_URL'];"
        "assert u.urlopen(h + '/v2/health/ready').status == 200; print(os.environ['CLIPWELD_URL']); sys.exit(42)"
    )
    command = ["serve", "--repository", str(repository.path), "--port", "0", "--", sys.executable, "-c", script]
    run = subprocess.run([*EXPORTER, *command], capture_output=True, text=True, timeout=120)
    assert run.returncode == 42, run.stderr
    assert run.stdout.startswith("grpc://127.0.0.1:")
    assert "clip 1, 2; the nvidia-pytriton package's tritonserver" in run.stderr


@pytest.mark.parametrize("port", ["0", "given"])
def test_the_given_http_port_is_used(repository, port):
    with socket.socket() as grpc, socket.socket() as http:
        for each in (grpc, http):
            each.bind(("127.0.0.1", 0))
        ports = [each.getsockname()[1] for each in (grpc, http)]
    command = ["serve", "--repository", str(repository.path), "--http-port", str(ports[1])]
    command += ["--port", "0" if port == "0" else str(ports[0]), "--", "sh", "-c", "echo $CLIPWELD_HTTP_URL"]
    run = subprocess.run([*EXPORTER, *command], capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout) == (0, f"http://127.0.0.1:{ports[1]}\n"), run.stderr


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 0), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_no_process_is_left_however_serve_ends(repository, signum, status):
    command = [*EXPORTER, "serve", "--repository", str(repository.path), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    with process:
        assert process.stderr.readline().startswith("grpc://127.0.0.1:")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 1
        group = int(children[0])
        assert len(processes_of(group)) > 1
        process.send_signal(signum)
        assert process.wait(60) == status
    wait_for(lambda: not processes_of(group))


def test_native_triton_is_preferred_where_it_has_the_backend(tmp_path, monkeypatch):
    binary = tmp_path / "bin" / "tritonserver"
    binary.parent.mkdir()
    binary.write_text("#!/bin/sh\n")
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", str(binary.parent))
    assert installation.find_native() is None
    library = tmp_path / "backends" / "onnxruntime" / "libtriton_onnxruntime.so"
    library.parent.mkdir(parents=True)
    library.touch()
    with installation.installation("clipweld-0-0-") as found:
        assert (found.binary, found.backends) == (binary, tmp_path / "backends")
        assert list(found.working_folder.iterdir()) == []
        assert "NVIDIA's onnxruntime backend" in found.description


def test_leftovers_of_a_killed_server_are_removed_and_files_in_use_are_kept(tmp_path, monkeypatch):
    """A Triton killed while loading leaves processes behind, which keep their shared memory."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    region = installation.SHARED_MEMORY / f"clipweld-{os.getpid()}-0-of-a-test"
    with installation.installation(f"clipweld-{os.getpid()}-1-") as others:
        stale = tmp_path / f"clipweld-{os.getpid()}-0-backends-of-a-test"
        stale.mkdir()
        program = shutil.copy(shutil.which("sleep"), stale)
        orphan = subprocess.Popen([program, "60"])
        while not Path(f"/proc/{orphan.pid}/cmdline").read_bytes():  # until the kernel has started the program
            time.sleep(0.01)
        region.touch()
        with installation.installation(f"clipweld-{os.getpid()}-2-"):
            assert orphan.wait(10) == -signal.SIGKILL
            assert not region.exists()
            assert not stale.exists()
            assert others.backends.is_dir()
    assert not list(tmp_path.iterdir())
