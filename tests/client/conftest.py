"""A gRPC server in this process that speaks just enough of Triton's protocol to misbehave on request.

Only for faults that a healthy server cannot be made to show: versions that vanish in the middle of a call, cards of
another format, broken statuses. Everything else is tested against a real Triton.
"""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import serialize_byte_tensor

from clipweld.client import AsyncZeroShotClassifier, ZeroShotClassifier
from clipweld.client._tokenizer import default_tokenizer

EMBED_DIM = 8
IMAGE_SIZE = 16
MAX_BATCH_SIZE = 4


class FakeServer(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Serves model "clip" in the versions of ``cards``.

    Attributes:
        cards: the card of each served version, by number; changes take effect at once.
        before_infer: called with (model, version, gRPC context) before each answer; may abort, sleep, change ``cards``.
        tamper: called with each answer before it is sent; may change it.
        requests: (model, version, shape) of every inference answered.
        url: the address at which it listens.
    """

    def __init__(self, port: int = 0) -> None:
        self.cards = {1: self.card(1), 2: self.card(2)}
        self.before_infer: Callable[[str, int, grpc.ServicerContext], None] = lambda *_: None
        self.tamper: Callable[[service_pb2.ModelInferResponse], object] = lambda answer: None
        self.requests: list[tuple[str, int, tuple[int, ...]]] = []
        self._server = grpc.server(futures.ThreadPoolExecutor(4))
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self._server)
        self.url = f"127.0.0.1:{self._server.add_insecure_port(f'127.0.0.1:{port}')}"
        self._server.start()

    def stop(self) -> None:
        self._server.stop(grace=None).wait()

    @staticmethod
    def card(version: int) -> dict:
        """Return a well-formed card; versions from 2 on list one learned task."""
        learned = {
            "name": "digits",
            "class_names": ["zero", "one", "two"],
            "templates": ["a photo of the number {}", "the digit {}"],
            "accuracy": {"before": 45.2, "after": None},
            "adapter_sha256": "ab" * 32,
        }
        return {
            "format": 1,
            "model": "clip",
            "version": version,
            "image": {"size": IMAGE_SIZE, "resize_mode": "shortest", "interpolation": "bicubic"},
            "text": {"context_length": 24, "tokenizer_sha256": default_tokenizer().sha256},
            "embed_dim": EMBED_DIM,
            "logit_scale": 100.0,
            "logit_bias": None,
            "base": {"model_name": "mini", "pretrained": "mini", "fingerprint": "cd" * 32},
            "tasks": [learned] if version > 1 else [],
        }

    @staticmethod
    def features(rows: np.ndarray, version: int) -> np.ndarray:
        """Return unit vectors, float32 (rows, EMBED_DIM), that depend on a row without its trailing zeros."""
        seeds = [(version, *np.trim_zeros(row, "b").tolist()) for row in rows]
        drawn = np.stack([np.random.default_rng(seed).normal(size=EMBED_DIM) for seed in seeds])
        return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)

    def ModelMetadata(self, request, context):  # noqa: N802
        if not self.cards or request.name not in {"clip_image", "clip_text", "clip_card"}:
            context.abort(grpc.StatusCode.NOT_FOUND, "not found")
        return service_pb2.ModelMetadataResponse(name=request.name, versions=map(str, sorted(self.cards)))

    def ModelConfig(self, request, context):  # noqa: N802
        self._abort_if_gone(request.version, context)
        answer = service_pb2.ModelConfigResponse()
        answer.config.max_batch_size = MAX_BATCH_SIZE
        return answer

    def ModelStatistics(self, request, context):  # noqa: N802
        answer = service_pb2.ModelStatisticsResponse()
        if not request.name:  # statistics of all models are requested
            for part in ("image", "text", "card") if self.cards else ():
                answer.model_stats.add(name=f"clip_{part}")
            return answer
        self._abort_if_gone(request.version, context)
        compute = answer.model_stats.add(name=request.name, version=request.version).inference_stats.compute_infer
        asked = [r for r in self.requests if r[:2] == (request.name, int(request.version))]
        compute.count, compute.ns = len(asked), 1000 * int(request.version) * len(asked)
        return answer

    def ModelInfer(self, request, context):  # noqa: N802
        version = int(request.model_version)
        self.before_infer(request.model_name, version, context)
        self._abort_if_gone(request.model_version, context)
        shape = tuple(request.inputs[0].shape)
        self.requests.append((request.model_name, version, shape))
        answer = service_pb2.ModelInferResponse(
            id=request.id, model_name=request.model_name, model_version=request.model_version
        )
        name = request.outputs[0].name
        if name == "card":
            text = np.array([[json.dumps(self.cards[version])]], dtype=np.object_)
            answer.outputs.add(name=name, datatype="BYTES", shape=[1, 1])
            answer.raw_output_contents.append(serialize_byte_tensor(text).item())
        else:
            dtype = np.uint8 if name == "image_features" else np.int32
            rows = np.frombuffer(request.raw_input_contents[0], dtype=dtype).reshape(shape[0], -1)
            answer.outputs.add(name=name, datatype="FP32", shape=[shape[0], EMBED_DIM])
            answer.raw_output_contents.append(self.features(rows, version).tobytes())
        self.tamper(answer)
        return answer

    def _abort_if_gone(self, version: str, context: grpc.ServicerContext) -> None:
        if int(version) not in self.cards:
            context.abort(grpc.StatusCode.NOT_FOUND, "gone")


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    """A fresh fake server with version 1 (the base) and version 2 (with the learned task "digits")."""
    server = FakeServer()
    yield server
    server.stop()


@pytest.fixture
def thread_stays() -> Callable[[str], bool]:
    """A function that waits for the threads of a name to end; True if one is still alive after ten seconds."""

    def thread_stays(name: str) -> bool:
        end = time.monotonic() + 10
        while any(thread.name == name for thread in threading.enumerate()):
            if time.monotonic() > end:
                return True
            time.sleep(0.01)
        return False

    return thread_stays


@pytest.fixture(scope="session")
def picture() -> np.ndarray:
    """A random image, uint8 (40, 50, 3)."""
    return np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)


class Blocking:
    """`ZeroShotClassifier` that returns its answers as a list."""

    def __init__(self, *args, **settings):
        self._clip = ZeroShotClassifier(*args, **settings)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def close(self):
        self._clip.close()

    def classify(self, *args, **settings):
        return list(self._clip.classify(*args, **settings))

    def __getattr__(self, name):
        return getattr(self._clip, name)


class Asyncio:
    """`AsyncZeroShotClassifier` that runs in its own event loop."""

    def __init__(self, *args, **settings):
        self._clip = AsyncZeroShotClassifier(*args, **settings)
        self._loop = asyncio.new_event_loop()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()

    def close(self):
        self._loop.run_until_complete(self._clip.aclose())

    def classify(self, *args, **settings):
        answers = self._clip.classify(*args, **settings)

        async def listed():
            return [answer async for answer in answers]

        return self._loop.run_until_complete(listed())

    def __getattr__(self, name):
        method = getattr(self._clip, name)
        return lambda *args, **settings: self._loop.run_until_complete(method(*args, **settings))


@pytest.fixture(params=[Blocking, Asyncio])
def connect(request) -> type[Blocking | Asyncio]:
    """A classifier class, blocking or asynchronous, with the same blocking methods."""
    return request.param


@pytest.fixture
def open_page() -> Iterator[Callable[[str], str]]:
    """A function that runs ``client demo`` on a URL and returns the page's address; Ctrl-C must end it with exit 0."""
    running = []

    def open_page(url: str) -> str:
        command = "from clipweld.client.cli import main; main()"
        arguments = ["demo", "--url", url, "--port", "0", "--no-browser"]
        program = subprocess.Popen(
            [sys.executable, "-c", command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        running.append(program)
        return program.stdout.readline().split(" ")[0]

    yield open_page
    for program in running:
        program.send_signal(signal.SIGINT)
    ends = [(*program.communicate(timeout=30), program.returncode) for program in running]
    assert ends == [("", "", 0)] * len(running)  # nothing was logged either
