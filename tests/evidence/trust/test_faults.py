"""Clients keep their promises while a server breaks, and the study notices when they don't."""

from __future__ import annotations

import time

import pytest

from clipweld.client import AsyncZeroShotClassifier, ZeroShotClassifier
from clipweld.exporter.serving.triton import serve
from clipweld.trainer.base.backbone import load_backbone
from evidence.trust import faults, load
from evidence.trust.load import Load, Manner, Truth
from evidence.trust.record import Record
from evidence.trust.served import known, pictures

PATIENT = Manner(timeout_s=30, deadline_s=None)


@pytest.fixture(scope="module")
def images():
    return pictures()


@pytest.fixture(scope="module")
def answers(versions, images):
    """The expected answers of each version."""
    backbone = load_backbone("mini")
    return {version: known(versions, version, images, backbone) for version in versions.versions()}


@pytest.fixture(scope="module")
def urls(versions):
    with serve(versions.path) as server:
        yield {"grpc": server.url, "http": server.http_url}


@pytest.fixture
def record(tmp_path):
    return Record(tmp_path / "record.json")


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["restored with other files", "closed", "silent", "tampered"])
def test_no_fault_gives_a_wrong_answer(fault, versions, others, record, tmp_path, monkeypatch):
    monkeypatch.setattr(faults, "FAULTS", {fault: faults.FAULTS[fault]})
    faults.put_to_the_test(versions, others, tmp_path, 50, 0, record)
    assert record.broken == []
    assert record.figures["right"] > 20
    assert record.figures["faults"][fault]["times"] >= faults.ROUNDS


def ask(urls, images, truth, manner=PATIENT):
    """Run load until at least twelve calls have ended."""
    with Load(urls, images, truth, "test", workers=1, manner=manner) as asked:
        end = time.monotonic() + 60
        while asked.ends.total() < 12 and time.monotonic() < end:
            time.sleep(0.05)
    return asked


def test_correct_answers_are_counted_as_right(urls, images, answers):
    asked = ask(urls, images, Truth(answers))
    assert asked.faults == []
    assert asked.ends.keys() == {"right"}
    assert asked.images >= asked.ends.total() >= 12


def test_an_answer_of_another_version_is_counted_as_wrong(urls, images, answers):
    asked = ask(urls, images, Truth({3: answers[2]}))
    assert asked.ends.keys() == {"wrong"}
    assert len(asked.faults) == asked.ends.total()
    assert "test, " in asked.faults[0]


@pytest.mark.slow
def test_answers_of_earlier_versions_are_wrong_after_the_server_changed(urls, images, answers):
    truth = Truth({3: answers[2]})
    truth.change(answers)
    assert ask(urls, images, truth).faults == []
    truth.change({3: answers[2]})
    assert "wrong" in ask(urls, images, truth).ends


def test_an_error_that_is_not_the_client_s_own_is_reported(urls, images, answers, monkeypatch):
    def classify(*args, **settings):
        raise ValueError("not ours")

    for face in (ZeroShotClassifier, AsyncZeroShotClassifier):
        monkeypatch.setattr(face, "classify", classify)
    asked = ask(urls, images, Truth(answers))
    assert asked.ends.keys() == {"foreign"}
    assert "ValueError is no ClientError: not ours" in asked.faults[0]


def test_an_overdue_call_is_reported(urls, images, answers, monkeypatch):
    monkeypatch.setattr(load, "MARGIN_S", 0)
    asked = ask(urls, images, Truth(answers), manner=Manner(deadline_s=1e-9))
    assert "overdue" in asked.ends


@pytest.mark.slow
def test_a_server_that_does_not_recover_is_reported(versions, others, record, tmp_path, monkeypatch):
    def killed_for_good(bench):
        with faults._server(versions.path) as triton:
            monkeypatch.setattr(triton, "revive", lambda: "")
            yield faults.Fault(triton, faults._urls(triton.ports), triton.kill, lambda: None, 0.1)

    monkeypatch.setattr(faults, "FAULTS", {"killed": faults.contextmanager(killed_for_good)})
    monkeypatch.setattr(faults, "RECOVERY_S", 4)
    faults.put_to_the_test(versions, others, tmp_path, 10, 0, record)
    assert "killed, time 1: not every client answers 4 s later" in record.broken


@pytest.mark.slow
def test_a_server_that_ends_by_itself_is_counted_and_restarted(versions, others, record, tmp_path, monkeypatch):
    def ended(bench):
        with faults._server(versions.path) as triton:

            def end():
                triton.server.process.kill()
                triton.server.process.wait()

            yield faults.Fault(triton, faults._urls(triton.ports), end, lambda: None, 0.1)

    monkeypatch.setattr(faults, "FAULTS", {"ended": faults.contextmanager(ended)})
    monkeypatch.setattr(faults, "RECOVERY_S", 4)
    faults.put_to_the_test(versions, others, tmp_path, 10, 0, record)
    assert record.broken == []
    assert record.figures["server_ended_by_itself"] == faults.ROUNDS
    assert record.figures["faults"]["ended"]["server_ended_by_itself"][0].startswith("status -9")
