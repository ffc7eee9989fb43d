"""Files that clipweld did not write: listed, never deleted, and named by every command that they block."""

from __future__ import annotations

import json
import os
import shutil
import sys

import pytest

from clipweld.exporter import cli
from clipweld.exporter.checks.verify import verify
from clipweld.exporter.errors import ExporterError, ForeignFiles, RepositoryError, StoreMissing
from clipweld.exporter.release.publish import release
from clipweld.exporter.release.unmerged import release_unmerged
from clipweld.exporter.serving.switch import promote, prune, rollback
from clipweld.exporter.serving.triton import serve
from clipweld.exporter.store.foreign import foreign_entries
from clipweld.exporter.store.repository import KINDS, Repository, known_repositories

PRECIOUS = b"my only copy"


@pytest.fixture
def repository(repository):
    """A repository with versions 1 and 2 active, and version 3, a copy of 2, only in the store."""
    shutil.copytree(repository.store / "2", repository.store / "3")
    manifest = json.loads((repository.store / "3/manifest.json").read_text())
    (repository.store / "3/manifest.json").write_text(json.dumps(manifest | {"version": 3}))
    assert (repository.versions(), repository.standing()) == ([1, 2, 3], [1, 2])
    return repository


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs a command and returns its status, stdout and stderr."""
    monkeypatch.setattr("clipweld.exporter.serving.servers.DEFAULT_SERVER", "127.0.0.1:1")
    monkeypatch.delenv("CLIPWELD_URL", raising=False)

    def run(repository, *arguments):
        monkeypatch.setattr(sys, "argv", ["exporter", *arguments, "--repository", str(repository.path)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0, *capsys.readouterr()

    return run


def put(place):
    """Write a file as a user might, creating its folder if necessary, and return its path."""
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(PRECIOUS)
    return place


def copied(repository, version, to):
    """Copy a version in each of Triton's three models, as a user might by hand."""
    for kind in KINDS:
        shutil.copytree(repository.model(kind) / str(version), repository.model(kind) / str(to))
    return repository.model("image") / str(to) / "model.onnx"


VERSIONS = {
    "in one model": lambda r: put(r.model("image") / "9/model.onnx"),
    "in two models": lambda r: (put(r.model("text") / "9/model.onnx"), put(r.model("image") / "9/model.onnx"))[1],
    "a number that is the store's": lambda r: put(r.model("image") / "3/model.onnx"),
    "a copy in all three": lambda r: copied(r, 2, 9),
    "a copy that is the store's next": lambda r: copied(r, 2, 3),
    "a link": lambda r: (
        (r.model("image") / "9").symlink_to(put(r.path.parent / "mine/model.onnx").parent)
        or r.model("image") / "9/model.onnx"
    ),
}


@pytest.mark.parametrize("where", VERSIONS)
def test_a_version_added_by_hand_is_reported_and_never_served_or_deleted(repository, run, where):
    file = VERSIONS[where](repository)
    content = file.read_bytes()
    folder = str(file.parent)
    for command in (["promote", "1"], ["promote"], ["rollback"]):
        code, _, err = run(repository, *command)
        assert (code, err.count("\n")) == (1, 1)
        assert folder in err
    code, out, err = run(repository, "prune", "--keep", "5")
    assert code == 0 if where != "a link" else folder in err
    code, out, _ = run(repository, "versions", "--json")
    rows = json.loads(out)
    assert folder in [row["foreign"]["path"] for row in rows if row["foreign"]]
    assert [row["version"] for row in rows if row["served"]] == [2] == [repository.served]
    assert "foreign" in run(repository, "versions")[1]
    assert file.read_bytes() == content


@pytest.mark.usefixtures("traced")
def test_merge_refuses_a_version_added_by_hand_before_any_slow_step(repository, mini, make_adapter, samples):
    steps = []
    for place in (repository.store / "4/image/model.onnx", repository.model("image") / "7/model.onnx"):
        put(place)
        with pytest.raises(ForeignFiles, match=str(place.parents[place.parts[-2] == "image"])):
            release(mini, [make_adapter("digits")], repository, *samples, steps.append)
        assert place.read_bytes() == PRECIOUS
        place.unlink()
        place.parent.rmdir()
    assert steps == []


@pytest.mark.usefixtures("traced")
def test_a_user_s_model_of_the_same_name_is_kept(tmp_path, mini, samples):
    repository = Repository(tmp_path / "model_repository", "clip")
    files = [put(repository.model("image") / name) for name in ("config.pbtxt", "1/model.onnx")]
    with pytest.raises(ForeignFiles, match="clip_image/1"):
        release(mini, [], repository, *samples)
    with repository.writing():
        assert [file.read_bytes() for file in files] == [PRECIOUS, PRECIOUS]
    shutil.rmtree(files[1].parent)
    with pytest.raises(RepositoryError, match="another config"):
        release(mini, [], repository, *samples)
    assert files[0].read_bytes() == PRECIOUS


@pytest.mark.parametrize("name", ["notes.txt", "deep/er/notes.txt", ".hidden", "model.onnx"])
def test_an_active_version_with_foreign_files_is_not_retired(repository, run, name):
    place = repository.model("image") / "1" / name
    if place.exists():
        place.unlink()  # writing in place would change the hard-linked file in the store
    put(place)
    promote(repository, 2, [])  # versions 1 and 2 both remain active
    code, _, err = run(repository, "promote", "3")
    assert (code, str(repository.model("image") / "1") in err, repository.served) == (1, True, 2)
    assert place.read_bytes() == PRECIOUS
    if name != "model.onnx":
        assert any(str(place).startswith(str(entry.path)) for entry in foreign_entries(repository))


@pytest.mark.parametrize("name", ["notes.txt", "image/notes.txt", "image/model.onnx", "fp32/image/other"])
def test_a_stored_version_with_foreign_files_is_not_pruned(repository, run, name):
    promote(repository, 3, [])
    promote(repository, 1, [])
    place = repository.store / "2" / name
    place.unlink(missing_ok=True)
    put(place)
    shutil.copytree(repository.store / "3", repository.store / "4")
    manifest = json.loads((repository.store / "4/manifest.json").read_text())
    (repository.store / "4/manifest.json").write_text(json.dumps(manifest | {"version": 4}))
    code, _, err = run(repository, "prune", "--keep", "1")
    assert (code, str(repository.store / "2" / name.split("/")[0]) in err) == (1, True)
    assert place.read_bytes() == PRECIOUS
    assert repository.versions() == [1, 2, 3, 4]


FOREIGN = (
    "model_repository/clip_image/README", "model_repository/clip_text/.hidden/x",
    "model_repository.store/clip/7/image/model.onnx", "model_repository.store/clip/notes",
    "model_repository.store/clip/.7-removed/image/model.onnx", ".model_repository.staging-mine/model.onnx",
    "model_repository/mine_card/1/model.onnx", "model_repository.store/mine/model.onnx",
)  # fmt: skip


def test_other_foreign_files_survive_every_command_and_are_listed(repository, run):
    root = repository.path.parent
    files = [put(root / name) for name in FOREIGN]
    for command in (["promote"], ["rollback"], ["promote", "1"], ["prune", "--keep", "1"], ["verify", "1"]):
        assert run(repository, *command)[0] == 0, command
    assert [file.read_bytes() for file in files] == [PRECIOUS] * len(files)
    listed = [str(entry.path) for entry in foreign_entries(repository)]
    for file in files[:4] + files[5:6]:
        assert [path for path in listed if str(file).startswith(path)], file
    assert repository.versions() == [1, 3]


@pytest.mark.usefixtures("traced")
def test_unmerged_versions_with_foreign_files_are_not_replaced(repository, mini, make_adapter, samples):
    lineage = [make_adapter("digits")]
    release_unmerged(mini, lineage, repository, *samples)
    sibling = Repository(repository.path, "clip-unmerged")
    for place in (sibling.model("image") / "notes", sibling.store / "notes", sibling.store / "1/image/notes"):
        put(place)
        with pytest.raises(ForeignFiles, match="notes"):
            release_unmerged(mini, lineage, repository, *samples)
        assert place.read_bytes() == PRECIOUS
        place.unlink()
    release_unmerged(mini, lineage, repository, *samples)


def test_a_version_with_an_unreadable_manifest_is_refused_as_damaged(repository):
    """It is still listed among the foreign entries."""
    repository.manifest_file(3).write_text("{")
    assert repository.versions() == [1, 2]
    with pytest.raises(RepositoryError, match=r"3/manifest\.json: can't be read"):
        promote(repository, 3, [])
    assert [entry.path for entry in foreign_entries(repository)] == [repository.store / "3"]


@pytest.fixture
def storeless(repository):
    """The repository without its store, as after copying only the one folder."""
    shutil.rmtree(repository.store.parent)
    return repository


def test_a_repository_without_its_store_can_be_listed_and_other_commands_are_refused(storeless, run):
    code, out, err = run(storeless, "versions", "--json")
    rows = json.loads(out)
    assert [(row["version"], row["served"], row["standing"], row["stored"]) for row in rows] == [
        (1, False, True, False), (2, True, True, False),
    ]  # fmt: skip
    assert rows[1]["tasks"] == ["digits", "pets"]
    assert run(storeless, "versions")[1].count("mini (mini)") == 2
    for command in (["promote", "1"], ["promote"], ["rollback"], ["prune", "--keep", "1"], ["verify"]):
        code, _, err = run(storeless, *command)
        assert (code, err.count("\n")) == (1, 1)
        assert f"their store {storeless.store} is missing; copy both folders" in err
    assert os.listdir(storeless.path.parent) == ["model_repository"]


@pytest.mark.usefixtures("traced")
def test_merge_into_a_repository_without_its_store_is_refused(storeless, mini, make_adapter, samples):
    with pytest.raises(StoreMissing, match="copy both folders"):
        release(mini, [make_adapter("digits")], storeless, *samples)
    assert storeless.standing() == [1, 2]


def test_a_copied_repository_with_its_store_works_like_the_original(repository, samples):
    """Copies have no hard links: repository and store hold separate files with the same bytes."""
    assert not repository.file("image", 2).samefile(repository.model("image") / "2/model.onnx")
    assert promote(repository, 3, []).standing == [2, 3]
    assert rollback(repository, []).standing == [2]
    assert prune(repository, 1).kept == [1, 2, 3]
    assert verify(repository, 2, *samples).graph_identical_to_base


@pytest.mark.slow
def test_a_repository_without_its_store_can_be_served(storeless):
    with serve(storeless.path) as server:
        assert server.process.poll() is None
        assert [found.standing() for found in known_repositories(storeless.path)] == [[1, 2]]


def test_refusals_are_exporter_errors():
    assert issubclass(ForeignFiles, ExporterError)
    assert issubclass(StoreMissing, ExporterError)
