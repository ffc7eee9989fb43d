"""Ways to classify images with CLIP, one class each; `evidence.benchmarks.process` runs them.

The top of this module imports only what every contender needs. Each contender imports the rest itself, so that it
counts towards that contender's start time and memory.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

INFINITY_VARIABLE = "INFINITY_EMB"
HOST = "127.0.0.1"
READY_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Bundle:
    """One CLIP in every format that a contender reads, with the images and the labels to choose from.

    Attributes:
        model: open_clip's name for it.
        labels: class names.
        template: the prompt, with ``{}`` in place of the label.
        images: paths of the image files.
        image_size: side of the model's input in pixels.
        logit_scale: the factor by which cosines are multiplied before the softmax.
    """

    model: str
    labels: tuple[str, ...]
    template: str
    images: tuple[str, ...]
    image_size: int
    logit_scale: float

    @property
    def prompts(self) -> list[str]:
        """One prompt per label."""
        return [self.template.format(label) for label in self.labels]

    def save(self, folder: Path) -> None:
        """Write this description beside the model's files."""
        (folder / "bundle.json").write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Bundle:
        """Read what ``save`` wrote."""
        known = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
        return cls(**known | {"labels": tuple(known["labels"]), "images": tuple(known["images"])})


class Contender:
    """A way to get label probabilities for image files.

    Attributes:
        title: its name in the tables.
        kind: "pytorch" or "onnxruntime" (in process), or "server".
    """

    title = ""
    kind = ""

    def __init__(self, bundle: Bundle, folder: Path) -> None:
        self.bundle, self.folder = bundle, folder
        self.exit = contextlib.ExitStack()

    @classmethod
    def missing(cls) -> str | None:
        """Return why this contender can't run here, or None if it can."""
        return None

    def serve(self) -> list[int]:
        """Start the server, if there is one, wait until it is ready, and return its process ids."""
        return []

    def start(self) -> None:
        """Import and load everything that is needed to classify."""
        raise NotImplementedError

    def classify(self, files: Sequence[str]) -> np.ndarray:
        """Return probabilities (num_images, num_labels), in the order of the files; each row sums to 1."""
        raise NotImplementedError

    def close(self) -> None:
        """Stop what ``serve`` started."""
        self.exit.close()


class Clipweld(Contender):
    """A real Triton and our client on the same machine; the client encodes the labels once."""

    title = "clipweld: Triton, client"
    kind = "server"

    def serve(self) -> list[int]:
        from clipweld.exporter.serving.triton import serve

        self.server = self.exit.enter_context(serve(self.folder / "model_repository"))
        return [self.server.process.pid]

    def start(self) -> None:
        from clipweld.client import ZeroShotClassifier

        self.classifier = self.exit.enter_context(ZeroShotClassifier(self.server.url))

    def classify(self, files: Sequence[str]) -> np.ndarray:
        labels = self.bundle.labels
        answers = self.classifier.classify(list(files), labels=list(labels), top_k=len(labels))
        found = [{best.label: best.probability for best in answer.predictions} for answer in answers]
        return np.array([[odds[label] for label in labels] for odds in found])


class OnnxRuntime(Contender):
    """The exported towers in this process, with onnxruntime's own defaults."""

    title = "ONNX Runtime"
    kind = "onnxruntime"

    def start(self) -> None:
        import onnxruntime
        from tokenizers import Tokenizer

        image, text = (
            onnxruntime.InferenceSession(
                self.folder / "model_repository" / f"clip_{tower}" / "1" / "model.onnx",
                providers=["CPUExecutionProvider"],
            )
            for tower in ("image", "text")
        )
        tokenizer = Tokenizer.from_file(str(self.folder / "transformers" / "tokenizer.json"))
        tokens = [np.array([encoded.ids], np.int32) for encoded in tokenizer.encode_batch(self.bundle.prompts)]
        self.text_features = np.concatenate([text.run(None, {"tokens": row})[0] for row in tokens])
        self.image = image

    def classify(self, files: Sequence[str]) -> np.ndarray:
        (features,) = self.image.run(None, {"image": np.stack([self._pixels(file) for file in files])})
        return softmax(self.bundle.logit_scale * features @ self.text_features.T)

    def _pixels(self, file: str) -> np.ndarray:
        from PIL import Image

        image, size = Image.open(file).convert("RGB"), self.bundle.image_size
        image = image.resize([size * side // min(image.size) for side in image.size], Image.Resampling.BICUBIC)
        left, top = ((side - size) // 2 for side in image.size)
        return np.asarray(image.crop((left, top, left + size, top + size)))


class OpenClip(Contender):
    """open_clip as in its README: the labels are encoded at each call."""

    title = "open_clip"
    kind = "pytorch"
    once = False

    def start(self) -> None:
        import open_clip

        name, weights = self.bundle.model, str(self.folder / "open_clip.safetensors")
        open_clip.add_model_config(self.folder / f"{name}.json")  # open_clip has no small CLIP of its own
        self.model, _, self.preprocess = open_clip.create_model_and_transforms(name, pretrained=weights)
        self.model.eval()
        self.tokenizer = open_clip.get_tokenizer(name)
        self.text_features = self._encode_labels() if self.once else None

    def _encode_labels(self):
        import torch

        with torch.inference_mode():
            return self.model.encode_text(self.tokenizer(self.bundle.prompts), normalize=True)

    def classify(self, files: Sequence[str]) -> np.ndarray:
        import torch
        from PIL import Image

        text_features = self.text_features if self.once else self._encode_labels()
        with torch.inference_mode():
            pixels = torch.stack([self.preprocess(Image.open(file)) for file in files])
            features = self.model.encode_image(pixels, normalize=True)
            return (self.model.logit_scale.exp() * features @ text_features.T).softmax(dim=-1).numpy()


class OpenClipOnce(OpenClip):
    """open_clip with the label features encoded once and kept."""

    title = "open_clip, labels once"
    once = True


class Transformers(Contender):
    """transformers' pipeline, which can't keep the label features: they are encoded at each call."""

    title = "transformers pipeline"
    kind = "pytorch"

    @classmethod
    def missing(cls) -> str | None:
        return None if find_spec("transformers") else "transformers is not installed"

    def start(self) -> None:
        from transformers import pipeline

        self.pipeline = pipeline("zero-shot-image-classification", model=str(self.folder / "transformers"))

    def classify(self, files: Sequence[str]) -> np.ndarray:
        labels = list(self.bundle.labels)
        answers = self.pipeline(
            list(files),
            candidate_labels=labels,
            hypothesis_template=self.bundle.template,
            batch_size=len(files),  # its default, 1, runs both towers for each image
        )
        found = [{best["label"]: best["score"] for best in answer} for answer in answers]
        return np.array([[odds[label] for label in labels] for odds in found])


class Infinity(Contender):
    """infinity-emb's server with its own defaults, called as in its documentation; labels are encoded once."""

    title = "infinity-emb"
    kind = "server"

    @classmethod
    def missing(cls) -> str | None:
        if shutil.which(os.environ.get(INFINITY_VARIABLE, "infinity_emb")):
            return None
        return f"no infinity_emb on PATH; where it has an environment of its own, {INFINITY_VARIABLE} names it"

    def serve(self) -> list[int]:
        with socket.socket() as held:
            held.bind((HOST, 0))
            port = held.getsockname()[1]
        self.url = f"http://{HOST}:{port}"
        program = os.environ.get(INFINITY_VARIABLE, "infinity_emb")
        command = [program, "v2", "--host", HOST, "--port", str(port), "--served-model-name", "clip"]
        process = subprocess.Popen([*command, "--model-id", str(self.folder / "transformers")], stdout=sys.stderr)
        self.exit.callback(_stop, process)
        _wait_until_ready(process, f"{self.url}/health")
        return [process.pid]

    def start(self) -> None:
        self.text_features = self._embed(self.bundle.prompts, "text")

    def classify(self, files: Sequence[str]) -> np.ndarray:
        images = [f"data:image/png;base64,{base64.b64encode(Path(file).read_bytes()).decode()}" for file in files]
        return softmax(self.bundle.logit_scale * self._embed(images, "image") @ self.text_features.T)

    def _embed(self, inputs: list[str], modality: str) -> np.ndarray:
        body = {"model": "clip", "input": inputs, "modality": modality, "encoding_format": "base64"}
        request = urllib.request.Request(f"{self.url}/embeddings", json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=READY_TIMEOUT_S) as response:
                rows = json.load(response)["data"]
        except urllib.error.HTTPError as exc:
            raise RuntimeError(f"{exc}: {exc.read(500).decode(errors='replace')}") from exc
        return np.stack([np.frombuffer(base64.b64decode(row["embedding"]), np.float32) for row in rows])


CONTENDERS: tuple[type[Contender], ...] = (Clipweld, OnnxRuntime, OpenClipOnce, OpenClip, Transformers, Infinity)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return the softmax over the last axis."""
    odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return odds / odds.sum(axis=-1, keepdims=True)


def _wait_until_ready(process: subprocess.Popen, url: str) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        with (
            contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError),
            urllib.request.urlopen(url, timeout=5),
        ):
            return
        time.sleep(0.05)
    raise RuntimeError(f"{process.args[0]}: not ready (status {process.poll()})")


def _stop(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
