"""Manifests, and verifying versions from nothing but their files."""

from __future__ import annotations

import hashlib
import json
import sys
from datetime import datetime

import onnx
import pytest

from clipweld.exporter import cli
from clipweld.exporter.checks.verify import verify
from clipweld.exporter.errors import GraphsDiffer, RepositoryError, VersionDamaged, VersionMissing
from clipweld.exporter.release.publish import release
from clipweld.exporter.store.repository import KINDS, Repository


def rehash(repository, version):
    """Adapt a manifest to altered files, as in a forgery rather than an accident."""
    manifest = repository.manifest(version)
    for kind in KINDS:
        content = repository.file(kind, version).read_bytes()
        manifest["files"][kind] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    repository.manifest_file(version).write_text(json.dumps(manifest))


def test_a_manifest_records_the_origin_of_a_version(released, mini, make_adapter):
    repository, result = released
    manifest = repository.manifest(2)
    first = make_adapter("digits")
    second = make_adapter("pets", (first,), seed=1)
    assert manifest["lineage"] == [{"task": a.task, "sha256": a.sha256} for a in (first, second)]
    assert manifest["base"] == {
        "model_name": "mini", "pretrained": "mini", "fingerprint": mini.fingerprint, "architecture": "mini",
    }  # fmt: skip
    assert (manifest["model"], manifest["version"], manifest["precision"], manifest["opset"]) == ("clip", 2, "fp32", 18)
    assert manifest["parity"] == result.to_dict()["parity"]
    assert datetime.fromisoformat(manifest["date"]).tzinfo is not None
    assert {"python", "torch", "open_clip_torch", "onnx", "clipweld"} <= set(manifest["tools"])
    for kind in KINDS:
        content = repository.file(kind, 2).read_bytes()
        assert manifest["files"][kind] == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        standing = repository.model(kind) / "2/manifest.json"
        assert json.loads(standing.read_text()) == manifest
    assert repository.manifest(1)["lineage"] == []


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
def test_the_same_adapters_give_the_same_files(released, mini, make_adapter, samples, tmp_path):
    first = make_adapter("digits")
    again = Repository(tmp_path / "model_repository", "clip")
    release(mini, [first, make_adapter("pets", (first,), seed=1)], again, *samples)
    for version in (1, 2):
        for kind in KINDS:
            assert again.file(kind, version).read_bytes() == released[0].file(kind, version).read_bytes()


@pytest.mark.parametrize("version", [1, 2])
def test_a_version_can_be_verified_from_its_own_files(released, samples, version):
    found = verify(released[0], version, *samples)
    assert found.graph_identical_to_base
    recorded = found.recorded
    assert found.parity.image_max_abs == pytest.approx(recorded["image_max_abs"], abs=1e-6)
    assert found.parity.top1_agreement == 1.0


def test_a_missing_version_is_refused_and_the_present_ones_are_listed(released, samples):
    with pytest.raises(VersionMissing, match="versions there: 1, 2"):
        verify(released[0], 7, *samples)


@pytest.mark.parametrize("standing", [False, True], ids=["stored", "standing"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_flipped_bit_is_found(repository, samples, kind, standing):
    file = repository.model(kind) / "2/model.onnx" if standing else repository.file(kind, 2)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(VersionDamaged, match=r"model\.onnx: its SHA-256 is \w{8}, the manifest says \w{8}") as caught:
        verify(repository, 2, *samples)
    assert str(file) in str(caught.value)


def test_a_missing_file_and_an_unreadable_manifest_are_reported(repository, samples):
    repository.file("text", 2).unlink()
    with pytest.raises(VersionDamaged, match=r"text/model\.onnx: can't be read"):
        verify(repository, 2, *samples)
    repository.manifest_file(1).write_text("{")
    with pytest.raises(RepositoryError, match=r"1/manifest\.json: can't be read"):
        verify(repository, 1, *samples)


def test_another_graph_is_found_even_if_the_hashes_match(repository, samples):
    model = onnx.load(repository.file("text", 2))
    model.graph.node[3].name += "_"
    onnx.save(model, repository.file("text", 2))
    onnx.save(model, repository.model("text") / "2/model.onnx")
    rehash(repository, 2)
    with pytest.raises(GraphsDiffer, match="text tower of version 2"):
        verify(repository, 2, *samples)


@pytest.mark.slow
def test_the_command_verifies_one_or_all_versions(released, tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["exporter", "verify", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, capsys.readouterr()

    where = ["--repository", str(released[0].path)]
    code, printed = run(*where, "--json")
    assert code == 0
    assert [found["version"] for found in json.loads(printed.out)] == [1, 2]
    code, printed = run("2", *where)
    assert (code, printed.out.startswith("clip version 2: files unaltered, ONNX Runtime is within ")) == (0, True)
    code, printed = run("--repository", str(tmp_path / "nowhere"))
    assert (code, printed.err.count("\n")) == (1, 1)
    assert "write one with: exporter merge" in printed.err
