"""Planted numeric faults are found, and a fault that is missed would be reported."""

from __future__ import annotations

import pytest

from clipweld.client import _release
from clipweld.trainer.learning import fit
from evidence.trust import numbers
from evidence.trust.record import Record


@pytest.fixture
def ground(mini, digits, fitted, repository, server, tmp_path):
    """The small CLIP with digits learned, merged and served."""
    from clipweld.exporter.store.repository import Repository

    return numbers.World(mini, digits, fitted.adapter, Repository(repository, "clip"), server.url, tmp_path)


@pytest.fixture
def record(tmp_path):
    return Record(tmp_path / "record.json")


# Each of the other kinds traces a tower in float16 or starts a server.
QUICK = [kind for kind in numbers.KINDS if "float16" not in kind and "served" not in kind]


@pytest.mark.slow
def test_one_fault_of_each_kind_is_found_and_named(ground, record):
    figures = numbers.planted(record, ground, 1, range(len(QUICK)), QUICK)
    assert record.broken == []
    assert figures["planted"] == figures["found and named"] == len(QUICK)


@pytest.mark.slow
def test_a_fault_that_is_not_found_would_be_reported(ground, record, monkeypatch):
    monkeypatch.setattr(_release, "_fault", lambda features, shape: None)
    monkeypatch.setattr(fit, "all_finite", lambda tensors: True)
    monkeypatch.setattr("evidence.trust.numbers.STEPS", 1)
    kinds = ["a server's answer", "a gradient in training"]
    figures = numbers.planted(record, ground, 0, range(2), kinds)
    assert figures["found and named"] == 0
    assert len(record.broken) == 2
    for kind, number, line in zip(kinds, range(2), record.broken, strict=True):
        assert line.startswith(f"{kind}, seed 0, number {number}: expected ")


def test_an_error_that_names_the_wrong_place_would_be_reported():
    def meet():
        raise ValueError("layer 2 at step 3")

    assert numbers.missed(numbers.Plant(meet, ValueError, ["layer 2", "step 3"])) is None
    assert "expected ['step 4']" in numbers.missed(numbers.Plant(meet, ValueError, ["layer 2", "step 4"]))
    assert "got ValueError: layer 2" in numbers.missed(numbers.Plant(meet, KeyError, []))
    assert "nothing was said" in numbers.missed(numbers.Plant(lambda: None, ValueError, []))
