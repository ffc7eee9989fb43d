"""Towers too large for one ONNX file: their weights are stored in a data file beside it, and nothing else changes.

The tests lower the limit so that it applies to the small CLIP.
"""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest

from clipweld.client import ZeroShotClassifier
from clipweld.exporter.checks.gate import Gate
from clipweld.exporter.checks.verify import verify
from clipweld.exporter.config import Precision
from clipweld.exporter.errors import ForeignFiles, VersionDamaged
from clipweld.exporter.graph import onnx_file
from clipweld.exporter.release.publish import Checks, release
from clipweld.exporter.release.unmerged import release_unmerged
from clipweld.exporter.serving.switch import promote, prune, rollback
from clipweld.exporter.serving.triton import serve
from clipweld.exporter.store.lineage import read_weights
from clipweld.exporter.store.manifest import check_files
from clipweld.exporter.store.repository import TOWERS, Repository
from clipweld.trainer.tasks import load_task

LIMIT = 1_000_000
CHECKS = Checks(Gate(min_agreement=0.9), compared_on=[load_task("clipart")])


@pytest.fixture(scope="module")
def made(mini, make_adapter, samples, take_traced, tmp_path_factory):
    """Versions 1, 2 (merged), 3 (int8) and 4 (fp16) with weights in data files; and their lineage."""
    repository = Repository(tmp_path_factory.mktemp("large") / "model_repository", "clip")
    first = make_adapter("digits")
    lineage = [first, make_adapter("pets", (first,), seed=1)]
    with pytest.MonkeyPatch.context() as patch:
        take_traced(patch)
        patch.setattr(onnx_file, "EXTERNAL_ABOVE", LIMIT)
        release(mini, lineage, repository, *samples)
        for precision in (Precision.int8, Precision.fp16):
            release(mini, lineage, repository, *samples, precision=precision, checks=CHECKS)
    return repository, lineage


@pytest.fixture
def repository(made, tmp_path):
    """A copy that a test may change."""
    shutil.copytree(made[0].path.parent, tmp_path, dirs_exist_ok=True)
    return Repository(tmp_path / "model_repository", "clip")


@pytest.fixture
def low_limit(monkeypatch):
    """Lower the limit, so that this test writes weights to data files."""
    monkeypatch.setattr(onnx_file, "EXTERNAL_ABOVE", LIMIT)


def data(repository, kind, version):
    return onnx_file.data_file(repository.file(kind, version))


def run(file, **inputs):
    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"]).run(None, inputs)[0]


def test_data_files_are_in_the_store_in_the_manifest_and_among_active_files(made):
    repository = made[0]
    for kind in TOWERS:
        assert repository.file(kind, 2).stat().st_size < LIMIT < data(repository, kind, 2).stat().st_size
        assert data(repository, kind, 2).stat().st_mode == repository.file(kind, 2).stat().st_mode
        assert data(repository, kind, 2).samefile(repository.model(kind) / "2" / onnx_file.DATA_FILE)
        assert sorted(os.listdir(repository.model(kind) / "2")) == ["manifest.json", "model.onnx", "model.onnx.data"]
    assert sorted(os.listdir(repository.model("card") / "2")) == ["manifest.json", "model.onnx"]
    assert set(repository.manifest(2)["files"]) == {
        "card", "image", "image/model.onnx.data", "text", "text/model.onnx.data",
    }  # fmt: skip
    for version in repository.versions():
        check_files(repository, version)


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_every_precision_can_be_verified_from_its_files(made, samples, version):
    assert verify(made[0], version, *samples).graph_identical_to_base


def test_weights_and_answers_equal_those_of_a_single_file(made, released, mini):
    names = mini.model.state_dict()
    beside, inside = read_weights(made[0], 2, names), read_weights(released[0], 2, names)
    assert beside.keys() == inside.keys()
    assert all((beside[name] == inside[name]).all() for name in inside)
    image = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    np.testing.assert_array_equal(
        run(made[0].file("image", 2), image=image), run(released[0].file("image", 2), image=image)
    )


def test_models_of_usual_size_are_still_a_single_file(released):
    for kind in TOWERS:
        assert not data(released[0], kind, 2).exists()
        assert released[0].file(kind, 2).read_bytes() == onnx_file.to_bytes(onnx.load(released[0].file(kind, 2)))


@pytest.mark.usefixtures("traced", "low_limit")
def test_the_next_merge_builds_on_weights_beside_the_graph(repository, mini, make_adapter, samples, made):
    lineage = [*made[1], make_adapter("flags", tuple(made[1]), seed=3)]
    assert release(mini, lineage, repository, *samples).version == 5
    again = release(mini, made[1], repository, *samples).version
    for kind in TOWERS:
        assert repository.file(kind, again).read_bytes() == repository.file(kind, 2).read_bytes()
        assert data(repository, kind, again).read_bytes() == data(repository, kind, 2).read_bytes()


@pytest.mark.usefixtures("traced", "low_limit")
def test_adapters_can_be_left_in_a_graph_with_weights_beside_it(repository, mini, samples, made):
    release_unmerged(mini, made[1], repository, *samples)
    sibling = Repository(repository.path, "clip-unmerged")
    assert sibling.standing() == [1, 2]
    assert (sibling.model("image") / "2" / onnx_file.DATA_FILE).samefile(data(sibling, "image", 2))
    release_unmerged(mini, made[1], repository, *samples)


def test_versions_with_weights_beside_the_graph_are_switched_and_pruned(repository):
    assert promote(repository, 3, []).standing == [2, 3]
    assert rollback(repository, []).standing == [2]
    assert prune(repository, 1).removed == [3]
    assert sorted(path.name for path in repository.store.iterdir()) == ["1", "2", "4", "history.json"]


@pytest.mark.parametrize("standing", [False, True], ids=["stored", "standing"])
@pytest.mark.parametrize("change", ["flip", "cut", "remove", "link"])
def test_altered_data_files_are_found(repository, samples, change, standing, tmp_path):
    file = repository.model("text") / "2" / onnx_file.DATA_FILE if standing else data(repository, "text", 2)
    content = bytearray(file.read_bytes())
    file.unlink()
    if change == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif change == "cut":
        file.write_bytes(content[:-100])
    elif change == "link":
        (tmp_path / "elsewhere").write_bytes(content)
        file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(VersionDamaged, match=r"model\.onnx\.data: "):
        verify(repository, 2, *samples)


@pytest.mark.parametrize(
    ("key", "value"),
    [("location", "../../1/text/model.onnx.data"), ("location", "/etc/passwd"), ("offset", "99999999"),
     ("offset", "-4"), ("length", "4"), ("length", "")],
)  # fmt: skip
def test_a_graph_may_not_refer_to_any_other_data(repository, key, value):
    file = repository.file("text", 2)
    model = onnx.load(file, load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    for entry in tensor.external_data:
        entry.value = value if entry.key == key else entry.value
    file.write_bytes(model.SerializeToString())
    with pytest.raises(VersionDamaged, match="has its data in another file"):
        onnx_file.load(file)


def test_a_data_file_missing_from_the_manifest_is_damage_or_foreign(repository, released, tmp_path):
    manifest = repository.manifest(4)
    del manifest["files"]["image/model.onnx.data"]
    repository.manifest_file(4).write_text(json.dumps(manifest))
    with pytest.raises(VersionDamaged, match=r"doesn't say what its model\.onnx\.data must be"):
        check_files(repository, 4)
    shutil.copytree(released[0].path.parent, tmp_path / "small")
    small = Repository(tmp_path / "small/model_repository", "clip")
    data(small, "image", 2).write_bytes(b"my only copy")
    with pytest.raises(ForeignFiles):
        small.check_removable(2)


@pytest.mark.slow
def test_weights_beside_the_graph_are_served(repository, served, samples):
    images, prompts = samples
    with serve(repository.path) as server, ZeroShotClassifier(server.url) as classifier:
        got = classifier.image_features(images), classifier.text_features(prompts)
        assert promote(repository, 3, [server.url]).version == 3
    with ZeroShotClassifier(served.server.url, version=2) as classifier:
        want = classifier.image_features(images), classifier.text_features(prompts)
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_array_equal(ours, theirs)
