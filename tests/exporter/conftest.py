"""Fixtures of the exporter's tests: traced towers, a repository with two versions, a real Triton."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import tritonclient.grpc
from onnx import TensorProto, helper

from clipweld.exporter.graph import trace
from clipweld.exporter.release import publish
from clipweld.exporter.serving.admin import HEADER, admin_key
from clipweld.exporter.serving.triton import serve
from clipweld.exporter.store.repository import Repository
from clipweld.trainer.adapters.adapter import Adapter
from clipweld.trainer.tasks import sample


@pytest.fixture(scope="session")
def make_adapter(mini):
    """A function that makes an adapter of random experts in both towers, on top of given parents."""

    def make(task: str, parents: tuple[Adapter, ...] = (), seed: int = 0) -> Adapter:
        random = torch.Generator().manual_seed(seed)
        tensors = {}
        for module, d_out, d_in in (
            ("visual.transformer.resblocks.0.attn.q_proj", 192, 192),
            ("visual.transformer.resblocks.5.mlp.c_fc", 768, 192),
            ("transformer.resblocks.1.mlp.c_proj", 128, 512),
        ):
            tensors[f"{module}.lora_A"] = torch.randn(4, d_in, generator=random) * 0.05
            tensors[f"{module}.lora_B"] = torch.randn(d_out, 4, generator=random) * 0.05
        return Adapter(
            task=task,
            class_names=("cat", "dög"),
            templates=("a photo of a {}",),
            model_name="mini",
            pretrained="mini",
            base_fingerprint=mini.fingerprint,
            parents=tuple(parent.sha256 for parent in parents),
            scaling=1.0,
            seed=seed,
            accuracy={"before": {task: 10.0}, "after": {task: 90.0, "other": 50.0}},
            config={},
            activation_counts={},
            tensors=tensors,
        )

    return make


@pytest.fixture(scope="session")
def samples():
    """Real images and prompts."""
    images, prompts = sample(9)
    return images, prompts[:40]


@dataclass(frozen=True)
class Graphs:
    """The mini CLIP's traced towers, without weights."""

    image: onnx.ModelProto
    text: onnx.ModelProto


@pytest.fixture(scope="session")
def graphs(mini):
    """Both towers, traced once: tracing takes seconds."""
    return Graphs(trace.trace_image_tower(mini), trace.trace_text_tower(mini))


@pytest.fixture(scope="session")
def take_traced(graphs):
    """A function that patches merges to use these traced towers for float32 instead of tracing again."""

    def take(patch: pytest.MonkeyPatch) -> None:
        for kind in ("image", "text"):
            ready, do_trace = getattr(graphs, kind), getattr(trace, f"trace_{kind}_tower")
            patch.setattr(
                f"clipweld.exporter.graph.precision.trace_{kind}_tower",
                lambda backbone, dtype=torch.float32, ready=ready, do_trace=do_trace: (
                    ready if dtype is torch.float32 else do_trace(backbone, dtype)
                ),
            )

    return take


@pytest.fixture
def traced(take_traced, monkeypatch):
    """Merges in this test use the towers that were traced once per session."""
    take_traced(monkeypatch)


@pytest.fixture(scope="session")
def released(mini, make_adapter, samples, take_traced, tmp_path_factory):
    """A repository with version 1 (base) and 2 (two tasks merged), and the result of the merge."""
    path = tmp_path_factory.mktemp("released") / "model_repository"
    repository = Repository(path, "clip")
    first = make_adapter("digits")
    second = make_adapter("pets", (first,), seed=1)
    with pytest.MonkeyPatch.context() as patch:
        take_traced(patch)
        return repository, publish.release(mini, [first, second], repository, *samples)


@pytest.fixture
def repository(released, tmp_path):
    """A copy of the released repository that a test may change."""
    shutil.copytree(released[0].path.parent, tmp_path, dirs_exist_ok=True)
    return Repository(tmp_path / "model_repository", "clip")


@dataclass(frozen=True)
class Served:
    """A running Triton, its repository, and a gRPC client (thread-safe)."""

    server: object
    repository: Repository
    client: tritonclient.grpc.InferenceServerClient

    def load(self, model: str) -> None:
        """Make Triton load or reload a model."""
        self.client.load_model(model, headers=self._headers)

    def unload(self, model: str) -> None:
        """Make Triton unload a model."""
        self.client.unload_model(model, headers=self._headers)

    @property
    def _headers(self) -> dict[str, str]:
        return {f"triton-grpc-protocol-{HEADER}": admin_key(self.repository.path)}

    def infer(self, model: str, inputs: dict[str, np.ndarray], version: int | str = "") -> dict[str, np.ndarray]:
        """Send one request; return the outputs by name."""
        tensors = []
        for name, array in inputs.items():
            kind = {"uint8": "UINT8", "int32": "INT32", "float32": "FP32", "object": "BYTES"}[array.dtype.name]
            tensor = tritonclient.grpc.InferInput(name, list(array.shape), kind)
            tensor.set_data_from_numpy(array)
            tensors.append(tensor)
        result = self.client.infer(model, tensors, model_version=str(version), client_timeout=60)
        return {o.name: result.as_numpy(o.name) for o in result.get_response().outputs}


@pytest.fixture(scope="session")
def served(released, tmp_path_factory):
    """A copy of the released repository, served by a real Triton; tests may add models and load them."""
    path = tmp_path_factory.mktemp("served") / "model_repository"
    shutil.copytree(released[0].path.parent, path.parent, dirs_exist_ok=True)
    with serve(path) as server:
        client = tritonclient.grpc.InferenceServerClient(server.url.removeprefix("grpc://"))
        yield Served(server, Repository(path, "clip"), client)
        client.close()


@pytest.fixture(scope="session")
def write_model():
    """A function that writes a model with a small graph: ``y = x + 1`` unless another node is given."""

    def write(
        repository: Path,
        name: str,
        config: str,
        *,
        shape: tuple = ("batch", 2),
        dtype: int = TensorProto.FLOAT,
        node: onnx.NodeProto | None = None,
        initializers: tuple = (),
        out_shape: tuple | None = None,
        out_dtype: int | None = None,
    ) -> Path:
        folder = repository / name / "1"
        folder.mkdir(parents=True)
        (repository / name / "config.pbtxt").write_text(f'name: "{name}"\nbackend: "onnxruntime"\n{config}')
        one = helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])
        built = helper.make_graph(
            [node or helper.make_node("Add", ["x", "one"], ["y"])],
            "small",
            [helper.make_tensor_value_info("x", dtype, shape)],
            [helper.make_tensor_value_info("y", out_dtype or dtype, out_shape or shape)],
            list(initializers) if node else [one],
        )
        model = helper.make_model(built, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        onnx.save(model, folder / "model.onnx")
        return folder

    return write
