"""Classes and prompts as the model's tokenizer reads them."""

import dataclasses

import pytest
from PIL import Image

from clipweld.trainer.cli import main
from clipweld.trainer.config import train_config
from clipweld.trainer.errors import TaskInvalid
from clipweld.trainer.learning.evaluate import evaluate
from clipweld.trainer.learning.fit import fit
from clipweld.trainer.sequence.run import run_sequence
from clipweld.trainer.tasks import Images, Task, check_prompts, load_tasks, shipped_tasks
from clipweld.trainer.tasks.flowers import FLOWERS
from clipweld.trainer.tasks.mtil import CALTECH, EUROSAT
from clipweld.trainer.tasks.prompts import as_read, cut_prompts

LONG = "a very " * 30


def made(*class_names, templates=("a photo of a {}",), published=False):
    images = Images([0, 1], lambda i: Image.new("RGB", (9, 9), (200 * i, 0, 0)), str)
    return Task("made", class_names, templates, lambda split: images, "here", published=published)


@pytest.mark.parametrize(
    ("first", "second"),
    [("Bolt", "bolt"), ("hex  bolt", "hex bolt"), ("a &amp; b", "a & b"), ("HEX", "Hex"), ("fi", "\ufb01")],
)
def test_classes_with_the_same_tokens_are_refused_and_both_named(mini, first, second):
    with pytest.raises(TaskInvalid) as caught:
        check_prompts(made("nut", first, second), mini.tokenizer)
    assert f"classes {first!r} and {second!r} are the same tokens" in str(caught.value)
    assert check_prompts(made("nut", first, "other"), mini.tokenizer) == []


def test_classes_that_differ_only_after_truncation_are_refused(mini):
    with pytest.raises(TaskInvalid, match="differ only where prompts are cut"):
        check_prompts(made(LONG + "bolt", LONG + "nut"), mini.tokenizer)


def test_one_template_is_enough_to_distinguish_classes(mini):
    templates = (LONG + "{}", "{}")
    (said,) = check_prompts(made("bolt", "nut", templates=templates), mini.tokenizer)
    assert said.startswith(f"2 of 4 prompts are longer than the {mini.context_length} tokens that the model reads")


@pytest.mark.parametrize("words", [1, 10, 20, 21, 22, 23, 24, 25])
def test_a_prompt_counts_as_cut_only_if_it_loses_tokens(mini, words):
    text = " ".join(["dog"] * words)
    fits = words + 2 <= mini.context_length
    assert (cut_prompts(mini.tokenizer, [text]) == []) == fits


def test_equal_templates_are_reported(mini):
    (said,) = check_prompts(made("a", "b", templates=("A photo of {}", "the {}", "a photo of {}")), mini.tokenizer)
    assert said == "templates 'A photo of {}' and 'a photo of {}' are the same tokens to the model"


def test_published_lists_are_used_unchanged_with_a_note(mini):
    (said,) = check_prompts(made("Bolt", "bolt", published=True), mini.tokenizer)
    assert "'Bolt' and 'bolt' are the same tokens" in said


def test_shipped_tasks_and_known_lists_have_distinct_classes(mini):
    tasks = load_tasks(["mini", "mini-unseen"])
    assert [check_prompts(task, mini.tokenizer) for task in tasks] == [[]] * 9
    for names in (FLOWERS, EUROSAT, tuple(CALTECH.values())):
        assert len(set(as_read(mini.tokenizer, names))) == len(names)


def test_training_is_refused_if_classes_have_the_same_tokens(mini, tmp_path):
    task, config = made("Bolt", "bolt"), train_config("mini", iterations=1)
    with pytest.raises(TaskInvalid, match="'Bolt' and 'bolt'"):
        fit(task, mini, [], config, test_on=[], on_step=lambda step: pytest.fail("trained"))
    with pytest.raises(TaskInvalid, match="'Bolt' and 'bolt'"):
        run_sequence([shipped_tasks()[0]], mini, config, tmp_path / "run", watch=[task])
    assert not (tmp_path / "run").exists()


def test_commands_refuse_such_classes_and_write_nothing(tmp_path, capsys):
    for name in ("Bolt", "bolt"):
        for number in range(4):
            file = tmp_path / "t" / name / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (9, 9), (number, 0, 0)).save(file)
    for arguments in (
        ["fit", "--task", str(tmp_path / "t"), "--adapters", str(tmp_path / "adapters")],
        ["sequence", "--tasks", str(tmp_path / "t"), "--out", str(tmp_path / "run")],
        ["evaluate", "--tasks", str(tmp_path / "t")],
    ):
        with pytest.raises(SystemExit):
            main([*arguments, "--model", "mini"])
        assert "trainer: task 't'" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t"]


def test_names_with_the_same_tokens_are_one_class_in_the_union(mini):
    left, right = made("Bolt", "nut"), dataclasses.replace(made("bolt", "NUT"), name="right")
    found = evaluate(mini, [left, right])
    assert found["union"] == found["task"]
