"""The user's environment does not break clipweld (a short run), and the study notices if it does."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace

import pytest

from clipweld.exporter.serving.triton import serve
from clipweld.trainer.tasks import sample
from evidence.trust import surroundings

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    file = tmp_path_factory.mktemp("image") / "image.png"
    sample(1)[0][0].save(file)
    return file


@pytest.fixture(scope="module")
def urls(versions):
    with serve(versions.path) as server:
        yield server.url, server.http_url


def test_files_named_like_modules_in_the_working_folder_are_not_run(versions, image):
    broken = []
    figures = surroundings.in_a_working_folder(versions.path, image, broken)
    assert broken == []
    assert figures["modules"] > 250


def test_loopback_is_reached_without_the_proxy_in_the_environment(versions, urls, image):
    broken = []
    assert surroundings.behind_a_proxy(versions.path, urls, image, broken)["requests to the proxy"] == 0
    assert broken == []


def test_programs_exit_with_unfinished_calls(urls, image):
    broken = []
    surroundings.endings(urls, image, 1, broken)
    assert broken == []


def test_children_keep_using_their_parents_classifier(urls, image):
    broken = []
    assert surroundings.forks(urls, image, 1, broken)["children"] == 4
    assert broken == []


def test_a_killed_process_is_replaced(versions, image):
    broken = []
    assert surroundings.killed(versions.path, image, 1, 0, broken)["kills"] == 1
    assert broken == []


def test_files_of_users_survive_all_commands(versions, tmp_path):
    broken = []
    figures = surroundings.foreign(versions, tmp_path, 1, 0, broken)
    assert broken == []
    assert figures["placed"] > 0


def test_a_deleted_file_is_reported(versions, tmp_path, monkeypatch):
    def delete(command, environment):
        models = tmp_path / command[-1]
        for folder in (models, models.with_name(f"{models.name}.store"), *models.parent.glob(".*")):
            subprocess.run(["rm", "-r", folder], check=True)
        monkeypatch.setattr(surroundings, "_run", lambda *given: SimpleNamespace(returncode=0, stderr=""))
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(surroundings, "_run", delete)
    broken = []
    figures = surroundings.foreign(versions, tmp_path, 1, 0, broken)
    assert len(broken) == figures["placed"]
