"""A short soak test finds no faults, and finds those that are planted."""

from __future__ import annotations

import numpy as np
import pytest

from evidence.trust import soak
from evidence.trust.answers import Known
from evidence.trust.record import Record


@pytest.fixture
def record(tmp_path):
    return Record(tmp_path / "record.json")


@pytest.mark.slow
def test_a_short_soak_finds_no_faults(versions, tmp_path, record):
    soak.soak(versions, tmp_path, 8, 0, record)
    assert record.broken == []
    assert record.figures["calls"] == record.figures["right"] > 20
    assert record.figures["switches"].total() >= 2


@pytest.mark.slow
def test_wrong_answers_and_leftover_files_are_reported(versions, tmp_path, record, monkeypatch):
    right, stay = soak.known, soak._watch

    def wrong(*args):
        return Known(right(*args).scores + np.float32(0.01))

    def litter(*args):
        (tmp_path / "tmp" / "left").touch()
        return stay(*args)

    monkeypatch.setattr(soak, "known", wrong)
    monkeypatch.setattr(soak, "_watch", litter)
    soak.soak(versions, tmp_path, 3, 0, record)
    assert record.figures["right"] == 0
    assert f"left behind: ['{tmp_path / 'tmp' / 'left'}']" in record.broken
    assert any("call 0: picture" in line for line in record.broken)


def samples(mb_an_hour, threads_an_hour=0.0):
    """Return noisy samples of twenty minutes, starting at 200 MB."""
    noise = np.random.default_rng(0).normal(size=(240, 4))
    steady = {"mb": 150, "threads": 9, "files": 30}
    return [
        {
            "seconds": 5 * step,
            "serves": "3 of [2, 3]" if step % 2 else "2 of [2, 3]",
            "server": {
                "mb": 200 + mb_an_hour * step / 720 + draw[0],
                "threads": 40 + int(threads_an_hour * step / 720),
                "files": 80 + draw[1],
            },
            "client 0": steady,
            "client 1": steady,
        }
        for step, draw in enumerate(noise)
    ]


@pytest.mark.parametrize("growth", [{"mb_an_hour": 30}, {"mb_an_hour": 0, "threads_an_hour": 60}])
def test_growth_is_reported(growth, record):
    soak._growth(samples(**growth), record)
    (line,) = record.broken
    assert line.startswith(f"server: {'threads' if 'threads_an_hour' in growth else 'mb'} grow by ")


def test_noise_is_not_reported_as_growth(record):
    found = soak._growth(samples(0), record)
    assert record.broken == []
    assert found["server mb"]["low"] < 0 < found["server mb"]["high"]
