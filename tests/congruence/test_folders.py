"""Client and trainer take the same files in a folder for images."""

import pytest

from clipweld.client import _folders as in_client
from clipweld.trainer.tasks import tree as in_trainer


def test_client_and_trainer_know_the_same_image_suffixes():
    assert in_client.endings() == in_trainer.suffixes()
    assert {".jfif", ".mpo", ".avif", ".jp2", ".gif"} <= in_client.endings()


@pytest.mark.parametrize(
    "name",
    [
        *sorted(in_client.HIDDEN),
        *sorted(in_trainer.CLUTTER),
        ".ipynb_checkpoints",
        "._x.jpg",
        ".DS_Store",
        "Thumbs.DB",
        "@eaDir",
        "a.jpg",
    ],
)
def test_client_and_trainer_ignore_the_same_names(name):
    assert in_client.is_hidden(name) == in_trainer.is_hidden(name) == (name != "a.jpg")
