"""Lower precisions: cast from float32, the same graph for base and merged, close enough to float32, and served."""

from __future__ import annotations

import resource
import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch

from clipweld.client import ZeroShotClassifier
from clipweld.exporter.checks.gate import Gate
from clipweld.exporter.checks.parity import check_same_graph
from clipweld.exporter.checks.verify import verify
from clipweld.exporter.config import Precision
from clipweld.exporter.errors import AnswersDiffer, GateClosed, GraphsDiffer, NotFinite, VersionDamaged
from clipweld.exporter.graph.onnx_file import to_bytes
from clipweld.exporter.graph.precision import Towers, quantize
from clipweld.exporter.graph.trace import fill
from clipweld.exporter.release import build
from clipweld.exporter.release.publish import Checks, release
from clipweld.exporter.results import Agreement
from clipweld.exporter.serving.switch import promote
from clipweld.exporter.serving.triton import serve
from clipweld.exporter.store.repository import EXACT, KINDS, Repository
from clipweld.trainer.base.backbone import with_weights
from clipweld.trainer.errors import OutputError
from clipweld.trainer.tasks import load_task

CHECKS = Checks(Gate(min_agreement=0.9), compared_on=[load_task("clipart")])


@pytest.fixture(scope="module")
def cast(released, mini, make_adapter, samples, take_traced, tmp_path_factory):
    """The released repository with two more versions of version 2's adapters: 3 in fp16, 4 in int8."""
    folder = tmp_path_factory.mktemp("cast")
    shutil.copytree(released[0].path.parent, folder, dirs_exist_ok=True)
    repository = Repository(folder / "model_repository", "clip")
    first = make_adapter("digits")
    lineage = [first, make_adapter("pets", (first,), seed=1)]
    with pytest.MonkeyPatch.context() as patch:
        take_traced(patch)
        results = [
            release(mini, lineage, repository, *samples, precision=precision, checks=CHECKS)
            for precision in (Precision.fp16, Precision.int8)
        ]
    return repository, results


def size(repository, kind, version):
    return repository.file(kind, version).stat().st_size


def test_half_precision_halves_the_file_and_stays_close_to_float32(cast):
    repository, (half, _) = cast
    for kind in ("image", "text"):
        assert size(repository, kind, 3) < 0.51 * size(repository, kind, 2)
    assert half.precision is Precision.fp16
    assert half.cast.parity.max_abs < 1e-3
    assert half.cast.agreement[0].top1 == 1
    graph = onnx.load(repository.file("image", 3)).graph
    weights = [t for t in graph.initializer if t.name.startswith("visual.")]
    assert weights
    assert {t.data_type for t in weights} == {onnx.TensorProto.FLOAT16}
    # Pixels are scaled, and features normalised, in float32.
    casts = {n.input[0]: n.attribute[0].i for n in graph.node if n.op_type == "Cast"}
    assert casts["permute"] == onnx.TensorProto.FLOAT
    assert graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_int8_applies_to_the_matrix_products_of_the_image_tower(cast):
    repository, (_, quantized) = cast
    assert size(repository, "image", 4) < 0.45 * size(repository, "image", 2)
    assert repository.file("text", 4).read_bytes() == repository.file("text", 2).read_bytes()
    graph = onnx.load(repository.file("image", 4)).graph
    with_weights = [n for n in graph.node if n.op_type == "MatMulInteger"]
    initializers = {t.name: t for t in graph.initializer}
    in_float = [n for n in graph.node if n.op_type == "MatMul" and n.input[1] in initializers]
    assert len(with_weights) == 6 * 6 - 4  # six products per block
    assert len(in_float) == 5  # the first MLP's second, three on [CLS] only, and the projection
    assert {initializers[n.input[1]].data_type for n in with_weights} == {onnx.TensorProto.INT8}
    assert all(node.domain == "" for node in graph.node), "standard operators alone"
    assert quantized.cast.parity.max_abs < 0.05
    assert quantized.cast.agreement[0].top1 >= 0.9
    assert quantized.to_dict()["precision"] == "int8"


def test_lower_precisions_are_merged_in_float32_first(cast):
    repository, _ = cast
    for version, kinds in ((3, ("image", "text")), (4, ("image",))):
        for kind in kinds:
            kept = repository.store / str(version) / EXACT / kind / "model.onnx"
            assert kept.read_bytes() == repository.file(kind, 2).read_bytes()


def test_all_precisions_have_the_same_config(cast):
    repository, _ = cast
    for kind in KINDS:
        texts = {(repository.store / str(v) / kind / "config.pbtxt").read_text() for v in (1, 2, 3, 4)}
        assert len(texts) == 1


@pytest.mark.slow
def test_the_quantised_graph_is_reproducible_and_does_not_depend_on_weights(mini, graphs, tmp_path):
    models = []
    for name, change in (
        ("base", lambda w: w),
        ("same", lambda w: w),
        ("zero", torch.zeros_like),
        ("one", torch.ones_like),
    ):
        weights = {key: change(value) for key, value in mini.model.state_dict().items()}
        (tmp_path / name).write_bytes(to_bytes(fill(graphs.image, weights)))
        models.append(quantize(tmp_path / name))
    base, same, *others = models
    assert to_bytes(base) == to_bytes(same)
    for other in others:
        check_same_graph(base, other, "image tower")


def test_a_cast_whose_graph_differs_from_the_base_s_is_refused(
    released, mini, make_adapter, samples, repository, monkeypatch, take_traced
):
    take_traced(monkeypatch)
    calls = iter(range(100))

    def changing(file):
        model = quantize(file)
        model.graph.node[0].name += str(next(calls))
        return model

    monkeypatch.setattr("clipweld.exporter.graph.precision.quantize", changing)
    with pytest.raises(GraphsDiffer, match="image tower in int8"):
        release(mini, [make_adapter("digits")], repository, *samples, precision=Precision.int8, checks=CHECKS)
    assert repository.versions() == [1, 2]


@pytest.mark.parametrize("share", [0.001, 0.5, 0.99])
def test_quantisation_on_a_full_disk_is_an_error(cast, share, caplog):
    file = cast[0].file("image", 2)
    limit = int(share * file.stat().st_size)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))  # the kernel refuses to write beyond it
    try:
        with pytest.raises(
            OutputError,
            match=r"temporary folder .* can't be written .*(make room|raise that), or name another",
        ):
            quantize(file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not caplog.text


@pytest.mark.usefixtures("traced")
def test_too_little_agreement_is_refused_and_forced_on_request(mini, make_adapter, samples, repository, monkeypatch):
    def compared(*_):
        return [Agreement("clipart", 0.98, 200)]

    monkeypatch.setattr(build, "measure_agreement", compared)
    arguments = (mini, [make_adapter("digits")], repository, *samples)
    with pytest.raises(GateClosed, match=r"98\.0% of 200 images"):
        release(*arguments, precision=Precision.int8)
    assert repository.versions() == [1, 2]
    made = release(*arguments, precision=Precision.int8, checks=Checks(Gate(force=True)))
    assert made.forced == repository.manifest(made.version)["forced"] == [
        "its answers are those of float32 on 98.0% of 200 images (99% wanted)"
    ]  # fmt: skip


@pytest.mark.slow
def test_lower_precisions_can_be_verified_from_their_own_files(cast, samples):
    repository, (half, quantized) = cast
    for result in (half, quantized):
        again = verify(repository, result.version, *samples)
        assert again.graph_identical_to_base
        assert again.cast == result.cast.parity
    assert verify(repository, 2, *samples).cast is None


def test_stored_float32_files_are_verified_too(cast, samples, tmp_path):
    shutil.copytree(cast[0].path.parent, tmp_path, dirs_exist_ok=True)
    repository = Repository(tmp_path / "model_repository", "clip")
    kept = repository.store / "4" / EXACT / "image/model.onnx"
    content = bytearray(kept.read_bytes())
    content[-1] ^= 1
    kept.write_bytes(content)
    with pytest.raises(VersionDamaged, match="fp32/image"):
        verify(repository, 4, *samples)


@pytest.mark.slow
def test_a_cast_less_exact_than_recorded_is_refused(cast, samples, monkeypatch):
    recorded = cast[0].manifest(4)
    recorded["cast"]["parity"]["image_max_abs"] = 1e-6
    monkeypatch.setattr(Repository, "manifest", lambda *_: recorded)
    with pytest.raises(AnswersDiffer, match=r"image features are .* from PyTorch, 1\.0e-06 when it was made"):
        verify(cast[0], 4, *samples)


@pytest.mark.slow
def test_the_base_alone_can_be_cast(mini, samples, tmp_path, take_traced, monkeypatch):
    take_traced(monkeypatch)
    repository = Repository(tmp_path / "model_repository", "clip")
    made = release(mini, [], repository, *samples, precision=Precision.int8, checks=CHECKS)
    assert (made.version, made.served, repository.versions()) == (2, 2, [1, 2])
    assert [repository.manifest(v)["precision"] for v in (1, 2)] == ["fp32", "int8"]


@pytest.mark.slow
def test_versions_of_all_precisions_are_served_side_by_side(cast, samples, tmp_path):
    shutil.copytree(cast[0].path.parent, tmp_path, dirs_exist_ok=True)
    repository = Repository(tmp_path / "model_repository", "clip")
    with serve(repository.path) as server:
        answers = {}
        for version in (2, 3, 4):
            promote(repository, version, [server.url])
            with ZeroShotClassifier(server.url, version=version) as clip:
                found = list(clip.classify(samples[0][:4], ["cat", "dog", "a flag"], top_k=3))
                answers[version] = np.array([[p.score for p in sorted(f, key=lambda p: p.label)] for f in found])
    np.testing.assert_allclose(answers[3], answers[2], atol=2e-2)
    np.testing.assert_allclose(answers[4], answers[2], atol=0.5)
    assert not np.array_equal(answers[4], answers[2])


@pytest.mark.slow
def test_an_overflow_in_float16_is_refused_even_with_force(mini, released, samples, traced, tmp_path):
    shutil.copytree(released[0].path.parent, tmp_path, dirs_exist_ok=True)
    towers = Towers(mini, Precision.fp16)
    weights = {name: weight.clone() for name, weight in mini.model.state_dict().items()}
    name = "visual.transformer.resblocks.2.mlp.c_proj.bias"
    weights[name][3] = 1e5
    with pytest.raises(NotFinite, match=rf"weight {name} reaches 1e\+05, expected finite float16; .*--precision fp32"):
        towers.cast("image", weights, released[0].file("image", 1))
    weights[name][3] = 6e4  # 6e4 fits into float16, twice that does not
    weights[name.replace("2", "4")][3] = 6e4
    other = replace(with_weights(mini, weights), fingerprint="0" * 64)
    repository = Repository(tmp_path / "another", "clip")
    force = Checks(Gate(min_agreement=0, force=True), compared_on=[load_task("clipart")])
    with pytest.raises(NotFinite, match="features of images in ONNX Runtime"):
        release(other, [], repository, *samples, precision=Precision.fp16, checks=force)
    assert repository.versions() == []
