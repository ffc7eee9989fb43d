"""Model control is restricted to users who may write the repository."""

from __future__ import annotations

import base64
import json
import shutil
import stat
import urllib.error
import urllib.request

import pytest

from clipweld.exporter.errors import RepositoryError, ServerUnreachable
from clipweld.exporter.serving.admin import HEADER, KEY_FILE, admin_key, new_admin_key
from clipweld.exporter.serving.switch import promote, rollback
from clipweld.exporter.serving.triton import serve
from clipweld.exporter.store.repository import Repository, store_of


@pytest.fixture(scope="module")
def keyed(released, tmp_path_factory):
    """A copy of the repository and its running server, started without any option about keys."""
    path = tmp_path_factory.mktemp("keyed") / "models"
    shutil.copytree(released[0].path, path)
    shutil.copytree(store_of(released[0].path), store_of(path))
    with serve(path) as server:
        yield Repository(path, "clip"), server


@pytest.fixture(autouse=True)
def _no_key_in_the_environment(monkeypatch):
    monkeypatch.delenv("CLIPWELD_ADMIN_KEY", raising=False)


def model_with_code(file):
    """Return the body of a load request with a model whose Python code writes a file on Triton's machine."""
    config = {
        "backend": "python",
        "input": [{"name": "x", "data_type": "TYPE_INT32", "dims": [1]}],
        "output": [{"name": "y", "data_type": "TYPE_INT32", "dims": [1]}],
    }
    code = f"open({str(file)!r}, 'w').close()\nclass TritonPythonModel:\n    def execute(self, requests): return []\n"
    encoded = base64.b64encode(code.encode()).decode()
    return json.dumps({"parameters": {"config": json.dumps(config), "file:1/model.py": encoded}}).encode()


@pytest.mark.parametrize("key", [None, "guessed"])
def test_a_web_page_cannot_run_code_through_model_control(keyed, tmp_path, key):
    """Browsers send a POST of plain text for any page without a preflight request."""
    _, server = keyed
    headers = {"Content-Type": "text/plain", "Origin": "https://elsewhere.example"} | ({HEADER: key} if key else {})
    body = model_with_code(tmp_path / "taken over")
    request = urllib.request.Request(f"{server.http_url}/v2/repository/models/own/load", body, headers)
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(request, timeout=30)
    assert not (tmp_path / "taken over").exists()


def test_code_runs_with_the_key(keyed, tmp_path):
    """This shows that the test above would notice if code ran."""
    repository, server = keyed
    headers = {HEADER: admin_key(repository.path)}
    body = model_with_code(tmp_path / "taken over")
    address = f"{server.http_url}/v2/repository/models/own"
    assert urllib.request.urlopen(urllib.request.Request(f"{address}/load", body, headers), timeout=30).status == 200
    assert (tmp_path / "taken over").exists()
    urllib.request.urlopen(urllib.request.Request(f"{address}/unload", b"{}", headers), timeout=30)


@pytest.mark.slow
def test_a_user_who_may_write_the_repository_needs_no_key(keyed):
    repository, server = keyed
    before = repository.served
    promote(repository, 1, [server.url])
    assert rollback(repository, [server.http_url]).version == before
    key = store_of(repository.path) / KEY_FILE
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert server.environment.keys() == {"CLIPWELD_URL", "CLIPWELD_HTTP_URL"}, "what it runs learns no key"


def test_the_key_in_the_environment_takes_precedence_over_the_repository_s(keyed, monkeypatch):
    repository, server = keyed
    monkeypatch.setenv("CLIPWELD_ADMIN_KEY", "another")
    assert admin_key(repository.path) == "another"
    with pytest.raises(ServerUnreachable, match="this very repository"):
        promote(repository, 1, [server.url])


def test_all_servers_of_a_repository_share_one_key(tmp_path):
    store_of(tmp_path / "models").mkdir()
    assert admin_key(tmp_path / "models") is None
    key = new_admin_key(tmp_path / "models")
    assert len(key) > 40
    assert new_admin_key(tmp_path / "models") == admin_key(tmp_path / "models") == key
    assert [file.name for file in store_of(tmp_path / "models").iterdir()] == [KEY_FILE]


def test_without_a_store_each_server_gets_its_own_key(tmp_path):
    assert new_admin_key(tmp_path / "models") != new_admin_key(tmp_path / "models")
    assert list(tmp_path.iterdir()) == []


def test_an_unreadable_key_file_is_reported_by_path(tmp_path):
    (store_of(tmp_path / "models") / KEY_FILE).mkdir(parents=True)
    with pytest.raises(RepositoryError, match=r"key .*admin-key: Is a directory; ask its owner, or set CLIPWELD_ADMIN"):
        admin_key(tmp_path / "models")
