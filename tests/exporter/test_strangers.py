"""Untrusted repositories: names, links, manifests and ONNX files lead to no other files and cause no crash."""

from __future__ import annotations

import hashlib
import json
import os
import shutil

import onnx
import pytest
from onnx import TensorProto, external_data_helper

from clipweld.exporter.errors import RepositoryError, VersionDamaged
from clipweld.exporter.graph import onnx_file
from clipweld.exporter.serving.switch import promote, prune
from clipweld.exporter.store.manifest import check_files
from clipweld.exporter.store.repository import Repository, repositories


@pytest.mark.parametrize("name", ["", "../clip", "/clip", "a/b", "..", "clip\n", "²", "a.b", "x" * 101, "\ud800"])
def test_model_names_that_could_be_paths_are_refused(tmp_path, name):
    with pytest.raises(RepositoryError, match="letters, digits, - and _ only"):
        Repository(tmp_path, name)


@pytest.mark.parametrize("name", ["0", "0007", "²", "٣", "1" * 30, "-1", "+1", "1.0", " 1"])
def test_folders_that_are_not_versions_are_left_alone(repository, name):
    shutil.copytree(repository.store / "2", repository.store / name)
    assert repository.versions() == [1, 2]


@pytest.mark.parametrize("what", ["version", "store", "model"])
def test_links_in_place_of_folders_are_refused(repository, tmp_path, what):
    place = {"version": repository.store / "2", "store": repository.store, "model": repository.model("image")}[what]
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RepositoryError, match="is a link"):
        promote(repository, 2, [])
    with pytest.raises(RepositoryError, match="is a link"):
        prune(repository, 1)
    assert (tmp_path / "elsewhere").is_dir()


@pytest.mark.parametrize("make", [os.mkfifo, lambda file: file.symlink_to("/dev/zero"), os.mkdir])
def test_a_model_file_that_is_not_a_regular_file_is_never_read(repository, make):
    file = repository.file("image", 2)
    file.unlink()
    make(file)
    with pytest.raises(VersionDamaged, match="is a link, or not a regular file"):
        check_files(repository, 2)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"files": {"../../../etc": {"sha256": "ab" * 32, "bytes": 1}}}, "files"),
        ({"files": []}, "files"),
        ({"lineage": [{"task": "../x", "sha256": "ab" * 32}]}, "task name"),
        ({"version": 3}, "it is of clip version 3"),
        ({"model": "other"}, "it is of other version 2"),
        ({"accuracy": 7}, "accuracy"),
        ({"unmerged": "no"}, "unmerged"),
        ({"parity": {"image_max_abs": float("nan")}}, "parity"),
        ({"more": 1}, "has 'more'"),
    ],
)
def test_a_manifest_with_invalid_contents_is_refused(repository, change, says):
    file = repository.manifest_file(2)
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(RepositoryError) as caught:
        check_files(repository, 2)
    assert says in str(caught.value)


@pytest.mark.parametrize("text", ["[" * 10**5, "\xff", '{"now": ["1"], "next": []}', '{"now": 1, "next": []}', "3", ""])
def test_an_invalid_history_file_is_refused(repository, text):
    (repository.store / "history.json").write_text(text, encoding="latin-1")
    with pytest.raises(RepositoryError, match=r"history\.json: can't be read .*; remove it"):
        repository.history()


def test_external_data_outside_the_version_is_never_read(repository):
    file = repository.file("image", 2)
    model = onnx.load(file)
    tensor = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    external_data_helper.set_external_data(tensor, "../../../../secret")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    file.write_bytes(content := model.SerializeToString())
    manifest = repository.manifest(2)
    manifest["files"]["image"] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    repository.manifest_file(2).write_text(json.dumps(manifest))
    with pytest.raises(VersionDamaged, match="has its data in another file"):
        onnx_file.load(file)
    with pytest.raises(VersionDamaged):
        check_files(repository, 2)


def test_models_of_other_tools_in_the_repository_are_ignored(repository):
    (repository.path / "some.thing_card" / "1").mkdir(parents=True)
    assert [found.name for found in repositories(repository.path)] == ["clip"]
