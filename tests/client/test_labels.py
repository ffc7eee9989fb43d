"""Labels in every form that users have: any container, files, with articles, with their own prompts."""

import json
import sys
from enum import Enum

import numpy as np
import pytest

from clipweld.client import ZeroShotClassifier
from clipweld.client._label_lists import read_labels
from clipweld.client._labels import Wording, checked_labels, prompt_of
from clipweld.client.cli import main
from clipweld.client.errors import InvalidRequest


@pytest.fixture
def run(fake, monkeypatch, capsys, tmp_path, picture):
    """A function that classifies a picture on the command line: (exit code, labels of the answer, stderr)."""
    from PIL import Image

    Image.fromarray(picture).save(tmp_path / "it.png")
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setenv("CLIPWELD_URL", fake.url)
        command = ["client", "classify", "it.png", *arguments, "--json", "--top-k", "20"]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as exit_:
            main()
        out, err = capsys.readouterr()
        labels = {found["label"] for found in json.loads(out)[0]["predictions"]} if out else set()
        return exit_.value.code or 0, labels, err

    return run


@pytest.mark.parametrize(
    ("template", "label", "prompt"),
    [
        ("a photo of a {}", "shoe", "a photo of a shoe"),
        ("a photo of a {}", "a shoe", "a photo of a shoe"),
        ("a photo of a {}", "the number seven", "a photo of the number seven"),
        ("a photo of a {}", "An apple", "a photo of An apple"),
        ("a photo of a {}", "apple", "a photo of a apple"),
        ("a photo of the {}.", "a  shoe", "a photo of a  shoe."),
        ("The {} of an  {}", "the sea", "the sea of the sea"),
        ("a big {}", "the sea", "a big the sea"),
        ("plan-a {}", "the sea", "plan-a the sea"),
        ("vanilla {}", "the sea", "vanilla the sea"),
        ("the letter {}", "a", "the letter a"),
        ("a {}", "a", "a a"),
        ("a photo of a {}", "a380", "a photo of a a380"),
        ("a photo of a {}", "an-ki", "a photo of a an-ki"),
        ("a photo of a {}", "{} of a {}", "a photo of a {} of a {}"),
    ],
)
def test_a_label_gets_one_article(template, label, prompt):
    assert prompt_of(template, label) == prompt


def test_a_label_with_an_article_is_encoded_without_a_second_one(fake):
    """The scores equal those of the expected sentences."""
    pixels = np.full((9, 9, 3), 7, np.uint8)
    with ZeroShotClassifier(fake.url) as clip:
        (answer,) = clip.classify(pixels, ["the number seven", "a shoe"])
        text = clip.text_features(["a photo of the number seven", "a photo of a shoe"])
        scores = text @ clip.image_features(pixels)[0]
    found = {prediction.label: prediction.score for prediction in answer}
    np.testing.assert_allclose([found["the number seven"], found["a shoe"]], scores, atol=1e-6)


class Colour(str, Enum):  # noqa: UP042 - unlike a StrEnum, its text is not its value
    RED = "red"
    BLUE = "blue"


@pytest.mark.parametrize(
    "labels",
    [
        ("red", "blue"), (label for label in ("red", "blue")), np.array(["red", "blue"]), {"blue", "red"},
        np.array(["red", "blue"], object), list(Colour), {"red": 1, "blue": 2}.keys(),
    ],
)  # fmt: skip
def test_labels_may_come_in_any_container(labels):
    wording = checked_labels(labels, None)
    assert sorted(wording.labels) == ["blue", "red"]
    assert {type(label) for label in wording.labels} == {str}
    assert wording.templates == ("a photo of a {}",)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (b"cat", "labels is of type bytes; expected a list of strings"),
        (7, "labels is of type int; expected"),
        (np.array([["a", "b"]]), "labels is of type ndarray; expected"),
        (np.array("a"), "labels is of type ndarray; expected"),
        ([b"cat"], "label b'cat' is not text but bytes"),
        ([["cat", "dog"]], r"label \['cat', 'dog'\] is not text but list"),
        ({"cat": []}, "label 'cat' has no prompt, or an empty one"),
        ({"cat": ["a cat", " "]}, "label 'cat' has no prompt, or an empty one"),
        ({"cat": 3}, "prompts of label 'cat' is of type int"),
        ({"cat": [3]}, "prompt of label 'cat' 3 is not text but int"),
    ],
)
def test_anything_but_a_list_of_labels_is_refused_by_name(labels, message):
    with pytest.raises(InvalidRequest, match=message):
        checked_labels(labels, None)


def test_a_pandas_column_is_accepted_as_labels_and_a_table_is_refused():
    pandas = pytest.importorskip("pandas")
    for column in (pandas.Series(["red", "blue"], index=[7, 3]), pandas.Index(["red", "blue"])):
        assert checked_labels(column, None).labels == ("red", "blue")
    with pytest.raises(InvalidRequest, match="label nan is not text but float"):
        checked_labels(pandas.Series(["a", None]), None)
    with pytest.raises(InvalidRequest, match="labels is of type DataFrame; expected"):
        checked_labels(pandas.DataFrame({"label": ["a", "b"]}), None)


def test_a_mapping_gives_each_label_its_own_prompts(fake):
    """Each label is scored by the mean of its own prompts' features."""
    pixels = np.full((9, 9, 3), 7, np.uint8)
    prompts = {"cat": "my cat", "dog": ("a puppy", "some {}", "a hound"), "a fish": "a {}"}
    with ZeroShotClassifier(fake.url) as clip:
        (answer,) = clip.classify(pixels, prompts)
        image = clip.image_features(pixels)[0]
        dog = clip.text_features(["a puppy", "some dog", "a hound"]).mean(axis=0)
        expected = {
            "cat": clip.text_features("my cat")[0] @ image,
            "dog": dog / np.linalg.norm(dog) @ image,
            "a fish": clip.text_features("a fish")[0] @ image,
        }
        with pytest.raises(InvalidRequest, match="bring their own prompts, and templates are given too"):
            clip.classify(pixels, prompts, templates=["{}"])
    assert {found.label: found.score for found in answer} == pytest.approx(expected, abs=1e-6)


LONG = "a very long description of an animal that nobody would ever read to its end in one go " * 2


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["cat", "Cat"], "labels 'cat' and 'Cat' become the same tokens in every prompt"),
        (["cat", "dog", " cat  "], "labels 'cat' and ' cat  ' become the same tokens in every prompt"),
        (["salt &amp; pepper", "salt & pepper"], "become the same tokens in every prompt"),
        ([f"{LONG} cat", f"{LONG} dog"], "become the same tokens, cut at 24 tokens, in every prompt"),
        ({"cat": ["a", "b"], "feline": ["B", "a"]}, "labels 'cat' and 'feline' become the same tokens in every prompt"),
    ],
)
def test_labels_that_the_model_cannot_tell_apart_are_refused(fake, labels, message):
    with ZeroShotClassifier(fake.url) as clip, pytest.raises(InvalidRequest, match=message):
        list(clip.classify("no such image.png", labels))


def test_class_names_of_a_learned_task_may_have_equal_tokens(fake):
    fake.cards[2]["tasks"][0]["class_names"] = ["a", "A", "b"]
    with ZeroShotClassifier(fake.url) as clip:
        (answer,) = clip.classify(np.full((9, 9, 3), 7, np.uint8), task="digits")
    assert {found.label for found in answer} == {"a", "A", "b"}


def test_labels_that_differ_in_a_single_prompt_are_distinguished():
    tokens = [np.array([[1, 2], [1, 3]]), np.array([[1, 2], [1, 4]])]
    Wording(("a", "b")).check_told_apart(tokens, 24)


def test_labels_may_come_from_repeated_flags_and_from_files(run, tmp_path):
    (tmp_path / "more.txt").write_bytes(b"\xef\xbb\xbfbird\r\n\r\n  salt, pepper \r\nbird\r\n\xc3\xa9toile")
    code, labels, err = run("--labels", "cat, dog", "--labels", "@more.txt", "--labels", '"rock, paper",cat')
    assert (code, labels) == (0, {"cat", "dog", "bird", "salt, pepper", "étoile", "rock, paper"})
    assert err.splitlines()[0] == "client: 2 labels are given more than once, and count once: bird, cat"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "cat\r\ndog\r\n".encode("utf-16"), ["cat", "dog"]),
        ("a.txt", b"cat\rdog", ["cat", "dog"]),
        ("a.txt", b'"cat"\n@dog\n', ['"cat"', "@dog"]),
        ("a.json", b'\xef\xbb\xbf["cat", "salt, pepper"]', ["cat", "salt, pepper"]),
        ("a.json", b'{"cat": "my cat", "dog": ["a {}", "b"]}', {"cat": "my cat", "dog": ["a {}", "b"]}),
    ],
)
def test_label_files_of_every_kind_are_read(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    assert read_labels([f"@{tmp_path / name}"]) == (expected, [])


def test_labels_with_and_without_prompts_can_be_combined(tmp_path):
    (tmp_path / "a.json").write_text('{"cat": "my cat"}')
    labels, _ = read_labels(["dog", f"@{tmp_path / 'a.json'}"])
    assert labels == {"dog": ["a photo of a {}"], "cat": "my cat"}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("cat,dog", ["cat", "dog"]), ("cat\ndog\n", ["cat", "dog"]), (' "a ""b""", c', ['a "b"', "c"]),
        ('5" pipe, 6" pipe', ['5" pipe', '6" pipe']), ('"@home", work', ["@home", "work"]), (" , ", []),
    ],
)  # fmt: skip
def test_commas_lines_and_quotes_separate_labels(value, expected):
    assert read_labels([value])[0] == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file or directory; a label that itself begins with @ is given in quotes"),
        (b"", "has no label; expected one a line"),
        (b"cat\nd\xf6g\n", "line 2 is no UTF-8; save it as UTF-8"),
    ],
)
def test_label_files_that_cannot_be_read_are_refused_with_the_reason(run, tmp_path, content, message):
    if content is not None:
        (tmp_path / "it.txt").write_bytes(content)
    code, _, err = run("--labels", "@it.txt")
    assert code == 1
    assert err.startswith("client: labels file it.txt")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON that can be read"),
        ("3", "expected a list"),
        ('["a", 3]', "expected a list"),
        ('{"a": "b", "a": "c"}', "a label is listed twice"),
        ("[" * 10**5, "is no JSON that can be read"),
    ],
)
def test_json_files_that_hold_no_labels_are_refused(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(InvalidRequest, match=message):
        read_labels([f"@{tmp_path / 'a.json'}"])


def test_a_label_with_two_sets_of_prompts_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"cat": "my cat"}')
    with pytest.raises(InvalidRequest, match="label 'cat' is given twice, with other prompts"):
        read_labels(["cat", f"@{tmp_path / 'a.json'}"])


def test_templates_are_refused_where_a_file_gives_the_prompts(run, tmp_path):
    (tmp_path / "a.json").write_text('{"cat": "my cat", "dog": "my dog"}')
    assert run("--labels", "@a.json")[:2] == (0, {"cat", "dog"})
    code, _, err = run("--labels", "@a.json", "--template", "{}")
    assert code == 2
    assert "the labels bring their own prompts" in " ".join(err.split())
