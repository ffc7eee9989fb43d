"""Merging on top of an earlier version: only new adapters are merged, and the files equal a merge from the base."""

from __future__ import annotations

import pytest
import torch

from clipweld.exporter.errors import VersionDamaged
from clipweld.exporter.release.publish import release
from clipweld.exporter.store import lineage
from clipweld.exporter.store.lineage import merged_backbone, on_weights, read_weights
from clipweld.exporter.store.repository import TOWERS, Repository
from clipweld.trainer.adapters.merge import merge


@pytest.fixture
def merges(monkeypatch):
    """A list that receives the tasks of every computed merge."""
    tasks = []

    def noting(weights, adapters):
        tasks.append([adapter.task for adapter in adapters])
        return merge(weights, adapters)

    monkeypatch.setattr(lineage, "merge", noting)
    return tasks


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
def test_only_the_new_adapter_is_merged_and_the_files_equal_a_full_merge(
    released, mini, make_adapter, samples, tmp_path, merges
):
    first = make_adapter("digits")
    second = make_adapter("pets", (first,), seed=1)
    repository = Repository(tmp_path / "model_repository", "clip")
    for adapters in ([first], [first, second]):
        release(mini, adapters, repository, *samples)
    assert merges == [["digits"], ["pets"]]
    for kind in TOWERS:
        assert repository.file(kind, 3).read_bytes() == released[0].file(kind, 2).read_bytes()


def test_a_merge_builds_on_the_longest_matching_lineage(released, mini, make_adapter, merges):
    first = make_adapter("digits")
    second = make_adapter("pets", (first,), seed=1)
    other = make_adapter("cars", (first,), seed=2)
    third = make_adapter("flags", (first, second), seed=3)
    base = mini.model.state_dict()
    for adapters, merged in (
        ([first, second, third], ["flags"]),
        ([first, second], []),
        ([first, other], ["digits", "cars"]),
        ([], []),
    ):
        got, want = merged_backbone(released[0], mini, adapters).model.state_dict(), merge(base, adapters)
        assert merges.pop() == merged
        assert set(got) == set(want)
        assert all(torch.equal(got[name], want[name]) for name in want)


def test_a_damaged_version_is_not_built_on(repository, mini, make_adapter, samples):
    file = repository.file("text", 2)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.unlink()
    file.write_bytes(content)
    first = make_adapter("digits")
    lineage = [first, make_adapter("pets", (first,), seed=1)]
    with pytest.raises(VersionDamaged, match="2/text"):
        merged_backbone(repository, mini, [*lineage, make_adapter("flags", tuple(lineage), seed=3)])


def test_weights_are_read_back_unchanged(released, mini, make_adapter):
    first = make_adapter("digits")
    want = merge(mini.model.state_dict(), [first, make_adapter("pets", (first,), seed=1)])
    got = read_weights(released[0], 2, want)
    assert set(want) - set(got) == {"logit_scale"}
    assert all(torch.equal(tensor, want[name]) for name, tensor in got.items())


def test_replacing_weights_leaves_the_base_unchanged(mini):
    weights = mini.model.state_dict()
    before = {name: tensor.clone() for name, tensor in weights.items()}
    other = on_weights(mini, weights | {"visual.proj": weights["visual.proj"] * 2})
    assert torch.equal(other.model.visual.proj, 2 * before["visual.proj"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in mini.model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in other.model.parameters())
