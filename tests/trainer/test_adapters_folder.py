"""Folders of adapters in practice: renamed or copied files, other files, and two processes at once."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from clipweld.trainer.adapters.adapter import load_adapter, load_lineage, save_adapter
from clipweld.trainer.adapters.folder import adapter_files, held
from clipweld.trainer.cli import main
from clipweld.trainer.errors import AdapterCorrupt, AdapterError, BrokenChain, FolderBusy, OutputError
from clipweld.trainer.learning import learn
from clipweld.trainer.learning.fit import one_device
from clipweld.trainer.learning.learn import learn_into

QUICK = ["--model", "mini", "--iterations", "2", "--shots", "2", "--batch-size", "4"]


@pytest.fixture
def adapter(fitted):
    return fitted.adapter


@pytest.fixture
def folder(adapter, tmp_path):
    """A folder that contains the adapter of digits."""
    save_adapter(adapter, tmp_path / "adapters" / "digits.safetensors")
    return tmp_path / "adapters"


def fails(capsys, *arguments):
    """Run a command that must fail; return its error message, which must be one line."""
    with pytest.raises(SystemExit) as caught:
        main([*map(str, arguments)])
    assert caught.value.code == 1
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if line.startswith("trainer: ")]
    assert captured.out == ""
    return line


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def child_of(adapter, task, parents):
    return dataclasses.replace(adapter, task=task, parents=tuple(p.sha256 for p in parents))


def test_fit_never_overwrites_the_adapter_of_another_task(capsys, folder):
    (folder / "digits.safetensors").rename(folder / "emoji.safetensors")
    before = contents(folder)
    line = fails(capsys, "fit", "--task", "emoji", "--adapters", folder, *QUICK)
    assert "emoji.safetensors: is that of task 'digits'" in line
    assert "rename the file (to digits.safetensors)" in line
    assert contents(folder) == before


def test_a_renamed_adapter_keeps_its_task(capsys, folder):
    (folder / "digits.safetensors").rename(folder / "b.safetensors")
    assert "'digits' was learned already" in fails(capsys, "fit", "--task", "digits", "--adapters", folder, *QUICK)


@pytest.mark.parametrize("command", ["evaluate", "merge"])
def test_a_missing_folder_that_was_named_is_an_error(capsys, tmp_path, command):
    if command == "evaluate":
        line = fails(capsys, "evaluate", "--model", "mini", "--tasks", "emoji", "--adapters", tmp_path / "adaptors")
    else:
        from clipweld.exporter.cli import app
        from clipweld.trainer.command_line import run

        merge = ["merge", "--to", "onnx", "--model", "mini", "--repository", tmp_path / "models"]
        with pytest.raises(AdapterError) as caught:
            run(app, [*map(str, merge), "--adapters", str(tmp_path / "adaptors")])
        line = str(caught.value)
        assert not (tmp_path / "models").exists()
    assert f"adapters folder {tmp_path}/adaptors: no such folder" in line


def test_the_default_folder_may_be_missing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["evaluate", "--model", "mini", "--tasks", "emoji", "--json"])
    assert json.loads(capsys.readouterr().out)["learned"] == []


def test_a_file_in_place_of_the_folder_is_refused(capsys, folder):
    file = folder / "digits.safetensors"
    line = fails(capsys, "evaluate", "--model", "mini", "--tasks", "emoji", "--adapters", file)
    assert f"adapters folder {file}: not a folder" in line


def test_hidden_files_and_other_suffixes_are_ignored_and_case_does_not_matter(adapter, folder):
    (folder / "digits.safetensors").rename(folder / "DIGITS.SAFETENSORS")
    for name in ("._digits.safetensors", ".emoji.unfinished", "README.md", ".DS_Store"):
        (folder / name).write_bytes(b"\x00\x05\x16\x07")
    (folder / "old").mkdir()
    assert [found.task for found in load_lineage(folder, adapter.base_fingerprint)] == ["digits"]


def test_safetensors_files_of_other_libraries_are_reported_as_such(adapter, folder):
    save_file({"weight": torch.zeros(2)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(AdapterCorrupt, match=r"model\.safetensors: a safetensors file, but not one of clipweld's"):
        load_lineage(folder, adapter.base_fingerprint)


def test_entries_named_like_adapters_that_are_not_files_are_refused(folder):
    odd = folder / "odd.safetensors"
    odd.mkdir()
    with pytest.raises(AdapterError, match=r"odd\.safetensors: is a folder, expected a file"):
        adapter_files(folder)
    odd.rmdir()
    odd.symlink_to(folder / "gone")
    with pytest.raises(AdapterError, match=r"odd\.safetensors: is a link to .*gone, which is no file here"):
        adapter_files(folder)
    odd.unlink()
    os.mkfifo(odd)
    with pytest.raises(AdapterError, match=r"odd\.safetensors: is not a regular file"):
        adapter_files(folder)


def test_two_copies_of_an_adapter_are_reported_as_copies(adapter, folder):
    save_adapter(adapter, folder / "copy.safetensors")
    with pytest.raises(AdapterError, match=r"copy\.safetensors and .*digits\.safetensors are copies of one, task 'dig"):
        load_lineage(folder, adapter.base_fingerprint)


def test_two_branches_are_reported_with_their_files(adapter, folder):
    for task in ("b", "c"):
        save_adapter(child_of(adapter, task, [adapter]), folder / f"of-{task}.safetensors")
    with pytest.raises(BrokenChain, match=r"of-b\.safetensors \(b@.*of-c\.safetensors \(c@.*are two branches"):
        load_lineage(folder, adapter.base_fingerprint)


def test_a_task_learned_twice_is_reported_as_two_branches(adapter, folder):
    again = dataclasses.replace(adapter, seed=7)
    save_adapter(again, folder / "digits (1).safetensors")
    with pytest.raises(BrokenChain, match="are two branches, each learned on top of the base alone"):
        load_lineage(folder, adapter.base_fingerprint)


def test_only_one_fit_at_a_time_may_use_a_folder(tmp_path, capsys):
    folder = tmp_path / "adapters"
    with held(folder):
        line = fails(capsys, "fit", "--task", "emoji", "--adapters", folder, *QUICK)
    assert f"{folder}: another trainer is learning into it" in line
    assert not folder.exists(), "what was made for nothing is removed"
    with held(folder), pytest.raises(FolderBusy), held(folder):
        pass


def test_a_dry_run_may_read_the_folder_during_another_fit(tmp_path, capsys, folder):
    with held(folder):
        main(["fit", "--task", "emoji", "--adapters", str(folder), *QUICK, "--dry-run", "--json"])
    assert json.loads(capsys.readouterr().out)["trainable_parameters"]


def test_the_lock_is_released_when_its_process_ends(tmp_path):
    code = f"import os; from clipweld.trainer.adapters.folder import *\nwith held(Path({str(tmp_path)!r})): os._exit(0)"
    subprocess.run([sys.executable, "-c", code], check=True)
    with held(tmp_path):
        pass


def test_a_file_system_without_locks_is_accepted(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with held(tmp_path / "adapters"):
        assert (tmp_path / "adapters").is_dir()


def test_a_folder_that_cannot_be_created_is_refused_first(capsys, tmp_path):
    (tmp_path / "file").touch()
    line = fails(capsys, "fit", "--task", "emoji", "--adapters", tmp_path / "file" / "adapters", *QUICK)
    assert "(Not a directory)" in line
    with pytest.raises(OutputError), held(tmp_path / "file"):
        pass


@pytest.mark.parametrize("change", ["came", "went"])
def test_a_folder_changed_during_a_fit_stops_the_save_and_the_new_adapter_is_kept(
    mini, fitted, folder, monkeypatch, change
):
    lineage = [fitted.adapter]
    new = child_of(fitted.adapter, "emoji", lineage)
    other = folder / "other.safetensors"

    def meanwhile(*_, **__):
        if change == "came":
            save_adapter(child_of(fitted.adapter, "other", lineage), other)
        else:
            (folder / "digits.safetensors").unlink()
        return dataclasses.replace(fitted, adapter=new)

    monkeypatch.setattr(learn, "fit", meanwhile)
    task = dataclasses.replace(load_digits(), name="emoji")
    with pytest.raises(BrokenChain, match=rf"{change}.*; the new adapter is kept as .*/\.emoji\.safetensors") as caught:
        learn_into(folder, task, mini, lineage, None, test_on=[], fabric=one_device(mini), resume=False, on_step=print)
    assert ("other.safetensors came" if change == "came" else f"{fitted.adapter} went") in str(caught.value)
    assert not (folder / "emoji.safetensors").exists()
    assert load_adapter(folder / ".emoji.safetensors").sha256 == new.sha256


def load_digits():
    from clipweld.trainer.tasks import load_task

    return load_task("digits")
