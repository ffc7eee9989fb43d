import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from trainer.adapter import load_adapter, load_lineage, save_adapter
from trainer.errors import AdapterCorrupt, AdapterError, BrokenChain, WrongBase


@pytest.fixture
def adapter(fitted):
    return fitted.adapter


def child_of(adapter, task, parents):
    return dataclasses.replace(adapter, task=task, parents=tuple(p.sha256 for p in parents))


def test_an_adapter_survives_the_file(adapter, tmp_path):
    save_adapter(adapter, tmp_path / "a.safetensors")
    loaded = load_adapter(tmp_path / "a.safetensors")
    assert loaded.sha256 == adapter.sha256
    assert loaded.metadata() == adapter.metadata()
    for name, tensor in adapter.tensors.items():
        assert torch.equal(loaded.tensors[name], tensor)


def test_the_same_adapter_is_the_same_bytes_and_leaves_no_other_file(adapter, tmp_path):
    for name in ("a", "b"):
        save_adapter(adapter, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_any_flipped_bit_is_refused(adapter, tmp_path):
    """One bit in each of 60 places all over the file: header, metadata and tensors."""
    path = tmp_path / "a.safetensors"
    save_adapter(adapter, path)
    whole = path.read_bytes()
    for i in range(60):
        spoilt = bytearray(whole)
        spoilt[i * (len(whole) - 1) // 59] ^= 1 << (i % 8)
        path.write_bytes(spoilt)
        with pytest.raises(AdapterCorrupt):
            load_adapter(path)


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.9999])
def test_a_truncated_file_is_refused(adapter, tmp_path, share):
    path = tmp_path / "a.safetensors"
    save_adapter(adapter, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(AdapterCorrupt, match="truncated or not an adapter"):
        load_adapter(path)


def test_other_safetensors_files_are_refused(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(AdapterCorrupt):
        load_adapter(tmp_path / "x.safetensors")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(AdapterError, match="no such file"):
        load_adapter(tmp_path / "x.safetensors")


def test_lineage_is_put_in_order_whatever_the_files_are_called(adapter, tmp_path):
    second = child_of(adapter, "b", [adapter])
    third = child_of(adapter, "a", [adapter, second])
    for name, each in (("z", adapter), ("y", second), ("x", third)):
        save_adapter(each, tmp_path / f"{name}.safetensors")
    assert [a.task for a in load_lineage(tmp_path, adapter.base_fingerprint)] == ["digits", "b", "a"]


def test_an_absent_folder_is_the_empty_lineage(tmp_path):
    assert load_lineage(tmp_path / "none", "f") == []


def test_lineage_refuses_a_wrong_base_and_names_both(adapter, tmp_path):
    save_adapter(adapter, tmp_path / "a.safetensors")
    with pytest.raises(WrongBase, match=f"{adapter.base_fingerprint[:8]}.*feedfeed"):
        load_lineage(tmp_path, "feedfeed00")


def test_lineage_refuses_a_missing_parent_and_shows_both_chains(adapter, tmp_path):
    second = child_of(adapter, "b", [adapter])
    third = child_of(adapter, "c", [adapter, second])
    save_adapter(adapter, tmp_path / "a.safetensors")
    save_adapter(third, tmp_path / "c.safetensors")
    with pytest.raises(BrokenChain, match=f"{adapter} > {second.sha256[:8]}; found before it: {adapter}"):
        load_lineage(tmp_path, adapter.base_fingerprint)


def test_lineage_refuses_two_tasks_learned_side_by_side(adapter, tmp_path):
    for task in ("b", "c"):
        save_adapter(child_of(adapter, task, [adapter]), tmp_path / f"{task}.safetensors")
    save_adapter(adapter, tmp_path / "a.safetensors")
    with pytest.raises(BrokenChain):
        load_lineage(tmp_path, adapter.base_fingerprint)
