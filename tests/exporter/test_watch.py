"""A version whose process dies is loaded again, Triton itself is restarted on request, and repeated deaths end both."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time

import numpy as np
import pytest
import tritonclient.grpc

from clipweld.exporter.errors import TritonFailed
from clipweld.exporter.serving import watch
from clipweld.exporter.serving.reload import Reloader
from clipweld.exporter.serving.switch import promote, rollback
from clipweld.exporter.serving.triton import run_beside, serve, wait_until_stopped
from clipweld.exporter.store.repository import Repository, store_of


def wait_for(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def copy_of(released, folder):
    path = folder / "models"
    shutil.copytree(released[0].path, path)
    shutil.copytree(store_of(released[0].path), store_of(path))
    return Repository(path, "clip")


class Watched:
    """A server, its reports, and requests to it."""

    def __init__(self, server, repository, reports):
        self.server, self.repository, self.reports = server, repository, reports
        self.client = tritonclient.grpc.InferenceServerClient(server.url.removeprefix("grpc://"))

    def processes(self, model, version):
        argument = next(a for a in self.server.process.args if a.startswith("--model-repository="))
        link = watch.Path(argument.partition("=")[2])
        found = watch.processes_of(self.server.process.pid, link)
        return [pid for pid, entry in found.items() if entry == (model, str(version))]

    def kill(self, model, version):
        (pid,) = self.processes(model, version)
        os.kill(pid, signal.SIGKILL)
        return pid

    def features(self, version):
        tokens = tritonclient.grpc.InferInput("tokens", [1, 3], "INT32")
        tokens.set_data_from_numpy(np.array([[49406, 5, 49407]], np.int32))
        answer = self.client.infer("clip_text", [tokens], model_version=str(version), client_timeout=60)
        return answer.as_numpy("text_features")


@pytest.fixture(scope="module")
def watched(released, tmp_path_factory):
    repository, reports = copy_of(released, tmp_path_factory.mktemp("watched")), []
    with serve(repository.path, report=reports.append) as server:
        found = Watched(server, repository, reports)
        yield found
        found.client.close()


@pytest.fixture(autouse=True)
def _forgotten(request):
    """Make each test begin as if no process had died before."""
    if "watched" in request.fixturenames:
        found = request.getfixturevalue("watched")
        found.reports.clear()
        found.server.watch._past.clear()


@pytest.mark.parametrize("version", [2, 1])
def test_a_killed_version_is_reloaded_and_the_other_loses_no_request(watched, version, monkeypatch):
    ready, load = [], Reloader.load

    def look_and_load(reloader, model):
        ready.extend(watched.client.is_model_ready(model, str(number)) for number in (1, 2))
        load(reloader, model)

    monkeypatch.setattr(Reloader, "load", look_and_load)
    before, failures, done = watched.features(version), [], threading.Event()
    listing = sorted(watched.repository.path.rglob("*"))

    def ask_the_other():
        while not done.is_set():
            try:
                watched.features(3 - version)
            except Exception as exc:
                failures.append(exc)

    asking = threading.Thread(target=ask_the_other)
    asking.start()
    try:
        pid = watched.kill("clip_text", version)
        wait_for(lambda: len(watched.reports) == 2)
    finally:
        done.set()
        asking.join()
    assert ready == [version == 2, version == 1], "the dead one was not called ready"
    assert failures == []
    np.testing.assert_array_equal(watched.features(version), before)
    assert pid not in watched.processes("clip_text", version)
    name = f"clip_text version {version}: "
    assert watched.reports[0] == f"{name}its process ended with signal 9 (SIGKILL); loading it again"
    assert watched.reports[1].startswith(f"{name}loaded again after ")
    assert sorted(watched.repository.path.rglob("*")) == listing


@pytest.mark.slow
def test_the_only_version_is_reloaded(watched):
    promote(watched.repository, 1, [watched.server.url])
    assert watched.repository.standing() == [1]
    before = watched.features(1)
    try:
        watched.kill("clip_text", 1)
        wait_for(lambda: len(watched.reports) == 2)
        np.testing.assert_array_equal(watched.features(1), before)
        assert watched.reports[1].startswith("clip_text version 1: loaded again after ")
    finally:
        promote(watched.repository, 2, [watched.server.url])


@pytest.mark.slow
def test_an_unloaded_version_is_not_taken_for_a_dead_one(watched):
    for _ in range(2):
        rollback(watched.repository, [watched.server.url])
        wait_for(lambda: not watched.processes("clip_text", 2))
        promote(watched.repository, 2, [watched.server.url])
        time.sleep(5 * watch.LOOK_EVERY_S)
    assert watched.reports == []


@pytest.mark.slow
def test_versions_can_be_switched_after_a_reload(watched):
    watched.kill("clip_text", 1)
    wait_for(lambda: len(watched.reports) == 2)
    assert rollback(watched.repository, [watched.server.url]).version == 1
    assert promote(watched.repository, 2, [watched.server.url]).standing == [1, 2]
    watched.features(2)


@pytest.mark.slow
def test_a_version_that_dies_repeatedly_ends_the_server_and_its_command(released, tmp_path):
    repository, reports = copy_of(released, tmp_path), []
    with serve(repository.path, report=reports.append) as server:
        found = Watched(server, repository, reports)

        def kill_each():
            killed = set()
            while not server.watch.over.wait(0.5):  # the version is loaded again by then
                for pid in set(found.processes("clip_card", 1)) - killed:
                    os.kill(pid, signal.SIGKILL)
                    killed.add(pid)

        killing = threading.Thread(target=kill_each)
        killing.start()
        with pytest.raises(TritonFailed, match=r"clip_card version 1: .*, and 2 times before within 10 minutes"):
            run_beside(server, ["sleep", "300"])
        killing.join()
        found.client.close()
    assert len([line for line in reports if line.endswith("loading it again")]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("restart", [True, False])
def test_a_triton_that_ends_is_restarted_only_if_requested(released, tmp_path, restart):
    repository, reports = copy_of(released, tmp_path), []
    with serve(repository.path, restart=restart, report=reports.append) as server:
        found = Watched(server, repository, reports)
        before, first = found.features(2), server.process
        first.kill()
        if restart:
            wait_for(lambda: len(reports) == 2)
            assert reports[0] == "Triton ended by itself with signal 9 (SIGKILL); starting another one"
            assert server.process is not first
            np.testing.assert_array_equal(found.features(2), before)
            assert promote(repository, 1, [server.url]).version == 1
        else:
            with pytest.raises(TritonFailed, match=r"ended by itself with signal 9 \(SIGKILL\); .* serve --restart"):
                wait_until_stopped(server)
        last = server.process
        found.client.close()
    assert last.poll() is not None
