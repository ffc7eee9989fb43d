import gc
import os
import re
import socket
import subprocess
import sys
import threading
from contextlib import suppress

import grpc
import numpy as np
import pytest

from clipweld.client import ZeroShotClassifier, errors
from clipweld.client._address import Address, parse_url
from clipweld.client._transport import _ERROR_OF_STATUS
from clipweld.client.errors import InvalidRequest, RequestTimeout, ServerUnavailable


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("localhost:8001", Address("grpc", "localhost", 8001)),
        ("grpc://10.0.0.1:8001", Address("grpc", "10.0.0.1", 8001)),
        ("http://localhost:8000/", Address("http", "localhost", 8000)),
        ("[::1]:8001", Address("grpc", "[::1]", 8001)),
        ("grpcs://a:443", Address("grpc", "a", 443, encrypted=True)),
        ("https://a:443", Address("http", "a", 443, encrypted=True)),
    ],
)
def test_a_url_is_parsed_into_protocol_and_address(url, address):
    assert parse_url(url) == address


@pytest.mark.parametrize(
    "url",
    ["", "localhost", "http://", ":8001", "ftp://a:1", "a:port", "a:99999", "a:1/path", "a:1?q", "u@a:1", "[a:1"],
)
def test_an_invalid_url_is_refused(url):
    with pytest.raises(InvalidRequest, match=r"expected host:port or grpc://host:port \(gRPC\), or http://host:port"):
        ZeroShotClassifier(url)


def test_every_grpc_status_is_assigned_to_an_error():
    """Every status, also one that gRPC adds, is assigned: is it the caller's, the network's or the server's fault?"""
    fault_of_the_server = {
        "OK", "CANCELLED", "UNKNOWN", "ALREADY_EXISTS", "FAILED_PRECONDITION", "ABORTED", "INTERNAL", "DATA_LOSS",
    }  # fmt: skip
    mapped = {name.removeprefix("StatusCode.") for name in _ERROR_OF_STATUS if not name.isdigit()}
    assert mapped | fault_of_the_server == {code.name for code in grpc.StatusCode}
    assert not mapped & fault_of_the_server


@pytest.fixture
def closed_port():
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        yield reserved.getsockname()[1]


@pytest.fixture
def silent_port():
    """A port that accepts connections and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield listening.getsockname()[1]


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_a_missing_server_is_reported_as_unavailable(closed_port, scheme, connect):
    with (
        connect(f"{scheme}://127.0.0.1:{closed_port}", timeout_s=5) as clip,
        pytest.raises(ServerUnavailable) as caught,
    ):
        clip.versions()
    expected = f"no server at 127.0.0.1:{closed_port}: connection refused; start one with: exporter serve"
    assert str(caught.value) == expected
    assert caught.value.__cause__ is not None


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_a_silent_server_causes_a_timeout(silent_port, scheme, connect):
    with (
        connect(f"{scheme}://127.0.0.1:{silent_port}", timeout_s=0.3) as clip,
        pytest.raises(RequestTimeout, match=r"no answer from .* within 0\.3 s"),
    ):
        clip.versions()


def test_http_to_a_grpc_port_is_reported(fake, connect):
    with (
        connect(f"http://{fake.url}") as clip,
        pytest.raises(ServerUnavailable, match=r"no Triton that speaks HTTP and is ready for more \(.+\); .* for gRPC"),
    ):
        clip.versions()


def test_every_error_is_in_the_documented_hierarchy():
    raised = [
        value for value in vars(errors).values() if isinstance(value, type) and value.__module__ == errors.__name__
    ]
    drawn = re.findall(r"^(?:[│ ]*[├└]── )?(\w+)(?: {2,}.*)?$", errors.__doc__.split("\n\n")[1], re.MULTILINE)
    assert sorted(drawn) == sorted(error.__name__ for error in raised)
    assert all(issubclass(error, errors.ClientError) for error in raised)


def test_many_batches_over_http_need_no_more_threads_and_files_than_few(server):
    image = np.zeros((32, 32, 3), np.uint8)
    with ZeroShotClassifier(server.http_url) as clip:
        list(clip.classify([image] * 80, ["a", "b"]))
        files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
        list(clip.classify([image] * 800, ["a", "b"]))
        assert len(os.listdir("/proc/self/fd")) <= files + 2
        assert threading.active_count() <= threads + 2
    assert not [thread for thread in threading.enumerate() if thread.name == "clipweld-http"]


def test_a_deleted_classifier_leaves_no_thread(server, thread_stays):
    clip = ZeroShotClassifier(server.http_url)
    clip.versions()
    del clip
    gc.collect()
    assert not thread_stays("clipweld-http")


GARBAGE = """
import faulthandler, gc, sys
import numpy as np
from clipweld.client import ZeroShotClassifier

faulthandler.dump_traceback_later(20, exit=True)
gc.disable()  # until it is collected below, in the thread that brings gRPC's answers
url, silent, halfway = sys.argv[1], sys.argv[2], sys.argv[3] == "halfway"

asking = ZeroShotClassifier(silent, timeout_s=50)
asking._core._begin_anew()
asker = asking._core._asker(None)
asked = [asker.transport._wire.ask("get_server_metadata", 50) for _ in range(3)]

dropped = ZeroShotClassifier(url)
answers = dropped.classify([np.zeros((32, 32, 3), np.uint8)] * 500, ["a", "b"])
next(answers)
cycle = [dropped, answers] if halfway else [dropped]
if not halfway:
    list(answers)
cycle.append(cycle)
del dropped, answers, cycle

collected = []
for future in asked:
    future.add_done_callback(lambda future: collected.append(gc.collect()))
asking.close()
print("closed")
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["done", "halfway"])
def test_garbage_collection_in_grpc_s_answering_thread_causes_no_deadlock(fake, silent_port, what):
    """That thread collects another classifier while ``close`` of this one holds gRPC's lock and waits for it."""
    command = [sys.executable, "-c", GARBAGE, fake.url, f"127.0.0.1:{silent_port}", what]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (ended.stderr, ended.stdout, ended.returncode) == ("", "closed\n", 0), ended.stderr


@pytest.fixture
def leaky(server):
    """A proxy to the server that on request silently drops all of its connections."""
    dead: list[threading.Event] = [threading.Event()]

    def pump(source, target, silent):
        with suppress(OSError):
            while chunk := source.recv(2**16):
                if not silent.is_set():
                    target.sendall(chunk)

    def accept():
        with suppress(OSError):
            while True:
                ends = listening.accept()[0], socket.create_connection(("127.0.0.1", int(server.url.split(":")[-1])))
                opened.extend(ends)
                for source, target in (ends, ends[::-1]):
                    threading.Thread(target=pump, args=(source, target, dead[-1]), daemon=True).start()

    opened: list[socket.socket] = []
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=accept, daemon=True)
    thread.start()

    def silence():
        dead.append(threading.Event())
        dead[-2].set()

    yield f"grpc://127.0.0.1:{listening.getsockname()[1]}", silence
    listening.shutdown(socket.SHUT_RDWR)
    for end in (listening, *opened):
        end.close()
    thread.join()


def test_a_connection_that_silently_died_is_replaced(leaky, connect):
    url, silence = leaky
    with connect(url, timeout_s=1, retries=1) as clip:
        before = clip.versions()
        silence()
        assert clip.versions() == before
