"""The command line: names in its JSON, one-line errors, instant help."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from PIL import Image

from clipweld.exporter import cli
from clipweld.trainer.adapters.adapter import save_adapter


def run(*arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["exporter", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


@pytest.mark.parametrize("command", ["merge", "serve", "versions", "verify", "promote", "rollback", "prune"])
def test_help_has_a_runnable_example(command, monkeypatch, capsys):
    assert run(command, "--help", monkeypatch=monkeypatch) == 0
    assert f"Example: exporter {command}" in capsys.readouterr().out


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['exporter', '--help']\nfrom clipweld.exporter.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'onnx', 'onnxruntime', 'open_clip', 'PIL') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "[]"


def test_serving_needs_no_torch():
    code = "import sys, clipweld.exporter.serving.triton; print({'torch', 'open_clip'} & {*sys.modules})"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output == "set()\n"


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
def test_merge_orders_adapters_by_their_lineage(make_adapter, tmp_path, monkeypatch, capsys):
    first = make_adapter("zebras")
    second = make_adapter("ants", (first,), seed=1)
    for adapter in (first, second):
        save_adapter(adapter, tmp_path / "adapters" / f"{adapter.task}.safetensors")
    where = ["--repository", tmp_path / "r"]
    merge = ["merge", "--to", "onnx", "--model", "mini", "--adapters", tmp_path / "adapters", *where, "--json"]
    assert run(*merge, monkeypatch=monkeypatch) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result) == [
        "model", "version", "parity", "graph_identical_to_base", "seconds", "served", "precision", "accuracy", "cast",
        "forced",
    ]  # fmt: skip
    assert (result["version"], result["graph_identical_to_base"]) == (2, True)
    assert run("versions", *where, "--json", monkeypatch=monkeypatch) == 0
    versions = json.loads(capsys.readouterr().out)
    assert [(v["model"], v["version"], v["tasks"]) for v in versions] == [
        ("clip", 1, []),
        ("clip", 2, ["zebras", "ants"]),
    ]
    assert run("versions", *where, monkeypatch=monkeypatch) == 0
    assert "zebras, ants" in capsys.readouterr().out


def test_a_broken_lineage_is_one_line_and_status_1(make_adapter, tmp_path, monkeypatch, capsys):
    orphan = make_adapter("ants", (make_adapter("zebras"),))
    save_adapter(orphan, tmp_path / "adapters" / "ants.safetensors")
    merge = ["merge", "--to", "onnx", "--model", "mini", "--adapters", tmp_path / "adapters"]
    assert run(*merge, "--repository", tmp_path / "r", monkeypatch=monkeypatch) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    line = captured.err.strip().splitlines()[-1]
    assert line.startswith("exporter: adapter 'ants' was trained on top of")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("classes", "says"),
    [
        (("bus", "Train"), "'Train' is named like a split"),
        (("Bolt", "bolt"), "classes 'Bolt' and 'bolt' are the same tokens to the model"),
    ],
)
def test_merge_reads_validation_folders_as_the_trainer_does(make_adapter, tmp_path, monkeypatch, capsys, classes, says):
    save_adapter(make_adapter("ants"), tmp_path / "adapters" / "ants.safetensors")
    for name in classes:
        for number in range(2):
            (tmp_path / "bolts" / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (9, 9)).save(tmp_path / "bolts" / name / f"{number}.png")
    merge = ["merge", "--to", "onnx", "--model", "mini", "--adapters", tmp_path / "adapters"]
    where = ["--repository", tmp_path / "r", "--validate", f"nuts={tmp_path / 'bolts'}"]
    assert run(*merge, *where, monkeypatch=monkeypatch) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert lines[-1].startswith("exporter: task ")
    assert says in lines[-1]
    if "Bolt" in classes:
        assert lines[0].startswith(f"nuts ({tmp_path / 'bolts'}): 2 classes; test 1 image per class")
    assert not (tmp_path / "r").exists()


def test_an_empty_repository_is_one_line_and_status_1(tmp_path, monkeypatch, capsys):
    assert run("serve", "--repository", tmp_path, monkeypatch=monkeypatch) == 1
    assert capsys.readouterr().err == (
        f"exporter: repository {tmp_path}: no model in it; write one with: exporter merge --to onnx\n"
    )


def test_a_missing_command_is_refused_before_serving(released, monkeypatch, capsys):
    arguments = ["serve", "--repository", released[0].path, "--port", "0", "--", "no-such-program"]
    assert run(*arguments, monkeypatch=monkeypatch) == 1
    assert "command 'no-such-program': no such program" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["merge"],
        ["merge", "--to", "tensorrt"],
        ["merge", "--to", "open_clip"],
        ["merge", "--to", "onnx", "--out", "x"],
        ["merge", "--to", "onnx", "--name", "../clip"],
        ["serve", "--port", "99999"],
        ["nonsense"],
    ],
)
def test_wrong_usage_is_status_2(arguments, monkeypatch):
    assert run(*arguments, monkeypatch=monkeypatch) == 2


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--to", "onnx", "--min-agreement", "1"], "fp32 is what a lower --precision must agree with; leave out"),
        (["--to", "onnx", "--precision", "fp32", "--min-agreement", "1"], "leave out --min-agreement"),
        (["--to", "peft", "--out", "x", "--force", "--max-drop", "0"], "leave out --max-drop, --force"),
        (["--to", "open_clip", "--out", "x", "--precision", "int8"], "--to open_clip writes no version; leave out"),
        (["--to", "peft", "--out", "x", "--unmerged"], "--to peft writes no version; leave out --unmerged"),
        (["--to", "transformers", "--out", "x", "--repository", "y"], "leave out --repository"),
    ],
)
def test_options_that_would_have_no_effect_are_refused(arguments, reason, monkeypatch, capsys):
    assert run("merge", *arguments, monkeypatch=monkeypatch) == 2
    assert reason in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize(("to", "out", "loads"), [
    ("open_clip", "merged.safetensors", "open_clip.create_model_and_transforms('ViT-B-32', pretrained="),
    ("open_clip", "merged", "open_clip.create_model_and_transforms('local-dir:"),
    ("transformers", "merged", "transformers.pipeline('zero-shot-image-classification', model="),
    ("peft", "lora", "peft.PeftModel.from_pretrained(transformers.CLIPModel.from_pretrained("),
])  # fmt: skip
def test_merge_writes_for_other_libraries_and_prints_how_to_load_the_files(
    to, out, loads, make_adapter, tmp_path, monkeypatch, capsys
):
    save_adapter(make_adapter("zebras"), tmp_path / "adapters" / "zebras.safetensors")
    merge = ["merge", "--to", to, "--adapters", tmp_path / "adapters", "--out", tmp_path / out]  # adapters of mini
    assert run(*merge, "--json", monkeypatch=monkeypatch) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["tasks"] == ["zebras"]
    assert loads in result["load"]
    assert (tmp_path / out).exists()
    assert run(*merge, monkeypatch=monkeypatch) == 1
    assert "give another --out" in capsys.readouterr().err
