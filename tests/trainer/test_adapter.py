import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from clipweld.trainer.adapters.adapter import load_adapter, load_lineage, save_adapter
from clipweld.trainer.errors import AdapterCorrupt, AdapterError, BrokenChain, WrongBase


@pytest.fixture
def adapter(fitted):
    return fitted.adapter


def child_of(adapter, task, parents):
    return dataclasses.replace(adapter, task=task, parents=tuple(p.sha256 for p in parents))


def test_an_adapter_is_unchanged_by_saving_and_loading(adapter, tmp_path):
    save_adapter(adapter, tmp_path / "a.safetensors")
    loaded = load_adapter(tmp_path / "a.safetensors")
    assert loaded.sha256 == adapter.sha256
    assert loaded.metadata() == adapter.metadata()
    for name, tensor in adapter.tensors.items():
        assert torch.equal(loaded.tensors[name], tensor)


def test_an_adapter_of_format_3_can_still_be_read(tmp_path):
    """Written before adapters recorded how far things not learned have moved."""
    old = Path(__file__).with_name("format_3.safetensors")
    found = load_adapter(old)
    assert found.moved is None
    assert found.sha256 == "c004c6a55a5d9e7a9fe3a6cd5f4c7c9c5dc72a5dc24502545a9a18680947dc59"
    save_adapter(found, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == old.read_bytes()


@pytest.mark.parametrize("number", [2, 5, None, "4", [4], True])
def test_other_formats_are_refused(tmp_path, number):
    text = json.dumps({"format": number, "sha256": "ab" * 32})
    save_file({"m.lora_A": torch.ones(1, 1)}, tmp_path / "a.safetensors", {"clipweld": text})
    with pytest.raises(AdapterCorrupt, match="this clipweld reads 3 and 4"):
        load_adapter(tmp_path / "a.safetensors")


def test_saving_an_adapter_twice_gives_the_same_bytes_and_no_other_files(adapter, tmp_path):
    for name in ("a", "b"):
        save_adapter(adapter, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_adapters_of_one_lineage_must_have_the_same_layers(adapter, tmp_path):
    layer = adapter.modules()[0]
    tensors = {name: tensor for name, tensor in adapter.tensors.items() if not name.startswith(f"{layer}.")}
    save_adapter(adapter, tmp_path / "a.safetensors")
    save_adapter(dataclasses.replace(child_of(adapter, "b", [adapter]), tensors=tensors), tmp_path / "b.safetensors")
    with pytest.raises(BrokenChain, match=f"has no experts on {layer}"):
        load_lineage(tmp_path, adapter.base_fingerprint)


def test_any_flipped_bit_is_refused(adapter, tmp_path):
    """One bit at each of 60 positions across the file: header, metadata and tensors."""
    path = tmp_path / "a.safetensors"
    save_adapter(adapter, path)
    whole = path.read_bytes()
    for i in range(60):
        corrupted = bytearray(whole)
        corrupted[i * (len(whole) - 1) // 59] ^= 1 << (i % 8)
        path.write_bytes(corrupted)
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


def test_a_missing_file_is_reported(tmp_path):
    with pytest.raises(AdapterError, match="no such file"):
        load_adapter(tmp_path / "x.safetensors")


def test_a_lineage_is_ordered_by_parents_and_not_by_file_names(adapter, tmp_path):
    second = child_of(adapter, "b", [adapter])
    third = child_of(adapter, "a", [adapter, second])
    for name, each in (("z", adapter), ("y", second), ("x", third)):
        save_adapter(each, tmp_path / f"{name}.safetensors")
    assert [a.task for a in load_lineage(tmp_path, adapter.base_fingerprint)] == ["digits", "b", "a"]


def test_a_missing_folder_is_an_empty_lineage(tmp_path):
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


def test_lineage_refuses_two_tasks_with_the_same_parents(adapter, tmp_path):
    for task in ("b", "c"):
        save_adapter(child_of(adapter, task, [adapter]), tmp_path / f"{task}.safetensors")
    save_adapter(adapter, tmp_path / "a.safetensors")
    with pytest.raises(BrokenChain):
        load_lineage(tmp_path, adapter.base_fingerprint)


def sealed(adapter, path, **changes):
    """Write an adapter with changed contents and a matching hash, and return its path."""
    changed = dataclasses.replace(adapter, **changes)
    save_adapter(changed, path)
    return path


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"task": "../escape"}, "task name"),
        ({"task": "x" * 300}, "at most 200 bytes"),
        ({"class_names": ("one",)}, "two or more"),
        ({"class_names": ("a", "a")}, "is listed twice"),
        ({"class_names": ("a", "\x1b[2J")}, "without control characters"),
        ({"class_names": ("a", 3)}, "class_names.1: Input should be a valid string"),
        ({"templates": ("a photo",)}, "exactly one {}"),
        ({"templates": ()}, "at least one"),
        ({"parents": ("x",)}, "parents.0"),
        ({"scaling": float("nan")}, "scaling"),
        ({"scaling": "1"}, "scaling: Input should be a valid number"),
        ({"seed": True}, "seed: Input should be a valid integer"),
        ({"seed": 2**63}, "seed"),
        ({"accuracy": {"after": {"digits": 101.0}}}, "less than or equal to 100"),
        ({"config": {"lr": [1]}}, "config.lr"),
        ({"activation_counts": {"m": [-1]}}, "activation_counts.m.0"),
        ({"moved": {"words_mean": 0.1}}, "moved.words_p95"),
        ({"moved": {"words_mean": -1.0, "words_p95": 0.0, "images_kl": 0.0, "names_mean": 0.0}}, "moved.words_mean"),
    ],
)
def test_invalid_metadata_is_refused_even_with_a_matching_hash(adapter, tmp_path, changes, says):
    with pytest.raises(AdapterCorrupt) as caught:
        load_adapter(sealed(adapter, tmp_path / "a.safetensors", **changes))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda t: t.fill_(float("nan")), "not finite"),
        (lambda t: t.index_fill_(0, torch.tensor([0]), float("inf")), "not finite"),
        (lambda t: t.half(), "expected a float32 matrix"),
        (lambda t: t[:0], "expected a float32 matrix"),
        (lambda t: t[0], "expected a float32 matrix"),
        (lambda t: t[:1], "of one rank"),
    ],
)
def test_invalid_tensors_are_refused_even_with_a_matching_hash(adapter, tmp_path, spoil, says):
    name = next(name for name in adapter.tensors if name.endswith(".lora_A"))
    tensors = adapter.tensors | {name: spoil(adapter.tensors[name].clone())}
    with pytest.raises(AdapterCorrupt, match=says):
        load_adapter(sealed(adapter, tmp_path / "a.safetensors", tensors=tensors))


@pytest.mark.parametrize(
    "text", ["[" * 10**5, '{"a":' * 10**5, "9" * 5000, '"\\ud800"', " " * (3 << 20), "[{}]", "NaN"]
)
def test_metadata_that_cannot_be_parsed_is_refused(tmp_path, text):
    save_file({"m.lora_A": torch.ones(1, 1)}, tmp_path / "a.safetensors", {"clipweld": text})
    with pytest.raises(AdapterCorrupt):
        load_adapter(tmp_path / "a.safetensors")


def test_an_oversized_header_is_refused_before_it_is_read(tmp_path):
    with open(tmp_path / "a.safetensors", "wb") as file:
        file.write((1 << 26).to_bytes(8, "little"))
        file.truncate(1 << 27)
    with pytest.raises(AdapterCorrupt, match="a header of 67,108,864 bytes"):
        load_adapter(tmp_path / "a.safetensors")
