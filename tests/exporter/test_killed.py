"""SIGKILL at every change to the disk that a merge, a promotion, a rollback or a prune makes."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from clipweld.exporter.graph import precision
from clipweld.exporter.release import build
from clipweld.exporter.release.publish import release
from clipweld.exporter.release.unmerged import release_unmerged
from clipweld.exporter.results import Parity
from clipweld.exporter.serving.switch import promote, prune, rollback
from clipweld.exporter.serving.triton import serve
from clipweld.exporter.store import card
from clipweld.exporter.store.manifest import check_files
from clipweld.exporter.store.repository import KINDS, Repository


def state(repository):
    """Return what Triton would find, per model."""
    return {
        kind: tuple(sorted(os.listdir(repository.model(kind)))) if repository.model(kind).is_dir() else None
        for kind in KINDS
    }


def check_whole(repository):
    """Check that each model has a config and complete versions, and each version the files of its manifest."""
    for kind, entries in state(repository).items():
        if entries is None:
            continue
        assert "config.pbtxt" in entries
        versions = [int(entry) for entry in entries if entry != "config.pbtxt"]
        assert versions, f"{kind}: a model without a version stops Triton"
        for version in versions:
            assert {p.name for p in (repository.model(kind) / str(version)).iterdir()} == {
                "manifest.json",
                "model.onnx",
            }
    for version in repository.versions():
        check_files(repository, version)


def everything(repository):
    """Return what must be the same after the next run: all paths, leftovers included, and the history."""
    names = sorted(str(p.relative_to(repository.path.parent)) for p in repository.path.parent.rglob("*"))
    return names, repository.history()


def tower(name, shape, weight, output):
    """Return a minimal tower: the input's mean times a weight, which is a graph input."""
    nodes = [
        helper.make_node("Cast", [name], ["float"], name="cast", to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["float"], ["flat"], name="flatten"),
        helper.make_node("ReduceMean", ["flat", "axes"], ["mean"], name="mean"),
        helper.make_node("Mul", ["mean", weight], [output], name="weigh"),
    ]
    kind = {"image": TensorProto.UINT8, "tokens": TensorProto.INT32}[name]
    width = {"visual.ln_post.weight": 192, "ln_final.weight": 128}[weight]
    inputs = [
        helper.make_tensor_value_info(name, kind, ["batch", *shape]),
        helper.make_tensor_value_info(weight, TensorProto.FLOAT, [width]),
    ]
    outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", width])]
    axes = numpy_helper.from_array(np.array([1]), "axes")
    opset = [helper.make_opsetid("", 18)]
    return helper.make_model(
        helper.make_graph(nodes, "tower", inputs, outputs, [axes]), opset_imports=opset, ir_version=9
    )


@pytest.fixture
def quick(monkeypatch):
    """Merges with tiny towers and without comparing answers, which needs threads that a forked child lacks."""
    image = tower("image", (64, 64, 3), "visual.ln_post.weight", "image_features")
    text = tower("tokens", ("length",), "ln_final.weight", "text_features")
    monkeypatch.setattr(precision, "trace_image_tower", lambda backbone: image)
    monkeypatch.setattr(precision, "trace_text_tower", lambda backbone: text)
    monkeypatch.setattr(build, "measure_parity", lambda *_: Parity(0.0, 0.0, 1.0, 1.0))
    monkeypatch.setattr(card, "tokenizer_sha256", lambda _: "0" * 64)  # it takes longer than the rest of the merge
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked child would wait for threads that it lacks
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("what", ["first merge", "merge", "promote", "promote back", "rollback", "prune"])
def test_a_kill_at_any_change_loses_nothing_and_the_next_run_ends_as_if_undisturbed(
    what, mini, make_adapter, samples, tmp_path, killed_at
):
    first = make_adapter("digits")
    lineage = [first, make_adapter("letters", (first,), seed=5)]
    template = Repository(tmp_path / "template/model_repository", "clip")
    template.path.parent.mkdir()
    for _ in range({"first merge": 0, "merge": 1, "prune": 3}.get(what, 2)):
        release(mini, lineage, template, *samples)
    if what in ("rollback", "promote back", "prune"):
        promote(template, template.versions()[-1], [])

    def prepared(name):
        """Return a copy by hard links, which is safe because files of versions are never written to."""
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        shutil.copytree(template.path.parent, tmp_path / name, copy_function=os.link)
        return Repository(tmp_path / name / "model_repository", "clip")

    actions = {
        "first merge": lambda r: release(mini, lineage, r, *samples),
        "merge": lambda r: release(mini, lineage, r, *samples),
        "promote": lambda r: promote(r, 3, []),
        "promote back": lambda r: promote(r, 1, []),
        "rollback": lambda r: rollback(r, []),
        "prune": lambda r: prune(r, 1),
    }
    undisturbed = prepared("undisturbed")
    actions[what](undisturbed)
    states, change = {}, 0
    while True:
        repository = prepared("disturbed")
        before = repository.versions()
        if not killed_at(change, lambda: actions[what](repository)):  # noqa: B023
            break
        check_whole(repository)
        assert set(before) <= set(repository.versions()) or what == "prune"
        assert repository.standing() or not template.standing()
        states.setdefault(tuple(state(repository).values()), change)
        before_run, stood = repository.versions(), repository.standing()
        done = {"merge": repository.versions() != before, "rollback": repository.served == undisturbed.served}
        if done.get(what):
            with repository.writing():  # like any next run
                pass
        else:
            actions[what](repository)
        if what == "first merge" and 2 in before_run:  # the killed merge was complete, so the next run adds another
            check_whole(repository)
            assert (repository.versions(), repository.served) == ([1, 2, 3], 2 if stood else 3)
            assert sorted(os.listdir(tmp_path / "disturbed")) == ["model_repository", "model_repository.store"]
        else:
            assert everything(repository) == everything(undisturbed), f"killed at change {change}"
        change += 1
    assert change > 5
    uneven = [at for text, at in states.items() if len(set(text)) > 1]  # where the three models have different versions
    print(f"{what}: killed at {change} points, {len(uneven)} uneven states for Triton")
    for at in uneven:
        repository = prepared("disturbed")
        killed_at(at, lambda: actions[what](repository))  # noqa: B023
        if repository.standing():
            with serve(repository.path) as server:
                assert server.process.poll() is None


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_kill_while_writing_unmerged_versions_leaves_both_models_intact(
    mini, make_adapter, samples, tmp_path, killed_at
):
    first = make_adapter("digits")
    lineage = [first, make_adapter("letters", (first,), seed=5)]
    template = Repository(tmp_path / "template/model_repository", "clip")
    template.path.parent.mkdir()
    release(mini, lineage, template, *samples)
    release_unmerged(mini, lineage[:1], template, *samples)

    def prepared(name):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        shutil.copytree(template.path.parent, tmp_path / name, copy_function=os.link)
        return Repository(tmp_path / name / "model_repository", "clip")

    undisturbed, change = prepared("undisturbed"), 0
    release_unmerged(mini, lineage, undisturbed, *samples)
    while True:
        repository = prepared("disturbed")
        if not killed_at(change, lambda: release_unmerged(mini, lineage, repository, *samples)):  # noqa: B023
            break
        for model in (repository, Repository(repository.path, "clip-unmerged")):
            check_whole(model)
        assert (state(repository), repository.history()) == (state(template), template.history())
        release_unmerged(mini, lineage, repository, *samples)
        assert everything(repository) == everything(undisturbed), f"killed at change {change}"
        change += 1
    assert change > 20


def test_the_fixture_really_kills_at_the_given_change(tmp_path, killed_at):
    def action():
        os.mkdir(tmp_path / "a")
        os.mkdir(tmp_path / "b")

    assert killed_at(1, action)
    assert os.listdir(tmp_path) == ["a"]
    assert not killed_at(9, lambda: os.mkdir(tmp_path / "c"))
