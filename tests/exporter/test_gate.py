"""The gate: why a merge is refused, and on which images accuracy is measured."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest

from clipweld.exporter import cli
from clipweld.exporter.checks.accuracy import (
    Accuracy,
    Agreement,
    in_onnx_runtime,
    in_pytorch,
    measure_accuracy,
    measure_agreement,
    recorded_accuracies,
)
from clipweld.exporter.checks.gate import Gate
from clipweld.exporter.errors import GateClosed
from clipweld.exporter.release.publish import Checks, release
from clipweld.exporter.store.repository import Repository, towers
from clipweld.trainer.adapters.adapter import save_adapter
from clipweld.trainer.learning.evaluate import evaluate
from clipweld.trainer.tasks import load_task


def quiet(step):
    pass


def judged(gate, *accuracies, earlier=("digits",), agreements=None):
    """Return the gate's reason for refusing, or an empty string."""
    try:
        assert gate.check(accuracies, earlier, agreements) == []
    except GateClosed as exc:
        return str(exc)
    return ""


@pytest.mark.parametrize(("after", "allowed"), [(88.0, 0.0), (87.1, 0.9), (90.0, 0.0)])
def test_an_allowed_drop_passes(after, allowed):
    assert judged(Gate(max_drop=allowed), Accuracy("digits", 88.0, after, "training")) == ""


def test_a_larger_drop_is_refused_and_named():
    said = judged(Gate(max_drop=1), Accuracy("digits", 88.0, 86.9, "training"))
    assert "digits falls by 1.1 points (1 allowed)" in said
    assert "--force" in said


@pytest.mark.parametrize("gate", [Gate(min_accuracy=10), Gate(max_drop=100)])
def test_a_nan_figure_never_passes(gate):
    assert "nan" in judged(gate, Accuracy("digits", 50.0, float("nan"), "training"))
    assert "nan" in judged(Gate(), agreements=[Agreement("digits", float("nan"), 8)])


def test_a_new_task_may_be_worse_than_before_but_must_reach_the_minimum():
    new = Accuracy("flags", 50.0, 40.0, "training")
    assert judged(Gate(max_drop=0), new) == ""
    assert "flags is at 40.0% (60% wanted)" in judged(Gate(min_accuracy=60), new)
    assert judged(Gate(min_accuracy=40), new) == ""


@pytest.mark.parametrize(("before", "after"), [(None, 80.0), (80.0, None), (None, None)])
def test_an_unmeasured_task_does_not_pass(before, after):
    accuracy = Accuracy("digits", before, after, "training")
    assert "give its images with --validate" in judged(Gate(max_drop=5), accuracy)
    assert judged(Gate(), accuracy) == ""


def test_agreement_is_averaged_over_all_images():
    few, many = Agreement("a", 0.9, 10), Agreement("b", 1.0, 190)
    assert judged(Gate(min_agreement=0.995), agreements=[few, many]) == ""
    assert "on 99.5% of 200 images (99.6% wanted)" in judged(Gate(min_agreement=0.996), agreements=[few, many])
    assert "on 0.0% of 0 images" in judged(Gate(), agreements=[])


def test_a_forced_check_returns_the_reasons_that_it_overrides():
    faults = Gate(max_drop=0, min_accuracy=99, force=True).check(
        [Accuracy("digits", 88.0, 80.0, "training")], ["digits"]
    )
    assert [fault.partition(" (")[0] for fault in faults] == ["digits is at 80.0%", "digits falls by 8.0 points"]


def test_recorded_accuracies_compare_the_last_adapter_with_the_served_version(make_adapter):
    first = replace(make_adapter("digits"), accuracy={"before": {"digits": 50.0}, "after": {"digits": 88.0}})
    second = replace(
        make_adapter("flags", (first,)),
        accuracy={"before": {"digits": 88.0, "flags": 9.0}, "after": {"digits": 87.5, "flags": 70.0}},
    )
    assert recorded_accuracies([first, second], []) == [
        Accuracy("digits", 50.0, 87.5, "training"),
        Accuracy("flags", 9.0, 70.0, "training"),
    ]
    served = [{"task": "digits", "before": 50.0, "after": 88.0, "measured": "training"}]
    assert recorded_accuracies([first, second], served)[0] == Accuracy("digits", 88.0, 87.5, "training")
    gone = Accuracy("digits", 88.0, None, "training")
    assert recorded_accuracies([], served) == [gone]
    assert "digits has not been measured" in judged(Gate(max_drop=1), gone)


def test_accuracy_in_onnx_runtime_equals_the_trainer_s(mini, released):
    emoji = load_task("emoji")
    base = in_onnx_runtime(mini, *towers(released[0].store / "1"))
    (measured,) = measure_accuracy(mini, base, base, [emoji], quiet)
    assert measured.measured == "merge"
    assert measured.before == measured.after == evaluate(mini, [emoji])["task"]["emoji"]


@pytest.mark.slow
def test_agreement_with_pytorch_is_full_only_for_the_same_answers(mini, released):
    tasks = [load_task("emoji"), load_task("clipart")]
    same = measure_agreement(mini, in_onnx_runtime(mini, *towers(released[0].store / "1")), tasks, quiet)
    assert [(a.task, a.top1, a.images) for a in same] == [("emoji", 1.0, 132), ("clipart", 1.0, 200)]
    other = in_pytorch(mini)
    turned = replace(other, images=lambda pixels: other.images(255 - pixels))
    assert all(a.top1 < 0.9 for a in measure_agreement(mini, turned, tasks, quiet))


@pytest.mark.usefixtures("traced")
def test_a_merge_that_harms_a_validation_set_is_refused_unless_forced(mini, make_adapter, samples, repository):
    harm = make_adapter("cars", seed=9)
    harmful = replace(harm, tensors={name: 4 * tensor for name, tensor in harm.tensors.items()})
    checks = Checks(Gate(max_drop=1), validation=[load_task("emoji")])
    served = repository.manifest(2)
    served["accuracy"] = []
    repository.manifest_file(2).write_text(json.dumps(served))
    with pytest.raises(GateClosed, match=r"emoji falls by \d+") as refused:
        release(mini, [harmful], repository, *samples, checks=checks)
    assert repository.versions() == [1, 2]
    measured = refused.value.accuracies[-1]
    assert measured.after < measured.before
    made = release(mini, [harmful], repository, *samples, checks=replace(checks, gate=replace(checks.gate, force=True)))
    assert [fault.split()[0] for fault in made.forced] == ["emoji"]
    manifest = repository.manifest(made.version)
    assert manifest["forced"] == made.forced
    assert [entry["task"] for entry in manifest["accuracy"]] == ["cars", "emoji"]


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
def test_the_command_shows_what_was_measured_and_why_it_was_refused(make_adapter, tmp_path, monkeypatch, capsys):
    def merge(*more):
        where = ["--adapters", str(tmp_path / "adapters"), "--repository", str(tmp_path / "model_repository")]
        monkeypatch.setattr(sys, "argv", ["exporter", "merge", "--to", "onnx", "--model", "mini", *where, *more])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    first = replace(make_adapter("digits"), accuracy={"before": {"digits": 50.0}, "after": {"digits": 88.0}})
    save_adapter(first, tmp_path / "adapters/digits.safetensors")
    status, out, _ = merge("--max-drop", "1", "--min-accuracy", "80")
    assert status == 0
    assert "+38.0" in out
    after = {"digits": 84.0, "pets": 70.0}
    second = replace(make_adapter("pets", (first,), seed=1), accuracy={"before": {"pets": 10.0}, "after": after})
    save_adapter(second, tmp_path / "adapters/pets.safetensors")
    status, _, said = merge("--max-drop", "1")
    assert status == 1
    assert "-4.0" in said
    assert said.splitlines()[-1].startswith("exporter: refused, nothing was written: digits falls by 4.0 points")
    assert Repository(tmp_path / "model_repository", "clip").versions() == [1, 2]
    status, out, _ = merge("--max-drop", "1", "--force", "--json")
    assert status == 0
    assert json.loads(out)["forced"] == ["digits falls by 4.0 points (1 allowed)"]
    assert json.loads(out)["accuracy"][0] == {"task": "digits", "before": 88.0, "after": 84.0, "measured": "training"}
