import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from clipweld.client import ZeroShotClassifier
from clipweld.client.cli import app, main

COMMANDS = ("classify", "bench", "tasks", "versions", "demo")


@pytest.fixture
def image(tmp_path, picture) -> str:
    path = tmp_path / "noise [1].png"
    Image.fromarray(picture).save(path)
    return str(path)


@pytest.fixture
def run(fake, monkeypatch, capsys):
    """A function that runs the command line on the fake server and returns (exit code, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setenv("CLIPWELD_URL", fake.url)
        monkeypatch.setattr(sys, "argv", ["client", *arguments])
        with pytest.raises(SystemExit) as exit_:
            main()
        out, err = capsys.readouterr()
        return exit_.value.code or 0, out, err

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_that_parses(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    example = out.partition("╭")[0].rpartition("Example: ")[2]
    parsed, bound, _ = app.parse_args(shlex.split(example)[1:], exit_on_error=False, print_error=False)
    assert parsed.__name__ == command
    assert bound.arguments


def test_help_runs_as_a_program():
    done = subprocess.run(
        [Path(sys.executable).with_name("client"), "--help"], capture_output=True, text=True, check=True
    )
    assert all(command in done.stdout for command in COMMANDS)
    assert done.stderr == ""


def test_classify_json_equals_the_library(fake, run, image):
    code, out, _ = run("classify", image, image, "--labels", "cat, dog,", "--top-k", "1", "--json")
    with ZeroShotClassifier(fake.url) as clip:
        expected = list(clip.classify([image, image], labels=["cat", "dog"], top_k=1))
    assert code == 0
    assert json.loads(out) == [answer.to_dict() for answer in expected]


def test_classify_prints_a_table(run, image):
    code, out, err = run("classify", image, "--task", "digits", "--template", "{}", "--template", "a {}")
    assert code == 0
    assert out.splitlines()[0].split() == ["Image", "Label", "Probability", "Cosine"]
    assert "[1].png" in "".join(out.split())
    assert out.splitlines()[-1] == "model clip version 2"
    assert err.count("\n") <= 1


def test_tasks_as_json_and_table(run):
    _, out, _ = run("tasks", "--json")
    listed = json.loads(out)
    assert listed["version"] == 2
    assert listed["tasks"][0]["class_names"] == ["zero", "one", "two"]
    assert listed["tasks"][0]["accuracy"] == {"before": 45.2, "after": None}
    assert "digits" in run("tasks")[1]
    assert "no tasks: the base model" in run("tasks", "--version", "1")[1]


def test_versions_as_json_and_table(run):
    _, out, _ = run("versions", "--json")
    assert json.loads(out) == [{"version": 1, "tasks": []}, {"version": 2, "tasks": ["digits"]}]
    assert "none: the base model" in run("versions")[1]


def test_bench_as_json_and_table(run):
    code, out, _ = run("bench", "--versions", "1,2", "--requests", "3", "--batch", "2", "--json")
    assert code == 0
    assert list(json.loads(out))[:5] == ["base", "merged", "ratio_p50", "ratio_throughput", "requests"]
    assert "Overhead of 1 learned task, merged" in run("bench", "--versions", "1,2", "--requests", "3")[1]


@pytest.mark.parametrize(
    "arguments",
    [
        ("classify", "a.png"),
        ("classify", "a.png", "--labels", "a", "--task", "b"),
        ("classify", "a.png", "--labels", " , "),
        ("classify", "a.png", "--labels", "a", "--top-k", "0"),
        ("classify", "a.png", "--labels", "a", "--template", "a photo"),
        ("classify", "--labels", "a"),
        ("bench", "--versions", "1"),
        ("bench", "--versions", "1,x"),
        ("bench",),
        ("tasks", "--version", "new"),
        ("nonsense",),
    ],
)
def test_usage_error_exits_2(run, arguments):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"client: .+\. See client( [a-z]+)? --help\n", err), err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("classify", "missing.png", "--labels", "a"), "missing.png cannot be read: No such file or directory"),
        (
            ("classify", "tests/contract", "--labels", "a"),
            "folder tests/contract has no images; expected files such as .jpg",
        ),
        (("tasks", "--version", "9"), "version 9 of model 'clip' is not served at "),
        (("versions", "--model", "clop"), "no model 'clop' at "),
        (("versions", "--url", "nonsense"), "url 'nonsense' cannot be used; expected host:port"),
    ],
)
def test_expected_failure_is_one_line_and_exits_1(run, arguments, message):
    code, out, err = run(*arguments)
    assert (code, out) == (1, "")
    assert err.startswith(f"client: {message}")
    assert err.count("\n") == 1


def test_bug_keeps_its_traceback(run, monkeypatch):
    monkeypatch.setattr(ZeroShotClassifier, "versions", lambda self: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["client", "versions"])
    with pytest.raises(ZeroDivisionError):
        main()


def test_the_last_value_of_a_repeated_flag_wins(run):
    images = ["samples/seven.png", "--labels", "seven", "--labels", "shoe"]
    code, out, err = run("classify", *images, "--top-k", "2", "--top-k", "1", "--json")
    assert (code, err) == (0, "")
    assert [len(answer["predictions"]) for answer in json.loads(out)] == [1]
