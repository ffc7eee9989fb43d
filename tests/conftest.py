"""What several rooms' tests stand on: the small CLIP, one learned task, one real server."""

from __future__ import annotations

import os
import signal

os.environ.setdefault("COLUMNS", "120")  # help screens and tables of one width, whatever runs the tests

import pytest

# Run in the background, a shell has its children ignore Ctrl-C, and theirs in turn; some tests send it to theirs.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def mini():
    """The small CLIP with its shipped weights; tests don't change it."""
    from trainer.backbone import load_backbone

    return load_backbone("mini")


@pytest.fixture(scope="session")
def digits():
    """The shipped task of handwritten digits."""
    from trainer.tasks import load_task

    return load_task("digits")


@pytest.fixture(scope="session")
def fitted(mini, digits):
    """Digits, learned in a few steps."""
    from trainer.config import train_config
    from trainer.fit import fit

    config = train_config("mini", iterations=25, shots=8)
    return fit(digits, mini, [], config, test_on=[digits])


@pytest.fixture(scope="session")
def adapters(fitted, tmp_path_factory):
    """A folder that holds the adapter of digits."""
    from trainer.adapter import save_adapter

    folder = tmp_path_factory.mktemp("adapters")
    save_adapter(fitted.adapter, folder / "digits.safetensors")
    return folder


@pytest.fixture(scope="session")
def repository(mini, fitted, tmp_path_factory):
    """A model repository: version 1 the small CLIP, version 2 with digits merged."""
    from exporter.release import release
    from exporter.repository import Repository
    from trainer.tasks import sample

    folder = tmp_path_factory.mktemp("repository") / "models"
    release(mini, [fitted.adapter], Repository(folder, "clip"), *sample(8))
    return folder


@pytest.fixture(scope="session")
def server(repository):
    """A real Triton on that repository; ``url`` speaks gRPC, ``http_url`` HTTP."""
    from exporter.triton import serve

    with serve(repository) as running:
        yield running
