"""What commands report about running servers is true: they find every server, and take nothing else for one."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from clipweld.exporter import cli, tables
from clipweld.exporter.errors import ServerUnreachable
from clipweld.exporter.serving import announcement, servers
from clipweld.exporter.serving.announcement import FOLDER, announced, announcements
from clipweld.exporter.serving.servers import find_servers
from clipweld.exporter.serving.switch import loaded_versions
from clipweld.exporter.serving.triton import serve
from clipweld.exporter.store.repository import Repository, store_of


@pytest.fixture(autouse=True)
def _nothing_at_the_default_address(monkeypatch):
    monkeypatch.setattr(servers, "DEFAULT_SERVER", "127.0.0.1:1")
    monkeypatch.delenv("CLIPWELD_URL", raising=False)


@pytest.fixture
def run(repository, monkeypatch, capsys):
    """A function that runs a command on the repository and returns its status, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["exporter", *arguments, "--repository", str(repository.path)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return ended.value.code or 0, said.out, said.err

    return run


def at_default(monkeypatch, url):
    monkeypatch.setattr(servers, "DEFAULT_SERVER", url.rpartition("/")[2])


def test_servers_on_any_port_are_found_and_all_are_switched(repository, run):
    with serve(repository.path) as one:
        with serve(repository.path) as other:
            urls = {one.url, other.url}
            status, out, err = run("promote", "1", "--json")
            assert status == 0, err
            assert set(json.loads(out)["servers"]) == urls
            assert [loaded_versions(repository, url) for url in urls] == [[1], [1]]
        # Only one server is left, and a switch with --offline does not reach it.
        status, out, _ = run("promote", "2", "--offline", "--json")
        assert (status, json.loads(out)["servers"], json.loads(out)["offline"]) == (0, [], True)
        status, out, _ = run("versions", "--json")
        rows = {row["version"]: row for row in json.loads(out)}
        assert [(rows[n]["served"], rows[n]["newest_on"]) for n in (1, 2)] == [(False, [one.url]), (True, [])]
        _, out, _ = run("versions")
        assert f"{one.url} serves clip version 1; version 2 is what is active on disk: exporter promote 2" in out
        status, out, _ = run("rollback")
        assert f"on {one.url}; loaded: 1" in out
        assert loaded_versions(repository, one.url) == [1]
    assert not (store_of(repository.path) / FOLDER).exists()
    status, out, _ = run("promote", "2")
    assert (
        f"from the next start on (no server of it was found: none has left its address in {store_of(repository.path)}"
        in out
    )
    assert "nothing listens at 127.0.0.1:1)" in out


@pytest.mark.parametrize("kind", ["web server", "silent", "triton"])
def test_anything_else_at_the_default_address_is_not_taken_for_a_server(repository, run, tmp_path, monkeypatch, kind):
    if kind == "triton":
        other = tmp_path / "another" / "models"
        shutil.copytree(repository.path, other)
        shutil.copytree(store_of(repository.path), store_of(other))
        with serve(other) as server:
            at_default(monkeypatch, server.url)
            status, out, _ = run("promote", "1")
            assert status == 0
            assert f"{servers.DEFAULT_SERVER} serves another repository, {other}" in out
            assert loaded_versions(Repository(other, "clip"), server.url) == [1, 2]
        return
    monkeypatch.setattr(servers, "PROBE_TIMEOUT_S", 1.0)
    if kind == "web server":
        listening = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        port = listening.server_address[1]
    else:
        listening = socket.create_server(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    at_default(monkeypatch, f"127.0.0.1:{port}")
    status, out, _ = run("promote", "1", "--json")
    if kind == "web server":
        listening.shutdown()
        listening.server_close()
    else:
        listening.close()
    assert (status, json.loads(out)["servers"]) == (0, [])
    assert f"what listens at 127.0.0.1:{port} is no Triton" in json.loads(out)["looked"][-1]


def test_a_server_without_an_announcement_is_found_at_the_default_address(repository, run, monkeypatch):
    """Servers that were started by hand or in a container leave no announcement."""
    with serve(repository.path) as server:
        shutil.rmtree(store_of(repository.path) / FOLDER)
        assert find_servers([repository]).urls == []
        at_default(monkeypatch, server.url)
        status, out, err = run("promote", "1", "--json")
        assert (status, json.loads(out)["servers"]) == (0, [server.url]), err


def test_an_announcement_left_by_a_killed_server_is_ignored(repository):
    with announced(repository.path, "grpc://127.0.0.1:2", "http://127.0.0.1:3") as hidden:
        assert hidden is None
        assert [entry["url"] for entry in announcements(repository.path)] == ["grpc://127.0.0.1:2"]
        (file,) = (store_of(repository.path) / FOLDER).iterdir()
        left = file.read_bytes()
    assert announcements(repository.path) == []
    file.parent.mkdir()
    file.write_bytes(left)
    assert announcements(repository.path) == []
    assert not file.exists()


def test_a_server_of_a_repository_is_not_a_server_of_its_copy(repository, tmp_path):
    with announced(repository.path, "grpc://127.0.0.1:2", "http://127.0.0.1:3"):
        copy = tmp_path / "copy" / "models"
        for folder, target in ((repository.path, copy), (store_of(repository.path), store_of(copy))):
            shutil.copytree(folder, target, copy_function=os.link)
        assert announcements(copy) == []
        assert len(announcements(repository.path)) == 1


def test_a_running_server_that_cannot_be_reached_is_an_error(repository, run, monkeypatch):
    with announced(repository.path, "grpc://127.0.0.1:2", "http://127.0.0.1:3"):
        status, _, err = run("promote", "1", "--timeout", "1")
        assert (status, repository.served) == (1, 2)
        assert "server grpc://127.0.0.1:2 (process " in err
        assert "runs and is not ready" in err
        monkeypatch.setattr(servers, "this_network", lambda: "another")
        for command in (["promote", "1"], ["rollback"], ["prune", "--keep", "1"]):
            status, _, err = run(*command)
            assert (status, repository.served) == (1, 2)
            assert "runs on another machine or in a container (process " in err
        status, out, err = run("versions")
        assert status == 0
        assert "another machine" in err
        assert "no server of it could be asked" in out
        assert run("promote", "1", "--offline")[0] == 0
        assert repository.served == 1


def test_invalid_announcement_files_are_ignored(repository):
    folder = store_of(repository.path) / FOLDER
    with announced(repository.path, "grpc://192.0.2.1:2", "http://127.0.0.1:3"):
        assert announcements(repository.path) == [], "the key would go to another machine"
    folder.mkdir()
    for name, content in (("1-1.json", b"{}"), ("2-2.json", b"\xff" * 20_000), ("3-3.json", b"[" * 5_000)):
        (folder / name).write_bytes(content)
        descriptor = open(folder / name)  # noqa: SIM115
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        assert announcements(repository.path) == []
        descriptor.close()
    (folder / "4-4.json").symlink_to(repository.path)
    assert announcements(repository.path) == []


def test_an_unwritable_store_is_reported(repository):
    (store_of(repository.path) / FOLDER).touch()
    with announced(repository.path, "grpc://127.0.0.1:2", "http://127.0.0.1:3") as hidden:
        assert hidden == f"{store_of(repository.path)}: not a directory"
    shutil.rmtree(store_of(repository.path))
    with announced(repository.path, "grpc://127.0.0.1:2", "http://127.0.0.1:3") as hidden:
        assert hidden == f"{store_of(repository.path)}: no such file or directory"
    assert not store_of(repository.path).exists()


def test_invalid_server_addresses_are_refused(repository, run):
    for url in ("localhost", "https://localhost:8001", "grpc://localhost:8001/v2", "localhost:99999"):
        status, _, err = run("promote", "1", "--url", url)
        assert status == 1
        assert f"server address '{url}': can't be used; expected host:port" in err
    with pytest.raises(ServerUnreachable, match="user's name"):
        loaded_versions(repository, "me:secret@localhost:8001")
    assert run("promote", "1", "--url", "localhost:1", "--offline")[0] == 2


def test_the_identifier_of_this_network_is_stable():
    assert announcement.this_network() == announcement.this_network()
    assert len(announcement.this_network()) > 30


def test_a_merge_beside_a_running_server_does_not_report_its_version_as_served(released):
    """A new model's first version is active at once, but a running server loads it only when promoted."""
    first = replace(released[1], model="other", version=1, served=1)
    assert tables.released(first, [], servers_run=False).endswith("It is served")
    assert tables.released(first, [], servers_run=True).endswith("Serve it: exporter promote 1 --name other")
