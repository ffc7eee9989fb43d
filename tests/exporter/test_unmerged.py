"""Adapters left unmerged in the graph: a second model with the same answers that leaves the normal one untouched."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest
import tritonclient.grpc

from clipweld.client import ZeroShotClassifier
from clipweld.exporter import cli
from clipweld.exporter.checks.parity import MAX_ABS
from clipweld.exporter.checks.verify import verify
from clipweld.exporter.errors import AnswersDiffer, OtherBase, RepositoryError
from clipweld.exporter.release import build
from clipweld.exporter.release.publish import release
from clipweld.exporter.release.unmerged import counts, release_unmerged
from clipweld.exporter.serving.switch import promote, prune, rollback
from clipweld.exporter.serving.triton import serve
from clipweld.exporter.store.repository import TOWERS, Repository, repositories
from clipweld.trainer.adapters.adapter import save_adapter


@pytest.fixture(scope="module")
def lineage(make_adapter):
    """The two adapters of ``released`` and three more."""
    adapters = ()
    for seed, task in enumerate(["digits", "pets", "flags", "cars", "birds"]):
        adapters = (*adapters, make_adapter(task, adapters, seed))
    return adapters


@pytest.fixture(scope="module")
def apart(mini, released, lineage, samples, tmp_path_factory):
    """(a copy of the released repository with its two tasks also unmerged, its contents before, the result)."""
    path = tmp_path_factory.mktemp("unmerged") / "model_repository"
    shutil.copytree(released[0].path.parent, path.parent, dirs_exist_ok=True)
    repository = Repository(path, "clip")
    before = contents(path.parent)
    return repository, before, release_unmerged(mini, lineage[:2], repository, *samples)


@pytest.fixture
def changeable(apart, tmp_path):
    """A copy of that repository that a test may change."""
    shutil.copytree(apart[0].path.parent, tmp_path, dirs_exist_ok=True)
    return Repository(tmp_path / "model_repository", "clip")


def sibling_of(repository):
    return Repository(repository.path, f"{repository.name}-unmerged")


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def run(*arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["exporter", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def test_numbers_of_adapters_grow_fourfold_and_end_with_all():
    assert [counts(n) for n in (1, 2, 4, 5, 11, 17)] == [[1], [1, 2], [1, 4], [1, 4, 5], [1, 4, 11], [1, 4, 16, 17]]


def test_a_separate_model_gets_one_version_per_number_of_adapters(apart):
    repository, _, result = apart
    sibling = sibling_of(repository)
    assert (result.model, result.versions) == ("clip-unmerged", [1, 2])
    assert sibling.versions() == sibling.standing() == [1, 2]
    assert [(r.name, r.standing()) for r in repositories(repository.path)] == [("clip", [1, 2]), (sibling.name, [1, 2])]
    for version, tasks in ((1, ["digits"]), (2, ["digits", "pets"])):
        card = sibling.card(version)
        assert (card["model"], card["version"]) == ("clip-unmerged", version)
        assert [task["name"] for task in card["tasks"]] == tasks
        assert sibling.is_unmerged(version)
        assert not repository.is_unmerged(version)
    assert all(parity.max_abs <= MAX_ABS for parity in result.parity)


def test_the_graph_grows_with_every_adapter(apart):
    repository, sibling = apart[0], sibling_of(apart[0])
    for kind, layers in (("image", 2), ("text", 1)):
        files = (repository.file(kind, 2), sibling.file(kind, 1), sibling.file(kind, 2))
        nodes = [len(onnx.load(file).graph.node) for file in files]
        assert nodes == [nodes[0], nodes[0] + 5 * layers, nodes[0] + 10 * layers]
        config = (repository.model(kind) / "config.pbtxt").read_text()
        assert (sibling.model(kind) / "config.pbtxt").read_text() == config.replace("clip_", "clip-unmerged_")


def test_the_normal_model_is_left_unchanged(apart):
    repository, before, _ = apart
    after = contents(repository.path.parent)
    assert {name: after[name] for name in before} == before
    assert all("clip-unmerged" in name for name in set(after) - set(before))
    assert (repository.standing(), repository.served, repository.history()) == ([1, 2], 2, [1, 2])


@pytest.mark.slow
def test_base_merged_and_unmerged_are_served_side_by_side(apart, samples):
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    tokens = random.integers(0, 49408, (3, 9), dtype=np.int32)
    with serve(apart[0].path) as server:
        client = tritonclient.grpc.InferenceServerClient(server.url.removeprefix("grpc://"))

        def ask(model, version, array):
            name = "image" if array is image else "tokens"
            value = tritonclient.grpc.InferInput(name, array.shape, {"image": "UINT8", "tokens": "INT32"}[name])
            value.set_data_from_numpy(array)
            kind = {"image": "image", "tokens": "text"}[name]
            return client.infer(f"{model}_{kind}", [value], str(version)).as_numpy(f"{kind}_features")

        for array in (image, tokens):
            base, merged, unmerged = (ask(*which, array) for which in (("clip", 1), ("clip", 2), ("clip-unmerged", 2)))
            np.testing.assert_allclose(unmerged, merged, rtol=0, atol=MAX_ABS)
            assert np.abs(base - merged).max() > 10 * MAX_ABS, array.dtype
        client.close()
        answers = []
        for model in ("clip", "clip-unmerged"):
            with ZeroShotClassifier(server.url, model) as classifier:
                assert (classifier.card().model, classifier.card().version) == (model, 2)
                answers.append(list(classifier.classify(samples[0][:2], task="pets")))
        for merged, unmerged in zip(*answers, strict=True):
            assert [p.label for p in merged.predictions] == [p.label for p in unmerged.predictions]


@pytest.mark.slow
def test_changes_of_the_normal_model_leave_the_unmerged_one_unchanged(mini, lineage, samples, changeable):
    sibling = sibling_of(changeable)
    before = {name: content for name, content in contents(changeable.path.parent).items() if "unmerged" in name}
    assert release(mini, lineage[:3], changeable, *samples).version == 3
    promote(changeable, 3, [])
    assert rollback(changeable, []).version == 2
    assert prune(changeable, 1).kept == [1, 2, 3]
    assert sibling.standing() == [1, 2]
    after = {name: content for name, content in contents(changeable.path.parent).items() if "unmerged" in name}
    assert after == before
    assert prune(sibling, 1).removed == []


@pytest.mark.slow
def test_the_next_unmerged_release_replaces_the_earlier_one(mini, lineage, samples, changeable):
    normal = {name: content for name, content in contents(changeable.path.parent).items() if "unmerged" not in name}
    result = release_unmerged(mini, lineage, changeable, *samples)
    sibling = sibling_of(changeable)
    assert result.versions == sibling.versions() == sibling.standing() == [1, 4, 5]
    assert [entry["task"] for entry in sibling.manifest(5)["lineage"]] == [adapter.task for adapter in lineage]
    after = contents(changeable.path.parent)
    assert {name: content for name, content in after.items() if "unmerged" not in name} == normal


@pytest.mark.slow
@pytest.mark.parametrize("error", [AnswersDiffer("no"), OSError("disk full")])
def test_a_failed_unmerged_release_keeps_the_earlier_one(mini, lineage, samples, changeable, monkeypatch, error):
    before = contents(changeable.path.parent)

    def fail(*_):
        raise error

    monkeypatch.setattr(build, "check_parity", fail)
    with pytest.raises(type(error)):
        release_unmerged(mini, lineage, changeable, *samples)
    assert contents(changeable.path.parent) == before


@pytest.mark.slow
def test_an_unmerged_release_that_fails_while_activating_keeps_the_earlier_one(
    mini, lineage, samples, changeable, monkeypatch
):
    before = contents(changeable.path.parent)
    put_in = Repository.put_in

    def full(repository, version, *rest):
        if version == 5:
            raise RepositoryError("disk full")
        put_in(repository, version, *rest)

    monkeypatch.setattr(Repository, "put_in", full)
    with pytest.raises(RepositoryError, match="disk full"):
        release_unmerged(mini, lineage, changeable, *samples)
    assert contents(changeable.path.parent) == before


def test_unmerged_versions_can_be_verified_from_their_files(apart, changeable, samples):
    result = verify(sibling_of(apart[0]), 2, *samples)
    assert result.parity.max_abs <= MAX_ABS
    assert result.graph_identical_to_base is None
    file = sibling_of(changeable).file("image", 2)
    model = onnx.load(file)
    branch = next(tensor for tensor in model.graph.initializer if ".lora_B." in tensor.name)
    branch.raw_data = np.zeros(branch.dims, np.float32).tobytes()
    onnx.save(model, file)
    with pytest.raises(RepositoryError, match="was altered"):
        verify(sibling_of(changeable), 2, *samples)


@pytest.mark.usefixtures("traced")
def test_an_unmerged_release_needs_no_normal_model(mini, lineage, samples, tmp_path):
    repository = Repository(tmp_path / "r", "clip")
    assert release_unmerged(mini, lineage[:1], repository, *samples).versions == [1]
    assert [(r.name, r.standing()) for r in repositories(repository.path)] == [("clip-unmerged", [1])]


def test_refused_unmerged_releases_give_the_reason_and_write_nothing(mini, lineage, samples, changeable):
    before = contents(changeable.path.parent)
    with pytest.raises(RepositoryError, match="no adapter to leave unmerged; learn a task first: trainer fit"):
        release_unmerged(mini, [], changeable, *samples)
    with pytest.raises(OtherBase, match="its 'clip' is mini"):
        release_unmerged(replace(mini, fingerprint="0" * 64), lineage[:1], changeable, *samples)
    with pytest.raises(RepositoryError, match=r"the versions of 'clip-unmerged' are unmerged.*give another --name"):
        release(mini, lineage, sibling_of(changeable), *samples)
    assert contents(changeable.path.parent) == before


def test_merged_versions_of_the_same_name_are_not_replaced(mini, lineage, samples, repository):
    for path in (repository.store, *map(repository.model, ("image", "text", "card"))):
        path = path.rename(path.with_name(path.name.replace("clip", "clip-unmerged")))
        for manifest in path.glob("*/manifest.json"):
            manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"model": "clip-unmerged"}))
    before = contents(repository.path.parent)
    with pytest.raises(RepositoryError, match=r"'clip-unmerged' has merged versions, .*give another --name"):
        release_unmerged(mini, lineage, repository, *samples)
    assert contents(repository.path.parent) == before


@pytest.mark.slow
def test_the_command_writes_lists_and_verifies_unmerged_versions(released, lineage, tmp_path, monkeypatch, capsys):
    shutil.copytree(released[0].path.parent, tmp_path, dirs_exist_ok=True)
    for adapter in lineage[:2]:
        save_adapter(adapter, tmp_path / "adapters" / f"{adapter.task}.safetensors")
    where = ["--repository", tmp_path / "model_repository"]
    merge = ["merge", "--to", "onnx", "--unmerged", "--model", "mini", "--adapters", tmp_path / "adapters", *where]
    assert run(*merge, "--json", monkeypatch=monkeypatch) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result) == ["model", "versions", "parity", "seconds"]
    assert (result["model"], result["versions"]) == ("clip-unmerged", [1, 2])
    assert run(*merge, monkeypatch=monkeypatch) == 0
    assert ": clip-unmerged versions 1, 2, each with as many adapters" in capsys.readouterr().out
    assert run("versions", *where, "--json", monkeypatch=monkeypatch) == 0
    rows = [(row["model"], row["version"], row["unmerged"]) for row in json.loads(capsys.readouterr().out)]
    assert rows == [("clip", 1, False), ("clip", 2, False), ("clip-unmerged", 1, True), ("clip-unmerged", 2, True)]
    assert run("verify", "2", "--name", "clip-unmerged", *where, monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out.startswith("clip-unmerged version 2: files unaltered")


@pytest.mark.parametrize(
    "others",
    [
        ["--precision", "int8"],
        ["--min-agreement", "1"],
        ["--min-accuracy", "50"],
        ["--max-drop", "0"],
        ["--validate", "emoji"],
        ["--force"],
    ],
)
def test_options_that_do_not_apply_to_unmerged_are_refused(others, monkeypatch, capsys):
    arguments = ["merge", "--to", "onnx", "--unmerged", *others]
    assert run(*arguments, monkeypatch=monkeypatch) == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "--unmerged is in fp32, without a gate; leave out" in said
    assert others[0] in said.rpartition("leave out")[2]


def test_unmerged_towers_differ_from_the_base_only_in_branches(apart):
    """So a comparison with merged versions measures the branches only."""
    repository, sibling = apart[0], sibling_of(apart[0])
    for kind in TOWERS:
        base, unmerged = (onnx.load(r.file(kind, version)).graph for r, version in ((repository, 1), (sibling, 2)))
        weights = {tensor.name: tensor.raw_data for tensor in unmerged.initializer}
        assert all(weights[tensor.name] == tensor.raw_data for tensor in base.initializer)
        kept = {node.name: node.op_type for node in unmerged.node}
        assert all(kept[node.name] == node.op_type for node in base.node)
