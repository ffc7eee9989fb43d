"""SIGKILL at every change that a merge, a promotion, a rollback or a prune makes to the disk."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import threading

import pytest

from exporter import release as release_module
from exporter.manifest import check_files
from exporter.parity import Parity
from exporter.release import release
from exporter.repository import KINDS, Repository
from exporter.switch import promote, prune, rollback
from exporter.triton import serve

CHANGES = ("mkdir", "rename", "replace", "link", "unlink", "rmdir", "fsync", "open")


def killed_at(change: int, action) -> bool:
    """Do something in a process of its own that is killed when about to make its n-th change; whether it was."""
    child = os.fork()
    if child == 0:
        try:
            left = iter(range(change))
            for name in CHANGES:
                setattr(os, name, functools.partial(_counting, getattr(os, name), left))
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "it failed by itself"
    return os.WIFSIGNALED(status)


def _counting(call, left, *arguments, **settings):
    if next(left, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)
    return call(*arguments, **settings)


def state(repository):
    """What Triton would find."""
    return {
        kind: tuple(sorted(os.listdir(repository.model(kind)))) if repository.model(kind).is_dir() else None
        for kind in KINDS
    }


def check_whole(repository):
    """Every model that Triton would load has a config and whole versions; every version is what its manifest says."""
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
    """What a second run must come to: the tree, and no leftovers beside it."""
    names = sorted(str(p.relative_to(repository.path.parent)) for p in repository.path.parent.rglob("*"))
    return names, repository.history()


@pytest.fixture
def quick(monkeypatch, graphs):
    """Merges without tracing and comparing; in a forked child, without the threads that these start."""
    monkeypatch.setattr(release_module, "trace_image_tower", lambda backbone: graphs.image)
    monkeypatch.setattr(release_module, "trace_text_tower", lambda backbone: graphs.text)
    monkeypatch.setattr(release_module, "measure_parity", lambda *_: Parity(0.0, 0.0, 1.0, 1.0))


@pytest.fixture
def copies(released, tmp_path):
    """A function that gives a fresh repository: versions 1 and 2 stand, maybe more rest."""

    def copy(name):
        folder = tmp_path / name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(released[0].path.parent, folder)
        return Repository(folder / "model_repository", "clip")

    return copy


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("what", ["first merge", "merge", "promote", "promote back", "rollback", "prune"])
def test_killed_at_any_change_nothing_is_lost_and_the_next_run_ends_the_same(
    what, copies, mini, make_adapter, samples, tmp_path
):
    first = make_adapter("digits")
    lineage = [first, make_adapter("letters", (first,), seed=5)]

    def prepared(name):
        if what == "first merge":
            shutil.rmtree(tmp_path / name, ignore_errors=True)
            (tmp_path / name).mkdir()
            return Repository(tmp_path / name / "model_repository", "clip")
        repository = copies(name)
        if what != "merge":
            release(mini, lineage, repository, *samples)
        if what == "prune":
            release(mini, lineage, repository, *samples)
            promote(repository, 4, [])
        if what in ("rollback", "promote back"):
            promote(repository, 3, [])
        return repository

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
    served_before = prepared("disturbed").served
    states, change = {}, 0
    while True:
        repository = prepared("disturbed")
        before = repository.versions()
        if not killed_at(change, lambda: actions[what](repository)):  # noqa: B023
            break
        check_whole(repository)
        assert set(before) <= set(repository.versions()) or what == "prune"
        assert served_before is None or repository.standing()
        states.setdefault(str(state(repository)), change)
        done = {"merge": repository.versions() != before, "rollback": repository.served == undisturbed.served}
        if done.get(what):
            with repository.writing():  # any next run
                pass
        else:
            actions[what](repository)
        assert everything(repository) == everything(undisturbed), f"killed at change {change}"
        change += 1
    assert change > 5
    print(f"{what}: killed at {change} points, {len(states)} states for Triton")
    for text, at in states.items():
        repository = prepared("disturbed")
        killed_at(at, lambda: actions[what](repository))  # noqa: B023
        if repository.standing():
            with serve(repository.path) as server:
                assert server.process.poll() is None, text


def test_the_kill_is_real(tmp_path):
    def action():
        os.mkdir(tmp_path / "a")
        os.mkdir(tmp_path / "b")

    assert threading.active_count() >= 1
    assert killed_at(1, action)
    assert os.listdir(tmp_path) == ["a"]
    assert not killed_at(9, lambda: os.mkdir(tmp_path / "c"))
