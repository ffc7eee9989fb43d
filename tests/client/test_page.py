"""The demo page's web server and command, without a browser: what it serves, and which requests it refuses."""

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest

from clipweld import client
from clipweld.client import ZeroShotClassifier
from clipweld.client._image_files import FORMATS
from clipweld.client._page import FILES, MAX_UPLOAD_BYTES

PROGRAM = [sys.executable, "-c", "from clipweld.client.cli import main; main()"]


@pytest.fixture
def page(fake, open_page) -> str:
    return open_page(fake.url)


@pytest.fixture
def photo(picture, tmp_path) -> bytes:
    from PIL import Image

    Image.fromarray(picture).save(tmp_path / "photo.png")
    return (tmp_path / "photo.png").read_bytes()


def send(page, method="GET", path="/state", body=None, **headers):
    """Send a request; return (status, headers, content). Underscores in header names become hyphens, None omits one."""
    address = urlsplit(page)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=20)
    try:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.putrequest(method, path, skip_host="Host" in named)
        if body is not None and "Content-Length" not in named:
            named["Content-Length"] = str(len(body))
        for name, value in named.items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def refusal(page, *arguments, **headers):
    """Return the status and the one-line error of a refused request."""
    status, answered, content = send(page, *arguments, **headers)
    assert answered["Content-Type"] == "application/json"
    error = json.loads(content)["error"]
    assert "\n" not in error
    return status, error


def test_page_is_complete_and_contacts_no_other_host(page):
    for path, (_, kind) in FILES.items():
        status, headers, content = send(page, path=path)
        assert (status, headers["Content-Type"]) == (200, kind)
        assert not re.search(rb"https?://(?!www\.w3\.org/2000/svg)", content)
        rules = dict(rule.split(" ", 1) for rule in headers["Content-Security-Policy"].split("; "))
        assert rules.pop("default-src") == "'none'"
        assert {source for rule in rules.values() for source in rule.split()} <= {"'none'", "'self'", "blob:"}
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert "Python" not in headers["Server"]


def test_files_of_the_page_are_those_in_its_folder():
    folder = Path(client.__file__).with_name("page")
    assert sorted(path.name for path in folder.iterdir()) == sorted(name for name, _ in FILES.values())


def test_the_state_lists_what_is_served(page, fake):
    state = json.loads(send(page)[2])
    digits = {"name": "digits", "class_names": ["zero", "one", "two"], "accuracy_before": 45.2, "accuracy_after": None}
    assert state == {
        "url": fake.url, "model": "clip", "base": 1, "newest": 2, "tasks": [digits],
        "max_upload_bytes": MAX_UPLOAD_BYTES,
    }  # fmt: skip


def test_answers_equal_those_of_the_library(page, fake, photo):
    task = fake.card(2)["tasks"][0]
    prompts = {"labels": task["class_names"], "templates": task["templates"]}
    for query, asked in (("task=digits", prompts), (f"label={quote('a & b')}&label=c", {"labels": ["a & b", "c"]})):
        status, _, content = send(page, "POST", f"/answer?{query}", photo, Origin=page.rstrip("/"))
        assert status == 200
        answer = json.loads(content)
        assert answer["labels"] == len(asked["labels"])
        assert [one["version"] for one in answer["answers"]] == [1, 2]
        for one in answer["answers"]:
            with ZeroShotClassifier(fake.url, version=one["version"]) as clip:
                (expected,) = clip.classify([photo], **asked)
            assert one["predictions"] == expected.to_dict()["predictions"]
            assert one["latency_ms"] > 0


@pytest.mark.slow
def test_the_page_also_works_with_a_real_triton_over_http(server, open_page, photo):
    """HTTP connections are bound to one thread, and the page's server uses a new thread per request."""
    page = open_page(server.http_url)
    answers = [json.loads(send(page, "POST", "/answer?task=digits", photo)[2])["answers"] for _ in range(3)]
    for answer in answers:
        assert [one["version"] for one in answer] == [1, 2]
        assert [one["predictions"] for one in answer] == [one["predictions"] for one in answers[0]]


def test_labels_are_encoded_once(page, fake, photo):
    for _ in range(3):
        send(page, "POST", "/answer?label=a&label=b", photo)
    assert [model for model, _, _ in fake.requests].count("clip_text") == 2


def test_the_newest_version_is_looked_up_for_each_request(page, fake, photo):
    def answering():
        answer = json.loads(send(page, "POST", "/answer?task=digits", photo)[2])
        return [one["version"] for one in answer["answers"]]

    assert answering() == [1, 2]
    fake.cards[3] = fake.card(3)
    assert answering() == [1, 3]
    del fake.cards[1], fake.cards[3]
    assert answering() == [2]


def test_a_version_that_vanishes_during_a_request_is_replaced_by_the_newest(page, fake, photo):
    def switch(model, version, context):
        if (model, version) == ("clip_image", 2):
            fake.cards[3] = fake.card(3)
            fake.cards.pop(2, None)

    fake.before_infer = switch
    answer = json.loads(send(page, "POST", "/answer?task=digits", photo)[2])
    assert [one["version"] for one in answer["answers"]] == [1, 3]
    assert answer["state"]["newest"] == 3


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
    ],
)
@pytest.mark.parametrize(("method", "path"), [("GET", "/"), ("GET", "/state"), ("POST", "/answer?label=a")])
def test_requests_from_other_sites_are_refused(page, fake, photo, headers, method, path):
    body = photo if method == "POST" else None
    status, error = refusal(page, method, path, body, **headers)
    assert status == 403
    assert "another site asked" in error
    assert fake.requests == []


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "[::1]:{port}", None]
)
def test_requests_under_another_host_name_are_refused(page, host):
    named = host and host.format(port=urlsplit(page).port)
    status, error = refusal(page, "GET", "/", Host=named)
    assert (status, error) == (403, f"this page is at {page} and has no other name")


def test_requests_under_the_page_s_own_host_names_are_accepted(page):
    port = urlsplit(page).port
    for host in (f"127.0.0.1:{port}", f"localhost:{port}"):
        assert send(page, Host=host, Origin=f"http://{host}", Sec_Fetch_Site="same-origin")[0] == 200
    assert refusal(page, Host=f"localhost:{port}", Origin=f"http://127.0.0.1:{port}")[0] == 403
    assert send(page, path="/", Sec_Fetch_Site="none")[0] == 200


def test_the_page_listens_on_a_single_address(page):
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.2", urlsplit(page).port), timeout=5)


@pytest.mark.parametrize("size", [MAX_UPLOAD_BYTES + 1, 10**12, int("9" * 4000)], ids=["little", "much", "absurdly"])
def test_too_large_an_image_is_refused_before_it_is_sent(page, size):
    status, error = refusal(page, "POST", "/answer?label=a", None, Content_Length=str(size))
    assert status == 413
    assert "at most 20 MB" in error


@pytest.mark.parametrize("length", [None, "", "-1", "1e3", "²"])
def test_an_image_without_a_content_length_is_refused(page, length):
    headers = {} if length is None else {"Content_Length": length.encode()}
    assert refusal(page, "POST", "/answer?label=a", None, **headers)[0] == 411


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/", "GET, HEAD"),
        ("PUT", "/state", "GET, HEAD"),
        ("GET", "/answer", "POST"),
        ("OPTIONS", "/answer", "POST"),
    ],
)
def test_wrong_method_is_refused(page, method, path, allowed):
    status, headers, content = send(page, method, path)
    assert (status, headers["Allow"]) == (405, allowed)
    assert json.loads(content)["error"] == f"{method} is not taken, {allowed} is"


def test_unknown_paths_and_unknown_methods_are_refused(page):
    for path in ("/nothing", "/../client/cli.py", "/%2e%2e/cli.py", "//evil.example/"):
        assert refusal(page, "GET", path)[0] == 404
    assert refusal(page, "BREW", "/")[0] == 501


def test_head_has_no_content(page):
    status, headers, content = send(page, "HEAD", "/")
    assert (status, content) == (200, b"")
    assert int(headers["Content-Length"]) > 0


@pytest.mark.parametrize(
    ("query", "body", "error"),
    [
        ("label=a", b"no image", f"this file (8 bytes) is no image; expected {', '.join(FORMATS)}"),
        ("", None, "labels is empty; expected at least one"),
        ("label=a&label=a", None, "label 'a' is given twice; expected each label once"),
        ("task=flags", None, "version 2, the newest now, has not learned 'flags'; choose another task"),
    ],
)
def test_an_invalid_request_is_refused_in_one_line(page, photo, query, body, error):
    assert refusal(page, "POST", f"/answer?{query}", body or photo) == (400, error)


def test_an_unreachable_server_is_reported_in_one_line(page, fake, photo):
    fake.stop()
    for question in (("GET", "/state"), ("POST", "/answer?label=a", photo)):
        status, error = refusal(page, *question)
        assert status == 502
        assert error == f"no server at {fake.url}: connection refused; start one with: exporter serve"


def test_a_port_in_use_is_reported_in_one_line():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        command = [*PROGRAM, "demo", "--port", str(port), "--no-browser"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    expected = (
        f"no page at 127.0.0.1:{port}: address already in use; give another --port, or --port 0 for one that is free"
    )
    assert done.stderr == f"client: {expected}\n"


@pytest.mark.slow
def test_ctrl_c_ends_a_page_whose_server_hangs():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"127.0.0.1:{silent.getsockname()[1]}"
        command = [*PROGRAM, "demo", "--url", url, "--port", "0", "--no-browser"]
        program = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        address = urlsplit(program.stdout.readline().split(" ")[0])
        with socket.create_connection((address.hostname, address.port)) as asking:
            asking.sendall(f"GET /state HTTP/1.1\r\nHost: {address.netloc}\r\n\r\n".encode())
            with silent.accept()[0]:
                program.send_signal(signal.SIGINT)
                _, said = program.communicate(timeout=10)
    assert (program.returncode, said) == (0, "")


def test_browser_opens_by_default():
    """The browser is given the address that is printed."""
    script = (
        "import webbrowser, os, signal; from clipweld.client import cli; "
        "webbrowser.open = lambda url: (print(url, flush=True), os.kill(os.getpid(), signal.SIGINT)); "
        "import sys; sys.argv = ['client', 'demo', '--port', '0']; cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    said, opened = done.stdout.splitlines()
    assert said.startswith(f"{opened} shows model clip at ")
    assert (done.returncode, done.stderr) == (0, "")
