"""Cards may come from untrusted servers: each is either read exactly or refused in one line."""

from __future__ import annotations

import json

import pytest

from clipweld.client._card import read_card
from clipweld.client.errors import ContractMismatch


@pytest.fixture
def card(fake):
    return fake.card(2)


def test_a_whole_card_is_read(card):
    read = read_card(json.dumps(card).encode(), "a server")
    assert (read.version, read.logit_scale, read.tasks[0].class_names) == (2, 100.0, ("zero", "one", "two"))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("image", "size"), 2**31), (("image", "size"), True), (("image", "size"), "64"), (("embed_dim",), 0),
        (("text", "context_length"), 1e3), (("logit_scale",), float("nan")), (("logit_scale",), 10**400),
        (("logit_scale",), None), (("version",), -1), (("base",), []), (("tasks",), {}), (("tasks", 0), 3),
        (("tasks", 0, "class_names"), "zero"), (("tasks", 0, "class_names"), ["zero", 1]),
        (("tasks", 0, "class_names"), ["\x1b[2J", "b"]), (("tasks", 0, "templates"), ["a photo"]),
        (("tasks", 0, "templates"), []), (("tasks", 0, "accuracy"), {"before": 101.0}),
        (("tasks", 0, "name"), "\ud800"),
    ],
)  # fmt: skip
def test_a_card_with_an_invalid_value_is_refused(card, path, value):
    inside = card
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    with pytest.raises(ContractMismatch) as caught:
        read_card(json.dumps(card).encode(), "a server")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "text", [b"", b"[" * 10**5, b"3", b"null", b"\xff", b" " * (5 << 20), b"9" * 5000, b"[" + b"0," * 250_000 + b"0]"]
)
def test_content_that_is_not_a_card_is_refused(text):
    with pytest.raises(ContractMismatch):
        read_card(text, "a server")
