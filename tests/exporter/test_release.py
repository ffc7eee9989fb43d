"""One merge: its files, its result, its refusals, and no half-written files."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import shutil
from dataclasses import replace

import onnx
import pytest

from clipweld.exporter.errors import (
    AnswersDiffer,
    ConfigChanged,
    GraphsDiffer,
    OtherBase,
    RepositoryBusy,
    RepositoryEmpty,
    RepositoryError,
)
from clipweld.exporter.graph import precision
from clipweld.exporter.release import build
from clipweld.exporter.release.publish import release
from clipweld.exporter.store.repository import KINDS, Repository, repositories

FOLDERS = ["model_repository", "model_repository.store"]


def tree(path):
    return sorted(str(p.relative_to(path)) for p in path.rglob("*"))


def contents(repository):
    return {str(p): p.read_bytes() for p in sorted(repository.path.rglob("*")) if p.is_file()}


def test_a_first_merge_writes_the_base_and_the_merged_version(released):
    repository, result = released
    assert repository.versions() == repository.standing() == repository.history() == [1, 2]
    want = [f"clip_{kind}{rest}" for kind in KINDS for rest in ("", "/config.pbtxt")]
    files = ("", "/model.onnx", "/manifest.json")
    want += [f"clip_{kind}/{v}{rest}" for kind in KINDS for v in (1, 2) for rest in files]
    assert tree(repository.path) == sorted(want)
    assert sorted(os.listdir(repository.path.parent)) == FOLDERS
    for kind in KINDS:
        assert repository.file(kind, 2).samefile(repository.model(kind) / "2/model.onnx")
    assert (result.model, result.version, result.graph_identical_to_base) == ("clip", 2, True)
    assert [t["name"] for t in repository.card(1)["tasks"]] == []
    assert [t["name"] for t in repository.card(2)["tasks"]] == ["digits", "pets"]


def test_the_result_has_the_documented_keys(released):
    result = released[1].to_dict()
    assert list(result) == [
        "model", "version", "parity", "graph_identical_to_base", "seconds", "served", "precision", "accuracy", "cast",
        "forced",
    ]  # fmt: skip
    assert list(result["parity"]) == ["image_max_abs", "text_max_abs", "cosine_min", "top1_agreement"]


@pytest.mark.usefixtures("traced")
def test_a_later_merge_adds_a_version_to_the_store_and_changes_nothing_else(mini, make_adapter, samples, repository):
    before = contents(repository)
    first = make_adapter("digits")
    adapters = [first, make_adapter("pets", (first,), seed=1)]
    result = release(mini, adapters, repository, *samples)
    after = contents(repository)
    assert (result.version, result.served) == (3, 2)
    assert repository.versions() == [1, 2, 3]
    assert after == before
    # The same adapters give the same towers, byte for byte.
    for kind in ("image", "text"):
        assert repository.file(kind, 3).read_bytes() == repository.file(kind, 2).read_bytes()


@pytest.mark.usefixtures("traced")
def test_without_adapters_only_the_base_is_written_and_only_once(mini, samples, tmp_path):
    repository = Repository(tmp_path / "r", "clip")
    assert release(mini, [], repository, *samples).version == 1
    assert repository.versions() == [1]
    with pytest.raises(RepositoryError, match="no adapter to merge"):
        release(mini, [], repository, *samples)


@pytest.mark.usefixtures("traced")
def test_a_repository_can_hold_two_models(mini, samples, repository):
    release(mini, [], Repository(repository.path, "base"), *samples)
    assert [(r.name, r.standing()) for r in repositories(repository.path)] == [("base", [1]), ("clip", [1, 2])]


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("error", [AnswersDiffer("no"), OSError("disk full"), KeyboardInterrupt()])
def test_a_failing_merge_leaves_nothing(mini, make_adapter, samples, repository, monkeypatch, error):
    before = contents(repository)

    def fail(*_):
        raise error

    monkeypatch.setattr(build, "check_parity", fail)
    with pytest.raises(type(error)):
        release(mini, [make_adapter("digits")], repository, *samples)
    assert contents(repository) == before
    assert repository.versions() == [1, 2]
    assert sorted(os.listdir(repository.path.parent)) == FOLDERS


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("at", [1, 3, 4, 6])
def test_a_first_merge_that_fails_while_activating_can_be_run_again(
    mini, make_adapter, samples, tmp_path, monkeypatch, at
):
    repository, links = Repository(tmp_path / "model_repository", "clip"), itertools.count(1)

    def link(*args):
        if next(links) == 2 * at:
            raise OSError(errno.ENOSPC, "No space left on device")
        os_link(*args)

    os_link = os.link
    monkeypatch.setattr(os, "link", link)
    with pytest.raises(RepositoryError, match=r"can't be written .No space left on device.; make room"):
        release(mini, [make_adapter("digits")], repository, *samples)
    assert [path for path in tmp_path.rglob("*") if not path.is_dir()] == []
    assert list(repository.path.iterdir()) == []
    release(mini, [make_adapter("digits")], repository, *samples)
    assert repository.versions() == repository.standing() == repository.history() == [1, 2]


@pytest.mark.usefixtures("traced")
def test_wrong_weights_in_the_file_are_refused(mini, make_adapter, samples, repository, monkeypatch):
    """The check reads the written file, which here holds the base's weights instead of the merged ones."""
    fill, base = precision.fill, mini.model.state_dict()
    monkeypatch.setattr(precision, "fill", lambda graph, weights: fill(graph, base))
    with pytest.raises(AnswersDiffer, match="clip version 3"):
        release(mini, [make_adapter("digits")], repository, *samples)
    assert repository.versions() == [1, 2]


def test_a_graph_that_differs_from_the_base_s_is_refused(mini, make_adapter, samples, repository, monkeypatch):
    fill = precision.fill

    def renaming(graph, weights):
        model = fill(graph, weights)
        model.graph.node[0].name += "_renamed" if model.graph.output[0].name == "text_features" else ""
        return model

    monkeypatch.setattr(precision, "fill", renaming)
    with pytest.raises(GraphsDiffer, match="text tower"):
        release(mini, [make_adapter("digits")], repository, *samples)
    assert repository.versions() == [1, 2]


def test_later_merges_reuse_the_first_graph_without_tracing(mini, make_adapter, samples, repository, monkeypatch):
    monkeypatch.delattr(precision, "trace_image_tower")
    monkeypatch.delattr(precision, "trace_text_tower")
    made = release(mini, [make_adapter("flags", seed=2)], repository, *samples)
    assert made.graph_identical_to_base
    for kind in ("image", "text"):
        ours, base = (onnx.load(repository.file(kind, version)).graph for version in (made.version, 1))
        assert list(ours.node) == list(base.node)
        assert [t.name for t in ours.initializer] == [t.name for t in base.initializer]


def test_another_base_is_refused(mini, make_adapter, samples, repository):
    with pytest.raises(OtherBase, match="give another --name or --repository"):
        release(replace(mini, fingerprint="0" * 64), [make_adapter("digits")], repository, *samples)


@pytest.mark.usefixtures("traced")
def test_a_changed_config_is_refused(mini, make_adapter, samples, repository):
    config = repository.model("text") / "config.pbtxt"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(ConfigChanged, match=r"clip_text/config\.pbtxt"):
        release(mini, [make_adapter("digits")], repository, *samples)
    assert repository.versions() == [1, 2]


def test_only_one_merge_writes_at_a_time(mini, samples, repository):
    lock = os.open(repository.path, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RepositoryBusy, match="another exporter is writing"):
            release(mini, [], repository, *samples)
    finally:
        os.close(lock)


def test_leftovers_of_a_killed_merge_are_removed(repository):
    """A kill between two renames leaves towers without a card, an earlier one leaves a staging folder."""
    with repository.writing() as staging:
        repository.take_out(2, staging)
        repository.put_in(2, staging, ("image", "text"))
        for stale, name in ((".model_repository.staging-abc", ""), (".model_repository.staging-def", "half-written")):
            shutil.copytree(staging, repository.path.parent / stale)
            if name:
                (repository.path.parent / stale / name).write_bytes(b"x")
    empty = repository.path.parent / ".model_repository.staging-ghi"
    empty.mkdir()
    assert repository.versions() == [1, 2]
    with repository.writing() as staging:
        assert [path for path in repository.path.parent.glob(".*") if path != staging] == []
        assert not (repository.model("image") / "2").exists()
        assert staging.parent == repository.path.parent
    assert sorted(os.listdir(repository.path.parent)) == FOLDERS


def test_leftovers_of_a_killed_first_merge_are_removed(repository):
    shutil.rmtree(repository.model("card"))
    with repository.writing():
        assert tree(repository.path) == []


def test_an_empty_repository_is_refused_with_the_next_step(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(RepositoryEmpty, match="exporter merge --to onnx"):
            repositories(path)
