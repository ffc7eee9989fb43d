"""Fixtures shared by several folders: the small CLIP, one learned task, one real server."""

from __future__ import annotations

import functools
import gc
import os
import signal
import sys
import traceback

os.environ.setdefault("COLUMNS", "120")  # the width of help screens and tables must not depend on the terminal

import pytest
import torch

import clipweld.exporter  # noqa: F401 - before any test imports ONNX Runtime, which would report to Microsoft

# After a model was compiled or exported, autograd starts threads, with which a forked child cannot train,
# unless autograd was used before.
torch.ones(1, requires_grad=True).sum().backward()

# A shell in the background makes its children ignore SIGINT, which they pass on; some tests send it to theirs.
signal.signal(signal.SIGINT, signal.default_int_handler)

CHANGES = ("mkdir", "rename", "replace", "link", "unlink", "rmdir", "fsync", "open")
CHILD_TIMEOUT_S = 60


# Tests that use these fixtures train, merge or start a server, which takes more than a second.
SLOW_FIXTURES = {"fitted", "repository", "server", "chromium", "learned"}


def pytest_collection_modifyitems(items):
    """Mark tests that use a slow fixture as slow."""
    for item in items:
        if SLOW_FIXTURES & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def mini():
    """The small CLIP with its shipped weights; tests don't change it."""
    from clipweld.trainer.base.backbone import load_backbone

    return load_backbone("mini")


@pytest.fixture(scope="session")
def digits():
    """The shipped task of handwritten digits ("digits")."""
    from clipweld.trainer.tasks import load_task

    return load_task("digits")


@pytest.fixture(scope="session")
def fitted(mini, digits):
    """The result of training digits for a few steps."""
    from clipweld.trainer.config import train_config
    from clipweld.trainer.learning.fit import fit

    config = train_config("mini", iterations=25, shots=8)
    return fit(digits, mini, [], config, test_on=[digits])


@pytest.fixture(scope="session")
def adapters(fitted, tmp_path_factory):
    """A folder that holds the adapter of digits."""
    from clipweld.trainer.adapters.adapter import save_adapter

    folder = tmp_path_factory.mktemp("adapters")
    save_adapter(fitted.adapter, folder / "digits.safetensors")
    return folder


@pytest.fixture(scope="session")
def repository(mini, fitted, tmp_path_factory):
    """A model repository: version 1 the small CLIP, version 2 with digits merged."""
    from clipweld.exporter.release.publish import release
    from clipweld.exporter.store.repository import Repository
    from clipweld.trainer.tasks import sample

    folder = tmp_path_factory.mktemp("repository") / "models"
    release(mini, [fitted.adapter], Repository(folder, "clip"), *sample(8))
    return folder


@pytest.fixture(scope="session")
def server(repository):
    """A real Triton that serves ``repository``: gRPC at ``url``, HTTP at ``http_url``."""
    from clipweld.exporter.serving.triton import serve

    with serve(repository) as running:
        yield running


@pytest.fixture
def killed_at():
    """A function that runs an action in a process that is killed at its n-th change to the disk."""
    return _killed_at


def _killed_at(change: int, action) -> bool:
    """Run an action in a child that is killed just before its change number ``change``; return whether it was."""
    child = os.fork()
    if child == 0:
        try:
            gc.disable()  # garbage of earlier tests may wait for threads that a forked child lacks
            signal.alarm(CHILD_TIMEOUT_S)
            left = iter(range(change))
            for name in CHANGES:
                setattr(os, name, functools.partial(_counting, getattr(os, name), left))
            action()
            os._exit(0)
        except BaseException:
            os.write(sys.__stderr__.fileno(), traceback.format_exc().encode())
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL), "it failed by itself, or hung"
    return os.WIFSIGNALED(status)


def _counting(call, left, *arguments, **settings):
    if next(left, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)
    return call(*arguments, **settings)
